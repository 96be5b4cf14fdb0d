//! Gives zeros inside live blocks, and free space, back to the host.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Compactor;
use crate::compact::{CompactError, Phase};
use crate::disk::Punched;
use crate::units::{BlockIndex, FileOffset, FileRange};

/// Blocks whose zeros one step gives back.
const PUNCH_BATCH: usize = 4;

impl Compactor {
    /// Whether holes are punched in the file.
    pub(super) fn punches(&self) -> bool {
        self.options.punch_holes || self.options.punch_free && self.freed.is_some()
    }

    pub(super) fn to_punch(&self) -> VecDeque<BlockIndex> {
        let disk = self.disk.maintenance();
        (disk.slots())
            .filter(|(block, slot)| disk.is_worth_punching(*block, *slot, self.book()))
            .map(|(block, _)| block)
            .collect()
    }

    pub(super) fn punch_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        if !self.punches() {
            self.phase = Phase::Done;
            return Ok(());
        }
        if self.queue.is_empty() {
            if !self.disk.maintenance().punch_free()? {
                self.disk.maintenance().sync()?;
                self.phase = Phase::Done;
            }
            return Ok(());
        }
        if !self.freed_still_holds(go_on)? {
            return Ok(());
        }
        let count = self.queue.len().min(PUNCH_BATCH);
        for block in self.queue.drain(..count).collect::<Vec<_>>() {
            if !self.punch_block(block)? {
                break;
            }
        }
        Ok(())
    }

    /// Gives the zeros of one block, and what is free of it, back to the host; says whether the next one may
    /// be gone on with.
    fn punch_block(&mut self, block: BlockIndex) -> Result<bool, CompactError> {
        let disk = Arc::clone(&self.disk);
        let book = self.freed.as_ref().map(|freed| &freed.book);
        match (disk.maintenance()).punch_block(block, book, &mut self.announcement)? {
            Ok(Punched::Bytes(bytes)) => self.report.bytes_punched += bytes,
            Ok(Punched::Busy) => {}
            // Then no block can be: do not ask again.
            Ok(Punched::Unsupported) => self.queue.clear(),
            Err(doubt) => {
                self.doubt(doubt);
                return Ok(false);
            }
        }
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
