//! From block to slot: one atomic word a block.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::FromZeros;

use crate::units::{BlockIndex, FileOffset, low_u32, u64_from_u32, usize_from_u32};

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

// Flags of a word; the slot stands in front of them.
const PRESENT: u64 = 1;
const WHOLE: u64 = 2;
/// Without the others.
const ZERO: u64 = 2;
const FLAG_BITS: u32 = 2;

/// The block table in memory. A look-up is one atomic load and takes no lock; only the image's
/// commit stores. A reader that must not see a block move holds the block's gate.
#[derive(Debug)]
pub struct BlockMap {
    words: Words,
    /// How many blocks have a slot.
    present: AtomicU32,
    /// Slots start at multiples of this.
    unit: u64,
}

/// A word has room for the flags and the slot's number in units.
#[derive(Debug)]
enum Words {
    Narrow(Box<[AtomicU32]>),
    Wide(Box<[AtomicU64]>),
}

impl Words {
    fn load(&self, index: usize) -> u64 {
        match self {
            Self::Narrow(words) => {
                (words.get(index)).map_or(0, |word| u64_from_u32(word.load(Ordering::Acquire)))
            }
            Self::Wide(words) => (words.get(index)).map_or(0, |word| word.load(Ordering::Acquire)),
        }
    }
}

impl BlockMap {
    /// The end of the places that words of four bytes can tell, in units.
    const NARROW_UNITS: u64 = 1 << (u32::BITS - FLAG_BITS);

    /// A map of `len` blocks, none of them present, whose slots start at multiples of `unit` bytes.
    pub fn new(len: u32, unit: u64) -> Self {
        // Of a large disk, only what is used takes memory: the host gives zeros on demand.
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(usize_from_u32(len));
        Self {
            words: Words::Wide(words.expect("a table of at most 2^26 entries fits in memory")),
            present: AtomicU32::new(0),
            unit,
        }
    }

    /// As [`Self::new`], with half the memory, for slots that start below `end`; `None` where that is too
    /// far.
    pub(crate) fn narrow(len: u32, unit: u64, end: FileOffset) -> Option<Self> {
        let words = <[AtomicU32]>::new_box_zeroed_with_elems(usize_from_u32(len));
        (end.get().div_ceil(unit) <= Self::NARROW_UNITS).then(|| Self {
            words: Words::Narrow(words.expect("a table of at most 2^26 entries fits in memory")),
            present: AtomicU32::new(0),
            unit,
        })
    }

    /// How many blocks the disk has.
    pub fn len(&self) -> u32 {
        let len = match &self.words {
            Words::Narrow(words) => words.len(),
            Words::Wide(words) => words.len(),
        };
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    /// Whether the disk has no block.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The state of `block`; of one beyond the table, `NotPresent`.
    pub fn get(&self, block: BlockIndex) -> BlockState {
        match self.words.load(block.index()) {
            0 => BlockState::NotPresent,
            ZERO => BlockState::Zero,
            word => BlockState::Present {
                slot: FileOffset::new((word >> FLAG_BITS).saturating_mul(self.unit)),
                whole: word & WHOLE != 0,
            },
        }
    }

    /// Sets the state of `block`. Only the image does, under the block's gate.
    ///
    /// # Panics
    /// For a block beyond the table, or a slot that starts inside a unit or beyond the end of a narrow map.
    pub(crate) fn set(&self, block: BlockIndex, state: BlockState) {
        let word = match state {
            BlockState::NotPresent => 0,
            BlockState::Zero => ZERO,
            BlockState::Present { slot, whole } => {
                let is_placed = slot.get().is_multiple_of(self.unit);
                assert!(is_placed, "slot {slot} starts inside a unit");
                let flags = PRESENT | if whole { WHOLE } else { 0 };
                (slot.get() / self.unit) << FLAG_BITS | flags
            }
        };
        let old = match &self.words {
            Words::Narrow(words) => {
                assert_eq!(word >> u32::BITS, 0, "{state:?} is too far");
                u64_from_u32(words[block.index()].swap(low_u32(word), Ordering::AcqRel))
            }
            Words::Wide(words) => words[block.index()].swap(word, Ordering::AcqRel),
        };
        match (old & PRESENT, word & PRESENT) {
            (0, PRESENT) => drop(self.present.fetch_add(1, Ordering::Relaxed)),
            (PRESENT, 0) => drop(self.present.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
    }

    /// The last place that the map can tell, where not all can be.
    pub(crate) fn last_place(&self) -> Option<FileOffset> {
        match self.words {
            Words::Narrow(_) => Some(FileOffset::new((Self::NARROW_UNITS - 1) * self.unit)),
            Words::Wide(_) => None,
        }
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

    /// How many blocks have a slot. Nothing is gone through for it.
    pub fn present_count(&self) -> u64 {
        u64_from_u32(self.present.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::u64_from;

    #[test]
    fn both_widths_say_the_same() {
        const UNIT: u64 = 1 << 20;
        let end = FileOffset::new(UNIT << 30);
        let narrow = BlockMap::narrow(4, UNIT, end).unwrap();
        assert!(BlockMap::narrow(4, UNIT, end.plus(1)).is_none());
        let last = narrow.last_place().unwrap();
        assert_eq!(last.plus(UNIT), end);
        for map in [narrow, BlockMap::new(4, UNIT)] {
            let present = |slot, whole| BlockState::Present { slot, whole };
            let states = [
                BlockState::NotPresent,
                BlockState::Zero,
                present(last, true),
                present(FileOffset::new(UNIT), false),
            ];
            for (block, state) in map.blocks().zip(states) {
                map.set(block, state);
            }
            assert!(map.blocks().map(|block| map.get(block)).eq(states));
            assert_eq!((map.len(), map.present_count()), (4, 2));
            map.set(BlockIndex::new(2), BlockState::Zero);
            map.set(BlockIndex::new(3), present(last, true));
            map.set(BlockIndex::new(1), BlockState::NotPresent);
            assert_eq!(map.present_count(), u64_from(map.present().count()));
            assert_eq!(map.get(BlockIndex::new(4)), BlockState::NotPresent);
        }
    }
}
