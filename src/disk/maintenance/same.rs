//! Blocks of a child that hold nothing but what the parent has: they may go without a trace.
//!
//! Two things limit what counts as the same, byte by byte:
//! * What the child's guest discarded, or its filesystems call free, may become zeros, but never what the
//!   parent has: that would bring deleted data back.
//! * What the parent's filesystems call free, or an older ancestor's, may become zeros one day: a child
//!   relies on it only where it reads as zeros already.

use rangemap::RangeSet;

use super::FreeBook;
use crate::disk::{Disk, zero};
use crate::error::DiskError;
use crate::image::{MapEdit, Reads};
use crate::units::{BlockIndex, u64_from, usize_from};

/// Bytes that are compared first: most blocks differ there already.
const FIRST_LOOK: u64 = 64 << 10;
/// Bytes that are compared together from there on.
const PIECE: u64 = 1 << 20;

/// How to look for a block that is the same.
#[derive(Clone, Copy)]
pub(crate) struct Comparison<'a> {
    /// What is free may be zeros in the parent instead: a block that is found so is left for later.
    pub(crate) book: Option<&'a FreeBook>,
    /// What the filesystems of the parents call free, in disk offsets.
    pub(crate) parents_free: &'a RangeSet<u64>,
    pub(crate) dry_run: bool,
    pub(crate) go_on: &'a dyn Fn() -> bool,
}

/// Compares what `block` has of its own with what the parent has there. Where all of it is the same,
/// drops the block, so that the parent shows, and says so; of a dry run, or where that is for lack of
/// what is free, only says so.
///
/// A guest that writes to the block meanwhile wins, and where `go_on` says no, nothing happens.
///
/// # Errors
/// Where one of the two cannot be read, or the block table not be written.
pub(crate) fn drop_if_same(
    disk: &Disk,
    block: BlockIndex,
    how: Comparison<'_>,
    bytes_read: &mut u64,
) -> Result<bool, DiskError> {
    let watch = disk.gates.watch(block);
    let start = disk.offset_of(block);
    let all = 0..(disk.len() - start).min(disk.geometry().block_size);
    let own = {
        // The gate keeps the block in place while its bitmap is read.
        let _gate = disk.gates.shared(block);
        if disk.image.map().get(block).slot().is_none() {
            return Ok(false);
        }
        disk.written_parts(block, all)?
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
            if let Some(book) = how.book {
                for free in book.free_in(disk, block) {
                    let (from, to) = (free.start.max(at), free.end.min(at + len));
                    if from < to {
                        let part = usize_from(from - at)..usize_from(to - at);
                        zero_where_zero(&mut mine[part.clone()], &parents[part]);
                    }
                }
            }
            if mine != parents || !holds(&parents, start + at, how.parents_free) {
                return Ok(false);
            }
            at += len;
            piece = PIECE;
        }
    }
    let _gate = disk.gates.exclusive(block);
    if watch.is_touched() || disk.image.map().get(block).slot().is_none() {
        return Ok(false);
    }
    if !how.dry_run && how.book.is_none() {
        let _change = disk.gates.change(block);
        let reads = Reads::Parent;
        disk.image.commit(&[MapEdit::Drop { block, reads }])?;
        disk.tracker.forget(block);
    }
    Ok(true)
}

/// Makes zero what is zero in the parent: the rest of what is free has to be the same as it is.
fn zero_where_zero(mine: &mut [u8], parents: &[u8]) {
    for (mine, parents) in mine.iter_mut().zip(parents) {
        if *parents == 0 {
            *mine = 0;
        }
    }
}

/// Whether the parent keeps `bytes`, which it has at disk offset `offset`: not where they are free there
/// and something else than zeros.
fn holds(bytes: &[u8], offset: u64, free: &RangeSet<u64>) -> bool {
    let end = offset + u64_from(bytes.len());
    free.overlapping(offset..end).all(|free| {
        let part = free.start.max(offset) - offset..free.end.min(end) - offset;
        zero::is_zero(&bytes[usize_from(part.start)..usize_from(part.end)])
    })
}
