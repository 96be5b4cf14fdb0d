//! What the simulated host is asked to do, and how it is made to fail.

use std::io;

use crate::units::{FileOffset, FileRange};

/// The kinds of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// `read_exact_at`.
    Read,
    /// `write_all_at`.
    Write,
    /// `set_len`.
    SetLen,
    /// `punch_hole`.
    PunchHole,
    /// `write_zeroes`.
    WriteZeroes,
    /// `copy_within`.
    CopyWithin,
    /// `write_back`.
    WriteBack,
    /// `sync`.
    Sync,
    /// `len`, `next_data` and `allocated_bytes`.
    Query,
}

impl OpKind {
    /// Whether it changes what is on the host: anything but reads and queries. A power cut between
    /// two such operations is the same wherever it happens.
    pub fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Query | Self::WriteBack)
    }
}

/// An operation that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// What is done.
    pub kind: OpKind,
    /// The bytes that are read, written or zeroed; the source of a copy; the file as it is to be for
    /// `set_len`; empty for a sync.
    pub range: FileRange,
    /// The target of a copy.
    pub target: Option<FileOffset>,
}

/// What a failing operation does nevertheless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// A write, copy, zeroing or punch does that many bytes of its range from the start; another
    /// operation nothing.
    Prefix(u64),
    /// All of it, and the error is a lie.
    Everything,
    /// A sync makes what [`super::Choice::Seeded`] chooses with this seed durable and forgets the
    /// rest: reads still see it, but no later sync writes it, as Linux does once it has reported the
    /// error. Another operation does nothing.
    Scatter(u64),
}

/// A failure to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind of operation that fails; `None` counts all of them, reads and queries too.
    pub on: Option<OpKind>,
    /// How many such operations still succeed.
    pub after: u64,
    /// Whether all later ones fail too.
    pub forever: bool,
    /// The error.
    pub error: io::ErrorKind,
    /// What is done nevertheless.
    pub effect: Effect,
}

impl Fault {
    /// The next operation of the kind fails once, with an error of the disk, and does nothing.
    pub fn next(on: OpKind) -> Self {
        let (after, forever) = (0, false);
        Self {
            on: Some(on),
            after,
            forever,
            error: io::ErrorKind::Other,
            effect: Effect::Nothing,
        }
    }
}

/// How often what was done, the failed ones not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads.
    pub reads: u64,
    /// Bytes that they read.
    pub bytes_read: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes that they wrote.
    pub bytes_written: u64,
    /// Changes of the length.
    pub set_lens: u64,
    /// Punched holes.
    pub punches: u64,
    /// Zeroed ranges.
    pub zeroings: u64,
    /// Copies.
    pub copies: u64,
    /// Bytes that they copied.
    pub bytes_copied: u64,
    /// Syncs.
    pub syncs: u64,
}

impl Counters {
    pub(super) fn count(&mut self, op: &Op) {
        let len = op.range.len;
        match op.kind {
            OpKind::Read => {
                self.reads += 1;
                self.bytes_read += len;
            }
            OpKind::Write => {
                self.writes += 1;
                self.bytes_written += len;
            }
            OpKind::CopyWithin => {
                self.copies += 1;
                self.bytes_copied += len;
            }
            OpKind::SetLen => self.set_lens += 1,
            OpKind::PunchHole => self.punches += 1,
            OpKind::WriteZeroes => self.zeroings += 1,
            OpKind::Sync => self.syncs += 1,
            OpKind::WriteBack | OpKind::Query => {}
        }
    }
}

/// The error of every operation after a power cut.
#[derive(Debug, thiserror::Error)]
#[error("simulated power cut")]
pub(super) struct PowerCut;

/// Whether `error` is what [`super::SimStorage`] answers after a power cut.
pub fn is_power_cut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<PowerCut>())
}

/// What is to become of an operation.
#[derive(Debug)]
pub(super) enum Verdict {
    Go,
    Fail(io::Error, Effect),
}

/// The failures to come.
#[derive(Debug, Default)]
pub(super) struct Faults {
    armed: Vec<Fault>,
    /// How many more changing operations there is power for.
    power: Option<u64>,
}

impl Faults {
    pub(super) fn arm(&mut self, fault: Fault) {
        self.armed.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.armed.clear();
    }

    pub(super) fn cut_after(&mut self, changing_ops: u64) {
        self.power = Some(changing_ops);
    }

    pub(super) fn is_cut(&self) -> bool {
        self.power == Some(0)
    }

    pub(super) fn judge(&mut self, kind: OpKind) -> Verdict {
        if self.is_cut() {
            return Verdict::Fail(io::Error::other(PowerCut), Effect::Nothing);
        }
        let mut verdict = Verdict::Go;
        self.armed.retain_mut(|fault| {
            if fault.on.is_some_and(|on| on != kind) {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            let error = io::Error::new(fault.error, "simulated failure");
            verdict = Verdict::Fail(error, fault.effect);
            fault.forever
        });
        if let (true, Some(power)) = (kind.changes(), &mut self.power) {
            *power -= 1;
        }
        verdict
    }
}
