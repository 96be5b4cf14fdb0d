//! Changes of a block that stays where it is, under its shared gate.
//!
//! Data, zeros among it, and zeroed parts go straight to the block's slot, and to the copy of it that is
//! made while it moves ([`Mirror`]). What reads as zeros afterwards is found out without keeping
//! anybody off: who writes or punches zeros watches that part of the block, and what nobody else touched is
//! known to be zero when he concludes. A write that may have met such a watch notes its data again once it is
//! in the file (`gate.rs`).
//!
//! Nothing is done for zeros where zeros are known to be already, and that the host has their space back.
//! Such a request changes nothing: neither is it announced.

use std::ops::Range;

use super::gate::{Change, Watch};
use super::io::{Piece, Zeroed};
use super::mirror::Mirror;
use super::tracker::Stored;
use super::{Content, Disk, zero};
use crate::error::DiskError;
use crate::map::BlockState;
use crate::units::{
    FileOffset, FileRange, GRANULE_SIZE, round_down, round_up, u64_from, usize_from,
};

/// Runs of zeros from this length on are punched out of the host file instead of written, where
/// hole punching is on. Shorter ones would cost more in calls and fragments than they give back at
/// once; an idle compaction gives those back too.
const PUNCH_RUN: u64 = 64 << 10;

/// What was written is all zeros, holds whole granules of zeros, or neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    All,
    Some,
    None,
}

impl Zeros {
    pub(super) fn of(data: &[u8], piece: Piece) -> Self {
        match zero::has_zero_granule(data, piece.within) {
            false => Self::None,
            true if zero::is_zero(data) => Self::All,
            true => Self::Some,
        }
    }
}

impl Disk {
    /// Writes what leaves its block where it is; says whether it was that.
    pub(super) fn write_in_place(
        &self,
        data: &[u8],
        piece: Piece,
        zeros: Zeros,
    ) -> Result<bool, DiskError> {
        let _gate = self.gates.shared(piece.block);
        let slot = match self.image.map().get(piece.block) {
            BlockState::NotPresent if zeros == Zeros::All => {
                return Ok(!self.is_backed(piece.block));
            }
            BlockState::Zero if zeros == Zeros::All => return Ok(true),
            BlockState::Present { slot, whole: true } => slot,
            BlockState::Present { slot, whole: false }
                if self.parent().is_some() && self.covers(piece)? =>
            {
                slot
            }
            _ => return Ok(false),
        };
        match zeros {
            Zeros::None => self.overwrite(data, piece, slot)?,
            Zeros::All if self.is_gone(piece, piece.len < PUNCH_RUN) => {}
            Zeros::All | Zeros::Some => self.overwrite_with_zeros(data, piece, slot)?,
        }
        Ok(true)
    }

    /// Writes data without a whole zero granule. The gate is held.
    fn overwrite(&self, data: &[u8], piece: Piece, slot: FileOffset) -> Result<(), DiskError> {
        let change = self.begin_in_place(piece, None)?;
        self.tracker.note_data(piece.block, piece.within, piece.len);
        let written = self.in_slots(&change, piece, slot, &|at| {
            self.write_file(data, at.plus(piece.within))
        });
        let met = change.end();
        match &written {
            Ok(()) if !met => return written,
            Ok(()) => self.tracker.note_data(piece.block, piece.within, piece.len),
            Err(_) => (self.tracker).note_unknown(piece.block, piece.within, piece.len),
        }
        self.note_again();
        written
    }

    /// Writes data with zero granules, keeping book of them. The gate is held.
    fn overwrite_with_zeros(
        &self,
        data: &[u8],
        piece: Piece,
        slot: FileOffset,
    ) -> Result<(), DiskError> {
        let runs: Vec<Part> = zero::runs(data, piece.within)
            .map(|run| Part {
                bytes: run.start..run.start + run.len,
                within: piece.within + u64_from(run.start),
                zero: run.zero,
                punched: run.zero && u64_from(run.len) >= PUNCH_RUN && self.may_punch(),
            })
            .collect();
        let watch = self.gates.watch_part(piece.block, piece.bytes());
        let change = self.begin_in_place(piece, Some(&watch))?;
        let in_doubt = |note: &dyn Fn(u64, u64)| {
            let data = runs.iter().filter(|run| !run.zero);
            data.for_each(|run| note(run.within, run.len()));
        };
        in_doubt(&|within, len| self.tracker.note_data(piece.block, within, len));
        let written = self.in_slots(&change, piece, slot, &|at| {
            self.write_runs(data, piece, &runs, at)
        });
        let met = change.end();
        if written.is_err() {
            in_doubt(&|within, len| self.tracker.note_unknown(piece.block, within, len));
        } else {
            for run in runs.iter().filter(|run| run.zero) {
                self.note_zero(&watch, run.within..run.within + run.len(), !run.punched);
            }
            in_doubt(&|within, len| self.tracker.note_data(piece.block, within, len));
        }
        if met || written.is_err() {
            self.note_again();
        }
        written
    }

    /// Writes `runs` of `data`, long zeros as holes, to the slot whose data starts at `at`.
    fn write_runs(
        &self,
        data: &[u8],
        piece: Piece,
        runs: &[Part],
        at: FileOffset,
    ) -> Result<(), DiskError> {
        if !runs.iter().any(|run| run.punched) {
            return self.write_file(data, at.plus(piece.within));
        }
        runs.iter().try_for_each(|run| {
            let place = at.plus(run.within);
            if run.punched {
                self.zero_file(FileRange::new(place, run.len())).map(|_| ())
            } else {
                self.write_file(&data[run.bytes.clone()], place)
            }
        })
    }

    /// Zeroes what leaves its block where it is, or says what else there is to do.
    pub(super) fn zero_in_place(&self, piece: Piece) -> Result<Zeroed, DiskError> {
        let _gate = self.gates.shared(piece.block);
        let reads = self.reads_when_dropped(piece.block);
        let slot = match self.image.map().get(piece.block) {
            BlockState::Zero => return Ok(Zeroed::Done),
            BlockState::NotPresent if self.parent_is_hole(self.disk_range(piece)) => {
                return Ok(Zeroed::Done);
            }
            BlockState::NotPresent => return Ok(Zeroed::NotHere),
            BlockState::Present { .. } if piece.whole && reads.is_some() => {
                return Ok(Zeroed::NotHere);
            }
            BlockState::Present { whole: false, .. }
                if self.parent().is_some() && !self.covers(piece)? =>
            {
                return Ok(Zeroed::NotHere);
            }
            // Sectors that are not in the slot read as zeros whatever the bytes there are.
            BlockState::Present { slot, .. } => slot,
        };
        self.zero_present(piece, slot)?;
        let is_dead = reads.is_some() && self.tracker.content(piece.block) == Content::Dead;
        Ok(if is_dead {
            Zeroed::NotHere
        } else {
            Zeroed::Done
        })
    }

    fn zero_present(&self, piece: Piece, slot: FileOffset) -> Result<(), DiskError> {
        let at = self.geometry().data_at(slot).plus(piece.within);
        let inner_is_gone = |inner: Range<u64>| {
            let (within, len) = (inner.start, inner.end - inner.start);
            let inner = Piece {
                within,
                len,
                ..piece
            };
            Ok(self.is_gone(inner, false))
        };
        if self.is_gone(piece, false)
            || self.is_gone_but_for_ends(piece.bytes(), at, inner_is_gone)?
        {
            return Ok(());
        }
        let range = FileRange::new(at, piece.len);
        let watch = self.gates.watch_part(piece.block, piece.bytes());
        if self.is_host_hole(range)? {
            self.note_zero(&watch, piece.bytes(), false);
            return Ok(());
        }
        let change = self.begin_in_place(piece, Some(&watch))?;
        let zeroed = self.in_slots(&change, piece, slot, &|at| {
            self.zero_file(FileRange::new(at.plus(piece.within), piece.len))
        });
        let met = change.end();
        if let Ok(punched) = zeroed {
            self.note_zero(&watch, piece.bytes(), !punched);
        }
        if met || zeroed.is_ok() {
            // Who was woken when it began may have looked too early.
            self.note_again();
        }
        zeroed.map(|_| ())
    }

    /// Whether `piece` is known to be zero, and to take no space that the host could have back; of
    /// zeros that are not worth a hole, the space does not matter.
    fn is_gone(&self, piece: Piece, may_be_stored: bool) -> bool {
        let zeros = self.tracker.zeros(piece.block, piece.within, piece.len);
        zeros.is_some_and(|Stored(stored)| !stored || may_be_stored || !self.may_punch())
    }

    /// Whether `inner_is_gone`, the granules that lie in `bytes` as a whole, and the ends are zero, of which
    /// nothing can be known: they are read. `bytes` lie at `at` in the file.
    pub(super) fn is_gone_but_for_ends(
        &self,
        bytes: Range<u64>,
        at: FileOffset,
        inner_is_gone: impl Fn(Range<u64>) -> Result<bool, DiskError>,
    ) -> Result<bool, DiskError> {
        let Range { start, end } = bytes;
        let inner = round_up(start, GRANULE_SIZE)..round_down(end, GRANULE_SIZE);
        let ends = if inner.start <= inner.end {
            [start..inner.start, inner.end..end]
        } else {
            [start..end, end..end]
        };
        if !inner.is_empty() && !inner_is_gone(inner)? {
            return Ok(false);
        }
        let mut buf = [0; 2 << 12];
        for part in ends {
            let buf = &mut buf[..usize_from(part.end - part.start)];
            if !buf.is_empty() {
                self.read_file(buf, at.plus(part.start - start))?;
            }
            if !zero::is_zero(buf) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the host stores nothing of `range`, so that it reads as zeros.
    pub(super) fn is_host_hole(&self, range: FileRange) -> Result<bool, DiskError> {
        let data = self.image.storage().next_data(range.start, range.end());
        let data = data.map_err(|error| DiskError::io("look for a hole", error))?;
        Ok(data.is_none())
    }

    /// Notes that `part` of a block reads as zeros. Of what others touched of it since `watch` began, nothing is
    /// known: they may have zeroed it as well.
    fn note_zero(&self, watch: &Watch, part: Range<u64>, stored: bool) {
        let block = watch.block();
        watch.conclude(|touched| {
            for other in touched.overlapping(&part) {
                let (start, end) = (other.start.max(part.start), other.end.min(part.end));
                (self.tracker).note_unknown(block, start, end - start);
            }
            for part in touched.gaps(&part) {
                (self.tracker).note_zero(block, part.start, part.end - part.start, stored);
            }
        });
    }

    /// Announces that `piece` is about to change, to the image and to whoever watches it, but for the
    /// caller's `own` watch. Not called for what changes nothing: a disk that was only trimmed where
    /// it had nothing stays what its children know it as.
    fn begin_in_place(&self, piece: Piece, own: Option<&Watch>) -> Result<Change<'_>, DiskError> {
        self.note_change()?;
        Ok((self.gates).change_in_place(piece.block, piece.bytes(), own))
    }

    /// Counts a change once more, for what may have been copied of the tracker while it said
    /// something else.
    fn note_again(&self) {
        self.changes.note();
    }

    /// Has `act` change `piece` in a slot, of which it is told where the data starts: the block's own, at
    /// `slot`, and the one that its mirror keeps, if it has one.
    fn in_slots<T>(
        &self,
        change: &Change<'_>,
        piece: Piece,
        slot: FileOffset,
        act: &dyn Fn(FileOffset) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let geometry = self.geometry();
        let start = geometry.slot.header_len + piece.within;
        let mirror = change.mirror().map(AsRef::<Mirror>::as_ref);
        let changing = mirror.and_then(|mirror| mirror.begin(start..start + piece.len));
        let done = act(geometry.data_at(slot));
        if let (Some(mirror), Some(changing)) = (mirror, &changing) {
            let follows =
                !changing.is_due() || done.is_ok() && act(geometry.data_at(mirror.slot())).is_ok();
            if !follows || done.is_err() {
                // The block stays where it is: the guest's request is as good as its own slot.
                mirror.give_up();
            }
        }
        done
    }
}

/// A run of what is written.
#[derive(Debug)]
struct Part {
    /// Where it is in what is written.
    bytes: Range<usize>,
    /// Where it is in the block.
    within: u64,
    zero: bool,
    /// It becomes a hole.
    punched: bool,
}

impl Part {
    fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }
}
