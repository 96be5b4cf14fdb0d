//! Sector bitmaps, and threads at one image.

use super::*;

#[test]
fn a_childs_sectors_are_in_its_bitmap_block() {
    let sim = Arc::new(empty(64, 4096, true));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let slot = image.reserve().unwrap();
    image.commit(&[place(5, slot, Some(3..21))]).unwrap();
    assert_eq!(
        image.map().get(block(5)),
        BlockState::Present { slot, whole: false }
    );
    let [movable] = image.frame(&|_| false).movable[..] else {
        panic!("one chunk")
    };
    let is_written = |sector| image.sector_bitmap(block(5)).unwrap().is_written(sector);
    assert_eq!([2, 3, 20, 21].map(is_written), [false, true, true, false]);
    let other = image.reserve().unwrap();
    image.commit(&[place(6, other, None)]).unwrap();
    assert_eq!(image.frame(&|_| false).movable, [movable]);
    image.settle().unwrap();
    // 256 sectors a block: 32 bytes.
    let mut bits = [0; 32];
    sim.read_exact_at(&mut bits, movable.start.plus(5 * 32))
        .unwrap();
    assert_eq!(
        bits[..4],
        [0xf8, 0xff, 0x1f, 0],
        "the least significant bit first"
    );
    assert_eq!(entries::<2>(&sim, 5), [slot.get() | 7, other.get() | 6]);
    assert_eq!(entries::<1>(&sim, 32768), [movable.start.get() | 6]);

    image
        .commit(&[MapEdit::Write {
            block: block(5),
            sectors: 0..3,
        }])
        .unwrap();
    image
        .commit(&[MapEdit::Write {
            block: block(5),
            sectors: 200..256,
        }])
        .unwrap();
    let reopened = open(Arc::new(sim.fork()), READ_ONLY).unwrap().image;
    let bitmap = reopened.sector_bitmap(block(5)).unwrap();
    assert_eq!((bitmap.run_end(0, 256), bitmap.run_end(21, 256)), (21, 200));
    image
        .commit(&[MapEdit::Write {
            block: block(5),
            sectors: 20..201,
        }])
        .unwrap();
    assert_eq!(
        image.map().get(block(5)),
        BlockState::Present { slot, whole: true }
    );
    image.settle().unwrap();
    assert_eq!(entries::<1>(&sim, 5), [slot.get() | 6]);

    // Of a block that reads as zeros, the rest does too: it has all its sectors at once.
    let drop_to = |reads| {
        [MapEdit::Drop {
            block: block(5),
            reads,
        }]
    };
    image.commit(&drop_to(Reads::Zeros)).unwrap();
    assert_eq!(image.map().get(block(5)), BlockState::Zero);
    let slot = image.reserve().unwrap();
    image.commit(&[place(5, slot, Some(0..1))]).unwrap();
    assert_eq!(
        image.map().get(block(5)),
        BlockState::Present { slot, whole: true }
    );
    image.commit(&drop_to(Reads::Parent)).unwrap();
    image
        .commit(&[MapEdit::Drop {
            block: block(7),
            reads: Reads::Zeros,
        }])
        .unwrap();
    image.settle().unwrap();
    assert_eq!(entries::<3>(&sim, 5), [0, other.get() | 6, 2]);
    // Old bits mean nothing to a new block.
    let slot = image.reserve().unwrap();
    image.commit(&[place(5, slot, Some(7..8))]).unwrap();
    let bitmap = image.sector_bitmap(block(5)).unwrap();
    assert_eq!((bitmap.run_end(0, 256), bitmap.run_end(8, 256)), (7, 256));
}

#[test]
fn a_bitmap_block_moves() {
    let sim = Arc::new(empty(64, 4096, true));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let slot = image.reserve().unwrap();
    image.commit(&[place(5, slot, Some(3..21))]).unwrap();
    let [from] = image.frame(&|_| false).movable[..] else {
        panic!("one chunk")
    };
    let to = from.start.plus(3 * MIB);
    assert!(!image.move_metadata(FileRange::new(slot, MIB), to).unwrap());
    assert!(!image.move_metadata(from, slot).unwrap(), "not free");
    assert!(image.move_metadata(from, to).unwrap());
    assert_eq!(sim.unsynced_len(), 0, "durable on return");
    assert_eq!(image.frame(&|_| false).movable, [FileRange::new(to, MIB)]);
    assert!(
        !image.move_metadata(from, to).unwrap(),
        "it is there no more"
    );
    image
        .commit(&[MapEdit::Write {
            block: block(5),
            sectors: 100..101,
        }])
        .unwrap();
    // What the old place is used for now, no replay touches.
    assert!(image.reserve_at(from.start).is_some());
    sim.write_all_at(&[9; 4096], from.start).unwrap();
    let after = Arc::new(sim.kill());
    let image = open_shared(&after, OPTIONS);
    let bitmap = image.sector_bitmap(block(5)).unwrap();
    assert!([3, 20, 100].iter().all(|sector| bitmap.is_written(*sector)));
    let mut bytes = [0; 4096];
    after.read_exact_at(&mut bytes, from.start).unwrap();
    assert_eq!(bytes, [9; 4096]);
}

/// Whenever power is cut while it moves, and when something else is in its old place.
#[test]
fn a_bitmap_block_moves_as_a_whole() {
    let start = Arc::new(empty(64, 4096, true));
    let image = open_shared(&start, OPTIONS);
    let slot = image.reserve().unwrap();
    image.commit(&[place(5, slot, Some(3..21))]).unwrap();
    let to = allocate(&*image, 6);
    allocate(&*image, 7);
    let (gone, reads) = (block(6), Reads::Zeros);
    let hole = MapEdit::Drop { block: gone, reads };
    image.commit(&[hole]).unwrap();
    image.settle().unwrap();
    drop(image);
    for changes in 0.. {
        let sim = Arc::new(start.fork());
        let image = open_shared(&sim, OPTIONS);
        let [from] = image.frame(&|_| false).movable[..] else {
            panic!("one chunk")
        };
        sim.cut_after(changes);
        let moved = image.move_metadata(from, to);
        if moved.is_ok() && image.reserve_at(from.start).is_some() {
            // Of another block; a cut loses it, or not.
            let _ = sim.write_all_at(&[9; 4096], from.start);
        }
        for mut choice in sim.choices(8, 50, changes) {
            let left = Arc::new(sim.crash(&mut choice));
            let bitmap = open_shared(&left, READ_ONLY).sector_bitmap(block(5));
            let bitmap = bitmap.unwrap();
            let runs = (bitmap.run_end(0, 256), bitmap.run_end(3, 256));
            assert_eq!(runs, (3, 21), "{changes}, {choice:?}");
        }
        if !sim.is_cut() {
            assert!(moved.unwrap());
            return;
        }
    }
}

/// The log has entries that wrote to it when it is given up.
#[test]
fn where_a_bitmap_block_was_nothing_is_replayed() {
    let sim = Arc::new(empty(64, 4096, true));
    let image = open_shared(&sim, OPTIONS);
    let slot = image.reserve().unwrap();
    image.commit(&[place(5, slot, Some(3..21))]).unwrap();
    let [old] = image.frame(&|_| false).movable[..] else {
        panic!("one chunk")
    };
    // So that the file is not cut there.
    allocate(&*image, 6);
    let (block, reads) = (block(5), Reads::Zeros);
    image.commit(&[MapEdit::Drop { block, reads }]).unwrap();
    image.drop_unused_metadata().unwrap();
    image.sync().unwrap();
    assert!(image.reserve_at(old.start).is_some());
    sim.write_all_at(&[9; 4096], old.start).unwrap();
    let after = Arc::new(sim.kill());
    open_shared(&after, OPTIONS);
    let mut bytes = [0; 4096];
    after.read_exact_at(&mut bytes, old.start).unwrap();
    assert_eq!(bytes, [9; 4096]);
}

#[test]
fn threads_share_the_log() {
    let sim = Arc::new(empty(1200, 4096, true));
    let image = open_shared(&sim, OPTIONS);
    let work = |thread: u32| {
        for n in 0..150_u32 {
            let number = thread * 300 + n;
            image.begin_change().unwrap();
            let slot = image.reserve().unwrap();
            let part = (n % 3 > 0).then_some(0..u64::from(n % 200) + 1);
            image.commit(&[place(number, slot, part)]).unwrap();
            match n % 5 {
                0 => image.sync().unwrap(),
                1 => {
                    let reads = Reads::Zeros;
                    let edit = MapEdit::Drop {
                        block: block(number),
                        reads,
                    };
                    image.commit(&[edit]).unwrap();
                }
                2 => assert!(image.sector_bitmap(block(number)).unwrap().is_written(0)),
                3 if thread == 0 => {
                    let free = image.free_runs();
                    let movable = image.frame(&|_| false).movable;
                    if let (Some(to), Some(from)) = (free.first(), movable.first()) {
                        image.move_metadata(*from, to.start).unwrap();
                    }
                }
                4 if n % 50 == 4 => drop(image.cut(Cut::ALL).unwrap()),
                _ => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || work(thread));
        }
    });
    image.sync().unwrap();
    let states = |image: &dyn Image| -> Vec<(BlockState, Option<u64>)> {
        let map = image.map();
        let bits = |block| image.sector_bitmap(block).unwrap().run_end(0, 256);
        (map.blocks())
            .map(|block| (map.get(block), map.get(block).slot().map(|_| bits(block))))
            .collect()
    };
    let now = states(&*image);
    let crashed = sim.crash(&mut crate::storage::sim::Choice::AllLost);
    let after = open(Arc::new(crashed), OPTIONS).unwrap().image;
    assert!(states(&*after) == now);
    image.cut(Cut::ALL).unwrap();
    image.settle().unwrap();
    assert!(states(&*open_shared(&sim, READ_ONLY)) == now);
}
