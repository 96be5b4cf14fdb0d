//! Carries a compaction out, one bounded step at a time. `compact/mod.rs` has the order of writes.

mod drop;
mod punch;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use rangemap::RangeSet;

use super::freed::{Freed, free_in_parents};
use super::plan::{Move, Plan, plan, without};
use super::report::{CompactReport, part_reports, stored_in_free_space};
use super::{CompactError, CompactOptions, LastWord, Phase, Progress};
use crate::disk::{
    Added, Announcement, Comparison, Disk, FreeBook, Relocation, Scanned, Scanner, drop_if_same,
};
use crate::error::DiskError;
use crate::format::{DiskType, Format};
use crate::guest::Rest;
use crate::image::Frame;
use crate::units::{BlockIndex, FileOffset, FileRange, u64_from};

/// Bytes that a step scans at most.
const SCAN_STEP: u64 = 1 << 20;
/// Bytes of slots that a batch of moves copies at most; at least one slot.
const MOVE_BATCH: u64 = 32 << 20;
/// Bytes that are copied between two looks whether to go on.
const COPY_PIECE: u64 = 4 << 20;

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

/// A compaction under way. The caller holds the disk's `compacting` lock, or is the only one.
#[derive(Debug)]
pub(crate) struct Compactor {
    disk: Arc<Disk>,
    options: CompactOptions,
    /// How sure filesystems must be to be at rest, to be believed.
    rest: Rest,
    phase: Phase,
    /// What the guest's filesystems call free, while that is believed.
    freed: Option<Freed>,
    /// The blocks that the phase still has to look at; the next one is first.
    queue: VecDeque<BlockIndex>,
    moves: VecDeque<Move>,
    /// Of blocks of metadata, when no other move is left.
    metadata_moves: VecDeque<(FileRange, FileOffset)>,
    /// Blocks that hold what the parent has, but for what is free: to be dropped, or only counted.
    same: HashSet<BlockIndex>,
    /// Blocks without a slot that keep one for themselves, to be given up.
    kept: HashSet<BlockIndex>,
    /// Whether the present plan moved anything; if so, another plan may find more.
    moved_since_plan: bool,
    total: u64,
    /// How far the host's lack of room has gone.
    room: Room,
    /// Blocks that could not be moved for that.
    without_room: u64,
    /// Whether something was left alone because the guest was at it.
    skipped: bool,
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
    /// Bytes that the step goes through at most.
    budget: u64,
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
        let mut compactor = Self {
            disk,
            options,
            rest: match options.replay_journal {
                true => Rest::Replayed,
                false => Rest::Unmarked,
            },
            phase: Phase::Survey,
            freed: None,
            queue: VecDeque::new(),
            moves: VecDeque::new(),
            metadata_moves: VecDeque::new(),
            same: HashSet::new(),
            kept: HashSet::new(),
            moved_since_plan: false,
            total: 0,
            room: Room::Enough,
            without_room: 0,
            skipped: false,
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
            spare: 0,
            budget: 0,
        };
        if !options.fs_aware {
            compactor.begin_scan();
        }
        Ok(compactor)
    }

    /// Believes only filesystems that would say on the disk that they are mounted.
    pub(crate) fn cautious(mut self) -> Self {
        self.rest = Rest::Unmounted;
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

    /// Bytes that were read and copied so far.
    pub(crate) fn bytes_done(&self) -> u64 {
        self.scanner.bytes_read + self.report.bytes_moved
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
        budget: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Step, CompactError> {
        self.budget = budget;
        match self.phase {
            Phase::Survey => self.survey_step(go_on)?,
            Phase::Scan => self.scan_step(go_on)?,
            Phase::Drop => self.drop_step(go_on)?,
            Phase::Move => self.move_step(go_on)?,
            Phase::Punch => self.punch_step(go_on)?,
            Phase::Done => {}
        }
        Ok(if self.phase == Phase::Done {
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

    // ---- survey

    fn survey_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        let alone = || !self.disk.has_writers() && go_on();
        if self.disk.has_writers() {
            self.report.not_surveyed = Some("somebody has the disk open for writing".to_owned());
        } else {
            let freed = Freed::find(&self.disk, self.options.free_swap, self.rest, &alone)?;
            self.report.bytes_read += freed.survey().evidence.bytes();
            self.report.parts = part_reports(freed.survey());
            self.freed = Some(freed);
        }
        self.begin_scan();
        Ok(())
    }

    /// What counts as zero though it is not.
    fn book(&self) -> Option<&FreeBook> {
        self.freed.as_ref().map(|freed| &freed.book)
    }

    fn begin_scan(&mut self) {
        let queue = if self.options.scan {
            self.to_scan()
        } else {
            VecDeque::new()
        };
        self.enter(Phase::Scan, queue);
    }

    /// The blocks of which a scan would find out something that matters, in order of their places,
    /// so that the host reads ahead.
    fn to_scan(&self) -> VecDeque<BlockIndex> {
        self.slots()
            .into_iter()
            .map(|(_, block)| block)
            .filter(|block| self.compares() || self.scanner.wants(&self.disk, self.book(), *block))
            .collect()
    }

    /// Whether blocks are compared with what the parent has.
    fn compares(&self) -> bool {
        self.options.drop_identical && self.disk.parent().is_some()
    }

    fn slots(&self) -> Vec<(FileOffset, BlockIndex)> {
        let present = self.disk.maintenance().slots();
        let mut slots: Vec<_> = present.map(|(block, slot)| (slot, block)).collect();
        slots.sort_unstable();
        slots
    }

    /// The blocks with a slot that they need not have.
    fn dead(&self) -> impl Iterator<Item = BlockIndex> + '_ {
        let present = self.disk.maintenance().slots().map(|(block, _)| block);
        present.filter(|block| {
            self.same.contains(block)
                || (self.disk.maintenance().reads_without(*block, self.book())).is_some()
        })
    }

    /// What is left to do now, as known.
    pub(crate) fn plan(&self) -> Plan {
        let dead: HashSet<BlockIndex> = self.dead().collect();
        let live = without(&self.slots(), &dead);
        let frame = self.frame(&dead);
        let shape = self.disk.geometry().slot;
        if self.options.move_blocks {
            plan(&live, &frame, shape)
        } else {
            let ends = live
                .last()
                .map(|(start, _)| start.plus(shape.len))
                .into_iter();
            let ends = ends.chain(frame.pinned.iter().map(|range| range.end()));
            let ends = ends.chain(frame.movable.iter().map(|range| range.end()));
            Plan {
                moves: Vec::new(),
                metadata_moves: Vec::new(),
                end: ends.fold(frame.start, FileOffset::max),
            }
        }
    }

    /// What the file's end depends on, once `dead` blocks are gone.
    fn frame(&self, dead: &HashSet<BlockIndex>) -> Frame {
        self.disk
            .maintenance()
            .frame(&|block| dead.contains(&block))
    }

    /// Bytes that the file's length, and the host's storage inside blocks, would lose now.
    pub(crate) fn reclaimable(&self) -> u64 {
        let planned = self.plan();
        let planned = planned.file_len(&self.disk.maintenance().frame(&|_| false));
        let inside = if self.punches() {
            self.disk.maintenance().zeros_inside(self.book())
        } else {
            0
        };
        (self.disk.file_len())
            .saturating_sub(planned.saturating_add(self.spare))
            .saturating_add(inside)
    }

    // ---- scan

    fn scan_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        let mut left = SCAN_STEP.min(self.budget);
        while let Some(block) = self.queue.front().copied() {
            if left == 0 {
                return Ok(());
            }
            if self.compares() && !self.compared(block, &mut left, go_on)? {
                self.queue.pop_front();
                continue;
            }
            let book = self.freed.as_ref().map(|freed| &freed.book);
            let scanned = if self.scanner.wants(&self.disk, book, block) {
                self.scanner.scan(&self.disk, book, block, left)?
            } else {
                Scanned::Nothing
            };
            match scanned {
                Scanned::Bytes(bytes) => left = left.saturating_sub(bytes),
                Scanned::Nothing => {
                    self.queue.pop_front();
                    self.comparing = None;
                }
            }
        }
        if self.options.dry_run {
            self.phase = Phase::Done;
        } else {
            let kept = self.disk.maintenance().kept_for();
            self.kept = kept.into_iter().map(|(_, block)| block).collect();
            let dead = self.dead().chain(self.kept.iter().copied()).collect();
            self.enter(Phase::Drop, dead);
        }
        Ok(())
    }

    /// Compares a block with the parent, once; says whether it stays.
    fn compared(
        &mut self,
        block: BlockIndex,
        left: &mut u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<bool, CompactError> {
        if self.comparing == Some(block) {
            return Ok(true);
        }
        let parents_free = match self.parents_free.take() {
            Some(known) => known,
            None => free_in_parents(&self.disk, go_on)?,
        };
        let parents_free = self.parents_free.insert(parents_free);
        self.comparing = Some(block);
        let before = self.scanner.bytes_read;
        let how = Comparison {
            book: self.freed.as_ref().map(|freed| &freed.book),
            parents_free,
            dry_run: self.options.dry_run,
            go_on,
        };
        let same = drop_if_same(&self.disk, block, how, &mut self.scanner.bytes_read)?;
        *left = left.saturating_sub(self.scanner.bytes_read - before);
        if same && self.freed.is_none() && !self.options.dry_run {
            // Gone already; what a guest puts there from now on is its own again.
            self.report.blocks_dropped += 1;
        } else if same {
            self.same.insert(block);
        }
        Ok(!same)
    }

    // ---- move

    fn plan_moves(&mut self) -> Result<(), CompactError> {
        let plan = self.plan();
        let moves: VecDeque<Move> = plan.moves.into();
        self.metadata_moves = plan.metadata_moves.into();
        if moves.is_empty() && self.metadata_moves.is_empty() {
            self.disk.maintenance().sync()?;
            self.disk.maintenance().cut(self.spare)?;
            let queue = if self.punches() {
                self.to_punch()
            } else {
                VecDeque::new()
            };
            self.enter(Phase::Punch, queue);
        } else {
            self.enter(Phase::Move, VecDeque::new());
            self.total = u64_from(moves.len()) * self.disk.geometry().block_size;
        }
        self.moves = moves;
        self.moved_since_plan = false;
        Ok(())
    }

    fn move_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        if let (None, Some((from, to))) = (self.moves.front(), self.metadata_moves.pop_front()) {
            self.moved_since_plan |= self.disk.maintenance().move_metadata(from, to)?;
            return Ok(());
        }
        if self.moves.is_empty() {
            if self.moved_since_plan {
                return self.plan_moves();
            }
            // Every move of the plan was in a guest's way, or needed space: not now.
            self.skipped = true;
            if self.room == Room::None {
                self.without_room = u64_from(self.plan().moves.len());
            }
            self.disk.maintenance().cut(self.spare)?;
            self.enter(Phase::Punch, VecDeque::new());
            return Ok(());
        }
        let mut batch = self.take_batch();
        while go_on() && batch.advance(COPY_PIECE) {}
        let takes_space = batch.takes_space();
        let (moved, concluded) = batch.conclude();
        self.report.blocks_moved += moved.blocks;
        self.report.bytes_moved += moved.blocks * self.disk.geometry().slot.len;
        self.moved_since_plan |= moved.blocks > 0;
        let disk = Arc::clone(&self.disk);
        match concluded {
            Err(DiskError::NoSpace(_)) if self.room != Room::None => {
                let made = self.room == Room::Enough && disk.maintenance().make_room()?;
                self.room = if made { Room::Made } else { Room::None };
                return self.plan_moves();
            }
            other => other?,
        }
        if takes_space {
            disk.maintenance().cut(self.spare)?;
        }
        Ok(())
    }

    /// Takes the targets of the next moves. One of them may take new host space.
    fn take_batch(&mut self) -> Relocation {
        let slot_len = self.disk.geometry().slot.len;
        let mut batch = Relocation::new(Arc::clone(&self.disk));
        while let Some(step) = self.moves.front().copied() {
            if !batch.is_empty() && batch.bytes() + slot_len > MOVE_BATCH {
                break;
            }
            let may_take_space = self.room != Room::None && !batch.takes_space();
            match batch.add(step, may_take_space) {
                Added::Taken | Added::Stale => {}
                Added::TakesSpace if self.room == Room::None => {}
                Added::TakesSpace | Added::Full => break,
            }
            self.moves.pop_front();
        }
        batch
    }

    /// What was done, with the sizes as they are now; of a dry run, as they would be.
    pub(crate) fn into_report(mut self) -> Result<CompactReport, DiskError> {
        let disk = Arc::clone(&self.disk);
        let disk = &*disk;
        let dead: HashSet<BlockIndex> = self.dead().collect();
        let live = without(&self.slots(), &dead);
        let planned = self.plan();
        let frame = self.frame(&dead);
        if self.options.dry_run {
            for block in &dead {
                if disk.maintenance().gives_up_free(*block, self.book()) {
                    self.count_reclaimed(*block);
                }
            }
        }
        let punched = match self.options.dry_run && self.punches() {
            true => self.ranges_to_punch(&live),
            false => Vec::new(),
        };
        let gives_up_free = |block| disk.maintenance().gives_up_free(block, self.book());
        let loses_free =
            dead.iter().copied().any(gives_up_free) || self.freed.is_some() && !punched.is_empty();
        let report = &mut self.report;
        report.new_identity = self.announcement.new_identity;
        report.bytes_read += self.scanner.bytes_read;
        if self.options.dry_run {
            report.new_identity = loses_free && disk.geometry().format == Format::Vhdx;
            report.length_after = planned.file_len(&frame);
            report.blocks_dropped = u64_from(dead.len() + disk.maintenance().kept_for().len());
            report.blocks_moved = u64_from(planned.moves.len());
            report.bytes_moved = report.blocks_moved * disk.geometry().slot.len;
            let freed = stored_in_free_space(disk, &dead, punched.into_iter())?;
            report.allocated_after = report.allocated_before.saturating_sub(freed);
        } else {
            report.length_after = disk.file_len();
            report.allocated_after = disk.allocated_bytes()?;
        }
        let live: Vec<_> = live.iter().map(|(_, block)| *block).collect();
        let book = self.freed.as_ref().map(|freed| &freed.book);
        report.explain(disk, &frame, book, &live);
        Ok(self.report)
    }
}
