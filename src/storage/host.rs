//! The real host file.
//!
//! One sibling module per platform implements [`Storage`](super::Storage) on what its host offers;
//! this file holds what they share.

use std::time::{Duration, Instant};

use crate::error::OpenProblem;

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

/// How long a file must not have been changed before this program changes it by itself, where the host
/// cannot tell who else has it open, and before a mount compacts what no guest has opened.
pub const QUIET_TIME: Duration = Duration::from_secs(300);

/// How long those who have a file open are waited for, at most, before it is not worked on.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What is known of others who have a file open that this program is going to change by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nobody has it open, and a program that opens it from here on waits: see
    /// [`Storage::is_wanted`](super::Storage::is_wanted).
    Alone,
    /// Somebody has it open, for reading at least, or waits to.
    Others,
    /// Somebody has changed it since it was opened, or lent. Nothing more can be done but closing it.
    Changed,
    /// The host cannot tell. That nobody has changed it since it was opened, it can.
    Unknown,
}

/// How a host file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Open for reading alone; changes then fail.
    pub read_only: bool,
    /// Take the image locks of `storage::lock`, or on Windows share the file as they would: a writer
    /// admits nobody but those who read without a lock, a reader admits other readers. A writer is
    /// refused, too, while a program that takes no lock has the file open for writing, where the host
    /// can tell.
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

impl HostFile {
    /// Takes the file, which is open for writing, for work that no guest asked for, and has all other programs
    /// that open it wait: the caller asks [`Storage::is_wanted`](super::Storage::is_wanted) often, and then
    /// soon [lends](Self::lend) or closes it.
    /// Those who have it open now are waited for as long as `go_on` says so. Where the host cannot tell,
    /// the file must not have been changed for a time of `quiet`.
    ///
    /// # Errors
    /// [`OpenProblem::InUse`] and [`OpenProblem::NotQuiet`]; what the host answers.
    pub fn claim(
        &self,
        quiet: Duration,
        go_on: &dyn Fn(Duration) -> bool,
    ) -> Result<(), OpenProblem> {
        let io = |source| OpenProblem::Io {
            action: "find out who else has the file open",
            source,
        };
        let begun = Instant::now();
        loop {
            match self.take_lease().map_err(io)? {
                Hold::Alone => return Ok(()),
                Hold::Changed => {
                    return Err(OpenProblem::InUse(
                        "it has changed the file just now".to_owned(),
                    ));
                }
                Hold::Others if go_on(begun.elapsed()) => std::thread::sleep(AGAIN),
                Hold::Others => return Err(OpenProblem::InUse(self.holder())),
                Hold::Unknown => {
                    // From here on at least changes of others are noticed.
                    self.note(&|| false);
                    let ago = self.unchanged_for().map_err(io)?;
                    return match ago < quiet {
                        true => Err(OpenProblem::NotQuiet { ago, quiet }),
                        false => Ok(()),
                    };
                }
            }
        }
    }
}

/// How long between two looks whether others have closed a file.
const AGAIN: Duration = Duration::from_millis(20);
