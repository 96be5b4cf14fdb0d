//! What a compaction did, and why the rest of the file stays.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::disk::{Disk, FreeBook};
use crate::error::DiskError;
use crate::guest::{Outcome, Rest, Survey};
use crate::image::{Frame, Geometry};
use crate::units::{BlockIndex, FileRange, u64_from};

/// Blocks of that size, or smaller, are not what keeps a file long.
const SMALL_BLOCK: u64 = 2 << 20;

/// Bytes of the file that stay, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Why, for people.
    pub reason: String,
    /// How many bytes of the file's length.
    pub bytes: u64,
}

/// A part of the disk, and what the compaction made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartReport {
    /// What to call it: `partition 2`, `volume vg0/root`, `the disk`.
    pub name: String,
    /// What it holds, if that is known: `ext4`, `NTFS`, `LUKS`.
    pub content: Option<&'static str>,
    /// Its bytes.
    pub size: u64,
    /// Bytes that the filesystem's own tools call free; 0 where it was skipped.
    pub free: u64,
    /// Bytes of what is free that left the file with their blocks.
    pub reclaimed: u64,
    /// Why all of it counts as in use, if it does: the end of a sentence.
    pub skipped: Option<String>,
    /// Whether it was not unmounted, and what is free was told with its journal replayed in memory
    /// ([`CompactOptions::replay_journal`](super::CompactOptions::replay_journal)).
    pub journal_replayed: bool,
    /// Where it lies on the disk.
    pub(super) ranges: Vec<Range<u64>>,
}

impl PartReport {
    /// How many bytes of a range of the disk are in the part.
    pub(super) fn overlap(&self, range: &Range<u64>) -> u64 {
        let common = |own: &Range<u64>| {
            let (start, end) = (own.start.max(range.start), own.end.min(range.end));
            end.saturating_sub(start)
        };
        self.ranges.iter().map(common).sum()
    }
}

/// The parts of a survey, before anything was done.
pub(super) fn part_reports(survey: &Survey) -> Vec<PartReport> {
    let parts = survey.parts.iter().map(|part| PartReport {
        name: part.name.clone(),
        content: part.content,
        size: part.size,
        free: match &part.outcome {
            Outcome::Read { reported_free, .. } => *reported_free,
            Outcome::Skipped { .. } => 0,
        },
        reclaimed: 0,
        skipped: match &part.outcome {
            Outcome::Read { .. } => None,
            Outcome::Skipped { reason } => Some(reason.clone()),
        },
        journal_replayed: matches!(
            part.outcome,
            Outcome::Read {
                rest: Rest::Replayed,
                ..
            }
        ),
        ranges: part.ranges.clone(),
    });
    parts.collect()
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
    /// Bytes that were cut off the file.
    pub bytes_cut: u64,
    /// Moves that were given up because a guest was at the block.
    pub given_up: u64,
    /// Bytes that were copied for moves that did not come about.
    pub bytes_in_vain: u64,
    /// Bytes read to find out what is zero.
    pub bytes_read: u64,
    /// Bytes inside live blocks that were given back to the host.
    pub bytes_punched: u64,
    /// Why each byte of the file stays; sums up to the length after.
    pub kept: Vec<Kept>,
    /// The partitions and volumes of the disk, if the guest's filesystems were asked.
    pub parts: Vec<PartReport>,
    /// Whether disks that were made over this one are refused from now on, because something went that
    /// only its filesystems call free.
    pub new_identity: bool,
    /// Why what they call free was not touched, or no longer, though that was asked for.
    pub not_surveyed: Option<String>,
    /// How long it took, pauses included.
    pub took: Duration,
    /// How much of that its guest was active.
    pub beside_guest: Duration,
    /// What could go from the file, or from the host, and has not, and why.
    pub left: Vec<Kept>,
}

impl CompactReport {
    /// Whether anything is otherwise than it was.
    pub fn has_effect(&self) -> bool {
        self.allocated_after < self.allocated_before
            || self.bytes_cut + self.blocks_dropped + self.blocks_moved + self.bytes_punched > 0
    }
}

impl fmt::Display for CompactReport {
    /// What it came to, for a log: completes "compacted ".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "from {} to {} bytes ({} to {} on the host), {} blocks dropped, {} moved",
            self.length_before,
            self.length_after,
            self.allocated_before,
            self.allocated_after,
            self.blocks_dropped,
            self.blocks_moved,
        )?;
        write!(
            f,
            ", in {:.1} s, {:.1} s of them beside an active guest; {} bytes read, {} moved",
            self.took.as_secs_f64(),
            self.beside_guest.as_secs_f64(),
            self.bytes_read,
            self.bytes_moved,
        )?;
        for left in &self.left {
            write!(f, "; {} bytes left: {}", left.bytes, left.reason)?;
        }
        Ok(())
    }
}

impl CompactReport {
    /// Fills in why each byte of a file of `self.length_after` bytes with `live` blocks stays.
    pub(super) fn explain(
        &mut self,
        disk: &Disk,
        frame: &Frame,
        book: Option<&FreeBook>,
        live: &[BlockIndex],
    ) {
        let geometry = disk.geometry();
        let blocks = u64_from(live.len());
        let all_data = blocks * geometry.block_size;
        let bitmaps = blocks * geometry.slot.header_len;
        let pinned = frame.pinned.iter().chain(&frame.movable);
        let pinned: u64 = pinned.map(|range| range.len).sum();
        let metadata = frame.start.get() + bitmaps + pinned + frame.trailer_len;
        let rest = self.length_after.saturating_sub(all_data + metadata);

        let mut in_skipped = vec![0; self.parts.len()];
        let mut free = 0;
        for block in live {
            let start = disk.offset_of(*block);
            let range = start..start + geometry.block_size;
            let mut parts = self.parts.iter();
            let unknown = parts.position(|part| part.skipped.is_some() && part.overlap(&range) > 0);
            match (unknown, book) {
                (Some(part), _) => in_skipped[part] += geometry.block_size,
                (None, Some(book)) => {
                    let parts = book.free_in(disk, *block);
                    free += parts.map(|free| free.end - free.start).sum::<u64>();
                }
                (None, None) => {}
            }
        }
        let data = all_data - free - in_skipped.iter().sum::<u64>();
        let kept = [
            ("blocks that hold data".to_owned(), data),
            (free_in_blocks(geometry, free > data), free),
        ];
        let kept = kept.into_iter();
        let skipped = (self.parts.iter().zip(in_skipped))
            .map(|(part, bytes)| (format!("blocks of {}, which was skipped", part.name), bytes));
        let others = [
            ("headers, tables and sector bitmaps", metadata),
            ("gaps that no block fits in", rest),
        ];
        let others = (others.into_iter()).map(|(reason, bytes)| (reason.to_owned(), bytes));
        self.kept = (kept.chain(skipped).chain(others))
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(reason, bytes)| Kept { reason, bytes })
            .collect();
    }
}

/// Why free space stays; `is_most`: of what is in the blocks.
fn free_in_blocks(geometry: &Geometry, is_most: bool) -> String {
    let reason = "free space of the guest in such blocks";
    let block_size = geometry.block_size;
    if !is_most || block_size <= SMALL_BLOCK {
        return reason.to_owned();
    }
    let size = block_size >> 20;
    format!(
        "{reason}: one of {size} MiB stays while any of it is in use, so that the same disk in smaller \
         blocks (`vhdfs create --block-size`) would be shorter"
    )
}

/// Bytes that the host stores for what is free in the file, or would be without the `dead` blocks, and
/// for what is to be `punched`.
pub(super) fn stored_in_free_space(
    disk: &Disk,
    dead: &HashSet<BlockIndex>,
    punched: impl Iterator<Item = FileRange>,
) -> Result<u64, DiskError> {
    let slots = (dead.iter()).filter_map(|block| disk.maintenance().slot_of(*block));
    let ranges = slots
        .map(|slot| disk.geometry().slot_range(slot))
        .chain(disk.maintenance().free_runs())
        .chain(punched);
    ranges
        .map(|range| disk.maintenance().stored_in(range))
        .sum()
}
