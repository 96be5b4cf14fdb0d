//! What can go wrong, one type per operation, each with a [`ErrorKind`] for callers that branch.
//!
//! Messages say what was found and what was expected; [`OpenError`] and [`CreateError`] carry the
//! path. A cause from the host is the error's `source`, not part of its text.

mod text;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::units::{BlockIndex, FileRange};
pub use text::{chain, plain};

/// The class of an error, for callers that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file is not a virtual disk of a format that this crate knows.
    NotADisk,
    /// The file breaks its format.
    Corrupt,
    /// The file is sound, or may be, but uses something that this crate does not support.
    Incompatible,
    /// Another program has the file open in a way that excludes us.
    InUse,
    /// A change was asked of something opened read-only.
    ReadOnly,
    /// The disk has no block table that compaction could shorten (a fixed disk).
    NotCompactable,
    /// An earlier failure left it unknown what is on the host: reopen the disk.
    Poisoned,
    /// A range reaches beyond the disk.
    OutOfRange,
    /// The host, or the format's largest file, has no room left.
    NoSpace,
    /// The caller cancelled the operation.
    Cancelled,
    /// An argument is not possible.
    InvalidInput,
    /// The parent of a differencing disk is not where it may be looked for, or cannot be opened.
    ParentMissing,
    /// What lies where the parent of a differencing disk should be is another disk, or has changed.
    ParentMismatch,
    /// The host failed.
    Io,
}

/// What a decoder found wrong with the bytes of an image. Offsets are file offsets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// Neither footer is there.
    #[error("not a VHD: no `conectix` footer at the end of the file nor at its start")]
    NotVhd,
    /// The same, of a file that has the name of a VHD.
    #[error(
        "not a VHD: no `conectix` footer at the end of the file nor at its start; it may be a fixed VHD \
         that lost its footer, or has something behind it, or raw data: `vhdfs check --repair \
         --dry-run` says whether a footer can be written"
    )]
    NoFooter,
    /// The file type identifier is not there.
    #[error("not a VHDX: no `vhdxfile` at the start of the file")]
    NotVhdx,
    /// It is something else.
    #[error("not a {wanted}: it is {found}; {advice}")]
    Foreign {
        /// What it should be: `VHD` or `VHDX`.
        wanted: &'static str,
        /// What it is.
        found: &'static str,
        /// What to do about it.
        advice: String,
    },
    /// A structure breaks the format.
    #[error("corrupt {structure}: {found}; expected {expected}")]
    Corrupt {
        /// Which structure, with its place.
        structure: String,
        /// What it holds.
        found: String,
        /// What the format demands.
        expected: String,
    },
    /// Something that this crate does not support.
    #[error("unsupported: {found}; {advice}")]
    Incompatible {
        /// What the file uses.
        found: String,
        /// What to do about it.
        advice: String,
    },
    /// Two blocks, or a block and metadata, claim the same bytes of the file.
    #[error("{what} overlaps {other} at file offset {at}; open it read-only and copy the data out")]
    Overlap {
        /// The one, with its place.
        what: String,
        /// The other.
        other: String,
        /// The shared bytes.
        at: FileRange,
    },
    /// A block reaches beyond the end of the file.
    #[error(
        "block {block} lies at {at}, beyond the end of the file at {end:#x}: the file was cut; \
         what is left can be read, and `vhdfs check` says more"
    )]
    BeyondEnd {
        /// The block.
        block: BlockIndex,
        /// Where the block table places it.
        at: FileRange,
        /// The file's length, less its footer.
        end: u64,
    },
}

impl FormatError {
    pub(crate) fn corrupt(
        structure: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Corrupt {
            structure: structure.into(),
            found: found.into(),
            expected: expected.into(),
        }
    }

    pub(crate) fn incompatible(found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::Incompatible {
            found: found.into(),
            advice: advice.into(),
        }
    }

    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotVhd | Self::NoFooter | Self::NotVhdx | Self::Foreign { .. } => {
                ErrorKind::NotADisk
            }
            Self::Incompatible { .. } => ErrorKind::Incompatible,
            Self::Corrupt { .. } | Self::Overlap { .. } | Self::BeyondEnd { .. } => {
                ErrorKind::Corrupt
            }
        }
    }
}

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct OpenError {
    path: PathBuf,
    #[source]
    problem: OpenProblem,
}

/// The reason inside an [`OpenError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenProblem {
    /// The bytes of the file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Sound to read, but not to be written; a read-only open succeeds.
    #[error("cannot be opened for writing: {0}")]
    NotWritable(#[source] FormatError),
    /// Another program has it open: who or how. A lock tells, or the host.
    #[error("in use by another program ({0}); close it there first")]
    InUse(String),
    /// It may be that somebody is at it.
    #[error(
        "changed {} s ago, and this host cannot tell whether another program still writes to it: leave it \
         alone for {} s, or use --quiet-time 0s if nobody has it open",
        ago.as_secs(),
        quiet.as_secs()
    )]
    NotQuiet {
        /// How long ago it was changed.
        ago: Duration,
        /// How long it must have been.
        quiet: Duration,
    },
    /// The parent of a differencing disk: see [`ParentProblem`].
    #[error(transparent)]
    Parent(#[from] ParentProblem),
    /// The host refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, in the imperative.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl OpenError {
    /// An error about the file at `path`.
    pub(crate) fn new(path: &Path, problem: impl Into<OpenProblem>) -> Self {
        Self {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    /// The same about a file that was opened by a path that says nothing.
    #[cfg(unix)]
    pub(crate) fn renamed(self, path: &Path) -> Self {
        Self::new(path, self.problem)
    }

    /// The file that it is about.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The reason.
    pub fn problem(&self) -> &OpenProblem {
        &self.problem
    }

    /// The file of the parent that somebody has open for writing, if that is why.
    pub(crate) fn parent_in_use(&self) -> Option<&Path> {
        match &self.problem {
            OpenProblem::Parent(ParentProblem::InUse { path, .. }) => Some(path),
            OpenProblem::Parent(ParentProblem::Unopenable(error)) => error.parent_in_use(),
            _ => None,
        }
    }

    /// Whether the disks that are open leave no memory for another one's block table.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(&self.problem, OpenProblem::Io { source, .. } if source.kind() == io::ErrorKind::OutOfMemory)
    }

    /// The reason alone, for an error about the same file under another name.
    pub(crate) fn into_problem(self) -> OpenProblem {
        self.problem
    }

    /// What the host answered, for those to whom all else is no more than a failure.
    pub(crate) fn into_host(self) -> io::Error {
        match self.problem {
            OpenProblem::Io { source, .. } => source,
            problem => io::Error::other(problem),
        }
    }

    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        self.problem.kind()
    }
}

impl OpenProblem {
    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Format(error) => error.kind(),
            Self::NotWritable(_) => ErrorKind::ReadOnly,
            Self::InUse(_) | Self::NotQuiet { .. } => ErrorKind::InUse,
            Self::Parent(problem) => problem.kind(),
            Self::Io { source, .. } if is_full(source) => ErrorKind::NoSpace,
            Self::Io { .. } => ErrorKind::Io,
        }
    }
}

/// Whether the host takes no more bytes: it is full, or the file is as long as a quota, a limit of this
/// process or the host's file system lets it be.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

/// Why a differencing disk has no parent to read from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParentProblem {
    /// Nothing was found in any place that the image names.
    #[error("its parent disk was not found: {}", listed(tried))]
    Missing {
        /// Each place that was looked at, and what was there.
        tried: Vec<String>,
    },
    /// What was found is another disk, or another state of the right one.
    #[error(
        "its parent disk is not the one it was made for: {} has the identity {found}, and {expected} \
         is needed; put the right disk in its place, or say where it is",
        path.display()
    )]
    Mismatch {
        /// The file that was found.
        path: PathBuf,
        /// Its identity.
        found: String,
        /// The identity, or the identities, that the child accepts.
        expected: String,
    },
    /// Two of the files that the user named could be the parent, and need not hold the same.
    #[error(
        "both {} and {} have the identity {identity} that its parent disk has; name only the one that it \
         was made over",
        one.display(),
        other.display()
    )]
    Ambiguous {
        /// The one file.
        one: PathBuf,
        /// The other.
        other: PathBuf,
        /// What the child accepts.
        identity: String,
    },
    /// It was found, and cannot be its parent.
    #[error("its parent disk {} does not fit: {reason}", path.display())]
    Unfit {
        /// The parent's file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It was found, but somebody changes it.
    #[error(
        "its parent disk {} is open for writing ({holder}); close it there first",
        path.display()
    )]
    InUse {
        /// The parent's file.
        path: PathBuf,
        /// What somebody does with it.
        holder: String,
    },
    /// Its own parents: a chain that ends nowhere.
    #[error("with its parents it is {len} disks or more; at most {most} are supported")]
    TooLong {
        /// How many were found, itself included.
        len: usize,
        /// How many may be.
        most: usize,
    },
    /// Its own parents: a chain that leads back to where it was.
    #[error("its parents form a circle: {} is its own ancestor", path.display())]
    Circle {
        /// The file that came twice.
        path: PathBuf,
    },
    /// It is the right file, but cannot be opened.
    #[error("its parent disk {}", .0)]
    Unopenable(#[source] Box<OpenError>),
}

impl ParentProblem {
    /// Of a parent whose sectors have another size than those of its child.
    pub(crate) fn sectors(path: PathBuf, of_parent: u64, of_child: u64) -> Self {
        let reason = format!("it has sectors of {of_parent} bytes, its child of {of_child}");
        Self::Unfit { path, reason }
    }

    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::ParentMissing,
            Self::Mismatch { .. } => ErrorKind::ParentMismatch,
            Self::Ambiguous { .. } => ErrorKind::InvalidInput,
            Self::InUse { .. } => ErrorKind::InUse,
            Self::Unfit { .. } | Self::Circle { .. } => ErrorKind::Corrupt,
            Self::TooLong { .. } => ErrorKind::Incompatible,
            Self::Unopenable(error) => error.kind(),
        }
    }
}

fn listed(tried: &[String]) -> String {
    match tried {
        [] => "the image names no place where it could be".to_owned(),
        some => some.join("; "),
    }
}

/// Why an operation on an open disk failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The disk was opened read-only.
    #[error("the disk is open read-only")]
    ReadOnly,
    /// The range reaches beyond the disk.
    #[error("{offset:#x} and {len} bytes reach beyond the disk's {disk_len} bytes")]
    OutOfRange {
        /// Where the range starts.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The disk's size in bytes.
        disk_len: u64,
    },
    /// No room: the host is full, or the format's largest file is reached.
    #[error("no space left on the host, or the file is as long as its format allows")]
    NoSpace(#[source] Option<io::Error>),
    /// A commit or a sync failed earlier; what is on the host is unknown until a reopen.
    #[error("the disk takes no more changes since an earlier failure ({0}); reopen it")]
    Poisoned(String),
    /// The host failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried, in the imperative.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl DiskError {
    /// The host's failure `source` while trying to `action`; a full host becomes `NoSpace`.
    pub(crate) fn io(action: &'static str, source: io::Error) -> Self {
        match is_full(&source) {
            true => Self::NoSpace(Some(source)),
            false => Self::Io { action, source },
        }
    }

    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ReadOnly => ErrorKind::ReadOnly,
            Self::OutOfRange { .. } => ErrorKind::OutOfRange,
            Self::NoSpace(_) => ErrorKind::NoSpace,
            Self::Poisoned(_) => ErrorKind::Poisoned,
            Self::Io { .. } => ErrorKind::Io,
        }
    }
}

/// Why a compaction ended early. The disk is sound after each of them and can be compacted again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompactError {
    /// The file of a fixed disk has a place for all of it, and this one has nothing beyond.
    #[error(
        "a fixed disk cannot be compacted: its file always has the disk's full length; `vhdfs compact \
         --punch-holes=on` gives the host back what it need not store of it"
    )]
    Fixed,
    /// Cancelled by the caller.
    #[error("cancelled; what was done so far stays, and a further run goes on from there")]
    Cancelled,
    /// Another program opens the file.
    #[error(
        "another program opens the file; what was done so far stays, and a further run, once that has \
         closed it, goes on from there"
    )]
    Wanted,
    /// The host is full. What needed no further space was done.
    #[error(
        "the host has no room for one more block, so that {blocks} blocks could not be moved; free \
         some space there and run it again"
    )]
    NoRoom {
        /// How many blocks stay where they are.
        blocks: u64,
    },
    /// The disk failed underneath.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl CompactError {
    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Fixed => ErrorKind::NotCompactable,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Wanted => ErrorKind::InUse,
            Self::NoRoom { .. } => ErrorKind::NoSpace,
            Self::Disk(error) => error.kind(),
        }
    }
}

/// Why a disk could not be created. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The options contradict the format.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// The file that was to be created.
        path: PathBuf,
        /// What is wrong, and what is possible.
        reason: String,
    },
    /// The parent has no identity of its own, by which its child could know it from other disks.
    #[error(
        "{}: it cannot be a parent: {found}, so that a child would take other disks for it; give it an \
         identity of its own first",
        path.display()
    )]
    ParentIdentity {
        /// The parent's file.
        path: PathBuf,
        /// What its identity is.
        found: String,
    },
    /// The host refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file that was to be created.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl CreateError {
    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::InvalidInput,
            Self::ParentIdentity { .. } => ErrorKind::Incompatible,
            Self::Io { .. } => ErrorKind::Io,
        }
    }
}

/// Why a disk got no new identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// It cannot be opened or written.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its children would no longer know it.
    #[error("{}: its identity stays: {reason}", path.display())]
    HasChildren {
        /// The disk's file.
        path: PathBuf,
        /// What is, or may be, over it.
        reason: String,
    },
}

impl IdentityError {
    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Open(error) => error.kind(),
            Self::HasChildren { .. } => ErrorKind::Incompatible,
        }
    }
}

/// Why what a repair changed was not put back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// One of the two files cannot be opened or used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What should be the backup is none.
    #[error("{}: not a usable backup: {reason}", path.display())]
    NoBackup {
        /// The backup.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is not as the repair left it.
    #[error(
        "{}: nothing was put back: {reason}; either the backup is that of another file, or this one \
         was changed since its repair",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

impl RestoreError {
    /// The class of the problem.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Open(error) => error.kind(),
            Self::NoBackup { .. } => ErrorKind::Corrupt,
            Self::Changed { .. } => ErrorKind::InvalidInput,
        }
    }
}
