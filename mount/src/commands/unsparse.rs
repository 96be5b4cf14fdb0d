//! The end of `vhdfs compact --unsparse`: the host comes to store the holes of a file as zeros.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use vhdfs::storage::Storage;
use vhdfs::storage::holes::fill_holes;
use vhdfs::storage::host::{HostFile, space_of};

use super::compact::progress_bar;
use super::{about, name};
use crate::Failure;
use crate::text::{Bytes, plain};

/// What filling comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fill {
    /// Bytes of holes that are filled.
    pub(super) filled: u64,
    /// Bytes that the host stores after.
    pub(super) allocated: u64,
}

/// Fails where the host has not `needed` bytes left for the file.
fn check_room(file: &Path, needed: u64) -> Result<(), Failure> {
    let space = space_of(file).map_err(|error| about(file, &error))?;
    let free = space.blocks_available.saturating_mul(space.block_size);
    if needed <= free {
        return Ok(());
    }
    let (needed, free, file) = (Bytes(needed), Bytes(free), file.display());
    Err(format!(
        "{file}: its holes are not filled: that takes {needed}, and the host has {free} left"
    )
    .into())
}

/// What [`fill`] would do to a file that will be `length` bytes long, of which the host will store `allocated`,
/// and now stores `allocated_now`.
pub(super) fn predict(
    file: &Path,
    length: u64,
    allocated: u64,
    allocated_now: u64,
) -> Result<Fill, Failure> {
    check_room(file, length.saturating_sub(allocated_now))?;
    Ok(Fill {
        filled: length.saturating_sub(allocated),
        allocated: length.max(allocated),
    })
}

/// Fills the holes of the file at `path`, which is open for writing and which nobody else has. Its bytes stay what
/// they are, whatever happens.
pub(super) fn fill(
    path: &Path,
    file: &HostFile,
    interrupted: &AtomicBool,
) -> Result<Fill, Failure> {
    let failed = |error| about(path, &error);
    let holes = file.form().map_err(failed)?.hole_bytes;
    let (length, allocated) = (
        file.len().map_err(failed)?,
        file.allocated_bytes().map_err(failed)?,
    );
    // What is allocated already and was never written counts as a hole, but takes no more room.
    check_room(path, holes.min(length.saturating_sub(allocated)))?;
    let bar = progress_bar();
    bar.set_message(format!("{} Fill", plain(&name(path))));
    bar.set_length(holes);
    let mut go_on = |filled| {
        bar.set_position(filled);
        !interrupted.load(Ordering::Relaxed)
    };
    let result = fill_holes(file, &mut go_on);
    bar.finish_and_clear();
    let found = result.map_err(failed)?;
    let left = |why| -> Failure {
        let (left, path) = (Bytes(found.left), path.display());
        format!("{path}: {left} of holes are left: {why}").into()
    };
    match found.left {
        0 => file.end_sparse().map_err(failed)?,
        _ if interrupted.load(Ordering::Relaxed) => {
            return Err(left("interrupted; a further run goes on from there"));
        }
        _ if file.is_wanted() => {
            return Err(left(
                "another program waits to open the file; a further run goes on from there",
            ));
        }
        _ => {
            return Err(left(
                "the host's file system keeps zeros as holes, as one that compresses does",
            ));
        }
    }
    Ok(Fill {
        filled: found.filled,
        allocated: file.allocated_bytes().map_err(failed)?,
    })
}
