//! A block and the copy that it moves to.
//!
//! # How a block moves while guests write to it
//! 1. Reserve the target, and have the block make a twin there: from here on what guests change in
//!    place, they change in the copy, too, as far as it goes (`mirror.rs`).
//! 2. Copy the slot, piece by piece ([`Twin::copy`]).
//! 3. Sync: what was flushed of the block so far is durable in both slots, and so is whatever a guest flushes from
//!    here on, for it is written to both before it is acknowledged.
//! 4. Under the block's exclusive gate, where no write is under way: if [`Twin::is_whole`], commit the new
//!    place.
//! 5. End the twin; sync; only then is the old slot free. Where it was not whole, end the twin, and only then
//!    give the target back.
//!
//! Anything but a change in place (a first write to a part of a child's block, its drop, a new slot) gives the
//! twin up, and so does a failed write to the copy: the block stays where it is, and the guest notices
//! nothing.

use std::sync::Arc;

use super::gate::Watch;
use super::mirror::Mirror;
use super::{Disk, Gates};
use crate::error::DiskError;
use crate::units::{BlockIndex, FileOffset, FileRange};

/// A block that is being copied to another slot. No guest writes there any more once it is dropped.
#[derive(Debug)]
pub(crate) struct Twin {
    mirror: Arc<Mirror>,
    /// What guests find the mirror by.
    _watch: Watch,
    from: FileOffset,
}

impl Twin {
    /// Has `block`, which lies at `from`, make a copy at `to`, a reserved slot; `None` where the block is no
    /// longer there. Waits for what is under way at the block.
    pub(crate) fn new(
        disk: &Disk,
        block: BlockIndex,
        from: FileOffset,
        to: FileOffset,
    ) -> Option<Self> {
        let mirror = Arc::new(Mirror::new(to));
        let watch = Gates::mirror(&disk.gates, block, Arc::clone(&mirror));
        let twin = Self {
            mirror,
            _watch: watch,
            from,
        };
        // What takes it elsewhere from here on gives the twin up.
        let is_here = disk.image.map().get(block).slot() == Some(from);
        is_here.then_some(twin)
    }

    /// Copies the next piece, of at most `most` bytes, and what guests write to it meanwhile once more; says
    /// how many bytes that were. A guest that writes to the piece waits for the second copy, if there is one.
    /// Where guests may sync the file at any moment the piece is to be `written_back`.
    ///
    /// # Errors
    /// Where the host cannot copy. The twin is given up.
    pub(crate) fn copy(
        &self,
        disk: &Disk,
        most: u64,
        written_back: bool,
    ) -> Result<u64, DiskError> {
        let copied = self.mirror.copied();
        let end = (disk.geometry().slot.len).min(copied.saturating_add(most));
        let to = self.mirror.slot();
        let storage = disk.image.storage();
        let copy = self.mirror.copy(end, |part| {
            let range = FileRange::new(self.from.plus(part.start), part.end - part.start);
            storage.copy_within(range, to.plus(part.start))
        });
        disk.image.note_payload();
        copy.map_err(|error| DiskError::io("copy a block", error))?;
        if written_back {
            let piece = FileRange::new(to.plus(copied), end - copied);
            disk.image.write_back(piece)?;
        }
        Ok(end - copied)
    }

    /// Bytes of the slot that were copied.
    pub(crate) fn copied(&self) -> u64 {
        self.mirror.copied()
    }

    /// Whether it no longer follows.
    pub(crate) fn is_given_up(&self) -> bool {
        self.mirror.is_given_up()
    }

    /// Whether the copy is what the block holds, all of it. The answer stays right while the block's gate is
    /// held exclusively.
    pub(crate) fn is_whole(&self, disk: &Disk) -> bool {
        self.copied() == disk.geometry().slot.len && !self.is_given_up()
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.mirror.close();
    }
}
