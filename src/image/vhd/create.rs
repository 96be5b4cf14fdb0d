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
const LOCATOR_SPACE: u64 = 4096;

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
    let Identity::Vhd(unique_id) = parent.identity else {
        return Err(io::Error::other("the parent of a VHD is a VHD"));
    };
    let blocks = blocks(disk_len, block_size);
    let table_end = DynamicHeader::new(blocks, block_size, TABLE)
        .table_range()
        .end();
    let relative = utf16le(&parent.relative);
    let absolute = utf16le(&parent.absolute);
    let relative_space = space_for(&relative, table_end);
    let absolute_space = space_for(&absolute, relative_space.end());
    let name = (parent.absolute.rsplit(['\\', '/']).next())
        .filter(|name| !name.is_empty())
        .or_else(|| parent.relative.rsplit('\\').next())
        .unwrap_or_default();
    let fields = ParentFields {
        unique_id,
        mtime: parent.mtime,
        name,
        relative: (&relative, relative_space),
        absolute: (&absolute, absolute_space),
    };
    let header = DynamicHeader::new_differencing(blocks, block_size, TABLE, &fields);
    let footer = Footer::new(DiskType::Differencing, disk_len, SystemTime::now());
    storage.write_all_at(&relative, relative_space.start)?;
    storage.write_all_at(&absolute, absolute_space.start)?;
    write_dynamic(storage, &footer, &header, absolute_space.end())
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

/// The space behind `end` for a locator's path.
fn space_for(path: &[u8], end: FileOffset) -> FileRange {
    let len = if path.is_empty() {
        0
    } else {
        round_up(u64_from(path.len()), LOCATOR_SPACE)
    };
    FileRange::new(end, len)
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
