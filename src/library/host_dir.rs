//! The directory tree on the host, walked without ever following a symbolic link.
//!
//! Every access starts at the root's descriptor and opens one component after the other, so that
//! nothing outside of the root is reached even while somebody swaps directories for links.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

use crate::storage::host::access_list;

/// What tells one file of the host from every other, also from one that gets the same inode number
/// after this one is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    /// When the file was created, where the host's file system remembers it.
    born: Option<SystemTime>,
}

/// Whatever changes when a file's bytes may have: two equal stamps, one file, one content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stamp {
    pub(super) identity: Identity,
    pub(super) len: u64,
    pub(super) modified: SystemTime,
    pub(super) changed: SystemTime,
}

/// What kind of file it is, as far as a library cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostKind {
    Directory,
    File,
    Other,
}

/// A file's attributes on the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stat {
    pub(super) identity: Identity,
    pub(super) kind: HostKind,
    pub(super) len: u64,
    /// Bytes that the host stores.
    pub(super) allocated: u64,
    pub(super) accessed: SystemTime,
    pub(super) modified: SystemTime,
    pub(super) changed: SystemTime,
    /// Permission bits, set-id and sticky ones included.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
}

impl Stat {
    pub(super) fn stamp(&self) -> Stamp {
        Stamp {
            identity: self.identity,
            len: self.len,
            modified: self.modified,
            changed: self.changed,
        }
    }
}

/// Sizes of the file system that a directory lies on.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Unit of the three block counts, in bytes.
    pub block_size: u64,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub blocks_free: u64,
    /// Free blocks that an ordinary user may take.
    pub blocks_available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// The longest file name in bytes.
    pub name_max: u64,
}

/// The root, held open: it stays the same directory whatever is mounted over it or renamed.
#[derive(Debug)]
pub(super) struct HostDir {
    root: OwnedFd,
}

/// A file that is held in place without being open: it keeps its identity and its attributes can
/// be read, also once its name is gone. Takes no lock and needs no permission on the file.
pub(super) struct Pinned(OwnedFd);

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pinned").field(&self.0.as_raw_fd()).finish()
    }
}

impl HostDir {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: rustix::fs::open(root, flags, Mode::empty())?,
        })
    }

    /// The directory at `path` below the root; the root itself for the empty path.
    pub(super) fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut directory = self.root.try_clone()?;
        for component in path.components() {
            let Component::Normal(name) = component else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            directory = subdirectory(directory.as_fd(), name)?;
        }
        Ok(directory)
    }

    /// The directory that holds `path`, and `path`'s name in it.
    pub(super) fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((
            self.directory(path.parent().unwrap_or(Path::new("")))?,
            name,
        ))
    }

    pub(super) fn stat(&self, path: &Path) -> io::Result<Stat> {
        if path.as_os_str().is_empty() {
            return stat_open(self.root.as_fd());
        }
        let (directory, name) = self.parent(path)?;
        Place {
            directory: directory.as_fd(),
            name,
        }
        .stat()
    }

    /// The root itself, for others to hold.
    pub(super) fn root(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    pub(super) fn space(&self) -> io::Result<Space> {
        let found = rustix::fs::fstatvfs(&self.root)?;
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
}

fn subdirectory(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// The names in `directory`, with what the host says about their kind; `.` and `..` left out.
pub(super) fn list(directory: BorrowedFd<'_>) -> io::Result<Vec<(OsString, HostKind)>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let readable = rustix::fs::openat(directory, ".", flags, Mode::empty())?;
    let mut entries = Vec::new();
    for entry in Dir::new(readable)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Directory => HostKind::Directory,
            FileType::RegularFile => HostKind::File,
            // Some file systems leave it to stat.
            FileType::Unknown => {
                let place = Place {
                    directory,
                    name: OsStr::from_bytes(name),
                };
                place.stat().map_or(HostKind::Other, |stat| stat.kind)
            }
            _ => HostKind::Other,
        };
        entries.push((OsString::from_vec(name.to_owned()), kind));
    }
    Ok(entries)
}

/// A path that leads to exactly this open file, for as long as it is.
fn path_of(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The access control list of an open file or directory, as [`access_list`] has it.
pub(super) fn access_list_of(file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    // The link in /proc is followed, and leads to this very file.
    access_list(&path_of(file), true)
}

/// Attributes of what is at an absolute path, wherever that is.
pub(super) fn stat_at(path: &Path) -> io::Result<Stat> {
    stat_with(rustix::fs::CWD, path.as_os_str(), AtFlags::SYMLINK_NOFOLLOW)
}

/// Attributes of an open file or directory.
pub(super) fn stat_open(file: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_with(file, OsStr::new(""), AtFlags::EMPTY_PATH)
}

/// A name in an open directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) directory: BorrowedFd<'a>,
    pub(super) name: &'a OsStr,
}

impl Place<'_> {
    /// Attributes of what is there; of a symbolic link, those of the link.
    pub(super) fn stat(&self) -> io::Result<Stat> {
        stat_with(self.directory, self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// The access control list of what is there, as [`access_list`] has it.
    pub(super) fn access_list(&self) -> io::Result<Vec<u8>> {
        access_list(&path_of(self.directory).join(self.name), false)
    }

    /// Whether the file there, with these attributes, may be written: its owner wants it written
    /// at all, and permissions and file system let this process. Not for a symbolic link.
    pub(super) fn is_writable(&self, stat: &Stat) -> bool {
        use rustix::fs::Access;
        stat.mode & 0o222 != 0
            && rustix::fs::accessat(
                self.directory,
                self.name,
                Access::WRITE_OK,
                AtFlags::empty(),
            )
            .is_ok()
    }

    /// Holds what is there, whatever it is.
    pub(super) fn pin(&self) -> io::Result<Pinned> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Pinned(rustix::fs::openat(
            self.directory,
            self.name,
            flags,
            Mode::empty(),
        )?))
    }
}

impl Pinned {
    pub(super) fn stat(&self) -> io::Result<Stat> {
        stat_open(self.0.as_fd())
    }

    /// Its access control list, as [`access_list_of`] has it.
    pub(super) fn access_list(&self) -> io::Result<Vec<u8>> {
        access_list_of(self.0.as_fd())
    }

    /// A path that opens exactly this file, for as long as this is held.
    pub(super) fn path(&self) -> PathBuf {
        path_of(self.0.as_fd())
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
        identity: Identity {
            device: u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor),
            inode: found.stx_ino,
            born: has_born.then(|| time(found.stx_btime)),
        },
        kind: match FileType::from_raw_mode(mode) {
            FileType::Directory => HostKind::Directory,
            FileType::RegularFile => HostKind::File,
            _ => HostKind::Other,
        },
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
