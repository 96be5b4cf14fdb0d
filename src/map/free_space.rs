//! Which space of the host file is free, and how far it may be trusted.
//!
//! A range is in one of four states:
//!
//! ```text
//!          commit without it              sync                  punched or zeroed, and synced
//!   used ------------------> awaiting ------------> free, dirty -----------------> free, clean
//!     ^                                                |  for a move                    |
//!     +------------------------------------------------+--------------------------------+
//! ```
//!
//! Invariants:
//! 1. *Awaiting* space belongs to nobody and may not be touched: the durable block table may still
//!    name it.
//! 2. *Clean* space reads as zeros, durably. Only there may a table entry point before the block's
//!    bytes are synced: a crash then shows zeros, which is what an unallocated block reads as.
//! 3. *Dirty* space may hold another block's old bytes. Whoever takes it writes all of it and syncs
//!    before a table entry names it.

use std::collections::{BTreeMap, BTreeSet};

use crate::units::{FileOffset, FileRange, SECTOR_SIZE, round_up};

/// The form of a slot: how long it is and where it may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotShape {
    /// Bytes of a slot, its header included.
    pub len: u64,
    /// Bytes in front of the block's data (for VHD its sector bitmap).
    pub header_len: u64,
    /// The data of a new slot starts at a multiple of this.
    pub align: u64,
    /// Whether a slot must never be placed otherwise, not even to fill a hole that fits exactly.
    pub strict: bool,
}

impl SlotShape {
    /// The first aligned place for a slot in `run`.
    pub fn place_aligned(&self, run: FileRange) -> Option<FileOffset> {
        let data = round_up(run.start.plus(self.header_len).get(), self.align);
        let start = FileOffset::new(data.checked_sub(self.header_len)?);
        (start.plus(self.len) <= run.end()).then_some(start)
    }

    /// The most slots that `run` can take, lowest first: aligned ones where as many fit as without
    /// alignment, else packed from the first sector on (unless the shape is strict).
    pub fn places(&self, run: FileRange) -> impl Iterator<Item = FileOffset> + use<> {
        let shape = *self;
        let aligned_step = round_up(shape.len, shape.align);
        let count = |first: Option<FileOffset>, step: u64| {
            first.map_or(0, |first| {
                (run.end().since(first) + step - shape.len) / step
            })
        };
        let first_aligned = shape.place_aligned(run);
        let aligned = count(first_aligned, aligned_step);
        let packed_start = FileOffset::new(round_up(run.start.get(), SECTOR_SIZE));
        let fits = packed_start.plus(shape.len) <= run.end();
        let packed = count(fits.then_some(packed_start), shape.len);
        let (first, step, count) = if shape.strict || aligned >= packed {
            (first_aligned, aligned_step, aligned)
        } else {
            (Some(packed_start), shape.len, packed)
        };
        (0..count).filter_map(move |n| Some(first?.plus(n.saturating_mul(step))))
    }
}

/// Disjoint runs of bytes, merged where they touch, with those that can take an aligned slot
/// indexed. Memory is proportional to the number of runs.
#[derive(Debug, Default)]
struct Runs {
    /// Start to end.
    runs: BTreeMap<FileOffset, FileOffset>,
    fitting: BTreeSet<FileOffset>,
}

impl Runs {
    /// The run that contains `at`, or ends there if `touching`.
    fn around(&self, at: FileOffset, touching: bool) -> Option<FileRange> {
        let (start, end) = self.runs.range(..=at).next_back()?;
        (at < *end || touching && at == *end).then_some(FileRange::between(*start, *end))
    }

    fn contains(&self, range: FileRange) -> bool {
        self.around(range.start, false)
            .is_some_and(|run| range.end() <= run.end())
    }

    fn add_run(&mut self, shape: &SlotShape, run: FileRange) {
        if !run.is_empty() {
            self.runs.insert(run.start, run.end());
            if shape.place_aligned(run).is_some() {
                self.fitting.insert(run.start);
            }
        }
    }

    fn take_run(&mut self, start: FileOffset) {
        self.runs.remove(&start);
        self.fitting.remove(&start);
    }

    fn insert(&mut self, shape: &SlotShape, range: FileRange) {
        if range.is_empty() {
            return;
        }
        let mut merged = range;
        if let Some(before) = self.around(range.start, true) {
            self.take_run(before.start);
            merged = FileRange::between(before.start, merged.end().max(before.end()));
        }
        while let Some((start, end)) = self
            .runs
            .range(merged.start..=merged.end())
            .next()
            .map(|(start, end)| (*start, *end))
        {
            self.take_run(start);
            merged = FileRange::between(merged.start, merged.end().max(end));
        }
        self.add_run(shape, merged);
    }

    fn remove(&mut self, shape: &SlotShape, range: FileRange) {
        if range.is_empty() {
            return;
        }
        let first = self
            .around(range.start, false)
            .map_or(range.start, |run| run.start);
        let overlapping: Vec<(FileOffset, FileOffset)> = self
            .runs
            .range(first..range.end())
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in overlapping {
            self.take_run(start);
            self.add_run(shape, FileRange::between(start, range.start.min(end)));
            self.add_run(shape, FileRange::between(range.end().max(start), end));
        }
    }

    fn first_fit(&self, shape: &SlotShape) -> Option<FileOffset> {
        let start = self.fitting.first()?;
        shape.place_aligned(FileRange::between(*start, *self.runs.get(start)?))
    }

    fn iter(&self) -> impl Iterator<Item = FileRange> + '_ {
        self.runs
            .iter()
            .map(|(start, end)| FileRange::between(*start, *end))
    }
}

/// The free space of one image. Knows nothing of the blocks; the image tells it what is taken.
#[derive(Debug)]
pub struct FreeSpace {
    shape: SlotShape,
    /// Clean and dirty.
    free: Runs,
    clean: Runs,
    awaiting: Vec<FileRange>,
}

impl FreeSpace {
    /// The space between `start` and `end` that none of the `used` ranges covers, all of it dirty.
    /// `used` must be sorted and free of overlaps.
    pub fn new(
        shape: SlotShape,
        start: FileOffset,
        end: FileOffset,
        used: impl IntoIterator<Item = FileRange>,
    ) -> Self {
        let mut space = Self {
            shape,
            free: Runs::default(),
            clean: Runs::default(),
            awaiting: Vec::new(),
        };
        let mut at = start;
        for range in used {
            space
                .free
                .add_run(&shape, FileRange::between(at, range.start));
            at = at.max(range.end());
        }
        space.free.add_run(&shape, FileRange::between(at, end));
        space
    }

    /// Takes a clean slot for a new block, the lowest.
    pub fn take_clean(&mut self) -> Option<FileOffset> {
        let slot = self.clean.first_fit(&self.shape)?;
        self.take(FileRange::new(slot, self.shape.len))
            .then_some(slot)
    }

    /// Takes exactly `range`, if all of it is free. Its cleanliness is forgotten.
    pub fn take(&mut self, range: FileRange) -> bool {
        let free = self.free.contains(range);
        if free {
            self.free.remove(&self.shape, range);
            self.clean.remove(&self.shape, range);
        }
        free
    }

    /// Whether all of `range` is free and clean.
    pub fn is_clean(&self, range: FileRange) -> bool {
        self.clean.contains(range)
    }

    /// Notes that the block table as last written, not yet synced, no longer names `range`.
    pub fn release(&mut self, range: FileRange) {
        self.awaiting.push(range);
    }

    /// The ranges that wait for a sync. Called when a sync begins; they stay untouchable.
    pub fn take_awaiting(&mut self) -> Vec<FileRange> {
        std::mem::take(&mut self.awaiting)
    }

    /// Bytes that wait for a sync that has not begun.
    pub fn awaiting_bytes(&self) -> u64 {
        self.awaiting.iter().map(|range| range.len).sum()
    }

    /// Gives `range` back as dirty: no durable table entry names it.
    pub fn give_back(&mut self, range: FileRange) {
        self.free.insert(&self.shape, range);
    }

    /// Gives `range` back as clean: it reads as zeros, durably, and no table entry names it.
    pub fn give_back_clean(&mut self, range: FileRange) {
        self.free.insert(&self.shape, range);
        self.clean.insert(&self.shape, range);
    }

    /// Takes dirty runs that can take a slot, up to `limit` bytes, to be cleaned and given back.
    pub fn take_dirty(&mut self, limit: u64) -> Vec<FileRange> {
        let mut taken = Vec::new();
        let aligned = SlotShape {
            strict: true,
            ..self.shape
        };
        let mut left = limit.max(self.shape.len);
        let candidates: Vec<FileRange> = (self.free.fitting.iter())
            .filter_map(|start| self.free.around(*start, false))
            .collect();
        for run in candidates {
            // Guests get aligned slots only, so that only those are worth cleaning.
            for place in aligned.places(run) {
                let slot = FileRange::new(place, self.shape.len);
                if left < slot.len {
                    return taken;
                }
                if !self.is_clean(slot) && self.take(slot) {
                    left -= slot.len;
                    taken.push(slot);
                }
            }
        }
        taken
    }

    /// The free run that ends at `end`, if there is one: what can be cut off.
    pub fn tail(&self, end: FileOffset) -> Option<FileRange> {
        let (start, run_end) = self.free.runs.iter().next_back()?;
        (*run_end == end).then_some(FileRange::between(*start, end))
    }

    /// The free runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = FileRange> + '_ {
        self.free.iter()
    }

    /// The free runs that are not known to be clean, in order.
    pub fn dirty_runs(&self) -> Vec<FileRange> {
        let mut dirty = Runs::default();
        for run in self.free.iter() {
            dirty.insert(&self.shape, run);
        }
        for run in self.clean.iter() {
            dirty.remove(&self.shape, run);
        }
        dirty.iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::usize_from;

    const SHAPE: SlotShape = SlotShape {
        len: 4608,
        header_len: 512,
        align: 4096,
        strict: false,
    };

    fn range(start: u64, end: u64) -> FileRange {
        FileRange::between(FileOffset::new(start), FileOffset::new(end))
    }

    #[test]
    fn places_prefer_alignment_unless_it_costs_a_slot() {
        let places = |run| SHAPE.places(run).map(FileOffset::get).collect::<Vec<_>>();
        assert_eq!(
            places(range(0, 4608)),
            [0],
            "an exact fit is taken unaligned"
        );
        assert_eq!(places(range(0, 9000)), [3584]);
        assert_eq!(
            places(range(512, 512 + 3 * 4608)),
            [512, 5120, 9728],
            "packed"
        );
        assert!(places(range(0, 4607)).is_empty());
        let strict = SlotShape {
            strict: true,
            ..SHAPE
        };
        assert_eq!(strict.places(range(0, 4608)).count(), 0);
        assert_eq!(strict.places(range(0, 3584 + 4608)).count(), 1);
    }

    #[test]
    fn awaiting_space_is_not_given_out() {
        let mut space = FreeSpace::new(SHAPE, FileOffset::new(0), FileOffset::new(0), []);
        space.release(range(0, 8192));
        assert_eq!(space.take_clean(), None);
        assert!(!space.take(range(0, 4608)));
        for run in space.take_awaiting() {
            space.give_back(run);
        }
        assert_eq!(space.take_clean(), None, "dirty space is not clean");
        assert!(space.take(range(0, 4608)));
    }

    #[test]
    fn clean_space_is_found_and_forgotten_when_taken() {
        let mut space = FreeSpace::new(
            SHAPE,
            FileOffset::new(0),
            FileOffset::new(100_000),
            [range(0, 1000)],
        );
        assert_eq!(space.take_clean(), None);
        let dirty = space.take_dirty(1);
        assert_eq!(dirty.len(), 1, "at least one slot, however small the limit");
        space.give_back_clean(dirty[0]);
        assert_eq!(space.take_clean(), Some(dirty[0].start));
        space.give_back(dirty[0]);
        assert_eq!(space.take_clean(), None);
        assert_eq!(
            space.tail(FileOffset::new(100_000)),
            Some(range(1000, 100_000))
        );
    }

    proptest! {
        /// Against a model of one flag a byte (scaled down by 256).
        #[test]
        fn runs_are_a_set_of_bytes(ops in prop::collection::vec((any::<bool>(), 0_u64..120, 0_u64..40), 1..60)) {
            let mut runs = Runs::default();
            let mut model = [false; 160];
            for (add, start, len) in ops {
                let run = range(start * 256, (start + len) * 256);
                if add { runs.insert(&SHAPE, run) } else { runs.remove(&SHAPE, run) }
                for slot in &mut model[usize_from(start)..usize_from(start + len)] { *slot = add; }
                let bytes: Vec<bool> = (0..160)
                    .map(|n| runs.around(FileOffset::new(n * 256), false).is_some()).collect();
                prop_assert_eq!(&bytes[..], &model[..]);
                let all: Vec<FileRange> = runs.iter().collect();
                prop_assert!(all.windows(2).all(|pair| pair[0].end() < pair[1].start), "merged");
                let fitting: Vec<FileOffset> = all.iter()
                    .filter(|run| SHAPE.place_aligned(**run).is_some()).map(|run| run.start).collect();
                prop_assert!(runs.fitting.iter().eq(fitting.iter()));
            }
        }
    }
}
