//! The real host file.
//!
//! One sibling module per platform implements [`Storage`](super::Storage) on what its host offers;
//! this file holds what they share.

#[cfg(unix)]
mod access;
#[cfg(unix)]
mod scope;
#[cfg(unix)]
mod unix;

#[cfg(unix)]
pub use access::access_list;
#[cfg(unix)]
pub use scope::{Candidate, FileKey, Found, Listings, Miss, Named, Scope};
#[cfg(unix)]
pub use unix::{HostFile, sync_directory_of};

use crate::units::FileRange;

#[cfg(test)]
mod tests;

/// How a host file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Open for reading alone; changes then fail.
    pub read_only: bool,
    /// Take the image locks of [`super::lock`]: a writer admits nobody but those who ask for no
    /// lock, a reader admits other readers.
    pub lock: bool,
    /// Refuse a path whose last component is a symbolic link, for callers that must not be led out
    /// of a directory.
    pub no_follow: bool,
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

/// The unit in which hosts allocate and share file space. Larger on some; it only decides how a
/// copy is split, never what it means.
const HOST_BLOCK: u64 = 4096;

/// Bytes that pass through memory at once where the host cannot copy or zero by itself.
const CHUNK: u64 = 1 << 20;

/// The parts of `range`, in order, none longer than `CHUNK`.
fn chunks(range: FileRange) -> impl Iterator<Item = FileRange> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let part = FileRange::new(rest.start, rest.len.min(CHUNK));
        rest = FileRange::between(part.end(), rest.end());
        (!part.is_empty()).then_some(part)
    })
}
