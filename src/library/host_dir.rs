//! The directory tree on the host, walked without ever following a symbolic link.
//!
//! Every access starts at the root's pin and goes one component after the other, so that nothing
//! outside of the root is reached even while somebody swaps directories for links.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path};

use crate::lineage::may_serve;
use crate::storage::host::Space;
use crate::storage::host::pin::{Pin, Stat};

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
    ///
    /// # Errors
    /// Where there is none, and [`io::ErrorKind::PermissionDenied`] where it lies on a file system that needs a
    /// vhdfs mount to answer: we may be the one, and wait for ourselves.
    pub(super) fn directory(&self, path: &Path) -> io::Result<Pin> {
        let is_name = |part| matches!(part, Component::Normal(_));
        if !path.components().all(is_name) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if let Some(directory) = self.root.directory_here(path)? {
            return Ok(directory);
        }
        if !may_serve(&self.root, path)? {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let walk = |directory: Pin, name| directory.subdirectory(name);
        path.iter().try_fold(self.root.try_clone()?, walk)
    }

    /// Whether another file system lies at `path`, or on the way, which is not touched.
    #[cfg(unix)]
    pub(super) fn is_elsewhere(&self, path: &Path) -> bool {
        matches!(self.root.directory_here(path), Ok(None))
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
    #[cfg(any(windows, test))]
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
