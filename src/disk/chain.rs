//! A disk over a parent: what shows where the image has nothing, and writing over it.
//!
//! Reads resolve sector by sector: what the image does not have, the parent is asked for, and so on.
//!
//! # Writing over a parent
//! A sector of a child counts only once its bit (or its block's entry) says so, and the bit may be
//! in the file only once the sector's bytes are durable: else a power cut could show what happened to
//! lie there instead of the parent's sector. And it must be in the file before the write is
//! acknowledged, for that must survive the death of this process. So the first write to a sector
//! costs a sync. Two things keep those rare:
//! * where the parent has nothing but zeros, a child's block is as good as one of a disk without a
//!   parent, and needs none;
//! * with the sectors written, some around them are copied down from the parent: an aligned
//!   window of 64 KiB at first, and then as much as the block already has, up to 2 MiB. A block of
//!   2 MiB takes at most six syncs to fill, one of 32 MiB twenty-one, however small the writes.
//!
//! Concurrent writers share syncs; a writer waits with its block's gate held.

use std::ops::Range;

use super::io::Piece;
use super::{Disk, zero};
use crate::error::DiskError;
use crate::format::sector_bitmap::SectorBitmap;
use crate::image::{MapEdit, Reads};
use crate::map::BlockState;
use crate::units::{
    BlockIndex, DiskOffset, DiskRange, FileOffset, FileRange, round_down, round_up, u64_from,
    usize_from,
};

/// The least that is copied down around a first write, and the most.
const WINDOW: std::ops::RangeInclusive<u64> = 64 << 10..=2 << 20;
/// Bytes that are copied down at a time.
const COPY_PIECE: u64 = 256 << 10;

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    Data(&'a [u8]),
    Zeros,
}

/// What of a block is copied down from the parent with a write, in bytes from the block's start.
#[derive(Clone, Debug)]
struct Fill {
    /// All that is in the slot afterwards: whole sectors, the written part among them.
    all: Range<u64>,
    /// The same in sectors.
    sectors: Range<u64>,
    /// Where the disk ends in the block: nothing is copied down beyond.
    disk_end: u64,
}

impl Disk {
    /// Reads from `block` as a guest sees it, from `within` on. Its gate is held.
    pub(crate) fn read_block(
        &self,
        buf: &mut [u8],
        block: BlockIndex,
        within: u64,
    ) -> Result<(), DiskError> {
        match self.image.map().get(block) {
            BlockState::NotPresent => self.read_parent(buf, self.offset_of(block) + within),
            BlockState::Zero => {
                buf.fill(0);
                Ok(())
            }
            BlockState::Present { slot, whole: true } => {
                self.read_file(buf, self.geometry().data_at(slot).plus(within))
            }
            BlockState::Present { slot, whole: false } => {
                self.read_written(buf, block, within, slot)
            }
        }
    }

    /// Reads from a block of which only the sectors that its bitmap names are in the slot.
    fn read_written(
        &self,
        buf: &mut [u8],
        block: BlockIndex,
        within: u64,
        slot: FileOffset,
    ) -> Result<(), DiskError> {
        let bitmap = self.image.sector_bitmap(block)?;
        let data = self.geometry().data_at(slot);
        let start = self.offset_of(block);
        let mut rest = buf;
        for (part, is_written) in self.runs(&bitmap, within..within + u64_from(rest.len())) {
            let (piece, tail) = rest.split_at_mut(usize_from(part.end - part.start));
            rest = tail;
            if is_written {
                self.read_file(piece, data.plus(part.start))?;
            } else {
                self.read_parent(piece, start + part.start)?;
            }
        }
        Ok(())
    }

    /// Reads what the parent has from disk offset `offset` on: zeros beyond its end, or without one.
    pub(crate) fn read_parent(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let Some(parent) = self.parent() else {
            buf.fill(0);
            return Ok(());
        };
        let inside = parent.len().saturating_sub(offset).min(u64_from(buf.len()));
        let (inside, beyond) = buf.split_at_mut(usize_from(inside));
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        parent.read_at(inside, offset)
    }

    /// Whether `range` surely reads as zeros where the image has nothing.
    pub(crate) fn parent_is_hole(&self, range: DiskRange) -> bool {
        self.parent().is_none_or(|parent| parent.is_hole(range))
    }

    /// Whether the parent may have data somewhere in `block`.
    pub(super) fn is_backed(&self, block: BlockIndex) -> bool {
        let range = DiskRange::new(
            DiskOffset::new(self.offset_of(block)),
            self.geometry().block_size,
        );
        !self.parent_is_hole(range)
    }

    /// What `block` may lose its slot for when all of it is zero, if it may.
    pub(crate) fn reads_when_dropped(&self, block: BlockIndex) -> Option<Reads> {
        let geometry = self.geometry();
        if geometry.disk_type == crate::format::DiskType::Fixed {
            return None;
        }
        if geometry.has_zero_state || self.parent().is_none() {
            return Some(Reads::Zeros);
        }
        (!self.is_backed(block)).then_some(Reads::Parent)
    }

    /// Where `block` starts on the disk.
    pub(crate) fn offset_of(&self, block: BlockIndex) -> u64 {
        u64::from(block.get()) * self.geometry().block_size
    }

    /// Whether all sectors that `piece` touches are in the slot of its block, which is present.
    pub(super) fn covers(&self, piece: Piece) -> Result<bool, DiskError> {
        let bitmap = self.image.sector_bitmap(piece.block)?;
        let all = self.runs(&bitmap, piece.within..piece.within + piece.len);
        Ok({ all }.all(|(_, is_written)| is_written))
    }

    /// The runs of equal bits in `bytes` of a block.
    pub(crate) fn runs(
        &self,
        bitmap: &SectorBitmap,
        bytes: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, bool)> {
        let sector_size = self.geometry().sector_size;
        let mut at = bytes.start;
        std::iter::from_fn(move || {
            if at >= bytes.end {
                return None;
            }
            let sector = at / sector_size;
            let end = bitmap.run_end(sector, bytes.end.div_ceil(sector_size)) * sector_size;
            let part = at..end.min(bytes.end);
            at = part.end;
            Some((part, bitmap.is_written(sector)))
        })
    }

    /// The parts of `bytes` of `block` that are in its slot; the parent shows in the others. Its gate is
    /// held.
    pub(crate) fn written_parts(
        &self,
        block: BlockIndex,
        bytes: Range<u64>,
    ) -> Result<Vec<Range<u64>>, DiskError> {
        match self.image.map().get(block) {
            BlockState::Present { whole: true, .. } => Ok(vec![bytes]),
            BlockState::Present { whole: false, .. } => {
                let bitmap = self.image.sector_bitmap(block)?;
                let written = self.runs(&bitmap, bytes).filter(|(_, written)| *written);
                Ok(written.map(|(part, _)| part).collect())
            }
            BlockState::NotPresent | BlockState::Zero => Ok(Vec::new()),
        }
    }

    /// What a first write to `piece` fills, in a block of which `present` bytes are there already.
    fn fill_for(&self, piece: Piece, source: Source<'_>, present: u64) -> Fill {
        let geometry = self.geometry();
        let sector = geometry.sector_size;
        let window = match source {
            Source::Data(_) => present
                .next_power_of_two()
                .clamp(*WINDOW.start(), *WINDOW.end()),
            // Zeros take no space, which nobody wants for what surrounds them.
            Source::Zeros => sector,
        };
        let window = window.min(geometry.block_size).max(sector);
        let disk_end = (self.len() - self.offset_of(piece.block)).min(geometry.block_size);
        let mut end = round_up(piece.within + piece.len, window);
        if end >= disk_end {
            // The sectors of the last block that the disk does not have count as written.
            end = geometry.block_size;
        }
        let all = round_down(piece.within, window)..end;
        Fill {
            sectors: all.start / sector..all.end / sector,
            all,
            disk_end,
        }
    }

    /// Gives a block without a slot, over a parent that has data there, its first one. The gate is
    /// held exclusively.
    pub(super) fn place_over_parent(
        &self,
        source: Source<'_>,
        piece: Piece,
    ) -> Result<(), DiskError> {
        let fill = self.fill_for(piece, source, 0);
        let is_whole = fill.all == (0..self.geometry().block_size);
        let sectors = (!is_whole).then(|| fill.sectors.clone());
        let slot = self.image.reserve()?;
        let ready = self
            .fill(source, piece, &fill, slot, None)
            .and_then(|is_written| {
                self.image.prepare(slot, sectors.clone())?;
                // A slot as it was reserved is durably zero: nothing to wait for.
                if is_written {
                    self.image.sync()
                } else {
                    Ok(())
                }
            });
        if let Err(error) = ready {
            self.image.give_back(slot);
            return Err(error);
        }
        self.meter().note_allocated();
        self.tracker.forget(piece.block);
        self.tracker.news().note(piece.block);
        if matches!(source, Source::Zeros) {
            (self.tracker).note_zero(piece.block, piece.within, piece.len, false);
        }
        self.image.commit(&[MapEdit::Place {
            block: piece.block,
            slot,
            sectors,
        }])
    }

    /// Writes to a block of which some sectors show the parent. The gate is held exclusively.
    pub(super) fn write_sectors(
        &self,
        source: Source<'_>,
        piece: Piece,
        slot: FileOffset,
    ) -> Result<(), DiskError> {
        let bitmap = self.image.sector_bitmap(piece.block)?;
        let block_size = self.geometry().block_size;
        let present: u64 = (self.runs(&bitmap, 0..block_size))
            .filter(|(_, is_written)| *is_written)
            .map(|(part, _)| part.end - part.start)
            .sum();
        let fill = self.fill_for(piece, source, present);
        self.tracker
            .note_unknown(piece.block, fill.all.start, fill.all.end - fill.all.start);
        self.fill(source, piece, &fill, slot, Some(&bitmap))?;
        if { self.runs(&bitmap, fill.all.clone()) }.all(|(_, is_written)| is_written) {
            return Ok(());
        }
        self.image.sync()?;
        self.image.commit(&[MapEdit::Write {
            block: piece.block,
            sectors: fill.sectors,
        }])?;
        if matches!(source, Source::Zeros) {
            let stored = !self.may_punch();
            (self.tracker).note_zero(piece.block, piece.within, piece.len, stored);
        }
        Ok(())
    }

    /// Writes `source` to the slot, and around it what the parent has. In a new slot, which reads as
    /// zeros, there is no `bitmap`, and zeros are not written; says whether anything was.
    fn fill(
        &self,
        source: Source<'_>,
        piece: Piece,
        fill: &Fill,
        slot: FileOffset,
        bitmap: Option<&SectorBitmap>,
    ) -> Result<bool, DiskError> {
        let written = piece.within..piece.within + piece.len;
        let before = self.copy_down(piece.block, fill.all.start..written.start, slot, bitmap)?;
        let after = self.copy_down(
            piece.block,
            written.end..fill.all.end.min(fill.disk_end),
            slot,
            bitmap,
        )?;
        let at = self.geometry().data_at(slot).plus(piece.within);
        let wrote = match source {
            Source::Data(data) if bitmap.is_none() => {
                let runs = zero::runs(data, piece.within).filter(|run| !run.zero);
                runs.map(|run| {
                    let part = &data[run.start..run.start + run.len];
                    self.write_file(part, at.plus(u64_from(run.start)))
                })
                .try_fold(false, |_, result| result.map(|()| true))?
            }
            Source::Data(data) => self.write_file(data, at).map(|()| true)?,
            Source::Zeros if bitmap.is_none() => false,
            Source::Zeros => {
                self.zero_file(FileRange::new(at, piece.len))?;
                true
            }
        };
        Ok(before || after || wrote)
    }

    /// Copies from the parent to the slot what of `bytes` is not there yet; says whether it wrote.
    fn copy_down(
        &self,
        block: BlockIndex,
        bytes: Range<u64>,
        slot: FileOffset,
        bitmap: Option<&SectorBitmap>,
    ) -> Result<bool, DiskError> {
        let missing: Vec<Range<u64>> = match bitmap {
            None => std::iter::once(bytes).collect(),
            Some(bitmap) => (self.runs(bitmap, bytes))
                .filter(|(_, is_written)| !is_written)
                .map(|(part, _)| part)
                .collect(),
        };
        let data = self.geometry().data_at(slot);
        let mut wrote = false;
        let mut buf = Vec::new();
        for part in missing {
            let mut at = part.start;
            while at < part.end {
                let len = COPY_PIECE.min(part.end - at);
                buf.resize(usize_from(len), 0);
                self.read_parent(&mut buf, self.offset_of(block) + at)?;
                if bitmap.is_some() || !zero::is_zero(&buf) {
                    self.write_file(&buf, data.plus(at))?;
                    wrote = true;
                }
                at += len;
            }
        }
        Ok(wrote)
    }
}
