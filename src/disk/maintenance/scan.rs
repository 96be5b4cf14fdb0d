//! Finds out which granules of a block are zero, reading as little as that takes.

use super::FreeBook;
use crate::disk::{Content, Disk, zero};
use crate::error::DiskError;
use crate::format::sector_bitmap::SectorBitmap;
use crate::map::BlockState;
use crate::units::{
    BlockIndex, FileOffset, FileRange, GRANULE_SIZE, round_down, u64_from, usize_from,
};

/// Bytes of a block that are looked at first: where they hold data, the block lives, and the rest
/// matters only for holes inside it.
const FIRST_LOOK: u64 = 64 << 10;

/// Reads blocks and tells the tracker what they hold.
#[derive(Debug)]
pub(crate) struct Scanner {
    /// Look at every granule, not only as far as it takes to know that a block lives.
    whole_blocks: bool,
    /// Bytes read so far.
    pub(crate) bytes_read: u64,
    buf: Vec<u8>,
    /// A hole of the host file, of a disk that nobody writes to.
    hole: FileRange,
}

/// What became of a piece of scanning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scanned {
    /// This many bytes are known now.
    Bytes(u64),
    /// The block is gone or known: leave it.
    Nothing,
    /// Somebody changed the block meanwhile: leave it for another time.
    Touched,
}

impl Scanner {
    pub(crate) fn new(whole_blocks: bool) -> Self {
        Self {
            whole_blocks,
            bytes_read: 0,
            buf: Vec::new(),
            hole: FileRange::new(FileOffset::new(0), 0),
        }
    }

    /// Whether a look at `block` would find out something that matters.
    pub(crate) fn wants(&self, disk: &Disk, book: Option<&FreeBook>, block: BlockIndex) -> bool {
        let gaps = disk.known(book).gaps(block);
        gaps.has_unknown && (self.whole_blocks || !gaps.has_data)
    }

    /// Finds out about the next unknown granules of `block`, at most `limit` bytes of them. What its
    /// sector bitmap or the host tells to be zero is not read; what is free by `book` counts as zero, and
    /// then it is that book which is kept.
    ///
    /// # Errors
    /// Where the host cannot read.
    pub(crate) fn scan(
        &mut self,
        disk: &Disk,
        book: Option<&FreeBook>,
        block: BlockIndex,
        limit: u64,
    ) -> Result<Scanned, DiskError> {
        let known = disk.known(book);
        if disk.is_read_only()
            && known.content(block) == Content::Unknown
            && self.is_hole(disk, block, 0)?
        {
            // No one to watch for: of a large disk that is all hole, this is most of the work.
            known.set_dead(block);
            return Ok(Scanned::Bytes(GRANULE_SIZE));
        }
        let watch = disk.gates.watch(block);
        let runs = known.unknown_runs(block);
        let Some((slot, run)) = disk.image.map().get(block).slot().zip(runs.first()) else {
            return Ok(Scanned::Nothing);
        };
        let start = run.start * GRANULE_SIZE;
        let first_look = !self.whole_blocks && start == 0;
        let limit = limit.min(if first_look { FIRST_LOOK } else { u64::MAX });
        // Whole granules only: of a part of one, nothing can be said.
        let limit = round_down(limit, GRANULE_SIZE).max(GRANULE_SIZE);
        let len = ((run.end - run.start) * GRANULE_SIZE).min(limit);
        let len = len.min(disk.geometry().block_size - start);
        let (found, stored, looked_at) = if self.is_hole(disk, block, start)? {
            let zeros = run.clone().map(|index| (index, true));
            (zeros.collect(), false, GRANULE_SIZE)
        } else {
            let stored = self.load(disk, block, slot, start, len)?;
            if let Some(book) = book {
                for free in book.free_in(disk, block) {
                    let (from, to) = (free.start.max(start), free.end.min(start + len));
                    if from < to {
                        self.buf[usize_from(from - start)..usize_from(to - start)].fill(0);
                    }
                }
            }
            (self.granules(start), stored, len)
        };

        let _gate = disk.gates.exclusive(block);
        if watch.is_touched() {
            return Ok(Scanned::Touched);
        }
        known.note_scanned(block, found, stored);
        Ok(Scanned::Bytes(looked_at))
    }

    /// Whether the host stores nothing of `block` from `start` bytes in it on, and no parent shows there.
    fn is_hole(&mut self, disk: &Disk, block: BlockIndex, start: u64) -> Result<bool, DiskError> {
        let (slot, whole) = match disk.image.map().get(block) {
            BlockState::Present { slot, whole } => (slot, whole),
            BlockState::NotPresent | BlockState::Zero => return Ok(false),
        };
        if !whole && disk.parent().is_some() {
            return Ok(false);
        }
        let data = disk.geometry().data_range(slot);
        let range = FileRange::between(data.start.plus(start), data.end());
        let is_inside = |hole: FileRange| hole.start <= range.start && range.end() <= hole.end();
        if is_inside(self.hole) {
            return Ok(true);
        }
        // Where somebody may write, only what is asked of this very block holds.
        let end = match disk.is_read_only() {
            true => FileOffset::new(disk.image.file_len()).max(range.end()),
            false => range.end(),
        };
        let data = (disk.image.storage().next_data(range.start, end))
            .map_err(|error| DiskError::io("scan a block", error))?;
        let hole = FileRange::between(range.start, data.map_or(end, |data| data.start));
        if disk.is_read_only() {
            self.hole = hole;
        }
        Ok(is_inside(hole))
    }

    /// Loads `len` bytes from `start` in the block, as a guest would read them; says whether the
    /// host stores any of them.
    fn load(
        &mut self,
        disk: &Disk,
        block: BlockIndex,
        slot: FileOffset,
        start: u64,
        len: u64,
    ) -> Result<bool, DiskError> {
        self.buf.resize(usize_from(len), 0);
        let at = disk.geometry().data_at(slot).plus(start);
        let bitmap = {
            // The gate keeps the block in place while its bitmap is read.
            let _gate = disk.gates.shared(block);
            match disk.image.map().get(block) {
                BlockState::Present { whole: false, .. } => Some(disk.image.sector_bitmap(block)?),
                _ => None,
            }
        };
        let mut stored = bitmap
            .as_deref()
            .is_some_and(|bitmap: &SectorBitmap| !bitmap.is_full());
        // What lies behind the disk's end in its last block, nobody can read: as good as zeros.
        let disk_end = disk.len() - disk.offset_of(block);
        let all = start..(start + len).min(disk_end).max(start);
        self.buf[usize_from(all.end - start)..].fill(0);
        let runs: Vec<_> = match &bitmap {
            Some(bitmap) => disk.runs(bitmap, all).collect(),
            None => vec![(all, true)],
        };
        for (run, is_written) in runs {
            let place = usize_from(run.start - start);
            let part = FileRange::new(at.plus(run.start - start), run.end - run.start);
            if is_written {
                stored |= self.read_stored(disk, part, place)?;
            } else {
                let buf = &mut self.buf[place..place + usize_from(part.len)];
                disk.read_parent(buf, disk.offset_of(block) + run.start)?;
            }
        }
        Ok(stored)
    }

    /// Reads `range` to `place` in the buffer, sparing the host's holes; says whether it stores any.
    fn read_stored(
        &mut self,
        disk: &Disk,
        range: FileRange,
        place: usize,
    ) -> Result<bool, DiskError> {
        let io = |error| DiskError::io("scan a block", error);
        let storage = disk.image.storage();
        let byte = |at: FileOffset| place + usize_from(at.since(range.start));
        let mut from = range.start;
        while let Some(data) = storage.next_data(from, range.end()).map_err(io)? {
            self.buf[byte(from)..byte(data.start)].fill(0);
            let part = &mut self.buf[byte(data.start)..byte(data.end())];
            storage.read_exact_at(part, data.start).map_err(io)?;
            self.bytes_read += data.len;
            from = data.end();
        }
        self.buf[byte(from)..byte(range.end())].fill(0);
        Ok(from > range.start)
    }

    /// The granules in the buffer, which starts `start` bytes into its block, and whether each is
    /// zero; up to the first that is not, if that is all that matters.
    fn granules(&self, start: u64) -> Vec<(u64, bool)> {
        let zeros = self.buf.chunks(usize_from(GRANULE_SIZE)).map(zero::is_zero);
        let mut found = Vec::with_capacity(usize_from(u64_from(self.buf.len()) / GRANULE_SIZE));
        for (index, is_zero) in (start / GRANULE_SIZE..).zip(zeros) {
            found.push((index, is_zero));
            if !is_zero && !self.whole_blocks {
                break;
            }
        }
        found
    }
}
