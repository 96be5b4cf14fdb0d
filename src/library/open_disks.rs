//! The disks that are open: one [`Disk`] for each backing file, however many handles use it.
//!
//! # What holds
//! 1. A backing file is open at most once. Whoever wants it while it is being opened or closed
//!    waits until that is over: two descriptors of this process would exclude each other.
//! 2. A disk with handles is never closed.
//! 3. When a disk is closed nobody but the closer refers to it, so its descriptor and its lock are
//!    gone once that returns.
//!
//! 4. A disk that has children is opened read-only, and so are all parents of an open disk; their
//!    locks keep each from being opened for writing. What keeps a parent and has no users (a disk
//!    that lingers, or is being compacted) gives way.
//!
//! Lock order: a disk's `joining`, then `slots`, then a disk's `work`, then its `disk`. No lock but `joining` and
//! `work` is held across host I/O; `work` is held for one step of background work.
//!
//! # A host that does not answer
//! What is opened waits for its own device, and its parents', and for no other: to make room, only disks
//! of the same device are closed at once; those of others are closed by their own workers, and not waited for.
//! [`OpenDisks::close_next`] is called by several threads for each device.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use super::device::{Devices, Key, Task};
use super::handle::{DiskHandle, Lease};
use super::open_disk::{OpenDisk, Opened, stamps};
use super::probes::{Failure, KnownDisk, Probes};
use crate::compact::Outlook;
use crate::disk::{Disk, HostParents, OpenOptions};
use crate::error::{ErrorKind, OpenError, OpenProblem};
use crate::storage::host::pin::Identity;
use crate::storage::host::pin::{Pin, Stat};
use crate::storage::host::{HostFile, HostOptions};

/// How often a parent that is in use is asked for, and how long in between.
const ATTEMPTS: u32 = 50;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);

/// A file that is to be opened: found, and held so that it stays the one that was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) stat: Stat,
    pub(super) pinned: Pin,
    /// Whether its permissions and file system let us write.
    pub(super) writable: bool,
    /// Whether other disks are its children.
    pub(super) is_parent: bool,
}

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
    /// Background work: only if nobody has it open already.
    Visit,
}

/// What came of an open disk that somebody wants.
enum Joined {
    Handle(DiskHandle),
    /// It is closed; its slot is busy, and the caller's to settle.
    Closed,
    /// Somebody else has closed it.
    Late,
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
    /// Only what is open may be opened.
    retired: bool,
}

/// All open disks of a library.
pub(super) struct OpenDisks {
    slots: Mutex<Slots>,
    /// A slot has stopped being busy.
    settled: Condvar,
    max_open: NonZeroUsize,
    read_only: bool,
    punch_holes: bool,
    parents: HostParents,
    devices: Arc<Devices>,
}

impl OpenDisks {
    pub(super) fn new(
        max_open: NonZeroUsize,
        read_only: bool,
        punch_holes: bool,
        parents: HostParents,
        devices: Arc<Devices>,
    ) -> Self {
        Self {
            slots: Mutex::new(Slots {
                by_identity: LruCache::unbounded(),
                closed: false,
                retired: false,
            }),
            settled: Condvar::new(),
            max_open,
            read_only,
            punch_holes,
            parents,
            devices,
        }
    }

    /// Where parents are looked for.
    pub(super) fn parents(&self) -> &HostParents {
        &self.parents
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

    /// A handle to the disk in `found`, which is opened if need be.
    pub(super) fn open(
        &self,
        probes: &Probes,
        found: Found,
        purpose: Purpose,
    ) -> Result<DiskHandle, Refused> {
        if purpose != Purpose::Read && (self.read_only || !found.writable || found.is_parent) {
            return Err(Refused::ReadOnly);
        }
        if let Some(handle) = self.join(probes, &found, purpose)? {
            handle.wait_to_write();
            return Ok(handle);
        }
        // The slot is busy, and ours to settle.
        let identity = found.stat.identity();
        let opened = self.open_file(probes, found, purpose);
        let mut slots = self.slots.lock();
        let opened = match opened {
            Ok((owner, disk)) => {
                slots.by_identity.put(identity, Slot::Open(owner.clone()));
                let (key, task) = (Key::Disk(identity), Task::Disk(owner.clone()));
                let outlook = Outlook {
                    gain: 0,
                    work: disk.size_at_open().1,
                };
                // Else another program could wait for it until its first turn.
                let holds = purpose == Purpose::Visit;
                owner.device.queue.add(key, task, outlook, holds);
                Ok((owner.lease(), disk))
            }
            Err(refused) => {
                slots.by_identity.pop(&identity);
                Err(refused)
            }
        };
        drop(slots);
        self.settled.notify_all();
        let result = opened.and_then(|(lease, disk)| self.lend(lease, disk, purpose));
        self.evict(probes, self.devices.number(&identity));
        result.inspect(DiskHandle::wait_to_write)
    }

    /// A handle to a disk that is open already. `None` where it is not; then its slot is busy, and
    /// the caller's to settle.
    fn join(
        &self,
        probes: &Probes,
        found: &Found,
        purpose: Purpose,
    ) -> Result<Option<DiskHandle>, Refused> {
        let identity = found.stat.identity();
        let mut slots = self.slots.lock();
        loop {
            if slots.closed {
                return Err(Refused::Closed);
            }
            let is_retired = slots.retired;
            match slots.by_identity.get(&identity) {
                Some(_) if purpose == Purpose::Visit => return Err(Refused::Busy),
                Some(Slot::Busy) => self.settled.wait(&mut slots),
                Some(Slot::Open(owner)) => {
                    let owner = owner.clone();
                    drop(slots);
                    match self.join_open(probes, found, purpose, &owner)? {
                        Joined::Handle(handle) => return Ok(Some(handle)),
                        Joined::Closed => return Ok(None),
                        Joined::Late => slots = self.slots.lock(),
                    }
                }
                None if is_retired => return Err(Refused::Closed),
                None => {
                    slots.by_identity.put(identity, Slot::Busy);
                    return Ok(None);
                }
            }
        }
    }

    /// As [`Self::join`], of a disk that was found open. The host is asked, so not with `slots` locked.
    fn join_open(
        &self,
        probes: &Probes,
        found: &Found,
        purpose: Purpose,
        owner: &Arc<OpenDisk>,
    ) -> Result<Joined, Refused> {
        let identity = found.stat.identity();
        // One at a time, so that only those count as users that have a handle.
        let _joining = owner.joining.lock();
        let lease = match self.slots.lock().by_identity.peek(&identity) {
            Some(Slot::Open(now)) if Arc::ptr_eq(now, owner) => owner.lease(),
            _ => return Ok(Joined::Late),
        };
        // The other reader, or the child, may be gone; and a failed disk is good again
        // once it is opened anew. So is one that others have changed; whether they are done
        // is seen then.
        let reopen = purpose == Purpose::Write
            && (owner.may_become_writable() || !owner.is_ours_to_write())
            || owner.has_failed();
        if reopen {
            let mut slots = self.slots.lock();
            // But for us.
            if owner.users() == 1 {
                match slots.by_identity.get_mut(&identity) {
                    Some(slot @ Slot::Open(_)) => *slot = Slot::Busy,
                    _ => return Ok(Joined::Late),
                }
                drop(slots);
                drop(lease);
                owner.device.queue.remove(&Key::Disk(identity));
                owner.shut(probes);
                return Ok(Joined::Closed);
            }
        }
        owner.set_path(found.path.clone());
        let disk = owner.disk().ok_or(Refused::Closed)?;
        self.lend(lease, disk, purpose).map(Joined::Handle)
    }

    fn lend(&self, lease: Lease, disk: Arc<Disk>, purpose: Purpose) -> Result<DiskHandle, Refused> {
        let owner = &lease.owner;
        let writable = purpose == Purpose::Write;
        if writable && owner.may_become_writable() {
            let reason = match owner.is_shared() {
                true => {
                    "it was opened read-only, when another program read it or the host was full; close it first"
                }
                false => "it was opened read-only when it had children; close it first",
            };
            return Err(Refused::Failed(Failure {
                reason: reason.to_owned(),
                kind: ErrorKind::InUse,
            }));
        }
        if writable && owner.is_read_only() {
            return Err(Refused::ReadOnly);
        }
        let lent = OpenDisk::lend(lease, disk, writable);
        lent.ok_or_else(|| {
            let reason = "another program has opened the file while it was open read-only here; close it there, \
                          and the disk here, first";
            Refused::Failed(Failure {
                reason: reason.to_owned(),
                kind: ErrorKind::InUse,
            })
        })
    }

    fn open_file(
        &self,
        probes: &Probes,
        found: Found,
        purpose: Purpose,
    ) -> Result<(Arc<OpenDisk>, Arc<Disk>), Refused> {
        let stamp = found.stat.stamp();
        let mut shared = false;
        let opened = if self.read_only || !found.writable || found.is_parent {
            self.open_host(probes, &found, true, purpose)
        } else {
            self.open_host(probes, &found, false, purpose)
                .or_else(|error| match error.problem() {
                    OpenProblem::NotWritable(reason) if purpose != Purpose::Visit => {
                        let path = found.path.display();
                        log::warn!("{path}: opened read-only, it cannot be written: {reason}");
                        self.open_host(probes, &found, true, purpose)
                            .inspect(|(disk, _)| probes.freeze(&stamp, KnownDisk::of(disk)))
                    }
                    // A full host has no room for what an interrupted owner left to be put right.
                    _ if purpose == Purpose::Read
                        && matches!(error.kind(), ErrorKind::InUse | ErrorKind::NoSpace) =>
                    {
                        shared = true;
                        self.open_host(probes, &found, true, purpose)
                    }
                    _ => Err(error),
                })
        };
        let (disk, host) = opened.map_err(|error| {
            let failure = Failure::of(&error);
            match failure.kind {
                // Who visits says so, once.
                ErrorKind::InUse if purpose == Purpose::Visit => {}
                _ if purpose == Purpose::Visit && failure.may_pass() => {
                    log::debug!("{}: not visited: {}", found.path.display(), failure.reason);
                }
                // Says nothing about the file: it may be otherwise the next moment.
                ErrorKind::InUse | ErrorKind::NoSpace => {
                    log::warn!("{}: {}", found.path.display(), failure.reason)
                }
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
            content: probes.content_at_open(&stamps(stamp, &disk)),
            shared,
            is_parent: found.is_parent && found.writable && !self.read_only,
            visiting: purpose == Purpose::Visit,
            host,
            device: self.devices.of(&stamp.identity),
        };
        let owner = Arc::new(OpenDisk::new(disk.clone(), opened));
        Ok((owner, disk))
    }

    fn open_host(
        &self,
        probes: &Probes,
        found: &Found,
        read_only: bool,
        purpose: Purpose,
    ) -> Result<(Arc<Disk>, Weak<HostFile>), OpenError> {
        let mut attempts = 0;
        loop {
            let opened = self.try_host(found, read_only, purpose);
            attempts += 1;
            match &opened {
                Err(error) if attempts < ATTEMPTS => match error.parent_in_use() {
                    Some(parent) if self.release(probes, found, parent) => {}
                    // What lingers for the next user gives way to one that is there.
                    None if attempts == 1 && error.is_out_of_memory() => {
                        self.close_lingering(probes, self.devices.number(&found.stat.identity()))
                    }
                    _ => return opened,
                },
                _ => return opened,
            }
        }
    }

    /// Closes a disk that `child` wants as a parent, unless it has users. Whether it may be free now.
    fn release(&self, probes: &Probes, child: &Found, parent: &Path) -> bool {
        let Ok(stat) = Stat::at(parent) else {
            return false;
        };
        if stat.identity() == child.stat.identity() {
            // It is its own ancestor.
            return false;
        }
        let is_busy = match self.slots.lock().by_identity.peek(&stat.identity()) {
            None => return false,
            Some(Slot::Open(_)) => false,
            Some(Slot::Busy) => true,
        };
        if is_busy {
            // Being opened, perhaps for background work, or closed. Not waited for: its opener may
            // want a parent in turn.
            std::thread::sleep(BETWEEN_ATTEMPTS);
            return true;
        }
        self.close_unused(probes, &stat.identity()).is_some()
    }

    fn try_host(
        &self,
        found: &Found,
        read_only: bool,
        purpose: Purpose,
    ) -> Result<(Arc<Disk>, Weak<HostFile>), OpenError> {
        let host = HostOptions {
            read_only,
            lock: true,
            no_follow: false,
        };
        let storage = Arc::new(found.pinned.open(&host)?);
        if purpose == Purpose::Visit {
            // Before anything is written, be it only to finish what was interrupted. That the file has been
            // quiet has been seen.
            (storage.claim(Duration::ZERO, &|_| false))
                .map_err(|problem| OpenError::new(&found.path, problem))?;
        }
        let options = OpenOptions {
            read_only,
            lock: true,
            punch_holes: self.punch_holes,
        };
        let weak = Arc::downgrade(&storage);
        let disk = Disk::open_storage_with(storage, &found.path, &options, &self.parents)?;
        if let Some(host) = weak.upgrade() {
            // What opening it has put right is ours.
            host.note(&|| false);
        }
        Ok((disk, weak))
    }

    /// Closes the disks that have been unused longest, until no more than the limit are open: at once those of
    /// the device `here`, on which the caller waits anyway. Others are told to go.
    fn evict(&self, probes: &Probes, here: u64) {
        loop {
            let oldest = {
                let slots = self.slots.lock();
                let (mut oldest, mut going) = (None, 0);
                for (_, slot) in slots.by_identity.iter().rev() {
                    match slot {
                        Slot::Open(disk) if disk.gives_way() => going += 1,
                        Slot::Open(disk) if disk.users() == 0 => {
                            oldest = oldest.or_else(|| Some(disk.clone()));
                        }
                        _ => {}
                    }
                }
                if slots.by_identity.len() <= self.max_open.get() + going {
                    return;
                }
                oldest
            };
            let Some(oldest) = oldest else { return };
            self.send_away(probes, &oldest, here);
        }
    }

    /// Closes a disk that nobody uses, if it is on the device `here` and no step of work would be waited for;
    /// another one is told to go.
    fn send_away(&self, probes: &Probes, disk: &OpenDisk, here: u64) {
        if disk.device.number == here && !disk.is_at_work() {
            self.close_unused(probes, &disk.identity);
        } else {
            disk.give_way();
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

    /// Has the disks closed that have no handles, and opens no others from now on.
    pub(super) fn retire(&self) {
        self.slots.lock().retired = true;
        self.all().iter().for_each(|disk| disk.give_way());
    }

    /// Closes the disks without handles, as [`Self::send_away`] does.
    fn close_lingering(&self, probes: &Probes, here: u64) {
        for disk in self.all().iter().filter(|disk| disk.users() == 0) {
            self.send_away(probes, disk, here);
        }
    }

    /// None is opened any more. The devices of those that are open, or about to be, and how many each has.
    pub(super) fn refuse(&self) -> HashMap<u64, usize> {
        let mut slots = self.slots.lock();
        slots.closed = true;
        let mut devices = HashMap::new();
        for (identity, _) in &slots.by_identity {
            *devices.entry(self.devices.number(identity)).or_default() += 1;
        }
        devices
    }

    /// Closes a disk of that device, or, where it has handles, leaves that to the last of them. Whether it was
    /// left clean; `None` where none is left. To be called once none is [opened](Self::refuse) any more.
    pub(super) fn close_next(&self, probes: &Probes, device: u64) -> Option<bool> {
        let mut slots = self.slots.lock();
        let owner = loop {
            let is_here = |identity: &Identity| self.devices.number(identity) == device;
            let here = || {
                slots
                    .by_identity
                    .iter()
                    .filter(|(identity, _)| is_here(identity))
            };
            let mut open = here().filter_map(|(_, slot)| match slot {
                Slot::Open(owner) => Some(owner),
                Slot::Busy => None,
            });
            // A step is waited for last: it may not end.
            let idle = open.clone().find(|owner| !owner.is_at_work());
            if let Some(owner) = idle.or_else(|| open.next()).cloned() {
                break owner;
            }
            here().next()?;
            // Being opened, or closed.
            self.settled.wait(&mut slots);
        };
        slots.by_identity.put(owner.identity, Slot::Busy);
        drop(slots);
        Some(self.close_busy(probes, &owner))
    }

    /// Those that are still open.
    pub(super) fn left(&self) -> usize {
        self.slots.lock().by_identity.len()
    }

    /// Closes a disk whose slot the caller has made busy. Whether it was left clean.
    fn close_busy(&self, probes: &Probes, owner: &OpenDisk) -> bool {
        owner.device.queue.remove(&Key::Disk(owner.identity));
        let clean = owner.shut(probes);
        self.slots.lock().by_identity.pop(&owner.identity);
        self.settled.notify_all();
        log::debug!("{}: closed", owner.path().display());
        clean
    }
}
