//! ext2, ext3 and ext4.
//!
//! Each group of blocks has a bitmap; its descriptor says where, and how many are free. Everything
//! has to agree before it is believed:
//!
//! 1. the superblock, the descriptors and the bitmaps have the right checksums, where there are any;
//! 2. each bitmap has as many blocks free as its descriptor says, all of them together as many as the
//!    superblock says;
//! 3. the superblock's copies, all descriptors, bitmaps, inode tables and the journal are in use, and
//!    nothing lies at the place of another;
//! 4. the filesystem was unmounted and its journal is empty; or the journal can be replayed, in
//!    memory: then only what is free before and after counts as free.
//!
//! ```text
//!   superblock -> layout     the shape, where copies lie          [superblock.rs, layout.rs]
//!   journal    -> blocks     which blocks it has newer            [journal.rs, blocks.rs]
//!   groups     -> bitmaps    what is free, and whether all agree  [groups.rs, bitmaps.rs]
//! ```
//!
//! Memory: the metadata's places, a bitmap at a time, the free runs.

mod bitmaps;
mod blocks;
mod checksum;
mod features;
mod groups;
mod inode;
mod journal;
mod layout;
mod mmp;
mod superblock;
#[cfg(test)]
mod tests;

use zerocopy::FromBytes;

use self::bitmaps::Metadata;
use self::blocks::Blocks;
use self::journal::Journal;
use self::superblock::{Geometry, RawSuperblock, SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use super::view::View;
use super::{Rest, Trouble, Volume};
use crate::units::usize_from;

/// `s_state` of a filesystem that was unmounted, or has a journal, and knows of no error.
const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;

/// Whether the part begins like one of these filesystems, and which.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(view: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    if view.len() < SUPERBLOCK_AT + SUPERBLOCK_LEN {
        return Ok(None);
    }
    let raw = raw(&view.read(SUPERBLOCK_AT, SUPERBLOCK_LEN)?)?;
    Ok(raw.is_one().then(|| raw.features().name()))
}

/// Finds what is free.
///
/// # Errors
/// [`Trouble`] where anything is in doubt.
pub(super) fn read(view: &View<'_>) -> Result<Volume, Trouble> {
    let superblock = raw(&view.read(SUPERBLOCK_AT, SUPERBLOCK_LEN)?)?.parse()?;
    let disk = Blocks::on_disk(view, superblock.geometry.block_size);
    check_state(view, &superblock, &disk)?;
    let mut metadata = metadata(&disk, &superblock)?;
    let journal = journal(&disk, &superblock, &mut metadata)?;
    match (superblock.features.needs_recovery(), journal) {
        (false, journal) => unmounted(&superblock, &disk, &metadata, journal),
        (true, Some(journal)) => replayed(view, &superblock, &disk, &metadata, &journal),
        (true, None) => Err(Trouble::skip("needs its journal replayed, but has none")),
    }
}

/// What is free in a filesystem that was unmounted.
fn unmounted(
    superblock: &Superblock,
    disk: &Blocks<'_>,
    metadata: &Metadata,
    journal: Option<Journal>,
) -> Result<Volume, Trouble> {
    let geometry = &superblock.geometry;
    if superblock.last_orphan != 0 || superblock.has_orphan_mark() {
        return Err(orphans());
    }
    if journal.is_some_and(|journal| !journal.is_empty()) {
        return Err(Trouble::skip(
            "holds changes in its journal, but does not say so: let its own system check it",
        ));
    }
    let free = bitmaps::free(disk, None, geometry, metadata)?;
    let free_blocks = free.clusters * geometry.cluster_blocks;
    if free_blocks != superblock.free_blocks {
        return Err(Trouble::skip(format!(
            "has {free_blocks} free blocks, but counts {}",
            superblock.free_blocks
        )));
    }
    Ok(volume(geometry, free, Rest::Unmounted))
}

/// What is free in a filesystem that needs its journal replayed: what is free both as it lies on the
/// disk and as it is once that is done. The superblock's count of it is stale, and not looked at.
///
/// Right as long as whoever mounts it next does replay the journal, having forgotten everything else.
/// A machine that was suspended has not: it may have given out blocks, and written them, of which no
/// journal tells. Nothing on the disk tells that apart from a crash.
fn replayed(
    view: &View<'_>,
    superblock: &Superblock,
    disk: &Blocks<'_>,
    metadata: &Metadata,
    journal: &Journal,
) -> Result<Volume, Trouble> {
    let geometry = &superblock.geometry;
    let overlay = journal.replay(disk, geometry.blocks)?;
    let blocks = Blocks::replayed(view, geometry.block_size, overlay);
    let block = blocks.read(SUPERBLOCK_AT / geometry.block_size)?;
    let at = usize_from(SUPERBLOCK_AT % geometry.block_size);
    let after = raw(&block[at..at + usize_from(SUPERBLOCK_LEN)])?.parse()?;
    if after.geometry != *geometry {
        return Err(Trouble::skip("was being resized"));
    }
    check_state(view, &after, &blocks)?;
    if after.last_orphan != 0
        || after.has_orphan_mark()
            && inode::has_orphans(&blocks, geometry, after.orphan_file_inode)?
    {
        return Err(orphans());
    }
    let free = bitmaps::free(&blocks, Some(disk), geometry, metadata)?;
    Ok(volume(geometry, free, Rest::Replayed))
}

fn orphans() -> Trouble {
    Trouble::skip(
        "has files that were deleted or cut while they were open: let its own system mount and \
         unmount it once",
    )
}

fn raw(bytes: &[u8]) -> Result<RawSuperblock, Trouble> {
    RawSuperblock::read_from_bytes(bytes).map_err(|_| Trouble::skip("has no whole superblock"))
}

/// Whether the filesystem is one that may be read at all: it lies in its part, knows of no error, has
/// its journal with it, and nobody has it mounted.
fn check_state(
    view: &View<'_>,
    superblock: &Superblock,
    blocks: &Blocks<'_>,
) -> Result<(), Trouble> {
    let geometry = &superblock.geometry;
    let size = geometry.blocks.checked_mul(geometry.block_size);
    if size.is_none_or(|size| size > view.len()) {
        return Err(Trouble::skip(format!(
            "spans {} blocks of {} bytes, more than the {} bytes of its part",
            geometry.blocks,
            geometry.block_size,
            view.len()
        )));
    }
    if superblock.state & STATE_ERRORS != 0 {
        return Err(Trouble::skip(
            "is marked as having errors: let its own system check it",
        ));
    }
    if superblock.state != STATE_VALID {
        return Err(Trouble::skip(
            "was not unmounted cleanly: let its own system check it, or mount and unmount it",
        ));
    }
    if superblock.features.has_journal() && superblock.journal_elsewhere {
        return Err(Trouble::skip("has its journal on another device"));
    }
    match superblock.mmp_block {
        Some(block) => mmp::check(blocks, geometry, block),
        None => Ok(()),
    }
}

/// Where everything lies that is not a file.
fn metadata(blocks: &Blocks<'_>, superblock: &Superblock) -> Result<Metadata, Trouble> {
    let mut metadata = Metadata::of_groups(blocks, &superblock.geometry)?;
    if let Some(block) = superblock.mmp_block {
        metadata.add(block..block + 1)?;
    }
    Ok(metadata)
}

/// Opens the journal, if there is one. Where it lies is added to the metadata.
fn journal(
    blocks: &Blocks<'_>,
    superblock: &Superblock,
    metadata: &mut Metadata,
) -> Result<Option<Journal>, Trouble> {
    if !superblock.features.has_journal() {
        return Ok(None);
    }
    let journal = Journal::open(blocks, &superblock.geometry, superblock.journal_inode)?;
    for run in journal.file.all() {
        metadata.add(run)?;
    }
    Ok(Some(journal))
}

fn volume(geometry: &Geometry, free: bitmaps::Free, rest: Rest) -> Volume {
    Volume {
        free: free.runs,
        size: geometry.blocks * geometry.block_size,
        reported_free: free.clusters * geometry.cluster_blocks * geometry.block_size,
        rest,
    }
}
