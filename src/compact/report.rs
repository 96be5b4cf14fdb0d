//! What a compaction did, and why the rest of the file stays.

use std::collections::HashSet;

use crate::disk::Disk;
use crate::error::DiskError;
use crate::image::Frame;
use crate::units::BlockIndex;

/// Bytes of the file that stay, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Why, for people.
    pub reason: String,
    /// How many bytes of the file's length.
    pub bytes: u64,
}

/// What a compaction did, or, of a dry run, would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// The file's length in bytes when the disk was opened.
    pub length_before: u64,
    /// The file's length after. Of a dry run, exactly what a run would reach if nothing changes.
    pub length_after: u64,
    /// Bytes that the host stored for the file when the disk was opened.
    pub allocated_before: u64,
    /// Bytes that the host stores after. Of a dry run, an estimate.
    pub allocated_after: u64,
    /// Blocks that left the block table.
    pub blocks_dropped: u64,
    /// Blocks that went to another place in the file.
    pub blocks_moved: u64,
    /// Bytes written for those moves.
    pub bytes_moved: u64,
    /// Bytes read to find out what is zero.
    pub bytes_read: u64,
    /// Bytes inside live blocks that were given back to the host.
    pub bytes_punched: u64,
    /// Why each byte of the file stays; sums up to the length after.
    pub kept: Vec<Kept>,
}

impl CompactReport {
    /// Fills in why each byte of a file of `self.length_after` bytes with `live` blocks stays.
    pub(super) fn explain(&mut self, disk: &Disk, frame: &Frame, live: u64) {
        let geometry = disk.geometry();
        let data = live * geometry.block_size;
        let bitmaps = live * geometry.slot.header_len;
        let pinned = frame.pinned.iter().chain(&frame.movable);
        let pinned: u64 = pinned.map(|range| range.len).sum();
        let metadata = frame.start.get() + bitmaps + pinned + frame.trailer_len;
        let rest = self.length_after.saturating_sub(data + metadata);
        let kept = [
            ("blocks that hold data", data),
            ("headers, tables and sector bitmaps", metadata),
            ("gaps that no block fits in", rest),
        ];
        self.kept = (kept.into_iter().filter(|(_, bytes)| *bytes > 0))
            .map(|(reason, bytes)| Kept {
                reason: reason.to_owned(),
                bytes,
            })
            .collect();
    }
}

/// Bytes that the host stores for what is free in the file, or would be without the `dead` blocks.
pub(super) fn stored_in_free_space(
    disk: &Disk,
    dead: &HashSet<BlockIndex>,
) -> Result<u64, DiskError> {
    let image = &*disk.image;
    let slots = dead
        .iter()
        .filter_map(|block| image.map().get(*block).slot());
    let ranges = slots
        .map(|slot| image.geometry().slot_range(slot))
        .chain(image.free_runs());
    let mut stored = 0;
    for range in ranges {
        let mut from = range.start;
        let next = |from| image.storage().next_data(from, range.end());
        while let Some(data) =
            next(from).map_err(|error| DiskError::io("look for holes in the file", error))?
        {
            stored += data.len;
            from = data.end();
        }
    }
    Ok(stored)
}
