//! A second disk without a file system: every change goes to the served disk and to a raw file, which is then
//! what other programs must read out of the VHD, byte by byte.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};

const MIB: u64 = 1 << 20;
const LARGEST_WRITE: u64 = MIB;
const LARGEST_DISCARD: u64 = 12 * MIB;
/// As many operations of the last ones are named where a disk reads something else than was written.
const REMEMBERED: usize = 4000;

pub(crate) struct Mirror {
    served: PathBuf,
    disk: File,
    expected: File,
    expected_path: PathBuf,
    /// The part of the disk that is changed and looked at; others may have the rest.
    part: Range<u64>,
    random: u64,
    /// What a failed change was about: its range may hold old and new bytes, in any mixture.
    torn: Option<Change>,
    changed: u64,
    done: u64,
    /// Number, kind and place of the last operations.
    last: VecDeque<(u64, &'static str, Range<u64>)>,
}

/// What [`Mirror::exercise`] does one of after the other.
enum Operation {
    Read(Range<u64>),
    Change(Change),
    Sync,
    Reopen,
}

#[derive(Clone)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Discard { range: Range<u64>, zero: bool },
}

impl Change {
    fn range(&self) -> Range<u64> {
        match self {
            Self::Write { offset, bytes } => {
                *offset..*offset + u64::try_from(bytes.len()).expect("fits")
            }
            Self::Discard { range, .. } => range.clone(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Write { bytes, .. } if bytes.iter().all(|byte| *byte == 0) => "write of zeros",
            Self::Write { .. } => "write",
            Self::Discard { zero: true, .. } => "zero",
            Self::Discard { zero: false, .. } => "punch",
        }
    }
}

impl Operation {
    /// For a report: what is done, and where.
    fn summary(&self) -> (&'static str, Range<u64>) {
        match self {
            Self::Read(range) => ("read", range.clone()),
            Self::Change(change) => (change.name(), change.range()),
            Self::Sync => ("sync", 0..u64::MAX),
            Self::Reopen => ("reopen", 0..u64::MAX),
        }
    }
}

impl Mirror {
    /// Opens the served disk, all zero so far, and makes its raw twin at `expected`.
    pub(crate) fn new(served: &Path, expected: &Path, seed: u64) -> Mirror {
        let len = open(served).metadata().expect("a served disk").len();
        let twin = File::options().write(true).create_new(true).open(expected);
        (twin.and_then(|twin| twin.set_len(len))).expect("a new sparse file");
        Mirror::of_part(served, expected, 0..len, seed)
    }

    /// One of a `part` of a disk that has a twin already. Several of them may be at work at once if they have no byte in
    /// common.
    pub(crate) fn of_part(served: &Path, expected: &Path, part: Range<u64>, seed: u64) -> Mirror {
        Mirror {
            served: served.to_owned(),
            disk: open(served),
            expected: open(expected),
            expected_path: expected.to_owned(),
            part,
            random: seed,
            torn: None,
            changed: 0,
            done: 0,
            last: VecDeque::new(),
        }
    }

    /// Discards all but the first MiB.
    pub(crate) fn discard_most(&mut self) {
        let range = self.part.start + MIB..self.part.end;
        let change = Change::Discard { range, zero: false };
        self.change(change).expect("the disk takes it");
    }

    /// Takes what the disk holds already, which need not be zero, for what is expected.
    pub(crate) fn learn(&mut self) {
        for start in self.part.clone().step_by(1 << 22) {
            let range = start..(start + 4 * MIB).min(self.part.end);
            let bytes = read(&self.disk, &range);
            (self.expected.write_all_at(&bytes, start)).expect("the raw twin takes it");
        }
    }

    /// How many bytes the disk has been asked to change so far.
    pub(crate) fn changed(&self) -> u64 {
        self.changed
    }

    pub(crate) fn expected_path(&self) -> &Path {
        &self.expected_path
    }

    /// Makes `count` random changes; stops at the first that the disk refuses.
    pub(crate) fn work(&mut self, count: usize) -> io::Result<()> {
        for _ in 0..count {
            let change = self.invent();
            self.change(change)?;
        }
        Ok(())
    }

    /// To the raw twin punching is zeroing, which not every file system has.
    fn change_twin(&self, change: &Change) {
        let change = match change {
            Change::Discard { range, .. } => &Change::Discard {
                range: range.clone(),
                zero: false,
            },
            Change::Write { .. } => change,
        };
        apply(&self.expected, change).expect("the raw twin takes what the disk took");
    }

    /// Opens the served disk anew after the daemon was killed, and checks the change that was under way then: each
    /// of its bytes must be as before or as it was to become.
    pub(crate) fn reopen(&mut self) {
        self.disk = open(&self.served);
        let Some(change) = self.torn.take() else {
            return;
        };
        let range = change.range();
        let before = read(&self.expected, &range);
        let found = read(&self.disk, &range);
        self.change_twin(&change);
        let after = read(&self.expected, &range);
        for (index, byte) in found.iter().enumerate() {
            assert!(
                *byte == before[index] || *byte == after[index],
                "byte {index} of the interrupted change at {range:?} is neither old nor new"
            );
        }
        self.expected
            .write_all_at(&found, range.start)
            .expect("the raw twin takes it");
    }

    /// Every byte of the served disk is what was written.
    pub(crate) fn verify(&self) {
        let mut start = self.part.start;
        while start < self.part.end {
            let range = start..(start + 4 * MIB).min(self.part.end);
            self.compare(&range, &read(&self.disk, &range));
            start = range.end;
        }
    }

    /// Fails where `found` in `range` is not what was written, with what was done there last.
    fn compare(&self, range: &Range<u64>, found: &[u8]) {
        let expected = read(&self.expected, range);
        if found == expected {
            return;
        }
        let differs = |index: &usize| found[*index] != expected[*index];
        let mut places = (0..found.len()).filter(differs);
        let place = |index| range.start + u64::try_from(index).unwrap_or(0);
        let first = place(places.next().unwrap_or(0));
        let last = place(places.next_back().unwrap_or(0)).max(first);
        let done: Vec<String> = (self.last.iter())
            .filter(|(_, _, range)| range.start <= last && range.end > first)
            .map(|(number, what, range)| format!("  {number}: {what} {range:?}"))
            .collect();
        panic!(
            "{} differs from what was written, in {first}..{}; operation {} found it, of the last ones there were\n{}",
            self.served.display(),
            last + 1,
            self.done,
            done.join("\n")
        );
    }

    /// How many operations [`Mirror::exercise`] has done so far.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    /// Does `count` random operations as `fsx` has them, most of them small. Compares whatever it reads, and stops at the
    /// first that the disk refuses.
    ///
    /// Without a `pause` between them all are around one place, and now and then the rest is discarded first: blocks have to
    /// move, which others use all the time. With one they are anywhere, and blocks move that are used once in a while.
    pub(crate) fn exercise(&mut self, count: usize, pause: Duration) -> io::Result<()> {
        let (place, mut first) = match pause {
            Duration::ZERO => self.narrow_place(),
            _ => (self.part.clone(), Vec::new()),
        };
        for _ in 0..count {
            let operation = match first.pop() {
                Some(operation) => operation,
                None => self.devise(&place),
            };
            std::thread::sleep(pause);
            self.done += 1;
            if self.last.len() == REMEMBERED {
                self.last.pop_front();
            }
            let (what, range) = operation.summary();
            self.last.push_back((self.done, what, range));
            match operation {
                Operation::Read(range) => self.compare(&range, &try_read(&self.disk, &range)?),
                Operation::Change(change) => self.change(change)?,
                Operation::Sync => self.disk.sync_data()?,
                Operation::Reopen => {
                    self.disk = File::options().read(true).write(true).open(&self.served)?
                }
            }
        }
        Ok(())
    }

    /// A quarter of the part, and perhaps what discards the rest.
    fn narrow_place(&mut self) -> (Range<u64>, Vec<Operation>) {
        let Range { start, end } = self.part;
        let quarter = (end - start) / 4;
        let from = start + self.below(3 * quarter);
        let place = from..from + quarter;
        let rest = [start..place.start.max(start + 1), place.end..end];
        let discards = rest.map(|range| Operation::Change(Change::Discard { range, zero: false }));
        let chance = self.below(3) == 0;
        (place, discards.into_iter().filter(|_| chance).collect())
    }

    fn devise(&mut self, place: &Range<u64>) -> Operation {
        match self.below(100) {
            0..40 => {
                let range = self.small_range(place, 256 << 10);
                Operation::Read(range)
            }
            kind @ 40..78 => {
                let range = self.small_range(place, 256 << 10);
                let mut bytes = self.bytes(&range);
                match kind {
                    40..46 => bytes.fill(0),
                    // Zeros inside, as of a file system that writes part of a page.
                    46..52 => {
                        let zeros = bytes.len() / 4..bytes.len() / 4 * 3;
                        bytes[zeros].fill(0);
                    }
                    _ => {}
                }
                let offset = range.start;
                Operation::Change(Change::Write { offset, bytes })
            }
            kind @ 78..98 => {
                let range = self.small_range(place, 4 * MIB);
                let zero = kind >= 93;
                Operation::Change(Change::Discard { range, zero })
            }
            98 => Operation::Sync,
            _ => Operation::Reopen,
        }
    }

    /// From one byte to `largest` inside of `place`, all magnitudes alike; often aligned as a guest's requests are.
    fn small_range(&mut self, place: &Range<u64>, largest: u64) -> Range<u64> {
        let magnitude = self.below(u64::from(largest.ilog2()) + 1);
        let length = (1 << magnitude) + self.below(1 << magnitude);
        let start = place.start + self.below(place.end - place.start);
        let unit = [1, 1, 512, 4096, 4096, MIB][usize::try_from(self.below(6)).unwrap_or(0)];
        let start = (start / unit * unit).max(place.start);
        let end = (start + length).div_ceil(unit) * unit;
        start..end.min(start + largest).min(place.end)
    }

    fn bytes(&mut self, range: &Range<u64>) -> Vec<u8> {
        let length = usize::try_from(range.end - range.start).expect("fits");
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }

    fn change(&mut self, change: Change) -> io::Result<()> {
        let range = change.range();
        self.changed += range.end - range.start;
        if let Err(error) = apply(&self.disk, &change) {
            self.torn = Some(change);
            return Err(error);
        }
        self.change_twin(&change);
        Ok(())
    }

    /// One to write for two that discard in bytes, so that blocks come and go.
    fn invent(&mut self) -> Change {
        let kind = self.below(10);
        let zero = kind == 0;
        if kind < 2 {
            let Range { start, end } = self.part;
            let start = start + self.below(end - start);
            let end = (start + 1 + self.below(LARGEST_DISCARD)).min(end);
            return Change::Discard {
                range: start..end,
                zero,
            };
        }
        let length = self.part.end - self.part.start;
        let offset = self.part.start + self.below(length - LARGEST_WRITE);
        let end = offset + 1 + self.below(LARGEST_WRITE);
        let mut bytes = self.bytes(&(offset..end));
        if kind == 2 {
            // Some zeros that a guest wrote, too.
            bytes.fill(0);
        }
        Change::Write { offset, bytes }
    }

    /// Uniform enough in `0..limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// xorshift64.
    pub(crate) fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

fn open(path: &Path) -> File {
    let file = File::options().read(true).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn apply(file: &File, change: &Change) -> io::Result<()> {
    match change {
        Change::Write { offset, bytes } => file.write_all_at(bytes, *offset),
        Change::Discard { range, zero } => {
            let how = if *zero {
                FallocateFlags::ZERO_RANGE
            } else {
                FallocateFlags::PUNCH_HOLE
            };
            let flags = how | FallocateFlags::KEEP_SIZE;
            Ok(fallocate(
                file,
                flags,
                range.start,
                range.end - range.start,
            )?)
        }
    }
}

fn read(file: &File, range: &Range<u64>) -> Vec<u8> {
    try_read(file, range).expect("a range inside the disk")
}

fn try_read(file: &File, range: &Range<u64>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("fits")];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes)
}
