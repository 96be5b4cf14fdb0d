//! What files are opened, and what is put right then.

use super::*;
use crate::error::{FormatError, OpenProblem};

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
    image.cut(Cut::ALL).unwrap();
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
        // A log never claims a longer file than there is.
        let attached = Arc::new(sim.fork());
        open_shared(&attached, OPTIONS).begin_change().unwrap();
        let odd = open_shared(&Arc::new(attached.kill()), OPTIONS);
        assert!(odd.file_len() >= end);
        image.cut(Cut::ALL).unwrap();
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
    check(&cut, "beyond the end of the file");
    let unused = dirty.fork();
    unused.set_len(slots.iter().max().unwrap() + MIB).unwrap();
    check(&unused, "as its log says: the file was cut");
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

/// Found by fuzzing: the headers went on to name that version beside a log of ours, so that nothing could
/// open a file whose last user had died.
#[test]
fn a_log_of_ours_is_of_our_version_whatever_the_header_said() {
    let sim = empty(8, 512, false);
    for (slot, mut header) in headers(&sim).into_iter().enumerate() {
        header.log_version = 5;
        sim.write_all_at(&header.to_bytes(), CurrentHeader::offset_of(slot))
            .unwrap();
    }
    let sim = Arc::new(sim);
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    allocate(&*image, 1);
    image.sync().unwrap();
    let next = Arc::new(sim.kill());
    let again = open_shared(&next, OPTIONS);
    assert_eq!(again.map().present_count(), 1);
}

/// Found by fuzzing: the file was made that long, and the space in between given back piece by piece.
#[test]
fn a_log_far_behind_the_end_makes_the_file_no_longer() {
    let sim = empty(8, 512, false);
    for (slot, mut header) in headers(&sim).into_iter().enumerate() {
        header.log_offset = 254 << 40;
        sim.write_all_at(&header.to_bytes(), CurrentHeader::offset_of(slot))
            .unwrap();
    }
    let sim = Arc::new(sim);
    let before = sim.len().unwrap();
    match open(Arc::<SimStorage>::clone(&sim), OPTIONS) {
        Err(OpenProblem::NotWritable(error)) => {
            assert!(error.to_string().contains("the log"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    open_shared(&sim, READ_ONLY);
    let report = super::super::verify::verify(&*sim, crate::image::Repair::Safe).unwrap();
    assert_eq!(report.errors.len(), 1, "{report:?}");
    assert_eq!(sim.len().unwrap(), before);
}

/// What the last user left in the log, and holes: it is stored, and else as it was, on every host.
#[test]
fn a_log_is_stored_and_otherwise_left_as_it_was() {
    let sim = empty(8, 512, false);
    let [header, _] = headers(&sim);
    let log = FileRange::new(at(header.log_offset), u64::from(header.log_len));
    sim.punch_hole(log).unwrap();
    let old = at(log.end().get() - 8192);
    sim.write_all_at(&[7; 4096], old).unwrap();
    let sim = Arc::new(sim);
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    assert_eq!(sim.next_data(log.start, log.end()).unwrap(), Some(log));
    let mut found = [0; 4096];
    sim.read_exact_at(&mut found, old).unwrap();
    assert_eq!(found, [7; 4096]);
}

/// Of what is done while a sync runs it says nothing: without its log entry, the table names the slot still.
#[test]
fn a_sync_does_not_cover_what_is_done_while_it_runs() {
    let sim = Arc::new(empty(8, 512, false));
    let image: Arc<dyn Image> = Arc::from(open_shared(&sim, OPTIONS));
    let slot = allocate(&*image, 1);
    image.sync().unwrap();
    image.note_payload();
    let other = Arc::clone(&image);
    sim.on_op(move |_, op: &Op| {
        if op.kind == OpKind::Sync {
            let (block, reads) = (block(1), Reads::Zeros);
            other.commit(&[MapEdit::Drop { block, reads }]).unwrap();
        }
    });
    image.sync().unwrap();
    sim.clear_hook();
    assert_eq!(image.reserve_at(slot), None);
    assert_ne!(sim.unsynced_len(), 0);
    image.sync().unwrap();
    assert_eq!(sim.unsynced_len(), 0);
    assert!(image.reserve_at(slot).is_some());
}

#[test]
fn a_new_child_is_none_or_whole_after_a_power_cut() {
    let parent = NewParent {
        identity: Identity::Vhdx(Uuid::from_u128(7)),
        disk_len: 8 * MIB,
        sector_size: 512,
        mtime: std::time::UNIX_EPOCH,
        relative: format!(r".\{}.vhdx", "p".repeat(600)),
        absolute: String::new(),
    };
    let disk = NewDisk {
        disk_type: DiskType::Differencing,
        disk_len: 8 * MIB,
        block_size: 1 << 20,
        sector_size: 512,
        physical_sector_size: 4096,
        parent: Some(&parent),
    };
    let whole = Arc::new(SimStorage::new());
    create(&*whole, &disk).unwrap();
    let link = format!("{:?}", open_shared(&whole, READ_ONLY).parent());
    for changes in 0.. {
        let sim = SimStorage::new();
        sim.cut_after(changes);
        let made = create(&sim, &disk);
        for mut choice in sim.choices(8, 100, changes) {
            if let Ok(opened) = open(Arc::new(sim.crash(&mut choice)), READ_ONLY) {
                let found = format!("{:?}", opened.image.parent());
                assert_eq!(found, link, "{changes}, {choice:?}");
            }
        }
        if made.is_ok() {
            return;
        }
    }
}

/// Until the entry that no longer names it is durable, a block at the end keeps its bytes.
#[test]
fn the_end_is_cut_once_no_table_names_it() {
    let start = Arc::new(empty(8, 512, false));
    let image = open_shared(&start, OPTIONS);
    allocate(&*image, 0);
    let slot = allocate(&*image, 1);
    let data = vec![7; usize_from(MIB)];
    start.write_all_at(&data, slot).unwrap();
    image.cut(Cut::ALL).unwrap();
    image.settle().unwrap();
    drop(image);
    for changes in 0.. {
        let sim = Arc::new(start.fork());
        let image = open_shared(&sim, OPTIONS);
        sim.cut_after(changes);
        let (block, reads) = (block(1), Reads::Zeros);
        let dropped = image.commit(&[MapEdit::Drop { block, reads }]);
        let cut = dropped.and_then(|()| image.cut(Cut::ALL));
        for mut choice in sim.choices(8, 50, changes) {
            let left = Arc::new(sim.crash(&mut choice));
            let image = open_shared(&left, READ_ONLY);
            if let Some(slot) = image.map().get(block).slot() {
                let mut found = vec![0; data.len()];
                left.read_exact_at(&mut found, slot).unwrap();
                assert!(found == data, "{changes}, {choice:?}");
            }
        }
        if cut.is_ok() && !sim.is_cut() {
            assert!(sim.len().unwrap() < start.len().unwrap());
            return;
        }
    }
}
