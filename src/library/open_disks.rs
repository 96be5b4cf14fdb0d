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

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use super::agent::Bell;
use super::host_dir::{Identity, Pinned, Stat};
use super::open_disk::{DiskHandle, DiskStatus, OpenDisk, Opened};
use super::probes::{Failure, Probes};
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
                    if purpose == Purpose::Write && owner.is_shared() && owner.users() == 0 {
                        // The other reader may be gone: try again to get it for writing.
                        slots.by_identity.put(identity, Slot::Busy);
                        drop(slots);
                        owner.shut(probes);
                        return Ok(None);
                    }
                    owner.set_path(found.path.clone());
                    let disk = owner.disk().ok_or(Refused::Closed)?;
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
        if writable && owner.is_shared() {
            let reason = "another program reads it; close it there first".to_owned();
            return Err(Refused::Failed(Failure {
                reason,
                kind: ErrorKind::InUse,
            }));
        }
        if writable && owner.is_read_only() {
            return Err(Refused::ReadOnly);
        }
        Ok(owner.lend(disk, writable, self.bell.clone()))
    }

    fn open_file(
        &self,
        probes: &Probes,
        found: Found,
        purpose: Purpose,
    ) -> Result<(Arc<OpenDisk>, Arc<Disk>), Refused> {
        let stamp = found.stat.stamp();
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
        // Now that the lock keeps others from changing it.
        let stamp = found.pinned.stat().unwrap_or(found.stat).stamp();
        let opened = Opened {
            identity: stamp.identity,
            pinned: found.pinned,
            path: found.path,
            content: probes.content_at_open(&stamp),
            shared,
            visiting: purpose == Purpose::Visit,
        };
        let owner = Arc::new(OpenDisk::new(disk.clone(), opened));
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
