//! From block to slot: one atomic word a block.

use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

use crate::units::{BlockIndex, FileOffset, u64_from, usize_from_u32};

/// What the block table says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// It has no slot and reads as the parent has it, or as zeros where there is no parent.
    NotPresent,
    /// It has no slot and reads as zeros, whatever the parent has. Only in a VHDX with a parent;
    /// without one, [`Self::NotPresent`] says the same.
    Zero,
    /// It lies in the slot that starts at `slot`.
    Present {
        /// Where the slot starts, its sector bitmap included.
        slot: FileOffset,
        /// Whether all its sectors are known to be in the slot. If not, the sector bitmap tells.
        whole: bool,
    },
}

impl BlockState {
    /// Where the block lies, if it does.
    pub fn slot(self) -> Option<FileOffset> {
        match self {
            Self::Present { slot, .. } => Some(slot),
            Self::NotPresent | Self::Zero => None,
        }
    }
}

// Slots start at multiples of 512, so that the low bits of a word are free for the state.
const PRESENT: u64 = 1;
const WHOLE: u64 = 2;
const ZERO: u64 = 4;
const FLAGS: u64 = 511;

/// The block table in memory. A look-up is one atomic load and takes no lock; only the image's
/// commit stores. A reader that must not see a block move holds the block's gate.
#[derive(Debug)]
pub struct BlockMap {
    entries: Box<[AtomicU64]>,
}

impl BlockMap {
    /// A map of `len` blocks, none of them present.
    pub fn new(len: u32) -> Self {
        Self {
            // Of a large disk, only what is used takes memory: the host gives zeros on demand.
            entries: <[AtomicU64]>::new_box_zeroed_with_elems(usize_from_u32(len))
                .expect("a table of at most 2^26 entries fits in memory"),
        }
    }

    /// How many blocks the disk has.
    pub fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    /// Whether the disk has no block.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The state of `block`; of one beyond the table, `NotPresent`.
    pub fn get(&self, block: BlockIndex) -> BlockState {
        match self
            .entries
            .get(block.index())
            .map_or(0, |entry| entry.load(Ordering::Acquire))
        {
            0 => BlockState::NotPresent,
            ZERO => BlockState::Zero,
            word => BlockState::Present {
                slot: FileOffset::new(word & !FLAGS),
                whole: word & WHOLE != 0,
            },
        }
    }

    /// Sets the state of `block`. Only the image does, under the block's gate.
    ///
    /// # Panics
    /// For a block beyond the table, or a slot that starts inside a sector.
    pub(crate) fn set(&self, block: BlockIndex, state: BlockState) {
        let word = match state {
            BlockState::NotPresent => 0,
            BlockState::Zero => ZERO,
            BlockState::Present { slot, whole } => {
                assert_eq!(slot.get() & FLAGS, 0, "slot {slot} starts inside a sector");
                slot.get() | PRESENT | if whole { WHOLE } else { 0 }
            }
        };
        self.entries[block.index()].store(word, Ordering::Release);
    }

    /// All blocks, in order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> + use<> {
        (0..self.len()).map(BlockIndex::new)
    }

    /// The blocks that have a slot, with it, in order of their numbers.
    pub fn present(&self) -> impl Iterator<Item = (BlockIndex, FileOffset)> + '_ {
        self.blocks()
            .filter_map(|block| Some((block, self.get(block).slot()?)))
    }

    /// How many blocks have a slot.
    pub fn present_count(&self) -> u64 {
        u64_from(
            self.entries
                .iter()
                .filter(|entry| entry.load(Ordering::Relaxed) & PRESENT != 0)
                .count(),
        )
    }
}
