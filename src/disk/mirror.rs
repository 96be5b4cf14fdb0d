//! Two slots of one block that are kept the same while it moves.
//!
//! A copier goes through the block, piece by piece ([`Mirror::copy`]); guests go on to write to its slot.
//! What the copier has not reached needs nothing: it will find it there. What it has copied, a guest's write
//! changes in both slots before it returns. What it is copying right now is marked, and copied again, that
//! part alone, while writes to the piece wait for it: so a piece takes two copies at most, and the second is of
//! what guests wrote during the first.
//!
//! # Why both slots end up the same
//! Two writes to the same bytes may not reach the slots in different orders: a reader would see the
//! acknowledged one before the switch and the other one after. So overlapping writes to a block that has a
//! mirror take turns: each is *under way* from before its first write until after its second one
//! ([`Mirror::begin`]), and the next waits. Guests hardly ever do that: who writes to the same bytes from two
//! sides does not know which will stay.
//!
//! Each write decides after it has changed the block's own slot, under the lock that the copier moves on under,
//! whether the copier has passed there ([`Changing::is_due`]). If the copier comes later, it reads what was written; if
//! it is there, the mark has it come again, and wait until the write is no longer under way; if it has
//! passed, the write changes the other slot itself.
//!
//! A mirror that was given up (a write to the other slot failed; something was done to the block that is no
//! change in place) stays so. Who made it has it closed before he gives the slot away, and that waits for
//! the writes that are under way.

use std::ops::Range;

use rangemap::RangeSet;

use crate::sync::{Condvar, Mutex};
use crate::units::FileOffset;

/// The state of the other slot of a block. Places are bytes of the slot.
#[derive(Debug)]
pub(super) struct Mirror {
    slot: FileOffset,
    state: Mutex<State>,
    /// Something is no longer under way.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Up to here, it was copied.
    copied: u64,
    /// Up to here, it is being copied.
    copying: u64,
    /// What was written between the two since.
    marked: RangeSet<u64>,
    /// What is under way: changes, and the second copy of a piece.
    under_way: Vec<(u64, Range<u64>)>,
    next_id: u64,
    given_up: bool,
}

impl State {
    fn overlaps(&self, part: &Range<u64>, but: Option<u64>) -> bool {
        let others = self.under_way.iter().filter(|(id, _)| Some(*id) != but);
        { others }.any(|(_, other)| other.start < part.end && part.start < other.end)
    }

    fn enter(&mut self, part: Range<u64>) -> u64 {
        self.next_id += 1;
        self.under_way.push((self.next_id, part));
        self.next_id
    }
}

impl Mirror {
    /// In the slot at `slot`, to which nothing is copied.
    pub(super) fn new(slot: FileOffset) -> Self {
        Self {
            slot,
            state: Mutex::new(State::default()),
            ended: Condvar::new(),
        }
    }

    /// The other slot.
    pub(super) fn slot(&self) -> FileOffset {
        self.slot
    }

    /// Begins a change of `part` in place, once none of an overlapping part is under way; `None` where the
    /// mirror was given up, so that only the block's own slot counts.
    pub(super) fn begin(&self, part: Range<u64>) -> Option<Changing<'_>> {
        let mut state = self.state.lock();
        while !state.given_up && state.overlaps(&part, None) {
            self.ended.wait(&mut state);
        }
        if state.given_up {
            return None;
        }
        let id = state.enter(part.clone());
        Some(Changing {
            mirror: self,
            part,
            id,
        })
    }

    /// Copies the next piece, up to `end`, by `copy`, which is called for all of it and then for what was
    /// changed meanwhile. Only one thread copies.
    ///
    /// # Errors
    /// Those of `copy`: then nobody can tell what the other slot holds.
    pub(super) fn copy<E>(
        &self,
        end: u64,
        copy: impl Fn(Range<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        let piece = {
            let mut state = self.state.lock();
            state.copying = end;
            state.copied..end
        };
        copy(piece.clone()).inspect_err(|_| self.give_up())?;
        let again = {
            let mut state = self.state.lock();
            if state.marked.is_empty() {
                // A write that is under way has not decided yet: it will find that the copier has passed.
                state.copied = end;
                return Ok(());
            }
            // From here on writes to the piece wait; those that are under way may mark more of it.
            let id = state.enter(piece.clone());
            while state.overlaps(&piece, Some(id)) {
                self.ended.wait(&mut state);
            }
            let marked = std::mem::take(&mut state.marked);
            state.copied = end;
            Held {
                mirror: self,
                id,
                marked,
            }
        };
        let mut parts = again.marked.iter();
        parts
            .try_for_each(|part| copy(part.clone()))
            .inspect_err(|_| self.give_up())
    }

    /// Says that the other slot no longer follows.
    pub(super) fn give_up(&self) {
        self.state.lock().given_up = true;
    }

    /// Whether it was given up.
    pub(super) fn is_given_up(&self) -> bool {
        self.state.lock().given_up
    }

    /// Up to where it was copied.
    pub(super) fn copied(&self) -> u64 {
        self.state.lock().copied
    }

    /// Has nobody write to the other slot any more: no change that does is under way on return.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.given_up = true;
        while !state.under_way.is_empty() {
            self.ended.wait(&mut state);
        }
    }

    fn leave(&self, id: u64) {
        let mut state = self.state.lock();
        state.under_way.retain(|(other, _)| *other != id);
        self.ended.notify_all();
    }
}

/// A piece that is being copied a second time.
struct Held<'a> {
    mirror: &'a Mirror,
    id: u64,
    marked: RangeSet<u64>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.mirror.leave(self.id);
    }
}

/// A change of a part of both slots that is under way, until dropped.
#[derive(Debug)]
pub(super) struct Changing<'a> {
    mirror: &'a Mirror,
    part: Range<u64>,
    id: u64,
}

impl Changing<'_> {
    /// To be asked once the block's own slot is changed: whether the other one has to be changed now.
    pub(super) fn is_due(&self) -> bool {
        let mut state = self.mirror.state.lock();
        let being_copied = self.part.start.max(state.copied)..self.part.end.min(state.copying);
        if !being_copied.is_empty() {
            state.marked.insert(being_copied);
        }
        self.part.start < state.copied && !state.given_up
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.mirror.leave(self.id);
    }
}
