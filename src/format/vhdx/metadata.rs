//! The metadata region: a table of items, and behind it the items themselves.

use std::collections::BTreeSet;

use uuid::{Uuid, uuid};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BLOCK_SIZES, MAX_DISK_LEN, guid_from_bytes, guid_to_bytes};
use crate::error::FormatError;
use crate::units::{low_u32, u64_from, u64_from_u32};

/// Bytes in the table of items, at the start of the region.
pub const METADATA_TABLE_LEN: u64 = 64 << 10;
/// The longest item.
pub const MAX_ITEM_LEN: u32 = 1 << 20;

/// Block size, and whether the disk is fixed or has a parent.
pub const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
/// The disk's size.
pub const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
/// What the disk tells its guest as its SCSI page 83 identifier.
pub const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
/// The sector size that the guest sees.
pub const LOGICAL_SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
/// The sector size that the guest is advised to write in.
pub const PHYSICAL_SECTOR_SIZE: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
/// Where the parent is.
pub const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// Known to Microsoft's parser, not in the specification: the disk's old geometry. Not needed.
const CHS_PARAMETERS: Uuid = uuid!("da02d7bc-3d3a-423c-ac88-2a36ab21479b");
/// As before: room for a label of persistent memory. Not needed.
const PMEM_LABEL: Uuid = uuid!("10e1ae8a-4b7e-4169-a40f-cd70de928393");
/// As before: present until the program that creates the file is done with it.
const INCOMPLETE_MARKER: Uuid = uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3");

mod room;

pub use room::Room;

const SIGNATURE: [u8; 8] = *b"metadata";
const ENTRY_LEN: usize = 32;
const MAX_ENTRIES: u16 = 2047;
const MAX_USER_ITEMS: usize = 1024;

/// An entry as it lies in the file. [MS-VHDX 2.6.1.2]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0: which item.
    item_id: [u8; 16],
    /// 16: where it lies in the region, behind the table; 0 for an empty one.
    offset: U32,
    /// 20: its bytes.
    length: U32,
    /// 24: [`ItemFlags`].
    flags: U32,
    /// 28: 0.
    reserved: U32,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// What kind of item one is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ItemFlags {
    /// Bit 0: some program's own; the format does not define it.
    pub is_user: bool,
    /// Bit 1: of the disk, not of the file.
    pub is_virtual_disk: bool,
    /// Bit 2: who does not know it must not open the file.
    pub is_required: bool,
}

impl ItemFlags {
    /// A required item about the file.
    pub const FILE: Self = Self {
        is_user: false,
        is_virtual_disk: false,
        is_required: true,
    };
    /// A required item about the disk.
    pub const DISK: Self = Self {
        is_virtual_disk: true,
        ..Self::FILE
    };

    fn from_bits(bits: u32) -> Self {
        Self {
            is_user: bits & 1 != 0,
            is_virtual_disk: bits & 2 != 0,
            is_required: bits & 4 != 0,
        }
    }

    fn bits(self) -> u32 {
        u32::from(self.is_user)
            | u32::from(self.is_virtual_disk) << 1
            | u32::from(self.is_required) << 2
    }
}

/// An item's entry in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetadataItem {
    /// Which item.
    pub id: Uuid,
    /// Where it lies in the region.
    pub offset: u32,
    /// Its bytes.
    pub len: u32,
    /// What kind it is.
    pub flags: ItemFlags,
}

impl MetadataItem {
    /// The first byte behind it in the region.
    pub fn end(&self) -> u64 {
        u64_from_u32(self.offset).saturating_add(u64_from_u32(self.len))
    }
}

/// A table of items that is possible, and of which all required ones are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataTable {
    items: Vec<MetadataItem>,
}

impl MetadataTable {
    /// Decodes the table in `bytes`, 64 KiB, of a region of `region_len` bytes.
    ///
    /// # Errors
    /// [`FormatError::Incompatible`] for an unknown item that must be known, or where the file's
    /// creation was not finished; [`FormatError::Corrupt`] for what cannot be.
    pub fn parse(bytes: &[u8], region_len: u64) -> Result<Self, FormatError> {
        if u64_from(bytes.len()) != METADATA_TABLE_LEN || !bytes.starts_with(&SIGNATURE) {
            return Err(corrupt("no `metadata` signature", "one"));
        }
        let count = (bytes.get(10..))
            .and_then(|rest| rest.first_chunk::<2>())
            .map_or(0, |count| u16::from_le_bytes(*count));
        if count > MAX_ENTRIES {
            return Err(corrupt(format!("{count} entries"), "at most 2047"));
        }
        let (entries, _) = bytes.as_chunks::<ENTRY_LEN>();
        let items: Vec<MetadataItem> = (0..count)
            .zip(entries.iter().skip(1))
            .map(|(_, entry)| {
                let raw: RawEntry = zerocopy::transmute!(*entry);
                MetadataItem {
                    id: guid_from_bytes(raw.item_id),
                    offset: raw.offset.get(),
                    len: raw.length.get(),
                    flags: ItemFlags::from_bits(raw.flags.get()),
                }
            })
            .collect();
        check_items(&items, region_len)?;
        Ok(Self { items })
    }

    /// The items, in the table's order.
    pub fn items(&self) -> &[MetadataItem] {
        &self.items
    }

    /// The item of the format with the identifier `id`.
    pub fn find(&self, id: Uuid) -> Option<&MetadataItem> {
        (self.items.iter()).find(|item| item.id == id && !item.flags.is_user)
    }

    /// The item `id`, which people call `name` and which has `len` bytes.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where it is missing or of another length.
    pub fn need(&self, id: Uuid, name: &str, len: u32) -> Result<&MetadataItem, FormatError> {
        let item = self
            .find(id)
            .ok_or_else(|| corrupt(format!("no item `{name}`"), "one"))?;
        if item.len != len {
            return Err(corrupt(
                format!("{} bytes for the item `{name}`", item.len),
                format!("{len}"),
            ));
        }
        Ok(item)
    }

    /// Sentences about what is odd, but harms nobody.
    pub fn oddities(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (id, name, flags) in [
            (FILE_PARAMETERS, "file parameters", ItemFlags::FILE),
            (DISK_SIZE, "disk size", ItemFlags::DISK),
            (DISK_ID, "disk identifier", ItemFlags::DISK),
            (LOGICAL_SECTOR_SIZE, "logical sector size", ItemFlags::DISK),
            (
                PHYSICAL_SECTOR_SIZE,
                "physical sector size",
                ItemFlags::DISK,
            ),
            (PARENT_LOCATOR, "parent locator", ItemFlags::FILE),
        ] {
            if let Some(item) = self.find(id)
                && item.flags != flags
            {
                found.push(format!(
                    "the flags of the metadata item `{name}` are {:#x} instead of {:#x}",
                    item.flags.bits(),
                    flags.bits()
                ));
            }
        }
        let mut sorted: Vec<_> = self.items.iter().filter(|item| item.len > 0).collect();
        sorted.sort_by_key(|item| item.offset);
        for pair in sorted.windows(2) {
            if let [one, other] = pair
                && one.end() > u64_from_u32(other.offset)
            {
                let (one, other) = (one.id, other.id);
                found.push(format!("the metadata items {one} and {other} overlap"));
            }
        }
        found
    }
}

fn corrupt(found: impl Into<String>, expected: impl Into<String>) -> FormatError {
    FormatError::corrupt("metadata table", found, expected)
}

/// Whether `item` is one of those that this program knows, needed or not.
fn is_known(item: &MetadataItem) -> bool {
    const KNOWN: [Uuid; 8] = [
        FILE_PARAMETERS,
        DISK_SIZE,
        DISK_ID,
        LOGICAL_SECTOR_SIZE,
        PHYSICAL_SECTOR_SIZE,
        PARENT_LOCATOR,
        CHS_PARAMETERS,
        PMEM_LABEL,
    ];
    !item.flags.is_user && KNOWN.contains(&item.id)
}

fn check_items(items: &[MetadataItem], region_len: u64) -> Result<(), FormatError> {
    let mut seen = BTreeSet::new();
    for item in items {
        if item.id == INCOMPLETE_MARKER && !item.flags.is_user {
            return Err(FormatError::incompatible(
                "a file whose creation was not finished",
                "create it again",
            ));
        }
        if item.flags.is_required && !is_known(item) {
            return Err(FormatError::incompatible(
                format!("metadata item {}, marked as required", item.id),
                "it belongs to a feature that this version does not know",
            ));
        }
        if !seen.insert((item.id, item.flags.is_user)) {
            return Err(corrupt(format!("item {} twice", item.id), "each item once"));
        }
        let place = || {
            format!(
                "item {} of {} bytes at {:#x}",
                item.id, item.len, item.offset
            )
        };
        if item.len == 0 {
            if item.offset != 0 {
                return Err(corrupt(place(), "offset 0 of an empty item"));
            }
        } else if item.len > MAX_ITEM_LEN
            || u64_from_u32(item.offset) < METADATA_TABLE_LEN
            || item.end() > region_len
        {
            return Err(corrupt(
                place(),
                format!(
                    "at most 1 MiB, between the table and the end of the region at {region_len:#x}"
                ),
            ));
        }
    }
    let user_items = items.iter().filter(|item| item.flags.is_user).count();
    if user_items > MAX_USER_ITEMS {
        return Err(corrupt(format!("{user_items} user items"), "at most 1024"));
    }
    Ok(())
}

/// The start of a metadata region: the table of `items`, and behind it their bytes.
///
/// # Panics
/// For over 2047 items or one that is longer than 1 MiB: we make a handful.
pub fn encode_metadata(items: &[(Uuid, ItemFlags, Vec<u8>)]) -> Vec<u8> {
    assert!(items.len() <= usize::from(MAX_ENTRIES));
    let mut table = SIGNATURE.to_vec();
    table.extend([0; 2]);
    table.extend(u16::try_from(items.len()).unwrap_or(u16::MAX).to_le_bytes());
    table.resize(ENTRY_LEN, 0);
    let mut at = METADATA_TABLE_LEN;
    let mut data: Vec<u8> = Vec::new();
    for (id, flags, bytes) in items {
        let len = u64_from(bytes.len());
        assert!(0 < len && len <= u64_from_u32(MAX_ITEM_LEN));
        let raw = RawEntry {
            item_id: guid_to_bytes(*id),
            offset: U32::new(low_u32(at)),
            length: U32::new(low_u32(len)),
            flags: U32::new(flags.bits()),
            reserved: U32::new(0),
        };
        table.extend(raw.as_bytes());
        data.extend(bytes);
        at = at.saturating_add(len);
    }
    table.resize(64 << 10, 0);
    table.extend(data);
    table
}

/// The item [`FILE_PARAMETERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileParameters {
    /// Bytes of data in a block: one of [`BLOCK_SIZES`].
    pub block_size: u32,
    /// Whether the file keeps room for all blocks: a fixed disk.
    pub leave_blocks_allocated: bool,
    /// Whether it is a differencing disk.
    pub has_parent: bool,
}

impl FileParameters {
    /// Decodes the item.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for a block size that the format does not know,
    /// [`FormatError::Incompatible`] for unknown flags.
    pub fn parse(bytes: [u8; 8]) -> Result<Self, FormatError> {
        let [size, flags]: [U32; 2] = zerocopy::transmute!(bytes);
        let (block_size, flags) = (size.get(), flags.get());
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            return Err(FormatError::corrupt(
                "metadata item `file parameters`",
                format!("a block size of {block_size} bytes"),
                "a power of two from 1 to 256 MiB",
            ));
        }
        if flags & !3 != 0 {
            return Err(FormatError::incompatible(
                format!("flags {flags:#x} in the metadata item `file parameters`"),
                "only bits 0 (fixed) and 1 (has a parent) are known",
            ));
        }
        Ok(Self {
            block_size,
            leave_blocks_allocated: flags & 1 != 0,
            has_parent: flags & 2 != 0,
        })
    }

    /// As it lies in the file.
    pub fn to_bytes(self) -> [u8; 8] {
        let flags = u32::from(self.leave_blocks_allocated) | u32::from(self.has_parent) << 1;
        zerocopy::transmute!([U32::new(self.block_size), U32::new(flags)])
    }
}

/// Decodes the item that gives a sector size, which people call `name`.
///
/// # Errors
/// [`FormatError::Corrupt`] for another one than 512 and 4096.
pub fn parse_sector_size(bytes: [u8; 4], name: &str) -> Result<u64, FormatError> {
    match u32::from_le_bytes(bytes) {
        size @ (512 | 4096) => Ok(u64_from_u32(size)),
        other => Err(FormatError::corrupt(
            format!("metadata item `{name}`"),
            format!("{other} bytes"),
            "512 or 4096",
        )),
    }
}

/// Decodes the item [`DISK_SIZE`] of a disk with sectors of `sector_size` bytes.
///
/// # Errors
/// [`FormatError::Corrupt`] for a size that cannot be.
pub fn parse_disk_len(bytes: [u8; 8], sector_size: u64) -> Result<u64, FormatError> {
    let len = u64::from_le_bytes(bytes);
    if len == 0 || len > MAX_DISK_LEN || !len.is_multiple_of(sector_size) {
        return Err(FormatError::corrupt(
            "metadata item `disk size`",
            format!("{len} bytes"),
            format!("a multiple of {sector_size} above 0, at most 64 TiB"),
        ));
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const REGION: u64 = 1 << 20;

    fn items() -> Vec<(Uuid, ItemFlags, Vec<u8>)> {
        vec![
            (FILE_PARAMETERS, ItemFlags::FILE, vec![1; 8]),
            (DISK_SIZE, ItemFlags::DISK, vec![2; 8]),
            (Uuid::from_u128(7), ItemFlags::default(), vec![3; 5]),
        ]
    }

    /// The table of `items()` with `bytes` at offset `at`.
    fn poked(at: usize, bytes: &[u8]) -> Result<MetadataTable, FormatError> {
        let mut encoded = encode_metadata(&items());
        encoded[at..at + bytes.len()].copy_from_slice(bytes);
        MetadataTable::parse(&encoded[..65536], REGION)
    }

    #[test]
    fn items_survive_the_file() {
        let encoded = encode_metadata(&items());
        let table = MetadataTable::parse(&encoded[..65536], REGION).unwrap();
        assert_eq!(table.items().len(), 3);
        for (id, flags, bytes) in items() {
            let item = table.find(id).unwrap();
            let (start, end) = (
                usize::try_from(item.offset).unwrap(),
                usize::try_from(item.end()).unwrap(),
            );
            assert_eq!((item.flags, &encoded[start..end]), (flags, &bytes[..]));
        }
        assert!(table.need(DISK_SIZE, "disk size", 8).is_ok());
        assert!(table.need(DISK_SIZE, "disk size", 4).is_err());
        assert!(table.need(DISK_ID, "disk identifier", 16).is_err());
        assert_eq!(table.oddities(), Vec::<String>::new());
    }

    #[test]
    fn impossible_tables_are_refused() {
        let kind = |at, bytes: &[u8]| poked(at, bytes).unwrap_err().kind();
        assert_eq!(kind(0, b"M"), ErrorKind::Corrupt);
        assert_eq!(kind(10, &2048_u16.to_le_bytes()), ErrorKind::Corrupt);
        // The entry of the first item starts at 32.
        assert_eq!(kind(32 + 16, &0_u32.to_le_bytes()), ErrorKind::Corrupt);
        assert_eq!(
            kind(32 + 16, &0xffff_ffff_u32.to_le_bytes()),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(32 + 20, &low_u32(REGION).to_le_bytes()),
            ErrorKind::Corrupt
        );
        assert_eq!(kind(32 + 20, &0_u32.to_le_bytes()), ErrorKind::Corrupt);
        assert_eq!(
            kind(64, &guid_to_bytes(FILE_PARAMETERS)),
            ErrorKind::Corrupt
        );
        assert_eq!(kind(96 + 24, &4_u32.to_le_bytes()), ErrorKind::Incompatible);
        assert_eq!(
            kind(96, &guid_to_bytes(INCOMPLETE_MARKER)),
            ErrorKind::Incompatible
        );
        let unknown = poked(96 + 24, &4_u32.to_le_bytes())
            .unwrap_err()
            .to_string();
        assert!(
            unknown.contains(&Uuid::from_u128(7).to_string()),
            "{unknown}"
        );
        // A user's item is another one than the format's of the same identifier.
        let bytes = [
            &guid_to_bytes(DISK_SIZE)[..],
            &[0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0],
        ]
        .concat();
        let table = poked(96, &bytes).unwrap();
        assert_eq!(table.find(DISK_SIZE).unwrap().len, 8);
        assert_eq!(table.oddities().len(), 1, "they overlap");
    }

    #[test]
    fn the_parameters_are_checked() {
        let parameters = FileParameters {
            block_size: 32 << 20,
            leave_blocks_allocated: false,
            has_parent: true,
        };
        assert_eq!(FileParameters::parse(parameters.to_bytes()), Ok(parameters));
        assert_eq!(parameters.to_bytes(), [0, 0, 0, 2, 2, 0, 0, 0]);
        let parse = |size: u32, flags: u32| {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&size.to_le_bytes());
            bytes[4..].copy_from_slice(&flags.to_le_bytes());
            FileParameters::parse(bytes).map_err(|error| error.kind())
        };
        assert!(parse(1 << 20, 3).is_ok());
        for size in [0, 512 << 10, 3 << 20, 512 << 20] {
            assert_eq!(parse(size, 0), Err(ErrorKind::Corrupt), "{size}");
        }
        assert_eq!(parse(1 << 20, 4), Err(ErrorKind::Incompatible));
        assert!(parse_sector_size(4096_u32.to_le_bytes(), "x").is_ok());
        assert!(parse_sector_size(1024_u32.to_le_bytes(), "x").is_err());
        assert!(parse_disk_len((64_u64 << 40).to_le_bytes(), 512).is_ok());
        for len in [0, 512, (64 << 40) + 4096] {
            assert!(
                parse_disk_len(u64::to_le_bytes(len), 4096).is_err(),
                "{len}"
            );
        }
    }
}
