//! Reads, writes, zeroing and discarding.
//!
//! # What is held over which I/O
//! Gates (`gate.rs`) are those of one block, one at a time. Shared: while payload is read, overwritten,
//! zeroed or punched, whatever it holds (`in_place.rs`). Exclusively, which keeps readers of that block
//! waiting:
//! * a block's first slot, [`Disk::place`]: while what is not zero of that one request is written to
//!   it, the slot is reserved (which may clean free space, or extend the file, with a sync) and the block
//!   table written; there is nothing else to read in it than zeros;
//! * the first write to sectors of a child's block (`chain.rs`): while up to 2 MiB are copied down,
//!   one sync, and the commit;
//! * a dropped block: while the block table is written;
//! * a block of a VHD without a parent of which not all sectors count: once, while the others are zeroed.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::chain::Source;
use super::gate::Change;
use super::in_place::Zeros;
use super::{Content, Disk, Request, zero};
use crate::error::DiskError;
use crate::image::{MapEdit, Reads};
use crate::map::BlockState;
use crate::units::{
    BlockIndex, DiskOffset, DiskRange, FileOffset, FileRange, low_u32, u64_from, usize_from,
};

/// The one block of a disk without a block table: all of it, with a gate for compaction to watch.
const FLAT: BlockIndex = BlockIndex::new(0);

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

impl Piece {
    /// Its bytes, from the block's start.
    pub(super) fn bytes(&self) -> Range<u64> {
        self.within..self.within + self.len
    }
}

/// What became of a piece that is to be zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeroed {
    /// It is zero.
    Done,
    /// Its block has to change its place, or which of its sectors count.
    NotHere,
}

/// How often a change is tried again on a full host, as long as there was something to make room with.
const ROOM_ATTEMPTS: u32 = 4;

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
        self.note_io();
        let _measured = self.meter().begin(Request::Write);
        if self.geometry().is_flat {
            let _gate = self.gates.shared(FLAT);
            let _change = self.begin_flat(range)?;
            return self.write_file(buf, FileOffset::new(offset));
        }
        self.with_room(|| self.write_pieces(buf, range))
    }

    /// Announces a change of a disk without a block table, whose gate is held.
    fn begin_flat(&self, range: DiskRange) -> Result<Change<'_>, DiskError> {
        self.note_change()?;
        let part = range.start.get()..range.end().get();
        Ok(self.gates.change_in_place(FLAT, part, None))
    }

    /// Does `change`; on a full host again, once what was discarded so far, or taken for moves, has made room.
    fn with_room(&self, change: impl Fn() -> Result<(), DiskError>) -> Result<(), DiskError> {
        let room = || (self.image.room_gained(), self.withheld.ended());
        let mut before = room();
        let mut result = change();
        for attempt in 0..ROOM_ATTEMPTS {
            if !matches!(result, Err(DiskError::NoSpace(_))) {
                break;
            }
            let is_made = matches!(self.image.make_room(before.0), Ok(true));
            // What moves have taken is asked for where nothing else helps, or has not helped.
            let is_let_go = (!is_made || attempt > 0) && self.withheld.let_go(self);
            if !is_made && !is_let_go && self.withheld.ended() == before.1 {
                break;
            }
            // Others may be faster again.
            before = room();
            result = change();
        }
        result
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
        self.note_io();
        let _measured = self.meter().begin(Request::Zero);
        if self.geometry().is_flat {
            let _gate = self.gates.shared(FLAT);
            let at = FileOffset::new(offset);
            if self.is_gone_but_for_ends(offset..offset + len, at, |inner| {
                let end = FileOffset::new(inner.end);
                self.is_host_hole(FileRange::between(FileOffset::new(inner.start), end))
            })? {
                return Ok(());
            }
            let _change = self.begin_flat(range)?;
            return self.zero_file(FileRange::new(at, len)).map(|_| ());
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

    /// Announces that `block` is about to change in a way that nobody can follow who watches it. Its gate is
    /// held exclusively.
    fn begin_change(&self, block: BlockIndex) -> Result<Change<'_>, DiskError> {
        self.note_change()?;
        Ok(self.gates.change(block))
    }

    fn write_piece(&self, data: &[u8], piece: Piece) -> Result<(), DiskError> {
        let zeros = Zeros::of(data, piece);
        // What changes between the two leaves less to be done: a block gets a slot, or a whole one.
        while !self.write_in_place(data, piece, zeros)? {
            let _gate = self.gates.exclusive(piece.block);
            let state = self.image.map().get(piece.block);
            if matches!(state, BlockState::Present { whole: true, .. }) {
                continue;
            }
            let _change = self.begin_change(piece.block)?;
            match state {
                BlockState::NotPresent if self.is_backed(piece.block) => {
                    return self.place_over_parent(Source::Data(data), piece);
                }
                BlockState::NotPresent | BlockState::Zero => return self.place(data, piece),
                BlockState::Present { slot, .. } if self.parent().is_some() => {
                    return self.write_sectors(Source::Data(data), piece, slot);
                }
                BlockState::Present { .. } => self.image.make_whole(piece.block)?,
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

    pub(super) fn disk_range(&self, piece: Piece) -> DiskRange {
        let start = self.offset_of(piece.block) + piece.within;
        DiskRange::new(DiskOffset::new(start), piece.len)
    }

    fn zero_piece(&self, piece: Piece) -> Result<(), DiskError> {
        while self.zero_in_place(piece)? == Zeroed::NotHere {
            let _gate = self.gates.exclusive(piece.block);
            let reads = self.reads_when_dropped(piece.block);
            let is_dead = || piece.whole || self.tracker.content(piece.block) == Content::Dead;
            match (self.image.map().get(piece.block), reads) {
                (BlockState::Zero, _) => return Ok(()),
                (BlockState::NotPresent, _) if self.parent_is_hole(self.disk_range(piece)) => {
                    return Ok(());
                }
                (BlockState::NotPresent, Some(reads)) if piece.whole => {
                    let _change = self.begin_change(piece.block)?;
                    return self.drop_block(piece.block, reads);
                }
                (BlockState::NotPresent, _) => {
                    let _change = self.begin_change(piece.block)?;
                    return self.place_over_parent(Source::Zeros, piece);
                }
                (BlockState::Present { .. }, Some(reads)) if is_dead() => {
                    let _change = self.begin_change(piece.block)?;
                    return self.drop_block(piece.block, reads);
                }
                (BlockState::Present { slot, whole: false }, _)
                    if self.parent().is_some() && !self.covers(piece)? =>
                {
                    let _change = self.begin_change(piece.block)?;
                    return self.write_sectors(Source::Zeros, piece, slot);
                }
                // Somebody gave it a slot meanwhile, or wrote to it.
                (BlockState::Present { .. }, _) => {}
            }
        }
        Ok(())
    }

    /// Takes the slot of a block, if it has one. The gate is held exclusively.
    fn drop_block(&self, block: BlockIndex, reads: Reads) -> Result<(), DiskError> {
        self.image.commit(&[MapEdit::Drop { block, reads }])?;
        self.tracker.forget(block);
        // Who was woken when it began may have looked too early.
        self.changes.note();
        Ok(())
    }

    /// Zeroes a range of the host file, by a hole where that is on and possible; says whether the
    /// host space is gone.
    pub(super) fn zero_file(&self, range: FileRange) -> Result<bool, DiskError> {
        let storage = self.image.storage();
        let punched = if self.may_punch() {
            match storage.punch_hole(range) {
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                    self.host_punches.store(false, Ordering::Relaxed);
                    Ok(false)
                }
                other => other.map(|()| true),
            }
        } else {
            Ok(false)
        };
        let zeroed = match punched {
            Ok(false) => storage.write_zeroes(range).map(|()| false),
            other => other,
        };
        // If it failed, a part may be zero.
        self.image.note_payload();
        zeroed.map_err(|error| DiskError::io("zero a range", error))
    }

    /// Whether holes are punched, and the host has not said yet that it cannot.
    pub(super) fn may_punch(&self) -> bool {
        self.punch_holes && self.host_punches.load(Ordering::Relaxed)
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
