//! `O_PATH` descriptors.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{FileKey, Kind, Space, Stat};
use crate::error::OpenError;
use crate::storage::host::{HostFile, HostOptions, access_list};

/// A file or directory that is held in place.
#[derive(Debug)]
pub(crate) struct Pin(OwnedFd);

impl Pin {
    /// The directory at `path`. Links are followed.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn directory(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// What is at `path`, whatever it is. Links are followed.
    ///
    /// # Errors
    /// Where there is nothing.
    pub(crate) fn file(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// A file that is open.
    ///
    /// # Errors
    /// Where the host has no `/proc`.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        Self::file(&proc_path(file.as_fd()))
    }

    /// A path that leads to it, in this process.
    pub(crate) fn path(&self) -> PathBuf {
        proc_path(self.0.as_fd())
    }

    /// What `name` is in this directory; a link itself.
    ///
    /// # Errors
    /// Where there is nothing, and [`io::ErrorKind::NotADirectory`] where this is none.
    pub(crate) fn child(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(
            &self.0,
            name,
            flags,
            Mode::empty(),
        )?))
    }

    /// The directory `name` in this one.
    ///
    /// # Errors
    /// As [`Self::child`], and [`io::ErrorKind::NotADirectory`] where it is none, but a link perhaps.
    pub(crate) fn subdirectory(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(
            &self.0,
            name,
            flags,
            Mode::empty(),
        )?))
    }

    /// The directory at `path` below this one, without following a link; the directory itself for the empty
    /// path. `None` where another file system is mounted there or on the way, which is not touched.
    ///
    /// # Errors
    /// As [`Self::subdirectory`].
    pub(crate) fn directory_here(&self, path: &Path) -> io::Result<Option<Self>> {
        if path.as_os_str().is_empty() {
            return self.try_clone().map(Some);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        match rustix::fs::openat2(&self.0, path, flags, Mode::empty(), resolve) {
            Ok(found) => Ok(Some(Self(found))),
            Err(Errno::XDEV) => Ok(None),
            Err(Errno::LOOP) => Err(io::ErrorKind::NotADirectory.into()),
            // An older kernel, a filter of system calls, a rename under way: the table of mounts alone has
            // to do.
            Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN) => {
                let names = path.iter();
                let walk = |directory: Self, name| directory.subdirectory(name);
                { names }.try_fold(self.try_clone()?, walk).map(Some)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What `name` is in this directory; where it is a link, what that leads to.
    ///
    /// # Errors
    /// As [`Self::child`].
    pub(crate) fn followed(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(
            &self.0,
            name,
            flags,
            Mode::empty(),
        )?))
    }

    /// What lies at `path` below this directory; links are followed as long as they stay below.
    /// `None` where the host cannot tell and somebody must walk there.
    ///
    /// # Errors
    /// Where there is nothing.
    pub(crate) fn beneath(&self, path: &Path) -> io::Result<Option<Self>> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&self.0, path, flags, Mode::empty(), resolve) {
            Ok(found) => Ok(Some(Self(found))),
            // An older kernel, a filter of system calls, a rename under way; or a link that is
            // absolute, which may all the same lead to a place below.
            Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN | Errno::XDEV) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Its attributes, also once its name is gone.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        stat_with(self.0.as_fd(), OsStr::new(""), AtFlags::EMPTY_PATH)
    }

    /// Attributes of an open file.
    pub(crate) fn stat_of(file: &File) -> io::Result<Stat> {
        stat_with(file.as_fd(), OsStr::new(""), AtFlags::EMPTY_PATH)
    }

    /// Attributes of what `name` is in this directory; of a link, its own.
    pub(crate) fn stat_child(&self, name: &OsStr) -> io::Result<Stat> {
        stat_with(self.0.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Calls `visit` with each name in this directory and what it is, until that breaks off; `.` and
    /// `..` left out.
    pub(crate) fn each_name(
        &self,
        mut visit: impl FnMut(&OsStr, Kind) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let readable = rustix::fs::openat(&self.0, ".", flags, Mode::empty())?;
        for entry in Dir::new(readable)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let kind = match entry.file_type() {
                // Some file systems leave it to stat.
                FileType::Unknown => {
                    match self.stat_child(OsStr::from_bytes(name)) {
                        Ok(stat) => stat.kind,
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {
                            Kind::Other("something that is gone")
                        }
                        // Whoever wants to look into it learns why that cannot be.
                        Err(_) => Kind::File,
                    }
                }
                known => kind(known),
            };
            if visit(OsStr::from_bytes(name), kind).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Where this link leads.
    pub(crate) fn link_target(&self) -> io::Result<PathBuf> {
        let text = rustix::fs::readlinkat(&self.0, "", Vec::new())?;
        Ok(OsString::from_vec(text.into_bytes()).into())
    }

    /// Where the host says that it is.
    pub(crate) fn real_path(&self) -> io::Result<PathBuf> {
        fs::read_link(proc_path(self.0.as_fd()))
    }

    /// What else leads there.
    pub(crate) fn other_paths(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Opens exactly this file.
    ///
    /// # Errors
    /// As [`HostFile::open`], about a path that says nothing to a user.
    pub(crate) fn open(&self, options: &HostOptions) -> Result<HostFile, OpenError> {
        HostFile::open(&self.path(), options)
    }

    /// Opens exactly this file to look at what it is: see [`HostFile::glance`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn glance(&self) -> Result<HostFile, OpenError> {
        HostFile::glance(&self.path())
    }

    /// Whether the file `name` in this directory, with these attributes, may be written: its owner
    /// wants it written at all, and permissions and file system let this process. Not for a link.
    pub(crate) fn is_child_writable(&self, name: &OsStr, stat: &Stat) -> bool {
        use rustix::fs::Access;
        stat.mode & 0o222 != 0
            && rustix::fs::accessat(&self.0, name, Access::WRITE_OK, AtFlags::empty()).is_ok()
    }

    /// Sizes of the file system that it lies on.
    pub(crate) fn space(&self) -> io::Result<Space> {
        let found = rustix::fs::fstatvfs(&self.0)?;
        Ok(Space {
            block_size: found.f_frsize,
            blocks: found.f_blocks,
            blocks_free: found.f_bfree,
            blocks_available: found.f_bavail,
            files: found.f_files,
            files_free: found.f_ffree,
            name_max: found.f_namemax,
        })
    }

    /// Its access control list, as [`access_list`] has it.
    pub(crate) fn access_list(&self) -> io::Result<Vec<u8>> {
        // The link in /proc is followed, and leads to this very file.
        access_list(&proc_path(self.0.as_fd()), true)
    }

    /// The access control list of what `name` is in this directory.
    pub(crate) fn access_list_of_child(&self, name: &OsStr) -> io::Result<Vec<u8>> {
        access_list(&proc_path(self.0.as_fd()).join(name), false)
    }
}

impl Stat {
    /// Attributes of what is at `path`, wherever that is; of a link, its own.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        stat_with(rustix::fs::CWD, path.as_os_str(), AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// A path that opens exactly this file, for as long as it is held.
fn proc_path(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn kind(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Link,
        FileType::Fifo => Kind::Other("a FIFO"),
        FileType::Socket => Kind::Other("a socket"),
        FileType::BlockDevice => Kind::Other("a block device"),
        FileType::CharacterDevice => Kind::Other("a character device"),
        FileType::Unknown => Kind::Other("something special"),
    }
}

fn stat_with(directory: BorrowedFd<'_>, name: &OsStr, flags: AtFlags) -> io::Result<Stat> {
    use rustix::fs::{RawMode, StatxFlags, StatxTimestamp};

    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = rustix::fs::statx(directory, name, flags, wanted)?;
    let time = |stamp: StatxTimestamp| system_time(stamp.tv_sec, stamp.tv_nsec);
    let has_born = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    let mode = RawMode::from(found.stx_mode);
    Ok(Stat {
        key: FileKey {
            device: u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor),
            inode: found.stx_ino.into(),
        },
        born: has_born.then(|| time(found.stx_btime)),
        kind: kind(FileType::from_raw_mode(mode)),
        len: found.stx_size,
        allocated: found.stx_blocks.saturating_mul(512),
        accessed: time(found.stx_atime),
        modified: time(found.stx_mtime),
        changed: time(found.stx_ctime),
        mode: mode & 0o7777,
        uid: found.stx_uid,
        gid: found.stx_gid,
        links: found.stx_nlink,
    })
}

/// A time of the host. One that this platform cannot express becomes the epoch.
fn system_time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    };
    time.and_then(|time| time.checked_add(Duration::from_nanos(nanoseconds.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
