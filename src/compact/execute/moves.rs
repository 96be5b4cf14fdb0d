//! Moves blocks towards the start of the file, and then metadata, until there is no hole to move them to.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::{Budget, Compactor, Room};
use crate::compact::ledger::DEAREST;
use crate::compact::plan::{Choice, Plan, metadata_moves, plan, plan_top, without};
use crate::compact::{CompactError, Phase};
use crate::disk::{Added, Move, Relocation};
use crate::error::DiskError;
use crate::image::Frame;
use crate::units::{BlockIndex, FileOffset, FileRange, u64_from};

/// Bytes of slots that a batch of moves copies at most; at least one slot.
const MOVE_BATCH: u64 = 32 << 20;
/// Bytes that are copied between two looks whether to go on.
const COPY_PIECE: u64 = 4 << 20;
/// Blocks that are planned for together.
const PLANNED: usize = 4096;
/// The longest slot that is copied in one step for lack of another chance: nobody is held up by it, but that
/// the host's device is busy.
const AT_ONCE: u64 = 4 << 20;
/// How often the move of a block is given up in a run before it stays where it is.
const PATIENCE: u8 = 3;
/// Room that the host must have beyond what a move takes of it, where nobody asked for that: others use the host, too.
const RESERVE: u64 = 16 << 20;
/// Plans of a run beside a guest, which may make new holes all the time: then it is time to look what else there is.
const PLANS: u32 = 16;

impl Compactor {
    /// All that is left to do, as known, with what it leads to.
    pub(super) fn plan(&self) -> Plan {
        let dead: HashSet<BlockIndex> = self.dead().collect();
        let live = without(&self.slots(), &dead);
        let frame = self.frame(&dead);
        let shape = self.disk.geometry().slot;
        if self.options.move_blocks {
            return plan(&live, &frame, shape);
        }
        let ends = (live.last())
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

    pub(super) fn slots(&self) -> Vec<(FileOffset, BlockIndex)> {
        let present = self.disk.maintenance().slots();
        let mut slots: Vec<_> = present.map(|(block, slot)| (slot, block)).collect();
        slots.sort_unstable();
        slots
    }

    /// The blocks with a slot that they need not have.
    pub(super) fn dead(&self) -> impl Iterator<Item = BlockIndex> + '_ {
        let present = self.disk.maintenance().slots().map(|(block, _)| block);
        present.filter(|block| self.is_dead(*block))
    }

    /// What the file's end depends on, once `dead` blocks are gone.
    pub(super) fn frame(&self, dead: &HashSet<BlockIndex>) -> Frame {
        self.disk
            .maintenance()
            .frame(&|block| dead.contains(&block))
    }

    /// About how many bytes the file's length, and the host's storage inside blocks, would lose now. Costs
    /// what the run is about and the number of holes, not the disk.
    pub(crate) fn reclaimable(&self) -> u64 {
        let disk = self.disk.maintenance();
        let shape = self.disk.geometry().slot;
        let dead = self
            .blocks()
            .filter(|(block, _)| self.is_dead(*block))
            .count();
        let slots = u64_from(dead + disk.kept_for().len());
        let file_len = self.disk.file_len();
        let whole = |run: &FileRange| match run.end().get() + shape.len > file_len {
            // It is cut off.
            true => run.len,
            false => run.len / shape.len * shape.len,
        };
        let free = disk.free_runs();
        let holes: u64 = match self.moves_blocks() {
            true => free.iter().map(whole).sum(),
            // The end goes in any case, and the rest where it is punched.
            false => {
                let is_last = |run: &&FileRange| run.end().get() + shape.len > file_len;
                let cut = free.iter().filter(is_last).map(whole).sum();
                match self.punches() {
                    true => disk.punchable_free().max(cut),
                    false => cut,
                }
            }
        };
        let holes = holes.saturating_add(disk.awaiting_bytes());
        let inside = match self.punches() {
            true => disk.zeros_inside(self.book()),
            false => 0,
        };
        (slots * shape.len)
            .saturating_add(holes)
            .saturating_sub(self.spare)
            .saturating_add(inside)
    }

    fn moves_blocks(&self) -> bool {
        self.options.move_blocks && self.may_move
    }

    /// Has the next step plan.
    pub(super) fn begin_moves(&mut self) {
        self.enter(Phase::Move, VecDeque::new());
        self.moves = VecDeque::new();
        self.metadata_moves = VecDeque::new();
        self.moved_since_plan = true;
    }

    /// Plans the next moves; where there are none, the file is cut, and the run goes on with punching.
    pub(super) fn plan_moves(&mut self, budget: Budget) -> Result<(), CompactError> {
        let disk = Arc::clone(&self.disk);
        let disk = disk.maintenance();
        disk.sync()?;
        self.moved_since_plan = false;
        self.unplaced = 0;
        self.moves = VecDeque::new();
        self.metadata_moves = VecDeque::new();
        let frame = disk.frame(&|_| false);
        let file_len = self.disk.file_len();
        // Except what follows the last block: there is nothing to move from there.
        let mut free = disk.free_runs();
        free.retain(|run| run.end().get() < file_len.saturating_sub(frame.trailer_len));
        let shape = self.disk.geometry().slot;
        self.is_held_back = self.options.move_blocks && !self.may_move;
        if self.moves_blocks() {
            // What a guest writes to often goes last, for while a block moves each write is two; what has to
            // be given up again and again, not at all.
            let given_up = |block| self.given_up.get(&block).copied().unwrap_or_default();
            let choice = Choice {
                most: PLANNED,
                stays: &|block| given_up(block) >= PATIENCE,
                heat: &|block| disk.heat(block),
            };
            let planned = plan_top(disk.slots(), &free, &frame, shape, choice);
            disk.cool();
            let cost = u64_from(planned.moves.len()) * shape.len;
            let gain = file_len.saturating_sub(planned.file_len(&frame));
            if budget.beside_guest && cost > gain.saturating_mul(DEAREST) {
                log::debug!(
                    "{}: {cost} bytes would be moved for {gain}: not now",
                    self.disk.path().display()
                );
                self.skipped = true;
                self.too_dear = gain;
            } else {
                self.too_dear = 0;
                self.moves = planned.moves.into();
            }
            if self.moves.is_empty() {
                self.metadata_moves = metadata_moves(free, &frame).into();
            }
        }
        let is_planned = !self.moves.is_empty() || !self.metadata_moves.is_empty();
        self.is_cut_short = is_planned && budget.beside_guest && self.plans >= PLANS;
        if !is_planned || self.is_cut_short {
            self.moves = VecDeque::new();
            self.metadata_moves = VecDeque::new();
            self.end_moves();
        } else {
            self.plans = self.plans.saturating_add(1);
            self.enter(Phase::Move, VecDeque::new());
            self.total = u64_from(self.moves.len()) * self.disk.geometry().block_size;
        }
        Ok(())
    }

    /// Has the file cut, and goes on with punching.
    fn end_moves(&mut self) {
        self.to_cut = true;
        let queue = if self.punches() {
            self.to_punch()
        } else {
            VecDeque::new()
        };
        self.enter(Phase::Punch, queue);
    }

    pub(super) fn move_step(
        &mut self,
        budget: Budget,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), CompactError> {
        if self.batch.is_some() {
            return self.advance_batch(budget, go_on);
        }
        if let (None, Some((from, to))) = (self.moves.front(), self.metadata_moves.pop_front()) {
            self.moved_since_plan |= self.disk.maintenance().move_metadata(from, to)?;
            return Ok(());
        }
        if self.moves.is_empty() {
            if self.moved_since_plan {
                return self.plan_moves(budget);
            }
            if self.unplaced > 0
                && self.room == Room::Enough
                && self.disk.maintenance().make_room()?
            {
                self.room = Room::Made;
                return self.plan_moves(budget);
            }
            // Every move of the plan was in a guest's way, or needed space: not now.
            self.skipped |= self.unplaced == 0;
            self.without_room = match self.unplaced {
                0 => 0,
                // Of news, counting costs no more than what is new.
                unplaced if self.is_of_news => unplaced,
                _ => u64_from(self.plan().moves.len()),
            };
            self.end_moves();
            return Ok(());
        }
        self.batch = Some(self.take_batch());
        self.advance_batch(budget, go_on)
    }

    /// Gives up the moves that are being made: they are planned again.
    pub(crate) fn let_go(&mut self) {
        if self.batch.take().is_some() {
            self.moved_since_plan = true;
        }
    }

    /// Copies what the budget allows of the batch; where all is copied, and the guest does not have to wait for
    /// that as well, switches over.
    fn advance_batch(
        &mut self,
        budget: Budget,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), CompactError> {
        let Some(batch) = &mut self.batch else {
            return Ok(());
        };
        // Also of a guest that comes back in the middle of a long step.
        let written_back = budget.beside_guest || self.disk.has_writers();
        let mut left = budget.bytes;
        while batch.has_more() {
            if left == 0 && !self.at_once || !go_on() {
                return Ok(());
            }
            let piece = COPY_PIECE.min(budget.bytes);
            self.copied += batch.advance(piece, written_back);
            left = left.saturating_sub(piece);
        }
        if budget.beside_guest && left < budget.bytes && !self.at_once {
            return Ok(());
        }
        self.conclude_batch(budget)
    }

    fn conclude_batch(&mut self, budget: Budget) -> Result<(), CompactError> {
        let Some(batch) = self.batch.take() else {
            return Ok(());
        };
        let takes_space = batch.takes_space();
        let (moved, concluded) = batch.conclude();
        let slot_len = self.disk.geometry().slot.len;
        let blocks = u64_from(moved.blocks.len());
        self.report.blocks_moved += blocks;
        self.report.bytes_moved += blocks * slot_len;
        self.report.given_up += u64_from(moved.given_up.len());
        self.report.bytes_in_vain += moved.copied_in_vain;
        self.moved_since_plan |= blocks > 0 || moved.is_let_go;
        for block in &moved.blocks {
            self.given_up.remove(block);
        }
        for block in moved.given_up {
            let times = self.given_up.entry(block).or_default();
            *times = times.saturating_add(1);
            // It is tried again.
            self.moved_since_plan |= *times < PATIENCE;
            self.skipped = true;
        }
        match concluded {
            Err(DiskError::NoSpace(_)) if self.room != Room::None => {
                let made = self.room == Room::Enough && self.disk.maintenance().make_room()?;
                self.room = if made { Room::Made } else { Room::None };
                return self.plan_moves(budget);
            }
            other => other?,
        }
        // Before another one takes new space of the host.
        self.to_cut |= takes_space;
        Ok(())
    }

    /// Whether so many bytes may be taken of the host that it does not store yet. Where somebody asked for the
    /// compaction, the host itself says whether it has them.
    fn has_room_for(&self, bytes: u64) -> bool {
        let disk = self.disk.maintenance();
        let room = disk.host_room().filter(|_| self.is_of_news);
        self.room != Room::None && room.is_none_or(|room| room >= bytes.saturating_add(RESERVE))
    }

    /// Takes the targets of the next moves. One of them may take new host space.
    fn take_batch(&mut self) -> Relocation {
        let slot_len = self.disk.geometry().slot.len;
        let mut batch = Relocation::new(Arc::clone(&self.disk));
        // What a guest was at before is moved alone and, if it is short, without a pause.
        let is_in_the_way = |step: &Move| self.given_up.contains_key(&step.block);
        let alone = self.moves.front().is_some_and(is_in_the_way);
        self.at_once = alone && slot_len <= AT_ONCE;
        while let Some(step) = self.moves.front().copied() {
            if !batch.is_empty() && (alone || batch.bytes() + slot_len > MOVE_BATCH) {
                break;
            }
            let has_room = self.has_room_for(slot_len);
            match batch.add(step, has_room && !batch.takes_space()) {
                Added::Taken | Added::Stale => {}
                Added::TakesSpace if !has_room => self.unplaced += 1,
                Added::TakesSpace | Added::Full => break,
            }
            self.moves.pop_front();
        }
        batch
    }
}
