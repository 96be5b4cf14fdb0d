//! What is done to fixed disks: blocks without a place get one, and what need not be stored becomes holes.

use std::ops::Range;

use super::{Announcement, Doubt, FreeBook, Maintenance};
use crate::disk::{Disk, zero};
use crate::error::DiskError;
use crate::image::MapEdit;
use crate::storage::zero_stored;
use crate::units::{
    BlockIndex, FileOffset, FileRange, GRANULE_SIZE, round_down, u64_from, usize_from,
};

impl Maintenance<'_> {
    /// Gives each of the `wanted` blocks its place, where that is free and it has none. The places read as
    /// zeros, durably, before the block table names them.
    ///
    /// # Errors
    /// The image's; places that no block got are free again.
    pub(crate) fn place_blocks(self, wanted: &[(BlockIndex, FileOffset)]) -> Result<(), DiskError> {
        let mut taken = Vec::new();
        let prepared = self.prepare_places(wanted, &mut taken);
        if let Err(error) = prepared {
            (taken.iter()).for_each(|(_, at)| self.disk.image.give_back(*at));
            return Err(error);
        }
        let mut taken = taken.into_iter();
        let placed = (taken.by_ref()).try_for_each(|(block, slot)| self.place(block, slot));
        // What it has not come to. What it did not commit, it has given back itself.
        taken.for_each(|(_, at)| self.disk.image.give_back(at));
        placed
    }

    /// Takes the places that are free still, and makes them read as zeros, durably.
    fn prepare_places(
        self,
        wanted: &[(BlockIndex, FileOffset)],
        taken: &mut Vec<(BlockIndex, FileOffset)>,
    ) -> Result<(), DiskError> {
        let disk = self.disk;
        for (block, slot) in wanted {
            let Some(reserved) = disk.image.reserve_at(*slot) else {
                continue;
            };
            taken.push((*block, *slot));
            if !reserved.clean {
                let range = disk.geometry().slot_range(*slot);
                zero_stored(&**disk.image.storage(), range)
                    .map_err(|error| DiskError::io("clean free space", error))?;
            }
        }
        disk.image.note_payload();
        disk.image.sync()
    }

    /// Gives a block its place, unless a guest was faster.
    fn place(self, block: BlockIndex, slot: FileOffset) -> Result<(), DiskError> {
        let disk = self.disk;
        let _gate = disk.gates.exclusive(block);
        if disk.image.map().get(block).slot().is_some() {
            disk.image.give_back(slot);
            return Ok(());
        }
        disk.tracker.set_fresh(block);
        disk.image.commit(&[MapEdit::Place {
            block,
            slot,
            sectors: None,
        }])
    }
}

/// A part of the disk that the host need not store.
struct Unused {
    /// In disk offsets.
    range: Range<u64>,
    /// Whether it holds something else than zeros, that the guest's filesystems call free.
    is_free: bool,
}

/// How to look for what a fixed disk need not have stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hollow<'a> {
    /// What may be lost though it is not zero.
    pub(crate) book: Option<&'a FreeBook>,
    /// Look for zeros, too.
    pub(crate) scan: bool,
    /// Change nothing.
    pub(crate) dry_run: bool,
}

/// What a look at a piece of a fixed disk came to.
#[derive(Debug, Default)]
pub(crate) struct Hollowed {
    /// Bytes that were read.
    pub(crate) read: u64,
    /// Bytes of the holes that were made.
    pub(crate) punched: u64,
    /// Bytes that the host stored there.
    pub(crate) given_back: u64,
    /// What was free and not zero of it, in disk offsets.
    pub(crate) free: Vec<Range<u64>>,
}

impl Maintenance<'_> {
    /// The first part of `range` of the disk, all of it in `block`, that the host stores, and the granule
    /// that it starts in; `None` where there is nothing.
    ///
    /// # Errors
    /// Where the host cannot tell.
    pub(crate) fn next_stored(
        self,
        block: BlockIndex,
        range: Range<u64>,
    ) -> Result<Option<Range<u64>>, DiskError> {
        let stored = stored_part(self.disk, block, range.clone())?;
        Ok(stored.map(|part| round_down(part.start, GRANULE_SIZE).max(range.start)..part.end))
    }

    /// Punches what the host need not store of `piece` of the disk, all of it in `block`; of a dry run, only
    /// counts it. What a guest writes to meanwhile is left alone.
    ///
    /// # Errors
    /// Where the host cannot read or punch. With a [`Doubt`], nothing has changed.
    pub(crate) fn hollow(
        self,
        block: BlockIndex,
        piece: Range<u64>,
        how: Hollow<'_>,
        announcement: &mut Announcement,
    ) -> Result<Result<Hollowed, Doubt>, DiskError> {
        let disk = self.disk;
        let mut done = Hollowed::default();
        let watch = disk.gates.watch(block);
        let unused = look(disk, piece, how, &mut done)?;
        if unused.is_empty() {
            return Ok(Ok(done));
        }
        let alone = how.book.map(|_| disk.writers.keep_out());
        if alone.as_ref().is_some_and(Option::is_none) {
            return Ok(Err(Doubt::WriterCame));
        }
        let _gate = disk.gates.exclusive(block);
        // Asked under the gate: a write that comes later waits for it.
        if watch.is_touched() {
            return Ok(Ok(done));
        }
        if how.book.is_some_and(|book| !book.is_untouched(disk)) {
            return Ok(Err(Doubt::Written));
        }
        let _change = disk.gates.change(block);
        for part in unused {
            punch_part(disk, block, part, how, &mut done, announcement)?;
        }
        Ok(Ok(done))
    }
}

/// Where `offset`, in `block`, lies in the file; `None` where the block has no place.
fn place_of(disk: &Disk, block: BlockIndex, offset: u64) -> Option<FileOffset> {
    if disk.geometry().is_flat {
        return Some(FileOffset::new(offset));
    }
    let slot = disk.image.map().get(block).slot()?;
    let data = disk.geometry().data_at(slot);
    Some(data.plus(offset - disk.offset_of(block)))
}

/// The first part of `range` that the host stores.
fn stored_part(
    disk: &Disk,
    block: BlockIndex,
    range: Range<u64>,
) -> Result<Option<Range<u64>>, DiskError> {
    let Some(place) = place_of(disk, block, range.start) else {
        return Ok(None);
    };
    let end = place.plus(range.end - range.start);
    let data = disk.image.storage().next_data(place, end);
    let data = data.map_err(|error| DiskError::io("look for holes in the file", error))?;
    Ok(data.map(|data| {
        let start = range.start + data.start.since(place);
        start..start + data.len
    }))
}

/// What of `piece` the host need not store. Nobody is kept from changing it.
fn look(
    disk: &Disk,
    piece: Range<u64>,
    how: Hollow<'_>,
    done: &mut Hollowed,
) -> Result<Vec<Unused>, DiskError> {
    let overlaps = |book: &FreeBook| book.free().overlaps(&piece);
    if !how.scan && !how.book.is_some_and(overlaps) {
        return Ok(Vec::new());
    }
    let mut buf = vec![0; usize_from(piece.end - piece.start)];
    disk.read_quietly(&mut buf, piece.start)?;
    done.read += piece.end - piece.start;
    let mut without_free = buf.clone();
    for free in (how.book.iter()).flat_map(|book| book.free().overlapping(&piece)) {
        let (start, end) = (free.start.max(piece.start), free.end.min(piece.end));
        let part = usize_from(start - piece.start)..usize_from(end - piece.start);
        without_free[part].fill(0);
    }
    let zeros = zero::runs(&without_free, 0).filter(|run| run.zero);
    let unused = zeros.map(|run| {
        let start = piece.start + u64_from(run.start);
        Unused {
            range: start..start + u64_from(run.len),
            is_free: !zero::is_zero(&buf[run.start..run.start + run.len]),
        }
    });
    Ok(unused.collect())
}

/// Gives the host what it stores of a part, or counts it in a dry run. The gate is held.
fn punch_part(
    disk: &Disk,
    block: BlockIndex,
    part: Unused,
    how: Hollow<'_>,
    done: &mut Hollowed,
    announcement: &mut Announcement,
) -> Result<(), DiskError> {
    let range = part.range;
    let Some(place) = place_of(disk, block, range.start) else {
        return Ok(());
    };
    let mut stored = 0;
    let mut at = range.start;
    while let Some(data) = stored_part(disk, block, at..range.end)? {
        stored += data.end - data.start;
        at = data.end;
    }
    if stored == 0 {
        return Ok(());
    }
    let hole = FileRange::new(place, range.end - range.start);
    if part.is_free {
        done.free.push(range);
    }
    done.given_back += stored;
    if how.dry_run {
        return Ok(());
    }
    if part.is_free {
        announcement.make(disk)?;
    }
    (disk.image.storage().punch_hole(hole))
        .map_err(|error| DiskError::io("punch a hole in the file", error))?;
    disk.image.note_payload();
    done.punched += hole.len;
    Ok(())
}
