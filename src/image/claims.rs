//! Things that claim parts of a file, and which of them claim the same.

use std::fmt;

use crate::error::FormatError;
use crate::units::FileRange;

/// Two things that claim the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overlap<T> {
    /// The one that starts later, or at the same place.
    pub(crate) one: (FileRange, T),
    /// The other.
    pub(crate) other: (FileRange, T),
}

impl<T: fmt::Display> From<Overlap<T>> for FormatError {
    fn from(overlap: Overlap<T>) -> Self {
        let Overlap { one, other } = overlap;
        let end = one.0.end().min(other.0.end());
        Self::Overlap {
            what: format!("{} at {}", one.1, one.0),
            other: format!("{} at {}", other.1, other.0),
            at: FileRange::between(one.0.start.max(other.0.start), end),
        }
    }
}

/// The overlaps among `claims`, which come in order of their starts. Of a claim that overlaps
/// several others, only that with the one that reaches furthest is listed.
pub(crate) fn overlaps<T: Copy>(
    claims: impl Iterator<Item = (FileRange, T)>,
) -> impl Iterator<Item = Overlap<T>> {
    let mut furthest: Option<(FileRange, T)> = None;
    claims.filter_map(move |one| {
        let found = furthest
            .filter(|other| other.0.overlaps(one.0))
            .map(|other| Overlap { one, other });
        if furthest.is_none_or(|other| one.0.end() > other.0.end()) {
            furthest = Some(one);
        }
        found
    })
}

/// Both of two sorted sequences of claims in one, sorted.
pub(crate) fn merged<T>(
    one: impl Iterator<Item = (FileRange, T)>,
    other: impl Iterator<Item = (FileRange, T)>,
) -> impl Iterator<Item = (FileRange, T)> {
    let mut one = one.peekable();
    let mut other = other.peekable();
    std::iter::from_fn(move || match (one.peek(), other.peek()) {
        (Some(first), Some(second)) if first.0.start > second.0.start => other.next(),
        (Some(_), _) => one.next(),
        (None, _) => other.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::FileOffset;

    fn claim(start: u64, end: u64, name: &str) -> (FileRange, &str) {
        let range = FileRange::between(FileOffset::new(start), FileOffset::new(end));
        (range, name)
    }

    fn found(claims: &[(FileRange, &'static str)]) -> Vec<(&'static str, &'static str)> {
        overlaps(claims.iter().copied())
            .map(|overlap| (overlap.one.1, overlap.other.1))
            .collect()
    }

    #[test]
    fn claims_of_different_lengths() {
        let touching = [claim(0, 10, "a"), claim(10, 20, "b"), claim(20, 20, "c")];
        assert_eq!(found(&touching), []);
        let nested = [
            claim(0, 100, "a"),
            claim(10, 20, "b"),
            claim(15, 30, "c"),
            claim(90, 110, "d"),
            claim(105, 106, "e"),
            claim(110, 120, "f"),
        ];
        assert_eq!(
            found(&nested),
            [("b", "a"), ("c", "a"), ("d", "a"), ("e", "d")]
        );
    }

    #[test]
    fn the_error_says_which_bytes() {
        let claims = [claim(0, 20, "a"), claim(10, 15, "b")];
        let first = overlaps(claims.into_iter()).next().unwrap();
        assert_eq!(
            FormatError::from(first).to_string(),
            "b at 0xa..0xf overlaps a at 0x0..0x14 at file offset 0xa..0xf; open it read-only and \
             copy the data out"
        );
    }

    #[test]
    fn sorted_claims_merge() {
        let one = [claim(0, 1, "a"), claim(5, 6, "c")];
        let other = [claim(3, 4, "b"), claim(5, 9, "d"), claim(7, 8, "e")];
        let names: String = merged(one.into_iter(), other.into_iter())
            .map(|(_, name)| name)
            .collect();
        assert_eq!(names, "abcde");
    }
}
