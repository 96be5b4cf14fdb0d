//! Finds out what blocks hold: what the guest's filesystems call free, what is zero, what the parent has, too.

use std::collections::VecDeque;

use super::{Budget, Compactor, Scope};
use crate::compact::freed::{Freed, free_in_parents};
use crate::compact::report::part_reports;
use crate::compact::{CompactError, Phase};
use crate::disk::{Comparison, Scanned, drop_if_same};
use crate::units::BlockIndex;

/// Bytes that a step scans at most.
const SCAN_STEP: u64 = 1 << 20;

impl Compactor {
    pub(super) fn survey_step(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), CompactError> {
        let alone = || !self.disk.has_writers() && go_on();
        if self.options.fs_aware && self.disk.has_writers() {
            self.report.not_surveyed = Some("somebody has the disk open for writing".to_owned());
        } else if self.options.fs_aware {
            let freed = Freed::find(&self.disk, self.options.free_swap, self.rest, &alone)?;
            self.report.bytes_read += freed.survey().evidence.bytes();
            self.report.parts = part_reports(freed.survey());
            self.freed = Some(freed);
        }
        self.begin_scan();
        Ok(())
    }

    pub(super) fn begin_scan(&mut self) {
        if self.scope.is_none() {
            let news = (self.is_of_news).then(|| self.disk.maintenance().take_news());
            self.scope = Some(match news.flatten() {
                // What is free may be in any block.
                Some(blocks) if self.freed.is_none() => Scope::Blocks(blocks),
                _ => Scope::All,
            });
        }
        let queue = if self.options.scan {
            self.to_scan()
        } else {
            VecDeque::new()
        };
        self.enter(Phase::Scan, queue);
    }

    /// The blocks of which a scan would find out something that matters, in order of their places,
    /// so that the host reads ahead.
    fn to_scan(&self) -> VecDeque<BlockIndex> {
        let wanted = self.blocks().filter(|(block, _)| {
            self.compares() || self.scanner.wants(&self.disk, self.book(), *block)
        });
        let mut slots: Vec<_> = wanted.map(|(block, slot)| (slot, block)).collect();
        slots.sort_unstable();
        slots.into_iter().map(|(_, block)| block).collect()
    }

    /// Whether blocks are compared with what the parent has.
    fn compares(&self) -> bool {
        self.options.drop_identical && self.disk.parent().is_some()
    }

    /// Whether `block` has a slot that it need not have.
    pub(super) fn is_dead(&self, block: BlockIndex) -> bool {
        let disk = self.disk.maintenance();
        self.same.contains(&block) || disk.reads_without(block, self.book()).is_some()
    }

    pub(super) fn scan_step(
        &mut self,
        budget: Budget,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), CompactError> {
        let mut left = SCAN_STEP.min(budget.bytes);
        while let Some(block) = self.queue.front().copied() {
            if left == 0 {
                return Ok(());
            }
            if self.compares() && !self.compared(block, &mut left, go_on)? {
                self.queue.pop_front();
                continue;
            }
            let book = self.freed.as_ref().map(|freed| &freed.book);
            let scanned = if self.scanner.wants(&self.disk, book, block) {
                self.scanner.scan(&self.disk, book, block, left)?
            } else {
                Scanned::Nothing
            };
            match scanned {
                Scanned::Bytes(bytes) => left = left.saturating_sub(bytes),
                Scanned::Nothing | Scanned::Touched => {
                    if scanned == Scanned::Touched {
                        self.leave(block);
                    }
                    self.queue.pop_front();
                    self.comparing = None;
                }
            }
        }
        if self.options.dry_run {
            self.phase = Phase::Done;
            return Ok(());
        }
        if self.is_of_news {
            // With nothing else there is anything to be done, now or by a later run.
            self.scope = Some(Scope::Blocks(self.unfinished()));
        }
        let kept = self.disk.maintenance().kept_for();
        let dead = self.blocks().map(|(block, _)| block);
        let dead = dead.filter(|block| self.is_dead(*block));
        let dead = dead
            .chain(kept.into_iter().map(|(_, block)| block))
            .collect();
        self.enter(Phase::Drop, dead);
        Ok(())
    }

    /// Leaves `block` to another run, because a guest is at it.
    pub(super) fn leave(&mut self, block: BlockIndex) {
        self.skipped = true;
        if self.is_of_news {
            self.disk.maintenance().note_news(block);
        }
    }

    /// Compares a block with the parent, once; says whether it stays.
    fn compared(
        &mut self,
        block: BlockIndex,
        left: &mut u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<bool, CompactError> {
        if self.comparing == Some(block) {
            return Ok(true);
        }
        let parents_free = match self.parents_free.take() {
            Some(known) => known,
            None => free_in_parents(&self.disk, go_on)?,
        };
        let parents_free = self.parents_free.insert(parents_free);
        self.comparing = Some(block);
        let before = self.scanner.bytes_read;
        let how = Comparison {
            book: self.freed.as_ref().map(|freed| &freed.book),
            parents_free,
            dry_run: self.options.dry_run,
            go_on,
        };
        let same = drop_if_same(&self.disk, block, how, &mut self.scanner.bytes_read)?;
        *left = left.saturating_sub(self.scanner.bytes_read - before);
        if same && self.freed.is_none() && !self.options.dry_run {
            // Gone already; what a guest puts there from now on is its own again.
            self.report.blocks_dropped += 1;
        } else if same {
            self.same.insert(block);
        }
        Ok(!same)
    }
}
