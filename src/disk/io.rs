//! Reads, writes, zeroing and discarding.

use super::{Content, Disk};
use crate::disk::zero;
use crate::error::DiskError;
use crate::image::{MapEdit, Reads};
use crate::map::BlockState;
use crate::units::{
    BlockIndex, DiskRange, FileOffset, FileRange, SECTOR_SIZE, low_u32, u64_from, usize_from,
};

/// Runs of zeros from this length on are punched out of the host file instead of written, where
/// hole punching is on. Shorter ones would cost more in calls and fragments than they give back at
/// once; an idle compaction gives those back too.
const PUNCH_RUN: usize = 64 << 10;

/// The part of a request that falls into one block.
#[derive(Clone, Copy, Debug)]
struct Piece {
    block: BlockIndex,
    /// Offset inside the block.
    within: u64,
    len: u64,
    /// Whether it covers all of the block that the disk has.
    whole: bool,
}

impl Disk {
    /// Fills `buf` from disk offset `offset` on. Any alignment.
    ///
    /// # Errors
    /// [`DiskError::OutOfRange`]; [`DiskError::Io`] where the host cannot read.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let range = self.range(offset, u64_from(buf.len()))?;
        self.note_io();
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
        if self.geometry().is_flat {
            return self.write_file(buf, FileOffset::new(offset));
        }
        match self.write_pieces(buf, range) {
            // On a full host, what was discarded so far has to do.
            Err(DiskError::NoSpace(source)) => match self.image.make_room() {
                Ok(true) => self.write_pieces(buf, range),
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

    /// Makes `len` bytes from disk offset `offset` on read as zeros. Whole blocks lose their place
    /// in the file; parts of blocks are punched out of it or overwritten.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let range = self.range(offset, len)?;
        self.image.check_writable()?;
        self.note_change();
        if self.geometry().is_flat {
            self.zero_file(FileRange::new(FileOffset::new(offset), len))?;
            self.image.note_payload();
            return Ok(());
        }
        self.pieces(range)
            .try_for_each(|piece| self.zero_piece(piece))
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
        match self.image.map().get(piece.block) {
            BlockState::NotPresent | BlockState::Zero => {
                buf.fill(0);
                Ok(())
            }
            BlockState::Present { slot, whole: true } => {
                self.read_file(buf, self.geometry().data_at(slot).plus(piece.within))
            }
            BlockState::Present { slot, whole: false } => self.read_written(buf, piece, slot),
        }
    }

    /// Reads from a block of which only the sectors that its bitmap names are in the slot.
    fn read_written(
        &self,
        buf: &mut [u8],
        piece: Piece,
        slot: FileOffset,
    ) -> Result<(), DiskError> {
        let bitmap = self.image.sector_bitmap(piece.block)?;
        let data = self.geometry().data_at(slot);
        let end = piece.within + piece.len;
        let mut at = piece.within;
        let mut rest = buf;
        while at < end {
            let sector = at / SECTOR_SIZE;
            let run_end = bitmap.run_end(sector, end.div_ceil(SECTOR_SIZE)) * SECTOR_SIZE;
            let stop = run_end.min(end);
            let (part, tail) = rest.split_at_mut(usize_from(stop - at));
            rest = tail;
            if bitmap.is_written(sector) {
                self.read_file(part, data.plus(at))?;
            } else {
                part.fill(0);
            }
            at = stop;
        }
        Ok(())
    }

    fn write_piece(&self, data: &[u8], piece: Piece) -> Result<(), DiskError> {
        let zeros = zero::has_zero_granule(data, piece.within);
        if !zeros || zero::is_zero(data) {
            let _gate = self.gates.shared(piece.block);
            match self.image.map().get(piece.block) {
                BlockState::NotPresent if zeros => return Ok(()),
                BlockState::Present { slot, whole: true } if !zeros => {
                    self.gates.touch(piece.block);
                    return self.overwrite(data, piece, slot);
                }
                _ => {}
            }
        }
        let _gate = self.gates.exclusive(piece.block);
        self.gates.touch(piece.block);
        match self.image.map().get(piece.block) {
            BlockState::NotPresent | BlockState::Zero => self.place(data, piece),
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
        let BlockState::Present { slot, .. } = self.image.map().get(piece.block) else {
            return Ok(());
        };
        self.gates.touch(piece.block);
        if !piece.whole {
            // Sectors that are not in the slot read as zeros whatever the bytes there are.
            let at = self.geometry().data_at(slot).plus(piece.within);
            self.tracker
                .note_unknown(piece.block, piece.within, piece.len);
            let punched = self.zero_file(FileRange::new(at, piece.len))?;
            self.image.note_payload();
            self.tracker
                .note_zero(piece.block, piece.within, piece.len, !punched);
            if self.tracker.content(piece.block) != Content::Dead {
                return Ok(());
            }
        }
        self.image.commit(&[MapEdit::Drop {
            block: piece.block,
            reads: Reads::Zeros,
        }])?;
        self.tracker.forget(piece.block);
        Ok(())
    }

    /// Zeroes a range of the host file, by a hole where that is on and possible; says whether the
    /// host space is gone.
    fn zero_file(&self, range: FileRange) -> Result<bool, DiskError> {
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

    fn read_file(&self, buf: &mut [u8], at: FileOffset) -> Result<(), DiskError> {
        self.image
            .storage()
            .read_exact_at(buf, at)
            .map_err(|error| DiskError::io("read a block", error))
    }

    fn write_file(&self, data: &[u8], at: FileOffset) -> Result<(), DiskError> {
        let written = self.image.storage().write_all_at(data, at);
        // A failed write may have written a part.
        self.image.note_payload();
        written.map_err(|error| DiskError::io("write a block", error))
    }
}
