//! What differs between Windows and other hosts, beside the functions of [`super::ffi`].

use std::path::Path;

use super::error::Win32Error;
use crate::storage::host::HostFile;

/// Which file it is, whatever its name.
#[cfg(unix)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

#[cfg(unix)]
impl FileId {
    /// Of the open `file`.
    pub(super) fn of(_path: &Path, file: &HostFile) -> Result<Self, Win32Error> {
        use std::os::unix::fs::MetadataExt;
        let metadata = file.metadata().map_err(|error| Win32Error::host(&error))?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// Which file it is: its one name without links.
#[cfg(not(unix))]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId(std::path::PathBuf);

#[cfg(not(unix))]
impl FileId {
    /// Of the file at `path`.
    pub(super) fn of(path: &Path, _file: &HostFile) -> Result<Self, Win32Error> {
        let path = std::fs::canonicalize(path).map_err(|error| Win32Error::host(&error))?;
        Ok(Self(path))
    }
}
