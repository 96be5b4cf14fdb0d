//! Moves blocks to other slots. `compact/mod.rs` has the order of writes and why it is safe.

use super::CompactError;
use super::plan::Move;
use crate::disk::{Disk, Watch};
use crate::error::DiskError;
use crate::image::MapEdit;
use crate::units::{FileOffset, FileRange};

/// Bytes that are copied between two looks whether to go on.
pub(super) const COPY_PIECE: u64 = 4 << 20;

/// Whether the host stores all of the slot at `slot`, so that writing there takes no new space.
pub(super) fn is_stored(disk: &Disk, slot: FileOffset) -> bool {
    let range = disk.geometry().slot_range(slot);
    let data = disk.image.storage().next_data(range.start, range.end());
    matches!(data, Ok(Some(data)) if data == range)
}

/// Copies the slots of `batch` to their targets and switches the table over, durably. Says how many
/// blocks moved; the targets of the others are given back.
pub(super) fn copy_and_commit(
    disk: &Disk,
    batch: &[(Move, Watch<'_>)],
    go_on: &dyn Fn() -> bool,
) -> Result<u64, CompactError> {
    let mut copied = batch.len();
    let mut failure = None;
    for (at, (step, watch)) in batch.iter().enumerate() {
        match copy_slot(disk, step, watch, go_on) {
            Ok(true) => {}
            Ok(false) => {
                copied = copied.min(at);
                break;
            }
            Err(error) => {
                copied = at;
                failure = Some(error);
                break;
            }
        }
    }
    disk.image.note_payload();
    if let Err(error) = disk.image.sync() {
        batch
            .iter()
            .for_each(|(step, _)| disk.image.give_back(step.to));
        return Err(error.into());
    }
    let mut moved = 0;
    let mut refused = None;
    for (at, (step, watch)) in batch.iter().enumerate() {
        debug_assert_eq!(watch.block(), step.block);
        let _gate = disk.gates.exclusive(step.block);
        let in_place = disk.image.map().get(step.block).slot() == Some(step.from);
        if at < copied && in_place && !watch.is_touched() && refused.is_none() {
            let (block, to) = (step.block, step.to);
            match disk.image.commit(&[MapEdit::Move { block, to }]) {
                Ok(()) => moved += 1,
                // It has given the target back itself.
                Err(error) => refused = Some(error),
            }
        } else {
            disk.image.give_back(step.to);
        }
    }
    // Only now, that the table is durable, are the old slots free.
    disk.image.sync()?;
    (refused.or(failure)).map_or(Ok(moved), |error| Err(error.into()))
}

/// Copies one slot; says whether it is complete, or the guest or the caller wants it stopped.
fn copy_slot(
    disk: &Disk,
    step: &Move,
    watch: &Watch<'_>,
    go_on: &dyn Fn() -> bool,
) -> Result<bool, DiskError> {
    let len = disk.geometry().slot.len;
    let mut done = 0;
    while done < len {
        if watch.is_touched() || !go_on() {
            return Ok(false);
        }
        let part = FileRange::new(step.from.plus(done), COPY_PIECE.min(len - done));
        disk.image
            .storage()
            .copy_within(part, step.to.plus(done))
            .map_err(|error| DiskError::io("copy a block", error))?;
        done += part.len;
    }
    Ok(true)
}
