//! What can be wrong with an entry of the block table, and what that means.

use std::collections::BTreeMap;

use crate::error::FormatError;
use crate::format::vhdx::{BatEntry, BatSlot};

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FaultKind {
    /// State 4.
    ReservedState,
    /// State 6 or 7 without a place.
    NoPlace,
    /// State 7 of a block whose chunk has no sector bitmap.
    NoBitmap,
    /// State 5: before version 1.0 of the format, what 3 is now. QEMU reads zeros.
    OldUnmapped,
    /// State 7 without a parent. Read as 6.
    NoParent,
    /// Reserved bits are set.
    ReservedBits,
    /// State 0 or 2 with a place.
    UnusedPlace,
    /// State 1 or 3 keeps a place beyond the end of the file.
    KeptBeyondEnd,
    /// The sector bitmap of a chunk in a state that is not for those, or present without a place.
    BitmapState,
    /// The same in state 7, which OpenVMM takes as 6.
    BitmapPartial,
    /// A sector bitmap of a disk without a parent, with a place.
    StaleBitmap,
    /// The same without a place: QEMU before 8.0 left such.
    StaleBitmapState,
    /// A place in an entry that the disk has no use for.
    StalePadding,
    /// The same without a place.
    StalePaddingState,
}

/// What a fault means for the use of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Severity {
    /// Something cannot be read.
    Unreadable,
    /// All can be read, but a change could do harm.
    NotWritable,
    /// An oddity.
    Harmless,
}

impl FaultKind {
    pub(super) fn severity(self) -> Severity {
        match self {
            Self::ReservedState | Self::NoPlace | Self::NoBitmap => Severity::Unreadable,
            Self::OldUnmapped
            | Self::NoParent
            | Self::ReservedBits
            | Self::UnusedPlace
            | Self::KeptBeyondEnd
            | Self::BitmapState
            | Self::StaleBitmap
            | Self::StalePadding => Severity::NotWritable,
            Self::BitmapPartial | Self::StaleBitmapState | Self::StalePaddingState => {
                Severity::Harmless
            }
        }
    }

    /// What `entry`, which has this fault, is to become, where that is sure to lose nothing.
    pub(super) fn repaired(self, entry: BatEntry) -> Option<BatEntry> {
        match self {
            // These blocks read as zeros, or as the parent has them, with or without a place.
            Self::UnusedPlace | Self::KeptBeyondEnd => Some(entry.without_place()),
            // Nobody reads these.
            Self::StaleBitmap
            | Self::StaleBitmapState
            | Self::StalePadding
            | Self::StalePaddingState => Some(BatEntry::default()),
            _ => None,
        }
    }
}

/// An entry with a fault.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    pub(super) index: u64,
    pub(super) slot: BatSlot,
    pub(super) entry: BatEntry,
}

impl Fault {
    pub(super) fn error(&self) -> FormatError {
        let whose = match self.slot {
            BatSlot::Payload(block) => format!("block {block}"),
            BatSlot::Bitmap(chunk) => format!("sector bitmap of chunk {chunk}"),
            BatSlot::Padding => "behind the last block".to_owned(),
        };
        let state = self.entry.state_bits();
        let place = self.entry.offset();
        let placed = format!("state {state} with the file offset {place}");
        let (found, expected) = match self.kind {
            FaultKind::ReservedState | FaultKind::OldUnmapped => {
                (format!("the reserved state {state}"), "0 to 3, 6 or 7")
            }
            FaultKind::NoPlace => (
                format!("state {state}, present, with the file offset 0"),
                "where the block lies",
            ),
            FaultKind::NoBitmap => (
                "state 7, partially present, in a chunk without a sector bitmap".to_owned(),
                "a sector bitmap",
            ),
            FaultKind::NoParent => (
                "state 7, partially present, of a disk without a parent".to_owned(),
                "state 6",
            ),
            FaultKind::ReservedBits => (
                format!("reserved bits {:#x}", self.entry.reserved()),
                "0: they belong to a feature that this version does not know, or are damage",
            ),
            FaultKind::UnusedPlace => (placed, "0: Hyper-V does not read such a file"),
            FaultKind::KeptBeyondEnd => (placed, "one inside the file"),
            FaultKind::BitmapState | FaultKind::BitmapPartial => {
                (placed, "state 0 without, or state 6 with a place")
            }
            FaultKind::StaleBitmap | FaultKind::StaleBitmapState => {
                (placed, "0, since the disk has no parent")
            }
            FaultKind::StalePadding | FaultKind::StalePaddingState => {
                (placed, "0, since the disk has no such block")
            }
        };
        let at = format!("block table entry {} ({whose})", self.index);
        FormatError::corrupt(at, found, expected)
    }
}

/// The faults of a table: the first of each kind, and how many there are.
#[derive(Debug, Default)]
pub(super) struct Faults {
    kinds: BTreeMap<FaultKind, (Vec<Fault>, u64)>,
}

impl Faults {
    /// Faults of one kind that are kept; the rest is counted.
    const KEPT: usize = 20;

    pub(super) fn add(&mut self, fault: Fault) {
        let (kept, count) = self.kinds.entry(fault.kind).or_default();
        *count = count.saturating_add(1);
        if kept.len() < Self::KEPT {
            kept.push(fault);
        }
    }

    /// The first one of the given severity.
    pub(super) fn first(&self, severity: Severity) -> Option<FormatError> {
        (self.kinds.iter())
            .find(|(kind, _)| kind.severity() == severity)
            .and_then(|(_, (kept, _))| Some(kept.first()?.error()))
    }

    /// For each kind the first ones, and how many there are.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (FaultKind, &[Fault], u64)> {
        (self.kinds.iter()).map(|(kind, (kept, count))| (*kind, kept.as_slice(), *count))
    }
}
