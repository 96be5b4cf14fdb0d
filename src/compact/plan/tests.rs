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

#[test]
fn hot_blocks_come_last_and_what_stays_holds_the_end() {
    let slot = |n: u64| 2048 + n * 4608;
    // Two holes first, four blocks after them.
    let slots = slots(&[slot(2), slot(3), slot(4), slot(5)]);
    let free = [FileRange::between(
        FileOffset::new(slot(0)),
        FileOffset::new(slot(2)),
    )];
    let planned = |choice| {
        let slots = slots.iter().map(|(slot, block)| (*block, *slot));
        plan_top(slots, &free, &frame(2048), PACKED, choice)
    };
    let hot = BlockIndex::new(3);
    let heat = |block| if block == hot { 9 } else { 1 };
    let cold_first = Choice {
        most: 9,
        stays: &|_| false,
        heat: &heat,
    };
    let plan = planned(cold_first);
    let blocks: Vec<_> = plan.moves.iter().map(|step| step.block.get()).collect();
    assert_eq!((blocks, plan.end.get()), (vec![2, 3], slot(4)));
    let plan = planned(Choice {
        stays: &|block| block == hot,
        ..cold_first
    });
    let blocks: Vec<_> = plan.moves.iter().map(|step| step.block.get()).collect();
    assert_eq!((blocks, plan.end.get()), (vec![2, 1], slot(6)));
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

        // One pass finds the same, and a part of it where that is all that is asked for.
        let free: Vec<_> = super::gaps(&before, &frame, shape).collect();
        let slots = || before.iter().map(|(slot, block)| (*block, *slot));
        let choice = Choice { most: 1000, stays: &|_| false, heat: &|_| 0 };
        let top = plan_top(slots(), &free, &frame, shape, choice);
        prop_assert_eq!(&top.moves, &planned.moves);
        if !top.moves.is_empty() {
            prop_assert_eq!(top.end, planned.end);
        }
        let most = planned.moves.len() / 2;
        let top = plan_top(slots(), &free, &frame, shape, Choice { most, ..choice });
        prop_assert_eq!(&top.moves, &planned.moves[..most]);
    }
}

/// What planning costs on a disk of a million blocks with one hole: everything sorted, and one pass.
/// `cargo test --release --all-features --lib planning_costs -- --ignored --nocapture`
#[test]
#[ignore = "prints figures"]
fn planning_costs() {
    const BLOCKS: u32 = 1_000_000;
    let shape = SlotShape {
        len: 1 << 20,
        header_len: 0,
        align: 1 << 20,
        strict: true,
    };
    let frame = Frame {
        align: 1 << 20,
        ..frame(1 << 20)
    };
    // Blocks lie in no order; one place is free.
    let place = |n: u32| FileOffset::new((u64::from(n) * 7_919 % 1_000_003 + 1) << 20);
    let present: Vec<_> = (1..BLOCKS)
        .map(|n| (BlockIndex::new(n), place(n)))
        .collect();
    let free = [FileRange::new(place(0), shape.len)];
    let choice = Choice {
        most: 4096,
        stays: &|_| false,
        heat: &|_| 0,
    };
    let time = |name: &str, work: &dyn Fn() -> usize| {
        let begun = std::time::Instant::now();
        let moves = work();
        println!("{name}: {moves} moves, {:?}", begun.elapsed());
    };
    time("all, sorted", &|| {
        let mut slots: Vec<_> = present.iter().map(|(block, at)| (*at, *block)).collect();
        slots.sort_unstable();
        let dead = HashSet::new();
        plan(&without(&slots, &dead), &frame, shape).moves.len()
    });
    time("one pass", &|| {
        let slots = present.iter().copied();
        plan_top(slots, &free, &frame, shape, choice).moves.len()
    });
    time("no hole", &|| {
        let slots = present.iter().copied();
        plan_top(slots, &[], &frame, shape, choice).moves.len()
    });
}
