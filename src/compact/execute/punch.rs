//! Gives zeros inside live blocks, and free space, back to the host.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::Compactor;
use crate::compact::{CompactError, Phase};
use crate::disk::Content;
use crate::error::DiskError;
use crate::units::{BlockIndex, FileOffset, FileRange, GRANULE_SIZE, div_ceil};

/// Blocks whose zeros one step gives back.
const PUNCH_BATCH: usize = 4;

impl Compactor {
    /// Whether holes are punched in the file.
    pub(super) fn punches(&self) -> bool {
        self.options.punch_holes || self.options.punch_free && self.freed.is_some()
    }

    pub(super) fn to_punch(&self) -> VecDeque<BlockIndex> {
        let present = self.disk.image.map().present();
        let worth = present.filter(|(block, slot)| match self.known().content(*block) {
            // It stays, for without it the parent would show.
            Content::Dead => {
                let data = self.disk.image.geometry().data_range(*slot);
                let stored = self.disk.image.storage().next_data(data.start, data.end());
                stored.map_or(true, |stored| stored.is_some())
            }
            _ => !self.known().punchable_runs(*block).is_empty(),
        });
        worth.map(|(block, _)| block).collect()
    }

    pub(super) fn punch_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        if !self.punches() {
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
        if !self.freed_still_holds(go_on)? {
            return Ok(());
        }
        let disk = Arc::clone(&self.disk);
        let alone = self.freed.as_ref().map(|_| disk.writers.keep_out());
        if alone.as_ref().is_some_and(Option::is_none) {
            self.disbelieve("somebody opened the disk for writing");
            return Ok(());
        }
        let count = self.queue.len().min(PUNCH_BATCH);
        for block in self.queue.drain(..count).collect::<Vec<_>>() {
            self.punch_block(block)?;
        }
        Ok(())
    }

    /// The zero granules of `block`, which lies in `slot`, and where they are in the file.
    fn punchable(&self, block: BlockIndex, slot: FileOffset) -> Vec<(Range<u64>, FileRange)> {
        let data = self.disk.image.geometry().data_range(slot);
        let runs = match self.known().content(block) {
            Content::Dead => vec![0..div_ceil(data.len, GRANULE_SIZE)],
            _ => self.known().punchable_runs(block),
        };
        let in_file = runs.into_iter().map(|run| {
            let start = data.start.plus(run.start * GRANULE_SIZE);
            let end = data.start.plus(run.end * GRANULE_SIZE).min(data.end());
            (run, FileRange::between(start, end))
        });
        in_file.collect()
    }

    /// What is to be punched out of `live` blocks, where they are now.
    pub(super) fn ranges_to_punch(&self, live: &[(FileOffset, BlockIndex)]) -> Vec<FileRange> {
        let ranges = (live.iter()).flat_map(|(slot, block)| self.punchable(*block, *slot));
        ranges.map(|(_, range)| range).collect()
    }

    /// Gives the zero granules of one block, and what is free of it, back to the host.
    fn punch_block(&mut self, block: BlockIndex) -> Result<(), DiskError> {
        let disk = Arc::clone(&self.disk);
        let Some(_gate) = disk.gates.try_exclusive(block) else {
            return Ok(());
        };
        let Some(slot) = disk.image.map().get(block).slot() else {
            return Ok(());
        };
        // Asked under the gate: a write that comes later waits for it.
        if (self.freed.as_ref()).is_some_and(|freed| !freed.is_untouched(&disk)) {
            self.disbelieve("the disk was written to meanwhile");
            return Ok(());
        }
        if self.freed.is_some() && disk.tracker.content(block) != Content::Dead {
            self.announce_loss_of_free()?;
        }
        for (run, range) in self.punchable(block, slot) {
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
            if self.freed.is_some() {
                let within = run.start * GRANULE_SIZE;
                for part in disk.written_parts(block, within..within + range.len)? {
                    disk.tracker
                        .note_zero(block, part.start, part.end - part.start, false);
                }
            }
        }
        self.known().set_punched(block);
        disk.tracker.set_punched(block);
        Ok(())
    }
}
