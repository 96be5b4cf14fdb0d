//! Takes dead blocks out of the block table.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Compactor;
use crate::compact::CompactError;
use crate::disk::{Candidates, Doubt, MOST};
use crate::units::{BlockIndex, u64_from};

/// How long it does to have asked whether somebody reads what is free.
const ASK_AGAIN: Duration = Duration::from_secs(2);

impl Compactor {
    pub(super) fn drop_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        if self.queue.is_empty() {
            let disk = self.disk.maintenance();
            disk.drop_unused_metadata()?;
            disk.sync()?;
            self.to_cut = true;
            self.begin_moves();
            return Ok(());
        }
        if !self.freed_still_holds(go_on)? {
            return Ok(());
        }
        let disk = Arc::clone(&self.disk);
        let count = self.queue.len().min(MOST);
        let blocks: Vec<BlockIndex> = self.queue.drain(..count).collect();
        let candidates = Candidates {
            blocks: &blocks,
            same: &self.same,
            book: self.freed.as_ref().map(|freed| &freed.book),
        };
        let dropped = (disk.maintenance()).drop_blocks(candidates, &mut self.announcement)?;
        let dropped = match dropped {
            Ok(dropped) => dropped,
            Err(doubt) => {
                self.doubt(doubt);
                return Ok(());
            }
        };
        dropped.busy.iter().for_each(|block| self.leave(*block));
        for (block, _) in dropped.blocks.iter().filter(|(_, was_free)| *was_free) {
            self.count_reclaimed(*block);
        }
        self.report.blocks_dropped += u64_from(dropped.blocks.len());
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
            if (self.last_word.as_ref()).is_some_and(|last_word| !last_word.may_go()) {
                self.disbelieve("there is, or may be, a disk over it by now");
                return Ok(false);
            }
        }
        let disk = &self.disk;
        let holds = freed.still_holds(disk, &|| !disk.has_writers() && go_on());
        match holds {
            Ok(true) => Ok(true),
            Err(CompactError::Cancelled) if go_on() => {
                self.doubt(Doubt::WriterCame);
                Ok(false)
            }
            Ok(false) => {
                self.disbelieve("the guest's filesystems changed meanwhile");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn doubt(&mut self, doubt: Doubt) {
        self.disbelieve(doubt.reason());
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
        let start = self.disk.offset_of(block);
        for free in freed.book.free_in(&self.disk, block) {
            let free = start + free.start..start + free.end;
            let read = self.report.parts.iter_mut();
            for part in read.filter(|part| part.skipped.is_none()) {
                part.reclaimed += part.overlap(&free);
            }
        }
    }
}
