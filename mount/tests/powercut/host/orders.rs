//! What a test tells the process that serves a faulty host, and what it is answered: a line of JSON each.

use std::io;

use serde::{Deserialize, Serialize};
use vhdfs::storage::sim::{Choice, Effect, Fault, OpKind};

/// What is to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Only answer.
    Report,
    /// Cut the power: from now on everything fails.
    Cut,
    /// Cut it before the operation behind that many that change something.
    CutAfter(u64),
    /// Cut it before the sync behind that many: all that a cut since the last one could lose is there to
    /// be lost.
    CutAtSync(u64),
    /// Power again: serve what a cut now, or the one that was, leaves. Nothing fails any more.
    Restart(Kept),
    /// An operation on `file` will fail.
    Fail { file: String, failure: Failure },
    /// From now on one in that many of these operations on `file`, chosen from `seed`, fails.
    FailSometimes {
        file: String,
        on: Vec<Operation>,
        one_in: u64,
        seed: u64,
    },
    /// The most bytes that `file` may take.
    Limit { file: String, bytes: Option<u64> },
    /// Each change takes that long.
    Slow { microseconds: u64 },
    /// From now on the kernel may cache what it reads and writes in files that are opened: it shows what
    /// a failed sync has lost.
    Cache,
    /// Answer each sync at once, and do nothing.
    Lie,
    /// No failures any more, no limits, and no delays. Power and lies stay.
    Recover,
}

/// What a power cut leaves of what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kept {
    Nothing,
    All,
    /// What `seed` chooses, in pieces of `atomic` bytes: 512 or 4096.
    Some {
        seed: u64,
        atomic: u64,
    },
}

/// An operation on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Operation {
    Read,
    Write,
    SetLen,
    PunchHole,
    WriteZeroes,
    Copy,
    Sync,
}

/// A failure to come: see [`Fault`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// `None`: any operation.
    pub(crate) on: Option<Operation>,
    /// How many succeed before.
    pub(crate) after: u64,
    pub(crate) forever: bool,
    /// ENOSPC instead of EIO.
    pub(crate) full: bool,
}

/// Every answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// The power is cut.
    pub(crate) is_off: bool,
    /// Operations since the start that changed something, and how many of them were syncs.
    pub(crate) changes: u64,
    pub(crate) syncs: u64,
    /// Changes that a cut now could lose.
    pub(crate) unsynced: u64,
}

impl Kept {
    /// For one of several files.
    pub(crate) fn choice(self, file: u64) -> Choice {
        match self {
            Self::Nothing => Choice::AllLost,
            Self::All => Choice::AllKept,
            Self::Some { seed, atomic } => Choice::Seeded {
                seed: seed.wrapping_add(file << 32),
                atomic,
            },
        }
    }
}

impl From<Operation> for OpKind {
    fn from(operation: Operation) -> Self {
        match operation {
            Operation::Read => Self::Read,
            Operation::Write => Self::Write,
            Operation::SetLen => Self::SetLen,
            Operation::PunchHole => Self::PunchHole,
            Operation::WriteZeroes => Self::WriteZeroes,
            Operation::Copy => Self::CopyWithin,
            Operation::Sync => Self::Sync,
        }
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self {
            on: failure.on.map(OpKind::from),
            after: failure.after,
            forever: failure.forever,
            error: match failure.full {
                true => io::ErrorKind::StorageFull,
                false => io::ErrorKind::Other,
            },
            effect: Effect::Nothing,
        }
    }
}
