//! VHD: fixed, dynamic and differencing.
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
//! # Sectors of a child
//! In a differencing disk a clear bit of a block's sector bitmap means that the parent's sector
//! shows. A bit is set in the file only once the sector's bytes are durable, so that a power cut
//! shows the parent's sector or the child's, never what happened to lie in the slot. Of a bitmap of
//! several sectors any subset may arrive: each bit stands for itself.
//!
//! # Files of other programs
//! All metadata and every byte between it and the first block stay where and as they are. In
//! Xen's files the batmap is emptied before the first block is dropped: an empty one is always
//! right, a bit on a block without a slot is damage.

mod create;
mod layout;
mod parent;
mod recover;
mod relink;
mod space;
pub(crate) mod stray;
#[cfg(test)]
mod tests;
mod unflushed;
pub(crate) mod verify;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::{
    Cut, Durability, Fits, Frame, Geometry, Image, ImageOptions, MapEdit, Opened, Probe, Reads,
    Reserved, Space,
};
use crate::error::{DiskError, OpenProblem};
use crate::format::Format;
use crate::format::parent::{Identity, ParentLink};
use crate::format::sector_bitmap::{BitOrder, SectorBitmap};
use crate::format::vhd::{BAT_ENTRY_LEN, FOOTER_LEN, Footer, bat_entry_at, encode_bat_entry};
use crate::format::xen::BatmapHeader;
use crate::map::{BlockMap, BlockState, Charge, FreeSpace, SlotShape};
use crate::storage::Storage;
use crate::units::{
    BlockIndex, FileOffset, FileRange, SECTOR_SIZE, u64_from, u64_from_u32, usize_from,
};

pub(crate) use create::{create, create_differencing};
pub(crate) use layout::{Layout, ends_with_footer};
pub(crate) use parent::{identify, probe_large};
pub(crate) use relink::{relink, renew_identity};

/// Sector bitmaps kept in memory, in bytes, for one image.
const BITMAP_CACHE_BYTES: usize = 1 << 20;

/// An open VHD.
#[derive(Debug)]
pub(crate) struct Vhd {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    footer: Mutex<Footer>,
    parent: Option<ParentLink>,
    read_only: bool,
    /// Where the block table lies.
    table: FileOffset,
    map: BlockMap,
    pinned: Vec<FileRange>,
    start: FileOffset,
    space: Space,
    durability: Durability,
    /// Xen's batmap until it was emptied. Held across that write.
    batmap_lock: Mutex<Option<BatmapHeader>>,
    bitmaps: Mutex<LruCache<BlockIndex, Arc<SectorBitmap>>>,
    /// What all this takes.
    _memory: Option<Charge>,
}

/// Opens the VHD in `storage`. For writing, what an interrupted change left is put right first: a
/// missing footer or copy, a tail that no block uses.
///
/// # Errors
/// Where it is no VHD or a damaged one, is not to be written, or the host fails.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    options: ImageOptions,
    fits: Fits<'_>,
) -> Result<Opened, OpenProblem> {
    let (layout, repaired) = if options.read_only {
        let layout = Layout::read(&*storage)?;
        fits(layout.parent())?;
        (layout, Vec::new())
    } else {
        recover::read_recovered(&*storage, fits)?
    };
    Ok(Opened {
        image: Box::new(Vhd::from_layout(storage, layout, options)),
        repaired,
    })
}

impl Vhd {
    fn from_layout(storage: Arc<dyn Storage>, layout: Layout, options: ImageOptions) -> Self {
        let footer = layout.footer;
        let disk_len = footer.disk_len();
        let fixed_slot = SlotShape {
            len: disk_len,
            header_len: 0,
            align: SECTOR_SIZE,
            strict: true,
        };
        let is_flat = layout.dynamic.is_none();
        let (block_size, slot, table, map, metadata, start, batmap, parent, memory) =
            match layout.dynamic {
                None => (
                    disk_len,
                    fixed_slot,
                    FileOffset::default(),
                    BlockMap::new(0, SECTOR_SIZE),
                    Vec::new(),
                    layout.tail.at,
                    None,
                    None,
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
                    dynamic.parent,
                    Some(dynamic.memory),
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
        let free = FreeSpace::new(slot, start, layout.tail.at, used);
        let blocks = map.len();
        let space = Space::new(
            Arc::clone(&storage),
            slot,
            free,
            layout.file_len,
            options.punch_holes,
        );
        let bitmap_bytes = usize_from(slot.header_len);
        let cached = BITMAP_CACHE_BYTES
            .checked_div(bitmap_bytes)
            .and_then(NonZeroUsize::new);
        let cached = cached.unwrap_or(NonZeroUsize::MIN);
        Self {
            geometry: Geometry {
                format: Format::Vhd,
                disk_type: footer.disk_type(),
                is_flat,
                has_zero_state: false,
                sector_size: SECTOR_SIZE,
                physical_sector_size: SECTOR_SIZE,
                disk_len,
                block_size,
                slot,
            },
            footer: Mutex::new(footer),
            parent,
            read_only: options.read_only,
            table,
            map,
            pinned,
            start,
            space,
            durability: Durability::new(),
            batmap_lock: Mutex::new(batmap.map(|(header, _)| header)),
            bitmaps: Mutex::new(LruCache::new(cached)),
            _memory: memory.map(|mut memory| {
                memory.shrink(u64_from_u32(blocks).saturating_mul(layout::BYTES_PER_BLOCK));
                memory
            }),
            storage,
        }
    }

    /// Writes table entries for `edits`, neighbouring ones together. They are sorted by block.
    fn write_table(&self, edits: &[&MapEdit]) -> std::io::Result<()> {
        let mut at = 0;
        let mut buf = Vec::with_capacity(usize_from(BAT_ENTRY_LEN));
        while let Some(first) = edits.get(at) {
            buf.clear();
            let mut next = first.block().get();
            while let Some(edit) = edits.get(at).filter(|edit| edit.block().get() == next) {
                let slot = match **edit {
                    MapEdit::Place { slot, .. } | MapEdit::Move { to: slot, .. } => Some(slot),
                    MapEdit::Drop { .. } | MapEdit::Write { .. } => None,
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

impl Image for Vhd {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn creator(&self) -> String {
        self.footer.lock().creator_text()
    }

    fn identity(&self) -> Identity {
        Identity::Vhd(self.footer.lock().unique_id())
    }

    fn parent(&self) -> Option<&ParentLink> {
        self.parent.as_ref()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn map(&self) -> &BlockMap {
        &self.map
    }

    fn file_len(&self) -> u64 {
        self.space.file_len()
    }

    fn sector_bitmap(&self, block: BlockIndex) -> Result<Arc<SectorBitmap>, DiskError> {
        if let Some(bitmap) = self.bitmaps.lock().get(&block) {
            return Ok(Arc::clone(bitmap));
        }
        let sectors = self.sectors();
        let BlockState::Present { slot, .. } = self.map.get(block) else {
            return Ok(Arc::new(SectorBitmap::new(
                Box::new([]),
                sectors,
                BitOrder::MsbFirst,
            )));
        };
        let mut bytes = vec![0; usize_from(self.geometry.slot.header_len)].into_boxed_slice();
        self.storage
            .read_exact_at(&mut bytes, slot)
            .map_err(|error| DiskError::io("read a sector bitmap", error))?;
        let bitmap = Arc::new(SectorBitmap::new(bytes, sectors, BitOrder::MsbFirst));
        self.note_bitmap(block, slot, Arc::clone(&bitmap));
        Ok(bitmap)
    }

    fn make_whole(&self, block: BlockIndex) -> Result<(), DiskError> {
        self.check_writable()?;
        let bitmap = self.sector_bitmap(block)?;
        let BlockState::Present { slot, whole: false } = self.map.get(block) else {
            return Ok(());
        };
        // Sectors with a clear bit must be zeros in the file (VHD 1.0); other readers rely on
        // that. Zeros must be durable before a set bit uncovers them, and those that are read may
        // be there only since they were punched, perhaps by a process that was killed.
        if self.zero_unwritten(slot, &bitmap)? {
            self.sync()?;
        }
        self.prepare(slot, None)?;
        self.bitmaps.lock().pop(&block);
        self.map
            .set(block, BlockState::Present { slot, whole: true });
        Ok(())
    }

    fn reserve(&self) -> Result<FileOffset, DiskError> {
        self.space.reserve(self, &|| self.grow())
    }

    fn reserve_at(&self, slot: FileOffset) -> Option<Reserved> {
        self.space.reserve_at(slot)
    }

    fn give_back(&self, slot: FileOffset) {
        self.space.give_back(slot);
    }

    fn prepare(&self, slot: FileOffset, sectors: Option<Range<u64>>) -> Result<(), DiskError> {
        // Of a dynamic disk all ones, for every sector will be written or is zero; QEMU does the same.
        const ONES: [u8; 512] = [0xff; 512];
        let len = usize_from(self.geometry.slot.header_len);
        let result = match (sectors, ONES.get(..len)) {
            (Some(sectors), _) => {
                let mut bitmap =
                    SectorBitmap::new(vec![0; len].into(), self.sectors(), BitOrder::MsbFirst);
                bitmap.set(sectors.start, sectors.end);
                self.storage.write_all_at(bitmap.bytes(), slot)
            }
            (None, Some(ones)) => self.storage.write_all_at(ones, slot),
            (None, None) => self.storage.write_all_at(&vec![0xff; len], slot),
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
        let mut entries = Vec::with_capacity(edits.len());
        for edit in edits {
            match edit {
                MapEdit::Write { block, sectors } => self.set_bits(*block, sectors.clone())?,
                _ => entries.push(edit),
            }
        }
        entries.sort_unstable_by_key(|edit| edit.block());
        self.write_table(&entries)
            .map_err(|error| self.durability.poison("write the block table", error))?;
        for edit in entries {
            self.apply(edit);
        }
        self.durability.note_write();
        Ok(())
    }

    fn prepare_commit(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        self.empty_batmap()
    }

    fn begin_change(&self) -> Result<(), DiskError> {
        self.check_writable()
    }

    fn disown(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        if self.geometry.is_flat {
            let new = create::renewed(&self.footer.lock());
            (self.storage)
                .write_all_at(&new.to_bytes(), self.start)
                .map_err(|error| self.durability.poison("write the footer", error))?;
            *self.footer.lock() = new;
            self.durability.note_write();
            self.sync()?;
        }
        Ok(())
    }

    fn note_payload(&self) {
        self.durability.note_write();
    }

    fn write_back(&self, range: FileRange) -> Result<(), DiskError> {
        self.check_writable()?;
        self.durability.write_back(&**self.storage(), range)
    }

    fn sync(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.durability.sync(
            &*self.storage,
            || self.space.take_awaiting(),
            |awaited| {
                self.space.freed(awaited);
                Ok(())
            },
        )
    }

    fn move_metadata(&self, _from: FileRange, _to: FileOffset) -> Result<bool, DiskError> {
        // Nothing of a VHD's metadata is movable.
        Ok(false)
    }

    fn kept_for(&self) -> Vec<(FileOffset, BlockIndex)> {
        Vec::new()
    }

    fn settle(&self) -> Result<(), DiskError> {
        self.sync()
    }

    fn cut(&self, how: Cut) -> Result<bool, DiskError> {
        self.cut_tail(how)
    }

    fn punch_free(&self, most: u64) -> Result<bool, DiskError> {
        self.space.punch_some(self, most)
    }

    fn room_gained(&self) -> u64 {
        self.space.gained()
    }

    fn make_room(&self, seen: u64) -> Result<bool, DiskError> {
        self.space.make_room(self, seen)
    }

    fn punchable_bytes(&self) -> u64 {
        if self.read_only {
            return 0;
        }
        self.space.punchable()
    }

    fn free_runs(&self) -> Vec<FileRange> {
        self.space.free_runs()
    }

    fn awaiting_bytes(&self) -> u64 {
        self.space.awaiting_bytes()
    }

    fn drop_unused_metadata(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn frame(&self, _is_dead: &dyn Fn(BlockIndex) -> bool) -> Frame {
        Frame {
            start: self.start,
            pinned: self.pinned.clone(),
            movable: Vec::new(),
            trailer_len: FOOTER_LEN,
            align: SECTOR_SIZE,
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
    /// Sectors of a block.
    fn sectors(&self) -> u64 {
        self.geometry.block_size / SECTOR_SIZE
    }

    /// Keeps what was read or written of a bitmap.
    fn note_bitmap(&self, block: BlockIndex, slot: FileOffset, bitmap: Arc<SectorBitmap>) {
        if bitmap.is_full() {
            self.bitmaps.lock().pop(&block);
            self.map
                .set(block, BlockState::Present { slot, whole: true });
        } else {
            self.bitmaps.lock().put(block, bitmap);
        }
    }

    /// Sets bits of a present block's bitmap, in the file and in memory.
    fn set_bits(&self, block: BlockIndex, sectors: Range<u64>) -> Result<(), DiskError> {
        let mut bitmap = self.sector_bitmap(block)?;
        let BlockState::Present { slot, whole: false } = self.map.get(block) else {
            return Ok(());
        };
        Arc::make_mut(&mut bitmap).set(sectors.start, sectors.end);
        // Only the sectors of the bitmap that change.
        const BITS: u64 = SECTOR_SIZE * 8;
        let first = (sectors.start / BITS).saturating_mul(SECTOR_SIZE);
        let last = (sectors.end.saturating_sub(1) / BITS).saturating_add(1);
        let bytes = usize_from(first)..usize_from(last.saturating_mul(SECTOR_SIZE));
        if let Some(changed) = bitmap.bytes().get(bytes) {
            self.storage
                .write_all_at(changed, slot.plus(first))
                .map_err(|error| self.durability.poison("write a sector bitmap", error))?;
        }
        self.note_bitmap(block, slot, bitmap);
        Ok(())
    }

    /// Enters in the map what was written to the table.
    fn apply(&self, edit: &MapEdit) {
        let block = edit.block();
        let old = self.map.get(block);
        let new = match (edit, old) {
            (MapEdit::Place { slot, sectors, .. }, BlockState::NotPresent) => BlockState::Present {
                slot: *slot,
                whole: sectors.is_none(),
            },
            (MapEdit::Move { to, .. }, BlockState::Present { whole, .. }) => {
                BlockState::Present { slot: *to, whole }
            }
            (MapEdit::Drop { reads, .. }, BlockState::Present { .. }) => {
                debug_assert!(*reads == Reads::Parent || self.parent.is_none());
                self.bitmaps.lock().pop(&block);
                BlockState::NotPresent
            }
            (edit, old) => panic!("{edit:?} on a block that is {old:?}"),
        };
        self.map.set(block, new);
        if let Some(slot) = old.slot() {
            self.space.free().release(self.geometry.slot_range(slot));
        }
    }
}

impl Vhd {
    /// Makes sure that the sectors that `bitmap` does not name are zeros in the slot; says whether
    /// there are any.
    fn zero_unwritten(&self, slot: FileOffset, bitmap: &SectorBitmap) -> Result<bool, DiskError> {
        const PIECE_SECTORS: u64 = 1 << 11;
        let sectors = self.geometry.block_size / SECTOR_SIZE;
        let data = self.geometry.data_at(slot);
        let mut any = false;
        let mut buf = Vec::new();
        let mut sector = 0;
        while sector < sectors {
            let end = bitmap.run_end(sector, sectors.min(sector.saturating_add(PIECE_SECTORS)));
            if !bitmap.is_written(sector) {
                any = true;
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
                }
            }
            sector = end;
        }
        Ok(any)
    }
}

/// What can be told of a VHD without opening it.
pub(crate) fn probe(storage: &dyn Storage) -> Result<Probe, OpenProblem> {
    let layout = Layout::read(storage)?;
    Ok(Probe {
        format: Format::Vhd,
        virtual_size: layout.footer.disk_len(),
        disk_type: layout.footer.disk_type(),
        identity: Identity::Vhd(layout.footer.unique_id()),
        parent: layout.dynamic.and_then(|dynamic| dynamic.parent),
        not_writable: layout.not_writable,
    })
}
