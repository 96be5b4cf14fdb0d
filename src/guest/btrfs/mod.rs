//! btrfs on one device.
//!
//! A btrfs never overwrites what its last commit needs, and has no mark of being mounted: what its
//! superblock leads to is sound at any time, even in the copy of a disk in use. So the committed view
//! is the one to read, and the one that the next mount begins with. Three things make it more than
//! what the trees say, and mean that all is in use: a log of what `fsync` saved since the last commit,
//! copies of the superblock that differ, and work on devices or chunks that has not come to its end.
//!
//! ```text
//!   superblock   where to begin, features, the log         (checksum: all four kinds)
//!   chunks       logical addresses -> places on the device, by the chunk tree
//!   tree         the walk through any tree
//!   roots        where the trees are, by the root tree
//!   device       the device tree: what of the device belongs to chunks
//!   extents      the extent tree: what of the chunks is allocated; and their counts
//!   free_space   the free space tree, if there is one: it must say the same
//!   checksums    else: whatever has a checksum must be allocated
//! ```
//!
//! What goes that a rescue might have wanted: the trees that the superblock's backup roots lead to,
//! which is what became free in the last commits.
//!
//! Sources: the kernel's `fs/btrfs/` (`disk-io.c`, `tree-checker.c`, `volumes.c`, `block-group.c`,
//! `free-space-tree.c`) and `include/uapi/linux/btrfs_tree.h`. All integers are little-endian.

mod checksum;
mod checksums;
mod chunks;
mod device;
mod extents;
mod free_space;
mod roots;
mod superblock;
#[cfg(test)]
mod tests;
mod tree;

use std::fmt;
use std::ops::Range;

use rangemap::RangeSet;

use self::chunks::Chunks;
use self::extents::Extents;
use self::roots::{Roots, Second};
use self::superblock::Superblock;
use self::tree::Forest;
use super::view::View;
use super::{Rest, Trouble, Volume, add_run, swap};
use crate::units::round_down;

/// The beginning of the device, which the kernel never allocates: boot loaders put things there.
/// [fs.h `BTRFS_DEVICE_RANGE_RESERVED`]
const RESERVED: Range<u64> = 0..1 << 20;
/// Bytes that stay unallocated around each copy of the superblock. [volumes.h `BTRFS_STRIPE_LEN`]
const SUPERBLOCK_ROOM: u64 = 64 << 10;

/// Bytes of a page of memory, and of the signature that ends the first one of swap space.
const PAGE: u64 = 4096;
const SIGNATURE_LEN: u64 = 10;

/// Whether btrfs is here.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(view: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    Ok(superblock::is_here(view)?.then_some("btrfs"))
}

/// Says what is free. What the tools call free (`btrfs filesystem usage`: "Device unallocated", and for
/// each profile size less used, times its copies) includes the places that are never allocated, which
/// are not given here.
///
/// # Errors
/// [`Trouble::Skip`] where anything is in doubt; [`Trouble::Io`].
pub(super) fn read(view: &View<'_>) -> Result<Volume, Trouble> {
    let fs = Superblock::read(view)?;
    let system = Chunks::of_superblock(&fs)?;
    let mut forest = Forest::new(view, &fs, system);
    let chunks = Chunks::read(&mut forest)?;
    forest.chunks = chunks;
    let roots = Roots::read(&mut forest)?;
    let holes = device::holes(&mut forest, &roots)?;
    let extents = Extents::read(&mut forest, &roots)?;
    match roots.second {
        Second::FreeSpace(tree) => free_space::check(&mut forest, tree, &extents)?,
        Second::Checksums(tree) => checksums::check(&mut forest, tree, &extents)?,
    }
    refuse_sleep(&forest, &extents)?;
    // What was read, and what will be, is in use.
    for node in forest.nodes.iter().chain(&roots.all) {
        if extents.is_free(*node) {
            return Err(damaged(format_args!("a tree at {node}, where all is free")));
        }
    }
    free_bytes(&fs, &forest.chunks, &extents, &holes)
}

/// Refuses a guest that sleeps in a file of this filesystem: what it wrote last may lie where its last
/// commit still calls it free.
fn refuse_sleep(forest: &Forest<'_, '_>, extents: &Extents) -> Result<(), Trouble> {
    let signature = PAGE - SIGNATURE_LEN..PAGE;
    for start in &extents.may_be_swap {
        let range = start.saturating_add(signature.start)..start.saturating_add(signature.end);
        let places = forest.chunks.places(&range)?;
        for place in places.take(1) {
            if swap::is_asleep(&forest.view.read(place.start, SIGNATURE_LEN)?) {
                return Err(Trouble::hibernated(
                    "has a file that holds the memory of a system that sleeps: wake it and shut it down",
                ));
            }
        }
    }
    Ok(())
}

/// All that is free, on the device.
fn free_bytes(
    fs: &Superblock,
    chunks: &Chunks,
    extents: &Extents,
    holes: &[Range<u64>],
) -> Result<Volume, Trouble> {
    let mut free = RangeSet::new();
    let mut reported_free = 0;
    for hole in holes {
        reported_free += hole.end - hole.start;
        // The end of a device may be no multiple of a sector.
        let end = round_down(hole.end, fs.sector_size);
        add_run(&mut free, hole.start..end.max(hole.start))?;
    }
    for gap in &extents.free {
        for place in chunks.places(gap)? {
            reported_free += place.end - place.start;
            add_run(&mut free, place)?;
        }
    }
    free.remove(RESERVED);
    for offset in superblock::PLACES {
        free.remove(offset..offset + SUPERBLOCK_ROOM);
    }
    Ok(Volume {
        rest: Rest::Unmarked,
        free,
        size: fs.total_bytes,
        reported_free,
    })
}

/// The doubt about metadata that is not as it must be.
fn damaged(what: impl fmt::Display) -> Trouble {
    Trouble::skip(format!("has damaged metadata ({what}): run btrfs check"))
}
