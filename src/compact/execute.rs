//! Carries a compaction out, one bounded step at a time. `compact/mod.rs` has the order of writes.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::plan::{Move, Plan, plan, without};
use super::report::{CompactReport, Kept};
use super::{CompactError, CompactOptions, Phase, Progress};
use crate::disk::{Content, Disk, Watch, zero};
use crate::error::DiskError;
use crate::format::DiskType;
use crate::image::MapEdit;
use crate::units::{
    BlockIndex, FileOffset, FileRange, GRANULE_SIZE, SECTOR_SIZE, u64_from, usize_from,
};

/// Bytes that a step scans at most.
const SCAN_STEP: u64 = 1 << 20;
/// Bytes of a block that are looked at first: where they hold data, the block lives, and the rest
/// matters only for holes inside it.
const FIRST_LOOK: u64 = 64 << 10;
/// Bytes of slots that a batch of moves copies at most; at least one slot.
const MOVE_BATCH: u64 = 32 << 20;
/// Bytes that are copied between two looks whether to go on.
const COPY_PIECE: u64 = 4 << 20;
/// Blocks that leave the table in one step; the entries of one sector.
const DROP_BATCH: usize = 128;
/// Zeros inside live blocks that one step gives back, in blocks.
const PUNCH_BATCH: usize = 16;

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    More,
    Done,
}

/// What a look at a part of a block found.
#[derive(Debug)]
struct Look {
    /// Granules of the block, by number, and whether each is zero.
    found: Vec<(u64, bool)>,
    /// Bytes that had to be read; where there were none, the host stores none of them either.
    read: u64,
}

/// A compaction under way. The caller holds the disk's `compacting` lock, or is the only one.
#[derive(Debug)]
pub(crate) struct Compactor {
    disk: Arc<Disk>,
    options: CompactOptions,
    phase: Phase,
    /// The blocks that the phase still has to look at; the next one is first.
    queue: VecDeque<BlockIndex>,
    moves: VecDeque<Move>,
    /// Whether the present plan moved anything; if so, another plan may find more.
    moved_since_plan: bool,
    total: u64,
    report: CompactReport,
    buf: Vec<u8>,
}

impl Compactor {
    /// # Errors
    /// [`CompactError::Fixed`]; a disk that takes no changes, unless it is a dry run.
    pub(crate) fn new(disk: Arc<Disk>, options: CompactOptions) -> Result<Self, CompactError> {
        if disk.geometry().disk_type == DiskType::Fixed {
            return Err(CompactError::Fixed);
        }
        if !options.dry_run {
            disk.image.check_writable()?;
        }
        let (length_before, allocated_before) = disk.size_at_open();
        let mut compactor = Self {
            disk,
            options,
            phase: Phase::Scan,
            queue: VecDeque::new(),
            moves: VecDeque::new(),
            moved_since_plan: false,
            total: 0,
            report: CompactReport {
                length_before,
                allocated_before,
                ..CompactReport::default()
            },
            buf: Vec::new(),
        };
        let scan = if options.scan {
            compactor.to_scan()
        } else {
            VecDeque::new()
        };
        compactor.enter(Phase::Scan, scan);
        Ok(compactor)
    }

    /// Reports sizes as of now instead of as of the disk's opening.
    pub(crate) fn measured_from_now(mut self) -> Result<Self, CompactError> {
        self.report.length_before = self.disk.image.file_len();
        self.report.allocated_before = self.disk.allocated_bytes()?;
        Ok(self)
    }

    pub(crate) fn progress(&self) -> Progress {
        let left = u64_from(self.queue.len().max(self.moves.len()));
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

    /// Does a bounded piece of work. `go_on` is asked between its parts; where it says no, the step
    /// ends early, and nothing is lost but that part.
    ///
    /// # Errors
    /// The disk's. What was reserved is given back.
    pub(crate) fn step(&mut self, go_on: &dyn Fn() -> bool) -> Result<Step, CompactError> {
        match self.phase {
            Phase::Scan => self.scan_step()?,
            Phase::Drop => self.drop_step()?,
            Phase::Move => self.move_step(go_on)?,
            Phase::Punch => self.punch_step()?,
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

    /// The blocks of which a scan would find out something that matters, in order of their places,
    /// so that the host reads ahead.
    fn to_scan(&self) -> VecDeque<BlockIndex> {
        self.slots()
            .into_iter()
            .map(|(_, block)| block)
            .filter(|block| self.wants_scan(*block))
            .collect()
    }

    fn wants_scan(&self, block: BlockIndex) -> bool {
        let gaps = self.disk.tracker.gaps(block);
        gaps.has_unknown && (self.options.punch_holes || !gaps.has_data)
    }

    fn slots(&self) -> Vec<(FileOffset, BlockIndex)> {
        let present = self.disk.image.map().present();
        let mut slots: Vec<_> = present.map(|(block, slot)| (slot, block)).collect();
        slots.sort_unstable();
        slots
    }

    fn dead(&self) -> impl Iterator<Item = BlockIndex> + '_ {
        let present = self.disk.image.map().present();
        present
            .map(|(block, _)| block)
            .filter(|block| self.disk.tracker.content(*block) == Content::Dead)
    }

    /// What is left to do now, as known.
    pub(crate) fn plan(&self) -> Plan {
        let dead: HashSet<BlockIndex> = self.dead().collect();
        let live = without(&self.slots(), &dead);
        let frame = self.disk.image.frame();
        let shape = self.disk.geometry().slot;
        if self.options.move_blocks {
            plan(&live, &frame, shape)
        } else {
            let ends = live
                .last()
                .map(|(start, _)| start.plus(shape.len))
                .into_iter();
            let ends = ends.chain(frame.pinned.iter().map(|range| range.end()));
            Plan {
                moves: Vec::new(),
                end: ends.fold(frame.start, FileOffset::max),
            }
        }
    }

    /// Bytes that the file's length, and the host's storage inside blocks, would lose now.
    pub(crate) fn reclaimable(&self) -> u64 {
        let planned = self.plan().file_len(&self.disk.image.frame());
        let inside = if self.options.punch_holes {
            self.disk.tracker.punchable_bytes()
        } else {
            0
        };
        self.disk
            .image
            .file_len()
            .saturating_sub(planned)
            .saturating_add(inside)
    }

    // ---- scan

    fn scan_step(&mut self) -> Result<(), CompactError> {
        let mut left = SCAN_STEP;
        while let Some(block) = self.queue.front().copied() {
            if left == 0 {
                return Ok(());
            }
            if self.wants_scan(block) {
                left = left.saturating_sub(self.scan_part(block, left)?);
            } else {
                self.queue.pop_front();
            }
        }
        if self.options.dry_run {
            self.phase = Phase::Done;
        } else {
            let dead = self.dead().collect();
            self.enter(Phase::Drop, dead);
        }
        Ok(())
    }

    /// Finds out about the next unknown granules of `block`, at most `limit` bytes of them; says how
    /// many bytes it went through. Zeros that the block's bitmap or the host tells of are not read.
    fn scan_part(&mut self, block: BlockIndex, limit: u64) -> Result<u64, DiskError> {
        let disk = Arc::clone(&self.disk);
        let watch = disk.gates.watch(block);
        let runs = disk.tracker.unknown_runs(block);
        let Some((slot, run)) = disk.image.map().get(block).slot().zip(runs.first()) else {
            self.queue.pop_front();
            return Ok(0);
        };
        let start = run.start * GRANULE_SIZE;
        let first_look = !self.options.punch_holes && start == 0;
        let limit = if first_look {
            limit.min(FIRST_LOOK)
        } else {
            limit
        };
        let len = ((run.end - run.start) * GRANULE_SIZE).min(limit.max(GRANULE_SIZE));
        let len = len.min(disk.geometry().block_size - start);
        let look = self.look(block, slot, start, len)?;
        self.report.bytes_read += look.read;

        let _gate = disk.gates.exclusive(block);
        if watch.is_touched() {
            // Somebody is using the disk: leave this block for the next run.
            self.queue.pop_front();
            return Ok(len);
        }
        disk.tracker.note_scanned(block, look.found, look.read > 0);
        Ok(len)
    }

    /// Which granules among `len` bytes from `start` in the slot are zero. Stops at the first data if
    /// that is all that matters.
    fn look(
        &mut self,
        block: BlockIndex,
        slot: FileOffset,
        start: u64,
        len: u64,
    ) -> Result<Look, DiskError> {
        let io = |error| DiskError::io("scan a block", error);
        let image = &*self.disk.image;
        let at = image.geometry().data_at(slot).plus(start);
        let range = FileRange::new(at, len);
        self.buf.resize(usize_from(len), 0);
        let byte = |at: FileOffset| usize_from(at.since(range.start));
        let mut read = 0;
        let mut from = range.start;
        while let Some(data) = image.storage().next_data(from, range.end()).map_err(io)? {
            self.buf[byte(from)..byte(data.start)].fill(0);
            let part = &mut self.buf[byte(data.start)..byte(data.end())];
            image
                .storage()
                .read_exact_at(part, data.start)
                .map_err(io)?;
            read += data.len;
            from = data.end();
        }
        self.buf[byte(from)..].fill(0);
        self.mask_unwritten(block, start)?;
        let granules = self.buf.chunks(usize_from(GRANULE_SIZE)).map(zero::is_zero);
        let numbered = (start / GRANULE_SIZE..).zip(granules);
        let mut found = Vec::new();
        for (index, is_zero) in numbered {
            found.push((index, is_zero));
            if !is_zero && !self.options.punch_holes {
                break;
            }
        }
        Ok(Look { found, read })
    }

    /// Zeroes in the scan buffer what the block's sector bitmap says was never written.
    fn mask_unwritten(&mut self, block: BlockIndex, start: u64) -> Result<(), DiskError> {
        let bitmap = {
            // The gate keeps the block in place while its bitmap is read.
            let _gate = self.disk.gates.shared(block);
            match self.disk.image.map().get(block) {
                crate::map::BlockState::Present { whole: false, .. } => {
                    self.disk.image.sector_bitmap(block)?
                }
                _ => return Ok(()),
            }
        };
        let sectors = (start + u64_from(self.buf.len())) / SECTOR_SIZE;
        let mut sector = start / SECTOR_SIZE;
        while sector < sectors {
            let end = bitmap.run_end(sector, sectors);
            if !bitmap.is_written(sector) {
                let byte = |sector: u64| usize_from(sector * SECTOR_SIZE - start);
                self.buf[byte(sector)..byte(end)].fill(0);
            }
            sector = end;
        }
        Ok(())
    }

    // ---- drop

    fn drop_step(&mut self) -> Result<(), CompactError> {
        if self.queue.is_empty() {
            self.disk.image.sync()?;
            self.disk.image.shrink()?;
            return self.plan_moves();
        }
        let count = self.queue.len().min(DROP_BATCH);
        let disk = &*self.disk;
        let mut gates = Vec::with_capacity(count);
        let mut edits = Vec::with_capacity(count);
        for block in self.queue.drain(..count) {
            // A block that somebody is at now is not dead for long.
            let Some(gate) = disk.gates.try_exclusive(block) else {
                continue;
            };
            let present = disk.image.map().get(block).slot().is_some();
            if present && disk.tracker.content(block) == Content::Dead {
                gates.push(gate);
                edits.push(MapEdit::Drop { block });
            }
        }
        if edits.is_empty() {
            return Ok(());
        }
        disk.image.commit(&edits)?;
        for edit in &edits {
            disk.tracker.forget(edit.block());
        }
        self.report.blocks_dropped += u64_from(edits.len());
        Ok(())
    }

    // ---- move

    fn plan_moves(&mut self) -> Result<(), CompactError> {
        let moves: VecDeque<Move> = self.plan().moves.into();
        if moves.is_empty() {
            self.disk.image.sync()?;
            self.disk.image.shrink()?;
            let queue = if self.options.punch_holes {
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
        if self.moves.is_empty() {
            if self.moved_since_plan {
                return self.plan_moves();
            }
            // Every move of the plan was in a guest's way: not now.
            self.disk.image.shrink()?;
            self.enter(Phase::Punch, VecDeque::new());
            return Ok(());
        }
        let disk = Arc::clone(&self.disk);
        let (batch, sparse) = self.take_batch(&disk);
        let moved = copy_and_commit(&disk, &batch, go_on)?;
        self.report.blocks_moved += moved;
        self.report.bytes_moved += moved * disk.geometry().slot.len;
        self.moved_since_plan |= moved > 0;
        if sparse {
            disk.image.shrink()?;
        }
        Ok(())
    }

    /// Reserves targets for the next moves. Says whether one of them takes new host space.
    fn take_batch<'a>(&mut self, disk: &'a Disk) -> (Vec<(Move, Watch<'a>)>, bool) {
        let slot_len = disk.geometry().slot.len;
        let mut batch = Vec::new();
        let mut sparse = false;
        while let Some(step) = self.moves.front().copied() {
            let full = (u64_from(batch.len()) + 1) * slot_len > MOVE_BATCH;
            if !batch.is_empty() && full {
                break;
            }
            let Some(reserved) = disk.image.reserve_at(step.to) else {
                self.moves.pop_front();
                continue;
            };
            let new_space = reserved.clean || !is_stored(disk, step.to);
            if new_space && sparse {
                disk.image.give_back(step.to);
                break;
            }
            sparse |= new_space;
            self.moves.pop_front();
            let watch = disk.gates.watch(step.block);
            if disk.image.map().get(step.block).slot() == Some(step.from) {
                batch.push((step, watch));
            } else {
                disk.image.give_back(step.to);
            }
        }
        (batch, sparse)
    }

    // ---- punch

    fn to_punch(&self) -> VecDeque<BlockIndex> {
        let present = self.disk.image.map().present().map(|(block, _)| block);
        present
            .filter(|block| !self.disk.tracker.punchable_runs(*block).is_empty())
            .collect()
    }

    fn punch_step(&mut self) -> Result<(), CompactError> {
        if !self.options.punch_holes {
            self.phase = Phase::Done;
            return Ok(());
        }
        if self.queue.is_empty() {
            if !self.disk.image.punch_free()? {
                self.disk.image.sync()?;
                self.phase = Phase::Done;
            }
            return Ok(());
        }
        let count = self.queue.len().min(PUNCH_BATCH);
        for block in self.queue.drain(..count).collect::<Vec<_>>() {
            self.punch_block(block)?;
        }
        Ok(())
    }

    /// Gives the zero granules of one block back to the host.
    fn punch_block(&mut self, block: BlockIndex) -> Result<(), DiskError> {
        let disk = Arc::clone(&self.disk);
        let Some(_gate) = disk.gates.try_exclusive(block) else {
            return Ok(());
        };
        let Some(slot) = disk.image.map().get(block).slot() else {
            return Ok(());
        };
        let data = disk.image.geometry().data_range(slot);
        for run in disk.tracker.punchable_runs(block) {
            let start = data.start.plus(run.start * GRANULE_SIZE);
            let range = FileRange::between(
                start,
                data.end().min(data.start.plus(run.end * GRANULE_SIZE)),
            );
            match disk.image.storage().punch_hole(range) {
                Ok(()) => self.report.bytes_punched += range.len,
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                    // Then no block can be: do not ask again.
                    self.queue.clear();
                    return Ok(());
                }
                Err(error) => return Err(DiskError::io("punch zeros out of a block", error)),
            }
            disk.image.note_payload();
        }
        disk.tracker.set_punched(block);
        Ok(())
    }

    // ---- report

    /// What was done, with the sizes as they are now; of a dry run, as they would be.
    pub(crate) fn into_report(mut self) -> Result<CompactReport, DiskError> {
        let disk = Arc::clone(&self.disk);
        let frame = disk.image.frame();
        let geometry = *disk.geometry();
        let dead: HashSet<BlockIndex> = self.dead().collect();
        let live = u64_from(without(&self.slots(), &dead).len());
        if self.options.dry_run {
            let planned = self.plan();
            self.report.length_after = planned.file_len(&frame);
            self.report.blocks_dropped = u64_from(dead.len());
            self.report.blocks_moved = u64_from(planned.moves.len());
            self.report.bytes_moved = self.report.blocks_moved * geometry.slot.len;
            let freed = self.stored_in_free_space(&dead)?;
            self.report.allocated_after = self.report.allocated_before.saturating_sub(freed);
        } else {
            self.report.length_after = disk.image.file_len();
            self.report.allocated_after = disk.allocated_bytes()?;
        }
        let data = live * geometry.block_size;
        let bitmaps = live * geometry.slot.header_len;
        let pinned: u64 = frame.pinned.iter().map(|range| range.len).sum();
        let metadata = frame.start.get() + bitmaps + pinned + frame.trailer_len;
        let rest = self.report.length_after.saturating_sub(data + metadata);
        let kept = [
            ("blocks that hold data", data),
            ("headers, tables and sector bitmaps", metadata),
            ("gaps that no block fits in", rest),
        ];
        self.report.kept = kept
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(reason, bytes)| Kept {
                reason: reason.to_owned(),
                bytes,
            })
            .collect();
        Ok(self.report)
    }

    /// Bytes that the host stores for what is free, or would be without the `dead` blocks.
    fn stored_in_free_space(&self, dead: &HashSet<BlockIndex>) -> Result<u64, DiskError> {
        let image = &*self.disk.image;
        let slots = dead
            .iter()
            .filter_map(|block| image.map().get(*block).slot());
        let ranges = slots
            .map(|slot| image.geometry().slot_range(slot))
            .chain(image.free_runs());
        let mut stored = 0;
        for range in ranges {
            let mut from = range.start;
            let next = |from| image.storage().next_data(from, range.end());
            while let Some(data) =
                next(from).map_err(|error| DiskError::io("look for holes in the file", error))?
            {
                stored += data.len;
                from = data.end();
            }
        }
        Ok(stored)
    }
}

/// Whether the host stores all of the slot at `slot`, so that writing there takes no new space.
fn is_stored(disk: &Disk, slot: FileOffset) -> bool {
    let range = disk.geometry().slot_range(slot);
    let data = disk.image.storage().next_data(range.start, range.end());
    matches!(data, Ok(Some(data)) if data == range)
}

/// Copies the slots of `batch` to their targets and switches the table over, durably. Says how many
/// blocks moved; the targets of the others are given back.
fn copy_and_commit(
    disk: &Disk,
    batch: &[(Move, Watch<'_>)],
    go_on: &dyn Fn() -> bool,
) -> Result<u64, CompactError> {
    let mut copied = batch.len();
    let mut failure = None;
    for (at, (step, watch)) in batch.iter().enumerate() {
        match copy_slot(disk, step, watch, go_on) {
            Ok(true) => {}
            Ok(false) => {
                copied = copied.min(at);
                break;
            }
            Err(error) => {
                copied = at;
                failure = Some(error);
                break;
            }
        }
    }
    disk.image.note_payload();
    if let Err(error) = disk.image.sync() {
        batch
            .iter()
            .for_each(|(step, _)| disk.image.give_back(step.to));
        return Err(error.into());
    }
    let mut moved = 0;
    for (at, (step, watch)) in batch.iter().enumerate() {
        debug_assert_eq!(watch.block(), step.block);
        let _gate = disk.gates.exclusive(step.block);
        let in_place = disk.image.map().get(step.block).slot() == Some(step.from);
        if at < copied && in_place && !watch.is_touched() {
            disk.image.commit(&[MapEdit::Move {
                block: step.block,
                to: step.to,
            }])?;
            moved += 1;
        } else {
            disk.image.give_back(step.to);
        }
    }
    // Only now, that the table is durable, are the old slots free.
    disk.image.sync()?;
    failure.map_or(Ok(moved), |error| Err(error.into()))
}

/// Copies one slot; says whether it is complete, or the guest or the caller wants it stopped.
fn copy_slot(
    disk: &Disk,
    step: &Move,
    watch: &Watch<'_>,
    go_on: &dyn Fn() -> bool,
) -> Result<bool, DiskError> {
    let len = disk.geometry().slot.len;
    let mut done = 0;
    while done < len {
        if watch.is_touched() || !go_on() {
            return Ok(false);
        }
        let part = FileRange::new(step.from.plus(done), COPY_PIECE.min(len - done));
        disk.image
            .storage()
            .copy_within(part, step.to.plus(done))
            .map_err(|error| DiskError::io("copy a block", error))?;
        done += part.len;
    }
    Ok(true)
}
