//! Reads, writes, zeroing and discarding.

use super::chain::Source;
use super::{Content, Disk, Request};
use crate::disk::zero;
use crate::error::DiskError;
use crate::image::{MapEdit, Reads};
use crate::map::BlockState;
use crate::units::{
    BlockIndex, DiskOffset, DiskRange, FileOffset, FileRange, low_u32, u64_from, usize_from,
};

/// Runs of zeros from this length on are punched out of the host file instead of written, where
/// hole punching is on. Shorter ones would cost more in calls and fragments than they give back at
/// once; an idle compaction gives those back too.
const PUNCH_RUN: usize = 64 << 10;

/// The part of a request that falls into one block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) block: BlockIndex,
    /// Offset inside the block.
    pub(super) within: u64,
    pub(super) len: u64,
    /// Whether it covers all of the block that the disk has.
    pub(super) whole: bool,
}

impl Disk {
    /// Fills `buf` from disk offset `offset` on. Any alignment.
    ///
    /// # Errors
    /// [`DiskError::OutOfRange`]; [`DiskError::Io`] where the host cannot read.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.note_io();
        let _measured = self.meter().begin(Request::Read);
        self.read_quietly(buf, offset)
    }

    /// As [`Self::read_at`], for background work: the disk stays as idle as it is.
    pub(crate) fn read_quietly(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let range = self.range(offset, u64_from(buf.len()))?;
        if self.geometry().is_flat {
            return self.read_file(buf, FileOffset::new(offset));
        }
        let mut rest = buf;
        for piece in self.pieces(range) {
            let (part, tail) = rest.split_at_mut(usize_from(piece.len));
            rest = tail;
            self.read_piece(part, piece)?;
        }
        Ok(())
    }

    /// Writes `buf` at disk offset `offset`. Any alignment. See the module for what is durable.
    ///
    /// # Errors
    /// [`DiskError::OutOfRange`], [`DiskError::ReadOnly`], [`DiskError::NoSpace`],
    /// [`DiskError::Poisoned`], [`DiskError::Io`].
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        let range = self.range(offset, u64_from(buf.len()))?;
        self.image.check_writable()?;
        self.note_change();
        let _measured = self.meter().begin(Request::Write);
        if self.geometry().is_flat {
            return self.change_flat(|| self.write_file(buf, FileOffset::new(offset)));
        }
        self.with_room(|| self.write_pieces(buf, range))
    }

    /// Changes a disk without a block table. It has one gate, for compaction to watch.
    fn change_flat(&self, change: impl Fn() -> Result<(), DiskError>) -> Result<(), DiskError> {
        let all = BlockIndex::new(0);
        let _gate = self.gates.shared(all);
        self.begin_change(all)?;
        change()
    }

    /// Does `change`; on a full host again, once what was discarded so far has made room.
    fn with_room(&self, change: impl Fn() -> Result<(), DiskError>) -> Result<(), DiskError> {
        match change() {
            Err(DiskError::NoSpace(source)) => match self.image.make_room() {
                Ok(true) => change(),
                Ok(false) | Err(_) => Err(DiskError::NoSpace(source)),
            },
            other => other,
        }
    }

    fn write_pieces(&self, buf: &[u8], range: DiskRange) -> Result<(), DiskError> {
        let mut rest = buf;
        for piece in self.pieces(range) {
            let (part, tail) = rest.split_at(usize_from(piece.len));
            rest = tail;
            self.write_piece(part, piece)?;
        }
        Ok(())
    }

    /// Makes `len` bytes from disk offset `offset` on read as zeros, whatever a parent has there.
    /// Whole blocks lose their place in the file where the format can say so; parts of blocks are
    /// punched out of it or overwritten.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let range = self.range(offset, len)?;
        self.image.check_writable()?;
        self.note_change();
        let _measured = self.meter().begin(Request::Zero);
        if self.geometry().is_flat {
            let range = FileRange::new(FileOffset::new(offset), len);
            return self.change_flat(|| {
                self.zero_file(range)?;
                self.image.note_payload();
                Ok(())
            });
        }
        self.with_room(|| {
            self.pieces(range)
                .try_for_each(|piece| self.zero_piece(piece))
        })
    }

    /// Says that the guest no longer needs `len` bytes from disk offset `offset` on. They read as
    /// zeros afterwards, as with [`Self::write_zeroes`].
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len)
    }

    /// Makes everything that was written before durable. Costs one host sync, or none where nothing
    /// was written since the last.
    ///
    /// # Errors
    /// A failed sync poisons the disk: it is unknown what is on the host, so that every further
    /// change fails with [`DiskError::Poisoned`] until the disk is reopened.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.note_io();
        let _measured = self.meter().begin(Request::Flush);
        self.image.sync()
    }

    fn pieces(&self, range: DiskRange) -> impl Iterator<Item = Piece> + use<> {
        let geometry = *self.geometry();
        let end = range.end().get();
        let mut at = range.start.get();
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let block = at / geometry.block_size;
            let within = at % geometry.block_size;
            let len = (geometry.block_size - within).min(end - at);
            at += len;
            let whole = within == 0 && (len == geometry.block_size || at == geometry.disk_len);
            Some(Piece {
                block: BlockIndex::new(low_u32(block)),
                within,
                len,
                whole,
            })
        })
    }

    fn read_piece(&self, buf: &mut [u8], piece: Piece) -> Result<(), DiskError> {
        let _gate = self.gates.shared(piece.block);
        self.read_block(buf, piece.block, piece.within)
    }

    /// Announces that `block` is about to change, to whoever watches it and to the image. Not called
    /// for what changes nothing: a disk that was only trimmed where it had nothing stays what its
    /// children know it as.
    fn begin_change(&self, block: BlockIndex) -> Result<(), DiskError> {
        self.image.begin_change()?;
        self.gates.touch(block);
        Ok(())
    }

    fn write_piece(&self, data: &[u8], piece: Piece) -> Result<(), DiskError> {
        let zeros = zero::has_zero_granule(data, piece.within);
        if (!zeros || zero::is_zero(data)) && self.write_in_place(data, piece, zeros)? {
            return Ok(());
        }
        let _gate = self.gates.exclusive(piece.block);
        self.begin_change(piece.block)?;
        match self.image.map().get(piece.block) {
            BlockState::NotPresent if self.is_backed(piece.block) => {
                self.place_over_parent(Source::Data(data), piece)
            }
            BlockState::NotPresent | BlockState::Zero => self.place(data, piece),
            BlockState::Present { slot, whole: false } if self.parent().is_some() => {
                self.write_sectors(Source::Data(data), piece, slot)
            }
            BlockState::Present { slot, whole } => {
                if !whole {
                    self.image.make_whole(piece.block)?;
                }
                if zeros {
                    self.overwrite_with_zeros(data, piece, slot)
                } else {
                    self.overwrite(data, piece, slot)
                }
            }
        }
    }

    /// Writes what changes no more than data, under the shared gate; says whether it was that.
    fn write_in_place(&self, data: &[u8], piece: Piece, zeros: bool) -> Result<bool, DiskError> {
        let _gate = self.gates.shared(piece.block);
        let slot = match self.image.map().get(piece.block) {
            BlockState::NotPresent if zeros => return Ok(!self.is_backed(piece.block)),
            BlockState::Zero if zeros => return Ok(true),
            BlockState::Present { slot, whole: true } if !zeros => slot,
            BlockState::Present { slot, whole: false }
                if !zeros && self.parent().is_some() && self.covers(piece)? =>
            {
                slot
            }
            _ => return Ok(false),
        };
        self.begin_change(piece.block)?;
        self.overwrite(data, piece, slot).map(|()| true)
    }

    /// Writes data without a whole zero granule into a whole block. The gate is held.
    fn overwrite(&self, data: &[u8], piece: Piece, slot: FileOffset) -> Result<(), DiskError> {
        self.tracker.note_data(piece.block, piece.within, piece.len);
        let at = self.geometry().data_at(slot).plus(piece.within);
        self.write_file(data, at).inspect_err(|_| {
            self.tracker
                .note_unknown(piece.block, piece.within, piece.len)
        })
    }

    /// Writes data with zero granules into a whole block, keeping book of them. The gate is held
    /// exclusively, so that zeros noted here are not overwritten before they are.
    fn overwrite_with_zeros(
        &self,
        data: &[u8],
        piece: Piece,
        slot: FileOffset,
    ) -> Result<(), DiskError> {
        let at = self.geometry().data_at(slot);
        // In doubt until all is written.
        self.tracker
            .note_unknown(piece.block, piece.within, piece.len);
        let runs: Vec<zero::Run> = zero::runs(data, piece.within).collect();
        let punched = |run: &zero::Run| run.zero && run.len >= PUNCH_RUN && self.punch_holes;
        if runs.iter().any(punched) {
            for run in &runs {
                let place = at.plus(piece.within + u64_from(run.start));
                if punched(run) {
                    self.zero_file(FileRange::new(place, u64_from(run.len)))?;
                    self.image.note_payload();
                } else {
                    self.write_file(&data[run.start..run.start + run.len], place)?;
                }
            }
        } else {
            self.write_file(data, at.plus(piece.within))?;
        }
        for run in &runs {
            let within = piece.within + u64_from(run.start);
            if run.zero {
                self.tracker
                    .note_zero(piece.block, within, u64_from(run.len), !punched(run));
            } else {
                self.tracker
                    .note_data(piece.block, within, u64_from(run.len));
            }
        }
        Ok(())
    }

    /// Gives a block its first slot and writes `data` there. The gate is held exclusively.
    fn place(&self, data: &[u8], piece: Piece) -> Result<(), DiskError> {
        let slot = self.image.reserve()?;
        let at = self.geometry().data_at(slot);
        // The slot reads as zeros: only what is not zero is written.
        let runs: Vec<zero::Run> = zero::runs(data, piece.within)
            .filter(|run| !run.zero)
            .collect();
        let written = self.image.prepare(slot, None).and_then(|()| {
            runs.iter().try_for_each(|run| {
                let place = at.plus(piece.within + u64_from(run.start));
                self.write_file(&data[run.start..run.start + run.len], place)
            })
        });
        if let Err(error) = written {
            self.image.give_back(slot);
            return Err(error);
        }
        self.meter().note_allocated();
        self.tracker.set_fresh(piece.block);
        for run in &runs {
            let within = piece.within + u64_from(run.start);
            self.tracker
                .note_data(piece.block, within, u64_from(run.len));
        }
        self.image.commit(&[MapEdit::Place {
            block: piece.block,
            slot,
            sectors: None,
        }])
    }

    fn zero_piece(&self, piece: Piece) -> Result<(), DiskError> {
        let _gate = self.gates.exclusive(piece.block);
        let range = DiskRange::new(
            DiskOffset::new(self.offset_of(piece.block) + piece.within),
            piece.len,
        );
        match self.image.map().get(piece.block) {
            BlockState::Zero => Ok(()),
            BlockState::NotPresent if self.parent_is_hole(range) => Ok(()),
            BlockState::NotPresent => {
                self.begin_change(piece.block)?;
                match self.reads_when_dropped(piece.block) {
                    Some(reads) if piece.whole => self.drop_block(piece.block, reads),
                    _ => self.place_over_parent(Source::Zeros, piece),
                }
            }
            BlockState::Present { slot, whole } => {
                self.begin_change(piece.block)?;
                self.zero_present(piece, slot, whole)
            }
        }
    }

    fn zero_present(&self, piece: Piece, slot: FileOffset, whole: bool) -> Result<(), DiskError> {
        let reads = self.reads_when_dropped(piece.block);
        if let Some(reads) = reads
            && piece.whole
        {
            return self.drop_block(piece.block, reads);
        }
        if !whole && self.parent().is_some() {
            return self.write_sectors(Source::Zeros, piece, slot);
        }
        // Sectors that are not in the slot read as zeros whatever the bytes there are.
        let at = self.geometry().data_at(slot).plus(piece.within);
        self.tracker
            .note_unknown(piece.block, piece.within, piece.len);
        let punched = self.zero_file(FileRange::new(at, piece.len))?;
        self.image.note_payload();
        self.tracker
            .note_zero(piece.block, piece.within, piece.len, !punched);
        match reads {
            Some(reads) if self.tracker.content(piece.block) == Content::Dead => {
                self.drop_block(piece.block, reads)
            }
            _ => Ok(()),
        }
    }

    /// Takes the slot of a block, if it has one. The gate is held exclusively.
    fn drop_block(&self, block: BlockIndex, reads: Reads) -> Result<(), DiskError> {
        self.image.commit(&[MapEdit::Drop { block, reads }])?;
        self.tracker.forget(block);
        Ok(())
    }

    /// Zeroes a range of the host file, by a hole where that is on and possible; says whether the
    /// host space is gone.
    pub(super) fn zero_file(&self, range: FileRange) -> Result<bool, DiskError> {
        let storage = self.image.storage();
        let punched = if self.punch_holes {
            match storage.punch_hole(range) {
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(false),
                other => other.map(|()| true),
            }
        } else {
            Ok(false)
        };
        match punched {
            Ok(false) => storage.write_zeroes(range).map(|()| false),
            other => other,
        }
        .map_err(|error| DiskError::io("zero a range", error))
    }

    pub(super) fn read_file(&self, buf: &mut [u8], at: FileOffset) -> Result<(), DiskError> {
        self.image
            .storage()
            .read_exact_at(buf, at)
            .map_err(|error| DiskError::io("read a block", error))
    }

    pub(super) fn write_file(&self, data: &[u8], at: FileOffset) -> Result<(), DiskError> {
        let written = self.image.storage().write_all_at(data, at);
        // A failed write may have written a part.
        self.image.note_payload();
        written.map_err(|error| DiskError::io("write a block", error))
    }
}
