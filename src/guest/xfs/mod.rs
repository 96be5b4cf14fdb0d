//! XFS, versions 4 and 5.
//!
//! Free is what both free-space btrees of each allocation group say, where they agree with each other
//! and with every count, and the log ends with an unmount record. Nothing is replayed: a log with
//! anything in it means that the filesystem is in use, or was when its machine stopped. A clean log
//! does not mean the contrary: until the first log write of the next mount, up to half a minute after
//! data was written, it ends with the unmount record of before.
//!
//! ```text
//!   superblock  geometry, features; the copies in all groups
//!   log         the last record says "unmounted"
//!   group       AGF, AGI, AGFL -> the free runs of a group  (btree: the walk)
//! ```
//!
//! Sources: the kernel's `fs/xfs/libxfs/xfs_format.h`, `xfs_alloc.c` and `xfs_log_recover.c`, and the
//! book "XFS Algorithms & Data Structures". All integers are big-endian, but for checksums.

mod btree;
mod group;
mod log;
mod superblock;
#[cfg(test)]
mod tests;

use std::fmt;

use rangemap::RangeSet;

use self::superblock::Superblock;
use super::view::View;
use super::{Rest, Trouble, Volume, add_run};

/// Whether XFS is here.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(view: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    let mut magic = [0; 4];
    if view.len() < 512 {
        return Ok(None);
    }
    view.read_at(&mut magic, 0)?;
    Ok((magic == superblock::MAGIC).then_some("XFS"))
}

/// Says what is free. What the tools call free (`xfs_db -c 'freesp -s'`) includes the few blocks that
/// each group keeps at hand for its btrees, which are not given here.
///
/// # Errors
/// [`Trouble::Skip`] where anything is in doubt; [`Trouble::Io`].
pub(super) fn read(view: &View<'_>) -> Result<Volume, Trouble> {
    let fs = Superblock::read(view)?;
    log::check_clean(view, &fs)?;
    let mut free = RangeSet::new();
    let (mut in_runs, mut at_hand, mut in_btrees) = (0, 0, 0);
    for index in 0..fs.group_count {
        let group = group::read(view, &fs, index)?;
        for run in &group.free {
            let start = fs.offset(index, run.start);
            add_run(
                &mut free,
                start..start + u64::from(run.count) * fs.block_size,
            )?;
            in_runs += u64::from(run.count);
        }
        at_hand += group.at_hand;
        in_btrees += group.in_btrees;
    }
    // The superblock counts the blocks of the btrees as free: they would be, were there nothing to list.
    let counted = in_runs + at_hand + in_btrees;
    if fs.free_blocks != counted {
        return Err(Trouble::skip(format!(
            "counts {} free blocks in its superblock and {counted} in its groups: run xfs_repair",
            fs.free_blocks
        )));
    }
    Ok(Volume {
        rest: Rest::Unmarked,
        free,
        size: fs.bytes(),
        reported_free: (in_runs + at_hand) * fs.block_size,
    })
}

/// The doubt about metadata that is not as it must be.
fn damaged(what: impl fmt::Display) -> Trouble {
    Trouble::skip(format!("has damaged metadata ({what}): run xfs_repair"))
}
