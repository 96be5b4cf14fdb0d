//! What the readers read through: a part of the disk, and a record of all that was read of it.

use std::hash::Hasher;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use rangemap::RangeSet;
use twox_hash::XxHash3_64;

use super::Trouble;
use crate::units::{u64_from, usize_from};

/// A disk as the guest sees it, to be read only.
pub trait Source {
    /// Bytes of the disk.
    fn len(&self) -> u64;
    /// Bytes of a logical sector, as the guest is told: 512 or 4096.
    fn sector_size(&self) -> u64;
    /// Fills `buf` from disk offset `offset` on. Callers stay within [`Self::len`].
    ///
    /// # Errors
    /// Where the host cannot read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The most that one [`View::read`] takes: larger structures are read piece by piece.
pub(super) const MAX_READ: u64 = 16 << 20;

/// A read, and what it found.
#[derive(Clone, Copy, Debug)]
struct Seen {
    offset: u64,
    len: usize,
    hash: u64,
}

/// All that was read of a disk to find its free space, so that it can be seen whether any of it
/// changed since. Takes 24 bytes a read.
#[derive(Debug, Default)]
pub struct Evidence {
    seen: Vec<Seen>,
}

impl Evidence {
    /// Bytes that were read.
    pub fn bytes(&self) -> u64 {
        self.seen.iter().map(|seen| u64_from(seen.len)).sum()
    }

    /// Leaves out the reads that touch `free`, which is about to lose its bytes.
    pub fn without(&mut self, free: &RangeSet<u64>) {
        self.seen.retain(|seen| {
            let read = seen.offset..seen.offset + u64_from(seen.len);
            !free.overlaps(&read)
        });
    }

    /// Reads all of it again and says whether it is what it was.
    ///
    /// # Errors
    /// Where the host cannot read.
    pub fn still_holds(&self, source: &dyn Source) -> io::Result<bool> {
        let mut buf = Vec::new();
        for seen in &self.seen {
            buf.resize(seen.len, 0);
            source.read_at(&mut buf, seen.offset)?;
            if hash(&buf) != seen.hash {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = XxHash3_64::default();
    hasher.write(bytes);
    hasher.finish()
}

/// A part of a disk: one range of it, or several that follow each other, as a logical volume has
/// them. Every read is bounds-checked and recorded. Cheap to clone.
#[derive(Clone)]
pub(super) struct View<'a> {
    source: &'a dyn Source,
    evidence: Arc<Mutex<Evidence>>,
    /// Disk ranges, none empty, in the order of the view's bytes.
    pieces: Arc<[Range<u64>]>,
    len: u64,
}

impl<'a> View<'a> {
    /// All of the disk.
    pub(super) fn whole(source: &'a dyn Source) -> Self {
        Self {
            source,
            evidence: Arc::default(),
            pieces: std::iter::once(0..source.len())
                .filter(|range| !range.is_empty())
                .collect(),
            len: source.len(),
        }
    }

    /// What was read through this view and all that were made of it.
    pub(super) fn into_evidence(self) -> Evidence {
        std::mem::take(&mut *self.evidence.lock())
    }

    /// Bytes of the view.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of the disk's logical sector.
    pub(super) fn sector_size(&self) -> u64 {
        self.source.sector_size()
    }

    /// The part of this view that the `ranges`, one after the other, make up. `None` where one
    /// reaches beyond it.
    pub(super) fn part(&self, ranges: &[Range<u64>]) -> Option<Self> {
        let mut pieces = Vec::new();
        let mut len = 0_u64;
        for range in ranges {
            if range.start > range.end || range.end > self.len {
                return None;
            }
            len = len.checked_add(range.end - range.start)?;
            pieces.extend(self.on_disk(range.clone()));
        }
        Some(Self {
            source: self.source,
            evidence: Arc::clone(&self.evidence),
            pieces: pieces.into(),
            len,
        })
    }

    /// Where `range` of the view, which must lie in it, lies on the disk.
    pub(super) fn on_disk(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        let mut start = 0;
        for piece in &*self.pieces {
            let end = start + (piece.end - piece.start);
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                found.push(piece.start + (from - start)..piece.start + (to - start));
            }
            start = end;
        }
        found
    }

    /// The disk ranges of `free`, which is in bytes of the view.
    pub(super) fn all_on_disk(&self, free: &RangeSet<u64>) -> RangeSet<u64> {
        (free.iter())
            .flat_map(|range| self.on_disk(range.clone()))
            .collect()
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where that reaches beyond the view, which is always the filesystem's
    /// mistake; [`Trouble::Io`].
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Trouble> {
        let end = offset.checked_add(u64_from(buf.len()));
        let Some(end) = end.filter(|end| *end <= self.len) else {
            let (len, all) = (buf.len(), self.len);
            return Err(Trouble::skip(format!(
                "its metadata points to {len} bytes at {offset}, beyond its {all} bytes"
            )));
        };
        let mut rest = buf;
        for piece in self.on_disk(offset..end) {
            let (part, tail) = rest.split_at_mut(usize_from(piece.end - piece.start));
            rest = tail;
            self.source.read_at(part, piece.start)?;
            self.evidence.lock().seen.push(Seen {
                offset: piece.start,
                len: part.len(),
                hash: hash(part),
            });
        }
        Ok(())
    }

    /// Reads `len` bytes from `offset` on.
    ///
    /// # Errors
    /// As [`Self::read_at`]; also where `len` exceeds [`MAX_READ`].
    pub(super) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Trouble> {
        if len > MAX_READ || offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Trouble::skip(format!(
                "its metadata points to {len} bytes at {offset} of its {} bytes",
                self.len
            )));
        }
        let mut buf = vec![0; usize_from(len)];
        self.read_at(&mut buf, offset)?;
        Ok(buf)
    }
}
