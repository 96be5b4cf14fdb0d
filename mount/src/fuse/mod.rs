//! The FUSE front end: translates requests to a [`Library`] and back.
//!
//! # Caching
//! The kernel caches content by node. That is right as long as content only changes through us,
//! which the library tells at each open; otherwise the kernel is told to forget. There is no
//! write-back cache: a write that was acknowledged has reached the disk file, so it survives our
//! death. Names are looked up anew each time, so that changes of the directory show at once; a
//! lookup brings fresh attributes along, others may be one second old.
//!
//! # What is refused
//! Names are the directory's business, so making, renaming, linking and removing fail with EPERM,
//! and so does a change of size, owner, mode or times; asking for what is so already succeeds.
//! Writing past the disk's end fails with EFBIG. Allocating space (fallocate without a mode) fails
//! with EOPNOTSUPP: it would promise room that the host may not have.

mod adapter;
mod attributes;
mod device;
mod errno;
mod openers;
mod session;
mod xattrs;

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{Errno, FileHandle, FopenFlags, OpenAccMode, OpenFlags, Request};
use rustix::fs::{FallocateFlags, OFlags};
use vhdfs::disk::ExtentKind;
use vhdfs::library::{Library, LibraryError, NodeId, User};

use crate::front::{Brake, Handles, Listings, OpenFile, Reader};
use openers::Openers;

pub(crate) use session::{Settings, mount};
pub(crate) use xattrs::PID_ATTRIBUTE;

/// The file system that the kernel talks to.
pub(crate) struct VhdFs {
    library: Arc<Library>,
    files: Arc<Handles<OpenFile>>,
    directories: Arc<Handles<Reader>>,
    listings: Arc<Listings>,
    openers: Openers,
    /// For what has another file system than the directory's own to answer, which it may never.
    elsewhere: Openers,
    /// What the kernel is to do for handles that bypass its cache.
    direct: FopenFlags,
}

impl VhdFs {
    pub(crate) fn new(library: Arc<Library>) -> Self {
        Self {
            library,
            files: Arc::new(Handles::new()),
            directories: Arc::new(Handles::new()),
            listings: Arc::new(Listings::new()),
            openers: Openers::default(),
            elsewhere: Openers::default(),
            direct: FopenFlags::empty(),
        }
    }

    /// Takes the open disks away from the kernel: see [`Brake::stop`].
    pub(crate) fn brake(&self) -> Brake {
        Brake::new(self.library.clone(), self.files.clone())
    }

    /// Does `work`, which asks about `node`, or about `name` in it. Where that has to wait for another file system
    /// than the directory's own, on another thread: disks that are open are served all the while.
    fn look(&self, node: NodeId, name: Option<&OsStr>, work: impl FnOnce() + Send + 'static) {
        match self.library.is_elsewhere(node, name) {
            true => self.elsewhere.run(Box::new(work)),
            false => work(),
        }
    }

    /// Does `work` with an open disk; ENOTCONN if there is none, which only happens at the end.
    fn with_file<T>(
        &self,
        number: FileHandle,
        work: impl FnOnce(&OpenFile) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let file = self.files.get(number.0).ok_or(Errno::ENOTCONN)?;
        work(&file)
    }

    fn write_file(
        &self,
        number: FileHandle,
        offset: u64,
        data: &[u8],
        flags: OpenFlags,
    ) -> Result<u32, Errno> {
        self.with_file(number, |file| {
            let written = file.write(data, offset)?;
            if open_flags(flags).intersects(OFlags::SYNC | OFlags::DSYNC) {
                file.flush()?;
            }
            u32::try_from(written).map_err(|_| Errno::EINVAL)
        })
    }

    fn allocate(&self, number: FileHandle, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let mode = u32::from_ne_bytes(mode.to_ne_bytes());
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let keep_size = mode.contains(FallocateFlags::KEEP_SIZE);
        let action = mode.difference(FallocateFlags::KEEP_SIZE);
        self.with_file(number, |file| {
            let disk = file.handle.disk();
            // Nothing lies beyond the end.
            let inside = len.min(file.len.saturating_sub(offset));
            file.for_writing()?;
            let done = match action {
                FallocateFlags::PUNCH_HOLE if keep_size && inside == 0 => Ok(()),
                FallocateFlags::PUNCH_HOLE if keep_size => disk.discard(offset, inside),
                FallocateFlags::ZERO_RANGE if keep_size || inside == len => {
                    disk.write_zeroes(offset, inside)
                }
                FallocateFlags::ZERO_RANGE => return Err(Errno::EFBIG),
                _ => return Err(Errno::EOPNOTSUPP),
            };
            Ok(done.map_err(|error| file.failed("discard", offset, error))?)
        })
    }

    /// The first data, or hole, at or behind `offset`.
    fn seek(&self, number: FileHandle, offset: i64, whence: i32) -> Result<i64, Errno> {
        // As lseek(2) has them.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let wanted = match whence {
            SEEK_DATA => ExtentKind::Data,
            SEEK_HOLE => ExtentKind::Hole,
            _ => return Err(Errno::EINVAL),
        };
        self.with_file(number, |file| {
            let from = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            if from >= file.len {
                return Err(Errno::ENXIO);
            }
            let found = file
                .handle
                .disk()
                .extents(from)
                .find(|extent| extent.kind == wanted);
            let place = match found {
                Some(extent) => extent.offset.max(from),
                // Behind the last byte is a hole.
                None if wanted == ExtentKind::Hole => file.len,
                None => return Err(Errno::ENXIO),
            };
            i64::try_from(place).map_err(|_| Errno::EOVERFLOW)
        })
    }
}

/// An open that is under way.
struct Opening {
    library: Arc<Library>,
    files: Arc<Handles<OpenFile>>,
    direct: FopenFlags,
    node: NodeId,
    flags: OpenFlags,
    user: User,
}

impl Opening {
    fn finish(self) -> Result<(u64, FopenFlags), LibraryError> {
        let write = self.flags.acc_mode() != OpenAccMode::O_RDONLY;
        let handle = self.library.open_disk_for(self.node, write, &self.user)?;
        let mut answer = FopenFlags::empty();
        if handle.content_is_kept() {
            answer |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        if open_flags(self.flags).contains(OFlags::DIRECT) {
            answer |= self.direct;
        }
        let number = self.files.insert(OpenFile::new(handle));
        Ok((number.ok_or(LibraryError::Closed)?, answer))
    }
}

/// Who asks. The kernel tells the main group alone; the others are the asking thread's.
fn user_of(request: &Request) -> User {
    let status = match request.pid() {
        0 => None,
        pid => std::fs::read_to_string(format!("/proc/{pid}/status")).ok(),
    };
    let line = status.iter().flat_map(|status| status.lines());
    let groups = line.filter_map(|line| line.strip_prefix("Groups:")).next();
    let groups = groups.into_iter().flat_map(str::split_ascii_whitespace);
    User {
        uid: request.uid(),
        groups: std::iter::once(request.gid())
            .chain(groups.filter_map(|group| group.parse().ok()))
            .collect(),
    }
}

/// The flags of open(2); bits that nobody knows are kept.
fn open_flags(flags: OpenFlags) -> OFlags {
    OFlags::from_bits_retain(u32::from_ne_bytes(flags.0.to_ne_bytes()))
}
