//! Gives every block of a fixed VHDX its place, and cuts off what the file has beyond.
//!
//! Blocks without a place read as zeros. Each gets one in the free space of the file, the lowest first,
//! which is made to read as zeros, durably, before the block table names it. Then the others move and the
//! file is cut, as those of a dynamic disk are. The file never grows, and a run that was interrupted is
//! gone on with by the next.

use std::sync::Arc;

use super::Turn;
use crate::compact::execute::{Budget, Compactor, Step};
use crate::compact::plan::plan;
use crate::compact::{CompactError, CompactReport, Phase};
use crate::disk::Disk;
use crate::units::{BlockIndex, FileOffset, round_up, u64_from};

/// Blocks that get their places together.
const BATCH: usize = 32;

/// What packing leads to.
pub(super) struct Packed {
    /// The file's length.
    pub(super) len: u64,
    /// Blocks that move.
    pub(super) moves: u64,
}

/// What packing the file of `disk` leads to; `None` where it has no room for a block more than it needs.
pub(super) fn packed(disk: &Disk) -> Option<Packed> {
    let shape = disk.geometry().slot;
    if disk.geometry().is_flat {
        return None;
    }
    let missing = missing(disk);
    let places = places(disk, missing.len());
    // Where there are too few, blocks that move make some.
    let end = round_up(disk.file_len(), shape.align);
    let further = (0..).map(|n| FileOffset::new(end).plus(n * shape.len));
    let places = places.into_iter().chain(further);
    let present = (disk.maintenance().slots()).map(|(block, at)| (at, block));
    let mut slots: Vec<_> = present.chain(places.zip(missing)).collect();
    slots.sort_unstable();
    let frame = disk.maintenance().frame(&|_| false);
    let plan = plan(&slots, &frame, shape);
    let len = plan.file_len(&frame);
    (len + shape.len <= disk.file_len()).then(|| Packed {
        len,
        moves: u64_from(plan.moves.len()),
    })
}

/// The blocks that have no place.
fn missing(disk: &Disk) -> Vec<BlockIndex> {
    let blocks = disk.maintenance().blocks();
    blocks
        .filter(|block| disk.maintenance().slot_of(*block).is_none())
        .collect()
}

/// The lowest free places of the file, at most `most`.
fn places(disk: &Disk, most: usize) -> Vec<FileOffset> {
    let shape = disk.geometry().slot;
    let runs = disk.maintenance().free_runs().into_iter();
    runs.flat_map(|run| shape.places(run)).take(most).collect()
}

/// Packs the file of `disk`, durably.
///
/// # Errors
/// As [`crate::compact::Operation::wait`].
pub(super) fn pack(
    disk: &Arc<Disk>,
    turn: &Turn<'_>,
    report: &mut CompactReport,
) -> Result<(), CompactError> {
    loop {
        let before = missing(disk).len();
        place_missing(disk, turn)?;
        let left = missing(disk).len();
        let mut compactor = Compactor::of_fixed(Arc::clone(disk))?;
        loop {
            turn.shared.publish(compactor.progress());
            turn.go_on()?;
            if compactor.step(Budget::IDLE, &|| turn.goes_on())? == Step::Done {
                break;
            }
        }
        if let blocks @ 1.. = compactor.without_room() {
            return Err(CompactError::NoRoom { blocks });
        }
        let done = compactor.into_report()?;
        report.blocks_moved += done.blocks_moved;
        report.bytes_moved += done.bytes_moved;
        // Moves may have made room for those that had none.
        if left == 0 || left == before && done.blocks_moved == 0 {
            return Ok(());
        }
    }
}

fn place_missing(disk: &Disk, turn: &Turn<'_>) -> Result<(), CompactError> {
    let missing = missing(disk);
    let places = places(disk, missing.len());
    let wanted: Vec<_> = missing.into_iter().zip(places).collect();
    let total = u64_from(wanted.len());
    for (done, batch) in (0..).zip(wanted.chunks(BATCH)) {
        let block_size = disk.geometry().block_size;
        let done = done * u64_from(BATCH);
        turn.publish(Phase::Move, done * block_size, total * block_size);
        turn.go_on()?;
        disk.maintenance().place_blocks(batch)?;
    }
    Ok(disk.maintenance().sync()?)
}
