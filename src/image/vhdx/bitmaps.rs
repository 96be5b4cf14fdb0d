//! Sector-bitmap blocks: which sectors of a child's blocks are its own.

use std::sync::Arc;

use super::Vhdx;
use super::commit::Draft;
use super::log::MAX_PAGES;
use crate::error::DiskError;
use crate::format::sector_bitmap::{BitOrder, SectorBitmap};
use crate::format::vhdx::{BITMAP_BLOCK_LEN, MIB, PAGE};
use crate::image::Image;
use crate::map::BlockState;
use crate::units::{BlockIndex, FileOffset, FileRange, round_down, round_up, u64_from, usize_from};

impl Vhdx {
    /// The bitmap of a block that is present but not whole, from the cache or the file.
    ///
    /// # Errors
    /// Where the host cannot read.
    pub(super) fn read_bitmap(&self, block: BlockIndex) -> std::io::Result<Arc<SectorBitmap>> {
        if let Some(bitmap) = self.bitmaps.lock().get(&block) {
            return Ok(Arc::clone(bitmap));
        }
        let sectors = self.bat_geometry.sectors_per_block();
        let chunk = self.bat_geometry.chunk_of(block);
        // Held while it is read, so that it does not move away meanwhile.
        let places = self.bitmap_blocks.read();
        let Some(place) = places.get(&chunk) else {
            return Err(std::io::Error::other(format!(
                "chunk {chunk} has no sector-bitmap block"
            )));
        };
        let bits = self.bat_geometry.bits_of(block, *place);
        let mut bytes = vec![0; usize_from(bits.len)].into_boxed_slice();
        let mut at = bits.start;
        let mut rest = &mut bytes[..];
        while !rest.is_empty() {
            let page_at = FileOffset::new(round_down(at.get(), PAGE));
            let within = usize_from(at.since(page_at));
            let page = self.file.read_page(page_at)?;
            let part = page.get(within..).unwrap_or_default();
            let part = part.get(..rest.len()).unwrap_or(part);
            let (here, tail) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            at = at.plus(u64_from(part.len()));
            rest = tail;
        }
        drop(places);
        let bitmap = Arc::new(SectorBitmap::new(bytes, sectors, BitOrder::LsbFirst));
        self.bitmaps.lock().put(block, Arc::clone(&bitmap));
        Ok(bitmap)
    }

    /// As [`Image::sector_bitmap`].
    pub(super) fn bitmap_of(&self, block: BlockIndex) -> Result<Arc<SectorBitmap>, DiskError> {
        let sectors = self.bat_geometry.sectors_per_block();
        match self.map.get(block) {
            BlockState::Present { whole: false, .. } => self
                .read_bitmap(block)
                .map_err(|error| DiskError::io("read a sector bitmap", error)),
            state => {
                let mut bitmap = SectorBitmap::empty(sectors, BitOrder::LsbFirst);
                if state.slot().is_some() {
                    bitmap.set(0, sectors);
                }
                Ok(Arc::new(bitmap))
            }
        }
    }

    /// Takes 1 MiB that is durably zero, if possible from a hole that no block fits in.
    ///
    /// # Errors
    /// As [`Image::reserve`].
    pub(super) fn reserve_bitmap_block(&self) -> Result<FileOffset, DiskError> {
        let space = &self.file.space;
        let hole = {
            let mut free = space.free();
            let shape = self.geometry.slot;
            let place = |run: FileRange| {
                let start = FileOffset::new(round_up(run.start.get(), MIB));
                let range = FileRange::new(start, BITMAP_BLOCK_LEN);
                (range.end() <= run.end()).then_some(range)
            };
            let hole = (free.runs())
                .filter(|run| shape.place_aligned(*run).is_none())
                .find_map(place);
            hole.map(|range| (range, free.is_clean(range)))
                .filter(|(range, _)| free.take(*range))
        };
        let Some((range, is_clean)) = hole else {
            let slot = self.reserve()?;
            let rest = self.geometry.slot_range(slot);
            let rest = FileRange::between(rest.start.plus(BITMAP_BLOCK_LEN), rest.end());
            space.free().give_back_clean(rest);
            return Ok(slot);
        };
        if is_clean {
            return Ok(range.start);
        }
        let zeroed = space
            .zero_free(range)
            .map_err(|error| DiskError::io("clean free space", error));
        self.file.durability.note_write();
        if let Err(error) = zeroed.and_then(|()| self.file.sync()) {
            space.free().give_back(range);
            return Err(error);
        }
        Ok(range.start)
    }

    /// Gives back what [`Self::reserve_bitmap_block`] gave and nobody wrote to.
    pub(super) fn give_back_bitmap_block(&self, place: FileOffset) {
        let range = FileRange::new(place, BITMAP_BLOCK_LEN);
        self.file.space.free().give_back_clean(range);
    }

    /// Where the sector-bitmap blocks lie that are still needed once the blocks that `is_dead` says
    /// are dropped, sorted.
    pub(super) fn bitmap_ranges(&self, is_dead: &dyn Fn(BlockIndex) -> bool) -> Vec<FileRange> {
        let places = self.bitmap_blocks.read();
        let mut ranges: Vec<FileRange> = (places.iter())
            .filter(|(chunk, _)| self.needs_bitmap_block(**chunk, is_dead))
            .map(|(_, place)| FileRange::new(*place, BITMAP_BLOCK_LEN))
            .collect();
        ranges.sort_unstable();
        ranges
    }

    /// Whether a block of `chunk` that is not dead has only some of its sectors.
    fn needs_bitmap_block(&self, chunk: u32, is_dead: &dyn Fn(BlockIndex) -> bool) -> bool {
        self.bat_geometry.blocks_of(chunk).any(|block| {
            let state = self.map.get(block);
            matches!(state, BlockState::Present { whole: false, .. }) && !is_dead(block)
        })
    }

    /// As [`Image::drop_unused_metadata`]. The log is drained first, as for a move: what comes to lie in
    /// their places must not be replayed upon.
    pub(super) fn drop_unused_bitmap_blocks(&self) -> Result<(), DiskError> {
        let unused = || -> Vec<(u32, FileOffset)> {
            let places = self.bitmap_blocks.read();
            let mut unused: Vec<_> = (places.iter())
                .filter(|(chunk, _)| !self.needs_bitmap_block(**chunk, &|_| false))
                .map(|(chunk, place)| (*chunk, *place))
                .collect();
            unused.truncate(MAX_PAGES);
            unused
        };
        while !unused().is_empty() {
            self.file.retire_beside_others()?;
            let mut transaction = self.file.begin()?;
            // While the writer is held, none comes into use.
            let unused = unused();
            transaction.drain()?;
            let mut draft = Draft::new(&self.file);
            for (chunk, _) in &unused {
                self.draft_bitmap_entry(*chunk, None, &mut draft)
                    .map_err(|error| DiskError::io("read the block table", error))?;
            }
            transaction.write(draft.into_changed())?;
            for (chunk, place) in unused {
                self.bitmap_blocks.write().remove(&chunk);
                let range = FileRange::new(place, BITMAP_BLOCK_LEN);
                self.file.space.free().release(range);
            }
            self.file.durability.note_write();
        }
        Ok(())
    }

    /// Moves the sector-bitmap block in `from` to `to`: see [`Image::move_metadata`].
    ///
    /// An entry of the log that is still to be replayed names places in the block. So that none is
    /// replayed onto what comes to lie in the old place, the log is drained first; and while the
    /// writer is held, no new entry appears that the copy would lack.
    pub(super) fn move_bitmap_block(
        &self,
        from: FileRange,
        to: FileOffset,
    ) -> Result<bool, DiskError> {
        let find = || {
            let places = self.bitmap_blocks.read();
            let found = places.iter().find(|(_, place)| **place == from.start);
            found.map(|(chunk, _)| *chunk)
        };
        if from.len != BITMAP_BLOCK_LEN || !to.get().is_multiple_of(MIB) || find().is_none() {
            return Ok(false);
        }
        self.file.retire_beside_others()?;
        let mut transaction = self.file.begin()?;
        let Some(chunk) = find() else {
            return Ok(false);
        };
        let target = FileRange::new(to, BITMAP_BLOCK_LEN);
        if !self.file.space.free().take(target) {
            return Ok(false);
        }
        let mut work = || {
            transaction.drain()?;
            let copied = self.storage().copy_within(from, to);
            self.file.durability.note_write();
            copied.map_err(|error| DiskError::io("copy a sector bitmap", error))?;
            self.file.sync()?;
            let mut draft = Draft::new(&self.file);
            self.draft_bitmap_entry(chunk, Some(to), &mut draft)
                .map_err(|error| DiskError::io("read the block table", error))?;
            transaction.write(draft.into_changed())
        };
        if let Err(error) = work() {
            if self.file.durability.check().is_ok() {
                self.file.space.free().give_back(target);
            }
            return Err(error);
        }
        self.bitmap_blocks.write().insert(chunk, to);
        self.file.space.free().release(from);
        self.file.durability.note_write();
        self.file.sync()?;
        Ok(true)
    }
}
