//! Structures of the Virtual Hard Disk format 2: headers, region tables, metadata, block table.
//!
//! Field tables, deviations and their sources stand in `mount/docs/reference/vhdx.md`; the
//! names here are those of \[MS-VHDX\]. All integers are little-endian, and GUIDs have their first
//! three groups so too. Checksums are CRC-32C with the checksum's own field taken as 0.

mod bat;
mod header;
mod locator;
pub mod log;
pub mod metadata;
mod region;

use uuid::Uuid;

use crate::units::FileOffset;

pub use bat::{BAT_ENTRY_LEN, BatEntry, BatGeometry, BatSlot, PayloadState};
pub use header::{CurrentHeader, HEADER_LEN, Header, LOG_VERSION, agreed_header, choose_header};
pub use locator::ParentLocator;
pub use region::{BAT_REGION, METADATA_REGION, REGION_TABLE_LEN, Region, RegionTable};

/// One mebibyte: the granularity of everything but the structures in the first one.
pub const MIB: u64 = 1 << 20;
/// Bytes in a page: what a log entry replaces as a whole.
pub const PAGE: u64 = 4096;
/// The file type identifier: who made the file. Never changes.
pub const IDENTIFIER: FileOffset = FileOffset::new(0);
/// The first header.
pub const HEADER_1: FileOffset = FileOffset::new(64 << 10);
/// The second header.
pub const HEADER_2: FileOffset = FileOffset::new(128 << 10);
/// The first copy of the region table. Nothing in front of it is ever changed through the log.
pub const REGION_TABLE_1: FileOffset = FileOffset::new(192 << 10);
/// The second copy of the region table.
pub const REGION_TABLE_2: FileOffset = FileOffset::new(256 << 10);
/// Bytes in a sector-bitmap block: a bit for each sector of a chunk.
pub const BITMAP_BLOCK_LEN: u64 = MIB;
/// Sectors in a chunk.
pub const CHUNK_SECTORS: u64 = 1 << 23;
/// The largest disk.
pub const MAX_DISK_LEN: u64 = 64 << 40;
/// The largest log that is read or written.
pub const MAX_LOG_LEN: u64 = 1 << 30;
/// Block sizes of the format, in bytes; each a power of two.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;

/// A GUID as it lies in the file.
pub(crate) fn guid_to_bytes(guid: Uuid) -> [u8; 16] {
    guid.to_bytes_le()
}

/// The GUID that lies in the file as `bytes`.
pub(crate) fn guid_from_bytes(bytes: [u8; 16]) -> Uuid {
    Uuid::from_bytes_le(bytes)
}

/// CRC-32C over `bytes` with the four at `field` taken as 0.
pub(crate) fn checksum_without(bytes: &[u8], field: usize) -> u32 {
    let (before, rest) = bytes.split_at(field.min(bytes.len()));
    let after = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(
        crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]),
        after,
    )
}
