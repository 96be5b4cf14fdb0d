//! Carries a compaction out, one bounded step at a time. `compact/mod.rs` has the order of writes.
//!
//! # What a step may hold up
//! A step has a [`Budget`]. What a guest can meet of it:
//! * *scan*, *compare*: nobody waits. A piece of a block is read; its gate is taken for as long as noting what
//!   was found takes.
//! * *drop*: at most 16 gates over one commit, which waits for no sync: room in a VHDX's log is made before
//!   ([`crate::image::Image::prepare_commit`]).
//! * *move*: nobody waits for a copy, made in pieces over many steps; beside a guest each piece is written
//!   back, so that a flush of the guest finds one at most. In the end 16 gates, over one commit, of
//!   which only one is waited for.
//! * *punch*: one block's gate, while a number of runs of zeros in it are punched.
//! * *cut*, *clean*: nobody who allocates waits for a sync. What the host stores of the space that is cut off is
//!   punched away before, in pieces.
//!
//! # What a run remembers while guests go on
//! Nothing that it knows from an earlier step is acted on without another look under the gate of the block, or
//! the lock of the space, that it is about: a block that is to be dropped is dead still, one that is to be
//! moved is where it was, its target is free. What is free by the guest's filesystems counts only while nobody
//! has written since. So guests may do anything between two steps. What a run has not come to, or found in
//! a guest's way, the next one looks at: it starts with what is new since, not with the disk
//! ([`Compactor::of_news`]).

mod drop;
mod look;
mod moves;
mod punch;
mod report;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use rangemap::RangeSet;

use super::freed::Freed;
use super::pace::IDLE_STEP;
use super::plan::Move;
use super::report::CompactReport;
use super::{CompactError, CompactOptions, LastWord, Phase, Progress};
use crate::disk::{Announcement, Disk, FreeBook, Relocation, Scanner};
use crate::format::DiskType;
use crate::guest::Rest;
use crate::image::Cut;
use crate::units::{BlockIndex, FileOffset, FileRange, u64_from};

/// What one step may take of the time of a device, and of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Bytes that are read, or copied, about.
    pub(crate) bytes: u64,
    /// Whether a guest may be at the disk: then a step does one thing, and leaves little for a sync to do.
    pub(crate) beside_guest: bool,
}

impl Budget {
    /// Where nobody waits for anything.
    pub(crate) const IDLE: Self = Self {
        bytes: IDLE_STEP,
        beside_guest: false,
    };

    /// Bytes that are given back to the host: that costs a small part of copying them.
    fn given_back(self) -> u64 {
        match self.beside_guest {
            true => self.bytes.saturating_mul(64),
            false => u64::MAX,
        }
    }
}

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    More,
    Done,
}

/// What is known of the host's free space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Enough,
    /// It was full once; the free space of the file was given back to it.
    Made,
    /// It is full: only targets that it stores already can be moved to.
    None,
}

/// The blocks that a run is about.
#[derive(Clone, Debug)]
enum Scope {
    /// Whatever has a slot.
    All,
    /// Those in which something was new.
    Blocks(Vec<BlockIndex>),
}

/// A compaction under way. The caller holds the disk's turn in every step, or is the only one.
#[derive(Debug)]
pub(crate) struct Compactor {
    disk: Arc<Disk>,
    options: CompactOptions,
    /// How sure filesystems must be to be at rest, to be believed.
    rest: Rest,
    phase: Phase,
    /// `None` until the first look.
    scope: Option<Scope>,
    /// Whether the run is about what is new since the last one of that kind, and which is then its to do.
    is_of_news: bool,
    /// What the guest's filesystems call free, while that is believed.
    freed: Option<Freed>,
    /// The blocks that the phase still has to look at; the next one is first.
    queue: VecDeque<BlockIndex>,
    moves: VecDeque<Move>,
    /// The moves that are being made, and whether that is done without a pause.
    batch: Option<Relocation>,
    at_once: bool,
    /// Of blocks of metadata, when no other move is left.
    metadata_moves: VecDeque<(FileRange, FileOffset)>,
    /// Blocks that hold what the parent has, but for what is free: to be dropped, or only counted.
    same: HashSet<BlockIndex>,
    /// How often a move of each block was given up, because a guest was at it.
    given_up: HashMap<BlockIndex, u8>,
    /// Whether the present plan moved anything; if so, another plan may find more.
    moved_since_plan: bool,
    /// How many plans were carried out, and whether another one was left for the next run.
    plans: u32,
    is_cut_short: bool,
    /// Whether the file may be longer than it need be.
    to_cut: bool,
    /// How often the block at the front of the queue was punched in part.
    punched: u32,
    total: u64,
    /// How far the host's lack of room has gone.
    room: Room,
    /// Blocks that could not be moved for that; those of the present plan.
    without_room: u64,
    unplaced: u64,
    /// Whether something was left alone because the guest was at it.
    skipped: bool,
    /// Whether blocks may be moved now, and whether none were planned to because they may not.
    may_move: bool,
    is_held_back: bool,
    report: CompactReport,
    scanner: Scanner,
    /// The block that was compared with the parent last.
    comparing: Option<BlockIndex>,
    /// What the parents' filesystems call free, once it was needed.
    parents_free: Option<RangeSet<u64>>,
    /// What was said of free bytes that go.
    announcement: Announcement,
    last_word: Option<LastWord>,
    /// When that was last asked for.
    asked: Option<Instant>,
    /// Bytes that stay free at the end of the file.
    spare: u64,
    /// Bytes that were copied, for nothing or not.
    copied: u64,
    /// Bytes that the file might be shorter by, if it were not so dear to move what is in the way.
    too_dear: u64,
}

impl Compactor {
    /// # Errors
    /// [`CompactError::Fixed`]; a disk that takes no changes, unless it is a dry run.
    pub(crate) fn new(disk: Arc<Disk>, options: CompactOptions) -> Result<Self, CompactError> {
        if disk.geometry().disk_type == DiskType::Fixed {
            return Err(CompactError::Fixed);
        }
        Self::begin(disk, options)
    }

    /// One that only moves the blocks of a fixed disk together, and cuts the file.
    ///
    /// # Errors
    /// Where the disk takes no changes.
    pub(super) fn of_fixed(disk: Arc<Disk>) -> Result<Self, CompactError> {
        let options = CompactOptions {
            scan: false,
            drop_identical: false,
            ..CompactOptions::default()
        };
        Self::begin(disk, options)
    }

    fn begin(disk: Arc<Disk>, options: CompactOptions) -> Result<Self, CompactError> {
        if !options.dry_run {
            disk.maintenance().check_writable()?;
        }
        let (length_before, allocated_before) = disk.size_at_open();
        Ok(Self {
            disk,
            options,
            rest: match options.replay_journal {
                true => Rest::Replayed,
                false => Rest::Unmarked,
            },
            phase: Phase::Survey,
            scope: None,
            is_of_news: false,
            freed: None,
            queue: VecDeque::new(),
            moves: VecDeque::new(),
            batch: None,
            at_once: false,
            metadata_moves: VecDeque::new(),
            same: HashSet::new(),
            given_up: HashMap::new(),
            moved_since_plan: false,
            plans: 0,
            is_cut_short: false,
            to_cut: false,
            punched: 0,
            spare: 0,
            copied: 0,
            too_dear: 0,
            total: 0,
            room: Room::Enough,
            without_room: 0,
            unplaced: 0,
            skipped: false,
            may_move: true,
            is_held_back: false,
            report: CompactReport {
                length_before,
                allocated_before,
                ..CompactReport::default()
            },
            scanner: Scanner::new(options.punch_holes),
            comparing: None,
            parents_free: None,
            announcement: Announcement::default(),
            last_word: None,
            asked: None,
        })
    }

    /// Believes only filesystems that would say on the disk that they are mounted.
    pub(crate) fn cautious(mut self) -> Self {
        self.rest = Rest::Unmounted;
        self
    }

    /// Looks only at what is new since the last run of that kind, of which there is one at a time: in the
    /// background. What it does not come to is new for the next one. Its report does not explain what stays.
    pub(crate) fn of_news(mut self) -> Self {
        self.is_of_news = true;
        self
    }

    /// Asks once more before anything goes that is free.
    pub(crate) fn asking(mut self, last_word: Option<LastWord>) -> Self {
        self.last_word = last_word;
        self
    }

    /// Leaves `spare` bytes free at the end of the file from now on, for a guest that allocates.
    pub(crate) fn keep_ahead(&mut self, spare: u64) {
        self.spare = spare;
    }

    /// Has blocks moved, or none, from the next plan on.
    pub(crate) fn allow_moves(&mut self, may_move: bool) {
        self.may_move = may_move;
    }

    /// Whether no moves were planned because they were not allowed.
    pub(crate) fn is_held_back(&self) -> bool {
        self.is_held_back
    }

    /// Bytes that were read and copied so far.
    pub(crate) fn bytes_done(&self) -> u64 {
        self.scanner.bytes_read + self.copied
    }

    /// Bytes that were copied so far, for nothing or not, and bytes that were cut off the file.
    pub(crate) fn bytes_moved(&self) -> (u64, u64) {
        (self.copied, self.report.bytes_cut)
    }

    /// Reports sizes as of now instead of as of the disk's opening.
    pub(crate) fn measured_from_now(mut self) -> Result<Self, CompactError> {
        self.report.length_before = self.disk.file_len();
        self.report.allocated_before = self.disk.allocated_bytes()?;
        Ok(self)
    }

    pub(crate) fn progress(&self) -> Progress {
        let moves = self.moves.len() + self.metadata_moves.len();
        let left = u64_from(self.queue.len().max(moves));
        let left = left * self.disk.geometry().block_size;
        let total = self.total.max(left);
        Progress {
            phase: self.phase,
            completed: total - left,
            total,
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether another run may find more though the disk has not changed.
    pub(crate) fn has_skipped(&self) -> bool {
        self.skipped
    }

    /// Whether moves were left for the next run, which may begin soon.
    pub(crate) fn is_cut_short(&self) -> bool {
        self.is_cut_short
    }

    /// Blocks that could not be moved because the host is full.
    pub(crate) fn without_room(&self) -> u64 {
        self.without_room
    }

    /// Does a bounded piece of work. `go_on` is asked between its parts; where it says no, the step
    /// ends early, and nothing is lost but that part.
    ///
    /// # Errors
    /// The disk's. What was reserved is given back.
    pub(crate) fn step(
        &mut self,
        budget: Budget,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Step, CompactError> {
        if self.to_cut {
            let cut = Cut {
                spare: self.spare,
                most: budget.given_back(),
            };
            let before = self.disk.file_len();
            let more = self.disk.maintenance().cut(cut);
            // Not what the guest made it grow meanwhile.
            self.report.bytes_cut += before.saturating_sub(self.disk.file_len());
            self.to_cut = more?;
        } else {
            match self.phase {
                Phase::Survey => self.survey_step(go_on)?,
                Phase::Scan => self.scan_step(budget, go_on)?,
                Phase::Drop => self.drop_step(go_on)?,
                Phase::Move => self.move_step(budget, go_on)?,
                Phase::Punch => self.punch_step(budget, go_on)?,
                Phase::Done => {}
            }
        }
        Ok(if self.phase == Phase::Done && !self.to_cut {
            Step::Done
        } else {
            Step::More
        })
    }

    fn enter(&mut self, phase: Phase, queue: VecDeque<BlockIndex>) {
        self.phase = phase;
        self.total = u64_from(queue.len()) * self.disk.geometry().block_size;
        self.queue = queue;
    }

    /// What counts as zero though it is not.
    fn book(&self) -> Option<&FreeBook> {
        self.freed.as_ref().map(|freed| &freed.book)
    }

    /// The blocks that the run is about, as far as they have a slot, with it.
    fn blocks(&self) -> Box<dyn Iterator<Item = (BlockIndex, FileOffset)> + '_> {
        let disk = self.disk.maintenance();
        match &self.scope {
            Some(Scope::Blocks(blocks)) => {
                let present =
                    (blocks.iter()).filter_map(move |block| Some((*block, disk.slot_of(*block)?)));
                Box::new(present)
            }
            Some(Scope::All) | None => Box::new(disk.slots()),
        }
    }

    /// The blocks that the run is about and with which there is something to be done, by what is known now.
    fn unfinished(&self) -> Vec<BlockIndex> {
        let disk = self.disk.maintenance();
        let is_unfinished = |block: BlockIndex, slot: FileOffset| {
            self.is_dead(block)
                || self.scanner.wants(&self.disk, self.book(), block)
                || self.punches() && disk.is_worth_punching(block, slot, self.book())
        };
        let blocks = self
            .blocks()
            .filter(|(block, slot)| is_unfinished(*block, *slot));
        blocks.map(|(block, _)| block).collect()
    }
}

impl Drop for Compactor {
    /// What was not come to is new for the next run.
    fn drop(&mut self) {
        if !self.is_of_news || self.phase == Phase::Done {
            return;
        }
        let disk = self.disk.maintenance();
        match &self.scope {
            Some(Scope::Blocks(blocks)) => blocks.iter().for_each(|block| disk.note_news(*block)),
            Some(Scope::All) => disk.note_all_news(),
            None => {}
        }
    }
}
