//! Makes holes in the host's file where a fixed disk holds nothing.
//!
//! A guest may be at work meanwhile: a block is watched while it is read, and what was written to since is
//! left alone. What the guest's filesystems call free goes only while nobody may write, with the checks
//! of [`super::super::freed`], and only once no child of the disk as it was is accepted any more: see
//! [`crate::image::Image::disown`].

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Turn;
use crate::compact::freed::Freed;
use crate::compact::report::part_reports;
use crate::compact::{CompactError, CompactOptions, CompactReport, Phase};
use crate::disk::{Disk, zero};
use crate::error::DiskError;
use crate::guest::Rest;
use crate::units::{
    BlockIndex, FileOffset, FileRange, GRANULE_SIZE, round_down, u64_from, usize_from,
};

/// Bytes that are looked at together.
const PIECE: u64 = 1 << 20;

/// Punches, and says how many bytes the host stored there, or of a dry run stores. They are durable with
/// the next sync.
///
/// # Errors
/// As [`crate::compact::Operation::wait`].
pub(super) fn punch(
    disk: &Disk,
    options: CompactOptions,
    turn: &Turn<'_>,
    report: &mut CompactReport,
) -> Result<u64, CompactError> {
    let mut work = Work {
        disk,
        options,
        turn,
        freed: None,
        is_announced: false,
        given_back: 0,
        report,
        buf: Vec::new(),
    };
    if options.fs_aware {
        work.survey()?;
    }
    let geometry = disk.geometry();
    if geometry.is_flat {
        work.punch_block(BlockIndex::new(0), 0..disk.len())?;
    } else {
        for block in disk.image.map().blocks() {
            let start = disk.offset_of(block);
            let end = (start + geometry.block_size).min(disk.len());
            work.punch_block(block, start..end)?;
        }
    }
    Ok(work.given_back)
}

struct Work<'a> {
    disk: &'a Disk,
    options: CompactOptions,
    turn: &'a Turn<'a>,
    /// What the guest's filesystems call free, while that is believed.
    freed: Option<Freed>,
    /// Whether it was said, durably, that free bytes go.
    is_announced: bool,
    given_back: u64,
    report: &'a mut CompactReport,
    buf: Vec<u8>,
}

/// A part of the disk that the host need not store.
struct Unused {
    /// In disk offsets.
    range: Range<u64>,
    /// Whether it holds something else than zeros, that the guest's filesystems call free.
    is_free: bool,
}

impl Work<'_> {
    fn survey(&mut self) -> Result<(), CompactError> {
        self.turn.publish(Phase::Survey, 0, 0);
        let disk = self.disk;
        if !disk.writers.none() {
            self.report.not_surveyed = Some("somebody has the disk open for writing".to_owned());
            return Ok(());
        }
        let rest = match self.options.replay_journal {
            true => Rest::Replayed,
            false => Rest::Unmarked,
        };
        let alone = || disk.writers.none() && self.turn.goes_on();
        let freed = Freed::find(disk, self.options.free_swap, rest, &alone)?;
        self.report.bytes_read += freed.survey().evidence.bytes();
        self.report.parts = part_reports(freed.survey());
        self.freed = Some(freed);
        Ok(())
    }

    /// Punches what `range` of the disk holds, all of it in `block`.
    fn punch_block(&mut self, block: BlockIndex, range: Range<u64>) -> Result<(), CompactError> {
        let mut at = range.start;
        while at < range.end {
            self.turn.publish(Phase::Punch, at, self.disk.len());
            self.turn.go_on()?;
            let Some(stored) = self.next_stored(block, at..range.end)? else {
                return Ok(());
            };
            at = round_down(stored.start, GRANULE_SIZE).max(at);
            let piece = at..range.end.min(at + PIECE);
            if self.punch_piece(block, piece.clone())? {
                at = piece.end;
            }
        }
        Ok(())
    }

    /// Where `offset`, in `block`, lies in the file; `None` where the block has no place.
    fn place_of(&self, block: BlockIndex, offset: u64) -> Option<FileOffset> {
        if self.disk.geometry().is_flat {
            return Some(FileOffset::new(offset));
        }
        let slot = self.disk.image.map().get(block).slot()?;
        let data = self.disk.geometry().data_at(slot);
        Some(data.plus(offset - self.disk.offset_of(block)))
    }

    /// The first part of `range` that the host stores.
    fn next_stored(
        &self,
        block: BlockIndex,
        range: Range<u64>,
    ) -> Result<Option<Range<u64>>, DiskError> {
        let Some(place) = self.place_of(block, range.start) else {
            return Ok(None);
        };
        let end = place.plus(range.end - range.start);
        let data = self.disk.image.storage().next_data(place, end);
        let data = data.map_err(|error| DiskError::io("look for holes in the file", error))?;
        Ok(data.map(|data| {
            let start = range.start + data.start.since(place);
            start..start + data.len
        }))
    }

    /// Looks at `piece`, and punches; says whether that is done with it.
    fn punch_piece(&mut self, block: BlockIndex, piece: Range<u64>) -> Result<bool, CompactError> {
        if !self.freed_still_holds()? {
            return Ok(false);
        }
        let disk = self.disk;
        let watch = disk.gates.watch(block);
        let unused = self.look(piece)?;
        if unused.is_empty() {
            return Ok(true);
        }
        let alone = self.freed.as_ref().map(|_| disk.writers.keep_out());
        if alone.as_ref().is_some_and(Option::is_none) {
            self.disbelieve("somebody opened the disk for writing");
            return Ok(false);
        }
        let _gate = disk.gates.exclusive(block);
        // Asked under the gate: a write that comes later waits for it.
        if watch.is_touched() {
            return Ok(true);
        }
        if (self.freed.as_ref()).is_some_and(|freed| !freed.is_untouched(disk)) {
            self.disbelieve("the disk was written to meanwhile");
            return Ok(false);
        }
        for part in unused {
            self.punch_part(block, &part)?;
        }
        Ok(true)
    }

    /// What of `piece` the host need not store. Nobody is kept from changing it.
    fn look(&mut self, piece: Range<u64>) -> Result<Vec<Unused>, DiskError> {
        let overlaps = |freed: &Freed| freed.free.overlaps(&piece);
        if !self.options.scan && !self.freed.as_ref().is_some_and(overlaps) {
            return Ok(Vec::new());
        }
        self.buf.resize(usize_from(piece.end - piece.start), 0);
        self.disk.read_quietly(&mut self.buf, piece.start)?;
        self.report.bytes_read += piece.end - piece.start;
        let mut without_free = self.buf.clone();
        for free in self
            .freed
            .iter()
            .flat_map(|freed| freed.free.overlapping(&piece))
        {
            let (start, end) = (free.start.max(piece.start), free.end.min(piece.end));
            let part = usize_from(start - piece.start)..usize_from(end - piece.start);
            without_free[part].fill(0);
        }
        let zeros = zero::runs(&without_free, 0).filter(|run| run.zero);
        let unused = zeros.map(|run| {
            let start = piece.start + u64_from(run.start);
            Unused {
                range: start..start + u64_from(run.len),
                is_free: !zero::is_zero(&self.buf[run.start..run.start + run.len]),
            }
        });
        Ok(unused.collect())
    }

    /// Gives the host what it stores of a part, or counts it in a dry run. The gate is held.
    fn punch_part(&mut self, block: BlockIndex, part: &Unused) -> Result<(), DiskError> {
        let range = part.range.clone();
        let Some(place) = self.place_of(block, range.start) else {
            return Ok(());
        };
        let mut stored = 0;
        let mut at = range.start;
        while let Some(data) = self.next_stored(block, at..range.end)? {
            stored += data.end - data.start;
            at = data.end;
        }
        if stored == 0 {
            return Ok(());
        }
        if part.is_free {
            self.count_reclaimed(&range);
            self.announce()?;
        }
        self.given_back += stored;
        if self.options.dry_run {
            return Ok(());
        }
        let image = &*self.disk.image;
        let hole = FileRange::new(place, range.end - range.start);
        (image.storage().punch_hole(hole))
            .map_err(|error| DiskError::io("punch a hole in the file", error))?;
        image.note_payload();
        self.report.bytes_punched += hole.len;
        Ok(())
    }

    /// Has, once, all know that free bytes go: caches above the disk, and, by its identity, disks over it.
    fn announce(&mut self) -> Result<(), DiskError> {
        let is_vouched_for = self.options.no_children;
        if self.is_announced {
            return Ok(());
        }
        self.is_announced = true;
        self.report.new_identity = !is_vouched_for || !self.disk.geometry().is_flat;
        if self.options.dry_run {
            return Ok(());
        }
        if self.report.new_identity {
            self.disk.image.disown()?;
        }
        self.disk.gave_up_free.store(true, Ordering::Release);
        Ok(())
    }

    fn count_reclaimed(&mut self, range: &Range<u64>) {
        let Some(freed) = &self.freed else { return };
        for free in freed.free.overlapping(range) {
            let free = free.start.max(range.start)..free.end.min(range.end);
            for part in self.report.parts.iter_mut() {
                if part.skipped.is_none() {
                    part.reclaimed += part.overlap(&free);
                }
            }
        }
    }

    /// Looks once more at what the guest's filesystems said; what does not hold is given up.
    fn freed_still_holds(&mut self) -> Result<bool, CompactError> {
        let Some(freed) = &mut self.freed else {
            return Ok(true);
        };
        let (disk, turn) = (self.disk, self.turn);
        let holds = freed.still_holds(disk, &|| disk.writers.none() && turn.goes_on());
        let reason = match holds {
            Ok(true) => return Ok(true),
            Ok(false) => "the guest's filesystems changed meanwhile",
            Err(CompactError::Cancelled) if turn.goes_on() => {
                "somebody opened the disk for writing"
            }
            Err(error) => return Err(error),
        };
        self.disbelieve(reason);
        Ok(false)
    }

    fn disbelieve(&mut self, reason: &str) {
        log::debug!("{}: {reason}", self.disk.path().display());
        self.freed = None;
        self.report.not_surveyed = Some(reason.to_owned());
    }
}
