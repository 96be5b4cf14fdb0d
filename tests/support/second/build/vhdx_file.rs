//! The bytes of a VHDX to test with.

use std::collections::BTreeMap;

use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;

use super::super::bytes::{Guid, parse_guid, put, seal_vhdx, to_utf16le};
use super::super::metadata::{
    DISK_ID, DISK_SIZE, FILE_PARAMETERS, LOCATOR_TYPE, LOGICAL_SECTOR, PARENT_LOCATOR,
    PHYSICAL_SECTOR,
};
use super::super::vhdx::{
    BAT_REGION, HEADER_LEN, HEADERS_AT, KIB, METADATA_REGION, MIB, TABLE_LEN, TABLES_AT,
};
use super::super::{State, len, size};
use super::vhdx::{Item, Order, Slot, VhdxImage, VhdxKind};
use super::{JUNK, write};

/// Where metadata items lie in their region.
const ITEMS_AT: u64 = 64 * KIB;
const METADATA_LEN: u64 = MIB;

/// A VHDX that was built, and where things lie in it.
#[derive(Debug)]
pub(crate) struct Built {
    /// The file, durable.
    pub(crate) sim: SimStorage,
    /// Where its log lies, and its length.
    pub(crate) log: (u64, u64),
    /// Where the metadata lies.
    pub(crate) metadata_at: u64,
    /// Where the block table lies, and its region's length.
    pub(crate) bat: (u64, u64),
    /// The places of payload blocks, those that are not linked too.
    pub(crate) blocks: BTreeMap<u64, u64>,
    /// The places of bitmaps.
    pub(crate) bitmaps: BTreeMap<u64, u64>,
    /// The entries of the block table.
    pub(crate) table: Vec<u64>,
    pub(super) data_write_guids: [Guid; 2],
    pub(super) sequence: u64,
}

/// The entry of the block table that says this.
pub(crate) fn table_entry(state: State, at: u64) -> u64 {
    let state = match state {
        State::NotPresent => 0,
        State::Undefined => 1,
        State::Zero => 2,
        State::Unmapped => 3,
        State::Reserved => 5,
        State::Full => 6,
        State::Partial => 7,
    };
    at | state
}

impl VhdxImage {
    /// The file.
    pub(crate) fn build(&self) -> Built {
        let mut built = self.lay_out();
        write(&built.sim, &file_identifier(), 0);
        built.write_headers([[0; 16]; 2], self.twin_headers);
        let regions = self.regions(&built);
        for at in TABLES_AT {
            write(&built.sim, &regions, at);
        }
        write(&built.sim, &self.metadata(), built.metadata_at);
        for slot in self.slots() {
            self.write_block(&built, slot);
        }
        for (&chunk, &at) in &built.bitmaps {
            write(&built.sim, &self.bitmap(chunk), at);
        }
        built.table = self.table(&built);
        let table: Vec<u8> = built.table.iter().flat_map(|e| e.to_le_bytes()).collect();
        write(&built.sim, &table, built.bat.0);
        let end = built.sim.len().expect("known");
        let cut = built.sim.set_len(end + self.tail - self.cut);
        cut.and_then(|()| built.sim.sync())
            .expect("the simulated host keeps it");
        built
    }

    /// A file that is long enough, with junk in its holes, and where things lie in it.
    fn lay_out(&self) -> Built {
        let sim = SimStorage::new();
        let bat_len = (self.table_entries() * 8).next_multiple_of(MIB);
        let mut at = MIB;
        let mut take = |len: u64| {
            at += len;
            at - len
        };
        let log_at = take(self.log_len);
        let (mut metadata_at, mut bat_at) = (0, 0);
        match self.order {
            Order::Windows => (metadata_at, bat_at) = (take(METADATA_LEN), take(bat_len)),
            Order::Qemu => {
                (bat_at, metadata_at) = (take(bat_len), take(METADATA_LEN));
                take(4 * MIB);
            }
            Order::Behind => {}
        }
        let (mut blocks, mut bitmaps) = (BTreeMap::new(), BTreeMap::new());
        for item in &self.items {
            match item {
                Item::Block(slot) => drop(blocks.insert(slot.block, take(self.block_size))),
                Item::Bitmap(chunk) => drop(bitmaps.insert(*chunk, take(MIB))),
                Item::Hole(len) => write(&sim, &vec![JUNK; size((*len).min(64 * KIB))], take(*len)),
            }
        }
        if self.order == Order::Behind {
            (bat_at, metadata_at) = (take(bat_len), take(METADATA_LEN));
        }
        sim.set_len(at).expect("the simulated host takes it");
        Built {
            sim,
            log: (log_at, self.log_len),
            metadata_at,
            bat: (bat_at, bat_len),
            blocks,
            bitmaps,
            table: Vec::new(),
            data_write_guids: self.data_write_guids,
            sequence: 1,
        }
    }

    /// Entries of the block table.
    fn table_entries(&self) -> u64 {
        let (blocks, ratio) = (self.disk_len.div_ceil(self.block_size), self.chunk_ratio());
        match self.kind {
            VhdxKind::Differencing(_) => blocks.div_ceil(ratio) * (ratio + 1),
            VhdxKind::Fixed | VhdxKind::Dynamic => blocks + (blocks - 1) / ratio,
        }
    }

    fn table(&self, built: &Built) -> Vec<u64> {
        let ratio = self.chunk_ratio();
        let mut table = vec![0; size(self.table_entries())];
        for (&block, &state) in &self.states {
            table[size(block + block / ratio)] = table_entry(state, 0);
        }
        for slot in self.slots().filter(|slot| slot.linked) {
            let at = built.blocks[&slot.block];
            table[size(slot.block + slot.block / ratio)] = table_entry(slot.state, at);
        }
        for (chunk, at) in &built.bitmaps {
            table[size(chunk * (ratio + 1) + ratio)] = table_entry(State::Full, *at);
        }
        table
    }

    /// The block's content, with junk in sectors that are the parent's.
    fn write_block(&self, built: &Built, slot: &Slot) {
        let mut data = vec![0; size(self.block_size)];
        let start = slot.block * self.block_size;
        slot.fill.fill(self.tag, start, &mut data);
        if slot.state == State::Partial {
            let sectors = data.chunks_mut(size(self.logical_sector));
            for (n, sector) in (0..).zip(sectors) {
                if !slot.bits.has(n) {
                    sector.fill(JUNK);
                }
            }
        }
        write(&built.sim, &data, built.blocks[&slot.block]);
    }

    /// The sector bitmap of a chunk.
    fn bitmap(&self, chunk: u64) -> Vec<u8> {
        let (ratio, sectors) = (self.chunk_ratio(), self.block_size / self.logical_sector);
        let mut bitmap = vec![if self.junk_bits { JUNK } else { 0 }; size(MIB)];
        for slot in self.slots() {
            if slot.block / ratio != chunk || slot.state != State::Partial {
                continue;
            }
            for sector in 0..sectors {
                let bit = slot.block % ratio * sectors + sector;
                let byte = &mut bitmap[size(bit / 8)];
                *byte &= !(1 << (bit % 8));
                *byte |= u8::from(slot.bits.has(sector)) << (bit % 8);
            }
        }
        bitmap
    }

    fn regions(&self, built: &Built) -> Vec<u8> {
        let mut bytes = vec![0; size(TABLE_LEN)];
        let regions = [
            (BAT_REGION, built.bat.0, built.bat.1),
            (METADATA_REGION, built.metadata_at, METADATA_LEN),
        ];
        put(&mut bytes, 0, b"regi");
        put(&mut bytes, 8, &2u32.to_le_bytes());
        for (n, (guid, at, len)) in regions.into_iter().enumerate() {
            let entry = 16 + 32 * n;
            put(&mut bytes, entry, &guid);
            put(&mut bytes, entry + 16, &at.to_le_bytes());
            put(&mut bytes, entry + 24, &small(len));
            put(&mut bytes, entry + 28, &1u32.to_le_bytes());
        }
        seal_vhdx(&mut bytes);
        bytes
    }

    /// The metadata region as far as it is used.
    fn metadata(&self) -> Vec<u8> {
        let flags: u64 = match self.kind {
            VhdxKind::Fixed => 1,
            VhdxKind::Dynamic => 0,
            VhdxKind::Differencing(_) => 2,
        };
        let parameters = [small(self.block_size), small(flags)].concat();
        let mut items = vec![
            (FILE_PARAMETERS, parameters),
            (DISK_SIZE, self.disk_len.to_le_bytes().to_vec()),
            (DISK_ID, vec![0x70; 16]),
            (LOGICAL_SECTOR, small(self.logical_sector).to_vec()),
            (PHYSICAL_SECTOR, small(self.physical_sector).to_vec()),
        ];
        if let VhdxKind::Differencing(entries) = &self.kind {
            items.push((PARENT_LOCATOR, locator(entries)));
        }
        let mut bytes = vec![0; size(ITEMS_AT)];
        put(&mut bytes, 0, b"metadata");
        let count = u16::try_from(items.len()).expect("few items");
        put(&mut bytes, 10, &count.to_le_bytes());
        for (n, (item, value)) in items.into_iter().enumerate() {
            let entry = 32 + 32 * n;
            put(&mut bytes, entry, &item.guid());
            let at = len(&bytes);
            put(&mut bytes, entry + 16, &small(at));
            put(&mut bytes, entry + 20, &small(len(&value)));
            put(&mut bytes, entry + 24, &item.flags.to_le_bytes());
            bytes.extend(value);
        }
        bytes
    }
}

impl Built {
    /// Writes both headers anew, the second with the higher number, and these log GUIDs in them.
    pub(super) fn write_headers(&mut self, log_guids: [Guid; 2], twins: bool) {
        for (n, at) in HEADERS_AT.into_iter().enumerate() {
            let mut bytes = vec![0; size(HEADER_LEN)];
            put(&mut bytes, 0, b"head");
            put(&mut bytes, 8, &self.sequence.to_le_bytes());
            put(&mut bytes, 16, &[0x33; 16]);
            put(&mut bytes, 32, &self.data_write_guids[n]);
            put(&mut bytes, 48, &log_guids[n]);
            put(&mut bytes, 66, &1u16.to_le_bytes());
            put(&mut bytes, 68, &small(self.log.1));
            put(&mut bytes, 72, &self.log.0.to_le_bytes());
            seal_vhdx(&mut bytes);
            write(&self.sim, &bytes, at);
            self.sequence += u64::from(!twins);
        }
    }
}

fn small(number: u64) -> [u8; 4] {
    u32::try_from(number)
        .expect("at most 32 bits")
        .to_le_bytes()
}

fn file_identifier() -> Vec<u8> {
    let mut bytes = b"vhdxfile".to_vec();
    bytes.extend(to_utf16le("vhdfs tests"));
    bytes
}

/// A parent locator item.
fn locator(entries: &[(String, String)]) -> Vec<u8> {
    let count = u16::try_from(entries.len()).expect("few entries");
    let mut bytes = vec![0; 20 + 12 * entries.len()];
    let of_type = parse_guid(LOCATOR_TYPE).expect("a GUID");
    put(&mut bytes, 0, &of_type);
    put(&mut bytes, 18, &count.to_le_bytes());
    for (n, (key, value)) in entries.iter().enumerate() {
        for (field, text) in [key, value].into_iter().enumerate() {
            let entry = 20 + 12 * n;
            let text = to_utf16le(text);
            let text_len = u16::try_from(text.len()).expect("a short text");
            let at = len(&bytes);
            put(&mut bytes, entry + 4 * field, &small(at));
            put(&mut bytes, entry + 8 + 2 * field, &text_len.to_le_bytes());
            bytes.extend(text);
        }
    }
    bytes
}
