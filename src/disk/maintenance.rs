//! The room where a disk is maintained: the operations that compaction is made of, each of them safe beside
//! a guest that reads and writes.
//!
//! Policy stands above ([`crate::compact`] decides what is done to which block, and when); how it is done to
//! a block without losing what a guest writes meanwhile is decided here, and nowhere else. Nobody outside
//! of `disk` has the gates, the tracker or the image of a disk.
//!
//! ```text
//!   scan      finds out which granules of a block are zero                      [scan.rs]
//!   compare   drops a block that holds what the parent has                      [same.rs]
//!   drop      takes dead blocks out of the block table                          [retire.rs]
//!   relocate  moves blocks to other slots                                       [relocate.rs]
//!   punch     gives zeros inside a live block back to the host                  [punch.rs]
//!   fixed     the same of disks that keep all of their blocks                   [fixed.rs]
//!   cut, clean  of the file's free space                                        [image/space.rs]
//! ```

mod fixed;
mod free_book;
mod punch;
mod relocate;
mod retire;
mod same;
mod scan;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

pub(crate) use fixed::Hollow;
pub(crate) use free_book::{Announcement, Doubt, FreeBook};
pub(crate) use punch::Punched;
pub use relocate::Move;
pub(crate) use relocate::{Added, Relocation};
pub(crate) use retire::Candidates;
pub(crate) use same::{Comparison, drop_if_same};
pub(crate) use scan::{Scanned, Scanner};

use super::{Disk, Tracker};
use crate::error::DiskError;
use crate::image::{Cut, Frame};
use crate::units::{BlockIndex, FileOffset, FileRange};

/// Blocks whose gates one operation holds at most, while it writes the block table.
pub(crate) const MOST: usize = 16;

/// The right to compact a disk, which one at a time has.
pub(crate) type Turn<'a> = MutexGuard<'a, ()>;

/// A disk as those see it who maintain it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maintenance<'a> {
    disk: &'a Disk,
}

impl Disk {
    /// What can be done to it beside its guest.
    pub(crate) fn maintenance(&self) -> Maintenance<'_> {
        Maintenance { disk: self }
    }

    /// Waits for the compaction that is under way, if there is one, and keeps others from beginning.
    pub(crate) fn take_turn(&self) -> Turn<'_> {
        self.compacting.lock()
    }

    /// As [`Self::take_turn`]; `None` where a compaction is under way.
    pub(crate) fn try_turn(&self) -> Option<Turn<'_>> {
        self.compacting.try_lock()
    }

    /// The tracker to go by: the disk's own or, where what is free counts as zero, that of the book.
    fn known<'a>(&'a self, book: Option<&'a FreeBook>) -> &'a Tracker {
        book.map_or(&self.tracker, |book| &book.tracker)
    }

    /// Remembers that bytes go which may have been read before.
    fn note_free_goes(&self) {
        self.gave_up_free.store(true, Ordering::Release);
    }

    /// Whether, since this was asked last, bytes went that only the guest's filesystems call free.
    pub(crate) fn took_free(&self) -> bool {
        self.gave_up_free.swap(false, Ordering::AcqRel)
    }
}

/// What there is.
impl<'a> Maintenance<'a> {
    /// Fails where the disk takes no changes.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`], [`DiskError::Poisoned`].
    pub(crate) fn check_writable(self) -> Result<(), DiskError> {
        self.disk.image.check_writable()
    }

    /// Whether another program waits to open the file: what no guest asked for ends then.
    pub(crate) fn is_wanted(self) -> bool {
        self.disk.image.storage().is_wanted()
    }

    /// How many blocks the disk has.
    pub(crate) fn block_count(self) -> u32 {
        self.disk.image.map().len()
    }

    /// All blocks.
    pub(crate) fn blocks(self) -> impl Iterator<Item = BlockIndex> + use<> {
        self.disk.image.map().blocks()
    }

    /// Where `block` lies in the file, if it does.
    pub(crate) fn slot_of(self, block: BlockIndex) -> Option<FileOffset> {
        self.disk.image.map().get(block).slot()
    }

    /// The blocks that have a slot, with it, in order of their numbers. What a damaged table has behind the
    /// end of the file, there is nothing of.
    pub(crate) fn slots(self) -> impl Iterator<Item = (BlockIndex, FileOffset)> + use<'a> {
        let end = FileOffset::new(self.disk.image.file_len());
        (self.disk.image.map().present()).filter(move |(_, slot)| *slot < end)
    }

    /// How many blocks have a slot.
    pub(crate) fn present_count(self) -> u64 {
        self.disk.image.map().present_count()
    }

    /// Blocks in which something is new since this was asked last; `None` where all are to be looked at.
    pub(crate) fn take_news(self) -> Option<Vec<BlockIndex>> {
        self.disk.tracker.news().take()
    }

    /// Has the next who asks for news look at `block`.
    pub(crate) fn note_news(self, block: BlockIndex) {
        self.disk.tracker.news().note(block);
    }

    /// Has the next who asks for news look at all blocks.
    pub(crate) fn note_all_news(self) {
        self.disk.tracker.news().note_all();
    }

    /// How often `block` was written to lately, at most 255 times: halved with each [`Self::cool`].
    pub(crate) fn heat(self, block: BlockIndex) -> u8 {
        self.disk.gates.heat(block)
    }

    /// Has what was written so far count half as much as what will be.
    pub(crate) fn cool(self) {
        self.disk.gates.cool();
    }

    /// Bytes of zeros inside blocks that are not dead, that the host may still store.
    pub(crate) fn zeros_inside(self, book: Option<&FreeBook>) -> u64 {
        self.disk.known(book).punchable_bytes()
    }

    /// Blocks without a slot that keep a place in the file for themselves: [`Self::drop_blocks`] gives it up.
    pub(crate) fn kept_for(self) -> Vec<(FileOffset, BlockIndex)> {
        self.disk.image.kept_for()
    }

    /// What the end of the file depends on once the blocks are gone that `is_dead` says.
    pub(crate) fn frame(self, is_dead: &dyn Fn(BlockIndex) -> bool) -> Frame {
        self.disk.image.frame(is_dead)
    }

    /// The free ranges of the file, sorted.
    pub(crate) fn free_runs(self) -> Vec<FileRange> {
        self.disk.image.free_runs()
    }

    /// Bytes of the file that are free with the next sync.
    pub(crate) fn awaiting_bytes(self) -> u64 {
        self.disk.image.awaiting_bytes()
    }

    /// Free bytes of the file that [`Self::punch_free`] would give back to the host.
    pub(crate) fn punchable_free(self) -> u64 {
        self.disk.image.punchable_bytes()
    }

    /// Bytes that the host stores for `range` of the file.
    ///
    /// # Errors
    /// Where the host cannot tell.
    pub(crate) fn stored_in(self, range: FileRange) -> Result<u64, DiskError> {
        let mut stored = 0;
        let mut from = range.start;
        let next = |from| self.disk.image.storage().next_data(from, range.end());
        while let Some(data) =
            next(from).map_err(|error| DiskError::io("look for holes in the file", error))?
        {
            stored += data.len;
            from = data.end();
        }
        Ok(stored)
    }
}

/// What is done to the file as a whole.
impl Maintenance<'_> {
    /// Makes all that was done durable.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub(crate) fn sync(self) -> Result<(), DiskError> {
        self.disk.image.sync()
    }

    /// Gives up blocks of metadata that no block needs any more, durably with the next sync.
    ///
    /// # Errors
    /// The image's.
    pub(crate) fn drop_unused_metadata(self) -> Result<(), DiskError> {
        self.disk.image.drop_unused_metadata()
    }

    /// Moves the block of metadata in `from` to `to`, durably; says whether it did.
    ///
    /// # Errors
    /// The image's.
    pub(crate) fn move_metadata(self, from: FileRange, to: FileOffset) -> Result<bool, DiskError> {
        self.disk.image.move_metadata(from, to)
    }

    /// Cuts the free space at the end of the file off, or comes nearer to it; says whether there is more.
    ///
    /// # Errors
    /// The image's.
    pub(crate) fn cut(self, how: Cut) -> Result<bool, DiskError> {
        self.disk.image.cut(how)
    }

    /// Gives about `most` bytes of free space inside the file back to the host, and a bounded part in any
    /// case; says whether there is more.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn punch_free(self, most: u64) -> Result<bool, DiskError> {
        self.disk.image.punch_free(most)
    }

    /// Bytes that the host has left, if that is known.
    pub(crate) fn host_room(self) -> Option<u64> {
        self.disk.image.storage().room()
    }

    /// Whether a batch of moves is under way.
    #[cfg(test)]
    pub(crate) fn has_moves(self) -> bool {
        self.disk.withheld.any()
    }

    /// Makes free space inside the file of use while the host is full; says whether there was any.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn make_room(self) -> Result<bool, DiskError> {
        self.disk.image.make_room(self.disk.image.room_gained())
    }
}

/// Who may write.
impl Disk {
    /// Says that somebody may write from now on, who [waits](Self::wait_to_write) before he does.
    pub(crate) fn announce_writing(&self) {
        self.writers.announce();
    }

    /// Waits for work that nobody who may write must meet: no longer than one commit.
    pub(crate) fn wait_to_write(&self) {
        self.writers.wait();
    }

    /// Whether somebody may write.
    pub(crate) fn has_writers(&self) -> bool {
        !self.writers.none()
    }
}
