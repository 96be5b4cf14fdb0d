//! Gives zeros inside live blocks, and free space, back to the host.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Budget, Compactor};
use crate::compact::{CompactError, Phase};
use crate::disk::Punched;
use crate::units::{BlockIndex, FileOffset, FileRange};

/// Blocks whose zeros one step gives back.
const PUNCH_BATCH: usize = 4;
/// Beside a guest: runs of zeros in one block that one step punches, and the steps in which a block must be
/// done; some hosts cannot tell what was punched before.
const PUNCH_RUNS: usize = 64;
const PUNCH_STEPS: u32 = 128;

impl Compactor {
    /// Whether holes are punched in the file.
    pub(super) fn punches(&self) -> bool {
        self.options.punch_holes || self.options.punch_free && self.freed.is_some()
    }

    pub(super) fn to_punch(&self) -> VecDeque<BlockIndex> {
        let disk = self.disk.maintenance();
        (self.blocks())
            .filter(|(block, slot)| disk.is_worth_punching(*block, *slot, self.book()))
            .map(|(block, _)| block)
            .collect()
    }

    pub(super) fn punch_step(
        &mut self,
        budget: Budget,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), CompactError> {
        if !self.punches() {
            self.phase = Phase::Done;
            return Ok(());
        }
        if self.queue.is_empty() {
            if !self.disk.maintenance().punch_free(budget.given_back())? {
                self.disk.maintenance().sync()?;
                self.phase = Phase::Done;
            }
            return Ok(());
        }
        if !self.freed_still_holds(go_on)? {
            return Ok(());
        }
        let batch = if budget.beside_guest { 1 } else { PUNCH_BATCH };
        let count = self.queue.len().min(batch);
        let most = match budget.beside_guest && self.punched < PUNCH_STEPS {
            true => PUNCH_RUNS,
            false => usize::MAX,
        };
        for block in self.queue.drain(..count).collect::<Vec<_>>() {
            if !self.punch_block(block, most)? {
                break;
            }
        }
        Ok(())
    }

    /// Gives the zeros of one block, and what is free of it, back to the host; says whether the next one may
    /// be gone on with.
    fn punch_block(&mut self, block: BlockIndex, most: usize) -> Result<bool, CompactError> {
        let disk = Arc::clone(&self.disk);
        let book = self.freed.as_ref().map(|freed| &freed.book);
        let punched =
            (disk.maintenance()).punch_block(block, most, book, &mut self.announcement)?;
        self.punched += 1;
        match punched {
            Ok(Punched::Part(bytes)) => {
                self.report.bytes_punched += bytes;
                self.queue.push_front(block);
                return Ok(false);
            }
            Ok(Punched::All(bytes)) => self.report.bytes_punched += bytes,
            Ok(Punched::Busy) => self.leave(block),
            // Then no block can be: do not ask again.
            Ok(Punched::Unsupported) => self.queue.clear(),
            Err(doubt) => {
                self.doubt(doubt);
                return Ok(false);
            }
        }
        self.punched = 0;
        Ok(true)
    }

    /// What is to be punched out of `live` blocks, where they are now.
    pub(super) fn ranges_to_punch(&self, live: &[(FileOffset, BlockIndex)]) -> Vec<FileRange> {
        let disk = self.disk.maintenance();
        let ranges =
            (live.iter()).flat_map(|(slot, block)| disk.punchable(*block, *slot, self.book()));
        ranges.map(|(_, range)| range).collect()
    }
}
