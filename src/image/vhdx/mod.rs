//! VHDX: fixed, dynamic and differencing.
//!
//! # Order of writes
//! ```text
//!   data in a new slot  ->  an entry in the log  ->  sync  ->  pages in their places  -> sync -> ...
//!   [caller]                [commit, log]            [caller]  [log, when it fills up]
//! ```
//! All metadata but the headers is changed through the log: the block table, sector bitmaps, region
//! tables. An entry is atomic, so that what one edit changes (a block's entry, its chunk's, its bits)
//! appears as a whole or not at all. See `log.rs` for its invariants, `session.rs` for
//! the headers and for cutting the file, `replay.rs` for what happens to a log that was left behind.
//!
//! # What a sync covers
//! A commit is an unsynced write to the log. A guest's flush is one sync of the file, whatever was
//! committed before; entries become durable with it, and now and then their pages are written in
//! their places afterwards, without waiting for that.
//!
//! # Space
//! A slot that an entry unlinks is free once that entry is durable: replaying makes the table forget
//! it. The place of a *sector-bitmap block* is free only once no entry in the log writes to it either.
//! Blocks in the states undefined and unmapped may keep their old place (an *anchor*): nobody else
//! gets it before an entry without it is durable.

mod bitmaps;
mod commit;
mod create;
mod faults;
mod headers;
mod identify;
mod layout;
mod log;
mod open;
mod overlay;
mod parameters;
mod relink;
mod repair;
pub(crate) mod replay;
mod ring;
mod session;
mod space;
mod table;
#[cfg(test)]
mod tests;
pub(crate) mod verify;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use self::layout::Layout;
use self::session::OpenFile;
use super::{Cut, Frame, Geometry, Image, ImageOptions, MapEdit, Reserved, Space};
use crate::error::DiskError;
use crate::format::Format;
use crate::format::parent::{Identity, ParentLink};
use crate::format::sector_bitmap::SectorBitmap;
use crate::format::vhdx::{BatGeometry, MIB};
use crate::map::{BlockMap, Charge, FreeSpace, SlotShape};
use crate::storage::Storage;
use crate::units::{BlockIndex, FileOffset, FileRange, usize_from};

pub(crate) use create::{NewDisk, create};
pub(crate) use identify::identify;
pub(crate) use open::{open, probe, probe_large};
pub(crate) use relink::{relink, renew_identity};

/// Sector bitmaps kept in memory, in bytes, for one image.
const BITMAP_CACHE_BYTES: usize = 1 << 20;
/// What a bitmap in memory takes beside its bytes, about.
const BITMAP_OVERHEAD: usize = 128;

/// An open VHDX.
#[derive(Debug)]
pub(crate) struct Vhdx {
    file: OpenFile,
    geometry: Geometry,
    creator: String,
    parent: Option<ParentLink>,
    read_only: bool,
    /// Where the block table lies.
    bat: FileRange,
    bat_geometry: BatGeometry,
    map: BlockMap,
    /// Where the sector-bitmap blocks lie, by chunk.
    bitmap_blocks: RwLock<BTreeMap<u32, FileOffset>>,
    /// The places that blocks without a slot keep for themselves.
    anchors: Mutex<BTreeMap<BlockIndex, FileOffset>>,
    pinned: Vec<FileRange>,
    bitmaps: Mutex<LruCache<BlockIndex, Arc<SectorBitmap>>>,
    /// What all this takes.
    _memory: Charge,
}

impl Vhdx {
    /// Of a file that has no log to replay, or shows what is replayed. `is_marked`: it was changed
    /// since it was opened, and its headers say so.
    fn from_layout(
        storage: Arc<dyn Storage>,
        layout: Layout,
        options: ImageOptions,
        is_marked: bool,
    ) -> Self {
        let start = FileOffset::new(MIB);
        let slot = SlotShape {
            len: layout.block_size,
            header_len: 0,
            align: MIB,
            strict: true,
        };
        let file_len = layout.padded_len();
        let end = FileOffset::new(file_len);
        let free = match &layout.occupied {
            Some(occupied) => FreeSpace::new(slot, start, end, occupied.runs()),
            // Nobody writes to such a file.
            None => FreeSpace::new(slot, start, start, []),
        };
        let geometry = Geometry {
            format: Format::Vhdx,
            disk_type: layout.disk_type(),
            is_flat: false,
            has_zero_state: true,
            sector_size: layout.sector_size,
            physical_sector_size: layout.physical_sector_size,
            disk_len: layout.disk_len,
            block_size: layout.block_size,
            slot,
        };
        let space = Space::new(
            Arc::clone(&storage),
            slot,
            free,
            file_len,
            options.punch_holes,
        );
        let bitmap_bytes = usize_from(layout.bat_geometry.sectors_per_block() / 8);
        let cached = (layout.parent.as_ref())
            .and_then(|_| {
                BITMAP_CACHE_BYTES.checked_div(bitmap_bytes.saturating_add(BITMAP_OVERHEAD))
            })
            .and_then(NonZeroUsize::new);
        let pinned = (layout.pinned.iter().map(|(range, _)| *range))
            .filter(|range| range.end() > start)
            .collect();
        Self {
            file: OpenFile::new(space, storage, layout.header, is_marked),
            geometry,
            creator: layout.creator,
            parent: layout.parent,
            read_only: options.read_only,
            bat: layout.bat,
            bat_geometry: layout.bat_geometry,
            map: layout.map,
            bitmap_blocks: RwLock::new(layout.bitmap_blocks),
            anchors: Mutex::new(layout.anchors),
            pinned,
            bitmaps: Mutex::new(LruCache::new(cached.unwrap_or(NonZeroUsize::MIN))),
            _memory: layout.memory,
        }
    }
}

impl Image for Vhdx {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn creator(&self) -> String {
        self.creator.clone()
    }

    fn identity(&self) -> Identity {
        Identity::Vhdx(self.file.data_write_guid())
    }

    fn parent(&self) -> Option<&ParentLink> {
        self.parent.as_ref()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.file.storage
    }

    fn map(&self) -> &BlockMap {
        &self.map
    }

    fn file_len(&self) -> u64 {
        self.file.space.file_len()
    }

    fn sector_bitmap(&self, block: BlockIndex) -> Result<Arc<SectorBitmap>, DiskError> {
        self.bitmap_of(block)
    }

    fn make_whole(&self, _block: BlockIndex) -> Result<(), DiskError> {
        // Without a parent, every block that is present is whole.
        self.check_writable()
    }

    fn reserve(&self) -> Result<FileOffset, DiskError> {
        self.file.space.reserve(self, &|| self.grow())
    }

    fn reserve_at(&self, slot: FileOffset) -> Option<Reserved> {
        self.file.space.reserve_at(slot)
    }

    fn give_back(&self, slot: FileOffset) {
        self.file.space.give_back(slot);
    }

    fn prepare(&self, _slot: FileOffset, _sectors: Option<Range<u64>>) -> Result<(), DiskError> {
        // All that a slot needs beside data is in the entry that places it.
        Ok(())
    }

    fn commit(&self, edits: &[MapEdit]) -> Result<(), DiskError> {
        self.check_writable()?;
        self.commit_edits(edits)
    }

    fn prepare_commit(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        self.file.prepare()
    }

    fn begin_change(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.file.announce()
    }

    fn disown(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        self.file.disown()
    }

    fn note_payload(&self) {
        self.file.durability.note_write();
    }

    fn write_back(&self, range: FileRange) -> Result<(), DiskError> {
        self.check_writable()?;
        self.file.durability.write_back(&**self.storage(), range)
    }

    fn sync(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync()
    }

    fn move_metadata(&self, from: FileRange, to: FileOffset) -> Result<bool, DiskError> {
        self.check_writable()?;
        self.move_bitmap_block(from, to)
    }

    fn kept_for(&self) -> Vec<(FileOffset, BlockIndex)> {
        let anchors = self.anchors.lock();
        let mut kept: Vec<_> = anchors.iter().map(|(block, at)| (*at, *block)).collect();
        kept.sort_unstable();
        kept
    }

    fn settle(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.file.settle()
    }

    fn cut(&self, how: Cut) -> Result<bool, DiskError> {
        self.cut_tail(how)
    }

    fn punch_free(&self, most: u64) -> Result<bool, DiskError> {
        self.file.space.punch_some(self, most)
    }

    fn room_gained(&self) -> u64 {
        self.file.space.gained()
    }

    fn make_room(&self, seen: u64) -> Result<bool, DiskError> {
        self.file.space.make_room(self, seen)
    }

    fn punchable_bytes(&self) -> u64 {
        if self.read_only {
            return 0;
        }
        self.file.space.punchable()
    }

    fn free_runs(&self) -> Vec<FileRange> {
        self.file.space.free_runs()
    }

    fn awaiting_bytes(&self) -> u64 {
        self.file.space.awaiting_bytes()
    }

    fn drop_unused_metadata(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        self.drop_unused_bitmap_blocks()
    }

    fn frame(&self, is_dead: &dyn Fn(BlockIndex) -> bool) -> Frame {
        Frame {
            start: FileOffset::new(MIB),
            pinned: self.pinned.clone(),
            movable: self.bitmap_ranges(is_dead),
            trailer_len: 0,
            align: MIB,
        }
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.file.durability.check()
    }
}
