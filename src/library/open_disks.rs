//! The disks that are open: one [`Disk`] for each backing file, however many handles use it.
//!
//! # What holds
//! 1. A backing file is open at most once. Whoever wants it while it is being opened or closed
//!    waits until that is over: two descriptors of this process would exclude each other.
//! 2. A disk with handles is never closed.
//! 3. When a disk is closed nobody but the closer refers to it, so its descriptor and its lock are
//!    gone once that returns.
//!
//! Lock order: `slots`, then a disk's `work`, then its `disk`. No lock but `work` is held across
//! host I/O; `work` is held for one step of background work.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use super::agent::Bell;
use super::host_dir::{Identity, Pinned, Stat};
use super::probes::{Failure, Probes};
use crate::compact::{IdlePolicy, IdleWork, Next};
use crate::disk::{Disk, OpenOptions};
use crate::error::{ErrorKind, OpenError, OpenProblem};
use crate::storage::host::{HostFile, HostOptions};

/// A file that is to be opened: found, and held so that it stays the one that was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) stat: Stat,
    pub(super) pinned: Pinned,
    /// Whether its permissions and file system let us write.
    pub(super) writable: bool,
}

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
    /// Background work: only if nobody has it open already.
    Visit,
}

/// Why there is no handle.
#[derive(Debug)]
pub(super) enum Refused {
    Failed(Failure),
    ReadOnly,
    Closed,
    /// A visit found the disk open.
    Busy,
}

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
    content: u64,
    /// Read-only because another program reads it, not because it must be.
    shared: bool,
    read_only: bool,
    path: Mutex<PathBuf>,
    disk: Mutex<Option<Arc<Disk>>>,
    work: Mutex<Option<IdleWork>>,
    users: AtomicUsize,
    used: Mutex<Instant>,
    visiting: AtomicBool,
    reclaimed: AtomicU64,
    state: Mutex<DiskState>,
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
    fn shut(&self, probes: &Probes) -> bool {
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

struct Lease {
    owner: Arc<OpenDisk>,
    bell: Arc<Bell>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.owner.used.lock() = Instant::now();
        self.owner.users.fetch_sub(1, Ordering::Release);
        self.bell.ring();
    }
}

enum Slot {
    /// Being opened or closed.
    Busy,
    Open(Arc<OpenDisk>),
}

struct Slots {
    by_identity: LruCache<Identity, Slot>,
    closed: bool,
}

/// All open disks of a library.
pub(super) struct OpenDisks {
    slots: Mutex<Slots>,
    /// A slot has stopped being busy.
    settled: Condvar,
    max_open: NonZeroUsize,
    read_only: bool,
    punch_holes: bool,
    bell: Arc<Bell>,
}

impl OpenDisks {
    pub(super) fn new(
        max_open: NonZeroUsize,
        read_only: bool,
        punch_holes: bool,
        bell: Arc<Bell>,
    ) -> Self {
        Self {
            slots: Mutex::new(Slots {
                by_identity: LruCache::unbounded(),
                closed: false,
            }),
            settled: Condvar::new(),
            max_open,
            read_only,
            punch_holes,
            bell,
        }
    }

    /// The open disk of that file, if it is open.
    pub(super) fn get(&self, identity: &Identity) -> Option<Arc<OpenDisk>> {
        match self.slots.lock().by_identity.peek(identity) {
            Some(Slot::Open(disk)) => Some(disk.clone()),
            _ => None,
        }
    }

    pub(super) fn all(&self) -> Vec<Arc<OpenDisk>> {
        let slots = self.slots.lock();
        let open = slots.by_identity.iter().filter_map(|(_, slot)| match slot {
            Slot::Open(disk) => Some(disk.clone()),
            Slot::Busy => None,
        });
        open.collect()
    }

    pub(super) fn status(&self) -> Vec<DiskStatus> {
        self.all().iter().filter_map(|disk| disk.status()).collect()
    }

    /// A handle to the disk in `found`, which is opened if need be.
    pub(super) fn open(
        &self,
        probes: &Probes,
        found: Found,
        purpose: Purpose,
    ) -> Result<DiskHandle, Refused> {
        if purpose != Purpose::Read && (self.read_only || !found.writable) {
            return Err(Refused::ReadOnly);
        }
        if let Some(handle) = self.join(probes, &found, purpose)? {
            return Ok(handle);
        }
        // The slot is busy, and ours to settle.
        let identity = found.stat.identity;
        let opened = self.open_file(probes, found, purpose);
        let mut slots = self.slots.lock();
        let result = match opened {
            Ok((owner, disk)) => {
                slots.by_identity.put(identity, Slot::Open(owner.clone()));
                self.lend(&owner, disk, purpose)
            }
            Err(refused) => {
                slots.by_identity.pop(&identity);
                Err(refused)
            }
        };
        drop(slots);
        self.settled.notify_all();
        self.bell.ring();
        self.evict(probes);
        result
    }

    /// A handle to a disk that is open already. `None` where it is not; then its slot is busy, and
    /// the caller's to settle.
    fn join(
        &self,
        probes: &Probes,
        found: &Found,
        purpose: Purpose,
    ) -> Result<Option<DiskHandle>, Refused> {
        let identity = found.stat.identity;
        let mut slots = self.slots.lock();
        loop {
            if slots.closed {
                return Err(Refused::Closed);
            }
            match slots.by_identity.get(&identity) {
                Some(_) if purpose == Purpose::Visit => return Err(Refused::Busy),
                Some(Slot::Busy) => self.settled.wait(&mut slots),
                Some(Slot::Open(owner)) => {
                    let owner = owner.clone();
                    if purpose == Purpose::Write && owner.shared && owner.users() == 0 {
                        // The other reader may be gone: try again to get it for writing.
                        slots.by_identity.put(identity, Slot::Busy);
                        drop(slots);
                        owner.shut(probes);
                        return Ok(None);
                    }
                    found.path.clone_into(&mut owner.path.lock());
                    let disk = owner.disk.lock().clone().ok_or(Refused::Closed)?;
                    return self.lend(&owner, disk, purpose).map(Some);
                }
                None => {
                    slots.by_identity.put(identity, Slot::Busy);
                    return Ok(None);
                }
            }
        }
    }

    /// Call with `slots` locked: what has users is not evicted.
    fn lend(
        &self,
        owner: &Arc<OpenDisk>,
        disk: Arc<Disk>,
        purpose: Purpose,
    ) -> Result<DiskHandle, Refused> {
        let writable = purpose == Purpose::Write;
        if writable && owner.shared {
            let reason = "another program reads it; close it there first".to_owned();
            return Err(Refused::Failed(Failure {
                reason,
                kind: ErrorKind::InUse,
            }));
        }
        if writable && owner.read_only {
            return Err(Refused::ReadOnly);
        }
        owner.users.fetch_add(1, Ordering::Acquire);
        let lease = Lease {
            owner: owner.clone(),
            bell: self.bell.clone(),
        };
        Ok(DiskHandle {
            disk,
            writable,
            content: owner.content,
            content_kept: false,
            lease,
        })
    }

    fn open_file(
        &self,
        probes: &Probes,
        found: Found,
        purpose: Purpose,
    ) -> Result<(Arc<OpenDisk>, Arc<Disk>), Refused> {
        // By now, not when it was found: another program may have been writing to it until now.
        let stamp = found.pinned.stat().unwrap_or(found.stat).stamp();
        let content = probes.content_at_open(&stamp);
        let mut shared = false;
        let opened = if self.read_only || !found.writable {
            self.open_host(&found, true)
        } else {
            self.open_host(&found, false)
                .or_else(|error| match error.problem() {
                    OpenProblem::NotWritable(reason) if purpose != Purpose::Visit => {
                        let path = found.path.display();
                        log::warn!("{path}: opened read-only, it cannot be written: {reason}");
                        self.open_host(&found, true)
                            .inspect(|disk| probes.freeze(&stamp, disk.len()))
                    }
                    OpenProblem::InUse(_) if purpose == Purpose::Read => {
                        shared = true;
                        self.open_host(&found, true)
                    }
                    _ => Err(error),
                })
        };
        let disk = opened.map_err(|error| {
            let failure = Failure::of(&error);
            match failure.kind {
                _ if purpose == Purpose::Visit => {
                    log::debug!("{}: not visited: {}", found.path.display(), failure.reason);
                }
                // Says nothing about the file: it may be free the next moment.
                ErrorKind::InUse => log::warn!("{}: {}", found.path.display(), failure.reason),
                _ => probes.fail(&stamp, &found.path, failure.clone()),
            }
            Refused::Failed(failure)
        })?;
        let owner = Arc::new(OpenDisk {
            identity: stamp.identity,
            pinned: found.pinned,
            content,
            shared,
            read_only: disk.is_read_only(),
            path: Mutex::new(found.path),
            disk: Mutex::new(Some(disk.clone())),
            work: Mutex::new(None),
            users: AtomicUsize::new(0),
            used: Mutex::new(Instant::now()),
            visiting: AtomicBool::new(purpose == Purpose::Visit),
            reclaimed: AtomicU64::new(0),
            state: Mutex::new(DiskState::Open),
        });
        Ok((owner, disk))
    }

    fn open_host(&self, found: &Found, read_only: bool) -> Result<Arc<Disk>, OpenError> {
        let host = HostOptions {
            read_only,
            lock: true,
            no_follow: false,
        };
        let storage = HostFile::open(&found.pinned.path(), &host)?;
        let options = OpenOptions {
            read_only,
            lock: true,
            punch_holes: self.punch_holes,
        };
        Disk::open_storage(Arc::new(storage), &found.path, &options)
    }

    /// Closes the disks that have been unused longest, until no more than the limit are open.
    fn evict(&self, probes: &Probes) {
        loop {
            let oldest = {
                let slots = self.slots.lock();
                if slots.by_identity.len() <= self.max_open.get() {
                    return;
                }
                slots
                    .by_identity
                    .iter()
                    .rev()
                    .find_map(|(identity, slot)| match slot {
                        Slot::Open(disk) if disk.users() == 0 => Some(*identity),
                        _ => None,
                    })
            };
            let Some(oldest) = oldest else { return };
            self.close_unused(probes, &oldest);
        }
    }

    /// Closes that disk unless somebody uses it. The file's attributes afterwards, where it did.
    pub(super) fn close_unused(&self, probes: &Probes, identity: &Identity) -> Option<Stat> {
        let owner = {
            let mut slots = self.slots.lock();
            match slots.by_identity.peek_mut(identity) {
                Some(slot @ Slot::Open(_)) => match std::mem::replace(slot, Slot::Busy) {
                    Slot::Open(owner) if owner.users() == 0 => owner,
                    used => {
                        *slot = used;
                        return None;
                    }
                },
                _ => return None,
            }
        };
        self.close_busy(probes, &owner);
        owner.pinned.stat().ok()
    }

    /// Closes every disk, or, where it has handles, leaves that to the last of them; none can be
    /// opened any more. How many were not left clean.
    pub(super) fn close_all(&self, probes: &Probes) -> usize {
        let mut failed = 0;
        let mut slots = self.slots.lock();
        slots.closed = true;
        loop {
            let open = slots
                .by_identity
                .iter_mut()
                .find_map(|(_, slot)| match slot {
                    Slot::Open(_) => match std::mem::replace(slot, Slot::Busy) {
                        Slot::Open(owner) => Some(owner),
                        Slot::Busy => None,
                    },
                    Slot::Busy => None,
                });
            match open {
                Some(owner) => {
                    drop(slots);
                    failed += usize::from(!self.close_busy(probes, &owner));
                    slots = self.slots.lock();
                }
                None if slots.by_identity.is_empty() => return failed,
                None => self.settled.wait(&mut slots),
            }
        }
    }

    /// Closes a disk whose slot the caller has made busy. Whether it was left clean.
    fn close_busy(&self, probes: &Probes, owner: &OpenDisk) -> bool {
        let clean = owner.shut(probes);
        self.slots.lock().by_identity.pop(&owner.identity);
        self.settled.notify_all();
        log::debug!("{}: closed", owner.path().display());
        clean
    }
}
