//! One open disk of a library, with its background work.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::host_dir::{Identity, Pinned};
use super::probes::Probes;
use crate::compact::{IdlePolicy, IdleWork, Next};
use crate::disk::Disk;

/// What the background work does with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskState {
    /// Open without background work: read-only, or compaction is off or impossible.
    Open,
    /// Waits until no guest has used the disk for a while.
    Waiting,
    /// Being looked at or compacted.
    Compacting,
    /// Nothing can be gained until a guest changes the disk.
    Compact,
    /// Background work failed, for this reason; it is tried again after a while.
    Failed(String),
}

/// One open disk.
pub(super) struct OpenDisk {
    pub(super) identity: Identity,
    pub(super) pinned: Pinned,
    /// Names the content for the next opener; see [`Probes::content_at_open`].
    pub(super) content: u64,
    /// Read-only because another program reads it, not because it must be.
    pub(super) shared: bool,
    pub(super) read_only: bool,
    pub(super) path: Mutex<PathBuf>,
    pub(super) disk: Mutex<Option<Arc<Disk>>>,
    pub(super) work: Mutex<Option<IdleWork>>,
    pub(super) users: AtomicUsize,
    pub(super) used: Mutex<Instant>,
    pub(super) visiting: AtomicBool,
    pub(super) reclaimed: AtomicU64,
    pub(super) state: Mutex<DiskState>,
}

impl fmt::Debug for OpenDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenDisk")
            .field("path", &*self.path.lock())
            .finish_non_exhaustive()
    }
}

/// An open disk as [`Library::status`](super::Library::status) reports it.
#[derive(Clone, Debug)]
pub struct DiskStatus {
    /// The backing file, below the root.
    pub path: PathBuf,
    /// How many handles are open.
    pub handles: usize,
    /// Whether it can only be read.
    pub read_only: bool,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// The backing file's length in bytes.
    pub length: u64,
    /// Bytes that the host stores for it.
    pub allocated: u64,
    /// Bytes that background work gave back to the host since the disk was opened.
    pub reclaimed: u64,
    /// What background work does with it.
    pub state: DiskState,
}

impl OpenDisk {
    pub(super) fn users(&self) -> usize {
        self.users.load(Ordering::Acquire)
    }

    /// How long the last handle has been gone.
    pub(super) fn unused_for(&self) -> Duration {
        self.used.lock().elapsed()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether a handle for writing may be had, now or once another program is gone.
    pub(super) fn allows_writing(&self) -> bool {
        !self.read_only || self.shared
    }

    pub(super) fn is_visiting(&self) -> bool {
        self.visiting.load(Ordering::Relaxed)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.path.lock().clone()
    }

    pub(super) fn set_state(&self, state: DiskState) {
        *self.state.lock() = state;
    }

    /// A guest has it now: background work starts over, with its usual patience.
    pub(super) fn end_visit(&self) {
        if self.visiting.swap(false, Ordering::Relaxed) {
            *self.work.lock() = None;
        }
    }

    /// The guest requests so far that may have changed something; 0 once it is closed.
    pub(super) fn io_count(&self) -> u64 {
        self.disk.lock().as_ref().map_or(0, |disk| disk.io_count())
    }

    pub(super) fn virtual_size(&self) -> Option<u64> {
        self.disk.lock().as_ref().map(|disk| disk.len())
    }

    /// One step of background work; `None` once the disk is closed.
    pub(super) fn step(&self, policy: &IdlePolicy) -> Option<Next> {
        let mut slot = self.work.lock();
        if slot.is_none() {
            let disk = self.disk.lock().clone()?;
            *slot = Some(IdleWork::new(disk, *policy));
        }
        let work = slot.as_mut()?;
        let before = self.allocated();
        let next = work.step();
        let freed = before.saturating_sub(self.allocated());
        self.reclaimed.fetch_add(freed, Ordering::Relaxed);
        Some(next)
    }

    fn allocated(&self) -> u64 {
        self.pinned.stat().map_or(0, |stat| stat.allocated)
    }

    pub(super) fn status(&self) -> Option<DiskStatus> {
        let virtual_size = self.virtual_size()?;
        let stat = self.pinned.stat().ok()?;
        Some(DiskStatus {
            path: self.path(),
            handles: self.users(),
            read_only: self.read_only,
            virtual_size,
            length: stat.len,
            allocated: stat.allocated,
            reclaimed: self.reclaimed.load(Ordering::Relaxed),
            state: self.state.lock().clone(),
        })
    }

    /// Leaves a clean file, and closes it unless there are handles. Whether it worked.
    pub(super) fn shut(&self, probes: &Probes) -> bool {
        let disk = {
            // Together, so that no step begins with a disk that is about to go.
            let mut work = self.work.lock();
            *work = None;
            self.disk.lock().take()
        };
        let Some(disk) = disk else { return true };
        let closed = disk.close();
        // While the lock is still held: what others do to the file from here on is not our content.
        let stat = self.pinned.stat();
        drop(disk);
        match &closed {
            Err(error) => log::error!(
                "{}: not closed cleanly: {}",
                self.path().display(),
                chain(error)
            ),
            Ok(()) => {
                if let Ok(stat) = stat {
                    probes.content_at_close(&stat.stamp(), self.content);
                }
            }
        }
        closed.is_ok()
    }
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Transparent errors repeat their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
