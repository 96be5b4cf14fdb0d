mod crash;
mod interop;
mod ring;

use std::sync::Arc;

use uuid::Uuid;

use super::*;
use crate::error::{FormatError, OpenProblem};
use crate::format::DiskType;
use crate::format::parent::NewParent;
use crate::format::vhdx::{CurrentHeader, Header};
use crate::image::Reads;
use crate::map::BlockState;
use crate::storage::sim::{OpKind, SimStorage};
use crate::units::usize_from_u32;

const OPTIONS: ImageOptions = ImageOptions {
    read_only: false,
    punch_holes: true,
};
const READ_ONLY: ImageOptions = ImageOptions {
    read_only: true,
    ..OPTIONS
};

fn at(offset: u64) -> FileOffset {
    FileOffset::new(offset)
}

fn block(number: u32) -> BlockIndex {
    BlockIndex::new(number)
}

/// An empty disk of `blocks` blocks of 1 MiB with sectors of `sector_size` bytes; `child`: over a
/// parent.
fn empty(blocks: u64, sector_size: u32, child: bool) -> SimStorage {
    empty_of(blocks * MIB, sector_size, child)
}

fn empty_of(disk_len: u64, sector_size: u32, child: bool) -> SimStorage {
    let sim = SimStorage::new();
    let parent = NewParent {
        identity: Identity::Vhdx(Uuid::from_u128(7)),
        disk_len,
        sector_size: u64::from(sector_size),
        mtime: std::time::UNIX_EPOCH,
        relative: r".\parent.vhdx".to_owned(),
        absolute: String::new(),
    };
    let disk = NewDisk {
        disk_type: if child {
            DiskType::Differencing
        } else {
            DiskType::Dynamic
        },
        disk_len,
        block_size: 1 << 20,
        sector_size,
        physical_sector_size: 4096,
        parent: child.then_some(&parent),
    };
    create(&sim, &disk).unwrap();
    sim.take_log();
    sim
}

fn open_shared(sim: &Arc<SimStorage>, options: ImageOptions) -> Box<dyn Image> {
    open(Arc::<SimStorage>::clone(sim), options).unwrap().image
}

fn headers(sim: &SimStorage) -> [Header; 2] {
    [0, 1].map(|slot| {
        let mut bytes = [0; 4096];
        sim.read_exact_at(&mut bytes, CurrentHeader::offset_of(slot))
            .unwrap();
        Header::parse(&bytes).unwrap()
    })
}

fn place(number: u32, slot: FileOffset, sectors: Option<Range<u64>>) -> MapEdit {
    MapEdit::Place {
        block: block(number),
        slot,
        sectors,
    }
}

/// Gives a block a slot, with all of it in it.
fn allocate(image: &dyn Image, number: u32) -> FileOffset {
    let slot = image.reserve().unwrap();
    image.commit(&[place(number, slot, None)]).unwrap();
    slot
}

/// Entries `first..first + N` of the block table, as in the file.
fn entries<const N: usize>(sim: &SimStorage, first: u64) -> [u64; N] {
    std::array::from_fn(|n| {
        let mut bytes = [0; 8];
        let index = first + u64::try_from(n).unwrap();
        sim.read_exact_at(&mut bytes, at(3 * MIB + 8 * index))
            .unwrap();
        u64::from_le_bytes(bytes)
    })
}

#[test]
fn an_opened_file_is_not_changed_while_nothing_changes() {
    let sim = Arc::new(empty(64, 512, false));
    let before = sim.to_bytes();
    let image = open_shared(&sim, OPTIONS);
    image.sync().unwrap();
    image.shrink().unwrap();
    while image.punch_free().unwrap() {}
    image.settle().unwrap();
    assert!(sim.to_bytes() == before);
    assert!(
        sim.take_log()
            .iter()
            .all(|op| !op.kind.changes() || op.kind == OpKind::Sync)
    );
}

#[test]
fn a_session_begins_with_the_first_change_and_ends_when_settled() {
    let sim = Arc::new(empty(64, 512, false));
    let [old, _] = headers(&sim);
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let [one, two] = headers(&sim);
    assert_eq!(one.sequence_number.abs_diff(two.sequence_number), 1);
    for header in [&one, &two] {
        assert!(header.sequence_number > old.sequence_number);
        assert!(!header.log_guid.is_nil());
        assert_eq!(header.log_guid, one.log_guid);
        assert_ne!(header.file_write_guid, old.file_write_guid);
        assert_eq!(header.file_write_guid, one.file_write_guid);
        assert_ne!(header.data_write_guid, old.data_write_guid);
        assert_eq!(header.data_write_guid, one.data_write_guid);
    }
    assert_eq!(image.identity(), Identity::Vhdx(one.data_write_guid));
    assert_eq!(sim.unsynced_len(), 0);
    sim.take_log();
    image.begin_change().unwrap();
    assert!(
        sim.take_log().is_empty(),
        "only the first one costs anything"
    );

    let slot = allocate(&*image, 3);
    assert_eq!(entries::<1>(&sim, 3), [0], "it is in the log only");
    image.settle().unwrap();
    assert_eq!(entries::<1>(&sim, 3), [slot.get() | 6]);
    for header in headers(&sim) {
        assert!(header.log_guid.is_nil());
        assert_eq!(header.data_write_guid, one.data_write_guid);
    }
    assert_eq!(sim.unsynced_len(), 0);
    sim.take_log();
    image.settle().unwrap();
    assert!(sim.take_log().is_empty());

    image.begin_change().unwrap();
    let [three, _] = headers(&sim);
    assert_ne!(three.log_guid, one.log_guid);
    assert_ne!(
        three.data_write_guid, one.data_write_guid,
        "children may have come meanwhile"
    );
}

#[test]
fn compaction_leaves_the_disk_what_its_children_know() {
    let sim = Arc::new(empty(64, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let slots = [0, 1].map(|number| allocate(&*image, number));
    image.settle().unwrap();
    let [old, _] = headers(&sim);
    let edits = [MapEdit::Drop {
        block: block(0),
        reads: Reads::Zeros,
    }];
    image.commit(&edits).unwrap();
    image.sync().unwrap();
    assert!(image.reserve_at(slots[0]).is_some());
    image
        .commit(&[MapEdit::Move {
            block: block(1),
            to: slots[0],
        }])
        .unwrap();
    let [one, two] = headers(&sim);
    assert_ne!(one.file_write_guid, old.file_write_guid);
    assert_eq!(
        [one.data_write_guid, two.data_write_guid],
        [old.data_write_guid; 2]
    );
    // The first change that a guest sees makes it another disk.
    image.begin_change().unwrap();
    let [three, four] = headers(&sim);
    assert_ne!(three.data_write_guid, old.data_write_guid);
    assert_eq!(three.data_write_guid, four.data_write_guid);
    assert_eq!([three.log_guid, four.log_guid], [one.log_guid; 2]);
    image.settle().unwrap();
    assert_eq!(entries::<2>(&sim, 0), [2, slots[0].get() | 6]);
}

#[test]
fn a_flush_costs_one_sync() {
    let sim = Arc::new(empty(4096, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let count = |per_flush: u32, flushes: u32| {
        let first = u32::try_from(image.map().present_count()).unwrap();
        // Growing the file costs a sync of its own.
        let before = sim.counters();
        for flush in 0..flushes {
            for n in 0..per_flush {
                allocate(&*image, first + flush * per_flush + n);
            }
            image.sync().unwrap();
        }
        let after = sim.counters();
        let grown = after.set_lens - before.set_lens;
        assert!(grown <= 20, "{grown}");
        after.syncs - before.syncs - grown
    };
    assert_eq!(count(1, 500), 500);
    assert_eq!(count(30, 20), 20);
    let many = count(1000, 1);
    println!("1000 allocations without a flush: {many} syncs");
    assert!(many <= 1 + 3 * 1000_u64.div_ceil(126), "{many}");
    let before = sim.counters().syncs;
    image.sync().unwrap();
    assert_eq!(sim.counters().syncs, before, "nothing is new");
}

#[test]
fn many_edits_are_one_entry() {
    // 64 blocks of 1 MiB to a page of bits and 512 to a page of the table.
    let sim = Arc::new(empty(200 * 512, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let edits: Vec<MapEdit> = (0..128)
        .map(|n| place(n, image.reserve().unwrap(), None))
        .collect();
    let before = sim.counters().writes;
    image.commit(&edits).unwrap();
    assert_eq!(sim.counters().writes - before, 1);
    // In a page each.
    let edits: Vec<MapEdit> = (0..128)
        .map(|n| place(512 + n * 512, image.reserve().unwrap(), None))
        .collect();
    let before = sim.counters().writes;
    image.commit(&edits).unwrap();
    assert_eq!(sim.counters().writes - before, 2, "two entries");
    drop(image);
    let image = open_shared(&sim, READ_ONLY);
    assert_eq!(image.map().present_count(), 256);
    for edit in edits {
        let MapEdit::Place { block, slot, .. } = edit else {
            panic!()
        };
        assert_eq!(image.map().get(block).slot(), Some(slot));
    }
}

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
    let [movable] = image.frame().movable[..] else {
        panic!("one chunk")
    };
    let is_written = |sector| image.sector_bitmap(block(5)).unwrap().is_written(sector);
    assert_eq!([2, 3, 20, 21].map(is_written), [false, true, true, false]);
    let other = image.reserve().unwrap();
    image.commit(&[place(6, other, None)]).unwrap();
    assert_eq!(image.frame().movable, [movable]);
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
    let [from] = image.frame().movable[..] else {
        panic!("one chunk")
    };
    let to = from.start.plus(3 * MIB);
    assert!(!image.move_metadata(FileRange::new(slot, MIB), to).unwrap());
    assert!(!image.move_metadata(from, slot).unwrap(), "not free");
    assert!(image.move_metadata(from, to).unwrap());
    assert_eq!(sim.unsynced_len(), 0, "durable on return");
    assert_eq!(image.frame().movable, [FileRange::new(to, MIB)]);
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

#[test]
fn what_a_block_keeps_is_released_with_it() {
    let sim = empty(64, 512, false);
    let len = sim.len().unwrap();
    sim.set_len(len + 3 * MIB).unwrap();
    for (index, entry) in [(1_u64, len | 3), (2, (len + 2 * MIB) | 1)] {
        sim.write_all_at(&entry.to_le_bytes(), at(3 * MIB + 8 * index))
            .unwrap();
    }
    let sim = Arc::new(sim);
    let image = open_shared(&sim, OPTIONS);
    assert_eq!(
        image.kept_for(),
        [(at(len), block(1)), (at(len + 2 * MIB), block(2))]
    );
    assert_eq!(image.free_runs(), [FileRange::new(at(len + MIB), MIB)]);
    assert_eq!(image.map().present_count(), 0);
    image.begin_change().unwrap();
    let slot = allocate(&*image, 1);
    assert_eq!(slot, at(len + MIB));
    assert_eq!(image.kept_for(), [(at(len + 2 * MIB), block(2))]);
    assert_eq!(image.reserve_at(at(len)), None, "not before it is durable");
    image.sync().unwrap();
    assert!(image.reserve_at(at(len)).is_some());
    image
        .commit(&[MapEdit::Drop {
            block: block(2),
            reads: Reads::Zeros,
        }])
        .unwrap();
    image.give_back(at(len));
    image.sync().unwrap();
    image.shrink().unwrap();
    image.settle().unwrap();
    assert_eq!(sim.len().unwrap(), len + 2 * MIB);
    assert_eq!(entries::<3>(&sim, 0), [0, slot.get() | 6, 2]);
}

#[test]
fn lengths_are_put_right() {
    let sim = empty(64, 512, false);
    let end = sim.len().unwrap();
    // A leaked tail goes, and an odd end with the first growth or cut.
    for (len, opened, closed) in [
        (end + 512, end + 512, end),
        (end + MIB, end, end),
        (end + MIB - 512, end + MIB - 512, end),
        (end + 7 * MIB + 512, end, end),
    ] {
        let sim = Arc::new(sim.fork());
        sim.set_len(len).unwrap();
        let [old, _] = headers(&sim);
        let image = open_shared(&sim, OPTIONS);
        assert_eq!((sim.len().unwrap(), image.file_len()), (opened, opened));
        image.shrink().unwrap();
        image.settle().unwrap();
        assert_eq!(sim.len().unwrap(), closed);
        for header in headers(&sim) {
            assert_ne!(header.file_write_guid, old.file_write_guid);
            assert_eq!(header.data_write_guid, old.data_write_guid);
        }
    }
    // QEMU ends the file with the disk.
    let sim = Arc::new(empty_of(63 * MIB + 512, 512, false));
    sim.set_len(end + 512).unwrap();
    sim.write_all_at(&(end | 6).to_le_bytes(), at(3 * MIB + 8 * 63))
        .unwrap();
    let view = open_shared(&sim, READ_ONLY);
    let mut bytes = [1; 1024];
    view.storage().read_exact_at(&mut bytes, at(end)).unwrap();
    assert_eq!(bytes, [0; 1024]);
    assert_eq!(sim.len().unwrap(), end + 512);
    let image = open_shared(&sim, OPTIONS);
    assert_eq!(
        (sim.len().unwrap(), image.file_len()),
        (end + MIB, end + MIB)
    );
}

#[test]
fn a_file_that_is_refused_is_not_changed() {
    let sim = Arc::new(empty(64, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let slots: Vec<u64> = (0..3).map(|n| allocate(&*image, n).get()).collect();
    image.sync().unwrap();
    let dirty = sim.kill();
    let check = |sim: &SimStorage, expected: &str| {
        let sim = Arc::new(sim.fork());
        let before = sim.to_bytes();
        let error = open(Arc::<SimStorage>::clone(&sim), OPTIONS)
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(sim.to_bytes() == before, "a refused file changed");
    };
    let [one, two] = headers(&dirty);
    let log = one.log_range();
    let with_log = |change: &dyn Fn(&mut Header)| {
        let sim = dirty.fork();
        for (slot, header) in [&one, &two].into_iter().enumerate() {
            let mut header = header.clone();
            change(&mut header);
            sim.write_all_at(&header.to_bytes(), CurrentHeader::offset_of(slot))
                .unwrap();
        }
        sim
    };
    check(
        &with_log(&|header| header.log_guid = Uuid::from_u128(1)),
        "no valid entry of log",
    );
    check(
        &with_log(&|header| header.sequence_number |= u64::MAX << 16),
        "larger one",
    );
    check(
        &with_log(&|header| header.log_offset = 3 << 40),
        "for its log: the file was cut",
    );
    let cut = dirty.fork();
    cut.set_len(slots[0]).unwrap();
    check(&cut, "as its log says: the file was cut");
    let wiped = dirty.fork();
    wiped.write_zeroes(log).unwrap();
    check(&wiped, "no valid entry of log");
    // A fault behind a replay that is pending.
    let other = dirty.fork();
    other
        .write_all_at(&(slots[0] | 6).to_le_bytes(), at(3 * MIB + 8 * 600))
        .unwrap();
    check(&other, "entry 600");
    let fine = Arc::new(dirty);
    let image = open_shared(&fine, OPTIONS);
    assert_eq!(image.map().present_count(), 3);
}

#[test]
fn a_damaged_region_table_is_restored_from_its_twin() {
    let sim = Arc::new(empty(64, 512, false));
    let good = sim.to_bytes();
    for table in [192 << 10, 256 << 10] {
        let sim = Arc::new(sim.fork());
        sim.write_all_at(&[1; 40], at(table + 4)).unwrap();
        let opened = open(Arc::<SimStorage>::clone(&sim), OPTIONS).unwrap();
        assert_eq!(opened.repaired.len(), 1, "{:?}", opened.repaired);
        opened.image.settle().unwrap();
        let range = 192 << 10..320 << 10;
        assert!(sim.to_bytes()[range.clone()] == good[range]);
    }
}

#[test]
fn a_failed_header_or_entry_poisons() {
    use crate::storage::sim::Fault;
    for writes in 0..3 {
        let sim = Arc::new(empty(64, 512, false));
        let image = open_shared(&sim, OPTIONS);
        if writes == 2 {
            image.begin_change().unwrap();
        }
        let slot = image.reserve().unwrap();
        sim.inject(Fault {
            after: writes % 2,
            ..Fault::next(OpKind::Write)
        });
        let result = image.commit(&[place(0, slot, None)]);
        assert!(result.is_err());
        // The first entry of a session is of no consequence.
        assert_eq!(image.check_writable().is_err(), writes > 0);
        if writes == 0 {
            assert_eq!(image.reserve_at(slot).map(|_| ()), Some(()), "given back");
            image.commit(&[place(0, slot, None)]).unwrap();
        }
    }
}

#[test]
fn pages_wait_in_the_log_while_the_host_is_full() {
    let sim = Arc::new(empty(200 * 512, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let slots: Vec<FileOffset> = (0..200).map(|_| image.reserve().unwrap()).collect();
    sim.set_capacity(Some(sim.allocated_bytes().unwrap()));
    let mut failed = None;
    for (n, slot) in (0..).zip(&slots) {
        match image
            .commit(&[place(n * 512, *slot, None)])
            .and_then(|()| image.sync())
        {
            Ok(()) => {}
            Err(error) => {
                failed = Some((n, error));
                break;
            }
        }
    }
    let (n, error) = failed.unwrap();
    assert!(matches!(error, DiskError::NoSpace(_)), "{error}");
    assert!(n > 100, "{n}");
    assert_eq!(image.map().present_count(), u64::from(n));
    image.check_writable().unwrap();
    let crashed = sim.crash(&mut crate::storage::sim::Choice::AllLost);
    let after = open(Arc::new(crashed), READ_ONLY).unwrap().image;
    assert_eq!(after.map().present_count(), u64::from(n));
    sim.set_capacity(None);
    let slot = slots[usize_from_u32(n)];
    assert!(image.reserve_at(slot).is_some(), "given back");
    image.commit(&[place(n * 512, slot, None)]).unwrap();
    image.settle().unwrap();
}

#[test]
fn format_errors_are_told_apart() {
    let sim = SimStorage::new();
    sim.write_all_at(b"vhdxfile", at(0)).unwrap();
    let error = probe(&sim).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, OpenProblem::Format(FormatError::Corrupt { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("the file was cut"), "{error}");
}
