//! Reads the block table: where each block lies, and what is wrong with entries.

use std::collections::BTreeMap;
use std::io;

use super::faults::{Fault, FaultKind, Faults};
use crate::error::FormatError;
use crate::format::vhdx::{
    BAT_ENTRY_LEN, BITMAP_BLOCK_LEN, BatEntry, BatGeometry, BatSlot, MAX_DISK_LEN, MIB, PAGE,
    PayloadState,
};
use crate::map::{BlockMap, BlockState};
use crate::storage::Storage;
use crate::units::{
    BlockIndex, FileOffset, FileRange, round_down, u64_from, u64_from_u32, usize_from,
};

/// Bytes of the table that are read at once.
const PIECE: u64 = 512 << 10;

/// How many blocks may keep places for themselves in a disk that is written.
pub(super) const MOST_KEPT: usize = 1 << 22;

/// What the block table says.
#[derive(Debug)]
pub(super) struct Table {
    /// Where the payload blocks lie.
    pub(super) map: BlockMap,
    /// Where the sector-bitmap blocks lie, by chunk.
    pub(super) bitmap_blocks: BTreeMap<u32, FileOffset>,
    /// Places that blocks which are not present keep for themselves, at most [`MOST_KEPT`].
    pub(super) anchors: BTreeMap<BlockIndex, FileOffset>,
    /// Whether there are more.
    pub(super) anchors_cut_off: bool,
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
            // Most of a table is often a hole in the file: entries of blocks that were never there.
            let Some(data) = storage.next_data(range.start.plus(done), range.end())? else {
                break;
            };
            done = round_down(data.start.since(range.start), BAT_ENTRY_LEN).max(done);
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
            map: self.empty_map(),
            bitmap_blocks: BTreeMap::new(),
            anchors: BTreeMap::new(),
            anchors_cut_off: false,
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

    /// No file ever gets as long as what four bytes can tell, unless it is now.
    fn empty_map(&self) -> BlockMap {
        let blocks = self.geometry.blocks();
        let end = FileOffset::new(self.file_len);
        BlockMap::narrow(blocks, MIB, end.plus(MAX_DISK_LEN))
            .unwrap_or_else(|| BlockMap::new(blocks, MIB))
    }

    /// Makes every repair of [`FaultKind::repaired`]. Each is inside a sector and legal without the
    /// others, so that a cut between them does no harm; they are durable with the next sync.
    pub(super) fn repair(&self, storage: &dyn Storage) -> io::Result<()> {
        self.pieces(storage, |first, at, bytes| {
            let mut index = first;
            let mut page_at = at;
            for page in bytes.chunks_mut(usize_from(PAGE)) {
                let mut is_changed = false;
                let (entries, _) = page.as_chunks_mut::<8>();
                for bytes in entries {
                    let entry = BatEntry::from_bytes(*bytes);
                    if !entry.is_empty() {
                        let repaired = self.repaired(index, entry);
                        is_changed |= repaired != entry;
                        *bytes = repaired.to_bytes();
                    }
                    index = index.saturating_add(1);
                }
                if is_changed {
                    storage.write_all_at(page, page_at)?;
                }
                page_at = page_at.plus(u64_from(page.len()));
            }
            Ok(())
        })
    }

    fn repaired(&self, index: u64, entry: BatEntry) -> BatEntry {
        let faults = self.faults_of(self.geometry.slot(index), entry);
        (faults.into_iter().flatten())
            .filter_map(|kind| kind.repaired(entry))
            .next()
            .unwrap_or(entry)
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
                // A place so far beyond the end is beyond the end in any case.
                let told = place.map(|at| at.min(table.map.last_place().unwrap_or(at)));
                table.map.set(block, self.state_of(entry, told));
                if let Some(PayloadState::Undefined | PayloadState::Unmapped) =
                    entry.payload_state()
                    && let Some(at) = place
                    && !faults.contains(&Some(FaultKind::KeptBeyondEnd))
                {
                    match table.anchors.len() < MOST_KEPT {
                        true => drop(table.anchors.insert(block, at)),
                        false => table.anchors_cut_off = true,
                    }
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
            BatSlot::Padding if placed => return [Some(FaultKind::StalePadding), None],
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

    /// What `block` takes in `slot`, if that reaches beyond the end of the file. Of the last block, only
    /// what the disk has counts: QEMU cuts the file there.
    pub(super) fn beyond(&self, block: BlockIndex, slot: FileOffset) -> Option<FileRange> {
        let block_size = self.geometry.block_size;
        let last = self.geometry.blocks().saturating_sub(1);
        let before = u64_from_u32(last).saturating_mul(block_size);
        let len = match block.get() == last {
            true => self.geometry.disk_len.saturating_sub(before),
            false => block_size,
        };
        let end = FileOffset::new(self.file_len);
        (slot.plus(len) > end).then_some(FileRange::new(slot, len))
    }

    /// The blocks of `map` that reach beyond the end of the file.
    fn blocks_beyond_end(
        self,
        map: &BlockMap,
    ) -> impl Iterator<Item = (BlockIndex, FileRange)> + use<'_> {
        let beyond = move |(block, slot)| Some((block, self.beyond(block, slot)?));
        map.present().filter_map(beyond)
    }

    /// Those, and the sector bitmaps that do.
    pub(super) fn beyond_end<'a>(
        &self,
        map: &'a BlockMap,
        bitmap_blocks: &'a BTreeMap<u32, FileOffset>,
    ) -> impl Iterator<Item = FormatError> + use<'a> {
        let end = FileOffset::new(self.file_len);
        let blocks = (self.blocks_beyond_end(map)).map(move |(block, at)| FormatError::BeyondEnd {
            block,
            at,
            end: end.get(),
        });
        let cut = bitmap_blocks
            .iter()
            .filter(move |(_, at)| at.plus(BITMAP_BLOCK_LEN) > end);
        let bitmaps = cut.map(move |(chunk, at)| {
            FormatError::corrupt(
                format!("sector bitmap of chunk {chunk}"),
                format!("the file offset {at}, of a file of {end} bytes"),
                "a place inside the file: the file was cut",
            )
        });
        blocks.chain(bitmaps)
    }
}
