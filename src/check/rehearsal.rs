//! A file that is changed in memory alone: what a repair would do to it, without doing it.

use std::collections::BTreeMap;
use std::io;

use parking_lot::Mutex;

use crate::storage::{Storage, past_end};
use crate::units::{FileOffset, FileRange, SECTOR_SIZE, u64_from, usize_from};

/// The most bytes that may be written. A log of a usual size is a hundredth of that.
const MOST: u64 = 64 << 20;

/// The most often that one sector may be.
const MOST_VERSIONS: usize = 1 << 10;

type Sector = [u8; 512];

/// One thing that was done to a file.
#[derive(Debug)]
enum Step {
    /// Bytes were written.
    Write(FileOffset, Vec<u8>),
    /// The length was set.
    Length(u64),
    /// What came before was made durable.
    Sync,
}

/// How a sector changed.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    /// The number of syncs before its last change.
    pub(super) after: u32,
    /// Checksums of what it held after each change, see [`checksum`].
    pub(super) versions: Vec<u32>,
}

/// What was done to a file, in order, and what the file is like afterwards.
#[derive(Debug, Default)]
pub(super) struct Script {
    steps: Vec<Step>,
    /// The sectors that were written to or cut through, by number.
    pub(super) touched: BTreeMap<u64, History>,
    /// The shortest and the longest that the file was.
    pub(super) lengths: (u64, u64),
    /// Those of them that are in the file now, as they are now.
    sectors: BTreeMap<u64, Box<Sector>>,
    /// The length now.
    len: u64,
    /// Bytes written so far.
    written: u64,
    /// Syncs so far.
    syncs: u32,
}

impl Script {
    /// Whether nothing was changed.
    pub(super) fn is_empty(&self) -> bool {
        (self.steps.iter()).all(|step| matches!(step, Step::Sync))
    }

    fn change(&mut self, number: u64, bytes: Box<Sector>) -> io::Result<()> {
        let history = self.touched.entry(number).or_default();
        if history.versions.len() >= MOST_VERSIONS {
            return Err(too_much());
        }
        history.after = self.syncs;
        history.versions.push(checksum(&bytes));
        self.sectors.insert(number, bytes);
        Ok(())
    }

    fn set_len(&mut self, len: u64) {
        self.len = len;
        self.lengths = (self.lengths.0.min(len), self.lengths.1.max(len));
        drop(self.sectors.split_off(&len.div_ceil(SECTOR_SIZE)));
    }

    /// Does the same to `storage`.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn perform(&self, storage: &dyn Storage) -> io::Result<()> {
        self.steps.iter().try_for_each(|step| match step {
            Step::Write(at, data) => storage.write_all_at(data, *at),
            Step::Length(len) => storage.set_len(*len),
            Step::Sync => storage.sync(),
        })
    }
}

/// The checksum of a sector; what lies beyond the end of the file counts as zeros.
pub(super) fn checksum(sector: &Sector) -> u32 {
    crc32c::crc32c(sector)
}

/// The numbers of the sectors that `range` has a byte of.
pub(super) fn sectors_of(range: FileRange) -> std::ops::Range<u64> {
    let start = range.start.get() / SECTOR_SIZE;
    if range.is_empty() {
        return start..start;
    }
    start..range.end().get().div_ceil(SECTOR_SIZE)
}

/// A file that looks as if it was changed; nothing is written to the real one.
#[derive(Debug)]
pub(super) struct Rehearsal<'a> {
    inner: &'a dyn Storage,
    script: Mutex<Script>,
}

impl<'a> Rehearsal<'a> {
    /// Of the file in `inner`, which is not changed meanwhile.
    ///
    /// # Errors
    /// Where the host cannot tell the file's length.
    pub(super) fn new(inner: &'a dyn Storage) -> io::Result<Self> {
        let len = inner.len()?;
        let script = Script {
            len,
            lengths: (len, len),
            ..Script::default()
        };
        Ok(Self {
            inner,
            script: Mutex::new(script),
        })
    }

    /// What was done.
    pub(super) fn into_script(self) -> Script {
        self.script.into_inner()
    }

    fn read(&self, script: &Script, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let range = FileRange::new(offset, u64_from(buf.len()));
        let stored = FileRange::between(offset, range.end().min(FileOffset::new(script.lengths.0)));
        let (inside, beyond) = buf.split_at_mut(usize_from(stored.len));
        beyond.fill(0);
        if !inside.is_empty() {
            self.inner.read_exact_at(inside, offset)?;
        }
        for (sector, bytes) in script.sectors.range(sectors_of(range)) {
            let place = FileRange::new(place_of(*sector), SECTOR_SIZE);
            let start = place.start.max(offset);
            let both = FileRange::between(start, place.end().min(range.end()));
            let from = usize_from(both.start.since(place.start));
            let to = usize_from(both.start.since(offset));
            let len = usize_from(both.len);
            buf[to..to + len].copy_from_slice(&bytes[from..from + len]);
        }
        Ok(())
    }

    fn sector(&self, script: &Script, sector: u64) -> io::Result<Box<Sector>> {
        let mut bytes = Box::new([0; 512]);
        let at = place_of(sector);
        let len = script.len.saturating_sub(at.get()).min(SECTOR_SIZE);
        self.read(script, &mut bytes[..usize_from(len)], at)?;
        Ok(bytes)
    }
}

/// Where a sector lies.
pub(super) fn place_of(sector: u64) -> FileOffset {
    FileOffset::new(sector.saturating_mul(SECTOR_SIZE))
}

impl Storage for Rehearsal<'_> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.script.lock().len)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let script = self.script.lock();
        let range = FileRange::new(offset, u64_from(buf.len()));
        if range.end().get() > script.len {
            return Err(past_end(range, script.len));
        }
        self.read(&script, buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        let mut script = self.script.lock();
        let range = FileRange::new(offset, u64_from(buf.len()));
        script.written = script.written.saturating_add(range.len);
        if script.written > MOST {
            return Err(too_much());
        }
        for number in sectors_of(range) {
            let mut bytes = self.sector(&script, number)?;
            let place = FileRange::new(place_of(number), SECTOR_SIZE);
            let start = place.start.max(offset);
            let both = FileRange::between(start, place.end().min(range.end()));
            let to = usize_from(both.start.since(place.start));
            let from = usize_from(both.start.since(offset));
            let len = usize_from(both.len);
            bytes[to..to + len].copy_from_slice(&buf[from..from + len]);
            script.change(number, bytes)?;
        }
        let len = script.len.max(range.end().get());
        script.set_len(len);
        script.steps.push(Step::Write(offset, buf.to_owned()));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut script = self.script.lock();
        if len < script.len && !len.is_multiple_of(SECTOR_SIZE) {
            // What is cut off of it must not come back.
            let number = len / SECTOR_SIZE;
            let mut bytes = self.sector(&script, number)?;
            bytes[usize_from(len % SECTOR_SIZE)..].fill(0);
            script.change(number, bytes)?;
        }
        script.set_len(len);
        script.steps.push(Step::Length(len));
        Ok(())
    }

    fn write_zeroes(&self, range: FileRange) -> io::Result<()> {
        let len = self.len()?;
        if range.end().get() > len {
            return Err(past_end(range, len));
        }
        if range.len > MOST {
            return Err(too_much());
        }
        self.write_all_at(&vec![0; usize_from(range.len)], range.start)
    }

    fn punch_hole(&self, _range: FileRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn copy_within(&self, _from: FileRange, _to: FileOffset) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn next_data(&self, from: FileOffset, end: FileOffset) -> io::Result<Option<FileRange>> {
        let script = self.script.lock();
        let inner_end = end.min(FileOffset::new(script.lengths.0));
        let stored = if from < inner_end {
            self.inner.next_data(from, inner_end)?
        } else {
            None
        };
        let sectors = sectors_of(FileRange::between(from, end));
        let written = script.sectors.range(sectors).next().map(|(sector, _)| {
            let place = FileRange::new(place_of(*sector), SECTOR_SIZE);
            FileRange::between(place.start.max(from), place.end().min(end))
        });
        Ok([stored, written].into_iter().flatten().min())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn room(&self) -> Option<u64> {
        None
    }

    fn is_wanted(&self) -> bool {
        self.inner.is_wanted()
    }

    fn write_back(&self, _range: FileRange) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut script = self.script.lock();
        script.syncs = script.syncs.saturating_add(1);
        script.steps.push(Step::Sync);
        Ok(())
    }
}

fn too_much() -> io::Error {
    io::Error::new(
        io::ErrorKind::FileTooLarge,
        "over 64 MiB would be written, more than a dry run or a backup is for: copy the file and \
         repair the copy",
    )
}
