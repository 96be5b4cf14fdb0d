//! What background work on a disk is expected to give back, and to cost.

use super::Progress;
use crate::disk::Disk;

/// An estimate in bytes, by which disks are put in order: nothing else rests on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outlook {
    /// What the host will get back.
    pub(crate) gain: u64,
    /// What is still to be read or moved for it.
    pub(crate) work: u64,
}

impl Outlook {
    /// Of a disk that nobody has looked through: all of it is to be read; what its file has unused is what is
    /// known of the gain.
    pub(crate) fn unseen(disk: &Disk) -> Self {
        let gain = unused(disk);
        let work = disk.file_len().saturating_sub(gain);
        Self { gain, work }
    }

    /// Of a disk that was looked through: what changes from here on is known without reading.
    pub(crate) fn seen(disk: &Disk) -> Self {
        let gain = unused(disk);
        Self { gain, work: gain }
    }

    /// As it is in the middle of a run.
    pub(crate) fn after(self, progress: Progress) -> Self {
        Self {
            work: progress.total.saturating_sub(progress.completed),
            ..self
        }
    }
}

/// What the file has beside its blocks: metadata, which is little, and what is free. Looks at each block.
fn unused(disk: &Disk) -> u64 {
    let slots = disk.maintenance().present_count();
    let used = slots.saturating_mul(disk.geometry().slot.len);
    disk.file_len().saturating_sub(used)
}
