//! The region table: where block table and metadata lie. There are two copies of it.

use std::collections::BTreeSet;

use uuid::{Uuid, uuid};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MIB, checksum_without, guid_from_bytes, guid_to_bytes};
use crate::error::FormatError;
use crate::units::{FileOffset, FileRange, low_u32, u64_from, u64_from_u32, usize_from};

/// Bytes in a copy of the region table.
pub const REGION_TABLE_LEN: u64 = 64 << 10;
/// The region that holds the block table.
pub const BAT_REGION: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
/// The region that holds the metadata items.
pub const METADATA_REGION: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

const SIGNATURE: [u8; 4] = *b"regi";
const CHECKSUM_AT: usize = 4;
const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 32;
const MAX_ENTRIES: u32 = 2047;
const REQUIRED: u32 = 1;
/// The largest block table: that of 64 TiB in blocks of 1 MiB, with a sector bitmap a chunk.
const MAX_BAT_LEN: u64 = 513 * MIB;
const MAX_METADATA_LEN: u64 = 128 * MIB;

/// An entry as it lies in the file. [MS-VHDX 2.2.3.2]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0: which region.
    guid: [u8; 16],
    /// 16: where it lies, a multiple of 1 MiB.
    file_offset: U64,
    /// 24: its bytes, a multiple of 1 MiB.
    length: U32,
    /// 28: bit 0: who does not know it must not open the file.
    required: U32,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// A region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Which one.
    pub id: Uuid,
    /// Where it lies.
    pub range: FileRange,
    /// Whether who does not know it must not open the file.
    pub required: bool,
}

impl Region {
    /// Its name for people.
    pub fn name(&self) -> String {
        match self.id {
            BAT_REGION => "the block table".to_owned(),
            METADATA_REGION => "the metadata region".to_owned(),
            id => format!("the unknown region {id}"),
        }
    }
}

/// A copy of the region table whose signature, checksum and entry count are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionTable {
    bytes: Box<[u8]>,
    regions: Vec<Region>,
}

impl RegionTable {
    /// Decodes a copy. What it says may still be impossible: see [`Self::check`].
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for a wrong length, signature, checksum or entry count.
    pub fn parse(bytes: &[u8], at: FileOffset) -> Result<Self, FormatError> {
        let corrupt = |found: String, expected: &str| {
            FormatError::corrupt(format!("region table at file offset {at}"), found, expected)
        };
        if u64_from(bytes.len()) != REGION_TABLE_LEN || !bytes.starts_with(&SIGNATURE) {
            return Err(corrupt("no `regi` signature".to_owned(), "one"));
        }
        let word = |at: usize| {
            (bytes.get(at..))
                .and_then(|rest| rest.first_chunk::<4>())
                .map_or(0, |word| u32::from_le_bytes(*word))
        };
        let (stored, computed) = (word(CHECKSUM_AT), checksum_without(bytes, CHECKSUM_AT));
        if stored != computed {
            return Err(corrupt(
                format!("checksum {stored:#010x}"),
                &format!("{computed:#010x}, the CRC-32C of its bytes"),
            ));
        }
        let count = word(8);
        if count > MAX_ENTRIES {
            return Err(corrupt(format!("{count} entries"), "at most 2047"));
        }
        Ok(Self::decode(bytes, count))
    }

    /// What two copies agree in that are whole but for their checksums; what lies behind their entries,
    /// where nothing is, becomes zeros.
    pub fn agreed(first: &[u8], second: &[u8]) -> Option<Self> {
        let count = u32::from_le_bytes(*first.get(8..)?.first_chunk()?);
        if count > MAX_ENTRIES || u64_from(first.len()) != REGION_TABLE_LEN {
            return None;
        }
        let end = u64_from_u32(count).saturating_mul(u64_from(ENTRY_LEN));
        let end = usize_from(end).saturating_add(HEADER_LEN);
        let (entries, other) = (first.get(8..end)?, second.get(8..end)?);
        let is_signed = first.starts_with(&SIGNATURE) && second.starts_with(&SIGNATURE);
        if !is_signed || entries != other {
            return None;
        }
        let mut bytes = vec![0; first.len()];
        bytes.get_mut(..end)?.copy_from_slice(first.get(..end)?);
        seal(&mut bytes);
        Some(Self::decode(&bytes, count))
    }

    fn decode(bytes: &[u8], count: u32) -> Self {
        let (entries, _) = bytes
            .get(HEADER_LEN..)
            .unwrap_or_default()
            .as_chunks::<ENTRY_LEN>();
        let regions = (0..count)
            .zip(entries)
            .map(|(_, entry)| {
                let raw: RawEntry = zerocopy::transmute!(*entry);
                Region {
                    id: guid_from_bytes(raw.guid),
                    range: FileRange::new(
                        FileOffset::new(raw.file_offset.get()),
                        u64_from_u32(raw.length.get()),
                    ),
                    required: raw.required.get() & REQUIRED != 0,
                }
            })
            .collect();
        Self {
            bytes: bytes.into(),
            regions,
        }
    }

    /// A table of `regions`, at most 2047, each shorter than 4 GiB.
    pub fn new(regions: Vec<Region>) -> Self {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0; 4]);
        bytes.extend(low_u32(u64_from(regions.len())).to_le_bytes());
        bytes.extend([0; 4]);
        for region in &regions {
            let raw = RawEntry {
                guid: guid_to_bytes(region.id),
                file_offset: U64::new(region.range.start.get()),
                length: U32::new(low_u32(region.range.len)),
                required: U32::new(if region.required { REQUIRED } else { 0 }),
            };
            bytes.extend(raw.as_bytes());
        }
        bytes.resize(64 << 10, 0);
        seal(&mut bytes);
        Self {
            bytes: bytes.into(),
            regions,
        }
    }

    /// The bytes, as read or as made.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The regions, in the table's order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Where the block table and the metadata region lie, once it is sure that all of the table is
    /// possible and known.
    ///
    /// # Errors
    /// [`FormatError::Incompatible`] for an unknown region that must be known, or one that is too
    /// large; [`FormatError::Corrupt`] for a missing or doubled region or a place that cannot be.
    pub fn check(&self) -> Result<(FileRange, FileRange), FormatError> {
        let corrupt =
            |found: String, expected: &str| FormatError::corrupt("region table", found, expected);
        let mut seen = BTreeSet::new();
        for region in &self.regions {
            let name = region.name();
            let known = matches!(region.id, BAT_REGION | METADATA_REGION);
            if region.required && !known {
                return Err(FormatError::incompatible(
                    format!(
                        "region {} at {}, marked as required",
                        region.id, region.range
                    ),
                    "it belongs to a feature that this version does not know",
                ));
            }
            if !seen.insert(region.id) {
                return Err(corrupt(format!("{name} twice"), "each region once"));
            }
            let FileRange { start, len } = region.range;
            let placed = start.get() >= MIB
                && start.get().is_multiple_of(MIB)
                && len.is_multiple_of(MIB)
                && start.get().checked_add(len).is_some();
            if !placed || known && len == 0 {
                return Err(corrupt(
                    format!("{name} at {}", region.range),
                    "multiples of 1 MiB, behind the first one",
                ));
            }
        }
        let find = |id: Uuid, what: &str, most: u64| {
            let region = self.regions.iter().find(|region| region.id == id);
            let range = region
                .map(|region| region.range)
                .ok_or_else(|| corrupt(format!("no entry for {what}"), "one"))?;
            if range.len > most {
                return Err(FormatError::incompatible(
                    format!("{} bytes for {what}", range.len),
                    format!("at most {most} are supported"),
                ));
            }
            Ok(range)
        };
        Ok((
            find(BAT_REGION, "the block table", MAX_BAT_LEN)?,
            find(METADATA_REGION, "the metadata region", MAX_METADATA_LEN)?,
        ))
    }
}

/// Enters the checksum of a copy.
fn seal(bytes: &mut [u8]) {
    let checksum = checksum_without(bytes, CHECKSUM_AT).to_le_bytes();
    if let Some(field) = bytes.get_mut(CHECKSUM_AT..8) {
        field.copy_from_slice(&checksum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::vhdx::REGION_TABLE_1;

    fn region(id: Uuid, start_mib: u64, len: u64) -> Region {
        Region {
            id,
            range: FileRange::new(FileOffset::new(start_mib * MIB), len),
            required: true,
        }
    }

    fn good() -> Vec<Region> {
        vec![
            region(BAT_REGION, 3, MIB),
            region(METADATA_REGION, 2, MIB),
            Region {
                required: false,
                ..region(Uuid::from_u128(5), 9, 2 * MIB)
            },
        ]
    }

    #[test]
    fn a_table_survives_the_file() {
        let table = RegionTable::new(good());
        let read = RegionTable::parse(table.bytes(), REGION_TABLE_1).unwrap();
        assert_eq!(read, table);
        assert_eq!(read.regions(), good());
        let (bat, metadata) = read.check().unwrap();
        assert_eq!((bat.start.get(), metadata.start.get()), (3 * MIB, 2 * MIB));
        // The GUID of the block table, as it lies in files.
        assert_eq!(table.bytes()[16..20], [0x66, 0x77, 0xc2, 0x2d]);
        for at in [0, 4, 8, 40, 65535] {
            let mut damaged = table.bytes().to_vec();
            damaged[at] ^= 1;
            assert!(
                RegionTable::parse(&damaged, REGION_TABLE_1).is_err(),
                "byte {at}"
            );
        }
        assert!(RegionTable::parse(&table.bytes()[..100], REGION_TABLE_1).is_err());
    }

    #[test]
    fn too_many_entries_are_refused() {
        let mut bytes = RegionTable::new(good()).bytes().to_vec();
        bytes[8..12].copy_from_slice(&2048_u32.to_le_bytes());
        let checksum = checksum_without(&bytes, CHECKSUM_AT);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        let error = RegionTable::parse(&bytes, REGION_TABLE_1).unwrap_err();
        assert!(error.to_string().contains("2048 entries"), "{error}");
        let full: Vec<_> = (0..2047)
            .map(|n| region(Uuid::from_u128(n + 1), 1, MIB))
            .collect();
        let table = RegionTable::new(full);
        let read = RegionTable::parse(table.bytes(), REGION_TABLE_1).unwrap();
        assert_eq!(read.regions().len(), 2047);
    }

    #[test]
    fn impossible_tables_are_refused() {
        let kind = |change: &dyn Fn(&mut Vec<Region>)| {
            let mut regions = good();
            change(&mut regions);
            RegionTable::new(regions).check().unwrap_err().kind()
        };
        assert_eq!(
            kind(&|regions| regions[2].required = true),
            ErrorKind::Incompatible
        );
        assert_eq!(kind(&|regions| regions.truncate(0)), ErrorKind::Corrupt);
        assert_eq!(kind(&|regions| regions.truncate(1)), ErrorKind::Corrupt);
        assert_eq!(
            kind(&|regions| regions[2].id = BAT_REGION),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(&|regions| regions[0].range.len = 0),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(&|regions| regions[0].range.len = 4096),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(&|regions| regions[0].range.start = FileOffset::new(0)),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(&|regions| regions[2].range.start = FileOffset::new(u64::MAX - MIB + 1)),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(&|regions| regions[0].range.len = 514 * MIB),
            ErrorKind::Incompatible
        );
        assert_eq!(
            kind(&|regions| regions[1].range.len = 129 * MIB),
            ErrorKind::Incompatible
        );
    }

    #[test]
    fn the_error_names_the_unknown_region() {
        let id = Uuid::from_u128(0xabcd);
        let mut regions = good();
        regions.push(region(id, 20, MIB));
        let error = RegionTable::new(regions).check().unwrap_err();
        assert!(error.to_string().contains(&id.to_string()), "{error}");
    }
}
