//! Where an item of another length goes.

use uuid::Uuid;

use super::{ENTRY_LEN, MAX_ITEM_LEN, METADATA_TABLE_LEN, MetadataItem, MetadataTable};
use crate::units::{low_u32, u64_from, u64_from_u32};

/// A place for an item in its region, and what the table is to say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Where the item goes, from the start of the region.
    pub at: u64,
    /// Where the changed part of its table entry lies, from the start of the region.
    pub entry_at: u64,
    /// That part: offset and length.
    pub entry: [u8; 8],
}

impl MetadataTable {
    /// Room for `len` bytes that take the place of the item `id` in a region of `region_len` bytes: where it
    /// is now, or else in the first gap. `None` where there is no such item, or no room.
    pub fn room_for(&self, id: Uuid, len: u64, region_len: u64) -> Option<Room> {
        let is_it = |item: &MetadataItem| item.id == id && !item.flags.is_user;
        let index = self.items.iter().position(is_it)?;
        let old = self.items.get(index)?;
        if len == 0 || len > u64_from_u32(MAX_ITEM_LEN) {
            return None;
        }
        let others = || (self.items.iter()).filter(|item| item.len > 0 && !is_it(item));
        let is_free = |at: u64| {
            let end = at.saturating_add(len);
            let taken = |item: &MetadataItem| u64_from_u32(item.offset) < end && at < item.end();
            end <= region_len.min(u64::from(u32::MAX)) && !others().any(taken)
        };
        let own = Some(u64_from_u32(old.offset)).filter(|at| *at >= METADATA_TABLE_LEN);
        let mut starts: Vec<u64> = others().map(MetadataItem::end).collect();
        starts.push(METADATA_TABLE_LEN);
        starts.sort_unstable();
        let at = own.into_iter().chain(starts).find(|at| is_free(*at))?;
        // The table's own header is as long as an entry.
        let entry = u64_from(index.saturating_add(1).saturating_mul(ENTRY_LEN));
        let [a, b, c, d] = low_u32(at).to_le_bytes();
        let [e, f, g, h] = low_u32(len).to_le_bytes();
        Some(Room {
            at,
            entry_at: entry.saturating_add(16),
            entry: [a, b, c, d, e, f, g, h],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DISK_ID, DISK_SIZE, FILE_PARAMETERS, ItemFlags, encode_metadata};
    use super::*;

    const START: u64 = METADATA_TABLE_LEN;
    const REGION: u64 = 1 << 20;

    /// A table of items of 8, 100, and 16 bytes, one behind the other.
    fn table() -> (Vec<u8>, MetadataTable) {
        let encoded = encode_metadata(&[
            (FILE_PARAMETERS, ItemFlags::FILE, vec![1; 8]),
            (DISK_SIZE, ItemFlags::DISK, vec![2; 100]),
            (DISK_ID, ItemFlags::DISK, vec![3; 16]),
        ]);
        let table = MetadataTable::parse(&encoded[..65536], REGION).unwrap();
        (encoded, table)
    }

    #[test]
    fn an_item_stays_where_it_fits() {
        let (_, table) = table();
        let at = |id, len, region| table.room_for(id, len, region).map(|room| room.at - START);
        assert_eq!(at(DISK_SIZE, 100, REGION), Some(8));
        assert_eq!(at(DISK_SIZE, 1, REGION), Some(8));
        assert_eq!(at(DISK_SIZE, 101, REGION), Some(124));
        assert_eq!(at(DISK_ID, 5000, REGION), Some(108), "the last one grows");
        assert_eq!(at(DISK_SIZE, 101, START + 124 + 101), Some(124));
        assert_eq!(at(DISK_SIZE, 101, START + 124 + 100), None);
        assert_eq!(at(DISK_SIZE, 0, REGION), None);
        assert_eq!(at(Uuid::from_u128(1), 1, REGION), None);
    }

    #[test]
    fn the_table_says_where_it_is() {
        let (mut encoded, table) = table();
        let room = table.room_for(DISK_SIZE, 300, REGION).unwrap();
        let entry = usize::try_from(room.entry_at).unwrap();
        encoded[entry..entry + 8].copy_from_slice(&room.entry);
        let table = MetadataTable::parse(&encoded[..65536], REGION).unwrap();
        let item = table.find(DISK_SIZE).unwrap();
        assert_eq!((u64::from(item.offset), item.len), (START + 124, 300));
        assert_eq!(item.flags, ItemFlags::DISK);
        assert!(table.oddities().is_empty(), "no two overlap");
        // What it left has room for others.
        let grown = table.room_for(FILE_PARAMETERS, 108, REGION).unwrap();
        assert_eq!(grown.at, START);
    }
}
