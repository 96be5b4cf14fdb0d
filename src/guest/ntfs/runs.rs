//! Runs: which clusters of the volume hold which clusters of a value.
//!
//! A run is a byte that says how long two numbers are, then the clusters of the run, then where
//! they lie, counted from where the last run began; without that second number the run is a hole.
//! A byte 0 ends them. [ntfs-3g `runlist.c`, `ntfs_mapping_pairs_decompress`]

use std::ops::Range;

use super::{Trouble, damaged};

/// The part of a value that one attribute maps to clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapping<'a> {
    /// The first cluster of the value that is mapped.
    pub(super) lowest_vcn: u64,
    /// How many are.
    pub(super) clusters: u64,
    /// Bytes of all clusters of the value, holes included. As the other sizes only where
    /// `lowest_vcn` is 0.
    pub(super) allocated_size: u64,
    /// Bytes of the value.
    pub(super) data_size: u64,
    /// Bytes of it that were ever written.
    pub(super) initialized_size: u64,
    /// The runs, and what lies behind them.
    pub(super) pairs: &'a [u8],
}

/// A run of a value's clusters, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Clusters of the value.
    pub(super) vcns: Range<u64>,
    /// The cluster of the volume that holds the first; `None` for a hole, which reads as zeros.
    pub(super) lcn: Option<u64>,
}

impl Run {
    /// The clusters of the volume; `None` for a hole.
    pub(super) fn lcns(&self) -> Option<Range<u64>> {
        let lcn = self.lcn?;
        Some(lcn..lcn + (self.vcns.end - self.vcns.start))
    }
}

impl Mapping<'_> {
    /// The runs, in order, each of which lies within `volume` clusters. Ends with the first trouble.
    pub(super) fn runs(&self, volume: u64) -> impl Iterator<Item = Result<Run, Trouble>> {
        let mut walker = Walker {
            pairs: self.pairs,
            vcn: self.lowest_vcn,
            end: self.lowest_vcn + self.clusters,
            lcn: 0,
            volume,
        };
        let mut ended = false;
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let step = walker.step();
            ended = !matches!(step, Some(Step::Run(_)));
            match step {
                Some(Step::Run(run)) => Some(Ok(run)),
                Some(Step::End) => None,
                None => Some(Err(damaged("the runs of a file make no sense"))),
            }
        })
    }
}

enum Step {
    Run(Run),
    End,
}

struct Walker<'a> {
    pairs: &'a [u8],
    vcn: u64,
    /// The value's cluster that must be reached.
    end: u64,
    lcn: i64,
    volume: u64,
}

impl Walker<'_> {
    /// The next run that is not empty. `None` where the bytes make no sense.
    fn step(&mut self) -> Option<Step> {
        loop {
            let (head, rest) = self.pairs.split_first()?;
            self.pairs = rest;
            if *head == 0 {
                return (self.vcn == self.end).then_some(Step::End);
            }
            let length = u64::try_from(self.number(head & 0xf)?).ok()?;
            let is_hole = head >> 4 == 0;
            let delta = self.number(head >> 4)?;
            let start = self.vcn;
            self.vcn = start.checked_add(length)?;
            if is_hole && length == 0 {
                // chkdsk lets it pass for holes.
                continue;
            }
            self.lcn = self.lcn.checked_add(delta)?;
            let lcn = match is_hole {
                true => None,
                false => Some(self.place(length)?),
            };
            let vcns = start..self.vcn;
            return Some(Step::Run(Run { vcns, lcn }));
        }
    }

    /// The current place, where `length` clusters, at least one, lie on the volume.
    fn place(&self, length: u64) -> Option<u64> {
        let lcn = u64::try_from(self.lcn).ok()?;
        let end = lcn.checked_add(length)?;
        (length > 0 && end <= self.volume).then_some(lcn)
    }

    /// A signed number of `len` bytes; of none, 0.
    fn number(&mut self, len: u8) -> Option<i64> {
        let (bytes, rest) = self.pairs.split_at_checked(usize::from(len))?;
        self.pairs = rest;
        let negative = bytes.last().is_some_and(|byte| *byte >= 0x80);
        let mut all = [if negative { 0xff } else { 0 }; 8];
        all.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(i64::from_le_bytes(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(pairs: &[u8], clusters: u64, volume: u64) -> Option<Vec<(u64, u64, Option<u64>)>> {
        let mapping = Mapping {
            lowest_vcn: 3,
            clusters,
            allocated_size: 0,
            data_size: 0,
            initialized_size: 0,
            pairs,
        };
        let found: Result<Vec<_>, _> = mapping.runs(volume).collect();
        let plain = |run: Run| (run.vcns.start, run.vcns.end, run.lcn);
        Some(found.ok()?.into_iter().map(plain).collect())
    }

    #[test]
    fn forward_backward_and_holes() {
        let pairs = [
            0x11, 4, 0x20, 0x01, 2, 0x11, 1, 0xf0, 0x22, 0x00, 0x01, 0x00, 0x01, 0,
        ];
        let found = runs(&pairs, 4 + 2 + 1 + 256, 1000);
        let expected = vec![
            (3, 7, Some(0x20)),
            (7, 9, None),
            (9, 10, Some(0x10)),
            (10, 266, Some(0x110)),
        ];
        assert_eq!(found, Some(expected));
        assert_eq!(runs(&[0], 0, 10), Some(vec![]));
        assert_eq!(runs(&[0x01, 0, 0], 0, 10), Some(vec![]), "an empty hole");
    }

    #[test]
    fn nonsense() {
        assert_eq!(
            runs(&[0x11, 4, 2, 0x01, 1, 0], 4, 10),
            None,
            "a hole too many"
        );
        assert_eq!(runs(&[], 0, 10), None, "no end");
        assert_eq!(runs(&[0x11, 4, 2], 4, 10), None, "no end");
        assert_eq!(runs(&[0x11, 4], 4, 10), None, "cut");
        assert_eq!(runs(&[0x11, 4, 2, 0], 5, 10), None, "shorter than it says");
        assert_eq!(runs(&[0x11, 4, 2, 0], 3, 10), None, "longer than it says");
        assert_eq!(runs(&[0x11, 4, 7, 0], 4, 10), None, "beyond the volume");
        assert_eq!(
            runs(&[0x11, 4, 6, 0], 4, 10).map(|found| found.len()),
            Some(1)
        );
        assert_eq!(runs(&[0x11, 4, 0xff, 0], 4, 10), None, "before the volume");
        assert_eq!(runs(&[0x11, 0, 2, 0], 0, 10), None, "an empty run");
        assert_eq!(runs(&[0x10, 2, 0], 0, 10), None, "no length");
        assert_eq!(runs(&[0x11, 0x80, 2, 0], 4, 10), None, "a negative length");
        assert_eq!(
            runs(&[0x19, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0], 1, 10),
            None,
            "9 bytes"
        );
        let huge = [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 2, 0];
        assert_eq!(runs(&huge, u64::MAX - 10, 10), None, "no overflow");
    }
}
