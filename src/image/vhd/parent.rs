//! What a differencing VHD says of its parent.

use super::layout::{choose_footer, named, read_tail, saved_state};
use crate::error::{FormatError, OpenProblem};
use crate::format::parent::{Identity, ParentLink, ParentPath, PathKind};
use crate::format::vhd::{
    DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN, Locator, MAX_BLOCKS, MAX_LOCATOR_LEN,
};
use crate::format::{DiskType, Format};
use crate::image::open::GLANCED_BLOCKS;
use crate::image::{Identified, LayoutError, Probe, read_array};
use crate::storage::Storage;
use crate::units::{FileOffset, SECTOR_SIZE, u64_from_u32, usize_from};

/// Reads the parent's identity and the paths to it out of `header` and its parent locators: relative
/// paths, then absolute ones, then the parent's name.
///
/// A locator that is damaged is passed over: the identity decides whether a disk is the parent, and
/// another locator, or the name, may lead to it.
///
/// # Errors
/// Where the identity is missing: Xen's way to name a raw parent. Where the host fails.
pub(super) fn read_parent_link(
    storage: &dyn Storage,
    header: &DynamicHeader,
    file_len: u64,
) -> Result<ParentLink, LayoutError> {
    if header.parent_unique_id() == [0; 16] {
        return Err(FormatError::incompatible(
            "a differencing disk without its parent's identity, as Xen makes over raw disks",
            "convert it with Xen's vhd-util",
        )
        .into());
    }
    let mut found = Vec::new();
    for locator in header.locators() {
        if let Some(path) = read_locator(storage, &locator, file_len)? {
            found.push((locator.platform, path));
        }
    }
    // Stable, so that of equals the header's order remains.
    found.sort_by_key(|(platform, path)| (path.kind != PathKind::Relative, *platform));
    let mut paths: Vec<ParentPath> = Vec::new();
    let located = found.into_iter().map(|(_, path)| path);
    for path in located.chain(header.parent_name()) {
        if paths.iter().all(|known| known.text != path.text) {
            paths.push(path);
        }
    }
    Ok(ParentLink {
        identities: vec![Identity::Vhd(header.parent_unique_id())],
        paths,
    })
}

/// Reads the headers of the VHD in `storage`.
///
/// # Errors
/// Where it is no VHD, they are damaged, or the host fails.
pub(crate) fn identify(storage: &dyn Storage) -> Result<Identified, OpenProblem> {
    Ok(read_headers(storage)?)
}

fn read_headers(storage: &dyn Storage) -> Result<Identified, LayoutError> {
    let file_len = storage.len()?;
    let footer = read_footer(storage, file_len)?;
    let parent = match footer.disk_type() {
        DiskType::Fixed | DiskType::Dynamic => None,
        DiskType::Differencing => {
            let header = read_header(storage, &footer, file_len)?;
            Some(read_parent_link(storage, &header, file_len)?)
        }
    };
    Ok(Identified {
        format: Format::Vhd,
        identity: Identity::Vhd(footer.unique_id()),
        disk_len: footer.disk_len(),
        sector_size: SECTOR_SIZE,
        parent,
    })
}

/// What the headers tell of a VHD with over [`GLANCED_BLOCKS`]; `None` of all others.
///
/// # Errors
/// As [`identify`].
pub(crate) fn probe_large(storage: &dyn Storage) -> Result<Option<Probe>, OpenProblem> {
    Ok(read_large(storage)?)
}

fn read_large(storage: &dyn Storage) -> Result<Option<Probe>, LayoutError> {
    let file_len = storage.len()?;
    let footer = read_footer(storage, file_len)?;
    if footer.disk_type() == DiskType::Fixed {
        return Ok(None);
    }
    let header = read_header(storage, &footer, file_len)?;
    let blocks = (footer.disk_len()).div_ceil(u64_from_u32(header.block_size()).max(1));
    // One that has more than any is refused by who reads all of it.
    if !(GLANCED_BLOCKS + 1..=MAX_BLOCKS).contains(&blocks) {
        return Ok(None);
    }
    let parent = match footer.disk_type() {
        DiskType::Differencing => Some(read_parent_link(storage, &header, file_len)?),
        _ => None,
    };
    Ok(Some(Probe {
        format: Format::Vhd,
        virtual_size: footer.disk_len(),
        disk_type: footer.disk_type(),
        identity: Identity::Vhd(footer.unique_id()),
        parent,
        not_writable: saved_state(&footer),
    }))
}

fn read_footer(storage: &dyn Storage, file_len: u64) -> Result<Footer, LayoutError> {
    if file_len < FOOTER_LEN {
        return Err(named(storage, FormatError::NotVhd).into());
    }
    let copy = Footer::parse(&read_array(storage, FileOffset::new(0))?);
    let footer = choose_footer(&read_tail(storage, file_len)?, &copy);
    Ok(footer.map_err(|error| named(storage, error))?)
}

fn read_header(
    storage: &dyn Storage,
    footer: &Footer,
    file_len: u64,
) -> Result<DynamicHeader, LayoutError> {
    let at = FileOffset::new(footer.data_offset());
    if at.plus(HEADER_LEN).get() > file_len {
        let found = format!("a dynamic header at file offset {at}");
        let expected = format!("one inside the file of {file_len} bytes");
        return Err(FormatError::corrupt("footer", found, expected).into());
    }
    Ok(DynamicHeader::parse(&read_array(storage, at)?, at)?)
}

fn read_locator(
    storage: &dyn Storage,
    locator: &Locator,
    file_len: u64,
) -> Result<Option<ParentPath>, LayoutError> {
    let data = locator.data;
    if data.len > MAX_LOCATOR_LEN || data.end().get() > file_len {
        log::debug!("a parent locator claims {data} of a file of {file_len} bytes: not read");
        return Ok(None);
    }
    let mut bytes = vec![0; usize_from(data.len)];
    storage.read_exact_at(&mut bytes, data.start)?;
    Ok(locator.decode(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim::SimStorage;

    const PARENT: [u8; 16] = [7; 16];

    /// A header with these parent locators (code, length, offset) and this name.
    fn header(locators: &[(&[u8; 4], u32, u64)], name: &str) -> DynamicHeader {
        let table = FileOffset::new(1536);
        let mut bytes = DynamicHeader::new(4, 2 << 20, table).to_bytes();
        bytes[40..56].copy_from_slice(&PARENT);
        for (n, unit) in name.encode_utf16().enumerate() {
            bytes[64 + 2 * n..66 + 2 * n].copy_from_slice(&unit.to_be_bytes());
        }
        for (n, (code, len, offset)) in locators.iter().enumerate() {
            let locator = &mut bytes[576 + 24 * n..600 + 24 * n];
            locator[..4].copy_from_slice(*code);
            locator[8..12].copy_from_slice(&len.to_be_bytes());
            locator[16..].copy_from_slice(&offset.to_be_bytes());
        }
        bytes[36..40].fill(0);
        let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
        bytes[36..40].copy_from_slice(&(!sum).to_be_bytes());
        DynamicHeader::parse(&bytes, FileOffset::new(512)).unwrap()
    }

    fn paths(header: &DynamicHeader, storage: &SimStorage) -> Vec<(PathKind, String)> {
        let len = storage.len().unwrap();
        let link = read_parent_link(storage, header, len).unwrap();
        assert_eq!(link.identities, [Identity::Vhd(PARENT)]);
        let paths = link.paths.into_iter();
        paths.map(|path| (path.kind, path.text)).collect()
    }

    fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn relative_paths_come_first_and_the_name_last() {
        let storage = SimStorage::new();
        let write = |at, bytes: &[u8]| {
            storage.write_all_at(bytes, FileOffset::new(at)).unwrap();
        };
        write(4096, &utf16(r"D:\base.vhd"));
        write(8192, &utf16(r".\base.vhd"));
        write(9000, b"file://./base.vhd");
        write(9100, b".\\base.vhd\0");
        storage.set_len(1 << 20).unwrap();
        let header = header(
            &[
                (b"W2ku", 22, 4096),
                (b"MacX", 17, 9000),
                (b"Mac ", 22, 4096),
                (b"W2ru", 40, 8192),
                (b"Wi2r", 11, 9100),
            ],
            "base.vhd",
        );
        let text = |kind, text: &str| (kind, text.to_owned());
        assert_eq!(
            paths(&header, &storage),
            [
                text(PathKind::Relative, r".\base.vhd"),
                text(PathKind::Relative, "./base.vhd"),
                text(PathKind::Absolute, r"D:\base.vhd"),
                text(PathKind::Relative, "base.vhd"),
            ]
        );
    }

    #[test]
    fn locators_that_lead_nowhere_are_passed_over() {
        let storage = SimStorage::new();
        storage.set_len(1 << 20).unwrap();
        let header = header(
            &[
                (b"W2ru", u32::MAX, 4096),
                (b"W2ku", 22, u64::MAX - 3),
                (b"MacX", 22, (1 << 20) - 21),
                (b"W2ru", (64 << 10) + 1, 0),
                (b"W2ku", 0, 4096),
                (b"W2ru", 22, 4096),
            ],
            r"C:\VMs\base.vhd",
        );
        let name = (PathKind::Absolute, r"C:\VMs\base.vhd".to_owned());
        assert_eq!(paths(&header, &storage), [name]);
    }
}
