//! $Bitmap, and whether it is true: it has no checksum, so every file is asked for its clusters.

use std::ops::Range;

use rangemap::RangeSet;

use super::boot::Geometry;
use super::mft::{Mft, number};
use super::record::{Record, kind};
use super::{Trouble, damaged};
use crate::guest::add_run;
use crate::guest::bits::clear_runs;
use crate::units::{div_ceil, u64_from, usize_from};

/// What is free by $Bitmap, and which of its used clusters no file has claimed yet.
pub(super) struct Clusters {
    /// What is free, in bytes of the part.
    pub(super) free: RangeSet<u64>,
    /// A bit for each cluster: in use, and not claimed.
    unclaimed: Vec<u8>,
    geometry: Geometry,
}

impl Clusters {
    /// Reads $Bitmap: a bit for each cluster, the least significant first, set where it is in use.
    pub(super) fn read(mft: &Mft<'_, '_>) -> Result<Self, Trouble> {
        let geometry = mft.geometry;
        let stream = mft.need(number::BITMAP, kind::DATA, "$Bitmap")?;
        let needed = div_ceil(geometry.clusters, 8);
        if stream.is_sparse() {
            return Err(damaged("$Bitmap does not tell of every cluster"));
        }
        let unclaimed = stream.read_first(mft.view, needed)?;
        let mut free = RangeSet::new();
        for run in clear_runs(&unclaimed, geometry.clusters) {
            add_run(&mut free, geometry.byte(run.start)..geometry.byte(run.end))?;
        }
        if free.contains(&0) {
            return Err(damaged("$Bitmap has the boot sector's cluster free"));
        }
        Ok(Self {
            free,
            unclaimed,
            geometry,
        })
    }

    /// Bytes that are free.
    pub(super) fn free_bytes(&self) -> u64 {
        self.free.iter().map(|run| run.end - run.start).sum()
    }

    /// Claims these clusters of the volume for the file that `record` belongs to: they must be in use,
    /// and nobody else's.
    pub(super) fn claim(&mut self, lcns: Range<u64>, record: &Record<'_>) -> Result<(), Trouble> {
        let Some(lcn) = take(&mut self.unclaimed, lcns) else {
            return Ok(());
        };
        let number = record.reference.record();
        Err(damaged(
            match self.free.contains(&self.geometry.byte(lcn)) {
                true => format!("record {number} uses cluster {lcn}, which $Bitmap has free"),
                false => format!("record {number} uses cluster {lcn}, which is another file's"),
            },
        ))
    }
}

/// Clears these bits, and gives the first that was clear already. `bits` has all of them.
fn take(bits: &mut [u8], range: Range<u64>) -> Option<u64> {
    let mut at = range.start;
    while at < range.end {
        let index = usize_from(at / 8);
        let whole = usize_from((range.end - at) / 8);
        if at.is_multiple_of(8) && whole > 0 {
            let bytes = &mut bits[index..index + whole];
            if let Some(found) = bytes.iter().position(|byte| *byte != 0xff) {
                let clear = u64::from(bytes[found].trailing_ones());
                return Some(at + u64_from(found) * 8 + clear);
            }
            bytes.fill(0);
            at += u64_from(whole) * 8;
        } else {
            let bit = 1 << (at % 8);
            if bits[index] & bit == 0 {
                return Some(at);
            }
            bits[index] &= !bit;
            at += 1;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_taken_once() {
        let all = 40_u64;
        for start in 0..all {
            for end in start..=all {
                let mut bits = [0xff_u8; 5];
                assert_eq!(take(&mut bits, start..end), None);
                for bit in 0..all {
                    let set = bits[usize_from(bit / 8)] >> (bit % 8) & 1 == 1;
                    assert_eq!(set, !(start..end).contains(&bit), "{bit} of {start}..{end}");
                    let mut again = bits;
                    let first = take(&mut again, bit..all);
                    let clear = (bit..all).find(|bit| (start..end).contains(bit));
                    assert_eq!(first, clear, "{bit}.. after {start}..{end}");
                }
            }
        }
    }
}
