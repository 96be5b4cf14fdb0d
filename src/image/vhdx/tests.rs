mod children;
mod crash;
mod faults;
mod files;
mod interop;
mod ring;

use std::sync::Arc;

use uuid::Uuid;

use super::*;
use crate::error::OpenProblem;
use crate::format::DiskType;
use crate::format::parent::NewParent;
use crate::format::vhdx::{CurrentHeader, Header};
use crate::image::{Cut, Opened, Reads};
use crate::map::BlockState;
use crate::storage::sim::{Op, OpKind, SimStorage};
use crate::units::usize_from_u32;

const OPTIONS: ImageOptions = ImageOptions {
    read_only: false,
    punch_holes: true,
};
const READ_ONLY: ImageOptions = ImageOptions {
    read_only: true,
    ..OPTIONS
};

/// Of any parent.
fn open(storage: Arc<SimStorage>, options: ImageOptions) -> Result<Opened, OpenProblem> {
    super::open(storage, options, &|_| Ok(()))
}

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
    image.cut(Cut::ALL).unwrap();
    while image.punch_free(u64::MAX).unwrap() {}
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
    // That many changes fill the log, which then begins anew.
    assert_eq!(count(1, 120), 120);
    assert_eq!(count(120, 1), 1 + 4);
    for (per_flush, flushes) in [(1, 500), (30, 20), (1000, 1)] {
        let syncs = count(per_flush, flushes);
        let more = 4 * u64::from(per_flush * flushes).div_ceil(125);
        assert!(syncs <= u64::from(flushes) + more, "{per_flush}: {syncs}");
    }
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
    let entries_of = |edits: &[MapEdit]| {
        sim.take_log();
        image.commit(edits).unwrap();
        let log = FileRange::new(at(MIB), MIB);
        let ops = sim.take_log();
        let in_log = |op: &&Op| op.kind == OpKind::Write && op.range.overlaps(log);
        ops.iter().filter(in_log).count()
    };
    assert_eq!(entries_of(&edits), 1);
    // In a page each.
    let edits: Vec<MapEdit> = (0..128)
        .map(|n| place(512 + n * 512, image.reserve().unwrap(), None))
        .collect();
    assert_eq!(entries_of(&edits), 2);
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
