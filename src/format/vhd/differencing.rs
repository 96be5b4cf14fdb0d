//! What the header of a differencing disk says of its parent.

use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::{FromZeros, IntoBytes};

use super::{DynamicHeader, EPOCH, RawHeader, RawLocator, U32, U64, checksum};
use crate::units::{FileRange, low_u32, u64_from};

/// The platform code of a path from the child's directory, UTF-16 little-endian.
const RELATIVE: u32 = u32::from_be_bytes(*b"W2ru");
/// The platform code of a path from a root, UTF-16 little-endian.
const ABSOLUTE: u32 = u32::from_be_bytes(*b"W2ku");
/// The longest name that the header holds.
const NAME_UNITS: usize = 255;

/// What a header says of the parent.
#[derive(Clone, Debug)]
pub struct ParentFields<'a> {
    /// The parent's `UniqueID`.
    pub unique_id: [u8; 16],
    /// When the parent's file was last changed.
    pub mtime: SystemTime,
    /// The parent's name, for people and old programs.
    pub name: &'a str,
    /// The path from the child's directory, encoded, with the space that it has in the file.
    pub relative: (&'a [u8], FileRange),
    /// The path from a root, encoded, with its space.
    pub absolute: (&'a [u8], FileRange),
}

impl DynamicHeader {
    /// This header, naming `parent` and no other. Empty paths get no locator.
    pub fn with_parent(&self, parent: &ParentFields<'_>) -> Self {
        let mut raw = RawHeader {
            parent_unique_id: parent.unique_id,
            parent_time_stamp: U32::new(time_stamp(parent.mtime)),
            parent_unicode_name: [0; 512],
            parent_locators: [RawLocator::new_zeroed(); 8],
            ..self.raw
        };
        let (places, _) = raw.parent_unicode_name.as_chunks_mut::<2>();
        for (place, unit) in places.iter_mut().zip(name_units(parent.name)) {
            *place = unit.to_be_bytes();
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
                platform_data_offset: U64::new(space.start.get()),
            };
        }
        raw.checksum = U32::new(0);
        raw.checksum = U32::new(checksum(raw.as_bytes()));
        Self { raw }
    }
}

/// As much of `name` as fits the header's field with a 0 behind it; no character is cut in two.
fn name_units(name: &str) -> Vec<u16> {
    let mut units = Vec::new();
    for c in name.chars() {
        let mut buf = [0; 2];
        let encoded = c.encode_utf16(&mut buf);
        if units.len().saturating_add(encoded.len()) > NAME_UNITS {
            break;
        }
        units.extend_from_slice(encoded);
    }
    units
}

/// `time` in seconds since 2000; 0 for earlier ones.
fn time_stamp(time: SystemTime) -> u32 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |time| low_u32(time.as_secs().saturating_sub(EPOCH)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::FileOffset;

    #[test]
    fn a_long_name_is_cut_between_characters() {
        let parent = |name| ParentFields {
            unique_id: [7; 16],
            mtime: UNIX_EPOCH,
            name,
            relative: (&[1, 0], FileRange::new(FileOffset::new(4096), 4096)),
            absolute: (&[], FileRange::new(FileOffset::new(8192), 0)),
        };
        let name = format!("{}\u{1f600}x", "a".repeat(254));
        let at = FileOffset::new(512);
        let header = DynamicHeader::new(1, 2 << 20, at).with_parent(&parent(&name));
        let bytes = header.to_bytes();
        assert_eq!(bytes[64..576], [[0, b'a'].repeat(254), vec![0; 4]].concat());
        let read = DynamicHeader::parse(&bytes, at).unwrap();
        assert_eq!(read.parent_unique_id(), [7; 16]);
        let ranges: Vec<_> = read.locator_ranges().collect();
        assert_eq!(ranges, [FileRange::new(FileOffset::new(4096), 4096)]);
        let short = header.with_parent(&parent("b\u{e4}"));
        let renamed = short.to_bytes();
        assert_eq!(renamed[64..68], [0, b'b', 0, 0xe4]);
        assert!(
            renamed[68..576].iter().all(|byte| *byte == 0),
            "nothing of the old one"
        );
    }
}
