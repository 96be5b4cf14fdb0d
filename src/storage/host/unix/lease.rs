//! Leases: how programs are noticed that take no lock, and let in when they come.
//!
//! Linux grants a write lease on a file that nobody else has open, and has everybody who opens it from
//! then on wait, inside `open`, until the holder has given the lease up (or 45 seconds are over). So
//! nothing that is done under a lease meets another program, whatever that knows of locks:
//!
//! ```text
//!            take                    somebody opens it, and waits: is_wanted
//!   Free  ---------->  Held  -----------------------------------------------.
//!    ^  \                ^                                                  |  the holder finishes its step
//!    |   \ differs       | take, the file looks the same                    v
//!    |    `--> Changed <-+------------------------------------------------ Lent
//!    `-- free: a guest of ours may write to it
//! ```
//!
//! A read lease, on a descriptor that is open for reading, tells whether anybody has the file open for
//! writing. The two that are asked for here never outlive the question.
//!
//! Only local file systems know all who have a file open, and only a file's owner, or root, may have a
//! lease on it ([`Hold::Unknown`]). What was not held is told by the file's length and times.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::statfs::{self, FsType};
use parking_lot::Mutex;

use super::sys::{self, Kind};
use crate::storage::host::pin::Pin;
use crate::storage::host::{FileKey, Hold};

/// How long a change may begin at most after the lease was last seen whole. Linux lets others in, lease or
/// not, after [`BREAK_TIME`]: also while this process is stopped, or waits for its storage.
const GRACE: Duration = Duration::from_secs(20);

/// Seconds, which are 45 unless somebody has set them otherwise. With 0, Linux waits for ever.
const BREAK_TIME: &str = "/proc/sys/fs/lease-break-time";

/// Two changes that far apart have different times, whatever the host's tick.
const TICK: Duration = Duration::from_millis(20);

/// File systems of which this host knows all users. Of others it may see but some.
const LOCAL: [FsType; 12] = [
    statfs::EXT4_SUPER_MAGIC,
    statfs::XFS_SUPER_MAGIC,
    statfs::BTRFS_SUPER_MAGIC,
    statfs::F2FS_SUPER_MAGIC,
    statfs::TMPFS_MAGIC,
    statfs::OVERLAYFS_SUPER_MAGIC,
    statfs::REISERFS_SUPER_MAGIC,
    statfs::NILFS_SUPER_MAGIC,
    statfs::MSDOS_SUPER_MAGIC,
    // exFAT, NTFS (of the kernel), ZFS.
    FsType(0x2011_bab0),
    FsType(0x7366_746e),
    FsType(0x2fc1_2fc1),
];

/// The leases of this process, which must not wait for itself.
static HELD: Mutex<Leases> = Mutex::new(Leases {
    files: Vec::new(),
    taken: 0,
});

#[derive(Debug)]
struct Leases {
    /// On what one is held.
    files: Vec<(FileKey, Weak<File>)>,
    /// How many were taken, be it for a moment.
    taken: u64,
}

impl Leases {
    /// Takes one. To be called with the lock held until it is given up or in `files`: who is refused for it
    /// sees it there, or that one was taken.
    fn take(&mut self, file: &File, kind: Kind) -> nix::Result<()> {
        self.taken += 1;
        sys::set_lease(file, kind)
    }
}

/// How many leases this process has taken: who is refused for one, and finds more of them than before, may
/// have met one of ours.
pub(super) fn taken_here() -> u64 {
    HELD.lock().taken
}

/// The open file on which this process holds a lease, if `path` leads to it.
pub(super) fn held_here(path: &Path, no_follow: bool) -> Option<Arc<File>> {
    if HELD.lock().files.is_empty() {
        return None;
    }
    if no_follow
        && path
            .symlink_metadata()
            .is_ok_and(|found| found.is_symlink())
    {
        return None;
    }
    // The host is asked without the lock.
    let key = Pin::file(path).ok()?.stat().ok()?.key;
    let held = HELD.lock();
    let found = held.files.iter().find(|(other, _)| *other == key);
    found.and_then(|(_, file)| file.upgrade())
}

/// Whether nobody else has `file` open, which is open for writing; `None` where the host cannot tell.
pub(super) fn is_alone(file: &File) -> Option<bool> {
    probe(file, Kind::Write)
}

/// Whether anybody has `file` open for writing, which is open for reading; `None` where the host cannot
/// tell.
pub(super) fn has_writer(file: &File) -> Option<bool> {
    probe(file, Kind::Read).map(|free| !free)
}

fn probe(file: &File, kind: Kind) -> Option<bool> {
    if !is_local(file) {
        return None;
    }
    let mut held = HELD.lock();
    match held.take(file, kind) {
        Ok(()) => {
            give_up(file);
            Some(true)
        }
        Err(Errno::EAGAIN) => Some(false),
        Err(_) => None,
    }
}

fn is_local(file: &File) -> bool {
    statfs::fstatfs(file).is_ok_and(|found| LOCAL.contains(&found.filesystem_type()))
}

fn give_up(file: &File) {
    // It fails where there is none any more.
    let _ = sys::set_lease(file, Kind::None);
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    len: u64,
    /// The other time changes with the name, the owner and the like as well.
    modified: SystemTime,
}

impl Look {
    fn of(file: &File) -> io::Result<Self> {
        let stat = Pin::stat_of(file)?;
        Ok(Self {
            len: stat.len,
            modified: stat.modified,
        })
    }
}

#[derive(Debug)]
enum State {
    /// Not held. How the file looked, until this process changed it.
    Free(Option<Look>),
    Held(Held),
    /// Given up for others. Nothing is changed until it is taken again.
    Lent(Look),
    /// Others have changed the file: what is known of it is not true any more.
    Changed,
}

/// A lease that was taken.
#[derive(Debug)]
struct Held {
    /// When it was last seen whole. Linux counts its time by a clock that stops with the system, as this
    /// one does, but for no process.
    whole: Instant,
    /// How long after that a change may begin.
    grace: Duration,
    /// Somebody has come.
    is_wanted: bool,
}

impl Held {
    /// One that was taken at `whole`, or later.
    fn new(whole: Instant) -> Self {
        let limit = std::fs::read_to_string(BREAK_TIME);
        let limit = limit.ok().and_then(|text| text.trim().parse().ok());
        Self {
            whole,
            grace: grace(limit.unwrap_or(0)),
            is_wanted: false,
        }
    }

    /// Whether somebody waits for the lease on `file`.
    fn is_wanted(&mut self, file: &File) -> bool {
        if !self.is_wanted {
            let now = Instant::now();
            match sys::lease(file) {
                Ok(Kind::Write) => self.whole = now,
                _ => self.is_wanted = true,
            }
        }
        self.is_wanted
    }

    /// Whether nobody can have been let in yet.
    fn keeps_out(&mut self, file: &File) -> bool {
        !self.is_wanted(file) || self.whole.elapsed() < self.grace
    }
}

/// How long a change may begin, where Linux lets others in after `limit` seconds: it is to end by then.
fn grace(limit: u32) -> Duration {
    match limit {
        0 => GRACE,
        limit => GRACE.min(Duration::from_secs(limit.into()) * 2 / 5),
    }
}

/// What is known of others who use an open file.
#[derive(Debug)]
pub(super) struct Lease {
    state: Mutex<State>,
    /// [`State::Free`] of nothing: there is nothing to ask before a change.
    is_plain: AtomicBool,
    /// Changes of this process that are under way.
    changing: AtomicUsize,
    /// This process has changed the file.
    worked: AtomicBool,
}

/// A change of the file, under way until this is dropped.
#[derive(Debug)]
pub(super) struct Change<'a>(&'a AtomicUsize);

impl<'a> Change<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Lease {
    /// Of `file`, which has just been opened.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State::Free(Some(Look::of(file)?))),
            is_plain: AtomicBool::new(false),
            changing: AtomicUsize::new(0),
            worked: AtomicBool::new(false),
        })
    }

    fn put(&self, state: &mut State, new: State) {
        *state = new;
        let is_plain = matches!(state, State::Free(None));
        self.is_plain.store(is_plain, Ordering::SeqCst);
    }

    /// To be called before each change of the file, and its result to be dropped after it.
    ///
    /// # Errors
    /// Where others use it.
    pub(super) fn before_change(&self, file: &File) -> io::Result<Change<'_>> {
        // Before the question: either this is plain, or a note that is taken now counts it.
        let change = Change::begin(&self.changing);
        if self.is_plain.load(Ordering::SeqCst) {
            return Ok(change);
        }
        let mut state = self.state.lock();
        let may = match &mut *state {
            State::Free(look) => {
                // What is known of the file is what it held then.
                let is_same = look.is_none_or(|look| Look::of(file).is_ok_and(|it| it == look));
                let next = match is_same {
                    true => State::Free(None),
                    false => State::Changed,
                };
                self.put(&mut state, next);
                is_same
            }
            State::Held(held) => held.keeps_out(file),
            State::Lent(_) | State::Changed => false,
        };
        match may {
            true => {
                self.worked.store(true, Ordering::Relaxed);
                Ok(change)
            }
            false => {
                let text = match &*state {
                    State::Changed => "another program has changed the file meanwhile",
                    _ => "another program has opened the file meanwhile",
                };
                Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
            }
        }
    }

    /// Takes it, if it is not held yet.
    pub(super) fn take(&self, file: &Arc<File>) -> io::Result<Hold> {
        let mut state = self.state.lock();
        let before = match &mut *state {
            State::Free(look) => *look,
            State::Lent(look) => Some(*look),
            State::Changed => return Ok(Hold::Changed),
            State::Held(held) => {
                return Ok(match held.is_wanted(file) {
                    false => Hold::Alone,
                    true => Hold::Others,
                });
            }
        };
        let now = Instant::now();
        let key = Pin::stat_of(file)?.key;
        let is_local = is_local(file);
        let taken = match is_local {
            true => hold(file, key),
            false => Err(Errno::EOPNOTSUPP),
        };
        if taken == Err(Errno::EAGAIN) {
            return Ok(Hold::Others);
        }
        let look = Look::of(file);
        if before.is_some_and(|before| look.as_ref().ok() != Some(&before)) {
            release(file);
            self.put(&mut state, State::Changed);
            return Ok(Hold::Changed);
        }
        if taken.is_err() {
            return look.map(|_| Hold::Unknown);
        }
        self.put(&mut state, State::Held(Held::new(now)));
        Ok(Hold::Alone)
    }

    /// Whether other programs that open the file wait.
    pub(super) fn is_held(&self) -> bool {
        matches!(*self.state.lock(), State::Held(_))
    }

    /// Whether somebody waits to open the file.
    pub(super) fn is_wanted(&self, file: &File) -> bool {
        if self.is_plain.load(Ordering::Acquire) {
            return false;
        }
        match &mut *self.state.lock() {
            State::Held(held) => held.is_wanted(file),
            _ => false,
        }
    }

    /// Whether somebody waits who opens it for reading alone.
    pub(super) fn is_wanted_to_read(&self, file: &File) -> bool {
        self.is_held() && sys::lease(file) == Ok(Kind::Read)
    }

    /// Lets in who waits. Nothing can be changed until it is taken again.
    pub(super) fn lend(&self, file: &File) -> io::Result<()> {
        let mut state = self.state.lock();
        if let State::Held(held) = &mut *state {
            // Whatever others do to the file has another time than our last change.
            std::thread::sleep(TICK);
            let look = Look::of(file)?;
            let lent = match held.keeps_out(file) {
                true => State::Lent(look),
                false => State::Changed,
            };
            self.put(&mut state, lent);
            release(file);
        }
        Ok(())
    }

    /// Gives it up, for somebody of this process who goes on without. Says no where others have changed
    /// the file, or are about to.
    pub(super) fn free(&self, file: &File) -> bool {
        let mut state = self.state.lock();
        let may = match &mut *state {
            State::Free(None) => return true,
            State::Free(Some(look)) | State::Lent(look) => {
                Look::of(file).is_ok_and(|it| it == *look)
            }
            State::Held(held) => !held.is_wanted(file),
            State::Changed => return false,
        };
        if may {
            if matches!(*state, State::Held(_)) {
                release(file);
            }
            self.put(&mut state, State::Free(None));
        }
        may
    }

    /// Whether the file may be left as it ought to be: it is held, also if somebody waits for it, or
    /// nobody seems to be at it but this process.
    pub(super) fn may_finish(&self, file: &Arc<File>) -> bool {
        match self.take(file) {
            Ok(Hold::Alone) => true,
            Ok(Hold::Others) => match &mut *self.state.lock() {
                State::Held(held) => held.keeps_out(file),
                _ => false,
            },
            Ok(Hold::Unknown) => self.worked.load(Ordering::Relaxed),
            Ok(Hold::Changed) | Err(_) => false,
        }
    }

    /// Remembers what this process has made of a file that it holds no lease on, unless it goes on: then
    /// `goes_on` says so before it [frees](Self::free) the file, or a change is under way, whose thread
    /// notes its end.
    pub(super) fn note(&self, file: &File, goes_on: &dyn Fn() -> bool) {
        let mut state = self.state.lock();
        if matches!(*state, State::Free(None)) && !goes_on() {
            // Changes that begin from here on wait for the note.
            self.is_plain.store(false, Ordering::SeqCst);
            let is_still = self.changing.load(Ordering::SeqCst) == 0;
            let look = is_still.then(|| Look::of(file).ok()).flatten();
            self.put(&mut state, State::Free(look));
        }
    }

    /// Gives it up, at the end.
    pub(super) fn end(&self, file: &File) {
        if self.is_held() {
            release(file);
        }
    }
}

/// Takes the lease, as one of this process.
fn hold(file: &Arc<File>, key: FileKey) -> nix::Result<()> {
    let mut held = HELD.lock();
    held.take(file, Kind::Write)?;
    held.files.push((key, Arc::downgrade(file)));
    Ok(())
}

fn release(file: &File) {
    give_up(file);
    let file = std::ptr::from_ref(file);
    let mut held = HELD.lock();
    held.files
        .retain(|(_, open)| open.strong_count() > 0 && !std::ptr::eq(open.as_ptr(), file));
}

#[cfg(test)]
mod tests;
