//! Blocks of a child that hold nothing but what the parent has: they may go without a trace.

use super::freed::Freed;
use super::relocate::COPY_PIECE;
use crate::disk::Disk;
use crate::error::DiskError;
use crate::image::{MapEdit, Reads};
use crate::map::BlockState;
use crate::units::{BlockIndex, usize_from};

/// Bytes that are compared first: most blocks differ there already.
const FIRST_LOOK: u64 = 64 << 10;

/// How to look for a block that is the same.
#[derive(Clone, Copy)]
pub(super) struct Comparison<'a> {
    /// What is free need not be the same: a block that is found so is left for later.
    pub(super) freed: Option<&'a Freed>,
    pub(super) dry_run: bool,
    pub(super) go_on: &'a dyn Fn() -> bool,
}

/// Compares what `block` has of its own with what the parent has there. Where all of it is the same,
/// drops the block, so that the parent shows, and says so; of a dry run, or where that is for lack of
/// what is free, only says so.
///
/// A guest that writes to the block meanwhile wins, and where `go_on` says no, nothing happens.
///
/// # Errors
/// Where one of the two cannot be read, or the block table not be written.
pub(super) fn drop_if_same(
    disk: &Disk,
    block: BlockIndex,
    how: Comparison<'_>,
    bytes_read: &mut u64,
) -> Result<bool, DiskError> {
    let watch = disk.gates.watch(block);
    let bitmap = {
        // The gate keeps the block in place while its bitmap is read.
        let _gate = disk.gates.shared(block);
        match disk.image.map().get(block) {
            BlockState::Present { whole: true, .. } => None,
            BlockState::Present { whole: false, .. } => Some(disk.image.sector_bitmap(block)?),
            BlockState::NotPresent | BlockState::Zero => return Ok(false),
        }
    };
    let start = disk.offset_of(block);
    let all = 0..(disk.len() - start).min(disk.geometry().block_size);
    let own: Vec<_> = match &bitmap {
        Some(bitmap) => (disk.runs(bitmap, all))
            .filter(|(_, is_written)| *is_written)
            .map(|(part, _)| part)
            .collect(),
        None => vec![all],
    };
    let (mut mine, mut parents) = (Vec::new(), Vec::new());
    let mut piece = FIRST_LOOK;
    for part in own {
        let mut at = part.start;
        while at < part.end {
            if watch.is_touched() || !(how.go_on)() {
                return Ok(false);
            }
            let len = piece.min(part.end - at);
            mine.resize(usize_from(len), 0);
            parents.resize(usize_from(len), 0);
            {
                let _gate = disk.gates.shared(block);
                disk.read_block(&mut mine, block, at)?;
            }
            disk.read_parent(&mut parents, start + at)?;
            *bytes_read += len;
            if let Some(freed) = how.freed {
                for free in freed.free_in(disk, block) {
                    let (from, to) = (free.start.max(at), free.end.min(at + len));
                    if from < to {
                        let part = usize_from(from - at)..usize_from(to - at);
                        mine[part.clone()].copy_from_slice(&parents[part]);
                    }
                }
            }
            if mine != parents {
                return Ok(false);
            }
            at += len;
            piece = COPY_PIECE;
        }
    }
    let _gate = disk.gates.exclusive(block);
    if watch.is_touched() || disk.image.map().get(block).slot().is_none() {
        return Ok(false);
    }
    if !how.dry_run && how.freed.is_none() {
        let reads = Reads::Parent;
        disk.image.commit(&[MapEdit::Drop { block, reads }])?;
        disk.tracker.forget(block);
    }
    Ok(true)
}
