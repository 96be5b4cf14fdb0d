//! Fixed and dynamic VHD.
//!
//! # Order of writes
//! A table entry has four bytes inside one sector, so that it changes atomically; nothing larger
//! does. The table is written entry-wise (neighbouring ones in one write), always *after* what it
//! names, and what it no longer names is touched only after a sync (see [`crate::map::FreeSpace`]).
//!
//! The footer's copy at offset 0 never changes while the disk is in use. The footer at the end is
//! rewritten when the file's length changes, in an order that leaves a valid one at every end that
//! a crash could expose, or the copy (`space.rs`).
//!
//! # Files of other programs
//! All metadata and every byte between it and the first block stay where and as they are. In
//! Xen's files the batmap is emptied before the first block is dropped: an empty one is always
//! right, a bit on a block without a slot is damage.

mod create;
mod layout;
mod recover;
mod space;
#[cfg(test)]
mod tests;
pub(crate) mod verify;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

use super::{Durability, Frame, Geometry, Image, MapEdit, Reserved};
use crate::error::{DiskError, FormatError, OpenProblem};
use crate::format::vhd::{
    BAT_ENTRY_LEN, FOOTER_LEN, Footer, SectorBitmap, bat_entry_at, encode_bat_entry,
};
use crate::format::xen::BatmapHeader;
use crate::format::{DiskType, Format};
use crate::map::{BlockMap, BlockState, FreeSpace, SlotShape};
use crate::storage::Storage;
use crate::units::{
    BlockIndex, FileOffset, FileRange, SECTOR_SIZE, low_u32, u64_from, u64_from_u32, usize_from,
};

pub(crate) use create::create;
pub(crate) use layout::{Layout, LayoutError};

/// Sector bitmaps kept in memory, in bytes, for one image.
const BITMAP_CACHE_BYTES: usize = 1 << 20;

/// An open VHD.
#[derive(Debug)]
pub(crate) struct Vhd {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    footer: Footer,
    read_only: bool,
    punch_holes: bool,
    /// Where the block table lies.
    table: FileOffset,
    map: BlockMap,
    pinned: Vec<FileRange>,
    start: FileOffset,
    space: Mutex<FreeSpace>,
    /// Held across the I/O that changes the file's length or cleans free space.
    length_lock: Mutex<()>,
    file_len: AtomicU64,
    durability: Durability,
    /// Cleared when the host says that it cannot punch holes.
    host_punches: AtomicBool,
    /// Xen's batmap until it was emptied. Held across that write.
    batmap_lock: Mutex<Option<BatmapHeader>>,
    bitmaps: Mutex<LruCache<BlockIndex, Arc<SectorBitmap>>>,
    repaired: Vec<String>,
}

/// How to open a [`Vhd`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct VhdOptions {
    /// Never write to the file.
    pub(crate) read_only: bool,
    /// Whether freed space is given back to the host by punching holes.
    pub(crate) punch_holes: bool,
}

impl Vhd {
    /// Opens the VHD in `storage`. For writing, what an interrupted change left is put right first:
    /// a missing footer or copy, a tail that no block uses.
    ///
    /// # Errors
    /// Where it is no VHD or a damaged one, is not to be written, or the host fails.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        options: VhdOptions,
    ) -> Result<Self, OpenProblem> {
        let mut layout = Layout::read(&*storage).map_err(LayoutError::into_problem)?;
        let mut repaired = Vec::new();
        if !options.read_only {
            if let Some(error) = layout.not_writable.take() {
                return Err(OpenProblem::NotWritable(error));
            }
            repaired =
                recover::recover(&*storage, &mut layout).map_err(|source| OpenProblem::Io {
                    action: "repair the file",
                    source,
                })?;
        }
        Ok(Self {
            repaired,
            ..Self::from_layout(storage, layout, options)
        })
    }

    /// What was put right when it was opened.
    pub(crate) fn repaired(&self) -> &[String] {
        &self.repaired
    }

    fn from_layout(storage: Arc<dyn Storage>, layout: Layout, options: VhdOptions) -> Self {
        let footer = layout.footer;
        let disk_len = footer.disk_len();
        let fixed_slot = SlotShape {
            len: disk_len,
            header_len: 0,
            align: SECTOR_SIZE,
            strict: true,
        };
        let (block_size, slot, table, map, metadata, start, batmap) = match layout.dynamic {
            None => (
                disk_len,
                fixed_slot,
                FileOffset::default(),
                BlockMap::new(0),
                Vec::new(),
                layout.tail.at,
                None,
            ),
            Some(dynamic) => (
                u64_from_u32(dynamic.header.block_size()),
                dynamic.slot,
                dynamic.header.table_offset(),
                dynamic.map,
                dynamic.metadata,
                dynamic.start,
                dynamic.batmap,
            ),
        };
        let pinned: Vec<FileRange> = metadata
            .into_iter()
            .map(|(range, _)| range)
            .filter(|range| range.end() > start)
            .collect();
        let mut used: Vec<FileRange> = map
            .present()
            .map(|(_, at)| FileRange::new(at, slot.len))
            .collect();
        used.extend(pinned.iter().copied());
        used.sort_unstable();
        let space = FreeSpace::new(slot, start, layout.tail.at, used);
        let bitmap_bytes = usize_from(slot.header_len);
        let cached = BITMAP_CACHE_BYTES
            .checked_div(bitmap_bytes)
            .and_then(NonZeroUsize::new);
        let cached = cached.unwrap_or(NonZeroUsize::MIN);
        Self {
            geometry: Geometry {
                format: Format::Vhd,
                disk_type: footer.disk_type(),
                disk_len,
                block_size,
                slot,
            },
            footer,
            read_only: options.read_only,
            punch_holes: options.punch_holes,
            table,
            map,
            pinned,
            start,
            space: Mutex::new(space),
            length_lock: Mutex::new(()),
            file_len: AtomicU64::new(layout.file_len),
            durability: Durability::new(),
            host_punches: AtomicBool::new(true),
            batmap_lock: Mutex::new(batmap.map(|(header, _)| header)),
            bitmaps: Mutex::new(LruCache::new(cached)),
            repaired: Vec::new(),
            storage,
        }
    }

    /// Writes table entries for `edits`, neighbouring ones together. They are sorted by block.
    fn write_table(&self, edits: &[MapEdit]) -> std::io::Result<()> {
        let mut at = 0;
        let mut buf = Vec::with_capacity(usize_from(BAT_ENTRY_LEN));
        while let Some(first) = edits.get(at) {
            buf.clear();
            let mut next = first.block().get();
            while let Some(edit) = edits.get(at).filter(|edit| edit.block().get() == next) {
                let slot = match *edit {
                    MapEdit::Place { slot, .. } | MapEdit::Move { to: slot, .. } => Some(slot),
                    MapEdit::Drop { .. } => None,
                };
                buf.extend_from_slice(&encode_bat_entry(slot));
                next = next.saturating_add(1);
                at = at.saturating_add(1);
            }
            self.storage
                .write_all_at(&buf, bat_entry_at(self.table, first.block()))?;
        }
        Ok(())
    }

    /// Empties Xen's batmap, once, durably.
    fn empty_batmap(&self) -> Result<(), DiskError> {
        let mut batmap = self.batmap_lock.lock();
        let Some(header) = &*batmap else {
            return Ok(());
        };
        let write = || {
            self.storage.write_zeroes(header.map_range())?;
            self.storage
                .write_all_at(&header.emptied(), header.range().start)
        };
        write().map_err(|error| self.durability.poison("empty the batmap", error))?;
        self.durability.note_write();
        self.sync()?;
        *batmap = None;
        Ok(())
    }
}

impl LayoutError {
    pub(crate) fn into_problem(self) -> OpenProblem {
        match self {
            Self::Io(source) => OpenProblem::Io {
                action: "read the file",
                source,
            },
            Self::Format(error) => OpenProblem::Format(error),
        }
    }
}

impl Image for Vhd {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn creator(&self) -> String {
        self.footer.creator_text()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn map(&self) -> &BlockMap {
        &self.map
    }

    fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    fn sector_bitmap(&self, block: BlockIndex) -> Result<Arc<SectorBitmap>, DiskError> {
        if let Some(bitmap) = self.bitmaps.lock().get(&block) {
            return Ok(Arc::clone(bitmap));
        }
        let block_size = low_u32(self.geometry.block_size);
        let BlockState::Present { slot, .. } = self.map.get(block) else {
            return Ok(Arc::new(SectorBitmap::new(Box::new([]), block_size)));
        };
        let mut bytes = vec![0; usize_from(self.geometry.slot.header_len)].into_boxed_slice();
        self.storage
            .read_exact_at(&mut bytes, slot)
            .map_err(|error| DiskError::io("read a sector bitmap", error))?;
        let bitmap = Arc::new(SectorBitmap::new(bytes, block_size));
        if bitmap.is_full() {
            self.map
                .set(block, BlockState::Present { slot, whole: true });
        } else {
            self.bitmaps.lock().put(block, Arc::clone(&bitmap));
        }
        Ok(bitmap)
    }

    fn make_whole(&self, block: BlockIndex) -> Result<(), DiskError> {
        self.check_writable()?;
        let bitmap = self.sector_bitmap(block)?;
        let BlockState::Present { slot, whole: false } = self.map.get(block) else {
            return Ok(());
        };
        // Sectors with a clear bit must be zeros in the file (VHD 1.0); other readers rely on
        // that. Where they are not, zeros must be durable before a set bit uncovers them.
        if self.zero_unwritten(slot, &bitmap)? {
            self.sync()?;
        }
        self.prepare(slot)?;
        self.bitmaps.lock().pop(&block);
        self.map
            .set(block, BlockState::Present { slot, whole: true });
        Ok(())
    }

    fn reserve(&self) -> Result<FileOffset, DiskError> {
        self.check_writable()?;
        loop {
            if let Some(slot) = self.space.lock().take_clean() {
                return Ok(slot);
            }
            self.replenish()?;
        }
    }

    fn reserve_at(&self, slot: FileOffset) -> Option<Reserved> {
        let mut space = self.space.lock();
        let range = self.geometry.slot_range(slot);
        let clean = space.is_clean(range);
        space.take(range).then_some(Reserved { clean })
    }

    fn give_back(&self, slot: FileOffset) {
        self.space.lock().give_back(self.geometry.slot_range(slot));
    }

    fn prepare(&self, slot: FileOffset) -> Result<(), DiskError> {
        // All ones, for every sector will be written or is zero; QEMU does the same.
        const ONES: [u8; 512] = [0xff; 512];
        let len = usize_from(self.geometry.slot.header_len);
        let result = match ONES.get(..len) {
            Some(ones) => self.storage.write_all_at(ones, slot),
            None => self.storage.write_all_at(&vec![0xff; len], slot),
        };
        result.map_err(|error| DiskError::io("write a sector bitmap", error))?;
        self.durability.note_write();
        Ok(())
    }

    fn commit(&self, edits: &[MapEdit]) -> Result<(), DiskError> {
        self.check_writable()?;
        if edits
            .iter()
            .any(|edit| matches!(edit, MapEdit::Drop { .. }))
        {
            self.empty_batmap()?;
        }
        let mut sorted;
        let edits = if edits.is_sorted_by_key(MapEdit::block) {
            edits
        } else {
            sorted = edits.to_vec();
            sorted.sort_unstable_by_key(MapEdit::block);
            &sorted
        };
        self.write_table(edits)
            .map_err(|error| self.durability.poison("write the block table", error))?;
        for edit in edits {
            let block = edit.block();
            let old = self.map.get(block);
            let new = match (*edit, old) {
                (MapEdit::Place { slot, .. }, BlockState::NotPresent) => {
                    BlockState::Present { slot, whole: true }
                }
                (MapEdit::Move { to, .. }, BlockState::Present { whole, .. }) => {
                    BlockState::Present { slot: to, whole }
                }
                (MapEdit::Drop { .. }, BlockState::Present { .. }) => {
                    self.bitmaps.lock().pop(&block);
                    BlockState::NotPresent
                }
                (edit, old) => panic!("{edit:?} on a block that is {old:?}"),
            };
            self.map.set(block, new);
            if let Some(slot) = old.slot() {
                self.space.lock().release(self.geometry.slot_range(slot));
            }
        }
        self.durability.note_write();
        Ok(())
    }

    fn note_payload(&self) {
        self.durability.note_write();
    }

    fn sync(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.durability.sync(
            &*self.storage,
            || self.space.lock().take_awaiting(),
            |awaited| {
                let mut space = self.space.lock();
                for range in awaited {
                    space.give_back(range);
                }
            },
        )
    }

    fn shrink(&self) -> Result<(), DiskError> {
        self.cut_tail()
    }

    fn punch_free(&self) -> Result<bool, DiskError> {
        self.punch_some()
    }

    fn make_room(&self) -> Result<bool, DiskError> {
        self.free_for_use()
    }

    fn punchable_bytes(&self) -> u64 {
        self.punchable()
    }

    fn free_runs(&self) -> Vec<FileRange> {
        self.space.lock().runs().collect()
    }

    fn frame(&self) -> Frame {
        Frame {
            start: self.start,
            pinned: self.pinned.clone(),
            trailer_len: FOOTER_LEN,
        }
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.durability.check()
    }
}

impl Vhd {
    /// Makes sure that the sectors that `bitmap` does not name are zeros in the slot; says whether
    /// any had to be written.
    fn zero_unwritten(&self, slot: FileOffset, bitmap: &SectorBitmap) -> Result<bool, DiskError> {
        const PIECE_SECTORS: u64 = 1 << 11;
        let sectors = self.geometry.block_size / SECTOR_SIZE;
        let data = self.geometry.data_at(slot);
        let mut wrote = false;
        let mut buf = Vec::new();
        let mut sector = 0;
        while sector < sectors {
            let end = bitmap.run_end(sector, sectors.min(sector.saturating_add(PIECE_SECTORS)));
            if !bitmap.is_written(sector) {
                let len = (end.saturating_sub(sector)).saturating_mul(SECTOR_SIZE);
                let at = data.plus(sector.saturating_mul(SECTOR_SIZE));
                buf.resize(usize_from(len), 0);
                self.storage
                    .read_exact_at(&mut buf, at)
                    .map_err(|error| DiskError::io("read a block", error))?;
                if buf.iter().any(|byte| *byte != 0) {
                    log::warn!(
                        "{} bytes at {at} are not zero though never written",
                        u64_from(buf.len())
                    );
                    self.storage
                        .write_zeroes(FileRange::new(at, len))
                        .map_err(|error| DiskError::io("zero unwritten sectors", error))?;
                    self.durability.note_write();
                    wrote = true;
                }
            }
            sector = end;
        }
        Ok(wrote)
    }
}

/// What can be told of a VHD without opening it.
pub(crate) fn probe(
    storage: &dyn Storage,
) -> Result<(u64, DiskType, Option<FormatError>), LayoutError> {
    let layout = Layout::read(storage)?;
    Ok((
        layout.footer.disk_len(),
        layout.footer.disk_type(),
        layout.not_writable,
    ))
}
