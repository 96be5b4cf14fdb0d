//! Files and directories that are held without being open.
//!
//! A [`Pin`] stays on the file that it was taken of, whatever somebody renames or puts in its place;
//! it takes no lock, needs no permission on the file, and does nothing to a device. What lies below a
//! directory is reached from its pin, one name after the other, and no link is followed on the way.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
pub(super) mod windows;

#[cfg(unix)]
pub(crate) use unix::Pin;
#[cfg(windows)]
pub(crate) use windows::Pin;

use std::ffi::OsString;
use std::io;
use std::ops::ControlFlow;
use std::time::SystemTime;

/// Tells one file of the host from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileKey {
    /// The file system.
    pub device: u64,
    /// The file in it. Windows has numbers of 128 bits.
    pub inode: u128,
}

/// What tells one file of the host from every other, also from one that gets the same inode number
/// after this one is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Identity {
    key: FileKey,
    /// When the file was created, where the host's file system remembers it. Not on Windows: there
    /// anybody may set that time, and no number stands for another file soon.
    born: Option<SystemTime>,
}

impl Identity {
    /// The file system that the file is on.
    pub(crate) fn device(&self) -> u64 {
        self.key.device
    }
}

#[cfg(test)]
impl Identity {
    #[cfg(unix)]
    pub(crate) fn inode(&self) -> u128 {
        self.key.inode
    }

    /// A file that is nowhere.
    pub(crate) fn numbered(inode: u128) -> Self {
        Self {
            key: FileKey { device: 0, inode },
            born: None,
        }
    }
}

/// Whatever changes when a file's bytes may have: two equal stamps, one file, one content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    pub(crate) identity: Identity,
    pub(crate) len: u64,
    pub(crate) modified: SystemTime,
    pub(crate) changed: SystemTime,
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// A regular file.
    File,
    /// A symbolic link, or what else leads to another place.
    Link,
    /// Something else: what, with its article.
    Other(&'static str),
}

impl Kind {
    /// What it is, if it is no regular file.
    pub(crate) fn special(self) -> Option<&'static str> {
        match self {
            Self::File => None,
            Self::Directory => Some("a directory"),
            Self::Link => Some("a symbolic link"),
            Self::Other(what) => Some(what),
        }
    }
}

impl Pin {
    /// All names in this directory and what they are, as [`Self::each_name`] has them.
    pub(crate) fn names(&self) -> io::Result<Vec<(OsString, Kind)>> {
        let mut names = Vec::new();
        self.each_name(|name, kind| {
            names.push((name.to_owned(), kind));
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }
}

/// A file's attributes on the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) key: FileKey,
    /// When it was created, where the host's file system remembers that.
    pub(crate) born: Option<SystemTime>,
    pub(crate) kind: Kind,
    pub(crate) len: u64,
    /// Bytes that the host stores.
    pub(crate) allocated: u64,
    pub(crate) accessed: SystemTime,
    pub(crate) modified: SystemTime,
    pub(crate) changed: SystemTime,
    /// Permission bits, set-id and sticky ones included.
    #[cfg(unix)]
    pub(crate) mode: u32,
    #[cfg(unix)]
    pub(crate) uid: u32,
    #[cfg(unix)]
    pub(crate) gid: u32,
    #[cfg(unix)]
    pub(crate) links: u32,
    /// `FILE_ATTRIBUTE_*`.
    #[cfg(windows)]
    pub(crate) attributes: u32,
}

impl Stat {
    pub(crate) fn identity(&self) -> Identity {
        Identity {
            key: self.key,
            born: self.born.filter(|_| cfg!(unix)),
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        Stamp {
            identity: self.identity(),
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
    /// Inodes in all; 0 where the host does not count them.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// The longest file name, in bytes; on Windows in UTF-16 units.
    pub name_max: u64,
}
