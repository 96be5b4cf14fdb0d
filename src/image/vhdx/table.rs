//! Reads the block table: where each block lies, and what is wrong with entries.

use std::collections::BTreeMap;
use std::io;

use crate::error::FormatError;
use crate::format::vhdx::{
    BAT_ENTRY_LEN, BITMAP_BLOCK_LEN, BatEntry, BatGeometry, BatSlot, PayloadState,
};
use crate::map::{BlockMap, BlockState};
use crate::storage::Storage;
use crate::units::{BlockIndex, FileOffset, FileRange, u64_from, u64_from_u32, usize_from};

/// Bytes of the table that are read at once.
const PIECE: u64 = 512 << 10;

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
    index: u64,
    slot: BatSlot,
    entry: BatEntry,
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

    fn add(&mut self, fault: Fault) {
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

    /// For each kind the first ones, and the number of further ones.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (FaultKind, &[Fault], u64)> {
        (self.kinds.iter()).map(|(kind, (kept, count))| {
            (
                *kind,
                kept.as_slice(),
                count.saturating_sub(u64_from(kept.len())),
            )
        })
    }
}

/// What the block table says.
#[derive(Debug)]
pub(super) struct Table {
    /// Where the payload blocks lie.
    pub(super) map: BlockMap,
    /// Where the sector-bitmap blocks lie, by chunk.
    pub(super) bitmap_blocks: BTreeMap<u32, FileOffset>,
    /// Places that blocks which are not present keep for themselves.
    pub(super) anchors: BTreeMap<BlockIndex, FileOffset>,
    /// What is wrong.
    pub(super) faults: Faults,
}

/// The table's place, form and surroundings.
#[derive(Clone, Copy, Debug)]
pub(super) struct TablePlace {
    /// The region.
    pub(super) bat: FileRange,
    /// The form.
    pub(super) geometry: BatGeometry,
    /// The file's length.
    pub(super) file_len: u64,
}

impl TablePlace {
    /// The part of the region that lies in the file; entries that the disk needs are in it.
    fn readable(&self) -> FileRange {
        let end = self.bat.end().min(FileOffset::new(self.file_len));
        FileRange::between(self.bat.start, end)
    }

    /// Calls `visit` with a piece of the table after the other: the number of its first entry, its
    /// place in the file, its bytes.
    pub(super) fn pieces(
        &self,
        storage: &dyn Storage,
        mut visit: impl FnMut(u64, FileOffset, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let range = self.readable();
        let mut buf = Vec::new();
        let mut done = 0_u64;
        while done < range.len {
            buf.resize(usize_from(PIECE.min(range.len.saturating_sub(done))), 0);
            let at = range.start.plus(done);
            storage.read_exact_at(&mut buf, at)?;
            visit(done / BAT_ENTRY_LEN, at, &mut buf)?;
            done = done.saturating_add(u64_from(buf.len()));
        }
        Ok(())
    }

    /// Reads the table.
    pub(super) fn read(&self, storage: &dyn Storage) -> io::Result<Table> {
        let mut table = Table {
            map: BlockMap::new(self.geometry.blocks()),
            bitmap_blocks: BTreeMap::new(),
            anchors: BTreeMap::new(),
            faults: Faults::default(),
        };
        self.pieces(storage, |first, _, bytes| {
            let (entries, _) = bytes.as_chunks::<8>();
            for (index, entry) in (first..).zip(entries) {
                let entry = BatEntry::from_bytes(*entry);
                if !entry.is_empty() {
                    self.note(&mut table, index, entry);
                }
            }
            Ok(())
        })?;
        if self.geometry.differencing {
            self.check_partial(&mut table);
        }
        Ok(table)
    }

    fn note(&self, table: &mut Table, index: u64, entry: BatEntry) {
        let slot = self.geometry.slot(index);
        let faults = self.faults_of(slot, entry);
        for kind in faults.into_iter().flatten() {
            table.faults.add(Fault {
                kind,
                index,
                slot,
                entry,
            });
        }
        let place = (entry.offset().get() != 0).then(|| entry.offset());
        match slot {
            BatSlot::Padding => {}
            BatSlot::Bitmap(chunk) => {
                if self.geometry.differencing
                    && entry.is_bitmap_present()
                    && let Some(at) = place
                {
                    table.bitmap_blocks.insert(chunk, at);
                }
            }
            BatSlot::Payload(block) => {
                table.map.set(block, self.state_of(entry, place));
                if let Some(PayloadState::Undefined | PayloadState::Unmapped) =
                    entry.payload_state()
                    && let Some(at) = place
                    && !faults.contains(&Some(FaultKind::KeptBeyondEnd))
                {
                    table.anchors.insert(block, at);
                }
            }
        }
    }

    fn state_of(&self, entry: BatEntry, place: Option<FileOffset>) -> BlockState {
        let differencing = self.geometry.differencing;
        match (entry.payload_state(), place) {
            (Some(PayloadState::FullyPresent), Some(slot)) => {
                BlockState::Present { slot, whole: true }
            }
            (Some(PayloadState::PartiallyPresent), Some(slot)) => BlockState::Present {
                slot,
                whole: !differencing,
            },
            (Some(PayloadState::NotPresent), _) => BlockState::NotPresent,
            _ if differencing => BlockState::Zero,
            _ => BlockState::NotPresent,
        }
    }

    /// The faults that `entry` in `slot` has of itself.
    pub(super) fn faults_of(&self, slot: BatSlot, entry: BatEntry) -> [Option<FaultKind>; 2] {
        let placed = entry.offset().get() != 0;
        let reserved = (entry.reserved() != 0).then_some(FaultKind::ReservedBits);
        let own = match slot {
            BatSlot::Padding if placed => Some(FaultKind::StalePadding),
            BatSlot::Padding => return [Some(FaultKind::StalePaddingState), None],
            BatSlot::Bitmap(_) if !self.geometry.differencing => {
                let kind = if placed {
                    FaultKind::StaleBitmap
                } else {
                    FaultKind::StaleBitmapState
                };
                return [Some(kind), None];
            }
            BatSlot::Bitmap(_) => match entry.state_bits() {
                6 if placed => None,
                7 if placed => Some(FaultKind::BitmapPartial),
                0 if !placed => None,
                _ => Some(FaultKind::BitmapState),
            },
            BatSlot::Payload(_) => self.payload_fault(entry, placed),
        };
        [own, reserved]
    }

    fn payload_fault(&self, entry: BatEntry, placed: bool) -> Option<FaultKind> {
        match entry.payload_state() {
            None if entry.state_bits() == 5 => Some(FaultKind::OldUnmapped),
            None => Some(FaultKind::ReservedState),
            Some(PayloadState::NotPresent | PayloadState::Zero) => {
                placed.then_some(FaultKind::UnusedPlace)
            }
            Some(PayloadState::Undefined | PayloadState::Unmapped) => {
                let end = entry.offset().plus(self.geometry.block_size);
                (placed && end.get() > self.file_len).then_some(FaultKind::KeptBeyondEnd)
            }
            Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) if !placed => {
                Some(FaultKind::NoPlace)
            }
            Some(PayloadState::PartiallyPresent) if !self.geometry.differencing => {
                Some(FaultKind::NoParent)
            }
            Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) => None,
        }
    }

    /// Finds blocks that need a sector bitmap that is not there.
    fn check_partial(&self, table: &mut Table) {
        let Table {
            map,
            bitmap_blocks,
            faults,
            ..
        } = table;
        for block in map.blocks() {
            if let BlockState::Present { slot, whole: false } = map.get(block)
                && !bitmap_blocks.contains_key(&self.geometry.chunk_of(block))
            {
                faults.add(Fault {
                    kind: FaultKind::NoBitmap,
                    index: self.geometry.payload_index(block),
                    slot: BatSlot::Payload(block),
                    entry: BatEntry::payload(PayloadState::PartiallyPresent, slot),
                });
            }
        }
    }

    /// The blocks and sector bitmaps of `table` that reach beyond the end of the file. Of the last
    /// block, only what the disk has counts: QEMU cuts the file there.
    pub(super) fn beyond_end<'a>(
        &self,
        table: &'a Table,
    ) -> impl Iterator<Item = FormatError> + use<'a> {
        let place = *self;
        let end = FileOffset::new(self.file_len);
        let last = self.geometry.blocks().saturating_sub(1);
        let before = u64_from_u32(last).saturating_mul(self.geometry.block_size);
        let of_last = self.geometry.disk_len.saturating_sub(before);
        let blocks = table.map.present().filter_map(move |(block, slot)| {
            let len = if block.get() == last {
                of_last
            } else {
                place.geometry.block_size
            };
            (slot.plus(len) > end).then_some(FormatError::BeyondEnd {
                block,
                at: FileRange::new(slot, len),
                end: end.get(),
            })
        });
        let bitmaps = table.bitmap_blocks.iter().filter_map(move |(chunk, at)| {
            (at.plus(BITMAP_BLOCK_LEN) > end).then(|| {
                FormatError::corrupt(
                    format!("sector bitmap of chunk {chunk}"),
                    format!("the file offset {at}, of a file of {end} bytes"),
                    "a place inside the file: the file was cut",
                )
            })
        });
        blocks.chain(bitmaps)
    }
}
