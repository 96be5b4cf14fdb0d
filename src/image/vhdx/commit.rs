//! From edits of the block table to pages in the log, and then to the map.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Vhdx;
use super::log::{LoggedPage, MAX_PAGES};
use super::session::OpenFile;
use crate::error::DiskError;
use crate::format::sector_bitmap::{BitOrder, SectorBitmap};
use crate::format::vhdx::log::Page;
use crate::format::vhdx::{BatEntry, BatGeometry, PAGE, PayloadState};
use crate::image::{Image, MapEdit, Reads};
use crate::map::BlockState;
use crate::units::{BlockIndex, FileOffset, round_down, u64_from, usize_from};

/// The most pages that one edit touches: the bits of a block of 256 MiB, and two table entries.
const EDIT_PAGES: usize = 18;

/// Pages of metadata as they are to become.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    file: &'a OpenFile,
    /// With whether they differ from what is there.
    pages: BTreeMap<FileOffset, (Arc<Page>, bool)>,
}

impl<'a> Draft<'a> {
    /// Nothing changed yet. The caller keeps others from changing metadata until it is written.
    pub(super) fn new(file: &'a OpenFile) -> Self {
        Self {
            file,
            pages: BTreeMap::new(),
        }
    }

    /// Puts `bytes` at `at`.
    ///
    /// # Errors
    /// Where the host cannot read a page, or has no room for it.
    pub(super) fn put(&mut self, at: FileOffset, bytes: &[u8]) -> io::Result<()> {
        let mut at = at;
        let mut rest = bytes;
        while !rest.is_empty() {
            let page_at = FileOffset::new(round_down(at.get(), PAGE));
            let within = at.since(page_at);
            let len = usize_from(PAGE.saturating_sub(within)).min(rest.len());
            let (part, tail) = rest.split_at(len);
            let (page, is_changed) = match self.pages.entry(page_at) {
                std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert((self.file.take_page(page_at)?, false))
                }
            };
            let from = usize_from(within);
            let here = from..from.saturating_add(len);
            if page.get(here.clone()) != Some(part) {
                if let Some(target) = Arc::make_mut(page).get_mut(here) {
                    target.copy_from_slice(part);
                }
                *is_changed = true;
            }
            at = at.plus(u64_from(len));
            rest = tail;
        }
        Ok(())
    }

    /// The pages that differ from what is there.
    pub(super) fn into_changed(self) -> Vec<LoggedPage> {
        (self.pages.into_iter())
            .filter(|(_, (_, is_changed))| *is_changed)
            .map(|(at, (page, _))| (at, page))
            .collect()
    }
}

/// What an edit makes of its block.
#[derive(Debug)]
struct Outcome {
    state: BlockState,
    /// Of a block that is present but not whole, if it changed.
    bitmap: Option<Arc<SectorBitmap>>,
    /// Whether what the block keeps for itself is given up.
    releases_anchor: bool,
}

impl Vhdx {
    /// As [`Image::commit`]. Where it fails without poisoning, slots that the edits name and that
    /// were not committed are free again.
    pub(super) fn commit_edits(&self, edits: &[MapEdit]) -> Result<(), DiskError> {
        let mut spare = BTreeMap::new();
        let mut rest = edits;
        let result = self
            .reserve_bitmap_blocks(edits, &mut spare)
            .and_then(|()| self.commit_all(&mut rest, &mut spare));
        if self.file.durability.check().is_ok() {
            for place in spare.into_values() {
                self.give_back_bitmap_block(place);
            }
            for edit in rest {
                if let MapEdit::Place { slot, .. } | MapEdit::Move { to: slot, .. } = edit {
                    self.give_back(*slot);
                }
            }
        }
        result
    }

    /// Takes space for the sector-bitmap blocks that `edits` need and that are not there.
    fn reserve_bitmap_blocks(
        &self,
        edits: &[MapEdit],
        spare: &mut BTreeMap<u32, FileOffset>,
    ) -> Result<(), DiskError> {
        for edit in edits {
            if let MapEdit::Place { block, sectors, .. } = edit
                && self.first_bitmap(*block, sectors.as_ref()).is_some()
            {
                let chunk = self.bat_geometry.chunk_of(*block);
                let is_there = self.bitmap_blocks.read().contains_key(&chunk);
                if !is_there && !spare.contains_key(&chunk) {
                    spare.insert(chunk, self.reserve_bitmap_block()?);
                }
            }
        }
        Ok(())
    }

    /// Writes `rest` to the log and the map, an entry at a time; what is left of it was not.
    fn commit_all(
        &self,
        rest: &mut &[MapEdit],
        spare: &mut BTreeMap<u32, FileOffset>,
    ) -> Result<(), DiskError> {
        if rest.is_empty() {
            return Ok(());
        }
        let mut transaction = self.file.begin()?;
        while !rest.is_empty() {
            let mut draft = Draft::new(&self.file);
            let mut outcomes = Vec::new();
            let mut left = *rest;
            while let Some((edit, tail)) = left.split_first() {
                if draft.pages.len().saturating_add(EDIT_PAGES) > MAX_PAGES {
                    break;
                }
                let outcome = self
                    .draft(edit, &mut draft, spare)
                    .map_err(|error| DiskError::io("read the block table", error))?;
                outcomes.push((edit, outcome));
                left = tail;
            }
            transaction.write(draft.into_changed())?;
            for (edit, outcome) in outcomes {
                if matches!(outcome.state, BlockState::Present { whole: false, .. }) {
                    self.enter_bitmap_block(edit.block(), spare);
                }
                self.enter(edit.block(), outcome);
            }
            *rest = left;
            // A sync must cover what was released, which it was not when the entry was written.
            self.file.durability.note_write();
        }
        Ok(())
    }

    /// Notes that the sector-bitmap block of `block`'s chunk is the one of `spare`, if there was none.
    fn enter_bitmap_block(&self, block: BlockIndex, spare: &mut BTreeMap<u32, FileOffset>) {
        let chunk = self.bat_geometry.chunk_of(block);
        let mut places = self.bitmap_blocks.write();
        if !places.contains_key(&chunk)
            && let Some(place) = spare.remove(&chunk)
        {
            places.insert(chunk, place);
        }
    }

    /// The bitmap of `block` once `sectors` are placed; `None` where it is whole then.
    fn first_bitmap(
        &self,
        block: BlockIndex,
        sectors: Option<&Range<u64>>,
    ) -> Option<SectorBitmap> {
        // What is around them reads as zeros, as the slot does, but where a parent shows.
        if self.parent.is_none() || self.map.get(block) != BlockState::NotPresent {
            return None;
        }
        let sectors = sectors?;
        let mut bitmap =
            SectorBitmap::empty(self.bat_geometry.sectors_per_block(), BitOrder::LsbFirst);
        bitmap.set(sectors.start, sectors.end);
        (!bitmap.is_full()).then_some(bitmap)
    }

    /// Puts what `edit` changes into `draft`. A chunk without a sector-bitmap block gets that of
    /// `spare`.
    fn draft(
        &self,
        edit: &MapEdit,
        draft: &mut Draft<'_>,
        spare: &BTreeMap<u32, FileOffset>,
    ) -> io::Result<Outcome> {
        let block = edit.block();
        let mut outcome = Outcome {
            state: self.map.get(block),
            bitmap: None,
            releases_anchor: matches!(edit, MapEdit::Place { .. } | MapEdit::Drop { .. }),
        };
        match (edit, outcome.state) {
            (MapEdit::Place { slot, sectors, .. }, BlockState::NotPresent | BlockState::Zero) => {
                let bitmap = self.first_bitmap(block, sectors.as_ref());
                let whole = bitmap.is_none();
                if let Some(bitmap) = bitmap {
                    let place = self.bitmap_place(block, draft, spare)?;
                    let bits = self.bat_geometry.bits_of(block, place);
                    draft.put(bits.start, bitmap.bytes())?;
                    outcome.bitmap = Some(Arc::new(bitmap));
                }
                outcome.state = BlockState::Present { slot: *slot, whole };
            }
            (MapEdit::Write { sectors, .. }, BlockState::Present { slot, whole: false }) => {
                let mut bitmap = self.read_bitmap(block)?;
                Arc::make_mut(&mut bitmap).set(sectors.start, sectors.end);
                let whole = bitmap.is_full();
                outcome.state = BlockState::Present { slot, whole };
                if !whole {
                    let place = self.bitmap_place(block, draft, spare)?;
                    let bits = self.bat_geometry.bits_of(block, place);
                    let (first, end) = (sectors.start / 8, sectors.end.div_ceil(8).min(bits.len));
                    let bytes = bitmap.bytes().get(usize_from(first)..usize_from(end));
                    draft.put(bits.start.plus(first), bytes.unwrap_or_default())?;
                    outcome.bitmap = Some(bitmap);
                    return Ok(outcome);
                }
            }
            (MapEdit::Write { .. }, BlockState::Present { whole: true, .. }) => return Ok(outcome),
            (MapEdit::Move { to, .. }, BlockState::Present { whole, .. }) => {
                outcome.state = BlockState::Present { slot: *to, whole };
            }
            (MapEdit::Drop { reads, .. }, _) => {
                outcome.state = match (reads, &self.parent) {
                    (Reads::Zeros, Some(_)) => BlockState::Zero,
                    (Reads::Parent, _) | (Reads::Zeros, None) => BlockState::NotPresent,
                };
            }
            (edit, state) => panic!("{edit:?} on a block that is {state:?}"),
        }
        let index = self.bat_geometry.payload_index(block);
        let entry = self.entry_of(outcome.state);
        draft.put(
            BatGeometry::entry_at(self.bat.start, index),
            &entry.to_bytes(),
        )?;
        Ok(outcome)
    }

    /// The table entry of a block in `state`.
    fn entry_of(&self, state: BlockState) -> BatEntry {
        match state {
            BlockState::Present { slot, whole } => {
                let state = if whole {
                    PayloadState::FullyPresent
                } else {
                    PayloadState::PartiallyPresent
                };
                BatEntry::payload(state, slot)
            }
            BlockState::NotPresent if self.parent.is_some() => {
                BatEntry::payload(PayloadState::NotPresent, FileOffset::new(0))
            }
            // What a block that is not present reads as is undefined where there is no parent.
            BlockState::NotPresent | BlockState::Zero => {
                BatEntry::payload(PayloadState::Zero, FileOffset::new(0))
            }
        }
    }

    /// Where the sector-bitmap block of `block`'s chunk lies; one of `spare` enters the table.
    fn bitmap_place(
        &self,
        block: BlockIndex,
        draft: &mut Draft<'_>,
        spare: &BTreeMap<u32, FileOffset>,
    ) -> io::Result<FileOffset> {
        let chunk = self.bat_geometry.chunk_of(block);
        if let Some(place) = self.bitmap_blocks.read().get(&chunk) {
            return Ok(*place);
        }
        let place = spare
            .get(&chunk)
            .copied()
            .ok_or_else(|| io::Error::other(format!("chunk {chunk} has no sector-bitmap block")))?;
        self.draft_bitmap_entry(chunk, place, draft)?;
        Ok(place)
    }

    /// Puts a sector-bitmap block's table entry into `draft`.
    pub(super) fn draft_bitmap_entry(
        &self,
        chunk: u32,
        place: FileOffset,
        draft: &mut Draft<'_>,
    ) -> io::Result<()> {
        let index = self.bat_geometry.bitmap_index(chunk);
        let entry = BatEntry::bitmap(Some(place));
        draft.put(
            BatGeometry::entry_at(self.bat.start, index),
            &entry.to_bytes(),
        )
    }

    /// Enters in the map what was written to the log.
    fn enter(&self, block: BlockIndex, outcome: Outcome) {
        let old = self.map.get(block);
        match outcome.bitmap {
            Some(bitmap) => drop(self.bitmaps.lock().put(block, bitmap)),
            None if old.slot().is_some() && outcome.state.slot().is_none() => {
                self.bitmaps.lock().pop(&block);
            }
            None => {}
        }
        self.map.set(block, outcome.state);
        let left = old
            .slot()
            .filter(|slot| outcome.state.slot() != Some(*slot));
        let anchor = if outcome.releases_anchor {
            self.anchors.lock().remove(&block)
        } else {
            None
        };
        for slot in [left, anchor].into_iter().flatten() {
            self.file
                .space
                .free()
                .release(self.geometry.slot_range(slot));
        }
    }
}
