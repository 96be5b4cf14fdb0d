//! Reads and verifies all metadata of a VHDX but its headers and its log, changing nothing.
//!
//! The storage given here already shows the file as it is after the log's replay. Bounds: memory is
//! proportional to the blocks that the disk's size needs, at most 2^26, with four bytes for each, and a
//! bit for each MiB of a file that is to be written; that is charged to what all disks may take
//! ([`crate::map`]). Whatever else a file claims is limited before it is read.

use std::collections::BTreeMap;
use std::fmt;

use super::faults::{Faults, Severity};
use super::parameters::{Parameters, RegionCopies, cut, read_creator, read_items, read_regions};
use super::table::{MOST_KEPT, Table, TablePlace};
use crate::error::FormatError;
use crate::format::DiskType;
use crate::format::parent::ParentLink;
use crate::format::vhdx::metadata::MetadataTable;
use crate::format::vhdx::{
    BAT_ENTRY_LEN, BITMAP_BLOCK_LEN, BatGeometry, CurrentHeader, IDENTIFIER, MIB, REGION_TABLE_2,
    REGION_TABLE_LEN,
};
use crate::image::claims::{Overlap, merged, overlaps};
use crate::image::{LayoutError, Lost};
use crate::map::{BlockMap, BlockState, Charge, Occupied};
use crate::storage::Storage;
use crate::units::{BlockIndex, FileOffset, FileRange, round_up, u64_from, u64_from_u32};

#[cfg(test)]
pub(super) mod tests;

/// A VHDX's metadata.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The current header.
    pub(crate) header: CurrentHeader,
    /// The file's length.
    pub(crate) file_len: u64,
    /// The program that made the file.
    pub(crate) creator: String,
    /// Where the log lies; empty where there is none.
    pub(crate) log: FileRange,
    /// The regions.
    pub(crate) regions: RegionCopies,
    /// The region of the block table.
    pub(crate) bat: FileRange,
    /// Where in it the entry of each block is.
    pub(crate) bat_geometry: BatGeometry,
    /// The metadata items.
    pub(crate) items: MetadataTable,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// Bytes of data in a block.
    pub(crate) block_size: u64,
    /// Bytes in a logical sector.
    pub(crate) sector_size: u64,
    /// Bytes in a physical sector.
    pub(crate) physical_sector_size: u64,
    /// See [`Self::disk_type`].
    disk_type: DiskType,
    /// What a differencing disk says of its parent.
    pub(crate) parent: Option<ParentLink>,
    /// Where the payload blocks lie.
    pub(crate) map: BlockMap,
    /// Where the sector-bitmap blocks of a differencing disk lie, by chunk.
    pub(crate) bitmap_blocks: BTreeMap<u32, FileOffset>,
    /// The places that blocks which are not present keep for themselves.
    pub(crate) anchors: BTreeMap<BlockIndex, FileOffset>,
    /// Used space that cannot move, with names, sorted: the first MiB, the log, all regions.
    pub(crate) pinned: Vec<(FileRange, String)>,
    /// Why the disk may be read but not written.
    pub(crate) not_writable: Option<FormatError>,
    /// What is not known for sure, where both headers or both region tables are damaged. Such a file is
    /// used only where all else of it is whole.
    pub(super) doubt: Option<FormatError>,
    /// Whether a block or a sector bitmap reaches beyond the end of the file.
    is_cut: bool,
    /// The end of the last thing in use. May lie behind the end of the file: a file that is to be
    /// written is first made that long.
    pub(crate) end: FileOffset,
    /// The faults of the block table that do not forbid reading.
    pub(super) faults: Faults,
    /// Whether more blocks keep places for themselves than are listed.
    pub(super) anchors_cut_off: bool,
    /// Whether two things in the file share their bytes.
    pub(super) has_overlaps: bool,
    /// What is in use; `None` of a file that is too long to be looked after.
    pub(super) occupied: Option<Occupied>,
    /// The memory for all this.
    pub(super) memory: Charge,
}

/// Bytes of memory for each block of an open disk: a word here, a byte of what is known of it.
const BYTES_PER_BLOCK: u64 = 5;

/// The same for each free range of the file.
const BYTES_PER_GAP: u64 = 128;

/// A layout that may be unreadable in parts.
#[derive(Debug)]
pub(super) struct Examined {
    /// What there is. Blocks that cannot be read are as if they were not present.
    pub(super) layout: Layout,
    /// Why it cannot be used even for reading.
    pub(super) unreadable: Option<FormatError>,
}

impl Layout {
    /// Reads the metadata of the file in `storage`, whose current header is `header`.
    ///
    /// # Errors
    /// What makes the file unusable even for reading. What forbids only writing is kept in
    /// [`Self::not_writable`].
    pub(crate) fn read(storage: &dyn Storage, header: CurrentHeader) -> Result<Self, LayoutError> {
        let examined = Self::examine(storage, header)?;
        match examined.unreadable {
            Some(error) => Err(error.into()),
            None => Ok(examined.layout),
        }
    }

    /// As [`Self::read`], but goes on where blocks cannot be read.
    ///
    /// # Errors
    /// What leaves nothing to look at.
    pub(super) fn examine(
        storage: &dyn Storage,
        header: CurrentHeader,
    ) -> Result<Examined, LayoutError> {
        let file_len = storage.len()?;
        if file_len < REGION_TABLE_2.plus(REGION_TABLE_LEN).get() {
            return Err(cut("region tables", REGION_TABLE_2.get(), file_len).into());
        }
        let creator = read_creator(storage)?;
        let regions = read_regions(storage)?;
        let (bat, metadata) = regions.table.check()?;
        let log = header.header.log_range();
        let items = read_items(storage, metadata, file_len)?;
        let parameters = Parameters::read(storage, metadata, &items, file_len)?;

        let place = TablePlace {
            bat,
            geometry: parameters.bat_geometry(),
            file_len,
        };
        check_table_fits(&place)?;
        let of_blocks = u64_from_u32(place.geometry.blocks()).saturating_mul(BYTES_PER_BLOCK);
        let memory = Charge::take(of_blocks)?;
        let table = place.read(storage)?;
        let mut unreadable = table.faults.first(Severity::Unreadable);
        let doubt = (header.doubt.clone()).or_else(|| regions.doubt());
        let beyond = place.beyond_end(&table.map, &table.bitmap_blocks).next();
        let is_cut = beyond.is_some();
        let not_writable = table.faults.first(Severity::NotWritable).or(beyond);
        let Table {
            map,
            bitmap_blocks,
            anchors,
            anchors_cut_off,
            faults,
        } = table;
        let pinned = pinned(log, &regions);
        let mut layout = Self {
            header,
            file_len,
            creator,
            log,
            regions,
            bat,
            bat_geometry: place.geometry,
            items,
            disk_len: parameters.disk_len,
            block_size: place.geometry.block_size,
            sector_size: parameters.sector_size,
            physical_sector_size: parameters.physical_sector_size,
            disk_type: parameters.disk_type(),
            parent: parameters.parent,
            map,
            bitmap_blocks,
            anchors,
            pinned,
            not_writable,
            doubt,
            is_cut,
            end: FileOffset::new(MIB),
            faults,
            anchors_cut_off,
            has_overlaps: false,
            occupied: None,
            memory,
        };
        layout.end = layout.find_end();
        let overlap = layout.occupy();
        if layout.not_writable.is_none() {
            layout.not_writable = (overlap)
                .or_else(|| layout.missing_log())
                .or_else(|| layout.far_behind())
                .or_else(|| layout.out_of_bounds());
        }
        if let Some(doubt) = &layout.doubt {
            let other = unreadable.take().or_else(|| layout.not_writable.take());
            unreadable = other.map(|other| hopeless(doubt, &other));
            layout.not_writable = Some(doubt.clone());
        }
        let gaps = (layout.occupied.as_ref()).map_or(0, |occupied| occupied.runs().count());
        let of_gaps = u64_from(gaps).saturating_mul(BYTES_PER_GAP);
        layout.memory.grow(of_gaps)?;
        Ok(Examined { layout, unreadable })
    }

    /// How the image stores its disk.
    pub(crate) fn disk_type(&self) -> DiskType {
        self.disk_type
    }

    /// The file's length, or where its last block ends if QEMU cut that at the disk's end. What lies
    /// further behind the end is damage, and no reason to believe in a longer file; and what was cut off
    /// must not read as zeros.
    pub(super) fn padded_len(&self) -> u64 {
        let beyond = self.end.get().saturating_sub(self.file_len);
        if beyond < self.block_size && !self.is_cut {
            self.file_len.saturating_add(beyond)
        } else {
            self.file_len
        }
    }

    /// The block table with its surroundings.
    pub(super) fn table_place(&self) -> TablePlace {
        TablePlace {
            bat: self.bat,
            geometry: self.bat_geometry,
            file_len: self.file_len,
        }
    }

    /// What was cut off with the end of the file, if any block was.
    pub(super) fn lost(&self) -> Option<Lost> {
        let end = FileOffset::new(self.file_len);
        let has_bits = |block| {
            let bitmap = self.bitmap_blocks.get(&self.bat_geometry.chunk_of(block));
            bitmap.is_none_or(|at| at.plus(BITMAP_BLOCK_LEN) <= end)
        };
        let table = self.table_place();
        let lost = self.map.blocks().filter(|block| {
            let state = self.map.get(*block);
            let beyond = state.slot().and_then(|slot| table.beyond(*block, slot));
            beyond.is_some()
                || matches!(state, BlockState::Present { whole: false, .. }) && !has_bits(*block)
        });
        let mut lost = lost.peekable();
        (lost.peek().is_some()).then(|| Lost::new(lost, self.block_size, self.disk_len))
    }

    /// Why it would not do to make the file as long as it was, so that what was cut off reads as zeros.
    pub(super) fn obstacle(&self) -> Option<&'static str> {
        let end = FileOffset::new(self.file_len);
        let bitmap = |at: &FileOffset| at.plus(BITMAP_BLOCK_LEN) > end;
        if self.bitmap_blocks.values().any(bitmap) {
            return Some("which sectors are its own, and which its parent's, was lost too");
        }
        if self.pinned.iter().any(|(range, _)| range.end() > end) {
            return Some("metadata was lost too");
        }
        let all = u64_from_u32(self.map.len()).saturating_mul(self.block_size);
        let pinned: u64 = self.pinned.iter().map(|(range, _)| range.len).sum();
        // QEMU's fixed disks have room for all blocks, and then the blocks.
        let longest = all.saturating_add(pinned).saturating_mul(2);
        (self.end.get() > longest)
            .then_some("blocks lie further off than this disk's file ever was")
    }

    fn missing_log(&self) -> Option<FormatError> {
        self.log.is_empty().then(|| {
            FormatError::incompatible(
                "a file without a log",
                "open it read-only and copy the data out",
            )
        })
    }

    /// A log or region so far behind the end that no file was ever cut there. Blocks would be put behind
    /// it, and all in between be free space to look after.
    pub(super) fn far_behind(&self) -> Option<FormatError> {
        let end = self.file_len.saturating_add(self.block_size);
        let far = (self.pinned.iter()).find(|(range, _)| range.end().get() >= end)?;
        let found = format!("a place at {}", far.0);
        let expected = format!("one inside the file of {} bytes", self.file_len);
        Some(FormatError::corrupt(far.1.clone(), found, expected))
    }

    /// What takes more memory or time to look after than any disk is worth.
    pub(super) fn out_of_bounds(&self) -> Option<FormatError> {
        let advice = "open it read-only and copy the data out";
        if self.occupied.is_none() {
            let found = format!("a file of {} bytes", self.file_len);
            return Some(FormatError::incompatible(found, advice));
        }
        self.anchors_cut_off.then(|| {
            let found = format!("over {MOST_KEPT} blocks without content that keep their places");
            FormatError::incompatible(found, advice)
        })
    }

    /// The end of the last thing in use.
    fn find_end(&self) -> FileOffset {
        let blocks = (self.map.present()).map(|(_, slot)| slot.plus(self.block_size));
        (self.others().map(|(range, _)| range.end()).chain(blocks))
            .fold(FileOffset::new(MIB), FileOffset::max)
    }

    /// Notes what is in use inside the file; what lies behind its end is damage anyway, but for a last
    /// block that was cut there. The first overlap, if there is one.
    fn occupy(&mut self) -> Option<FormatError> {
        let len = round_up(self.file_len, MIB).saturating_add(self.block_size);
        let mut occupied = Occupied::new(len, MIB)?;
        let mut first: Option<FileOffset> = None;
        for (range, _) in self.unsorted() {
            if let Some(at) = occupied.take(range) {
                first = Some(first.map_or(at, |first| first.min(at)));
            }
        }
        self.occupied = Some(occupied);
        self.has_overlaps = first.is_some();
        first.and_then(|at| self.overlap_at(at))
    }

    /// The first two things that lie at `at`, where nothing overlaps in front of it.
    fn overlap_at(&self, at: FileOffset) -> Option<FormatError> {
        let mut found: Vec<(FileRange, Owner<'_>)> = Vec::new();
        for claim in self.unsorted() {
            if claim.0.start <= at && at < claim.0.end() {
                found.push(claim);
                // Stable, and the blocks come last, in order: as in a list of all.
                found.sort_by_key(|(range, _)| range.start);
                found.truncate(2);
            }
        }
        let (other, one) = (*found.first()?, *found.get(1)?);
        Some(Overlap { one, other }.into())
    }

    /// All that lies in the file.
    pub(super) fn claims(&self) -> Claims<'_> {
        let mut blocks: Vec<_> = (self.map.present())
            .map(|(block, slot)| (slot, block))
            .collect();
        blocks.sort_unstable();
        let mut others: Vec<_> = self.others().collect();
        others.sort_by_key(|(range, _)| *range);
        Claims {
            blocks,
            block_size: self.block_size,
            others,
        }
    }

    /// The same in no order.
    fn unsorted(&self) -> impl Iterator<Item = (FileRange, Owner<'_>)> {
        let blocks = self.map.present().map(|(block, slot)| {
            let range = FileRange::new(slot, self.block_size);
            (range, Owner::Block(block))
        });
        self.others().chain(blocks)
    }

    /// All but the payload blocks.
    fn others(&self) -> impl Iterator<Item = (FileRange, Owner<'_>)> {
        let pinned = (self.pinned.iter()).map(|(range, name)| (*range, Owner::Pinned(name)));
        let bitmaps = self.bitmap_blocks.iter().map(|(chunk, at)| {
            let range = FileRange::new(*at, BITMAP_BLOCK_LEN);
            (range, Owner::Bitmap(*chunk))
        });
        let anchors = self.anchors.iter().map(|(block, at)| {
            let range = FileRange::new(*at, self.block_size);
            (range, Owner::Anchor(*block))
        });
        pinned.chain(bitmaps).chain(anchors)
    }
}

/// What is in doubt, of a file of which more is wrong.
fn hopeless(doubt: &FormatError, other: &FormatError) -> FormatError {
    let (structure, found) = match doubt {
        FormatError::Corrupt {
            structure, found, ..
        } => (structure.clone(), found.clone()),
        other => ("file".to_owned(), other.to_string()),
    };
    let expected = format!(
        "good ones, for the rest is not whole either, so that nothing is to be relied on: {other}"
    );
    FormatError::corrupt(structure, found, expected)
}

/// What something in the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner<'a> {
    /// A payload block.
    Block(BlockIndex),
    /// A chunk's sector bitmap.
    Bitmap(u32),
    /// A place that a block keeps.
    Anchor(BlockIndex),
    /// Something with this name.
    Pinned(&'a str),
}

impl fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(block) => write!(f, "block {block}"),
            Self::Bitmap(chunk) => write!(f, "the sector bitmap of chunk {chunk}"),
            Self::Anchor(block) => write!(f, "the place kept for block {block}"),
            Self::Pinned(name) => f.write_str(name),
        }
    }
}

/// All that lies in a file, sorted.
#[derive(Debug)]
pub(super) struct Claims<'a> {
    blocks: Vec<(FileOffset, BlockIndex)>,
    block_size: u64,
    others: Vec<(FileRange, Owner<'a>)>,
}

impl<'a> Claims<'a> {
    pub(super) fn iter(&self) -> impl Iterator<Item = (FileRange, Owner<'a>)> {
        let blocks = (self.blocks.iter()).map(|(slot, block)| {
            let range = FileRange::new(*slot, self.block_size);
            (range, Owner::Block(*block))
        });
        merged(self.others.iter().copied(), blocks)
    }

    /// Those that overlap.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = Overlap<Owner<'a>>> {
        overlaps(self.iter())
    }
}

/// The space that is neither a block's nor free, sorted.
fn pinned(log: FileRange, regions: &RegionCopies) -> Vec<(FileRange, String)> {
    let first = FileRange::new(IDENTIFIER, MIB);
    let mut pinned = vec![
        (first, "the first MiB of the file".to_owned()),
        (log, "the log".to_owned()),
    ];
    pinned.extend((regions.table.regions().iter()).map(|region| (region.range, region.name())));
    pinned.retain(|(range, _)| !range.is_empty());
    pinned.sort();
    pinned
}

/// That the region has room for the entries that the disk needs, and lies in the file so far.
fn check_table_fits(place: &TablePlace) -> Result<(), FormatError> {
    let needed = place.geometry.entries().saturating_mul(BAT_ENTRY_LEN);
    if needed > place.bat.len {
        return Err(FormatError::corrupt(
            "region table",
            format!("{} bytes for the block table", place.bat.len),
            format!(
                "at least {needed}, for {} bytes in blocks of {}",
                place.geometry.disk_len, place.geometry.block_size
            ),
        ));
    }
    if place.bat.start.plus(needed).get() > place.file_len {
        return Err(cut("block table", place.bat.start.get(), place.file_len));
    }
    Ok(())
}
