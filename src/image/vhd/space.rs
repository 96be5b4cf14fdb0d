//! How a VHD's file grows and is cut.
//!
//! # Growing from length S to S'
//! 1. extend to S', write the footer at S'-512, sync: a crash shows the old length with the old
//!    footer, or S' with the new one, or S' without one, where the copy at 0 serves;
//! 2. zero the old footer, which now lies in free space, sync: only now is the new space clean.
//!
//! It grows by a quarter of its length, so that the two syncs are rare; where the host does not let it get
//! as long as that, by one slot.
//!
//! # Shrinking from S to S'
//! 1. sync, so that no durable table entry names the tail;
//! 2. write the footer at S'-512, which is free space, sync;
//! 3. cut to S'. A crash shows S with its old footer, or S'.

use super::Vhd;
use crate::error::DiskError;
use crate::format::vhd::{FOOTER_LEN, MAX_SLOT_START};
use crate::image::Image;
use crate::units::{FileOffset, FileRange, SECTOR_SIZE, round_down, round_up};

/// Bounds of one extension of the file, in bytes.
const MIN_GROWTH: u64 = 16 << 20;
const MAX_GROWTH: u64 = 1 << 30;

impl Vhd {
    /// Extends the file by some slots. The length lock is held.
    pub(super) fn grow(&self) -> Result<(), DiskError> {
        let len = self.file_len();
        match self.extend((len / 4).clamp(MIN_GROWTH, MAX_GROWTH)) {
            Err(DiskError::NoSpace(_)) if self.file_len() == len => self.extend(0),
            other => other,
        }
    }

    /// Extends the file by `more` bytes, and one slot at least.
    fn extend(&self, more: u64) -> Result<(), DiskError> {
        let old_len = self.file_len();
        let footer_at = FileOffset::new(old_len.saturating_sub(FOOTER_LEN));
        let slot = self.geometry.slot;
        let free_from = self
            .space
            .free()
            .tail(footer_at)
            .map_or(footer_at, |tail| tail.start);
        let first = FileOffset::new(round_up(free_from.plus(slot.header_len).get(), slot.align))
            .get()
            .saturating_sub(slot.header_len);
        if first >= MAX_SLOT_START {
            return Err(DiskError::NoSpace(None));
        }
        let step = round_up(slot.len, slot.align);
        let more = round_up(more, step).max(step);
        let last_end = MAX_SLOT_START.saturating_add(slot.len);
        let end = round_down(first.saturating_add(more).min(last_end), SECTOR_SIZE);
        let new_len = end.saturating_add(FOOTER_LEN);

        // The footer itself makes the file longer: where hosts let no length get ahead of the bytes that
        // a write put there, no power cut shows an end without one.
        let footer = self.footer.lock().to_bytes();
        if let Err(error) = (self.storage).write_all_at(&footer, FileOffset::new(end)) {
            // The old footer is untouched: cut back to it.
            return Err(match self.storage.set_len(old_len) {
                Ok(()) => DiskError::io("extend the file", error),
                // The file ends without a footer now, which the next open puts right.
                Err(_) => self.durability.poison("extend the file", error),
            });
        }
        self.space.set_file_len(new_len);
        self.durability.note_write();
        self.sync()?;
        // From here on the space is free, only not yet clean. What was left in front of the old
        // footer is too short for a slot and joins it.
        let rest = {
            let mut space = self.space.free();
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
            Ok(()) => self.space.free().give_back_clean(added),
            Err(_) => self.space.free().give_back(added),
        }
        result
    }

    /// As [`Image::shrink`].
    pub(super) fn cut_tail(&self, spare: u64) -> Result<(), DiskError> {
        self.check_writable()?;
        if self.map.is_empty() {
            return Ok(());
        }
        let _length = self.space.lock_length();
        self.sync()?;
        let old_end = FileOffset::new(self.file_len().saturating_sub(FOOTER_LEN));
        let tail = {
            let mut space = self.space.free();
            let Some(tail) = space.tail(old_end) else {
                return Ok(());
            };
            // What is in front of the first sector is of no use to anybody.
            let start = match spare {
                0 => tail.start.get(),
                spare => round_up(tail.start.get().saturating_add(spare), SECTOR_SIZE),
            };
            if start >= old_end.get() {
                return Ok(());
            }
            let tail = FileRange::between(FileOffset::new(start), old_end);
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
            self.space.free().give_back(tail);
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
                self.space.free().give_back(tail);
                return Err(DiskError::io("cut the file", error));
            }
            return Err(self.durability.poison("cut the file", error));
        }
        self.space.set_file_len(new_len);
        self.durability.note_write();
        Ok(())
    }

    fn write_footer(&self, at: FileOffset) -> Result<(), DiskError> {
        let written = self
            .storage
            .write_all_at(&self.footer.lock().to_bytes(), at);
        self.durability.note_write();
        written.map_err(|error| DiskError::io("write the footer", error))
    }
}
