//! One open disk, and the handles to it.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::device::Device;
use super::probes::Probes;
use super::turn::Turn;
use crate::compact::{CompactReport, IdlePolicy, IdleWork, LastWord, Next, Outlook, Room};
use crate::disk::Disk;
use crate::error::chain;
use crate::storage::Storage;
use crate::storage::host::pin::{Identity, Stamp};
use crate::storage::host::pin::{Pin, Stat};
use crate::storage::host::{Hold, HostFile};

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

/// What is known of a file that has just been opened.
pub(super) struct Opened {
    pub(super) identity: Identity,
    pub(super) pinned: Pin,
    pub(super) path: PathBuf,
    /// Names the content for the next opener; see [`Probes::content_at_open`].
    pub(super) content: u64,
    /// Read-only because another program reads it, not because it must be.
    pub(super) shared: bool,
    /// Read-only because other disks are its children.
    pub(super) is_parent: bool,
    /// Opened for background work alone.
    pub(super) visiting: bool,
    /// The file, as long as the disk is open.
    pub(super) host: Weak<HostFile>,
    /// Where it is.
    pub(super) device: Arc<Device>,
}

/// One open disk.
pub(super) struct OpenDisk {
    pub(super) identity: Identity,
    pub(super) pinned: Pin,
    /// Names the content for the next opener; see [`Probes::content_at_open`].
    pub(super) content: AtomicU64,
    /// Read-only because another program reads it, not because it must be.
    shared: bool,
    /// Read-only because other disks were its children then.
    is_parent: bool,
    read_only: bool,
    path: Mutex<PathBuf>,
    disk: Mutex<Option<Arc<Disk>>>,
    work: Mutex<Option<IdleWork>>,
    pub(super) users: AtomicUsize,
    pub(super) used: Mutex<Instant>,
    visiting: AtomicBool,
    host: Weak<HostFile>,
    /// Whether a guest has had it open for writing.
    written: AtomicBool,
    /// Whether it was said why it is left alone.
    told: AtomicBool,
    last_run: Mutex<Option<Arc<CompactReport>>>,
    /// Bytes that could go, and are less than background work is done for.
    pub(super) too_little: AtomicU64,
    /// Whether something stays because the host has no room to move it.
    pub(super) lacks_room: AtomicBool,
    reclaimed: AtomicU64,
    state: Mutex<DiskState>,
    pub(super) device: Arc<Device>,
    /// How background work stands: for the worker of the device alone.
    pub(super) turn: Mutex<Turn>,
    /// Held by who looks whether it can be had.
    pub(super) joining: Mutex<()>,
    /// There may be something to do though no guest has changed it.
    look_again: AtomicBool,
    /// It is to be closed, to make room, unless somebody uses it.
    gives_way: AtomicBool,
    /// The file's length, and what the host stores of it, as last seen.
    sizes: Mutex<(u64, u64)>,
}

/// What a step of background work came to.
pub(super) struct Stepped {
    pub(super) next: Next,
    /// Whether it did something, rather than only look whether there is something to do.
    pub(super) worked: bool,
    /// Whether a run is under way.
    pub(super) is_running: bool,
    /// The count of guest requests that the run knows of; of a run that came to its end.
    pub(super) seen: Option<u64>,
    pub(super) outlook: Outlook,
}

/// A step that takes less time takes nothing from anybody.
const NOTICEABLE: Duration = Duration::from_micros(100);

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
    /// The file of the disk that it is over, if it is: below the root, or absolute where that lies
    /// elsewhere.
    pub parent: Option<PathBuf>,
    /// The disk files below the root that are over this one; as last looked for.
    pub children: Vec<PathBuf>,
    /// What the last run of background work came to.
    pub last_run: Option<Arc<CompactReport>>,
    /// Bytes that could go, and are less than background work is done for.
    pub too_little: u64,
    /// Of how much of the time background work goes on beside active guests of the same file system now, from 0
    /// to 1.
    pub busy_share: f64,
    /// The room of the host's file system that the backing file is on, as of the last few seconds in which there
    /// was background work on it.
    pub room: Option<Room>,
}

/// Whatever changes when the content of a disk does: the stamps of its file and of its parents'.
pub(super) fn stamps(own: Stamp, disk: &Disk) -> Vec<Stamp> {
    let parents = std::iter::successors(disk.parent(), |disk| disk.parent());
    let found = parents.map(|parent| Stat::at(parent.path()));
    let found = found.filter_map(|stat| Some(stat.ok()?.stamp()));
    std::iter::once(own).chain(found).collect()
}

impl OpenDisk {
    pub(super) fn new(disk: Arc<Disk>, opened: Opened) -> Self {
        let (device, identity) = (Arc::downgrade(&opened.device), opened.identity);
        // Nothing was asked of it yet.
        disk.meter().join(Arc::clone(&opened.device.activity));
        disk.on_change(move || {
            if let Some(device) = device.upgrade() {
                device.wake(identity);
            }
        });
        Self {
            device: opened.device,
            turn: Mutex::new(Turn::first()),
            joining: Mutex::new(()),
            look_again: AtomicBool::new(false),
            gives_way: AtomicBool::new(false),
            sizes: Mutex::new(disk.size_at_open()),
            identity: opened.identity,
            pinned: opened.pinned,
            content: AtomicU64::new(opened.content),
            shared: opened.shared,
            is_parent: opened.is_parent,
            read_only: disk.is_read_only(),
            path: Mutex::new(opened.path),
            disk: Mutex::new(Some(disk)),
            work: Mutex::new(None),
            users: AtomicUsize::new(0),
            used: Mutex::new(Instant::now()),
            visiting: AtomicBool::new(opened.visiting),
            host: opened.host,
            written: AtomicBool::new(false),
            told: AtomicBool::new(false),
            last_run: Mutex::new(None),
            too_little: AtomicU64::new(0),
            lacks_room: AtomicBool::new(false),
            reclaimed: AtomicU64::new(0),
            state: Mutex::new(DiskState::Open),
        }
    }

    /// The disk, until it is closed.
    pub(super) fn disk(&self) -> Option<Arc<Disk>> {
        self.disk.lock().clone()
    }

    /// Whether it is read-only because another program reads it, not because it must be.
    pub(super) fn is_shared(&self) -> bool {
        self.shared
    }

    /// Whether it is read-only for a reason that may be gone by now.
    pub(super) fn may_become_writable(&self) -> bool {
        self.shared || self.is_parent
    }

    pub(super) fn set_path(&self, path: PathBuf) {
        *self.path.lock() = path;
    }

    /// Whether a guest may write to the file, as far as other programs are concerned: then it is no longer
    /// kept from those.
    pub(super) fn is_ours_to_write(&self) -> bool {
        let host = self.host.upgrade();
        let is_ours = host.is_none_or(|host| host.free_lease());
        if is_ours {
            self.written.store(true, Ordering::Release);
        }
        is_ours
    }

    /// Whether a guest has had it open for writing since it was opened.
    pub(super) fn was_written(&self) -> bool {
        self.written.load(Ordering::Acquire)
    }

    /// Whether a guest has it open for writing.
    pub(super) fn has_writers(&self) -> bool {
        self.disk().is_some_and(|disk| disk.has_writers())
    }

    /// Whether another program waits to open the file.
    pub(super) fn is_wanted(&self) -> bool {
        self.host.upgrade().is_some_and(|host| host.is_wanted())
    }

    /// Whether it waits to read it alone.
    pub(super) fn is_wanted_to_read(&self) -> bool {
        self.host
            .upgrade()
            .is_some_and(|host| host.is_wanted_to_read())
    }

    /// Takes the file for background work, which no guest that may write is to meet.
    pub(super) fn take(&self) -> Hold {
        let Some(host) = self.host.upgrade() else {
            return Hold::Others;
        };
        let hold = host.take_lease().unwrap_or_else(|error| {
            log::debug!("{}: {error}", self.path().display());
            Hold::Others
        });
        if self.has_writers() {
            host.free_lease();
        } else if hold == Hold::Unknown {
            // From here on at least changes of others are noticed.
            host.note(&|| self.has_writers());
        }
        hold
    }

    /// Who else has the file open; `None` if that was asked before.
    pub(super) fn holder(&self) -> Option<String> {
        let host = self.host.upgrade()?;
        (!self.told.swap(true, Ordering::Relaxed)).then(|| host.holder())
    }

    /// Ends background work for now: who waits for the file is let in, and finds it as it ought to be.
    pub(super) fn let_in(&self) {
        // As a step: who closes the disk waits for it, and is then the only one to refer to it.
        let _work = self.work.lock();
        let (Some(disk), Some(host)) = (self.disk(), self.host.upgrade()) else {
            return;
        };
        if !host.holds_lease() {
            return;
        }
        if let Err(error) = disk.close() {
            log::warn!("{}: {}", self.path().display(), chain(&error));
        }
        disk.note_seen();
        if let Err(error) = host.lend() {
            log::warn!("{}: {error}", self.path().display());
        }
    }

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

    /// Whether a handle for writing may be had, now or once another program, or the last child, is
    /// gone.
    pub(super) fn allows_writing(&self) -> bool {
        !self.read_only || self.may_become_writable()
    }

    /// Whether an earlier failure keeps it from taking changes until it is opened anew.
    pub(super) fn has_failed(&self) -> bool {
        self.disk().is_some_and(|disk| disk.is_poisoned())
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

    /// A guest has it now: background work starts over, with its usual patience. Whether it was a visit.
    pub(super) fn end_visit(&self) -> bool {
        let was_visiting = self.visiting.swap(false, Ordering::Relaxed);
        if was_visiting {
            self.start_over();
        }
        was_visiting
    }

    /// How long no guest has asked for anything.
    pub(super) fn idle_for(&self) -> Duration {
        self.disk().map_or(Duration::ZERO, |disk| disk.idle_for())
    }

    /// Whether other programs that open its file wait.
    pub(super) fn holds_lease(&self) -> bool {
        self.host.upgrade().is_some_and(|host| host.holds_lease())
    }

    /// Asks that its worker looks at it again, whatever it found last.
    pub(super) fn look_again(&self) {
        self.look_again.store(true, Ordering::Release);
        self.device.wake(self.identity);
    }

    /// Whether that was asked for.
    pub(super) fn is_to_look_again(&self) -> bool {
        self.look_again.swap(false, Ordering::AcqRel)
    }

    /// Asks its worker to close it, unless somebody uses it.
    pub(super) fn give_way(&self) {
        self.gives_way.store(true, Ordering::Release);
        self.device.wake(self.identity);
    }

    /// Whether that was asked for, and is still to be done.
    pub(super) fn gives_way(&self) -> bool {
        self.gives_way.load(Ordering::Acquire) && self.users() == 0
    }

    /// Whether it is to be closed now. Asked for once: if somebody uses it, it stays.
    pub(super) fn is_to_go(&self) -> bool {
        self.gives_way.swap(false, Ordering::AcqRel) && self.users() == 0
    }

    /// Whether a step is under way, which whoever closes the disk waits for.
    pub(super) fn is_at_work(&self) -> bool {
        self.work.is_locked()
    }

    /// Has the next step wait, and who closes the disk, as for a host that does not answer.
    #[cfg(all(test, unix))]
    pub(super) fn hold_work(&self) -> parking_lot::MutexGuard<'_, Option<IdleWork>> {
        self.work.lock()
    }

    /// Forgets what background work knows of it: after a failure.
    pub(super) fn start_over(&self) {
        *self.work.lock() = None;
    }

    /// Asks to be woken once the count of guest requests is not that one any more. Says no where it is not.
    pub(super) fn wait_for_change(&self, io_count: u64) -> bool {
        self.disk()
            .is_some_and(|disk| disk.wait_for_change(io_count))
    }

    /// The guest requests so far that may have changed something; 0 once it is closed.
    pub(super) fn io_count(&self) -> u64 {
        self.disk.lock().as_ref().map_or(0, |disk| disk.io_count())
    }

    /// As [`Disk::has_new_identity`].
    pub(super) fn has_new_identity(&self) -> bool {
        self.disk().is_some_and(|disk| disk.has_new_identity())
    }

    pub(super) fn virtual_size(&self) -> Option<u64> {
        self.disk.lock().as_ref().map(|disk| disk.len())
    }

    /// One step of background work, which ends early where `go_on` says no; `None` once the disk is
    /// closed.
    pub(super) fn step(
        &self,
        policy: &IdlePolicy,
        probes: &Probes,
        go_on: &dyn Fn() -> bool,
        last_word: &LastWord,
    ) -> Option<Stepped> {
        let mut slot = self.work.lock();
        let disk = self.disk.lock().clone()?;
        let work = slot.get_or_insert_with(|| {
            (IdleWork::new(Arc::clone(&disk), *policy).at_pace(Arc::clone(&self.device.pace)))
                .asking(last_word.clone())
        });
        work.set_policy(*policy);
        let before = work.freed();
        let begun = Instant::now();
        let next = work.step_while(go_on);
        let worked = begun.elapsed() >= NOTICEABLE;
        self.too_little.store(work.too_little(), Ordering::Relaxed);
        (self.lacks_room).store(work.lacks_room(), Ordering::Relaxed);
        if let Some(report) = work.take_report() {
            *self.last_run.lock() = Some(Arc::new(report));
        }
        self.note(&disk);
        if disk.took_free() {
            // What readers cached of the free space is not there any more.
            self.content.store(probes.new_content(), Ordering::Release);
        }
        // What was taken for copies counts until their old places have gone.
        let (now, more) = (work.freed(), &self.device.reclaimed);
        for count in [&self.reclaimed, &**more] {
            count.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
        }
        Some(Stepped {
            next,
            worked,
            is_running: work.is_running(),
            seen: work.seen(),
            outlook: work.outlook(),
        })
    }

    /// Remembers how we leave the file, unless a guest may write to it: what others make of it from here on
    /// is not for our block table.
    pub(super) fn note(&self, disk: &Disk) {
        if let Some(host) = self.host.upgrade() {
            host.note(&|| disk.has_writers());
        }
    }

    /// The file's length, and what the host stores of it.
    fn sizes(&self) -> Option<(u64, u64)> {
        let stat = self.pinned.stat().ok()?;
        let sizes = (stat.len, stat.allocated);
        *self.sizes.lock() = sizes;
        Some(sizes)
    }

    /// Its status, but for its children.
    pub(super) fn status(&self) -> Option<DiskStatus> {
        let disk = self.disk()?;
        // A host that does not answer is not asked for what others want to know, too.
        let (length, allocated) = match self.device.queue.is_stuck() {
            true => *self.sizes.lock(),
            false => self.sizes()?,
        };
        Some(DiskStatus {
            path: self.path(),
            handles: self.users(),
            read_only: self.read_only,
            virtual_size: disk.len(),
            length,
            allocated,
            reclaimed: self.reclaimed.load(Ordering::Relaxed),
            state: self.state.lock().clone(),
            parent: disk.parent().map(|parent| parent.path().to_owned()),
            children: Vec::new(),
            last_run: self.last_run.lock().clone(),
            too_little: self.too_little.load(Ordering::Relaxed),
            busy_share: self.device.pace.lock().busy_share(),
            room: self.device.room(),
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
        let host = self.host.upgrade();
        if let Some(host) = &host
            && !host.may_finish()
        {
            return self.leave(&disk, host);
        }
        let closed = disk.close();
        if let Some(host) = host
            && disk.has_writers()
        {
            // A guest goes on until it closes the disk: others would wait for it for ever.
            host.free_lease();
        }
        // While the lock is still held: what others do to the file from here on is not our content.
        let stamps = (self.pinned.stat()).map(|stat| stamps(stat.stamp(), &disk));
        drop(disk);
        match &closed {
            Err(error) => log::error!(
                "{}: not closed cleanly: {}",
                self.path().display(),
                chain(error)
            ),
            Ok(()) => {
                if let Ok(stamps) = stamps {
                    if self.was_written() {
                        probes.written_so(stamps.first());
                    }
                    probes.content_at_close(stamps, self.content.load(Ordering::Acquire));
                }
            }
        }
        closed.is_ok()
    }

    /// Closes a disk whose file others are at, or have changed: nothing is cut off it or put into it any more.
    /// What guests wrote becomes durable. Whether that worked.
    fn leave(&self, disk: &Disk, host: &HostFile) -> bool {
        disk.give_up();
        if !self.was_written() {
            return true;
        }
        let path = self.path();
        log::warn!(
            "{}: left as it is: another program has opened or changed it",
            path.display()
        );
        let synced = host.sync();
        if let Err(error) = &synced {
            log::error!("{}: not closed cleanly: {error}", path.display());
        }
        synced.is_ok()
    }
}
