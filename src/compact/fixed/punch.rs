//! Makes holes in the host's file where a fixed disk holds nothing.
//!
//! A guest may be at work meanwhile: a block is watched while it is read, and what was written to since is
//! left alone. What the guest's filesystems call free goes only while nobody may write, with the checks
//! of [`super::super::freed`], and only once no child of the disk as it was is accepted any more: see
//! [`crate::image::Image::disown`].

use std::ops::Range;

use super::Turn;
use crate::compact::freed::Freed;
use crate::compact::report::part_reports;
use crate::compact::{CompactError, CompactOptions, CompactReport, Phase};
use crate::disk::{Announcement, Disk, Doubt, Hollow};
use crate::guest::Rest;
use crate::units::BlockIndex;

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
        announcement: Announcement::new(options.no_children && disk.geometry().is_flat),
        given_back: 0,
        report,
    };
    if options.fs_aware {
        work.survey()?;
    }
    let geometry = disk.geometry();
    if geometry.is_flat {
        work.punch_block(BlockIndex::new(0), 0..disk.len())?;
    } else {
        for block in disk.maintenance().blocks() {
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
    /// What was said of free bytes that go.
    announcement: Announcement,
    given_back: u64,
    report: &'a mut CompactReport,
}

impl Work<'_> {
    fn survey(&mut self) -> Result<(), CompactError> {
        self.turn.publish(Phase::Survey, 0, 0);
        let disk = self.disk;
        if disk.has_writers() {
            self.report.not_surveyed = Some("somebody has the disk open for writing".to_owned());
            return Ok(());
        }
        let rest = match self.options.replay_journal {
            true => Rest::Replayed,
            false => Rest::Unmarked,
        };
        let alone = || !disk.has_writers() && self.turn.goes_on();
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
            let stored = (self.disk.maintenance()).next_stored(block, at..range.end)?;
            let Some(stored) = stored else {
                return Ok(());
            };
            at = stored.start;
            let piece = at..range.end.min(at + PIECE);
            if self.punch_piece(block, piece.clone())? {
                at = piece.end;
            }
        }
        Ok(())
    }

    /// Looks at `piece`, and punches; says whether that is done with it.
    fn punch_piece(&mut self, block: BlockIndex, piece: Range<u64>) -> Result<bool, CompactError> {
        if !self.freed_still_holds()? {
            return Ok(false);
        }
        let how = Hollow {
            book: self.freed.as_ref().map(|freed| &freed.book),
            scan: self.options.scan,
            dry_run: self.options.dry_run,
        };
        let hollowed =
            (self.disk.maintenance()).hollow(block, piece, how, &mut self.announcement)?;
        let hollowed = match hollowed {
            Ok(hollowed) => hollowed,
            Err(doubt) => {
                self.disbelieve(doubt.reason());
                return Ok(false);
            }
        };
        self.report.bytes_read += hollowed.read;
        self.report.bytes_punched += hollowed.punched;
        self.given_back += hollowed.given_back;
        self.report.new_identity |=
            !hollowed.free.is_empty() && !self.announcement.keeps_identity();
        hollowed
            .free
            .iter()
            .for_each(|range| self.count_reclaimed(range));
        Ok(true)
    }

    fn count_reclaimed(&mut self, range: &Range<u64>) {
        let Some(freed) = &self.freed else { return };
        for free in freed.book.free().overlapping(range) {
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
        let holds = freed.still_holds(disk, &|| !disk.has_writers() && turn.goes_on());
        let reason = match holds {
            Ok(true) => return Ok(true),
            Ok(false) => "the guest's filesystems changed meanwhile",
            Err(CompactError::Cancelled) if turn.goes_on() => Doubt::WriterCame.reason(),
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
