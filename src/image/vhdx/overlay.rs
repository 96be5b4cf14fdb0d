//! A file as it will be once its log is replayed, without writing to it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::Deref;

use super::ring::read_page;
use crate::format::vhdx::PAGE;
use crate::format::vhdx::log::LoggedPage;
use crate::storage::{Storage, past_end};
use crate::units::{FileOffset, FileRange, round_down, u64_from, usize_from};

/// What replaying a log changes. Pages are not kept in memory, but read from the log.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Pages, each with its place in the log. They lie on top of `zeros`.
    pub(super) pages: BTreeMap<FileOffset, LoggedPage>,
    /// Ranges that become zeros, disjoint: start to end.
    zeros: BTreeMap<FileOffset, FileOffset>,
    /// The length that the file needs.
    pub(super) len: u64,
}

impl Changes {
    /// Notes that the page at `at` is replaced, after all that was noted before.
    pub(super) fn add_page(&mut self, at: FileOffset, page: LoggedPage) {
        self.pages.insert(at, page);
        self.len = self.len.max(at.plus(PAGE).get());
    }

    /// Notes that `range` is zeroed, after all that was noted before.
    pub(super) fn add_zeros(&mut self, range: FileRange) {
        if range.is_empty() {
            return;
        }
        let gone: Vec<FileOffset> = (self.pages.range(range.start..range.end()))
            .map(|(at, _)| *at)
            .collect();
        for at in gone {
            self.pages.remove(&at);
        }
        let (mut start, mut end) = (range.start, range.end());
        while let Some((first, last)) = self.zeros.range(..=end).next_back() {
            let (first, last) = (*first, *last);
            if last < start {
                break;
            }
            self.zeros.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        self.zeros.insert(start, end);
    }

    /// The parts of `range` that become zeros, before pages are replaced.
    pub(super) fn zeros_in(&self, range: FileRange) -> impl Iterator<Item = FileRange> + '_ {
        let first = self.zeros.range(..=range.start).next_back();
        let first = first.map_or(range.start, |(start, _)| *start);
        (self.zeros.range(first..range.end().max(first)))
            .map(move |(start, end)| {
                FileRange::between((*start).max(range.start), (*end).min(range.end()))
            })
            .filter(|part| !part.is_empty())
    }
}

/// A file with the changes of its log, and as long as they and its blocks need. Takes no writes.
#[derive(Debug)]
pub(super) struct Overlay<S> {
    inner: S,
    inner_len: u64,
    /// Where the log lies that the changes were read from.
    log: FileRange,
    changes: Changes,
    len: u64,
}

impl<S: Deref<Target: Storage>> Overlay<S> {
    /// `inner` with `changes` from its log at `log`, and at least `len` bytes long.
    ///
    /// # Errors
    /// Where the host cannot tell the file's length.
    pub(super) fn new(inner: S, log: FileRange, changes: Changes, len: u64) -> io::Result<Self> {
        let inner_len = inner.len()?;
        Ok(Self {
            len: inner_len.max(changes.len).max(len),
            inner,
            inner_len,
            log,
            changes,
        })
    }
}

/// The part of `buf`, which is read from `range`, that `part` covers.
fn part_of(buf: &mut [u8], range: FileRange, part: FileRange) -> &mut [u8] {
    let first = usize_from(part.start.since(range.start));
    buf.get_mut(first..)
        .and_then(|rest| rest.get_mut(..usize_from(part.len)))
        .unwrap_or_default()
}

fn refused() -> io::Error {
    io::Error::new(
        io::ErrorKind::ReadOnlyFilesystem,
        "the file is open for reading only",
    )
}

impl<S> Storage for Overlay<S>
where
    S: Deref<Target: Storage> + Debug + Send + Sync,
{
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let range = FileRange::new(offset, u64_from(buf.len()));
        if range.end().get() > self.len {
            return Err(past_end(range, self.len));
        }
        let stored = FileRange::between(offset, range.end().min(FileOffset::new(self.inner_len)));
        let (inside, beyond) = buf.split_at_mut(usize_from(stored.len));
        beyond.fill(0);
        if !inside.is_empty() {
            self.inner.read_exact_at(inside, offset)?;
        }
        for zeros in self.changes.zeros_in(range) {
            part_of(buf, range, zeros).fill(0);
        }
        let first = FileOffset::new(round_down(offset.get(), PAGE));
        for (at, page) in self.changes.pages.range(first..range.end().max(first)) {
            let bytes = read_page(&*self.inner, self.log, page)?;
            let both = FileRange::between(offset.max(*at), range.end().min(at.plus(PAGE)));
            let from = usize_from(both.start.since(*at));
            if let Some(bytes) = bytes
                .get(from..)
                .and_then(|b| b.get(..usize_from(both.len)))
            {
                part_of(buf, range, both).copy_from_slice(bytes);
            }
        }
        Ok(())
    }

    fn next_data(&self, from: FileOffset, end: FileOffset) -> io::Result<Option<FileRange>> {
        let inner_end = end.min(FileOffset::new(self.inner_len));
        let stored = if from < inner_end {
            self.inner.next_data(from, inner_end)?
        } else {
            None
        };
        let first = FileOffset::new(round_down(from.get(), PAGE));
        let logged = (self.changes.pages.range(first..end.max(first)).next())
            .map(|(at, _)| FileRange::between((*at).max(from), at.plus(PAGE).min(end)));
        Ok([stored, logged].into_iter().flatten().min())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn write_all_at(&self, _buf: &[u8], _offset: FileOffset) -> io::Result<()> {
        Err(refused())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(refused())
    }

    fn punch_hole(&self, _range: FileRange) -> io::Result<()> {
        Err(refused())
    }

    fn write_zeroes(&self, _range: FileRange) -> io::Result<()> {
        Err(refused())
    }

    fn copy_within(&self, _from: FileRange, _to: FileOffset) -> io::Result<()> {
        Err(refused())
    }

    fn room(&self) -> Option<u64> {
        self.inner.room()
    }

    fn is_wanted(&self) -> bool {
        self.inner.is_wanted()
    }

    fn write_back(&self, _range: FileRange) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
