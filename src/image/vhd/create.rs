//! New VHDs.

use std::io;
use std::time::SystemTime;

use crate::format::DiskType;
use crate::format::parent::{Identity, NewParent};
use crate::format::vhd::{DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN, ParentFields};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, low_u32, round_up, u64_from, u64_from_u32, usize_from};

/// Where the table of a new disk lies.
const TABLE: FileOffset = FileOffset::new(FOOTER_LEN + HEADER_LEN);
/// Bytes that a locator's path gets at least, so that another one can take its place.
pub(super) const LOCATOR_SPACE: u64 = 4096;

/// Makes an empty disk of `disk_len` bytes in the empty file `storage`, durably. The caller has
/// checked the sizes.
///
/// # Errors
/// Where the host fails; the file is then to be removed.
pub(crate) fn create(
    storage: &dyn Storage,
    disk_type: DiskType,
    disk_len: u64,
    block_size: u32,
) -> io::Result<()> {
    let footer = Footer::new(disk_type, disk_len, SystemTime::now());
    if disk_type == DiskType::Fixed {
        storage.write_all_at(&footer.to_bytes(), FileOffset::new(disk_len))?;
        return storage.sync();
    }
    let blocks = blocks(disk_len, block_size);
    let header = DynamicHeader::new(blocks, block_size, TABLE);
    write_dynamic(storage, &footer, &header, header.table_range().end())
}

/// Makes a disk of `disk_len` bytes in the empty file `storage` that reads as `parent`, durably. The
/// caller has checked the sizes, and that the parent is a VHD.
///
/// Behind the table lie the paths to the parent, each in a space of its own, as Xen has them.
///
/// # Errors
/// Where the host fails; the file is then to be removed.
pub(crate) fn create_differencing(
    storage: &dyn Storage,
    disk_len: u64,
    block_size: u32,
    parent: &NewParent,
) -> io::Result<()> {
    let texts = ParentTexts::of(parent)?;
    let header = DynamicHeader::new(blocks(disk_len, block_size), block_size, TABLE);
    let table_end = header.table_range().end();
    let relative = FileRange::new(table_end, space_for(&texts.relative));
    let absolute = FileRange::new(relative.end(), space_for(&texts.absolute));
    let header = header.with_parent(&texts.fields(relative, absolute));
    let footer = Footer::new(DiskType::Differencing, disk_len, SystemTime::now());
    storage.write_all_at(&texts.relative, relative.start)?;
    storage.write_all_at(&texts.absolute, absolute.start)?;
    write_dynamic(storage, &footer, &header, absolute.end())
}

/// What a VHD says of its parent, as it lies in the file.
#[derive(Debug)]
pub(super) struct ParentTexts<'a> {
    unique_id: [u8; 16],
    mtime: SystemTime,
    name: &'a str,
    /// The path from the child's directory.
    pub(super) relative: Vec<u8>,
    /// The path from a root.
    pub(super) absolute: Vec<u8>,
}

impl<'a> ParentTexts<'a> {
    /// Of `parent`, which is a VHD.
    pub(super) fn of(parent: &'a NewParent) -> io::Result<Self> {
        let Identity::Vhd(unique_id) = parent.identity else {
            return Err(io::Error::other("the parent of a VHD is a VHD"));
        };
        let name = (parent.absolute.rsplit(['\\', '/']).next())
            .filter(|name| !name.is_empty())
            .or_else(|| parent.relative.rsplit('\\').next())
            .unwrap_or_default();
        Ok(Self {
            unique_id,
            mtime: parent.mtime,
            name,
            relative: utf16le(&parent.relative),
            absolute: utf16le(&parent.absolute),
        })
    }

    /// For a header, with its paths in these spaces.
    pub(super) fn fields(&self, relative: FileRange, absolute: FileRange) -> ParentFields<'_> {
        ParentFields {
            unique_id: self.unique_id,
            mtime: self.mtime,
            name: self.name,
            relative: (&self.relative, relative),
            absolute: (&self.absolute, absolute),
        }
    }
}

/// The footer of a new fixed disk of `disk_len` bytes.
pub(super) fn fixed_footer(disk_len: u64) -> Footer {
    Footer::new(DiskType::Fixed, disk_len, SystemTime::now())
}

/// `footer` with the identity of a new disk.
pub(super) fn renewed(footer: &Footer) -> Footer {
    footer.with_new_identity(SystemTime::now())
}

fn blocks(disk_len: u64, block_size: u32) -> u32 {
    low_u32(disk_len.div_ceil(u64_from_u32(block_size)))
}

fn utf16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Bytes of the space for a locator's path; none for none.
pub(super) fn space_for(path: &[u8]) -> u64 {
    round_up(u64_from(path.len()), LOCATOR_SPACE)
}

/// Writes the metadata of a disk without blocks. Nobody takes the file for a disk before it is one:
/// the footers are written last.
fn write_dynamic(
    storage: &dyn Storage,
    footer: &Footer,
    header: &DynamicHeader,
    end: FileOffset,
) -> io::Result<()> {
    let table = header.table_range();
    storage.write_all_at(&header.to_bytes(), FileOffset::new(FOOTER_LEN))?;
    storage.write_all_at(&vec![0xff; usize_from(table.len)], table.start)?;
    storage.set_len(end.get())?;
    storage.sync()?;
    storage.write_all_at(&footer.to_bytes(), FileOffset::new(0))?;
    storage.write_all_at(&footer.to_bytes(), end)?;
    storage.sync()
}
