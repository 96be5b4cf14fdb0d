//! The header of a new differencing disk.

use super::{DynamicHeader, EPOCH, RawHeader, RawLocator, U32, checksum};
use crate::units::{FileOffset, FileRange, low_u32, u64_from};
use zerocopy::IntoBytes;

/// The platform code of a path from the child's directory, UTF-16 little-endian.
const RELATIVE: u32 = u32::from_be_bytes(*b"W2ru");
/// The platform code of a path from a root, UTF-16 little-endian.
const ABSOLUTE: u32 = u32::from_be_bytes(*b"W2ku");

/// What a new header says of the parent.
#[derive(Clone, Debug)]
pub struct ParentFields<'a> {
    /// The parent's `UniqueID`.
    pub unique_id: [u8; 16],
    /// When the parent's file was last changed.
    pub mtime: std::time::SystemTime,
    /// The parent's name, for people and old programs.
    pub name: &'a str,
    /// The path from the child's directory, encoded, with the space that it has in the file.
    pub relative: (&'a [u8], FileRange),
    /// The path from a root, encoded, with its space.
    pub absolute: (&'a [u8], FileRange),
}

impl DynamicHeader {
    /// A header for a new differencing disk of `blocks` blocks. Empty paths get no locator.
    pub fn new_differencing(
        blocks: u32,
        block_size: u32,
        table_offset: FileOffset,
        parent: &ParentFields<'_>,
    ) -> Self {
        let mut raw: RawHeader = Self::new(blocks, block_size, table_offset).raw;
        raw.parent_unique_id = parent.unique_id;
        raw.parent_time_stamp = U32::new(time_stamp(parent.mtime));
        // The last character stays 0, and no character is cut in two.
        let mut left = 255_usize;
        let (units, _) = raw.parent_unicode_name.as_chunks_mut::<2>();
        let mut units = units.iter_mut();
        for c in parent.name.chars() {
            let mut buf = [0; 2];
            let encoded = c.encode_utf16(&mut buf);
            let Some(rest) = left.checked_sub(encoded.len()) else {
                break;
            };
            left = rest;
            for (place, unit) in units.by_ref().zip(encoded.iter()) {
                *place = unit.to_be_bytes();
            }
        }
        let locators = [(RELATIVE, parent.relative), (ABSOLUTE, parent.absolute)];
        let used = locators.iter().filter(|(_, (path, _))| !path.is_empty());
        for (place, (code, (path, space))) in raw.parent_locators.iter_mut().zip(used) {
            *place = RawLocator {
                platform_code: U32::new(*code),
                // In bytes, as Windows has it; the specification says sectors.
                platform_data_space: U32::new(low_u32(space.len)),
                platform_data_length: U32::new(low_u32(u64_from(path.len()))),
                reserved: U32::new(0),
                platform_data_offset: super::U64::new(space.start.get()),
            };
        }
        raw.checksum = U32::new(0);
        raw.checksum = U32::new(checksum(raw.as_bytes()));
        Self { raw }
    }
}

/// `time` in seconds since 2000; 0 for earlier ones.
fn time_stamp(time: std::time::SystemTime) -> u32 {
    time.duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| low_u32(time.as_secs().saturating_sub(EPOCH)))
}
