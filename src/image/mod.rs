//! One image file: the only place that writes its metadata.
//!
//! An [`Image`] knows where each block lies and changes that; it never touches what a guest stores
//! in a block, which is [`crate::disk`]'s business. Guest data goes straight between the disk and
//! [`Image::storage`].
//!
//! # What is durable when
//! [`Image::commit`] writes the block table and returns; its effect survives the death of the
//! process at once and a power cut after the next [`Image::sync`]. So that any subset of unsynced
//! writes is a legal state, whoever commits a placement has either
//! 1. synced the block's bytes in its new slot before, or
//! 2. taken the slot from [`Image::reserve`], which is durably zero: then a crash can only show
//!    zeros where the block was unallocated before, or data written since.
//!
//! A slot that a commit freed is given out again only after a sync that began after it.

// Numbers from files meet here: every sum says what happens when it does not fit.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod claims;
mod durability;
mod foreign;
mod identify;
mod lost;
mod open;
mod relink;
mod report;
mod space;
pub mod vhd;
pub mod vhdx;

use std::ops::Range;
use std::sync::Arc;

use crate::error::DiskError;
use crate::format::parent::{Identity, ParentLink};
use crate::format::sector_bitmap::SectorBitmap;
use crate::format::{DiskType, Format};
use crate::map::{BlockMap, SlotShape};
use crate::storage::Storage;
use crate::units::{BlockIndex, FileOffset, FileRange};

pub(crate) use durability::Durability;
pub use identify::{Identified, identify};
pub(crate) use lost::Lost;
pub(crate) use open::{Fits, LayoutError, is_named_vhd, open_if, read_array};
pub use open::{ImageOptions, Opened, Probe, detect, glance, open, probe};
pub use relink::{relink, renew_identity};
pub use report::CheckReport;
pub(crate) use report::Repair;
pub(crate) use space::{Space, Tail};

/// Sizes that do not change while an image is open.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// The format.
    pub format: Format,
    /// How the image stores its disk.
    pub disk_type: DiskType,
    /// Whether disk offsets are file offsets and the block map is empty: a fixed VHD.
    pub is_flat: bool,
    /// Whether the table can say of a block that it reads as zeros though the parent has data.
    pub has_zero_state: bool,
    /// Bytes in a sector of the disk, as sector bitmaps count them: 512 or 4096.
    pub sector_size: u64,
    /// Bytes that the disk tells its guest to write at a time: 512 or 4096.
    pub physical_sector_size: u64,
    /// The disk's size in bytes.
    pub disk_len: u64,
    /// Bytes of data in a block. The last block may reach beyond the disk's end.
    pub block_size: u64,
    /// The form of a slot.
    pub slot: SlotShape,
}

impl Geometry {
    /// Where the data of the block in `slot` starts.
    pub fn data_at(&self, slot: FileOffset) -> FileOffset {
        slot.plus(self.slot.header_len)
    }

    /// The bytes of the file that the slot at `slot` covers.
    pub fn slot_range(&self, slot: FileOffset) -> FileRange {
        FileRange::new(slot, self.slot.len)
    }

    /// The bytes of the file that hold the data of the block in `slot`.
    pub fn data_range(&self, slot: FileOffset) -> FileRange {
        FileRange::new(self.data_at(slot), self.block_size)
    }
}

/// One change of the block table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapEdit {
    /// A block without a slot gets one.
    Place {
        /// The block.
        block: BlockIndex,
        /// Its slot, reserved by the caller and made ready by [`Image::prepare`].
        slot: FileOffset,
        /// Which of its sectors are in the slot, the same as given to [`Image::prepare`]; `None`:
        /// all. The others read as the parent has them.
        sectors: Option<Range<u64>>,
    },
    /// More sectors of a block that is present, but not whole, are in its slot. Only in a
    /// differencing image.
    Write {
        /// The block.
        block: BlockIndex,
        /// These sectors of the block, not empty.
        sectors: Range<u64>,
    },
    /// A block's slot becomes another one, to which all of the old one was copied.
    Move {
        /// The block.
        block: BlockIndex,
        /// Its new slot, reserved by the caller.
        to: FileOffset,
    },
    /// A block loses its slot, if it has one.
    Drop {
        /// The block.
        block: BlockIndex,
        /// What it reads as from then on.
        reads: Reads,
    },
}

/// What a block without a slot reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Zeros. Of an image with a parent, only where [`Geometry::has_zero_state`].
    Zeros,
    /// What the parent has; zeros where there is no parent.
    Parent,
}

impl MapEdit {
    /// The block that changes.
    pub fn block(&self) -> BlockIndex {
        match *self {
            Self::Place { block, .. }
            | Self::Write { block, .. }
            | Self::Move { block, .. }
            | Self::Drop { block, .. } => block,
        }
    }
}

/// How much of the free space at the end of a file is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Bytes of it that stay.
    pub spare: u64,
    /// Bytes that the host is to give up at a time, about; at least a slot.
    pub most: u64,
}

impl Cut {
    /// All of it, at once.
    pub const ALL: Self = Self {
        spare: 0,
        most: u64::MAX,
    };
}

/// What a compaction plans with: the space of the file that is not up to it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Where the first slot may start.
    pub start: FileOffset,
    /// Used space behind `start` that is no block's and cannot move, sorted.
    pub pinned: Vec<FileRange>,
    /// Blocks of metadata that can move like slots: a VHDX's sector-bitmap blocks. Sorted.
    pub movable: Vec<FileRange>,
    /// Bytes that follow the last thing in use: the footer.
    pub trailer_len: u64,
    /// The file's length is a multiple of this.
    pub align: u64,
}

/// An open image file, shared by all threads.
///
/// Methods that change a block's place are called with that block's gate held exclusively; the
/// image itself keeps table, free space and file length right under any concurrency.
pub trait Image: Send + Sync + std::fmt::Debug {
    /// Its sizes.
    fn geometry(&self) -> &Geometry;

    /// The program that made it, for people; empty where the image does not say.
    fn creator(&self) -> String;

    /// Which disk it is: what its children refer to.
    fn identity(&self) -> Identity;

    /// What a differencing image says of its parent; `None` for others.
    fn parent(&self) -> Option<&ParentLink>;

    /// The host file, for guest data.
    fn storage(&self) -> &Arc<dyn Storage>;

    /// Where each block lies.
    fn map(&self) -> &BlockMap;

    /// The file's length in bytes, as last set.
    fn file_len(&self) -> u64;

    /// Which sectors of the present block `block` are in its slot. Cached within a byte budget.
    ///
    /// # Errors
    /// Where the host file cannot be read.
    fn sector_bitmap(&self, block: BlockIndex) -> Result<Arc<SectorBitmap>, DiskError>;

    /// Makes the present block `block` of an image without a parent whole: the sectors that were
    /// not in its slot become zeros there. Needed before a block that is not whole is written to.
    ///
    /// # Errors
    /// Where the host file cannot be read or written; the block then reads as before.
    fn make_whole(&self, block: BlockIndex) -> Result<(), DiskError>;

    /// Takes a slot that is durably zero. Extends the file or cleans free space where there is none.
    /// The caller places a block in it or gives it back.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] where the host or the format has no room, [`DiskError::Poisoned`].
    fn reserve(&self) -> Result<FileOffset, DiskError>;

    /// Takes the slot at `slot` for a move, if all of it is free. Says whether it is known to read
    /// as zeros (and may take up no host space yet), or `None` where it is not free.
    fn reserve_at(&self, slot: FileOffset) -> Option<Reserved>;

    /// Gives a reserved slot back. It may have been written to.
    fn give_back(&self, slot: FileOffset);

    /// Writes what a slot needs beside data before [`MapEdit::Place`] names it (for VHD the sector
    /// bitmap, with the bits of `sectors`, or all).
    ///
    /// # Errors
    /// Where the host refuses; the slot may have been written to.
    fn prepare(&self, slot: FileOffset, sectors: Option<Range<u64>>) -> Result<(), DiskError>;

    /// Writes `edits` to the block table and then to the map. See the module for what must be
    /// durable before, and what is durable when.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`], or a failure to read metadata: edits that were not made have changed
    /// nothing, and the slots that they name are free again. Any other failure poisons the image.
    fn commit(&self, edits: &[MapEdit]) -> Result<(), DiskError>;

    /// Does what the next commits would have to wait for the host's disk for, without keeping anybody else
    /// from committing longer than that takes in any case: called before gates are taken that a guest may
    /// want.
    ///
    /// # Errors
    /// As [`Self::commit`].
    fn prepare_commit(&self) -> Result<(), DiskError>;

    /// Announces a change of what a guest reads; called before each. Costs nothing but for the first
    /// since the image was opened or closed: of a VHDX, that is made known in its headers, durably,
    /// so that children of an earlier state no longer take it for their parent.
    ///
    /// # Errors
    /// As [`Self::check_writable`]; where the host refuses, nothing has changed.
    fn begin_change(&self) -> Result<(), DiskError>;

    /// Has every child of the disk, as it was until now, refuse it from here on, durably: a VHDX by a new
    /// `DataWriteGuid`, a fixed VHD by a new `UniqueID`, which is in the one sector of its footer. Another
    /// VHD has its identity in two places, and keeps it.
    ///
    /// # Errors
    /// As [`Self::begin_change`].
    fn disown(&self) -> Result<(), DiskError>;

    /// Notes that guest data was written, so that the next sync has something to do. Called after
    /// the write and before it is acknowledged.
    fn note_payload(&self);

    /// Has the host write to its device what was written in `range`, as [`Storage::write_back`] does, so that
    /// the next sync has less to do.
    ///
    /// # Errors
    /// As [`Self::sync`].
    fn write_back(&self, range: FileRange) -> Result<(), DiskError>;

    /// Makes everything that was written or committed before the call durable. Costs nothing when
    /// there was nothing; concurrent callers share one host sync.
    ///
    /// # Errors
    /// A failure poisons the image: what is on the host is unknown.
    fn sync(&self) -> Result<(), DiskError>;

    /// Moves the block of metadata in `from`, one of [`Frame::movable`], to the free space at `to`.
    /// Durable on return. Says whether it did: not where `to` is not free, or `from` is no longer
    /// what it was.
    ///
    /// # Errors
    /// Where the host refuses: then nothing has changed, or the image is poisoned.
    fn move_metadata(&self, from: FileRange, to: FileOffset) -> Result<bool, DiskError>;

    /// The places in the file that blocks without a slot keep for themselves (a VHDX's unmapped
    /// blocks), in order of their places. [`MapEdit::Drop`] gives them up.
    fn kept_for(&self) -> Vec<(FileOffset, BlockIndex)>;

    /// Leaves the file as one that nobody has open: for a VHDX without a log to replay. Everything is
    /// durable on return. A further change is possible.
    ///
    /// # Errors
    /// As [`Self::sync`].
    fn settle(&self) -> Result<(), DiskError>;

    /// Cuts free space off the end of the file, or has the host give up a part of it so that a later call
    /// can; says whether there is more to be cut. Durable with the next sync. Nobody who allocates waits
    /// for a sync of it.
    ///
    /// # Errors
    /// Where the host refuses; the file is then as it was, or longer than it need be.
    fn cut(&self, how: Cut) -> Result<bool, DiskError>;

    /// Gives the host space of free ranges back to the host, about `most` bytes of it and a bounded part in
    /// any case; says whether there is more. Does nothing where hole punching is off. Nobody who allocates
    /// waits for it; what is being punched is nobody's meanwhile.
    ///
    /// # Errors
    /// Where the host refuses for another reason than that it cannot punch.
    fn punch_free(&self, most: u64) -> Result<bool, DiskError>;

    /// How often space of the file was given back to the host.
    fn room_gained(&self) -> u64;

    /// Makes free space inside the file of use when the host is full: gives all of it back to the
    /// host or, where hole punching is off, has some of it ready for [`Self::reserve`]. Says whether
    /// there was any, or whether [`Self::room_gained`] is more than `seen`: then somebody else was faster.
    ///
    /// # Errors
    /// Where the host refuses.
    fn make_room(&self, seen: u64) -> Result<bool, DiskError>;

    /// Free bytes that [`Self::punch_free`] would give back to the host; 0 where it does nothing.
    fn punchable_bytes(&self) -> u64;

    /// The free ranges, sorted.
    fn free_runs(&self) -> Vec<FileRange>;

    /// Bytes that are free with the next sync.
    fn awaiting_bytes(&self) -> u64;

    /// What compaction plans with: as it is once the blocks that `is_dead` says are dropped, and the
    /// metadata that none of the others needs is given up.
    fn frame(&self, is_dead: &dyn Fn(BlockIndex) -> bool) -> Frame;

    /// Gives up blocks of metadata that no block needs any more, durably with the next sync.
    ///
    /// # Errors
    /// As [`Self::move_metadata`].
    fn drop_unused_metadata(&self) -> Result<(), DiskError>;

    /// Fails where the image takes no more changes.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`], [`DiskError::Poisoned`].
    fn check_writable(&self) -> Result<(), DiskError>;
}

/// What [`Image::reserve_at`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// Whether the slot reads as zeros, durably.
    pub clean: bool,
}
