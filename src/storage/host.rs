//! The real host file.
//!
//! One sibling module per platform implements [`Storage`](super::Storage) on what its host offers;
//! this file holds what they share.

#[cfg(unix)]
mod access;
mod copy;
pub mod paths;
pub(crate) mod pin;
mod scope;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
pub(crate) mod windows;

#[cfg(unix)]
pub use access::access_list;
pub use pin::{FileKey, Space};
pub use scope::{Candidate, Found, Listings, Miss, Named, Scope};
#[cfg(unix)]
pub use unix::{HostFile, sync_directory_of};
#[cfg(windows)]
pub use windows::{HostFile, sync_directory_of};

#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;

/// The sizes of the file system that the file or directory at `path` lies on.
///
/// # Errors
/// What the host answers.
pub fn space_of(path: &Path) -> io::Result<Space> {
    pin::Pin::file(path)?.space()
}

/// How the host stores a file, as far as it matters to those who attach it as a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostForm {
    /// Bytes of its length that are holes.
    pub hole_bytes: u64,
    /// Whether a copy of it that keeps what it is will be sparse: that it has holes; on Windows, its attribute,
    /// which a file without holes may have as well.
    pub is_sparse: bool,
    /// Windows' attribute.
    pub is_compressed: bool,
    /// Windows' attribute.
    pub is_encrypted: bool,
}

/// Whether freed parts of files are given back to the host where nobody said otherwise. Not on
/// Windows, which refuses to attach a disk whose file is sparse.
pub const PUNCH_BY_DEFAULT: bool = cfg!(not(windows));

/// How a host file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Open for reading alone; changes then fail.
    pub read_only: bool,
    /// Take the image locks of `storage::lock`, or on Windows share the file as they would: a writer
    /// admits nobody but those who read without a lock, a reader admits other readers.
    pub lock: bool,
    /// Refuse a path whose last component is a symbolic link, for callers that must not be led out
    /// of a directory.
    pub no_follow: bool,
}

/// How a handle of [`crate::virtdisk`] has a file, where that is neither as a reader nor as a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// To compact it: as a writer, but beside one who has it attached.
    Compact,
    /// Attached: reading nothing, and letting nobody write but one who compacts. Only by who has the file
    /// as a reader or a writer meanwhile.
    Attached,
}

impl Default for HostOptions {
    /// Read-write, locked, following symbolic links.
    fn default() -> Self {
        Self {
            read_only: false,
            lock: true,
            no_follow: false,
        }
    }
}
