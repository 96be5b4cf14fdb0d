//! The changes since the last sync, and which of them a power cut keeps.

use std::sync::Arc;

use super::content::{Content, RunKind};
use super::faults::OpKind;
use crate::units::{
    FileOffset, FileRange, SECTOR_SIZE, div_ceil, round_down, round_up, u64_from, usize_from,
};

/// A change that no sync has made durable yet.
///
/// It consists of *units* that reach the disk or not, each on its own: one for each sector that the
/// change touches, or a single one where it changes the file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its place among the outstanding changes, from 0.
    pub index: usize,
    /// What it does: anything but a read, a query or a sync.
    pub kind: OpKind,
    /// The bytes that it touches, widened to whole sectors inside the file; for a change of the
    /// length, the file as it is afterwards.
    pub range: FileRange,
    /// The place of its first unit among the units of all outstanding changes, from 0.
    pub first_unit: u64,
    /// How many units it has, at least 1.
    pub units: u64,
}

/// What a power cut leaves of one change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All of it.
    All,
    /// Nothing.
    Nothing,
    /// The units whose element is true, in order; units without an element are lost.
    Units(Vec<bool>),
}

/// Decides what a power cut keeps. Asked once for each outstanding change, in the order of issue.
pub trait CrashChoice {
    /// What is kept of `change`.
    fn keep(&mut self, change: &Change) -> Keep;
}

impl<F: FnMut(&Change) -> Keep> CrashChoice for F {
    fn keep(&mut self, change: &Change) -> Keep {
        self(change)
    }
}

/// The usual choices. Each is a pure function of the outstanding changes, so that a failing one can
/// be printed and tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Choice {
    /// No outstanding change reaches the disk.
    AllLost,
    /// All of them do.
    AllKept,
    /// All but the one with this index do.
    AllBut(usize),
    /// Only the one with this index does.
    Only(usize),
    /// The changes with an index below this one do: the disk kept the order.
    Before(usize),
    /// Of the first 64 changes those whose bit is set do, whole; the further ones do not.
    Changes(u64),
    /// Of the first 64 units those whose bit is set do; the further ones do not.
    Units(u64),
    /// Chosen at random from `seed`: changes that are kept, lost, cut short, or torn anywhere.
    Seeded {
        /// The same seed chooses the same.
        seed: u64,
        /// Bytes that the disk writes as a whole: 512, or 4096 for a disk that promises more.
        atomic: u64,
    },
}

impl CrashChoice for Choice {
    fn keep(&mut self, change: &Change) -> Keep {
        let all = |kept: bool| if kept { Keep::All } else { Keep::Nothing };
        let bit = |bits: u64, n: u64| n < 64 && bits >> n & 1 == 1;
        match *self {
            Self::AllLost => Keep::Nothing,
            Self::AllKept => Keep::All,
            Self::AllBut(index) => all(change.index != index),
            Self::Only(index) => all(change.index == index),
            Self::Before(index) => all(change.index < index),
            Self::Changes(bits) => all(bit(bits, u64_from(change.index))),
            Self::Units(bits) => Keep::Units(
                (0..change.units)
                    .map(|n| bit(bits, change.first_unit + n))
                    .collect(),
            ),
            Self::Seeded { seed, atomic } => seeded(change, seed, atomic),
        }
    }
}

fn seeded(change: &Change, seed: u64, atomic: u64) -> Keep {
    let mut random = Random::new(seed ^ u64_from(change.index).wrapping_mul(0x9e37_79b9));
    // Tearing is tried on whole atoms of the disk. Units of a length change are never torn.
    let atoms = if change.kind == OpKind::SetLen {
        1
    } else {
        atomic.max(SECTOR_SIZE)
    };
    let first = round_down(change.range.start.get(), atoms);
    let atom_of = |unit: u64| (change.range.start.get() + unit * SECTOR_SIZE - first) / atoms;
    let count = if atoms == 1 {
        1
    } else {
        atom_of(change.units - 1) + 1
    };
    let cut = random.below(count + 1);
    let mode = random.below(if count > 1 { 10 } else { 4 });
    let noise = random.next();
    let kept = |atom: u64| match mode {
        4 => atom < cut,
        5 => atom >= cut,
        6 => atom == cut,
        7 => atom != cut,
        _ => Random::new(noise ^ atom).below(2) == 0,
    };
    match mode {
        0 | 1 => Keep::Nothing,
        2 | 3 => Keep::All,
        _ => Keep::Units((0..change.units).map(|unit| kept(atom_of(unit))).collect()),
    }
}

/// A small generator (SplitMix64): tests must not change with a crate's version.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    #[expect(clippy::should_implement_trait, reason = "no end, so no Option")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A change as it is kept until a sync.
#[derive(Debug)]
struct Entry {
    /// Counts all changes of this storage.
    sequence: u64,
    kind: OpKind,
    range: FileRange,
    effect: Effect,
}

#[derive(Debug)]
enum Effect {
    Length(u64),
    /// Adjoining parts that start on a sector each. `extends`: as a write does.
    Parts {
        parts: Vec<(FileRange, Data)>,
        extends: bool,
    },
}

#[derive(Debug)]
enum Data {
    Bytes(Vec<u8>),
    Zeros { release: bool },
}

impl Entry {
    fn units(&self) -> u64 {
        match self.effect {
            Effect::Length(_) => 1,
            Effect::Parts { .. } => div_ceil(self.range.len, SECTOR_SIZE),
        }
    }

    fn apply(&self, content: &mut Content, keep: &Keep) {
        let kept = |unit: u64| match keep {
            Keep::All => true,
            Keep::Nothing => false,
            Keep::Units(units) => units.get(usize_from(unit)).copied().unwrap_or(false),
        };
        match &self.effect {
            Effect::Length(len) if kept(0) => content.set_len(*len),
            Effect::Length(_) => {}
            Effect::Parts { parts, extends } => {
                let unit_of = |at: FileOffset| at.since(self.range.start) / SECTOR_SIZE;
                for (range, data) in parts {
                    if matches!(keep, Keep::All) {
                        apply_part(content, *range, *range, data, *extends);
                        continue;
                    }
                    for run in kept_runs(*range, |at| kept(unit_of(at))) {
                        apply_part(content, *range, run, data, *extends);
                    }
                }
            }
        }
    }
}

/// The longest runs of sectors of `range` for which `kept` is true.
fn kept_runs(range: FileRange, kept: impl Fn(FileOffset) -> bool) -> Vec<FileRange> {
    let mut runs: Vec<FileRange> = Vec::new();
    let mut at = range.start;
    while at < range.end() {
        let sector = FileRange::between(at, at.plus(SECTOR_SIZE).min(range.end()));
        if kept(at) {
            match runs.last_mut() {
                Some(last) if last.end() == at => last.len += sector.len,
                _ => runs.push(sector),
            }
        }
        at = sector.end();
    }
    runs
}

/// Applies what `data` says about `whole` to its part `run`.
fn apply_part(content: &mut Content, whole: FileRange, run: FileRange, data: &Data, extends: bool) {
    if extends {
        content.extend_to(run.end().get());
    }
    match data {
        Data::Bytes(bytes) => {
            let run = content.clip(run);
            let first = usize_from(run.start.since(whole.start));
            content.write(&bytes[first..][..usize_from(run.len)], run.start);
        }
        Data::Zeros { release } => content.zero(run, *release),
    }
}

/// The outstanding changes, oldest first. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal {
    entries: Vec<Arc<Entry>>,
    /// The number of changes recorded so far.
    recorded: u64,
}

impl Journal {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many changes were recorded ever: what a sync that starts now covers.
    pub(super) fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Records that the length was set.
    pub(super) fn length(&mut self, len: u64) {
        let range = FileRange::new(FileOffset::new(0), len);
        self.push(OpKind::SetLen, range, Effect::Length(len));
    }

    /// Records that `range` has changed to what `after`, the file with the change, has there.
    /// Sectors that the change touched in part count as a whole: a disk writes no less.
    pub(super) fn content(&mut self, kind: OpKind, range: FileRange, after: &Content) {
        if range.is_empty() {
            return;
        }
        let start = round_down(range.start.get(), SECTOR_SIZE);
        let end = round_up(range.end().get(), SECTOR_SIZE).min(after.len());
        let range = FileRange::between(FileOffset::new(start), FileOffset::new(end));
        let part = |(range, kind): (FileRange, RunKind)| match kind {
            RunKind::Hole => (range, Data::Zeros { release: true }),
            RunKind::Zero => (range, Data::Zeros { release: false }),
            RunKind::Bytes => {
                let mut bytes = vec![0; usize_from(range.len)];
                assert!(
                    after.read(&mut bytes, range.start),
                    "{range} is inside the file"
                );
                (range, Data::Bytes(bytes))
            }
        };
        let parts = after.runs(range).into_iter().map(part).collect();
        let extends = matches!(kind, OpKind::Write | OpKind::CopyWithin);
        self.push(kind, range, Effect::Parts { parts, extends });
    }

    fn push(&mut self, kind: OpKind, range: FileRange, effect: Effect) {
        let sequence = self.recorded;
        self.recorded += 1;
        self.entries.push(Arc::new(Entry {
            sequence,
            kind,
            range,
            effect,
        }));
    }

    /// The outstanding changes.
    pub(super) fn changes(&self) -> Vec<Change> {
        let mut first_unit = 0;
        let change = |(index, entry): (usize, &Arc<Entry>)| {
            let units = entry.units();
            first_unit += units;
            let first_unit = first_unit - units;
            Change {
                index,
                kind: entry.kind,
                range: entry.range,
                first_unit,
                units,
            }
        };
        self.entries.iter().enumerate().map(change).collect()
    }

    /// Applies what `choice` keeps to `content`.
    pub(super) fn apply(&self, content: &mut Content, choice: &mut dyn CrashChoice) {
        for (entry, change) in self.entries.iter().zip(self.changes()) {
            entry.apply(content, &choice.keep(&change));
        }
    }

    /// Takes out the changes that were recorded when [`Self::recorded`] said `until`.
    #[must_use]
    pub(super) fn take(&mut self, until: u64) -> Self {
        let count = self.entries.partition_point(|entry| entry.sequence < until);
        Self {
            entries: self.entries.drain(..count).collect(),
            recorded: until,
        }
    }
}
