//! Moves blocks to other slots. `compact/mod.rs` has the order of writes and why it is safe.

use std::sync::Arc;

use super::MOST;
use crate::disk::withheld::{Batch, Moving};
use crate::disk::{Disk, Twin};
use crate::error::DiskError;
use crate::image::MapEdit;
use crate::units::{BlockIndex, FileOffset, u64_from};

/// A block that goes from one slot to another, nearer to the start of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The block.
    pub block: BlockIndex,
    /// Its slot.
    pub from: FileOffset,
    /// The slot it goes to.
    pub to: FileOffset,
}

/// What became of a move that was to be part of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It is part of it.
    Taken,
    /// The target is in use by now, or the block is no longer where it was.
    Stale,
    /// The host does not store all of the target: writing there takes new space.
    TakesSpace,
    /// The batch has as many as it can have.
    Full,
}

/// What a batch of moves came to.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Blocks that lie elsewhere now.
    pub(crate) blocks: Vec<BlockIndex>,
    /// Blocks that stayed where they were because a guest changed them meanwhile.
    pub(crate) given_up: Vec<BlockIndex>,
    /// Whether others stayed because a guest needed the space of their targets.
    pub(crate) is_let_go: bool,
    /// Bytes that were copied for those.
    pub(crate) copied_in_vain: u64,
}

/// A batch of moves under way, which may take many calls: blocks are copied piece by piece, and switched over
/// together once all copies are durable. What a guest writes to one of the blocks goes to its copy, too
/// ([`Twin`]); one that is changed in another way stays, and the others go on. What is not concluded when this
/// is dropped has changed nothing.
#[derive(Debug)]
pub(crate) struct Relocation {
    disk: Arc<Disk>,
    /// Those that are not given up.
    batch: Arc<Batch>,
    /// Those of them that are being concluded.
    moves: Vec<Moving>,
    takes_space: bool,
    /// Why no further copies are made.
    failure: Option<DiskError>,
    moved: Moved,
}

impl Relocation {
    /// Of no block yet.
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        let batch = disk.withheld.begin();
        Self {
            disk,
            batch,
            moves: Vec::new(),
            takes_space: false,
            failure: None,
            moved: Moved::default(),
        }
    }

    /// Whether nothing is to be moved.
    pub(crate) fn is_empty(&self) -> bool {
        self.batch.moves().list.is_empty()
    }

    /// Bytes of all the slots that move.
    pub(crate) fn bytes(&self) -> u64 {
        self.slot_len() * u64_from(self.batch.moves().list.len())
    }

    /// Whether one of the targets is not stored by the host yet.
    pub(crate) fn takes_space(&self) -> bool {
        self.takes_space
    }

    fn slot_len(&self) -> u64 {
        self.disk.geometry().slot.len
    }

    /// Takes the target of `step`, which its block keeps the same from here on, as far as it is copied. Where
    /// that takes new space of the host, only if it `may_take_space`.
    pub(crate) fn add(&mut self, step: Move, may_take_space: bool) -> Added {
        if self.batch.moves().list.len() == MOST {
            return Added::Full;
        }
        let disk = &*self.disk;
        let Some(reserved) = disk.image.reserve_at(step.to) else {
            return Added::Stale;
        };
        let new_space = reserved.clean || !is_stored(disk, step.to);
        if new_space && !may_take_space {
            disk.image.give_back(step.to);
            return Added::TakesSpace;
        }
        let Some(twin) = Twin::new(disk, step.block, step.from, step.to) else {
            disk.image.give_back(step.to);
            return Added::Stale;
        };
        self.takes_space |= new_space;
        self.batch.moves().list.push(Moving { step, twin });
        Added::Taken
    }

    /// The first block that is not all copied.
    fn next(&self, moves: &[Moving]) -> Option<usize> {
        let len = self.slot_len();
        let next = (moves.iter()).position(|moving| moving.twin.copied() < len);
        next.filter(|_| self.failure.is_none())
    }

    /// Whether there is more to be copied.
    pub(crate) fn has_more(&self) -> bool {
        self.next(&self.batch.moves().list).is_some()
    }

    /// Copies the next piece, `most` bytes of it, and says how many bytes that were. Where a guest may sync
    /// the file at any moment it is to be `written_back`, so that the guest never waits for more than one
    /// piece.
    pub(crate) fn advance(&mut self, most: u64, written_back: bool) -> u64 {
        let batch = Arc::clone(&self.batch);
        let mut moves = batch.moves();
        let Some(at) = self.next(&moves.list) else {
            return 0;
        };
        if moves.list[at].twin.is_given_up() {
            let given_up = moves.list.remove(at);
            self.give_up(given_up);
            return 0;
        }
        match moves.list[at].twin.copy(&self.disk, most, written_back) {
            Ok(copied) => copied,
            Err(error) => {
                self.failure = Some(error);
                0
            }
        }
    }

    /// Leaves a block where it is, because a guest changed more of it than bytes in place.
    fn give_up(&mut self, moving: Moving) {
        self.moved.given_up.push(moving.step.block);
        self.give_back(moving);
    }

    fn give_back(&mut self, moving: Moving) {
        self.moved.copied_in_vain += moving.give_back(&self.disk);
    }

    /// Switches the table over to the copies that are complete, durably; the others are given up.
    ///
    /// # Errors
    /// The image's. What was copied and not switched over is as if nothing had happened.
    pub(crate) fn conclude(mut self) -> (Moved, Result<(), DiskError>) {
        let len = self.slot_len();
        let left = self.batch.conclude();
        self.moves = left.list;
        self.moved.is_let_go = left.let_go.is_some();
        self.moved.copied_in_vain += left.let_go.unwrap_or_default();
        while let Some(at) = (self.moves.iter()).position(|moving| moving.twin.copied() < len) {
            let part = self.moves.remove(at);
            self.give_back(part);
        }
        let switched = self.switch_over();
        let failure = self.failure.take();
        let moved = std::mem::take(&mut self.moved);
        (moved, switched.and(failure.map_or(Ok(()), Err)))
    }

    fn switch_over(&mut self) -> Result<(), DiskError> {
        if self.moves.is_empty() {
            return Ok(());
        }
        let disk = Arc::clone(&self.disk);
        disk.image.note_payload();
        disk.image.sync()?;
        // While nobody's gate is held.
        disk.image.prepare_commit()?;
        let committed = self.commit(&disk);
        // Only now, that the table is durable, are the old slots free.
        committed.and(disk.image.sync())
    }

    /// Writes the table entries of all blocks whose copies are whole, under their gates, in one commit; in
    /// another one of those that a guest is at right now.
    fn commit(&mut self, disk: &Disk) -> Result<(), DiskError> {
        while !self.moves.is_empty() {
            let (mut ready, mut gates) = (Vec::new(), Vec::new());
            for moving in std::mem::take(&mut self.moves) {
                let block = moving.step.block;
                // Nobody waits for one gate while he holds others up by those that he has.
                let gate = match gates.is_empty() {
                    true => Some(disk.gates.exclusive(block)),
                    false => disk.gates.try_exclusive(block),
                };
                match gate {
                    Some(_) if !stays_whole(disk, &moving) => self.give_up(moving),
                    Some(gate) => {
                        gates.push(gate);
                        ready.push(moving);
                    }
                    None => self.moves.push(moving),
                }
            }
            let edits = ready.iter().map(|moving| MapEdit::Move {
                block: moving.step.block,
                to: moving.step.to,
            });
            // What it does not commit, it gives back itself.
            let committed = disk.image.commit(&edits.collect::<Vec<_>>());
            let is_moved = |moving: &&Moving| {
                disk.image.map().get(moving.step.block).slot() == Some(moving.step.to)
            };
            let blocks = ready
                .iter()
                .filter(is_moved)
                .map(|moving| moving.step.block);
            self.moved.blocks.extend(blocks);
            // Before the gates open: the targets are the blocks' own now, or free.
            drop(ready);
            committed?;
        }
        Ok(())
    }
}

impl Drop for Relocation {
    fn drop(&mut self) {
        let left = self.batch.conclude().list;
        for moving in std::mem::take(&mut self.moves).into_iter().chain(left) {
            self.give_back(moving);
        }
        self.disk.withheld.end(&self.batch);
    }
}

/// Whether the host stores all of the slot at `slot`, so that writing there takes no new space.
fn is_stored(disk: &Disk, slot: FileOffset) -> bool {
    let range = disk.geometry().slot_range(slot);
    let data = disk.image.storage().next_data(range.start, range.end());
    matches!(data, Ok(Some(data)) if data == range)
}

/// Whether the block is still where it was, and its copy is whole. Its gate is held.
fn stays_whole(disk: &Disk, moving: &Moving) -> bool {
    let is_here = disk.image.map().get(moving.step.block).slot() == Some(moving.step.from);
    is_here && moving.twin.is_whole(disk)
}
