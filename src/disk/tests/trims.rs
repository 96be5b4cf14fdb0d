//! Discards and zero writes that free nothing new.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::compact::CompactOptions;
use crate::storage::sim::OpKind;
use crate::units::{BlockIndex, FileRange};

/// A part of a block, all of one, several, and one that no granule starts or ends with.
const RANGES: [(u64, u64); 4] = [
    (MIB / 2, 256 << 10),
    (MIB, MIB),
    (2 * MIB + 4096, 2 * MIB),
    (5 * MIB + 1000, 100_000),
];

fn trim(disk: &Disk) {
    for (offset, len) in RANGES {
        disk.discard(offset, len).unwrap();
    }
}

/// What the host is asked for by `act`.
fn asked(storage: &SimStorage, act: impl FnOnce()) -> Vec<OpKind> {
    storage.take_log();
    act();
    let mut kinds: Vec<OpKind> = storage.take_log().iter().map(|op| op.kind).collect();
    kinds.dedup();
    kinds
}

fn kinds_of_disk() -> Vec<(Arc<SimStorage>, Arc<Disk>)> {
    let mut disks = vec![
        full(Format::Vhd, DiskType::Dynamic),
        full(Format::Vhd, DiskType::Fixed),
        full(Format::Vhdx, DiskType::Dynamic),
        full(Format::Vhdx, DiskType::Fixed),
    ];
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, _, disk) = child(format);
        disk.write_at(&[7; 1 << 20], MIB / 2).unwrap();
        disks.push((storage, disk));
    }
    disks
}

#[test]
fn the_same_range_is_punched_once() {
    for (storage, disk) in kinds_of_disk() {
        trim(&disk);
        disk.flush().unwrap();
        let changes = disk.io_count();
        let told = format!("{:?}", disk.info().unwrap());
        let again = asked(&storage, || (0..100).for_each(|_| trim(&disk)));
        // The ends that are no granules are looked at; a disk without a table asks the host.
        let allowed = [OpKind::Read, OpKind::Query];
        assert!(
            again.iter().all(|kind| allowed.contains(kind)),
            "{told}: {again:?}"
        );
        if !disk.geometry().is_flat {
            let (offset, len) = RANGES[0];
            let again = asked(&storage, || disk.discard(offset, len).unwrap());
            assert_eq!(again, [], "{told}");
            let zeros = vec![0; usize_from(len)];
            let again = asked(&storage, || disk.write_at(&zeros, offset).unwrap());
            assert_eq!(again, [], "{told}");
        }
        assert_eq!(disk.io_count(), changes, "{told}");
        // What was written to the ends since goes, too.
        let (offset, len) = RANGES[3];
        for end in [offset, offset + len - 8] {
            disk.write_at(&[9; 8], end).unwrap();
            disk.discard(offset, len).unwrap();
        }
        for (offset, len) in RANGES {
            assert!(read(&disk, offset, len).iter().all(|byte| *byte == 0));
            let around = [read(&disk, offset + len, 8), read(&disk, offset - 8, 8)];
            assert_eq!(around, [[7; 8]; 2], "{told}");
        }
    }
}

/// A disk that was only trimmed where its file has holes stays what its children know it as.
#[test]
fn what_was_punched_earlier_is_found_to_be_a_hole() {
    for (format, kind) in [
        (Format::Vhdx, DiskType::Dynamic),
        (Format::Vhd, DiskType::Dynamic),
        (Format::Vhd, DiskType::Fixed),
    ] {
        let (storage, disk) = full(format, kind);
        let (offset, len) = RANGES[0];
        disk.discard(offset, len).unwrap();
        disk.close().unwrap();
        let disk = open(&storage, None);
        let identity = disk.identity();
        let asked = asked(&storage, || disk.discard(offset, len).unwrap());
        assert_eq!(asked, [OpKind::Query], "{format}");
        disk.close().unwrap();
        assert_eq!(open(&storage, None).identity(), identity);
    }
}

#[test]
fn what_a_scan_found_to_be_a_hole_is_not_punched() {
    let (storage, disk) = full(Format::Vhd, DiskType::Dynamic);
    let data = disk
        .geometry()
        .data_range(disk.image.map().get(BlockIndex::new(0)).slot().unwrap());
    drop(disk);
    let hole = FileRange::new(data.start.plus(MIB / 2), MIB / 2);
    storage.punch_hole(hole).unwrap();
    let disk = open(&storage, None);
    let options = CompactOptions {
        punch_holes: true,
        ..CompactOptions::default()
    };
    disk.compact(&options).wait().unwrap();
    let asked = asked(&storage, || disk.discard(MIB / 2, MIB / 4).unwrap());
    assert_eq!(asked, []);
}

/// Zeros that were written over a hole take space again, which the next discard gives back.
#[test]
fn zeros_that_are_stored_are_punched() {
    let (storage, disk) = full(Format::Vhd, DiskType::Dynamic);
    disk.discard(0, MIB / 2).unwrap();
    let mut mixed = vec![0; 8192];
    mixed[5000] = 1;
    disk.write_at(&mixed, 8192).unwrap();
    let punched = asked(&storage, || disk.discard(0, MIB / 4).unwrap());
    assert!(punched.contains(&OpKind::PunchHole), "{punched:?}");
    assert_eq!(asked(&storage, || disk.discard(0, MIB / 2).unwrap()), []);
    // Short zeros are written, once.
    disk.write_at(&[9; 8192], 0).unwrap();
    let written = asked(&storage, || disk.write_at(&[0; 4096], 0).unwrap());
    assert_eq!(written, [OpKind::Write]);
    assert_eq!(
        asked(&storage, || disk.write_at(&[0; 4096], 0).unwrap()),
        []
    );
    let punched = asked(&storage, || disk.discard(0, 4096).unwrap());
    assert!(punched.contains(&OpKind::PunchHole), "{punched:?}");
}

/// A host that cannot punch is asked once; zeros that are there are not written again.
#[test]
fn a_host_that_cannot_punch() {
    let (storage, disk) = full(Format::Vhd, DiskType::Dynamic);
    storage.set_punch_supported(false);
    let first = asked(&storage, || trim(&disk));
    assert!(first.contains(&OpKind::PunchHole) && first.contains(&OpKind::WriteZeroes));
    let (offset, len) = RANGES[0];
    assert_eq!(asked(&storage, || disk.discard(offset, len).unwrap()), []);
    let other = asked(&storage, || disk.discard(7 * MIB, MIB / 2).unwrap());
    assert!(!other.contains(&OpKind::PunchHole), "{other:?}");
}

/// Neither of two requests that zero the same range at a time knows what the other does: it is looked at again.
#[test]
fn what_two_zero_at_a_time_is_not_taken_for_data() {
    for zeros_written in [false, true] {
        let (storage, disk) = full(Format::Vhdx, DiskType::Dynamic);
        let (offset, len) = RANGES[0];
        let (other, once) = (Arc::clone(&disk), AtomicBool::new(false));
        storage.on_op(move |_, op| {
            if op.kind == OpKind::PunchHole && !once.swap(true, Ordering::SeqCst) {
                other.discard(offset, len).unwrap();
            }
        });
        match zeros_written {
            true => disk.write_at(&vec![0; usize_from(len)], offset).unwrap(),
            false => disk.discard(offset, len).unwrap(),
        }
        storage.clear_hook();
        let zeros = || disk.tracker.zeros(BlockIndex::new(0), offset, len);
        assert_eq!(zeros(), None);
        let options = CompactOptions {
            punch_holes: true,
            ..CompactOptions::default()
        };
        disk.compact(&options).wait().unwrap();
        assert!(zeros().is_some(), "found by a scan");
    }
}
