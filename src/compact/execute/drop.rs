//! Takes dead blocks out of the block table.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Compactor;
use crate::compact::{CompactError, LastWord};
use crate::disk::Content;
use crate::error::DiskError;
use crate::image::MapEdit;
use crate::map::BlockState;
use crate::units::{BlockIndex, u64_from};

/// How long it does to have asked whether somebody reads what is free.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Blocks that leave the table in one step; the entries of one sector.
const DROP_BATCH: usize = 128;

impl Compactor {
    pub(super) fn drop_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        if self.queue.is_empty() {
            self.disk.image.drop_unused_metadata()?;
            self.disk.image.sync()?;
            self.disk.image.shrink()?;
            return self.plan_moves();
        }
        if !self.freed_still_holds(go_on)? {
            return Ok(());
        }
        let disk = Arc::clone(&self.disk);
        let alone = self.freed.as_ref().map(|_| disk.writers.keep_out());
        if alone.as_ref().is_some_and(Option::is_none) {
            self.disbelieve("somebody opened the disk for writing");
            return Ok(());
        }
        let count = self.queue.len().min(DROP_BATCH);
        let mut gates = Vec::with_capacity(count);
        let mut edits = Vec::with_capacity(count);
        for block in self.queue.drain(..count).collect::<Vec<_>>() {
            // A block that somebody is at now is not dead for long.
            let Some(gate) = disk.gates.try_exclusive(block) else {
                self.skipped = true;
                continue;
            };
            let reads = match disk.image.map().get(block) {
                BlockState::Present { .. } => self.reads_without(block),
                // Without a slot, but it keeps one for itself, or did a moment ago.
                BlockState::NotPresent | BlockState::Zero if self.kept.contains(&block) => {
                    disk.reads_when_dropped(block)
                }
                BlockState::NotPresent | BlockState::Zero => None,
            };
            if let Some(reads) = reads {
                gates.push(gate);
                edits.push(MapEdit::Drop { block, reads });
            }
        }
        // Asked under the gates: a write that comes later waits for them.
        if (self.freed.as_ref()).is_some_and(|freed| !freed.is_untouched(&disk)) {
            self.disbelieve("the disk was written to meanwhile");
            return Ok(());
        }
        if edits.is_empty() {
            return Ok(());
        }
        if edits.iter().any(|edit| self.gives_up_free(edit.block())) {
            self.announce_loss_of_free()?;
        }
        disk.image.commit(&edits)?;
        for edit in &edits {
            self.count_reclaimed(edit.block());
            disk.tracker.forget(edit.block());
            if let Some(freed) = &self.freed {
                freed.tracker.forget(edit.block());
            }
        }
        self.report.blocks_dropped += u64_from(edits.len());
        Ok(())
    }

    /// Whether dropping `block` now takes more from it than zeros.
    pub(super) fn gives_up_free(&self, block: BlockIndex) -> bool {
        self.freed.is_some()
            && self.disk.image.map().get(block).slot().is_some()
            && self.disk.tracker.content(block) != Content::Dead
    }

    /// Call before bytes go that only the guest's filesystems call free: others may have read them, caches
    /// above this disk and disks over it. The latter then no longer take it for their parent, if its
    /// format can say so.
    pub(super) fn announce_loss_of_free(&mut self) -> Result<(), DiskError> {
        // In each run: what a guest has written gave the disk another identity, but a copy may have that by
        // now, and a child.
        if !self.is_disowned {
            let before = self.disk.identity();
            self.disk.image.disown()?;
            self.report.new_identity = self.disk.identity() != before;
            self.is_disowned = true;
        }
        self.disk.gave_up_free.store(true, Ordering::Release);
        Ok(())
    }

    /// Looks once more at what the guest's filesystems said; what does not hold is given up.
    pub(super) fn freed_still_holds(
        &mut self,
        go_on: &dyn Fn() -> bool,
    ) -> Result<bool, CompactError> {
        let Some(freed) = &mut self.freed else {
            return Ok(true);
        };
        if self.asked.is_none_or(|then| then.elapsed() > ASK_AGAIN) {
            self.asked = Some(Instant::now());
            if (self.last_word.as_ref()).is_some_and(|LastWord(may_go)| !may_go()) {
                self.disbelieve("there is, or may be, a disk over it by now");
                return Ok(false);
            }
        }
        let disk = &self.disk;
        let holds = freed.still_holds(disk, &|| disk.writers.none() && go_on());
        match holds {
            Ok(true) => Ok(true),
            Err(CompactError::Cancelled) if go_on() => {
                self.disbelieve("somebody opened the disk for writing");
                Ok(false)
            }
            Ok(false) => {
                self.disbelieve("the guest's filesystems changed meanwhile");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives up what the guest's filesystems call free, and starts over with what is zero.
    pub(super) fn disbelieve(&mut self, reason: &str) {
        log::debug!("{}: {reason}", self.disk.path().display());
        self.freed = None;
        self.same.clear();
        self.report.not_surveyed = Some(reason.to_owned());
        self.begin_scan();
    }

    /// Enters in the report that `block`, which is about to go, or just went, was partly free.
    pub(super) fn count_reclaimed(&mut self, block: BlockIndex) {
        let Some(freed) = &self.freed else { return };
        if self.disk.tracker.content(block) == Content::Dead {
            // It would have gone without being free.
            return;
        }
        let start = self.disk.offset_of(block);
        for free in freed.free_in(&self.disk, block) {
            let free = start + free.start..start + free.end;
            let read = self.report.parts.iter_mut();
            for part in read.filter(|part| part.skipped.is_none()) {
                part.reclaimed += part.overlap(&free);
            }
        }
    }
}
