//! Handles to open disks.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::open_disk::OpenDisk;
use crate::disk::Disk;

impl OpenDisk {
    /// Keeps the disk open. Call with the slots locked: what has users is not closed.
    pub(super) fn lease(self: &Arc<Self>) -> Lease {
        self.users.fetch_add(1, Ordering::Acquire);
        Lease {
            owner: Arc::clone(self),
        }
    }

    /// A handle; `None` of one for writing where another program has changed the file, or is about to: the
    /// host is asked.
    pub(super) fn lend(lease: Lease, disk: Arc<Disk>, write: bool) -> Option<DiskHandle> {
        let owner = Arc::clone(&lease.owner);
        if write {
            disk.announce_writing();
        }
        let handle = DiskHandle {
            disk,
            writable: write,
            content: owner.content.load(Ordering::Acquire),
            content_kept: false,
            lease,
        };
        // What waits while nobody may write to it, waits no longer.
        if write || owner.is_visiting() {
            owner.device.wake(owner.identity);
        }
        // Announced before: background work that takes the file now sees it.
        if write && !owner.is_ours_to_write() {
            return None;
        }
        Some(handle)
    }
}

/// A disk in use. The disk stays open at least until this is dropped.
pub struct DiskHandle {
    // Before `lease`: without handles nobody refers to the disk.
    disk: Arc<Disk>,
    writable: bool,
    content: u64,
    content_kept: bool,
    lease: Lease,
}

impl fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskHandle")
            .field("disk", &self.lease.owner)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

impl DiskHandle {
    /// Waits for background work that nobody who may write must meet: no longer than one commit.
    pub(super) fn wait_to_write(&self) {
        if self.writable {
            self.disk.wait_to_write();
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Whether this handle was opened for writing. The disk itself may allow more.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether the disk still holds what it held when the node was last opened and closed, but for
    /// writes through this library: what a front end cached of it is good.
    pub fn content_is_kept(&self) -> bool {
        self.content_kept
    }

    /// Where the backing file was found, below the library's root.
    pub fn path(&self) -> PathBuf {
        self.lease.owner.path()
    }

    pub(super) fn content(&self) -> u64 {
        self.content
    }

    pub(super) fn set_content_kept(&mut self, kept: bool) {
        self.content_kept = kept;
    }
}

impl Drop for DiskHandle {
    fn drop(&mut self) {
        if self.writable {
            self.disk.end_writing();
            self.lease.owner.note(&self.disk);
        }
    }
}

/// As long as there is one, the disk is not closed.
pub(super) struct Lease {
    pub(super) owner: Arc<OpenDisk>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.owner.used.lock() = Instant::now();
        self.owner.users.fetch_sub(1, Ordering::Release);
        self.owner.device.wake(self.owner.identity);
    }
}
