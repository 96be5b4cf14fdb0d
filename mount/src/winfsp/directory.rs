//! Directories as they are listed.

use std::ffi::OsString;
use std::os::windows::ffi::{OsStrExt, OsStringExt};

use vhdfs::library::{Library, LibraryError, NodeId};
use winfsp::filesystem::{DirInfo, WideNameInfo};

use super::attributes;
use crate::front::{Listings, Place, Reader};

/// The longest name in UTF-16 units. A longer one, which only the suffix can make of a disk's, is not listed.
const LONGEST: usize = 255;

/// Which entries stand before those of the directory itself.
fn dots(node: NodeId) -> &'static [&'static str] {
    match node {
        NodeId::ROOT => &[],
        _ => &[".", ".."],
    }
}

/// Where to go on behind `marker`: how many of the `dots` are done with, and behind which name.
fn behind(marker: Option<&[u16]>, dots: usize) -> (usize, Option<Place>) {
    const DOT: u16 = 0x2e;
    match marker {
        None => (0, None),
        Some([DOT]) => (dots.min(1), None),
        Some([DOT, DOT]) => (dots, None),
        Some(marker) => (dots, Some(OsString::from_wide(marker))),
    }
}

/// Puts entries behind `marker` into `buffer` until it is full. How many bytes that are.
pub(super) fn fill(
    library: &Library,
    listings: &Listings,
    reader: &Reader,
    marker: Option<&[u16]>,
    buffer: &mut [u8],
) -> Result<u32, LibraryError> {
    let node = reader.node;
    let dots = dots(node);
    let (dots_done, mut from) = behind(marker, dots.len());
    let directory = library.directory(node)?;
    let mut cursor = 0;
    let mut entry = DirInfo::<LONGEST>::new();
    for name in &dots[dots_done..] {
        // What is above need not be found again to be listed.
        let found = library.attributes(node)?;
        entry.reset();
        attributes::fill(entry.file_info_mut(), &found);
        if entry.set_name(name).is_ok() && !entry.append_to_buffer(buffer, &mut cursor) {
            return Ok(cursor);
        }
    }
    let mut begins = marker.is_none();
    loop {
        let page = listings.page(library, reader, from.as_ref(), begins)?;
        begins = false;
        for listed in page.behind(from.as_ref()) {
            let found = match library.lookup_in(&directory, &listed.name) {
                Ok(found) => found,
                // Gone since, or about to be told about by whoever opens it.
                Err(error) => {
                    log::debug!("{error}: not listed");
                    continue;
                }
            };
            library.forget(found.node, 1);
            entry.reset();
            attributes::fill(entry.file_info_mut(), &found);
            let wide: Vec<u16> = listed.name.encode_wide().collect();
            if entry.set_name_raw(wide.as_slice()).is_ok()
                && !entry.append_to_buffer(buffer, &mut cursor)
            {
                return Ok(cursor);
            }
        }
        match page.behind(from.as_ref()).last() {
            Some(last) if !page.is_last => from = Some(last.place().clone()),
            _ => break,
        }
    }
    DirInfo::<LONGEST>::finalize_buffer(buffer, &mut cursor);
    Ok(cursor)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_marker_need_not_be_there_any_more() {
        let wide = |name: &str| name.encode_utf16().collect::<Vec<_>>();
        let behind = |marker: Option<&str>, dots| {
            let marker = marker.map(wide);
            super::behind(marker.as_deref(), dots)
        };
        assert_eq!(behind(None, 2), (0, None));
        assert_eq!(behind(Some("."), 2), (1, None));
        assert_eq!(behind(Some(".."), 2), (2, None));
        assert_eq!(behind(Some("b"), 2), (2, Some("b".into())));
        assert_eq!(behind(Some("."), 0), (0, None));
    }
}
