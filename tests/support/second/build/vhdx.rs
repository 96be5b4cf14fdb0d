//! VHDX files to test with.

use std::collections::BTreeMap;

use super::super::bytes::{Guid, guid_text};
use super::super::vhdx::{CHUNK_SECTORS, MIB};
use super::super::view::pieces;
use super::super::{Parent, State, len, size};
use super::{Bits, Fill};

/// What a VHDX is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VhdxKind {
    Fixed,
    Dynamic,
    /// With the entries of its parent locator.
    Differencing(Vec<(String, String)>),
}

/// Where the log and the regions lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Log, metadata, block table.
    Windows,
    /// Log, block table, metadata, and 4 MiB of nothing.
    Qemu,
    /// At the end of the file.
    Behind,
}

/// How blocks lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One after the other.
    Packed,
    /// With holes of every size, some of them larger than a block.
    Gapped,
}

/// Something that lies in a VHDX to build, behind what is before it in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A payload block.
    Block(Slot),
    /// The sector bitmap block of this chunk.
    Bitmap(u64),
    /// This many bytes of nothing, a multiple of 1 MiB.
    Hole(u64),
}

/// A payload block with a place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Which.
    pub(crate) block: u64,
    /// What the block table says of it. [`State::Undefined`] and [`State::Unmapped`] only keep its
    /// place.
    pub(crate) state: State,
    /// The sectors that the chunk's bitmap names, if it is [`State::Partial`].
    pub(crate) bits: Bits,
    /// What it holds.
    pub(crate) fill: Fill,
    /// Whether the block table knows of it. If not, it is there for a log to name it.
    pub(crate) linked: bool,
}

impl Slot {
    /// A block that is there as a whole, half full.
    pub(crate) fn full(block: u64) -> Self {
        Self {
            block,
            state: State::Full,
            bits: Bits::All,
            fill: Fill::Half,
            linked: true,
        }
    }

    /// A block of which these sectors are there.
    pub(crate) fn partial(block: u64, bits: Bits) -> Self {
        Self {
            state: State::Partial,
            bits,
            fill: Fill::Full,
            ..Self::full(block)
        }
    }

    /// A block that is not there, but has a place with its old content.
    pub(crate) fn anchor(block: u64, state: State) -> Self {
        Self {
            state,
            ..Self::full(block)
        }
    }
}

/// A VHDX to build.
#[derive(Clone, Debug)]
pub(crate) struct VhdxImage {
    /// What it is.
    pub(crate) kind: VhdxKind,
    /// Bytes of data in a block.
    pub(crate) block_size: u64,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// Bytes in a sector: 512 or 4096.
    pub(crate) logical_sector: u64,
    /// Bytes in a sector of the medium: 512 or 4096.
    pub(crate) physical_sector: u64,
    /// What lies in the file, in its order.
    pub(crate) items: Vec<Item>,
    /// The states of blocks without a place; [`State::NotPresent`] for those not named here.
    pub(crate) states: BTreeMap<u64, State>,
    /// Where the log and the regions lie.
    pub(crate) order: Order,
    /// Bytes of the log.
    pub(crate) log_len: u64,
    /// The `DataWriteGuid` in the first and the second header; the second counts.
    pub(crate) data_write_guids: [Guid; 2],
    /// Whether both headers are the same, their number too, as disk2vhd leaves them.
    pub(crate) twin_headers: bool,
    /// Bytes behind the last thing. disk2vhd leaves 512.
    pub(crate) tail: u64,
    /// Bytes that the file is too short by.
    pub(crate) cut: u64,
    /// Whether bitmaps hold junk for blocks that are not [`State::Partial`]. It means nothing, but
    /// libvhdi does not know that.
    pub(crate) junk_bits: bool,
    /// Tells its content from that of other disks.
    pub(crate) tag: u64,
}

impl VhdxImage {
    /// A dynamic disk with `blocks` in the order of the file, half full.
    pub(crate) fn dynamic(block_size: u64, disk_len: u64, layout: Layout, blocks: &[u64]) -> Self {
        let slots = blocks.iter().map(|&block| Slot::full(block));
        Self::new(VhdxKind::Dynamic, block_size, disk_len, layout, slots)
    }

    /// A fixed disk, its blocks half full.
    pub(crate) fn fixed(block_size: u64, disk_len: u64) -> Self {
        let slots = (0..disk_len.div_ceil(block_size)).map(Slot::full);
        let kind = VhdxKind::Fixed;
        Self::new(kind, block_size, disk_len, Layout::Packed, slots)
    }

    /// A child of `parent`, with blocks and sectors of the same size, and `slots` in the order of the
    /// file. The bitmap of a chunk comes before the first of its blocks that needs it.
    pub(crate) fn child(parent: &Self, layout: Layout, slots: &[Slot]) -> Self {
        let linkage = guid_text(&parent.data_write_guids[1]);
        let entries = [
            ("parent_linkage", linkage.as_str()),
            ("relative_path", ".\\parent.vhdx"),
            ("absolute_win32_path", "\\\\?\\C:\\disks\\parent.vhdx"),
        ];
        let entries = entries.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let kind = VhdxKind::Differencing(entries.into());
        // The size of sectors decides where bitmaps are needed.
        let mut image = Self::new(kind, parent.block_size, parent.disk_len, layout, []);
        image.logical_sector = parent.logical_sector;
        image.physical_sector = parent.physical_sector;
        image.place(layout, slots.iter().cloned());
        image.tag = parent.tag + 1;
        image.data_write_guids = [[parent.data_write_guids[1][0].wrapping_add(1); 16]; 2];
        image
    }

    /// A disk of `kind` with `slots` in the order of the file, and sectors of 512 bytes on a medium of
    /// 4096.
    pub(crate) fn new(
        kind: VhdxKind,
        block_size: u64,
        disk_len: u64,
        layout: Layout,
        slots: impl IntoIterator<Item = Slot>,
    ) -> Self {
        let mut image = Self {
            kind,
            block_size,
            disk_len,
            logical_sector: 512,
            physical_sector: 4096,
            items: Vec::new(),
            states: BTreeMap::new(),
            order: Order::Windows,
            log_len: MIB,
            data_write_guids: [[0x21; 16]; 2],
            twin_headers: false,
            tail: 0,
            cut: 0,
            junk_bits: true,
            tag: 1,
        };
        image.place(layout, slots);
        image
    }

    /// Puts `slots` behind what is there, with the bitmaps that they need.
    pub(crate) fn place(&mut self, layout: Layout, slots: impl IntoIterator<Item = Slot>) {
        for (n, slot) in slots.into_iter().enumerate() {
            let mib = |bytes: u64| bytes.next_multiple_of(MIB);
            let gaps = [
                MIB,
                0,
                self.block_size + MIB,
                mib(self.block_size / 2),
                2 * self.block_size,
            ];
            if layout == Layout::Gapped && gaps[n % 5] > 0 {
                self.items.push(Item::Hole(gaps[n % 5]));
            }
            let bitmap = Item::Bitmap(slot.block / self.chunk_ratio());
            if slot.state == State::Partial && !self.items.contains(&bitmap) {
                self.items.push(bitmap);
            }
            self.items.push(Item::Block(slot));
        }
    }

    /// The same disk with sectors of 4096 bytes. To be called before blocks are [`State::Partial`].
    #[must_use]
    pub(crate) fn with_4k_sectors(mut self) -> Self {
        (self.logical_sector, self.physical_sector) = (4096, 4096);
        self
    }

    /// The same disk with a block without a place in this state.
    #[must_use]
    pub(crate) fn with_state(mut self, block: u64, state: State) -> Self {
        self.states.insert(block, state);
        self
    }

    /// The same disk with its log and regions there.
    #[must_use]
    pub(crate) fn with_order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// Payload blocks of a chunk.
    pub(crate) fn chunk_ratio(&self) -> u64 {
        CHUNK_SECTORS * self.logical_sector / self.block_size
    }

    /// The slots.
    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.items.iter().filter_map(|item| match item {
            Item::Block(slot) => Some(slot),
            Item::Bitmap(_) | Item::Hole(_) => None,
        })
    }

    /// The slot of a block, to be changed.
    ///
    /// # Panics
    /// It has none.
    pub(crate) fn slot_mut(&mut self, block: u64) -> &mut Slot {
        let mut slots = self.items.iter_mut().filter_map(|item| match item {
            Item::Block(slot) => Some(slot),
            Item::Bitmap(_) | Item::Hole(_) => None,
        });
        let found = slots.find(|slot| slot.block == block);
        found.expect("the block has a slot")
    }

    /// Fills `buf` with what a guest reads at `offset`. What the format leaves open reads as zeros.
    pub(crate) fn expect(&self, parent: Parent, buf: &mut [u8], offset: u64) {
        for (block, within, part) in pieces(offset, len(buf), self.block_size) {
            let content = self.expect_block(parent, block);
            let count = part.len();
            buf[part].copy_from_slice(&content[size(within)..][..count]);
        }
    }

    /// What a guest reads in a block, which ends where the disk does.
    fn expect_block(&self, parent: Parent, block: u64) -> Vec<u8> {
        let start = block * self.block_size;
        let there = size(self.block_size.min(self.disk_len - start));
        let below = || {
            let mut below = vec![0; there];
            if let (Some(parent), VhdxKind::Differencing(_)) = (parent, &self.kind) {
                parent(&mut below, start);
            }
            below
        };
        let slot = self.slots().find(|slot| slot.block == block && slot.linked);
        let state = match slot {
            Some(slot) => slot.state,
            None => *self.states.get(&block).unwrap_or(&State::NotPresent),
        };
        let content = |slot: &Slot| {
            let mut content = vec![0; size(self.block_size)];
            slot.fill.fill(self.tag, start, &mut content);
            content.truncate(there);
            content
        };
        match (state, slot) {
            (State::Full, Some(slot)) => content(slot),
            (State::Partial, Some(slot)) => {
                let (mut content, below) = (content(slot), below());
                let sector = size(self.logical_sector);
                let sectors = content.chunks_mut(sector).zip(below.chunks(sector));
                for (n, (sector, below)) in (0..).zip(sectors) {
                    if !slot.bits.has(n) {
                        sector.copy_from_slice(below);
                    }
                }
                content
            }
            (State::NotPresent, _) => below(),
            _ => vec![0; there],
        }
    }
}
