//! The bytes of a file as they are once its log is replayed, and the things that lie in it.

use std::fmt;
use std::ops::Range;

use vhdfs::storage::Storage;
use vhdfs::units::FileOffset;

use super::bytes::require;
use super::log::Write;
use crate::support::{len, size};

/// A file, read through what its log would change.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    file: &'a dyn Storage,
    /// The file's length.
    real: u64,
    /// Its length after replay.
    grown: u64,
    writes: &'a [Write],
}

impl<'a> View<'a> {
    /// The file as it is.
    pub(super) fn bare(file: &'a dyn Storage, len: u64) -> Self {
        Self::through(file, len, len, &[])
    }

    /// The file of length `real` once `writes` are applied in order and it has grown to `grown`.
    pub(super) fn through(
        file: &'a dyn Storage,
        real: u64,
        grown: u64,
        writes: &'a [Write],
    ) -> Self {
        let grown = grown.max(real);
        Self {
            file,
            real,
            grown,
            writes,
        }
    }

    /// Fills `buf` from `at` on.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> Result<(), String> {
        let end = at.saturating_add(len(buf));
        require!(
            end <= self.grown,
            "{} bytes at {at:#x} reach beyond the end, {:#x}",
            buf.len(),
            self.grown
        );
        let stored = size(self.real.clamp(at, end) - at);
        let (there, grown) = buf.split_at_mut(stored);
        grown.fill(0);
        if !there.is_empty() {
            let result = self.file.read_exact_at(there, FileOffset::new(at));
            result.map_err(|error| format!("reading {stored} bytes at {at:#x}: {error}"))?;
        }
        for write in self.writes {
            write.apply(buf, at);
        }
        Ok(())
    }

    /// `count` bytes from `at` on.
    pub(super) fn bytes(&self, at: u64, count: u64) -> Result<Vec<u8>, String> {
        require!(
            count <= self.grown,
            "{count} bytes at {at:#x} are more than the file has"
        );
        let mut bytes = vec![0; size(count)];
        self.read(&mut bytes, at)?;
        Ok(bytes)
    }
}

/// What lies somewhere in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The named structure. It stays where it is.
    Named(&'static str),
    /// The payload block of this number.
    Block(u64),
    /// The sector bitmap block of this chunk.
    Bitmap(u64),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Block(block) => write!(f, "block {block}"),
            Self::Bitmap(chunk) => write!(f, "the bitmap of chunk {chunk}"),
        }
    }
}

/// Something with its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Thing {
    /// What it is.
    pub(crate) what: What,
    /// The bytes that it takes.
    pub(crate) place: Range<u64>,
}

impl Thing {
    pub(super) fn new(what: What, at: u64, len: u64) -> Self {
        let place = at..at.saturating_add(len);
        Self { what, place }
    }
}

/// Sorts `things`, and checks that none shares a byte with another or reaches beyond `end`.
pub(super) fn check_places(things: &mut [Thing], end: u64) -> Result<(), String> {
    things.sort_by_key(|thing| (thing.place.start, thing.place.end));
    let mut before: Option<&Thing> = None;
    for thing in things.iter().filter(|thing| !thing.place.is_empty()) {
        let (what, place) = (thing.what, &thing.place);
        require!(
            place.end <= end,
            "{what} at {place:#x?} reaches beyond {end:#x}"
        );
        if let Some(before) = before {
            require!(
                before.place.end <= place.start,
                "{what} at {place:#x?} overlaps {} at {:#x?}",
                before.what,
                before.place
            );
        }
        before = Some(thing);
    }
    Ok(())
}

/// The ranges between `things`, which are sorted and do not overlap, from `floor` on.
pub(super) fn holes(things: &[Thing], floor: u64) -> Vec<Range<u64>> {
    let mut free_from = floor;
    let mut holes = Vec::new();
    for thing in things {
        if thing.place.start > free_from {
            holes.push(free_from..thing.place.start);
        }
        free_from = free_from.max(thing.place.end);
    }
    holes
}

/// The parts of `count` bytes at `offset`, cut where a multiple of `unit` is: the number of the unit,
/// where the part starts in it, and where it lies in a buffer for all.
pub(super) fn pieces(
    offset: u64,
    count: u64,
    unit: u64,
) -> impl Iterator<Item = (u64, u64, Range<usize>)> {
    let end = offset + count;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at == end {
            return None;
        }
        let stop = end.min((at / unit + 1) * unit);
        let part = (at / unit, at % unit, size(at - offset)..size(stop - offset));
        at = stop;
        Some(part)
    })
}

/// The longest parts of `count` bytes at `start` whose sectors are all `here` or all not: which, where
/// the part starts, and where it lies in a buffer for all.
pub(super) fn runs(
    start: u64,
    count: u64,
    sector: u64,
    here: impl Fn(u64) -> bool,
) -> Vec<(bool, u64, Range<usize>)> {
    let mut runs: Vec<(bool, u64, Range<usize>)> = Vec::new();
    for (number, within, part) in pieces(start, count, sector) {
        let here = here(number);
        match runs.last_mut() {
            Some((kind, _, bytes)) if *kind == here => bytes.end = part.end,
            _ => runs.push((here, number * sector + within, part)),
        }
    }
    runs
}
