//! What can go wrong in a library of disks.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::ErrorKind;

/// Why an operation on a [`Library`](super::Library) failed. Paths are relative to its root.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibraryError {
    /// No disk and no directory has that name.
    #[error("{}: no such disk or directory", path.display())]
    NotFound {
        /// What was asked for.
        path: PathBuf,
    },
    /// The node's file is no longer there under the name that the node was found by, or another
    /// file has taken its place: look the name up again.
    #[error("{}: replaced or moved since it was looked up", path.display())]
    Stale {
        /// Where the file was.
        path: PathBuf,
    },
    /// The node is a disk, and a directory was needed.
    #[error("{}: not a directory", path.display())]
    NotADirectory {
        /// The disk.
        path: PathBuf,
    },
    /// The node is a directory, and a disk was needed.
    #[error("{}: is a directory", path.display())]
    IsADirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The backing file cannot be opened as a disk. The reason has been logged, once.
    #[error("{}: {reason}", path.display())]
    Unopenable {
        /// The backing file.
        path: PathBuf,
        /// Why, in words.
        reason: String,
        /// The class of the problem.
        kind: ErrorKind,
    },
    /// Writing was asked of a disk, or of a library, that only allows reading.
    #[error("{}: can only be read: {reason}", path.display())]
    ReadOnly {
        /// The backing file.
        path: PathBuf,
        /// Why, in words.
        reason: String,
    },
    /// The user may not read all that the disk shows. The reason has been logged, once.
    #[error("{}: {reason}", path.display())]
    Denied {
        /// The backing file.
        path: PathBuf,
        /// Why, in words.
        reason: String,
    },
    /// The library has been closed.
    #[error("the library is closed")]
    Closed,
    /// The host failed.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What was tried, in the imperative.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl LibraryError {
    /// The host's failure `source` while trying to `action` at `path`.
    pub(super) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound {
                path: path.to_owned(),
            },
            // What was a directory is something else by now.
            io::ErrorKind::NotADirectory => Self::Stale {
                path: path.to_owned(),
            },
            _ => Self::Io {
                path: path.to_owned(),
                action,
                source,
            },
        }
    }
}
