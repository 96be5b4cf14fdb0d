//! What a compaction came to.

use std::collections::HashSet;
use std::sync::Arc;

use super::Compactor;
use crate::compact::plan::without;
use crate::compact::report::{CompactReport, Kept, stored_in_free_space};
use crate::error::DiskError;
use crate::format::Format;
use crate::units::{BlockIndex, u64_from};

impl Compactor {
    /// What was done, with the sizes as they are now; of a dry run, as they would be.
    pub(crate) fn into_report(mut self) -> Result<CompactReport, DiskError> {
        self.report.new_identity = self.announcement.new_identity;
        self.report.bytes_read += self.scanner.bytes_read;
        if !self.options.dry_run {
            self.report.length_after = self.disk.file_len();
            self.report.allocated_after = self.disk.allocated_bytes()?;
        }
        let slot_len = self.disk.geometry().slot.len;
        let left = [
            (
                "blocks that the guest is at",
                match self.skipped {
                    true => u64_from(self.given_up.len()) * slot_len,
                    // They had their turn later, or were not in the way.
                    false => 0,
                },
            ),
            (
                "much would have to be moved for it beside an active guest",
                self.too_dear,
            ),
            (
                "the host has no room to move them",
                self.without_room * slot_len,
            ),
        ];
        for (reason, bytes) in left.into_iter().filter(|(_, bytes)| *bytes > 0) {
            let reason = reason.to_owned();
            self.report.left.push(Kept { reason, bytes });
        }
        // What is new is little, and nobody asked why the rest is there.
        if !self.is_of_news {
            self.explain()?;
        }
        Ok(std::mem::take(&mut self.report))
    }

    /// Looks at all of the disk, at what would be done and at what stays.
    fn explain(&mut self) -> Result<(), DiskError> {
        let disk = Arc::clone(&self.disk);
        let disk = &*disk;
        let dead: HashSet<BlockIndex> = self.dead().collect();
        let live = without(&self.slots(), &dead);
        let frame = self.frame(&dead);
        if self.options.dry_run {
            let planned = self.plan();
            let gives_up_free = |block| disk.maintenance().gives_up_free(block, self.book());
            let partly_free: Vec<_> = (dead.iter().copied())
                .filter(|block| gives_up_free(*block))
                .collect();
            partly_free
                .iter()
                .for_each(|block| self.count_reclaimed(*block));
            let punched = match self.punches() {
                true => self.ranges_to_punch(&live),
                false => Vec::new(),
            };
            let loses_free = !partly_free.is_empty() || self.freed.is_some() && !punched.is_empty();
            let report = &mut self.report;
            report.new_identity = loses_free && disk.geometry().format == Format::Vhdx;
            report.length_after = planned.file_len(&frame);
            report.blocks_dropped = u64_from(dead.len() + disk.maintenance().kept_for().len());
            report.blocks_moved = u64_from(planned.moves.len());
            report.bytes_moved = report.blocks_moved * disk.geometry().slot.len;
            let freed = stored_in_free_space(disk, &dead, punched.into_iter())?;
            report.allocated_after = report.allocated_before.saturating_sub(freed);
        }
        let live: Vec<_> = live.iter().map(|(_, block)| *block).collect();
        let book = self.freed.as_ref().map(|freed| &freed.book);
        self.report.explain(disk, &frame, book, &live);
        Ok(())
    }
}
