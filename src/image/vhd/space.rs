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
//! 1. sync, so that no durable table entry names the tail, and take it, so that nobody else gets any of it;
//! 2. write the footer at S'-512, which is free space, sync;
//! 3. cut to S', if the file is S long still. A crash shows S with its old footer, or S'.
//!
//! Only the last step keeps others from changing the file's length: who allocates waits for no sync of it.

use super::Vhd;
use crate::error::DiskError;
use crate::format::vhd::{FOOTER_LEN, MAX_SLOT_START};
use crate::image::{Cut, Image, Tail};
use crate::units::{FileOffset, FileRange, SECTOR_SIZE, round_down, round_up};

/// Bounds of one extension of the file, in bytes.
const MIN_GROWTH: u64 = 16 << 20;
const MAX_GROWTH: u64 = 1 << 30;

impl Vhd {
    /// Extends the file by some slots. The length lock is held.
    pub(super) fn grow(&self) -> Result<(), DiskError> {
        let len = self.file_len();
        // More than its blocks can come to need is of no use.
        let absent = u64::from(self.map.len()).saturating_sub(self.map.present_count());
        let wanted = absent.saturating_mul(self.geometry.slot.len);
        match self.extend((len / 4).clamp(MIN_GROWTH, MAX_GROWTH).min(wanted)) {
            Err(DiskError::NoSpace(_)) if self.file_len() == len => self.extend(0),
            other => other,
        }
    }

    /// Extends the file by `more` bytes, and one slot at least.
    fn extend(&self, more: u64) -> Result<(), DiskError> {
        let old_len = self.file_len();
        let footer_at = FileOffset::new(old_len.saturating_sub(FOOTER_LEN));
        let slot = self.geometry.slot;
        // What is left in front of the old footer is too short for a slot, and joins what follows.
        let rest = {
            let mut free = self.space.free();
            // More may have been given back, or freed, since somebody looked for a slot: that stays where it is.
            let tail = free.tail(footer_at);
            let short = tail.filter(|tail| slot.place_aligned(*tail).is_none());
            short.filter(|tail| free.take(*tail))
        };
        let extended = self.extend_from(rest, more);
        if let (Err(_), Some(rest)) = (&extended, rest) {
            self.space.free().give_back(rest);
        }
        extended
    }

    /// Extends the file by `more` bytes, and one slot at least, which begins with `rest`: the end of the free
    /// space, taken, and too short for one.
    fn extend_from(&self, rest: Option<FileRange>, more: u64) -> Result<(), DiskError> {
        let old_len = self.file_len();
        let footer_at = FileOffset::new(old_len.saturating_sub(FOOTER_LEN));
        let slot = self.geometry.slot;
        let rest = rest.map_or(footer_at, |rest| rest.start);
        let first = FileOffset::new(round_up(rest.plus(slot.header_len).get(), slot.align))
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
        // From here on the space is free, only not yet clean.
        let zeroed = self
            .storage
            .write_zeroes(FileRange::between(rest, FileOffset::new(old_len)));
        self.durability.note_write();
        let result = zeroed
            .map_err(|error| DiskError::io("clear the old footer", error))
            .and_then(|()| self.sync());
        match result {
            Ok(()) => {
                let added = FileRange::between(rest, FileOffset::new(end));
                self.space.free().give_back_clean(added);
            }
            // The caller gives back what is in front.
            Err(_) => {
                let added = FileRange::between(footer_at, FileOffset::new(end));
                self.space.free().give_back(added);
            }
        }
        result
    }

    /// Cuts the free space at the end of the file off: see [`Image::cut`].
    pub(super) fn cut_tail(&self, how: Cut) -> Result<bool, DiskError> {
        self.check_writable()?;
        if self.map.is_empty() {
            return Ok(false);
        }
        self.sync()?;
        let _absent = self.space.absent();
        let old_len = self.file_len();
        let old_end = FileOffset::new(old_len.saturating_sub(FOOTER_LEN));
        let (tail, more) = match self.space.take_tail(old_end, SECTOR_SIZE, 1, how)? {
            Tail::Nothing => return Ok(false),
            Tail::Hollowed => {
                self.durability.note_write();
                return Ok(true);
            }
            Tail::Taken { range, more } => (range, more),
        };
        match self.cut_at(tail, old_len) {
            Ok(true) => Ok(more),
            Ok(false) => {
                self.space.free().give_back(tail);
                Ok(false)
            }
            Err(error) => {
                if self.durability.check().is_ok() {
                    self.space.free().give_back(tail);
                }
                match error {
                    // Not one block is left on the host. The file is good as it is, only longer.
                    DiskError::NoSpace(_) => {
                        log::warn!("{} unused bytes stay in a file: the host is full", tail.len);
                        Ok(false)
                    }
                    other => Err(other),
                }
            }
        }
    }

    /// Cuts the file of `old_len` bytes where `tail`, which is taken, starts; says whether it did: not if the
    /// file has grown meanwhile.
    fn cut_at(&self, tail: FileRange, old_len: u64) -> Result<bool, DiskError> {
        let new_end = tail.start;
        let written = match self.write_footer(new_end) {
            // The tail is free: its space is what the footer may need.
            Err(DiskError::NoSpace(_)) if self.storage.punch_hole(tail).is_ok() => {
                self.durability.note_write();
                self.sync().and_then(|()| self.write_footer(new_end))
            }
            other => other,
        };
        // Nobody is kept from allocating until here: what is in front of the tail is as it was.
        written.and_then(|()| self.sync())?;
        let _length = self.space.lock_length();
        if self.file_len() != old_len {
            return Ok(false);
        }
        let new_len = new_end.plus(FOOTER_LEN).get();
        if let Err(error) = self.storage.set_len(new_len) {
            // A host may cut and fail nevertheless: what is behind its end is not ours to give out.
            return Err(match self.storage.len().ok() == Some(old_len) {
                true => DiskError::io("cut the file", error),
                false => self.durability.poison("cut the file", error),
            });
        }
        self.space.set_file_len(new_len);
        self.durability.note_write();
        Ok(true)
    }

    fn write_footer(&self, at: FileOffset) -> Result<(), DiskError> {
        let footer = self.footer.lock().to_bytes();
        let written = self.storage.write_all_at(&footer, at);
        self.durability.note_write();
        written.map_err(|error| DiskError::io("write the footer", error))
    }
}
