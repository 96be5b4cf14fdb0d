//! The metadata region of a VHDX.

use super::bytes::{Guid, guid, guid_text, le16, le32, le64, parse_guid, require, utf16le};
use super::vhdx::{CHUNK_SECTORS, KIB, MIB, Region};
use super::view::View;
use crate::support::{len, size};

const TABLE_LEN: u64 = 64 * KIB;
/// Items of a table, and those of them that users may add.
const MAX_ITEMS: u16 = 2047;
const MAX_USER_ITEMS: usize = 1024;
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;

/// The items that a reader must know, with their flags and length. The others that Microsoft's
/// parser knows may be skipped, but for the mark of a file whose creation is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) id: &'static str,
    pub(super) flags: u32,
    len: Option<u64>,
}

const fn item(id: &'static str, flags: u32, len: Option<u64>) -> Item {
    Item { id, flags, len }
}

pub(super) const FILE_PARAMETERS: Item =
    item("caa16737-fa36-4d43-b3b6-33f0aa44e76b", IS_REQUIRED, Some(8));
pub(super) const DISK_SIZE: Item = item(
    "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
    IS_VIRTUAL_DISK | IS_REQUIRED,
    Some(8),
);
pub(super) const DISK_ID: Item = item(
    "beca12ab-b2e6-4523-93ef-c309e000c746",
    IS_VIRTUAL_DISK | IS_REQUIRED,
    Some(16),
);
pub(super) const LOGICAL_SECTOR: Item = item(
    "8141bf1d-a96f-4709-ba47-f233a8faab5f",
    IS_VIRTUAL_DISK | IS_REQUIRED,
    Some(4),
);
pub(super) const PHYSICAL_SECTOR: Item = item(
    "cda348c7-445d-4471-9cc9-e9885251c556",
    IS_VIRTUAL_DISK | IS_REQUIRED,
    Some(4),
);
pub(super) const PARENT_LOCATOR: Item =
    item("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", IS_REQUIRED, None);
const KNOWN: [Item; 6] = [
    FILE_PARAMETERS,
    DISK_SIZE,
    DISK_ID,
    LOGICAL_SECTOR,
    PHYSICAL_SECTOR,
    PARENT_LOCATOR,
];
/// The type of a parent locator that names a VHDX.
pub(super) const LOCATOR_TYPE: &str = "b04aefb7-d19e-4a81-b789-25b8e9445913";

impl Item {
    pub(super) fn guid(&self) -> Guid {
        parse_guid(self.id).expect("a GUID")
    }
}

/// An entry of the metadata table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    id: Guid,
    /// From the region's start.
    at: u64,
    len: u64,
    flags: u32,
}

/// What the metadata region says.
#[derive(Clone, Debug)]
pub(crate) struct Metadata {
    /// Bytes in a block.
    pub(crate) block_size: u64,
    /// Whether blocks stay where they are: a fixed disk.
    pub(crate) leave_blocks_allocated: bool,
    /// Whether it is a differencing disk.
    pub(crate) has_parent: bool,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// What a guest sees as the disk's identity.
    pub(crate) disk_id: Guid,
    /// Bytes in a sector.
    pub(crate) logical_sector: u64,
    /// Bytes in a sector of the medium.
    pub(crate) physical_sector: u64,
    /// The keys and values of the parent locator.
    pub(crate) locators: Vec<(String, String)>,
    entries: Vec<Entry>,
    region_len: u64,
}

impl Metadata {
    pub(super) fn read(view: &View, region: &Region) -> Result<Self, String> {
        let entries = parse_table(&view.bytes(region.at, TABLE_LEN)?)?;
        for Entry { id, at, len, flags } in &entries {
            let known = KNOWN.iter().any(|item| item.guid() == *id);
            let name = guid_text(id);
            require!(
                known || flags & IS_REQUIRED == 0,
                "metadata item {name} is not known, but required"
            );
            require!(
                at + len <= region.len,
                "metadata item {name} lies outside of its region"
            );
        }
        let find = |item: &Item| {
            let is = |entry: &&Entry| entry.id == item.guid() && entry.flags & IS_USER == 0;
            entries.iter().find(is)
        };
        let value = |item: Item| {
            let entry = find(&item).ok_or(format!("metadata item {} is missing", item.id))?;
            require!(
                item.len.is_none_or(|len| len == entry.len),
                "metadata item {} has {} bytes",
                item.id,
                entry.len
            );
            view.bytes(region.at + entry.at, entry.len)
        };
        let parameters = value(FILE_PARAMETERS)?;
        let has_parent = le32(&parameters, 4) & 2 == 2;
        let metadata = Self {
            block_size: u64::from(le32(&parameters, 0)),
            leave_blocks_allocated: le32(&parameters, 4) & 1 == 1,
            has_parent,
            disk_len: le64(&value(DISK_SIZE)?, 0),
            disk_id: guid(&value(DISK_ID)?, 0),
            logical_sector: u64::from(le32(&value(LOGICAL_SECTOR)?, 0)),
            physical_sector: u64::from(le32(&value(PHYSICAL_SECTOR)?, 0)),
            locators: match has_parent {
                true => parse_locator(&value(PARENT_LOCATOR)?)?,
                false => Vec::new(),
            },
            entries,
            region_len: region.len,
        };
        metadata.check_values(le32(&parameters, 4))?;
        Ok(metadata)
    }

    fn check_values(&self, flags: u32) -> Result<(), String> {
        let (block, disk) = (self.block_size, self.disk_len);
        require!(flags & !3 == 0, "unknown file parameters {flags:#x}");
        require!(
            block.is_power_of_two() && (MIB..=256 * MIB).contains(&block),
            "blocks of {block:#x} bytes"
        );
        for sector in [self.logical_sector, self.physical_sector] {
            require!(
                sector == 512 || sector == 4096,
                "sectors of {sector:#x} bytes"
            );
        }
        require!(
            disk > 0 && disk <= 64 << 40 && disk.is_multiple_of(self.logical_sector),
            "a disk of {disk:#x} bytes"
        );
        Ok(())
    }

    /// Payload blocks of a chunk.
    pub(crate) fn chunk_ratio(&self) -> u64 {
        CHUNK_SECTORS * self.logical_sector / self.block_size
    }

    /// Payload blocks of the disk.
    pub(crate) fn block_count(&self) -> u64 {
        self.disk_len.div_ceil(self.block_size)
    }

    /// Entries that the block table needs.
    pub(crate) fn table_entries(&self) -> u64 {
        let (blocks, ratio) = (self.block_count(), self.chunk_ratio());
        match self.has_parent {
            true => blocks.div_ceil(ratio) * (ratio + 1),
            false => blocks + (blocks - 1) / ratio,
        }
    }

    /// The value of the locator's entry `key`.
    pub(crate) fn locator(&self, key: &str) -> Option<&str> {
        let found = self.locators.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// Checks what a reader need not.
    pub(super) fn check(&self) -> Result<(), String> {
        let user = |entry: &&Entry| entry.flags & IS_USER != 0;
        require!(
            self.entries.iter().filter(user).count() <= MAX_USER_ITEMS,
            "too many user items"
        );
        let mut places = Vec::new();
        for (n, entry) in self.entries.iter().enumerate() {
            let (name, flags) = (guid_text(&entry.id), entry.flags);
            let twin = |other: &Entry| {
                (other.id, other.flags & IS_USER) == (entry.id, entry.flags & IS_USER)
            };
            require!(
                !self.entries[..n].iter().any(twin),
                "two metadata items {name}"
            );
            require!(
                flags & !7 == 0 && flags & (IS_USER | IS_REQUIRED) != IS_USER | IS_REQUIRED,
                "metadata item {name} has the flags {flags:#x}"
            );
            let known = KNOWN.iter().find(|item| item.guid() == entry.id);
            require!(
                known.is_none_or(|item| item.flags == flags),
                "metadata item {name} has the flags {flags:#x}"
            );
            require!(
                (entry.len == 0) == (entry.at == 0)
                    && entry.len <= MIB
                    && (entry.len == 0 || entry.at >= TABLE_LEN),
                "metadata item {name} lies at {:#x}, length {:#x}",
                entry.at,
                entry.len
            );
            places.push((entry.at, entry.at + entry.len));
        }
        places.sort_unstable();
        for pair in places.windows(2) {
            require!(
                pair[0].1 <= pair[1].0,
                "metadata items overlap at {:#x}",
                pair[1].0
            );
        }
        let end = places.last().map_or(0, |place| place.1);
        require!(end <= self.region_len, "metadata items beyond their region");
        require!(
            !self.has_parent || self.locator("parent_linkage").is_some(),
            "no parent_linkage"
        );
        Ok(())
    }
}

fn parse_table(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    require!(
        bytes.starts_with(b"metadata"),
        "the metadata table has no signature"
    );
    let count = le16(bytes, 10);
    require!(count <= MAX_ITEMS, "{count} metadata items");
    let entries = bytes[32..].chunks(32).take(usize::from(count));
    let entries = entries.map(|entry| Entry {
        id: guid(entry, 0),
        at: u64::from(le32(entry, 16)),
        len: u64::from(le32(entry, 20)),
        flags: le32(entry, 24),
    });
    Ok(entries.collect())
}

/// The keys and values of a parent locator.
fn parse_locator(bytes: &[u8]) -> Result<Vec<(String, String)>, String> {
    require!(bytes.len() >= 20, "a locator of {} bytes", bytes.len());
    let of_type = guid_text(&guid(bytes, 0));
    require!(
        of_type == format!("{{{LOCATOR_TYPE}}}"),
        "a locator of type {of_type}"
    );
    let count = u64::from(le16(bytes, 18));
    let mut found: Vec<(String, String)> = Vec::new();
    require!(20 + 12 * count <= len(bytes), "{count} locator entries");
    for entry in bytes[20..].chunks(12).take(size(count)) {
        let text = |at: usize, len_at: usize| {
            let (at, len) = (u64::from(le32(entry, at)), le16(entry, len_at));
            let text = bytes.get(size(at)..size(at + u64::from(len)));
            require!(len > 0, "an empty locator text");
            let text = utf16le(text.ok_or("a locator text outside of the item")?)?;
            require!(!text.contains('\0'), "a zero in the locator text {text:?}");
            Ok(text)
        };
        let (key, value) = (text(0, 8)?, text(4, 10)?);
        require!(
            found.iter().all(|(other, _)| *other != key),
            "two locator entries {key}"
        );
        found.push((key, value));
    }
    Ok(found)
}
