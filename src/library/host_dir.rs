//! The directory tree on the host, walked without ever following a symbolic link.
//!
//! Every access starts at the root's pin and goes one component after the other, so that nothing
//! outside of the root is reached even while somebody swaps directories for links.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path};
use std::time::SystemTime;

use crate::storage::host::pin::{Pin, Stat};
use crate::storage::host::{FileKey, Space};

/// What tells one file of the host from every other, also from one that gets the same inode number
/// after this one is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    key: FileKey,
    /// When the file was created, where the host's file system remembers it. Not on Windows: there
    /// anybody may set that time, and no number stands for another file soon.
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

impl Stat {
    pub(super) fn identity(&self) -> Identity {
        Identity {
            key: self.key,
            born: self.born.filter(|_| cfg!(unix)),
        }
    }

    pub(super) fn stamp(&self) -> Stamp {
        Stamp {
            identity: self.identity(),
            len: self.len,
            modified: self.modified,
            changed: self.changed,
        }
    }
}

/// The root, held: it stays the same directory whatever is mounted over it or renamed.
#[derive(Debug)]
pub(super) struct HostDir {
    root: Pin,
}

impl HostDir {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        Ok(Self {
            root: Pin::directory(root)?,
        })
    }

    /// The directory at `path` below the root; the root itself for the empty path.
    pub(super) fn directory(&self, path: &Path) -> io::Result<Pin> {
        let mut directory = self.root.try_clone()?;
        for component in path.components() {
            let Component::Normal(name) = component else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            directory = directory.subdirectory(name)?;
        }
        Ok(directory)
    }

    /// The directory that holds `path`, and `path`'s name in it.
    pub(super) fn parent<'a>(&self, path: &'a Path) -> io::Result<(Pin, &'a OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((
            self.directory(path.parent().unwrap_or(Path::new("")))?,
            name,
        ))
    }

    /// What is at `path`, held.
    pub(super) fn pin(&self, path: &Path) -> io::Result<Pin> {
        let (directory, name) = self.parent(path)?;
        directory.child(name)
    }

    /// Attributes of the root.
    pub(super) fn stat(&self) -> io::Result<Stat> {
        self.root.stat()
    }

    /// The root itself, for others to hold.
    pub(super) fn root(&self) -> io::Result<Pin> {
        self.root.try_clone()
    }

    pub(super) fn space(&self) -> io::Result<Space> {
        self.root.space()
    }
}
