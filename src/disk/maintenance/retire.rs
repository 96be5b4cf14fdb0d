//! Takes dead blocks out of the block table.

use std::collections::HashSet;

use super::{Announcement, Doubt, FreeBook, MOST, Maintenance};
use crate::disk::{Content, Disk};
use crate::error::DiskError;
use crate::image::{MapEdit, Reads};
use crate::map::BlockState;
use crate::units::BlockIndex;

/// Blocks that may lose their slots, for one of several reasons.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidates<'a> {
    /// The blocks.
    pub(crate) blocks: &'a [BlockIndex],
    /// Those that hold what the parent has, but for what is free.
    pub(crate) same: &'a HashSet<BlockIndex>,
    /// What counts as zero though it is not.
    pub(crate) book: Option<&'a FreeBook>,
}

/// What became of [`Candidates`].
#[derive(Debug, Default)]
pub(crate) struct Dropped {
    /// Blocks that are gone, and of each whether what filesystems call free was lost with it.
    pub(crate) blocks: Vec<(BlockIndex, bool)>,
    /// Blocks that somebody was at.
    pub(crate) busy: Vec<BlockIndex>,
}

impl Candidates<'_> {
    /// What may be read of `block` once it has lost its slot, if it may lose it now. Its gate is held, or
    /// the answer is a guess.
    fn reads_without(&self, disk: &Disk, block: BlockIndex, kept: &[BlockIndex]) -> Option<Reads> {
        match disk.image.map().get(block) {
            BlockState::Present { .. } if self.same.contains(&block) => Some(Reads::Parent),
            BlockState::Present { .. } => disk.maintenance().reads_without(block, self.book),
            // Without a slot, but it keeps one for itself.
            BlockState::NotPresent | BlockState::Zero if kept.contains(&block) => {
                disk.reads_when_dropped(block)
            }
            BlockState::NotPresent | BlockState::Zero => None,
        }
    }
}

impl Maintenance<'_> {
    /// What may be read of the present `block` once it has lost its slot because all of it is zero or free.
    pub(crate) fn reads_without(self, block: BlockIndex, book: Option<&FreeBook>) -> Option<Reads> {
        match self.disk.known(book).content(block) {
            Content::Dead => self.disk.reads_when_dropped(block),
            _ => None,
        }
    }

    /// Whether dropping `block` now takes more from it than zeros.
    pub(crate) fn gives_up_free(self, block: BlockIndex, book: Option<&FreeBook>) -> bool {
        book.is_some()
            && self.disk.image.map().get(block).slot().is_some()
            && self.disk.tracker.content(block) != Content::Dead
    }

    /// Takes those candidates, at most [`MOST`], out of the block table that may go, in one commit. Durable
    /// with the next sync, and only then are their slots free.
    ///
    /// # Errors
    /// The image's. With a [`Doubt`], nothing has changed.
    pub(crate) fn drop_blocks(
        self,
        candidates: Candidates<'_>,
        announcement: &mut Announcement,
    ) -> Result<Result<Dropped, Doubt>, DiskError> {
        let disk = self.disk;
        let book = candidates.book;
        debug_assert!(candidates.blocks.len() <= MOST);
        // While nobody is kept waiting.
        disk.image.prepare_commit()?;
        let alone = book.map(|_| disk.writers.keep_out());
        if alone.as_ref().is_some_and(Option::is_none) {
            return Ok(Err(Doubt::WriterCame));
        }
        let mut dropped = Dropped::default();
        let mut held = Vec::with_capacity(candidates.blocks.len());
        for block in candidates.blocks.iter().copied() {
            // A block that somebody is at now is not dead for long.
            let Some(gate) = disk.gates.try_exclusive(block) else {
                dropped.busy.push(block);
                continue;
            };
            // Dropped in this order: a change ends under its gate.
            held.push((block, disk.gates.change(block), gate));
        }
        // Only now: while its gate is held, a block keeps what it keeps.
        let kept: Vec<_> = self
            .kept_for()
            .into_iter()
            .map(|(_, block)| block)
            .collect();
        let mut edits = Vec::with_capacity(held.len());
        for (block, ..) in &held {
            if let Some(reads) = candidates.reads_without(disk, *block, &kept) {
                edits.push(MapEdit::Drop {
                    block: *block,
                    reads,
                });
                dropped
                    .blocks
                    .push((*block, self.gives_up_free(*block, book)));
            }
        }
        // Asked under the gates: a write that comes later waits for them.
        if book.is_some_and(|book| !book.is_untouched(disk)) {
            return Ok(Err(Doubt::Written));
        }
        if edits.is_empty() {
            return Ok(Ok(dropped));
        }
        if dropped
            .blocks
            .iter()
            .any(|(_, gives_up_free)| *gives_up_free)
        {
            announcement.make(disk)?;
        }
        disk.image.commit(&edits)?;
        for edit in &edits {
            disk.tracker.forget(edit.block());
            if let Some(book) = book {
                book.tracker.forget(edit.block());
            }
        }
        Ok(Ok(dropped))
    }
}
