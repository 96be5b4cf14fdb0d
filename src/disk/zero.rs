//! Finding zeros in memory.

use crate::units::{GRANULE_SIZE, u64_from, usize_from};

/// Whether all of `bytes` are zero. At memory speed for zeros; for data it mostly stops at once.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    const LANE: usize = 64;
    let (lanes, rest) = bytes.as_chunks::<LANE>();
    lanes
        .iter()
        .all(|lane| lane.iter().fold(0, |any, byte| any | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// A run of granules, or parts of granules at the ends, that are all zero or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Offset from the start of the bytes.
    pub(crate) start: usize,
    /// Length in bytes.
    pub(crate) len: usize,
    /// Whether all of it is zero.
    pub(crate) zero: bool,
}

/// Cuts `bytes`, which start `within` bytes after a granule boundary of their block, at granule
/// boundaries, and joins neighbours of the same kind.
pub(crate) fn runs(bytes: &[u8], within: u64) -> impl Iterator<Item = Run> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = granule(bytes, within, at)?;
        let mut run = first;
        while let Some(next) = granule(bytes, within, run.start + run.len)
            && next.zero == run.zero
        {
            run.len += next.len;
        }
        at = run.start + run.len;
        Some(run)
    })
}

/// Whether any whole granule, or all of `bytes`, is zero.
pub(crate) fn has_zero_granule(bytes: &[u8], within: u64) -> bool {
    let granule_len = usize_from(GRANULE_SIZE);
    let head = usize_from((GRANULE_SIZE - within % GRANULE_SIZE) % GRANULE_SIZE);
    let whole = bytes.get(head..).unwrap_or_default();
    whole.chunks_exact(granule_len).any(is_zero) || is_zero(bytes)
}

fn granule(bytes: &[u8], within: u64, at: usize) -> Option<Run> {
    let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
    let to_boundary = GRANULE_SIZE - (within + u64_from(at)) % GRANULE_SIZE;
    let len = rest.len().min(usize_from(to_boundary));
    Some(Run {
        start: at,
        len,
        zero: is_zero(&rest[..len]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cut_at_granules() {
        let mut bytes = vec![0_u8; 3 * 4096];
        bytes[5000] = 1;
        let found: Vec<_> = runs(&bytes, 0)
            .map(|run| (run.start, run.len, run.zero))
            .collect();
        assert_eq!(
            found,
            [(0, 4096, true), (4096, 4096, false), (8192, 4096, true)]
        );
        let found: Vec<_> = runs(&bytes, 100)
            .map(|run| (run.start, run.len, run.zero))
            .collect();
        assert_eq!(
            found,
            [(0, 3996, true), (3996, 4096, false), (8092, 4196, true)]
        );
        assert!(has_zero_granule(&bytes, 0));
        assert!(!has_zero_granule(&bytes[4096..8192], 0));
        assert!(
            !has_zero_granule(&bytes[2000..6000], 2000),
            "no whole granule in it"
        );
        assert_eq!(runs(&[], 0).count(), 0);
    }
}
