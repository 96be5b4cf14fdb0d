//! Compaction of fixed disks: the file keeps all of the disk, but what it has beyond goes, and on request
//! the host gets back what it need not store.
//!
//! 1. *Pack*, of a VHDX ([`pack`]). QEMU makes fixed ones with room for every block in the file, gives none
//!    of them its place, and appends what is written: such a file is up to twice as long as it need be.
//! 2. *Punch*, on request ([`punch`]): what reads as zeros, and what the guest's filesystems call free,
//!    becomes holes in the host's file. Its length and what the guest relies on stay.
//!
//! No block is dropped: the file of a fixed disk has a place for each.

mod pack;
mod punch;

use std::sync::Arc;

use super::report::CompactReport;
use super::{CompactError, CompactOptions, Kept, Phase, Progress, Shared};
use crate::disk::Disk;
use crate::format::DiskType;

/// Compacts a fixed disk.
///
/// # Errors
/// [`CompactError::Fixed`] where nothing can be done but to punch, and that was not asked for; as
/// [`super::Operation::wait`].
pub(super) fn run(
    disk: &Arc<Disk>,
    options: CompactOptions,
    shared: &Shared,
) -> Result<CompactReport, CompactError> {
    debug_assert_eq!(disk.geometry().disk_type, DiskType::Fixed);
    let packed = pack::packed(disk);
    if packed.is_none() && !options.punch_holes {
        return Err(CompactError::Fixed);
    }
    if !options.dry_run {
        disk.maintenance().check_writable()?;
    }
    let (length_before, allocated_before) = disk.size_at_open();
    let mut report = CompactReport {
        length_before,
        allocated_before,
        length_after: disk.file_len(),
        ..CompactReport::default()
    };
    let turn = Turn { disk, shared };
    match packed {
        Some(packed) if options.dry_run => {
            report.blocks_moved = packed.moves;
            report.bytes_moved = packed.moves * disk.geometry().slot.len;
            report.length_after = packed.len;
        }
        Some(_) => {
            pack::pack(disk, &turn, &mut report)?;
            report.length_after = disk.file_len();
        }
        None => {}
    }
    let mut given_back = 0;
    if options.punch_holes {
        given_back = punch::punch(disk, options, &turn, &mut report)?;
    }
    report.allocated_after = if options.dry_run {
        allocated_before.saturating_sub(given_back)
    } else {
        disk.maintenance().sync()?;
        disk.allocated_bytes()?
    };
    turn.publish(Phase::Done, 0, 0);
    report.kept = kept(disk, report.length_after);
    Ok(report)
}

/// Why each byte of the file stays.
fn kept(disk: &Disk, length: u64) -> Vec<Kept> {
    let geometry = disk.geometry();
    let all = if geometry.is_flat {
        geometry.disk_len
    } else {
        u64::from(disk.maintenance().block_count()) * geometry.block_size
    };
    let all = all.min(length);
    [
        ("all of a fixed disk, whatever it holds", all),
        ("headers, tables, and gaps between them", length - all),
    ]
    .into_iter()
    .filter(|(_, bytes)| *bytes > 0)
    .map(|(reason, bytes)| Kept {
        reason: reason.to_owned(),
        bytes,
    })
    .collect()
}

/// Who follows the work, and may end it.
struct Turn<'a> {
    disk: &'a Disk,
    shared: &'a Shared,
}

impl Turn<'_> {
    fn publish(&self, phase: Phase, completed: u64, total: u64) {
        self.shared.publish(Progress {
            phase,
            completed,
            total,
        });
    }

    fn goes_on(&self) -> bool {
        !self.shared.is_cancelled() && !self.disk.maintenance().is_wanted()
    }

    /// # Errors
    /// [`CompactError::Cancelled`].
    fn go_on(&self) -> Result<(), CompactError> {
        match self.goes_on() {
            true => Ok(()),
            false => Err(CompactError::Cancelled),
        }
    }
}
