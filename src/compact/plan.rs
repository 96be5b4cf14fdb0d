//! Which blocks to move where, so that the file ends as early as its format allows. Pure.

use std::collections::HashSet;

pub use crate::disk::Move;
use crate::image::Frame;
use crate::map::SlotShape;
use crate::units::{BlockIndex, FileOffset, FileRange, round_up};

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
    let mut metadata_moves = Vec::new();
    if moves.is_empty() {
        let mut sources = frame.movable.iter().rev().peekable();
        'others: for gap in gaps(slots, frame, shape) {
            let mut at = FileOffset::new(round_up(gap.start.get(), frame.align));
            while let Some(from) = sources.peek() {
                if from.start <= at {
                    break 'others;
                }
                if at.plus(from.len) > gap.end() {
                    break;
                }
                metadata_moves.push((**from, at));
                at = at.plus(from.len);
                sources.next();
            }
        }
    }
    (moves, metadata_moves)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::SECTOR_SIZE;

    const PACKED: SlotShape = SlotShape {
        len: 4608,
        header_len: 512,
        align: 4096,
        strict: false,
    };

    fn frame(start: u64) -> Frame {
        Frame {
            start: FileOffset::new(start),
            pinned: Vec::new(),
            trailer_len: 512,
            movable: Vec::new(),
            align: SECTOR_SIZE,
        }
    }

    fn slots(places: &[u64]) -> Vec<(FileOffset, BlockIndex)> {
        (0..)
            .zip(places)
            .map(|(n, at)| (FileOffset::new(*at), BlockIndex::new(n)))
            .collect()
    }

    #[test]
    fn nothing_to_do() {
        let plan_of = |places: &[u64]| plan(&slots(places), &frame(2048), PACKED);
        assert_eq!(
            plan_of(&[]),
            Plan {
                moves: vec![],
                metadata_moves: vec![],
                end: FileOffset::new(2048)
            }
        );
        assert_eq!(plan_of(&[2048, 6656]).moves, []);
        assert_eq!(
            plan_of(&[2048, 6656]).file_len(&frame(2048)),
            6656 + 4608 + 512
        );
        assert_eq!(
            plan_of(&[2048, 6656 + 3584]).moves,
            [],
            "a gap that no slot fits in"
        );
    }

    #[test]
    fn the_last_block_fills_the_first_hole() {
        let planned = plan(
            &slots(&[2048, 2048 + 2 * 4608, 2048 + 3 * 4608]),
            &frame(2048),
            PACKED,
        );
        assert_eq!(
            planned.moves,
            [Move {
                block: BlockIndex::new(2),
                from: FileOffset::new(2048 + 3 * 4608),
                to: FileOffset::new(2048 + 4608),
            }]
        );
    }

    #[test]
    fn pinned_space_is_left_alone_and_ends_the_file() {
        let pin = FileRange::new(FileOffset::new(50_000), 700);
        let pinned = Frame {
            pinned: vec![pin],
            ..frame(2048)
        };
        let planned = plan(&slots(&[60_000]), &pinned, PACKED);
        assert_eq!(planned.moves.len(), 1);
        assert_eq!(planned.end, pin.end());
        assert_eq!(planned.file_len(&pinned), 51_200 + 512);
    }

    proptest! {
        #[test]
        fn plans_are_sound_and_leave_no_hole(
            gaps in prop::collection::vec(0_u64..20, 0..40),
            pin in prop::option::of(0_usize..40),
            strict: bool,
        ) {
            let shape = SlotShape { strict, ..PACKED };
            let mut at = 2048;
            let mut places = Vec::new();
            let mut frame = frame(2048);
            for (n, gap) in gaps.iter().enumerate() {
                at += gap * 512;
                if pin == Some(n) {
                    frame.pinned.push(FileRange::new(FileOffset::new(at), 1000));
                    at += 1024;
                }
                places.push(at);
                at += shape.len;
            }
            let before = slots(&places);
            let planned = plan(&before, &frame, shape);
            let mut after = before.clone();
            for step in &planned.moves {
                prop_assert!(step.to < step.from);
                let target = FileRange::new(step.to, shape.len);
                prop_assert!(before.iter().all(|(slot, _)| !FileRange::new(*slot, shape.len).overlaps(target)));
                prop_assert!(frame.pinned.iter().all(|pin| !pin.overlaps(target)));
                let place = after.iter_mut().find(|(slot, block)| (*slot, *block) == (step.from, step.block));
                place.expect("a move of a block that is there").0 = step.to;
            }
            after.sort_unstable();
            prop_assert!(after.windows(2).all(|pair| pair[0].0.plus(shape.len) <= pair[1].0));
            let again = plan(&after, &frame, shape);
            prop_assert_eq!(&again.moves, &[], "a second plan finds nothing");
            prop_assert_eq!(again.end, planned.end);
            let mut pins = frame.pinned.clone();
            pins.retain(|pin| after.iter().any(|(slot, _)| *slot > pin.start));
        }
    }
}
