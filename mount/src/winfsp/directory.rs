//! Directories as they are listed.

use std::ffi::OsString;
use std::os::windows::ffi::OsStrExt;
use std::sync::Arc;

use parking_lot::Mutex;
use vhdfs::library::{Directory, Library, LibraryError, NodeId};
use winfsp::filesystem::{DirInfo, WideNameInfo};

use super::attributes;

/// The longest name in UTF-16 units. A longer one, which only the suffix can make of a disk's, is not listed.
const LONGEST: usize = 255;

/// A directory's content in a fixed order, so that a reader can go on behind any name, also if
/// that is gone by now.
pub(super) struct Sorted {
    directory: Directory,
    names: Vec<(Vec<u16>, OsString)>,
}

impl Sorted {
    fn new(directory: Directory) -> Self {
        let entries = directory.entries().iter();
        let names = entries.map(|entry| (entry.name.encode_wide().collect(), entry.name.clone()));
        let mut names: Vec<(Vec<u16>, OsString)> = names.collect();
        names.sort_unstable();
        names.dedup();
        Self { directory, names }
    }
}

/// What a handle lists: the directory as it was when the handle last began with it.
#[derive(Default)]
pub(super) struct Listing(Mutex<Option<Arc<Sorted>>>);

impl Listing {
    /// The listing to go on with; read anew for who begins.
    pub(super) fn get(
        &self,
        library: &Library,
        node: NodeId,
        begins: bool,
    ) -> Result<Arc<Sorted>, LibraryError> {
        let kept = self.0.lock().clone();
        match kept {
            Some(kept) if !begins => Ok(kept),
            _ => {
                let read = Arc::new(Sorted::new(library.read_directory(node)?));
                *self.0.lock() = Some(read.clone());
                Ok(read)
            }
        }
    }
}

/// Which entries stand before those of the directory itself.
fn dots(node: NodeId) -> &'static [&'static str] {
    match node {
        NodeId::ROOT => &[],
        _ => &[".", ".."],
    }
}

/// Where to go on behind `marker`: how many of the dots, and how many names, are done with.
fn behind(names: &[(Vec<u16>, OsString)], marker: Option<&[u16]>, dots: usize) -> (usize, usize) {
    const DOT: u16 = 0x2e;
    match marker {
        None => (0, 0),
        Some([DOT]) => (dots.min(1), 0),
        Some([DOT, DOT]) => (dots, 0),
        Some(marker) => (
            dots,
            names.partition_point(|(name, _)| name.as_slice() <= marker),
        ),
    }
}

/// Puts entries behind `marker` into `buffer` until it is full. How many bytes that are.
pub(super) fn fill(
    library: &Library,
    node: NodeId,
    listing: &Sorted,
    marker: Option<&[u16]>,
    buffer: &mut [u8],
) -> Result<u32, LibraryError> {
    let dots = dots(node);
    let (dots_done, names_done) = behind(&listing.names, marker, dots.len());
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
    for (wide, name) in &listing.names[names_done..] {
        let found = match library.lookup_in(&listing.directory, name) {
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
        if entry.set_name_raw(wide.as_slice()).is_err() {
            continue;
        }
        if !entry.append_to_buffer(buffer, &mut cursor) {
            return Ok(cursor);
        }
    }
    DirInfo::<LONGEST>::finalize_buffer(buffer, &mut cursor);
    Ok(cursor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_need_not_be_there_any_more() {
        let wide = |name: &str| name.encode_utf16().collect::<Vec<_>>();
        let names = ["!", "a", "c"].map(|name| (wide(name), OsString::from(name)));
        let behind = |marker: Option<&str>, dots| {
            let marker = marker.map(wide);
            super::behind(&names, marker.as_deref(), dots)
        };
        assert_eq!(behind(None, 2), (0, 0));
        assert_eq!(behind(Some("."), 2), (1, 0));
        assert_eq!(behind(Some(".."), 2), (2, 0));
        assert_eq!(behind(Some("!"), 2), (2, 1));
        assert_eq!(behind(Some("b"), 2), (2, 2));
        assert_eq!(behind(Some("c"), 0), (0, 3));
        assert_eq!(behind(Some("."), 0), (0, 0));
    }
}
