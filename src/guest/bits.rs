//! Runs of clear bits in an allocation bitmap, which is least significant bit first in all that read
//! one here (NTFS, ext2/3/4, exFAT).

use std::ops::Range;

use crate::units::{u64_from, usize_from};

/// The runs of clear bits among the first `count` of `bitmap`, in order. Bits that `bitmap` does not
/// have count as set.
pub(super) fn clear_runs(bitmap: &[u8], count: u64) -> impl Iterator<Item = Range<u64>> {
    let end = count.min(u64_from(bitmap.len()).saturating_mul(8));
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = find(bitmap, at, end, false);
        if start >= end {
            return None;
        }
        at = find(bitmap, start, end, true);
        Some(start..at)
    })
}

/// The first bit from `at` on, before `end`, that is `wanted`; else `end`.
pub(super) fn find(bitmap: &[u8], mut at: u64, end: u64, wanted: bool) -> u64 {
    let skip = if wanted { 0x00 } else { 0xff };
    while at < end {
        let byte = bitmap[usize_from(at / 8)];
        if byte == skip {
            at = (at / 8 + 1) * 8;
        } else if (byte >> (at % 8) & 1 == 1) == wanted {
            return at;
        } else {
            at += 1;
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_clear_bits() {
        let runs = |bitmap: &[u8], count| clear_runs(bitmap, count).collect::<Vec<_>>();
        assert_eq!(runs(&[0xff, 0xff], 16), []);
        assert_eq!(runs(&[0x00, 0x00], 16), [0..16]);
        assert_eq!(runs(&[0b1111_0001, 0xff, 0x7f], 24), [1..4, 23..24]);
        assert_eq!(runs(&[0x0f, 0xf0, 0x00], 19), [4..12, 16..19]);
        assert_eq!(runs(&[0x00], 30), [0..8]);
    }
}
