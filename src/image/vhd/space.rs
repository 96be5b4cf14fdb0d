//! The file's length and its free space.
//!
//! # Growing from length S to S'
//! 1. extend to S', write the footer at S'-512, sync: a crash shows the old length with the old
//!    footer, or S' with the new one, or S' without one, where the copy at 0 serves;
//! 2. zero the old footer, which now lies in free space, sync: only now is the new space clean.
//!
//! It grows by a quarter of its length, so that the two syncs are rare.
//!
//! # Shrinking from S to S'
//! 1. sync, so that no durable table entry names the tail;
//! 2. write the footer at S'-512, which is free space, sync;
//! 3. cut to S'. A crash shows S with its old footer, or S'.

use std::io;
use std::sync::atomic::Ordering;

use super::Vhd;
use crate::error::DiskError;
use crate::format::vhd::{FOOTER_LEN, MAX_SLOT_START};
use crate::image::Image;
use crate::map::FreeSpace;
use crate::units::{FileOffset, FileRange, SECTOR_SIZE, round_down, round_up};

/// Bounds of one extension of the file, in bytes.
const MIN_GROWTH: u64 = 16 << 20;
const MAX_GROWTH: u64 = 1 << 30;
/// The most bytes of free space that one call cleans or punches.
const CLEAN_BATCH: u64 = 64 << 20;

impl Vhd {
    /// Provides at least one clean slot.
    ///
    /// Free space inside the file is cleaned before the file grows; both cost the same syncs.
    pub(super) fn replenish(&self) -> Result<(), DiskError> {
        let _length = self.length_lock.lock();
        {
            let mut space = self.space.lock();
            if let Some(slot) = space.take_clean() {
                // Somebody else was faster.
                space.give_back_clean(self.geometry.slot_range(slot));
                return Ok(());
            }
        }
        if self.clean_dirty_slots()? {
            return Ok(());
        }
        match self.grow() {
            Err(DiskError::NoSpace(source)) => {
                // What waits for a sync may be all that is left.
                self.sync()?;
                if self.clean_dirty_slots()? {
                    Ok(())
                } else {
                    Err(DiskError::NoSpace(source))
                }
            }
            other => other,
        }
    }

    /// Zeroes a batch of free slots, durably. Says whether there was any.
    fn clean_dirty_slots(&self) -> Result<bool, DiskError> {
        let batch = self.space.lock().take_dirty(CLEAN_BATCH);
        self.clean(batch, |range| self.zero_free(range))
    }

    /// Zeroes the free ranges of `batch`, which are taken, and gives them back: as clean once that
    /// is durable, else as they were. Says whether any became clean. Ranges for which a full host
    /// has no room are left for another time.
    fn clean(
        &self,
        batch: Vec<FileRange>,
        zero: impl Fn(FileRange) -> io::Result<()>,
    ) -> Result<bool, DiskError> {
        let mut zeroed = Vec::new();
        let mut result = Ok(());
        for range in batch {
            let done = result.is_ok().then(|| zero(range));
            match done {
                Some(Ok(())) => zeroed.push(range),
                Some(Err(error)) => {
                    self.space.lock().give_back(range);
                    match DiskError::io("clean free space", error) {
                        DiskError::NoSpace(_) => {}
                        other => result = Err(other),
                    }
                }
                None => self.space.lock().give_back(range),
            }
        }
        if !zeroed.is_empty() {
            self.durability.note_write();
            result = result.and(self.sync());
        }
        let any = !zeroed.is_empty();
        let mut space = self.space.lock();
        for range in zeroed {
            match result {
                Ok(()) => space.give_back_clean(range),
                Err(_) => space.give_back(range),
            }
        }
        result.map(|()| any)
    }

    /// Zeroes free space, by a hole where that is allowed and possible.
    fn zero_free(&self, range: FileRange) -> io::Result<()> {
        if self.may_punch() {
            match self.storage.punch_hole(range) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    self.host_punches.store(false, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        self.storage.write_zeroes(range)
    }

    fn may_punch(&self) -> bool {
        self.punch_holes && self.host_punches.load(Ordering::Relaxed)
    }

    /// Extends the file by some slots. The length lock is held.
    fn grow(&self) -> Result<(), DiskError> {
        let old_len = self.file_len();
        let footer_at = FileOffset::new(old_len.saturating_sub(FOOTER_LEN));
        let slot = self.geometry.slot;
        let free_from = self
            .space
            .lock()
            .tail(footer_at)
            .map_or(footer_at, |tail| tail.start);
        let first = FileOffset::new(round_up(free_from.plus(slot.header_len).get(), slot.align))
            .get()
            .saturating_sub(slot.header_len);
        if first >= MAX_SLOT_START {
            return Err(DiskError::NoSpace(None));
        }
        let step = round_up(slot.len, slot.align);
        let more = round_up((old_len / 4).clamp(MIN_GROWTH, MAX_GROWTH), step).max(step);
        let last_end = MAX_SLOT_START.saturating_add(slot.len);
        let end = round_down(first.saturating_add(more).min(last_end), SECTOR_SIZE);
        let new_len = end.saturating_add(FOOTER_LEN);

        let write = || {
            self.storage.set_len(new_len)?;
            self.storage
                .write_all_at(&self.footer.to_bytes(), FileOffset::new(end))
        };
        if let Err(error) = write() {
            // The old footer is untouched: cut back to it.
            return Err(match self.storage.set_len(old_len) {
                Ok(()) => DiskError::io("extend the file", error),
                // The file ends without a footer now, which the next open puts right.
                Err(_) => self.durability.poison("extend the file", error),
            });
        }
        self.file_len.store(new_len, Ordering::Release);
        self.durability.note_write();
        self.sync()?;
        // From here on the space is free, only not yet clean. What was left in front of the old
        // footer is too short for a slot and joins it.
        let rest = {
            let mut space = self.space.lock();
            let rest = space.tail(footer_at).filter(|tail| tail.len <= slot.len);
            rest.filter(|tail| space.take(*tail))
                .map_or(footer_at, |tail| tail.start)
        };
        let zeroed = self
            .storage
            .write_zeroes(FileRange::between(rest, FileOffset::new(old_len)));
        self.durability.note_write();
        let result = zeroed
            .map_err(|error| DiskError::io("clear the old footer", error))
            .and_then(|()| self.sync());
        let added = FileRange::between(rest, FileOffset::new(end));
        match result {
            Ok(()) => self.space.lock().give_back_clean(added),
            Err(_) => self.space.lock().give_back(added),
        }
        result
    }

    /// Cuts the free space at the end of the file off.
    pub(super) fn cut_tail(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        if self.map.is_empty() {
            return Ok(());
        }
        let _length = self.length_lock.lock();
        self.sync()?;
        let old_end = FileOffset::new(self.file_len().saturating_sub(FOOTER_LEN));
        let tail = {
            let mut space = self.space.lock();
            let Some(tail) = space.tail(old_end) else {
                return Ok(());
            };
            space.take(tail);
            tail
        };
        let new_end = FileOffset::new(round_up(tail.start.get(), SECTOR_SIZE));
        let written = match self.write_footer(new_end) {
            // The tail is free: its space is what the footer may need.
            Err(DiskError::NoSpace(_)) if self.storage.punch_hole(tail).is_ok() => {
                self.durability.note_write();
                self.sync().and_then(|()| self.write_footer(new_end))
            }
            other => other,
        };
        if let Err(error) = written.and_then(|()| self.sync()) {
            self.space.lock().give_back(tail);
            return match error {
                // Not one block is left on the host. The file is good as it is, only longer.
                DiskError::NoSpace(_) => {
                    log::warn!("{} unused bytes stay in a file: the host is full", tail.len);
                    Ok(())
                }
                other => Err(other),
            };
        }
        let new_len = new_end.plus(FOOTER_LEN).get();
        if let Err(error) = self.storage.set_len(new_len) {
            // A host may cut and fail nevertheless: what is behind its end is not ours to give out.
            if self.storage.len().ok() == Some(self.file_len()) {
                self.space.lock().give_back(tail);
                return Err(DiskError::io("cut the file", error));
            }
            return Err(self.durability.poison("cut the file", error));
        }
        self.file_len.store(new_len, Ordering::Release);
        self.durability.note_write();
        Ok(())
    }

    fn write_footer(&self, at: FileOffset) -> Result<(), DiskError> {
        let written = self.storage.write_all_at(&self.footer.to_bytes(), at);
        self.durability.note_write();
        written.map_err(|error| DiskError::io("write the footer", error))
    }

    /// Makes what is free in the file available on a full host: gives it back to the host, or, where
    /// holes are not to be, zeroes it for the next block. Says whether there was any.
    pub(super) fn free_for_use(&self) -> Result<bool, DiskError> {
        self.check_writable()?;
        self.sync()?;
        if !self.may_punch() {
            let _length = self.length_lock.lock();
            return self.clean_dirty_slots();
        }
        let any = self.punchable() > 0;
        while self.punch_some()? {}
        Ok(any)
    }

    /// Punches a batch of free ranges out of the host file; says whether there are more.
    pub(super) fn punch_some(&self) -> Result<bool, DiskError> {
        self.check_writable()?;
        if !self.may_punch() || self.map.is_empty() {
            return Ok(false);
        }
        let _length = self.length_lock.lock();
        let mut left = CLEAN_BATCH;
        let mut batch = Vec::new();
        let mut more = false;
        {
            let mut space = self.space.lock();
            for run in self.punchable_runs(&space) {
                if left == 0 {
                    more = true;
                    break;
                }
                let part = FileRange::new(run.start, run.len.min(left));
                more |= part.len < run.len;
                left = left.saturating_sub(part.len);
                if space.take(part) {
                    batch.push(part);
                }
            }
        }
        let punched = self.clean(batch, |range| self.storage.punch_hole(range));
        match punched {
            Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::Unsupported => {
                self.host_punches.store(false, Ordering::Relaxed);
                Ok(false)
            }
            other => other.map(|any| any && more),
        }
    }

    /// The free ranges that the host may still store, but for the gaps that alignment leaves: those
    /// are shorter than a host block and not worth a call.
    fn punchable_runs(&self, space: &FreeSpace) -> Vec<FileRange> {
        let mut runs = space.dirty_runs();
        runs.retain(|run| run.len >= self.geometry.slot.align);
        runs
    }

    /// Their bytes, if holes may be punched at all.
    pub(super) fn punchable(&self) -> u64 {
        if self.read_only || !self.may_punch() {
            return 0;
        }
        self.punchable_runs(&self.space.lock())
            .iter()
            .map(|run| run.len)
            .sum()
    }
}
