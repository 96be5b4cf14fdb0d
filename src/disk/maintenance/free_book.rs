//! What is believed to be free in a disk's blocks, kept in a book of its own: it counts as zero there, for
//! the bytes are still in the file and the guest's view of them must not be mistaken.

use std::ops::Range;

use rangemap::RangeSet;

use crate::disk::{Disk, Tracker};
use crate::error::DiskError;
use crate::units::{BlockIndex, FileOffset, GRANULE_SIZE, low_u32, round_down, round_up};

/// Ranges of a disk that may become zeros though they hold something else, and what that makes of blocks.
#[derive(Debug)]
pub(crate) struct FreeBook {
    /// In disk offsets.
    free: RangeSet<u64>,
    /// What each block holds if what is free counts as zero.
    pub(super) tracker: Tracker,
    /// The disk's count of changes before anybody looked for what is free.
    at: u64,
}

impl FreeBook {
    /// Of what was found `free` on `disk`, whose count of changes was `at` before.
    pub(crate) fn new(disk: &Disk, free: RangeSet<u64>, at: u64) -> Self {
        let book = Self {
            free,
            tracker: disk.tracker.snapshot(),
            at,
        };
        book.enter_free(disk);
        book
    }

    /// All that is free, in disk offsets.
    pub(crate) fn free(&self) -> &RangeSet<u64> {
        &self.free
    }

    /// What is free of `block`, in bytes from its start.
    pub(crate) fn free_in(
        &self,
        disk: &Disk,
        block: BlockIndex,
    ) -> impl Iterator<Item = Range<u64>> + '_ {
        let start = disk.offset_of(block);
        let end = start + disk.geometry().block_size;
        (self.free.overlapping(start..end))
            .map(move |free| free.start.max(start) - start..free.end.min(end) - start)
    }

    /// Counts what is free of the blocks that are present as zero.
    fn enter_free(&self, disk: &Disk) {
        let block_size = disk.geometry().block_size;
        let blocks = self.free.iter().flat_map(|free| {
            let last = (free.end - 1).min(disk.len() - 1) / block_size;
            free.start / block_size..=last
        });
        let mut done = None;
        for number in blocks {
            if done.replace(number) == Some(number) {
                continue;
            }
            let block = BlockIndex::new(low_u32(number));
            let Some(slot) = disk.image.map().get(block).slot() else {
                continue;
            };
            for free in self.free_in(disk, block) {
                self.enter_part(disk, block, slot, free);
            }
            // The disk may end inside its last block: what is behind, nobody can read.
            let end = disk.len().saturating_sub(disk.offset_of(block));
            if end < block_size {
                self.tracker.note_zero(block, end, block_size - end, false);
            }
        }
    }

    /// Counts `free`, bytes of `block` in its `slot`, as zero, stored where the host has data.
    fn enter_part(&self, disk: &Disk, block: BlockIndex, slot: FileOffset, free: Range<u64>) {
        let note = |part: Range<u64>, stored| {
            (self.tracker).note_zero(block, part.start, part.end - part.start, stored);
        };
        let start = disk.geometry().data_at(slot);
        let end = start.plus(free.end);
        let mut from = start.plus(free.start);
        note(free.clone(), false);
        loop {
            match disk.image.storage().next_data(from, end) {
                Ok(None) => return,
                Ok(Some(data)) => {
                    let part = round_down(data.start.since(start), GRANULE_SIZE).max(free.start)
                        ..round_up(data.end().since(start), GRANULE_SIZE).min(free.end);
                    note(part, true);
                    from = data.end();
                }
                // It cannot tell.
                Err(_) => return note(free, true),
            }
        }
    }

    /// Whether nothing was written since the count of changes was taken. The answer stays right for a block
    /// while its gate is held.
    pub(crate) fn is_untouched(&self, disk: &Disk) -> bool {
        disk.io_count() == self.at
    }
}

/// Why nothing goes any more that only filesystems call free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Somebody opened the disk for writing.
    WriterCame,
    /// It was written to, unannounced.
    Written,
}

impl Doubt {
    /// For people.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::WriterCame => "somebody opened the disk for writing",
            Self::Written => "the disk was written to meanwhile",
        }
    }
}

/// What was said, durably, before bytes go that only filesystems call free: others may have read them, caches
/// above the disk and disks over it. The latter then no longer take it for their parent, if its format can
/// say so.
#[derive(Debug, Default)]
pub(crate) struct Announcement {
    /// Whether children of the disk as it was refuse it by now.
    is_disowned: bool,
    /// Whether the disk got another identity by it.
    pub(crate) new_identity: bool,
    /// No child of the disk is anywhere: it keeps its identity.
    keeps_identity: bool,
}

impl Announcement {
    /// Nothing said yet. `keeps_identity`: of a disk that has no child anywhere, so that none need refuse it.
    pub(crate) fn new(keeps_identity: bool) -> Self {
        Self {
            keeps_identity,
            ..Self::default()
        }
    }

    /// Whether the disk stays for its children what it is.
    pub(crate) fn keeps_identity(&self) -> bool {
        self.keeps_identity
    }

    /// # Errors
    /// Where the image cannot be given its new identity: then nothing may go.
    pub(super) fn make(&mut self, disk: &Disk) -> Result<(), DiskError> {
        // In each run: what a guest has written gave the disk another identity, but a copy may have that by
        // now, and a child.
        if !self.is_disowned && !self.keeps_identity {
            let before = disk.identity();
            disk.image.disown()?;
            self.new_identity = disk.identity() != before;
            self.is_disowned = true;
        }
        disk.note_free_goes();
        Ok(())
    }
}
