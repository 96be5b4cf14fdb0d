//! How a VHDX grows and is cut. Its length is a multiple of 1 MiB once either has happened.
//!
//! It grows by a quarter of its length, so that the one sync that makes the new space clean is rare; where
//! the host does not let it get as long as that, by one slot.
//! The log's entries state the length: see [`super::session`].

use super::Vhdx;
use crate::error::DiskError;
use crate::format::DiskType;
use crate::format::vhdx::MIB;
use crate::image::{Cut, Image, Tail};
use crate::units::{FileOffset, FileRange, round_up};

/// Bounds of one extension of the file, in bytes.
const MIN_GROWTH: u64 = 16 << 20;
const MAX_GROWTH: u64 = 1 << 30;
/// No host has longer files.
const MAX_FILE_LEN: u64 = u64::MAX >> 1;

impl Vhdx {
    /// Extends the file by some slots. The length lock is held.
    pub(super) fn grow(&self) -> Result<(), DiskError> {
        let file_len = || self.file.space.file_len();
        let len = file_len();
        let absent = u64::from(self.map.len()).saturating_sub(self.map.present_count());
        let wanted = absent.saturating_mul(self.geometry.slot.len);
        match self.extend((len / 4).clamp(MIN_GROWTH, MAX_GROWTH).min(wanted.max(1))) {
            Err(DiskError::NoSpace(_)) if file_len() == len => self.extend(1),
            other => other,
        }
    }

    /// Extends the file by `more` bytes in whole slots.
    fn extend(&self, more: u64) -> Result<(), DiskError> {
        let file = &self.file;
        let slot_len = self.geometry.slot.len;
        let old_len = file.space.file_len();
        let more = round_up(more, slot_len);
        let new_len = round_up(old_len, MIB).saturating_add(more);
        if new_len > MAX_FILE_LEN {
            return Err(DiskError::NoSpace(None));
        }
        if let Err(error) = self.storage().set_len(new_len) {
            // What it may have got longer is cut by the next open.
            if let Err(error) = self.storage().set_len(old_len) {
                log::warn!("a file may have stayed longer than it need be: {error}");
            }
            return Err(DiskError::io("extend the file", error));
        }
        file.space.set_file_len(new_len);
        file.note_growth(new_len, false);
        file.durability.note_write();
        let rest = self.clean_rest(FileOffset::new(old_len));
        let added = FileRange::between(rest, FileOffset::new(new_len));
        let result = file.sync();
        match result {
            Ok(()) => {
                file.note_growth(new_len, true);
                file.space.free().give_back_clean(added);
            }
            Err(_) => file.space.free().give_back(added),
        }
        result
    }

    /// Takes and zeroes the free space in front of `end` that is too short for a slot, so that it
    /// joins what follows. Says where it starts.
    fn clean_rest(&self, end: FileOffset) -> FileOffset {
        let space = &self.file.space;
        let rest = {
            let mut free = space.free();
            let short = (free.tail(end)).filter(|tail| tail.len < self.geometry.slot.len);
            short.filter(|tail| free.take(*tail))
        };
        let Some(rest) = rest else {
            return end;
        };
        match space.zero_free(rest) {
            Ok(()) => rest.start,
            // A full host: it stays as it is.
            Err(_) => {
                space.free().give_back(rest);
                end
            }
        }
    }

    /// Cuts the free space at the end of the file off: see [`Image::cut`].
    pub(super) fn cut_tail(&self, how: Cut) -> Result<bool, DiskError> {
        self.check_writable()?;
        let blocks = u64::from(self.map.len());
        let is_fixed = self.geometry.disk_type == DiskType::Fixed;
        if is_fixed && self.map.present_count() < blocks {
            // It keeps room for blocks that have no place yet.
            return Ok(false);
        }
        // Nobody minds what a fixed disk has beyond, as long as no block fits in.
        let least = if is_fixed { self.geometry.slot.len } else { 1 };
        let space = &self.file.space;
        self.sync()?;
        let _absent = space.absent();
        let old_len = space.file_len();
        let (tail, more) = match space.take_tail(FileOffset::new(old_len), MIB, least, how)? {
            Tail::Nothing => return Ok(false),
            Tail::Hollowed => {
                self.file.durability.note_write();
                return Ok(true);
            }
            Tail::Taken { range, more } => (range, more),
        };
        match self.file.cut(old_len, tail.start.get()) {
            Ok(true) => Ok(more),
            Ok(false) => {
                space.free().give_back(tail);
                Ok(false)
            }
            Err(error) => {
                if self.file.durability.check().is_ok() {
                    space.free().give_back(tail);
                }
                match error {
                    // The file is good as it is, only longer.
                    DiskError::NoSpace(_) => {
                        log::warn!("{} unused bytes stay in a file: the host is full", tail.len);
                        Ok(false)
                    }
                    other => Err(other),
                }
            }
        }
    }
}
