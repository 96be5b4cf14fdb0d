//! Which blocks to move where, so that the file ends as early as its format allows. Pure.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

pub use crate::disk::Move;
use crate::image::Frame;
use crate::map::SlotShape;
use crate::units::{BlockIndex, FileOffset, FileRange, round_up};

#[cfg(test)]
mod tests;

/// The moves of a compaction and what they lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// From the end of the file down. No move's target is another one's source, so that any part of
    /// them may be carried out, in any order.
    pub moves: Vec<Move>,
    /// Blocks of metadata that go to lower free space. Only where no other move is left; then the
    /// same holds for them.
    pub metadata_moves: Vec<(FileRange, FileOffset)>,
    /// Where the last thing in use ends once these moves, and those of the plans that follow, are
    /// carried out.
    pub end: FileOffset,
}

impl Plan {
    /// The file's length in bytes once the plan is carried out and the file is cut.
    pub fn file_len(&self, frame: &Frame) -> u64 {
        round_up(self.end.get(), frame.align).saturating_add(frame.trailer_len)
    }
}

/// Plans for blocks in `slots`, those that stay, sorted by place.
///
/// The last block goes into the first free place, until there is none in front of it. All slots
/// have the same length, so that no other choice ends earlier. Then blocks of metadata, which may
/// be shorter, do the same; the space that they leave may take further blocks, so that the plan is
/// made anew until there are no moves.
pub fn plan(slots: &[(FileOffset, BlockIndex)], frame: &Frame, shape: SlotShape) -> Plan {
    let (moves, metadata_moves) = next_moves(slots, frame, shape);
    let mut slots = slots.to_vec();
    let mut frame = frame.clone();
    let mut next = (moves.clone(), metadata_moves.clone());
    while !(next.0.is_empty() && next.1.is_empty()) {
        // Sources are the last ones, from the end down.
        for (slot, step) in slots.iter_mut().rev().zip(&next.0) {
            slot.0 = step.to;
        }
        for (range, (_, to)) in frame.movable.iter_mut().rev().zip(&next.1) {
            range.start = *to;
        }
        slots.sort_unstable();
        frame.movable.sort_unstable();
        if frame.movable.is_empty() {
            break;
        }
        next = next_moves(&slots, &frame, shape);
    }
    let ends = (slots
        .last()
        .map(|(start, _)| start.plus(shape.len))
        .into_iter())
    .chain(frame.pinned.iter().map(|range| range.end()))
    .chain(frame.movable.last().map(|range| range.end()));
    Plan {
        end: ends.fold(frame.start, FileOffset::max),
        moves,
        metadata_moves,
    }
}

fn next_moves(
    slots: &[(FileOffset, BlockIndex)],
    frame: &Frame,
    shape: SlotShape,
) -> (Vec<Move>, Vec<(FileRange, FileOffset)>) {
    let mut moves = Vec::new();
    let mut sources = slots.iter().rev().peekable();
    'gaps: for gap in gaps(slots, frame, shape) {
        for to in shape.places(gap) {
            match sources.peek() {
                Some((from, block)) if to < *from => {
                    moves.push(Move {
                        block: *block,
                        from: *from,
                        to,
                    });
                    sources.next();
                }
                _ => break 'gaps,
            }
        }
    }
    let metadata_moves = match moves.is_empty() {
        true => metadata_moves(gaps(slots, frame, shape), frame),
        false => Vec::new(),
    };
    (moves, metadata_moves)
}

/// The blocks of metadata that go to lower free space, where that is in the `free` ranges, which are sorted.
pub(crate) fn metadata_moves(
    free: impl IntoIterator<Item = FileRange>,
    frame: &Frame,
) -> Vec<(FileRange, FileOffset)> {
    let mut moves = Vec::new();
    let mut sources = frame.movable.iter().rev().peekable();
    for gap in free {
        let mut at = FileOffset::new(round_up(gap.start.get(), frame.align));
        while let Some(from) = sources.peek() {
            if from.start <= at {
                return moves;
            }
            if at.plus(from.len) > gap.end() {
                break;
            }
            moves.push((**from, at));
            at = at.plus(from.len);
            sources.next();
        }
    }
    moves
}

/// Which moves [`plan_top`] makes of those that it could.
#[derive(Clone, Copy)]
pub(crate) struct Choice<'a> {
    /// How many, at most.
    pub(crate) most: usize,
    /// Whether a block stays where it is in any case.
    pub(crate) stays: &'a dyn Fn(BlockIndex) -> bool,
    /// How often a block is written to: the hottest are moved last.
    pub(crate) heat: &'a dyn Fn(BlockIndex) -> u8,
}

/// The moves of [`plan`] for the last blocks of a file, and what they lead to if metadata is not in the way.
/// The coldest blocks come first.
///
/// Costs one pass over `slots`, which may be in any order, where there is a place in the `free` ranges at all,
/// which are sorted; nothing otherwise.
pub(crate) fn plan_top(
    slots: impl Iterator<Item = (BlockIndex, FileOffset)>,
    free: &[FileRange],
    frame: &Frame,
    shape: SlotShape,
    choice: Choice<'_>,
) -> Plan {
    let mut moves = Vec::new();
    let places = free.iter().flat_map(|run| shape.places(*run));
    let mut places = places.take(choice.most).peekable();
    let mut ends: Vec<_> = frame.pinned.iter().map(|range| range.end()).collect();
    if places.peek().is_some() {
        let (sources, stays) = last_of(slots, choice);
        ends.extend(stays.map(|slot| slot.plus(shape.len)));
        let mut sources = sources.into_iter().peekable();
        while let (Some((from, block)), Some(to)) = (sources.peek().copied(), places.peek())
            && *to < from
        {
            let to = *to;
            moves.push(Move { block, from, to });
            ends.push(to.plus(shape.len));
            sources.next();
            places.next();
        }
        ends.extend(sources.peek().map(|(slot, _)| slot.plus(shape.len)));
    }
    moves.sort_by_key(|step| (choice.heat)(step.block));
    Plan {
        moves,
        metadata_moves: Vec::new(),
        end: ends.into_iter().fold(frame.start, FileOffset::max),
    }
}

/// The last slots that may be moved from, from the end down, one more than may be; and the last of those that
/// stay.
fn last_of(
    slots: impl Iterator<Item = (BlockIndex, FileOffset)>,
    choice: Choice<'_>,
) -> (Vec<(FileOffset, BlockIndex)>, Option<FileOffset>) {
    let mut last = BinaryHeap::new();
    let mut stays: Option<FileOffset> = None;
    for (block, slot) in slots {
        let is_among_last = |(Reverse(least), _): &(Reverse<FileOffset>, _)| *least < slot;
        if last.len() > choice.most && !last.peek().is_some_and(is_among_last) {
            continue;
        }
        if (choice.stays)(block) {
            stays = stays.max(Some(slot));
            continue;
        }
        last.push((Reverse(slot), block));
        if last.len() > choice.most + 1 {
            last.pop();
        }
    }
    let mut sources: Vec<_> = last
        .into_iter()
        .map(|(Reverse(slot), block)| (slot, block))
        .collect();
    sources.sort_unstable_by(|one, other| other.cmp(one));
    (sources, stays)
}

/// The free ranges between the things in use, in order; none behind the last of them.
fn gaps<'a>(
    slots: &'a [(FileOffset, BlockIndex)],
    frame: &'a Frame,
    shape: SlotShape,
) -> impl Iterator<Item = FileRange> + 'a {
    let mut at = frame.start;
    let mut slots = slots
        .iter()
        .map(move |(start, _)| FileRange::new(*start, shape.len))
        .peekable();
    let mut fixed = [&frame.pinned[..], &frame.movable[..]].concat();
    fixed.sort_unstable();
    let mut pinned = fixed.into_iter().peekable();
    std::iter::from_fn(move || {
        let slot_first = match (slots.peek(), pinned.peek()) {
            (Some(slot), Some(pin)) => slot.start < pin.start,
            (slot, _) => slot.is_some(),
        };
        let used = if slot_first {
            slots.next()
        } else {
            pinned.next()
        }?;
        let gap = FileRange::between(at, used.start);
        at = at.max(used.end());
        Some(gap)
    })
    .filter(|gap| !gap.is_empty())
}

/// The slots of `slots` whose block is not in `dead`.
pub(crate) fn without(
    slots: &[(FileOffset, BlockIndex)],
    dead: &HashSet<BlockIndex>,
) -> Vec<(FileOffset, BlockIndex)> {
    slots
        .iter()
        .filter(|(_, block)| !dead.contains(block))
        .copied()
        .collect()
}
