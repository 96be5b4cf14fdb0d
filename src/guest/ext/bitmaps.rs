//! Free space: what the bitmaps of all groups agree to be free with the descriptors, the superblock
//! and the layout.

use std::ops::Range;

use rangemap::RangeSet;

use super::blocks::Blocks;
use super::groups::{Group, Groups};
use super::superblock::Geometry;
use crate::guest::bits::clear_runs;
use crate::guest::{Trouble, add_run};
use crate::units::{div_ceil, low_u8, usize_from};

/// What was found to be free.
pub(super) struct Free {
    /// In bytes of the part.
    pub(super) runs: RangeSet<u64>,
    /// What the bitmaps of `blocks` have free, in clusters.
    pub(super) clusters: u64,
}

/// Where a filesystem's metadata lies, in blocks.
pub(super) struct Metadata(RangeSet<u64>);

impl Metadata {
    /// The metadata of all groups.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where a descriptor is damaged, or where two things lie at one place.
    pub(super) fn of_groups(blocks: &Blocks<'_>, geometry: &Geometry) -> Result<Self, Trouble> {
        let mut metadata = Self(RangeSet::new());
        let mut groups = Groups::new(blocks, geometry);
        for number in 0..geometry.groups {
            metadata.add(geometry.copies(number))?;
            for range in groups.get(number)?.metadata(geometry) {
                metadata.add(range)?;
            }
        }
        Ok(metadata)
    }

    /// Adds blocks that nothing else may lie in.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where something does.
    pub(super) fn add(&mut self, range: Range<u64>) -> Result<(), Trouble> {
        if range.is_empty() {
            return Ok(());
        }
        if self.0.overlaps(&range) {
            return Err(Trouble::skip(format!(
                "has two pieces of its metadata in the blocks from {} to {}",
                range.start, range.end
            )));
        }
        self.0.insert(range);
        Ok(())
    }

    /// Which clusters of a group, counted from its start, hold some.
    fn clusters(&self, geometry: &Geometry, group: &Range<u64>) -> Vec<Range<u64>> {
        let first = |block: u64| (block - group.start) / geometry.cluster_blocks;
        let behind = |block: u64| div_ceil(block - group.start, geometry.cluster_blocks);
        (self.0.overlapping(group))
            .map(|run| first(run.start.max(group.start))..behind(run.end.min(group.end)))
            .collect()
    }
}

/// What is free in a filesystem.
///
/// `older` is the same filesystem before its journal was replayed: what is not free there, too, is
/// not free. It is not held to its checksums and counts, since it may be amid a change.
///
/// # Errors
/// [`Trouble::Skip`] where anything does not agree.
pub(super) fn free(
    blocks: &Blocks<'_>,
    older: Option<&Blocks<'_>>,
    geometry: &Geometry,
    metadata: &Metadata,
) -> Result<Free, Trouble> {
    let mut groups = Groups::new(blocks, geometry);
    let mut before = older.map(|older| (older, Groups::new(older, geometry)));
    let mut free = Free {
        runs: RangeSet::new(),
        clusters: 0,
    };
    for number in 0..geometry.groups {
        let group = groups.get(number)?;
        let extent = geometry.group(number);
        let count = div_ceil(extent.end - extent.start, geometry.cluster_blocks);
        let own = metadata.clusters(geometry, &extent);
        let mut bitmap = match group.uninitialised {
            true => computed(geometry, &own, count),
            false => checked(blocks, geometry, number, &group, &own, count)?,
        };
        let clear: u64 = clear_runs(&bitmap, count)
            .map(|run| run.end - run.start)
            .sum();
        if clear != group.free_clusters {
            return Err(Trouble::skip(format!(
                "has {clear} free clusters in the bitmap of group {number}, but counts {}",
                group.free_clusters
            )));
        }
        free.clusters += clear;
        if let Some((older, groups)) = &mut before {
            let was = groups.get(number)?;
            if !was.lies_as(&group) {
                return Err(Trouble::skip(format!(
                    "has moved the metadata of group {number} and not finished that"
                )));
            }
            let old = match was.uninitialised {
                true => computed(geometry, &own, count),
                false => older.read(was.block_bitmap)?,
            };
            for (byte, old) in bitmap.iter_mut().zip(old) {
                *byte |= old;
            }
        }
        for run in clear_runs(&bitmap, count) {
            let block = |cluster| extent.start + cluster * geometry.cluster_blocks;
            let end = block(run.end).min(geometry.blocks);
            let bytes = block(run.start) * geometry.block_size..end * geometry.block_size;
            add_run(&mut free.runs, bytes)?;
        }
    }
    Ok(free)
}

/// The bitmap of a group of `count` clusters that was never written: only `own` are in use.
fn computed(geometry: &Geometry, own: &[Range<u64>], count: u64) -> Vec<u8> {
    let mut bitmap = vec![0; usize_from(geometry.clusters_per_group / 8)];
    let behind = count..geometry.clusters_per_group;
    for bit in own.iter().cloned().flatten().chain(behind) {
        bitmap[usize_from(bit / 8)] |= low_u8(1 << (bit % 8));
    }
    bitmap
}

/// The bitmap of a group of `count` clusters as it is written, if its checksum is right and it has
/// `own` in use, and what is behind the filesystem's end.
fn checked(
    blocks: &Blocks<'_>,
    geometry: &Geometry,
    number: u64,
    group: &Group,
    own: &[Range<u64>],
    count: u64,
) -> Result<Vec<u8>, Trouble> {
    let bad = |what: &str| Trouble::skip(format!("has a bitmap of group {number} {what}"));
    let mut bitmap = blocks.read(group.block_bitmap)?;
    bitmap.truncate(usize_from(geometry.clusters_per_group / 8));
    let wide = geometry.descriptor_size >= 64;
    if !(geometry.checksums).is_right(&bitmap, group.bitmap_checksum, wide) {
        return Err(bad("with a wrong checksum"));
    }
    let set = |run: Range<u64>| {
        let mut run = run;
        run.all(|bit| bitmap[usize_from(bit / 8)] >> (bit % 8) & 1 == 1)
    };
    if !set(count..geometry.clusters_per_group) {
        return Err(bad("that goes on behind the end"));
    }
    match own.iter().cloned().all(set) {
        true => Ok(bitmap),
        false => Err(bad("that has its metadata free")),
    }
}
