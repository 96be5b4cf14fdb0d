//! The host file on Linux.

mod age;
mod holders;
mod lease;
mod open;
mod sys;

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use rustix::fs::{Advice, FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use self::lease::{Change, Lease};
use self::open::{FOR_A_LEASE, lock_as, open_beside_readers, open_file, open_regular};
use super::copy::Copying;
use super::pin::Pin;
use super::{FileKey, Hold, HostForm, HostOptions, Sharing};
use crate::error::{ErrorKind, OpenError, OpenProblem};
use crate::storage::holes::hole_bytes;
use crate::storage::lock::{self, Access, LockError};
use crate::storage::{Storage, check_copy, past_end};
use crate::units::{FileOffset, FileRange, u64_from, usize_from};

/// The unit in which hosts allocate and share file space. Larger on some; it only decides how a
/// copy is split, never what it means.
const HOST_BLOCK: u64 = 4096;

/// Ranges shorter than this are zeroed by writing zeros: turning a few pages into unwritten extents
/// costs a journal transaction and splits the file's extents for good.
const ZERO_RANGE_MIN: u64 = 64 << 10;

/// How often a look for data starts again because the file changed under it.
const SEEK_ATTEMPTS: u32 = 8;

/// An open host file. Closing it, by dropping, gives its locks back.
///
/// Locks ask others to keep away, and some do not ask. Whoever cuts the file takes bytes out of it, and a
/// write behind the cut would make them zeros, as if that had been in order. So the file is looked at
/// before it is changed and before it is called durable, and none of both happens once it is too short.
/// Who has it open without a lock is found out by leases.
#[derive(Debug)]
pub struct HostFile {
    file: Arc<File>,
    /// Whether others use it. `None` where it is not open for writing.
    lease: Option<Lease>,
    /// As it was found and as we have changed it since.
    known_len: AtomicU64,
    /// Held while the length changes.
    length_lock: Mutex<()>,
    /// The host said that it cannot do these for this file, so they are not tried again.
    no_copy_range: AtomicBool,
    no_zero_range: AtomicBool,
    no_punch: AtomicBool,
    /// The descriptor is not another [`HostFile`]'s.
    owns_locks: bool,
}

/// How often at most a file is tried to be looked at while this program takes leases.
const GLANCES: u32 = 1000;

impl Drop for HostFile {
    fn drop(&mut self) {
        if let Some(lease) = &self.lease {
            lease.end(&self.file);
        }
        if self.owns_locks {
            lock::unlock(&self.file);
        }
    }
}

impl HostFile {
    /// Opens the regular file at `path` and takes its lock if `options` say so. Nothing is read.
    ///
    /// # Errors
    /// [`OpenProblem::InUse`] where another program holds a lock that excludes us, and
    /// [`OpenProblem::Io`] where the host refuses or `path` is no regular file.
    pub fn open(path: &Path, options: &HostOptions) -> Result<Self, OpenError> {
        let access = match options.read_only {
            true => Access::Reader,
            false => Access::Writer,
        };
        Self::open_as(path, options, options.lock.then_some(access), FOR_A_LEASE)
    }

    /// Opens the regular file at `path` to look at what it is, without a lock. Nobody is waited for: a file
    /// on which another program has a lease is in use.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn glance(path: &Path) -> Result<Self, OpenError> {
        let options = HostOptions {
            read_only: true,
            lock: false,
            no_follow: false,
        };
        for _ in 1..GLANCES {
            let before = lease::taken_here();
            match Self::open_as(path, &options, None, Duration::ZERO) {
                // One that this program has taken meanwhile.
                Err(error) if error.kind() == ErrorKind::InUse && lease::taken_here() != before => {
                }
                opened => return opened,
            }
        }
        Self::open_as(path, &options, None, Duration::ZERO)
    }

    /// Opens the regular file at `path` as a handle of the virtual disk interface has it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_shared(path: &Path, sharing: Sharing) -> Result<Self, OpenError> {
        let (read_only, access) = match sharing {
            Sharing::Compact => (false, Access::Compactor),
            Sharing::Attached => (true, Access::Attached),
        };
        let options = HostOptions {
            read_only,
            ..HostOptions::default()
        };
        Self::open_as(path, &options, Some(access), FOR_A_LEASE)
    }

    /// Whether somebody else has the disk attached by the virtual disk interface, in whichever process.
    ///
    /// # Errors
    /// What the host answers.
    pub(crate) fn is_attached(&self) -> io::Result<bool> {
        lock::is_attached(&self.file)
    }

    fn open_as(
        path: &Path,
        options: &HostOptions,
        access: Option<Access>,
        patience: Duration,
    ) -> Result<Self, OpenError> {
        let io = |action| move |source| OpenError::new(path, OpenProblem::Io { action, source });
        let attributes = io("read the file's attributes");
        // What we have to ourselves keeps us out as well.
        if let Some(held) = lease::held_here(path, options.no_follow) {
            return match options.read_only && access.is_none() {
                true => Self::from_file(held, false).map_err(attributes),
                false => {
                    let holder = "this program is at work on it".to_owned();
                    Err(OpenError::new(path, OpenProblem::InUse(holder)))
                }
            };
        }
        let mut file = open_regular(path, options, patience)?;
        if let Some(access) = access {
            lock_as(&file, access, path)?;
            if !options.read_only && lease::is_alone(&file) == Some(false) {
                file = open_beside_readers(file, access, path)?;
            }
        }
        Self::from_file(Arc::new(file), true).map_err(attributes)
    }

    /// Creates an empty file at `path`, open for reading and writing and locked as a writer. Its
    /// name is durable once [`sync_directory_of`] has returned.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] where `path` names anything, a dangling symbolic link
    /// included; whatever else the host refuses.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        // What the umask leaves of it.
        Self::create_as(path, Mode::from_raw_mode(0o666))
    }

    /// As [`Self::create_new`], of a file that only its owner may read and write.
    ///
    /// # Errors
    /// As there.
    pub fn create_private(path: &Path) -> io::Result<Self> {
        Self::create_as(path, Mode::from_raw_mode(0o600))
    }

    fn create_as(path: &Path, mode: Mode) -> io::Result<Self> {
        let flags = OFlags::CLOEXEC | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let file = retry_on_intr(|| rustix::fs::open(path, flags, mode)).map(File::from)?;
        lock::lock(&file, Access::Writer).map_err(|error| match error {
            LockError::Conflict(holder) => io::Error::new(io::ErrorKind::ResourceBusy, holder),
            LockError::Io(source) => source,
        })?;
        Self::from_file(Arc::new(file), true)
    }

    /// Takes the file for work that no guest asked for: nobody else may have it open, and a program that opens
    /// it from here on waits until it is [lent](Self::lend), [freed](Self::free_lease) or closed. It was open
    /// for writing all the time.
    ///
    /// # Errors
    /// What the host answers, but that it has no leases.
    pub fn take_lease(&self) -> io::Result<Hold> {
        let lease = self.lease.as_ref();
        lease.map_or(Ok(Hold::Unknown), |lease| lease.take(&self.file))
    }

    /// Lets in who waits for it. Nothing can be changed until it is taken again; to be called when the
    /// file is as it is to be found.
    ///
    /// # Errors
    /// What the host answers.
    pub fn lend(&self) -> io::Result<()> {
        self.lease
            .as_ref()
            .map_or(Ok(()), |lease| lease.lend(&self.file))
    }

    /// Gives up the lease for a guest of this process, which goes on without. Says no where others have
    /// changed the file, or are about to.
    pub fn free_lease(&self) -> bool {
        self.lease
            .as_ref()
            .is_none_or(|lease| lease.free(&self.file))
    }

    /// Whether it is held, so that other programs that open it wait.
    pub fn holds_lease(&self) -> bool {
        self.lease.as_ref().is_some_and(Lease::is_held)
    }

    /// Whether it may still be left as it ought to be: nobody else has it open, or all who want to, wait.
    pub fn may_finish(&self) -> bool {
        self.lease
            .as_ref()
            .is_some_and(|lease| lease.may_finish(&self.file))
    }

    /// Remembers what this process has made of a file that others may open, so that what they do to it from
    /// here on is noticed. Not while somebody of this process goes on to change it, which `goes_on` must say
    /// before that one has called [`Self::free_lease`].
    pub fn note(&self, goes_on: &dyn Fn() -> bool) {
        if let Some(lease) = &self.lease {
            lease.note(&self.file, goes_on);
        }
    }

    /// Whether one who waits for it only reads it.
    pub fn is_wanted_to_read(&self) -> bool {
        self.lease
            .as_ref()
            .is_some_and(|lease| lease.is_wanted_to_read(&self.file))
    }

    /// Who else has it open, as far as can be told; completes "in use by another program (...)".
    pub fn holder(&self) -> String {
        holders::of(&self.file)
    }

    /// How long ago it was changed last, by its own times and the host's clock; no time where those do not
    /// agree.
    ///
    /// # Errors
    /// What the host answers.
    pub fn unchanged_for(&self) -> io::Result<Duration> {
        Pin::stat_of(&self.file).map(|stat| age::of(&stat))
    }

    /// The file's owner, mode, times and identity, as they are now.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// Which file it is.
    pub fn key(&self) -> io::Result<FileKey> {
        Pin::stat_of(&self.file).map(|stat| stat.key)
    }

    /// How the host stores it.
    ///
    /// # Errors
    /// What the host answers.
    pub fn form(&self) -> io::Result<HostForm> {
        let hole_bytes = hole_bytes(self)?;
        Ok(HostForm {
            hole_bytes,
            is_sparse: hole_bytes > 0,
            ..HostForm::default()
        })
    }

    /// Has the host no longer take the file for a sparse one, once it has no holes. Nothing to do here.
    ///
    /// # Errors
    /// None.
    pub fn end_sparse(&self) -> io::Result<()> {
        Ok(())
    }

    /// As if the host had said that it has no `copy_file_range`.
    #[cfg(test)]
    pub(super) fn forbid_copy_range(&self) {
        self.no_copy_range.store(true, Ordering::Relaxed);
    }

    fn from_file(file: Arc<File>, owns_locks: bool) -> io::Result<Self> {
        let is_writable = owns_locks && rustix::fs::fcntl_getfl(&file)?.contains(OFlags::RDWR);
        Ok(Self {
            known_len: AtomicU64::new(file.metadata()?.len()),
            length_lock: Mutex::new(()),
            lease: is_writable.then(|| Lease::new(&file)).transpose()?,
            owns_locks,
            file,
            no_copy_range: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
        })
    }

    /// That nobody has cut the file.
    fn check_len(&self) -> io::Result<()> {
        if self.len()? < self.known_len.load(Ordering::Acquire) {
            // Unless it is us.
            drop(self.lock_length()?);
        }
        Ok(())
    }

    /// To be called before each change of the file, and its result to be dropped after it.
    fn begin_change(&self) -> io::Result<Option<Change<'_>>> {
        match &self.lease {
            Some(lease) => lease.before_change(&self.file).map(Some),
            // The host refuses.
            None if self.owns_locks => Ok(None),
            None => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the file is open for reading only",
            )),
        }
    }

    /// The same, and that nobody changes the length meanwhile.
    fn lock_length(&self) -> io::Result<MutexGuard<'_, ()>> {
        let lock = self.length_lock.lock();
        let (found, known) = (self.len()?, self.known_len.load(Ordering::Acquire));
        if found < known {
            let text = format!("another program has cut it to {found} bytes, of {known}");
            return Err(io::Error::other(text));
        }
        Ok(lock)
    }

    /// Does `change`, which makes the file reach up to `end` at least, if nobody has cut it.
    fn change_up_to(
        &self,
        end: FileOffset,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let _change = self.begin_change()?;
        if end.get() <= self.known_len.load(Ordering::Acquire) {
            self.check_len()?;
            return change();
        }
        let _length = self.lock_length()?;
        let changed = change();
        // Of what failed a part may be there, which is ours as well.
        let reached = self.len()?.min(end.get());
        self.known_len.fetch_max(reached, Ordering::AcqRel);
        changed
    }

    fn fallocate(&self, mode: FallocateFlags, range: FileRange) -> rustix::io::Result<()> {
        let mode = mode | FallocateFlags::KEEP_SIZE;
        let (start, len) = (range.start.get(), range.len);
        retry_on_intr(|| rustix::fs::fallocate(&self.file, mode, start, len))
    }

    /// Makes `range`, which is inside the file, zeros that keep their space. Whoever calls this has looked
    /// at the file's length, and may hold its lock.
    fn zero(&self, range: FileRange) -> io::Result<()> {
        if range.len < ZERO_RANGE_MIN || self.no_zero_range.load(Ordering::Relaxed) {
            return self.put_zeros(range);
        }
        match self.fallocate(FallocateFlags::ZERO_RANGE, range) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.no_zero_range.store(true, Ordering::Relaxed);
                self.put_zeros(range)
            }
            result => Ok(result?),
        }
    }

    /// `copy_file_range`, and through memory what it does not do. On file systems that can share
    /// blocks, Linux tries a reflink first inside that call.
    fn copy_run(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        let mut done = 0;
        while done < from.len && !self.no_copy_range.load(Ordering::Relaxed) {
            let (mut source, mut target) = (from.start.plus(done).get(), to.plus(done).get());
            let len = usize_from((from.len - done).min(1 << 30));
            let copied = retry_on_intr(|| {
                let (source, target) = (Some(&mut source), Some(&mut target));
                rustix::fs::copy_file_range(&self.file, source, &self.file, target, len)
            });
            match copied {
                // Some file systems answer so instead of with an error.
                Ok(0) => break,
                Ok(copied) => done += u64_from(copied),
                // About these two ranges, perhaps not about the next ones.
                Err(Errno::INVAL) => break,
                // EPERM: a system call filter that does not know the call.
                Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV | Errno::PERM) => {
                    self.no_copy_range.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let rest = FileRange::between(from.start.plus(done), from.end());
        self.copy_through_memory(rest, to.plus(done))
    }
}

impl Copying for HostFile {
    fn put(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        self.file.write_all_at(buf, offset.get())
    }

    fn clear(&self, range: FileRange) -> io::Result<()> {
        match self.punch_hole(range) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.zero(range),
            result => result,
        }
    }

    // Where source and target lie alike in their host blocks, a copy that starts on a block boundary
    // can be a reflink, so the odd bytes before go alone.
    fn copy_data(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        let (odd_from, odd_to) = (from.start.get() % HOST_BLOCK, to.get() % HOST_BLOCK);
        let head = match (odd_from == odd_to, odd_from) {
            (true, 1..) => from.len.min(HOST_BLOCK - odd_from),
            _ => 0,
        };
        self.copy_run(FileRange::new(from.start, head), to)?;
        self.copy_run(
            FileRange::between(from.start.plus(head), from.end()),
            to.plus(head),
        )
    }
}

impl Storage for HostFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let read = self.file.read_exact_at(buf, offset.get());
        read.map_err(|error| match (error.kind(), self.len()) {
            // Rust's own words say nothing of where.
            (io::ErrorKind::UnexpectedEof, Ok(len)) => {
                past_end(FileRange::new(offset, u64_from(buf.len())), len)
            }
            _ => error,
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        self.change_up_to(offset.plus(u64_from(buf.len())), || {
            self.file.write_all_at(buf, offset.get())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _change = self.begin_change()?;
        let _length = self.lock_length()?;
        self.file.set_len(len)?;
        self.known_len.store(len, Ordering::Release);
        Ok(())
    }

    fn punch_hole(&self, range: FileRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let unsupported = || {
            let text = "the host's file system cannot punch holes into files";
            io::Error::new(io::ErrorKind::Unsupported, text)
        };
        if self.no_punch.load(Ordering::Relaxed) {
            return Err(unsupported());
        }
        let _change = self.begin_change()?;
        match self.fallocate(FallocateFlags::PUNCH_HOLE, range) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.no_punch.store(true, Ordering::Relaxed);
                Err(unsupported())
            }
            result => Ok(result?),
        }
    }

    fn write_zeroes(&self, range: FileRange) -> io::Result<()> {
        let len = self.len()?;
        if range.end().get() > len {
            return Err(past_end(range, len));
        }
        let _change = self.begin_change()?;
        self.check_len()?;
        self.zero(range)
    }

    fn copy_within(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        check_copy(from, to, self.len()?)?;
        self.change_up_to(to.plus(from.len), || self.copy_with_holes(from, to))
    }

    fn next_data(&self, from: FileOffset, end: FileOffset) -> io::Result<Option<FileRange>> {
        let seek = |to| retry_on_intr(|| rustix::fs::seek(&self.file, to));
        // Between the two calls a hole may be punched, or the file cut: then look again. Nobody
        // does that many times over, so a host that goes on like this just cannot tell.
        for _ in 0..SEEK_ATTEMPTS {
            if from >= end {
                return Ok(None);
            }
            let start = match seek(SeekFrom::Data(from.get())) {
                Ok(start) => FileOffset::new(start),
                Err(Errno::NXIO) => return Ok(None),
                Err(Errno::INVAL | Errno::OPNOTSUPP) => break,
                Err(error) => return Err(error.into()),
            };
            if start >= end {
                return Ok(None);
            }
            match seek(SeekFrom::Hole(start.get())) {
                Ok(hole) if hole > start.get() => {
                    return Ok(Some(FileRange::between(
                        start,
                        FileOffset::new(hole).min(end),
                    )));
                }
                Ok(_) | Err(Errno::NXIO) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let all = FileRange::between(from, FileOffset::new(self.len()?).min(end));
        Ok((!all.is_empty()).then_some(all))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn room(&self) -> Option<u64> {
        let found = rustix::fs::fstatvfs(&*self.file).ok()?;
        (found.f_blocks > 0).then(|| found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn is_wanted(&self) -> bool {
        (self.lease.as_ref()).is_some_and(|lease| lease.is_wanted(&self.file))
    }

    fn write_back(&self, range: FileRange) -> io::Result<()> {
        // No host has files that long.
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        match sys::write_back(&self.file, number(range.start.get()), number(range.len)) {
            // A host that cannot leaves it to the sync.
            Err(
                nix::errno::Errno::ENOSYS | nix::errno::Errno::EINVAL | nix::errno::Errno::ESPIPE,
            ) => Ok(()),
            // What the kernel tells here, it does not tell the next sync.
            other => other.map_err(|error| self.forget_pages(error.into())),
        }
    }

    fn sync(&self) -> io::Result<()> {
        // `fdatasync`, which covers a changed length: it is needed to read the data back.
        (self.file.sync_data()).map_err(|error| self.forget_pages(error))?;
        self.check_len()
    }
}

impl HostFile {
    /// Linux takes what it could not write for clean: it goes on to show it, and never tries again. Whoever
    /// opens the file anew is to see what the disk has.
    fn forget_pages(&self, error: io::Error) -> io::Error {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        error
    }
}

/// Makes the names in the directory of `path` durable: a file that was just created there, renamed
/// or removed.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let flags = OFlags::CLOEXEC | OFlags::RDONLY | OFlags::DIRECTORY;
    open_file(parent.unwrap_or(Path::new(".")), flags)?.sync_all()
}
