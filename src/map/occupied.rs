//! Which parts of a file are taken, a bit for each unit: what a sorted list of all that lies in a file would
//! tell, in a hundredth of its memory.

use crate::units::{FileOffset, FileRange, u64_from, usize_from};

/// The units of a file, and which of them something lies in.
#[derive(Debug)]
pub(crate) struct Occupied {
    unit: u64,
    words: Vec<u64>,
}

impl Occupied {
    /// The most units that there is memory for: 32 MiB.
    pub(crate) const MOST_UNITS: u64 = 1 << 28;

    /// Of a file of `len` bytes in units of `unit`, all of it free. `None` where it is longer than
    /// [`Self::MOST_UNITS`].
    pub(crate) fn new(len: u64, unit: u64) -> Option<Self> {
        let units = len.div_ceil(unit);
        (units <= Self::MOST_UNITS).then(|| Self {
            unit,
            words: vec![0; usize_from(units.div_ceil(64))],
        })
    }

    /// Takes what `range` touches of the file. The lowest place in it that was taken before.
    pub(crate) fn take(&mut self, range: FileRange) -> Option<FileOffset> {
        let end = range.end().get().div_ceil(self.unit).min(self.units());
        let mut at = range.start.get() / self.unit;
        let mut found = None;
        while at < end {
            let (within, next) = (at % 64, end.min((at / 64 + 1) * 64));
            let mask = (u64::MAX >> (64 - (next - at))) << within;
            let word = &mut self.words[usize_from(at / 64)];
            let before = *word & mask;
            if before != 0 && found.is_none() {
                let unit = at - within + u64::from(before.trailing_zeros());
                found = Some(FileOffset::new(unit * self.unit));
            }
            *word |= mask;
            at = next;
        }
        found
    }

    /// What is taken, as runs, in order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = FileRange> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true);
            if start == self.units() {
                return None;
            }
            at = self.next(start, false);
            let place = |unit| FileOffset::new(unit * self.unit);
            Some(FileRange::between(place(start), place(at)))
        })
    }

    /// The first unit from `at` on that is taken, or is not; the end where there is none.
    fn next(&self, mut at: u64, taken: bool) -> u64 {
        while at < self.units() {
            let word = self.words[usize_from(at / 64)] ^ if taken { 0 } else { u64::MAX };
            let rest = word >> (at % 64);
            if rest != 0 {
                return at + u64::from(rest.trailing_zeros());
            }
            at = (at / 64 + 1) * 64;
        }
        self.units()
    }

    fn units(&self) -> u64 {
        u64_from(self.words.len()) * 64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a flag for each unit.
        #[test]
        fn as_flags(ranges in prop::collection::vec((0_u64..190, 1_u64..150), 0..12)) {
            let mut occupied = Occupied::new(192 * 10, 10).unwrap();
            let mut flags = [false; 192];
            for (start, len) in ranges {
                let range = FileRange::new(FileOffset::new(start * 10), len * 10);
                let inside = usize_from(start)..usize_from((start + len).min(192));
                let before = inside.clone().find(|unit| flags[*unit]);
                let found = occupied.take(range).map(|at| usize_from(at.get() / 10));
                prop_assert_eq!(found, before);
                flags[inside].fill(true);
            }
            let mut runs = [false; 192];
            for run in occupied.runs() {
                prop_assert!(!run.is_empty());
                runs[usize_from(run.start.get() / 10)..usize_from(run.end().get() / 10)].fill(true);
            }
            prop_assert_eq!(&runs[..], &flags[..]);
        }
    }

    #[test]
    fn parts_of_units_count_whole_and_long_files_not_at_all() {
        let mut occupied = Occupied::new(1000, 100).unwrap();
        assert_eq!(
            occupied.take(FileRange::new(FileOffset::new(150), 100)),
            None
        );
        let found = occupied.take(FileRange::new(FileOffset::new(299), 1));
        assert_eq!(found, Some(FileOffset::new(200)));
        assert!(Occupied::new(1 << 48, 1 << 20).is_some());
        assert!(Occupied::new((1 << 48) + 1, 1 << 20).is_none());
    }
}
