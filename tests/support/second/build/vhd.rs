//! VHD files to test with.

use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;

use super::super::bytes::{Guid, put, to_utf16le, vhd_checksum};
use super::super::vhd::{
    DIFFERENCING, DYNAMIC, FIXED, HEADER_LEN, NOWHERE, SECTOR, UNUSED, VERSION,
};
use super::super::view::pieces;
use super::super::{Parent, len, size};
use super::{Bits, Fill, JUNK, write};
use crate::support::image::Style;

const HEADER_AT: u64 = SECTOR;
/// Bytes that a parent locator keeps.
const LOCATOR_SPACE: u64 = 4096;
/// Bytes of junk of the largest gap that is filled; others hold zeros behind that.
const MAX_JUNK: u64 = 64 << 10;

/// The parent of a child to build.
#[derive(Clone, Debug)]
pub(crate) struct ParentOf {
    /// Its unique id.
    pub(crate) id: Guid,
    /// When it was last changed; Windows 10 writes 0.
    pub(crate) timestamp: u32,
    /// The name in the header.
    pub(crate) name: String,
    /// Locators: code and path.
    pub(crate) locators: Vec<([u8; 4], String)>,
    /// Whether locators count their space in bytes, as all do, or in sectors, as is specified.
    pub(crate) space_in_bytes: bool,
    /// Whether locators lie before the block table, as Windows puts them, or behind it.
    pub(crate) before_table: bool,
}

impl ParentOf {
    /// The parent of this id, a file `name` in the same folder, as Windows notes it.
    pub(crate) fn new(id: Guid, name: &str) -> Self {
        Self {
            id,
            timestamp: 0,
            name: format!("C:\\disks\\{name}"),
            locators: vec![
                (*b"W2ku", format!("C:\\disks\\{name}")),
                (*b"W2ru", format!(".\\{name}")),
            ],
            space_in_bytes: true,
            before_table: true,
        }
    }
}

/// What a VHD is.
#[derive(Clone, Debug)]
pub(crate) enum VhdKind {
    Fixed,
    Dynamic,
    Differencing(ParentOf),
}

/// A slot of a VHD to build.
#[derive(Clone, Debug)]
pub(crate) struct VhdSlot {
    /// The block that it holds.
    pub(crate) block: u64,
    /// Bytes of nothing before its bitmap: a multiple of 512.
    pub(crate) gap: u64,
    /// The sectors that the bitmap names.
    pub(crate) bits: Bits,
    /// What those hold.
    pub(crate) fill: Fill,
}

/// A VHD to build.
#[derive(Clone, Debug)]
pub(crate) struct VhdImage {
    /// What it is.
    pub(crate) kind: VhdKind,
    /// Bytes of data in a block.
    pub(crate) block_size: u64,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// The slots, in the order of the file.
    pub(crate) slots: Vec<VhdSlot>,
    /// Entries of the table beyond what the disk needs.
    pub(crate) spare_entries: u64,
    /// Bytes between the last slot and the footer.
    pub(crate) tail: u64,
    /// By what children know it.
    pub(crate) unique_id: Guid,
    /// Whether sectors that no bitmap of a dynamic disk names hold junk; else they hold zeros, as
    /// they must.
    pub(crate) junk: bool,
    /// Tells its content from that of other disks.
    pub(crate) tag: u64,
}

impl VhdImage {
    /// A dynamic disk with `blocks`, in the order of the file, half full.
    pub(crate) fn dynamic(block_size: u64, disk_len: u64, style: Style, blocks: &[u64]) -> Self {
        let blocks: Vec<(u64, Bits)> = blocks.iter().map(|&block| (block, Bits::All)).collect();
        Self::new(VhdKind::Dynamic, block_size, disk_len, style, &blocks)
    }

    /// A child of `parent`, of the same size, with `blocks` in the order of the file.
    pub(crate) fn child(parent: &Self, style: Style, blocks: &[(u64, Bits)]) -> Self {
        let kind = VhdKind::Differencing(ParentOf::new(parent.unique_id, "parent.vhd"));
        let mut image = Self::new(kind, parent.block_size, parent.disk_len, style, blocks);
        image.tag = parent.tag + 1;
        image.unique_id = [parent.unique_id[0].wrapping_add(1); 16];
        image
    }

    /// A fixed disk.
    pub(crate) fn fixed(disk_len: u64) -> Self {
        let mut image = Self::new(VhdKind::Fixed, disk_len, disk_len, Style::Packed, &[]);
        image.tail = 0;
        image
    }

    /// A disk of `kind` with `blocks` in the order of the file.
    pub(crate) fn new(
        kind: VhdKind,
        block_size: u64,
        disk_len: u64,
        style: Style,
        blocks: &[(u64, Bits)],
    ) -> Self {
        let mut image = Self {
            kind,
            block_size,
            disk_len,
            slots: Vec::new(),
            spare_entries: if style == Style::Gapped { 130 } else { 0 },
            tail: 0,
            unique_id: [7; 16],
            junk: false,
            tag: 1,
        };
        let mut at = image.floor();
        for (n, (block, bits)) in blocks.iter().enumerate() {
            let aligned = |gap: u64| {
                let bitmap_end = at + gap + image.bitmap_len();
                gap + bitmap_end.next_multiple_of(4096) - bitmap_end
            };
            let gap = match style {
                Style::Packed => 0,
                Style::Aligned => aligned(0),
                Style::Xen => aligned(3584),
                Style::Gapped => [512, 0, block_size + 5 * 512, 3584, 2 * block_size][n % 5],
            };
            at += gap + image.bitmap_len() + block_size;
            image.slots.push(VhdSlot {
                block: *block,
                gap,
                bits: bits.clone(),
                fill: if *bits == Bits::All {
                    Fill::Half
                } else {
                    Fill::Full
                },
            });
        }
        if style == Style::Aligned {
            image.tail = (at + SECTOR).next_multiple_of(4096) - SECTOR - at;
        }
        image
    }

    /// The file, durable.
    pub(crate) fn build(&self) -> SimStorage {
        let sim = SimStorage::new();
        let mut at = self.floor();
        if matches!(self.kind, VhdKind::Fixed) {
            for start in (0..self.disk_len).step_by(1 << 20) {
                let mut piece = vec![0; size((self.disk_len - start).min(1 << 20))];
                Fill::Full.fill(self.tag, start, &mut piece);
                write(&sim, &piece, start);
            }
            at = self.disk_len;
        } else {
            let mut table = vec![UNUSED; size(self.entries().next_multiple_of(128))];
            for slot in &self.slots {
                write(&sim, &vec![JUNK; size(slot.gap.min(MAX_JUNK))], at);
                at += slot.gap;
                table[size(slot.block)] = u32::try_from(at / SECTOR).expect("a small file");
                at += self.write_slot(&sim, slot, at);
            }
            let table: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            write(&sim, &table, self.table_at());
            write(&sim, &self.header(), HEADER_AT);
            write(&sim, &self.footer(), 0);
            for (text, place) in self.locators() {
                write(&sim, &text, place);
            }
        }
        write(&sim, &self.footer(), at + self.tail);
        sim.sync().expect("the simulated host keeps it");
        sim
    }

    /// Fills `buf` with what a guest reads at `offset`.
    pub(crate) fn expect(&self, parent: Parent, buf: &mut [u8], offset: u64) {
        if matches!(self.kind, VhdKind::Fixed) {
            for (mib, within, part) in pieces(offset, len(buf), 1 << 20) {
                let mut piece = vec![0; 1 << 20];
                Fill::Full.fill(self.tag, mib << 20, &mut piece);
                let count = part.len();
                buf[part].copy_from_slice(&piece[size(within)..][..count]);
            }
            return;
        }
        for (block, within, part) in pieces(offset, len(buf), self.block_size) {
            let content = self.expect_block(parent, block);
            let count = part.len();
            buf[part].copy_from_slice(&content[size(within)..][..count]);
        }
    }

    /// What a guest reads in a block, which ends where the disk does.
    fn expect_block(&self, parent: Parent, block: u64) -> Vec<u8> {
        let start = block * self.block_size;
        let there = self.block_size.min(self.disk_len - start);
        let mut below = vec![0; size(there)];
        if let (Some(parent), VhdKind::Differencing(_)) = (parent, &self.kind) {
            parent(&mut below, start);
        }
        let Some(slot) = self.slots.iter().find(|slot| slot.block == block) else {
            return below;
        };
        let mut content = vec![0; size(self.block_size)];
        slot.fill.fill(self.tag, start, &mut content);
        content.truncate(below.len());
        let sectors = content.chunks_mut(512).zip(below.chunks(512));
        for (n, (sector, below)) in (0..).zip(sectors) {
            if !slot.bits.has(n) {
                sector.copy_from_slice(below);
            }
        }
        content
    }

    fn write_slot(&self, sim: &SimStorage, slot: &VhdSlot, at: u64) -> u64 {
        let mut data = vec![0; size(self.block_size)];
        let start = slot.block * self.block_size;
        slot.fill.fill(self.tag, start, &mut data);
        let mut bitmap = vec![0; size(self.bitmap_len())];
        let junk = self.junk || matches!(self.kind, VhdKind::Differencing(_));
        for (n, sector) in data.chunks_mut(512).enumerate() {
            if slot.bits.has(u64::try_from(n).expect("few sectors")) {
                bitmap[n / 8] |= 0x80 >> (n % 8);
            } else {
                sector.fill(if junk { JUNK } else { 0 });
            }
        }
        write(sim, &bitmap, at);
        write(sim, &data, at + self.bitmap_len());
        self.bitmap_len() + self.block_size
    }

    fn entries(&self) -> u64 {
        self.disk_len.div_ceil(self.block_size) + self.spare_entries
    }

    fn bitmap_len(&self) -> u64 {
        (self.block_size / SECTOR)
            .div_ceil(8)
            .next_multiple_of(SECTOR)
    }

    fn locators_len(&self, before_table: bool) -> u64 {
        match &self.kind {
            VhdKind::Differencing(parent) if parent.before_table == before_table => {
                LOCATOR_SPACE * u64::try_from(parent.locators.len()).expect("at most 8")
            }
            _ => 0,
        }
    }

    /// Where the block table lies.
    pub(crate) fn table_at(&self) -> u64 {
        HEADER_AT + HEADER_LEN + self.locators_len(true)
    }

    /// Where the first slot may lie.
    pub(crate) fn floor(&self) -> u64 {
        let table_end = self.table_at() + (self.entries() * 4).next_multiple_of(SECTOR);
        table_end + self.locators_len(false)
    }

    /// The texts of the locators, and where they lie.
    fn locators(&self) -> Vec<(Vec<u8>, u64)> {
        let VhdKind::Differencing(parent) = &self.kind else {
            return Vec::new();
        };
        let first = match parent.before_table {
            true => HEADER_AT + HEADER_LEN,
            false => self.floor() - self.locators_len(false),
        };
        let places = (first..).step_by(size(LOCATOR_SPACE));
        let texts = parent.locators.iter().map(|(_, text)| to_utf16le(text));
        texts.zip(places).collect()
    }

    fn footer(&self) -> Vec<u8> {
        let (disk_type, header_at) = match self.kind {
            VhdKind::Fixed => (FIXED, NOWHERE),
            VhdKind::Dynamic => (DYNAMIC, HEADER_AT),
            VhdKind::Differencing(_) => (DIFFERENCING, HEADER_AT),
        };
        let mut bytes = vec![0; size(SECTOR)];
        put(&mut bytes, 0, b"conectix");
        put(&mut bytes, 8, &2u32.to_be_bytes());
        put(&mut bytes, 12, &VERSION.to_be_bytes());
        put(&mut bytes, 16, &header_at.to_be_bytes());
        put(&mut bytes, 24, &0x2000_0000u32.to_be_bytes());
        put(&mut bytes, 28, b"win ");
        put(&mut bytes, 32, &0x000a_0000u32.to_be_bytes());
        put(&mut bytes, 36, b"Wi2k");
        put(&mut bytes, 40, &self.disk_len.to_be_bytes());
        put(&mut bytes, 48, &self.disk_len.to_be_bytes());
        put(&mut bytes, 56, &geometry(self.disk_len / SECTOR));
        put(&mut bytes, 60, &disk_type.to_be_bytes());
        put(&mut bytes, 68, &self.unique_id);
        let sum = vhd_checksum(&bytes, 64);
        put(&mut bytes, 64, &sum.to_be_bytes());
        bytes
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = vec![0; size(HEADER_LEN)];
        let small = |number: u64| u32::try_from(number).expect("a small file").to_be_bytes();
        put(&mut bytes, 0, b"cxsparse");
        put(&mut bytes, 8, &NOWHERE.to_be_bytes());
        put(&mut bytes, 16, &self.table_at().to_be_bytes());
        put(&mut bytes, 24, &VERSION.to_be_bytes());
        put(&mut bytes, 28, &small(self.entries()));
        put(&mut bytes, 32, &small(self.block_size));
        if let VhdKind::Differencing(parent) = &self.kind {
            put(&mut bytes, 40, &parent.id);
            put(&mut bytes, 56, &parent.timestamp.to_be_bytes());
            let name = parent.name.encode_utf16().flat_map(u16::to_be_bytes);
            put(&mut bytes, 64, &name.collect::<Vec<_>>());
            let space = match parent.space_in_bytes {
                true => LOCATOR_SPACE,
                false => LOCATOR_SPACE / SECTOR,
            };
            let codes = parent.locators.iter().map(|(code, _)| code);
            for (n, (code, (text, at))) in codes.zip(self.locators()).enumerate() {
                let entry = 576 + 24 * n;
                put(&mut bytes, entry, code);
                put(&mut bytes, entry + 4, &small(space));
                put(&mut bytes, entry + 8, &small(len(&text)));
                put(&mut bytes, entry + 16, &at.to_be_bytes());
            }
        }
        let sum = vhd_checksum(&bytes, 36);
        put(&mut bytes, 36, &sum.to_be_bytes());
        bytes
    }
}

/// Cylinders, heads and sectors of a track of a disk of `sectors`.
fn geometry(sectors: u64) -> [u8; 4] {
    let sectors = sectors.min(65535 * 16 * 255);
    let (mut track, mut heads) = (17, 0);
    if sectors >= 65535 * 16 * 63 {
        (track, heads) = (255, 16);
    } else {
        let fits = |track: u64, heads: u64| sectors / track < heads * 1024 && heads <= 16;
        heads = heads.max((sectors / track).div_ceil(1024)).max(4);
        for wider in [31, 63] {
            if !fits(track, heads) {
                (track, heads) = (wider, 16);
            }
        }
    }
    let cylinders = u16::try_from(sectors / track / heads).expect("capped above");
    let [high, low] = cylinders.to_be_bytes();
    let small = |number: u64| u8::try_from(number).expect("at most 255");
    [high, low, small(heads), small(track)]
}
