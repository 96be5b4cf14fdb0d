//! Compaction of fixed disks: what belongs to no block goes, holes come on request, and nothing else
//! changes.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use support::fat::Fat;
use support::size;
use vhdfs::check::{CheckOptions, CheckReport, check_storage};
use vhdfs::compact::{CompactOptions, CompactReport};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::error::CompactError;
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Random, SimStorage};
use vhdfs::units::FileOffset;

const MIB: u64 = 1 << 20;
/// Of a VHDX: where the block table and the blocks are.
const BAT: u64 = 3 * MIB;
const DATA: u64 = 4 * MIB;
const FORMATS: [Format; 2] = [Format::Vhd, Format::Vhdx];

fn at(offset: u64) -> FileOffset {
    FileOffset::new(offset)
}

/// A fixed disk of `len` bytes, in blocks of 1 MiB.
fn fixed(format: Format, len: u64) -> SimStorage {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let options = CreateOptions {
        block_size: (format == Format::Vhdx).then_some(1 << 20),
        ..CreateOptions::new(format, DiskType::Fixed, len)
    };
    create(&path, &options).unwrap();
    SimStorage::from_file(&path).unwrap()
}

fn open(storage: &Arc<SimStorage>, read_only: bool) -> Arc<Disk> {
    let options = OpenOptions {
        read_only,
        punch_holes: false,
        ..OpenOptions::default()
    };
    let storage: Arc<dyn Storage> = storage.clone();
    Disk::open_storage(storage, Path::new("simulated"), &options).unwrap()
}

fn content(storage: &Arc<SimStorage>) -> Vec<u8> {
    let disk = open(storage, true);
    let mut bytes = vec![0; size(disk.len())];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn compact(
    storage: &Arc<SimStorage>,
    options: &CompactOptions,
) -> Result<CompactReport, CompactError> {
    let disk = open(storage, options.dry_run);
    let report = disk.compact(options).wait();
    disk.close()?;
    report
}

const DRY_RUN: CompactOptions = CompactOptions {
    dry_run: true,
    ..options()
};

const PUNCH: CompactOptions = CompactOptions {
    punch_holes: true,
    ..options()
};

const fn options() -> CompactOptions {
    CompactOptions {
        dry_run: false,
        scan: true,
        move_blocks: true,
        punch_holes: false,
        drop_identical: true,
        fs_aware: false,
        punch_free: false,
        free_swap: false,
        replay_journal: false,
        no_children: false,
    }
}

fn is_sound(storage: &Arc<SimStorage>) {
    let report = check_storage(&**storage, &CheckOptions::default()).unwrap();
    assert_eq!(report, CheckReport::default());
}

/// A fixed VHDX of 6 blocks as QEMU makes them: room for all, all of them zero, and 3 that were written
/// to behind; with junk in the room, if so.
fn of_qemu(has_junk: bool) -> SimStorage {
    let sim = fixed(Format::Vhdx, 6 * MIB);
    for (block, place) in [
        (0, None),
        (1, Some(0)),
        (2, None),
        (3, Some(1)),
        (4, Some(2)),
        (5, None),
    ] {
        let entry = match place {
            None => 2,
            Some(n) => {
                let place = DATA + 6 * MIB + n * MIB;
                let data = vec![0x31 + u8::try_from(block).unwrap(); size(MIB)];
                sim.write_all_at(&data, at(place)).unwrap();
                place | 6
            }
        };
        sim.write_all_at(&entry.to_le_bytes(), at(BAT + 8 * block))
            .unwrap();
    }
    if has_junk {
        sim.write_all_at(&vec![0x5a; size(5 * MIB)], at(DATA + 4096))
            .unwrap();
    }
    sim.sync().unwrap();
    sim
}

#[test]
fn every_block_of_a_fixed_vhdx_gets_its_place_and_no_more() {
    for has_junk in [false, true] {
        let storage = Arc::new(of_qemu(has_junk));
        let before = content(&storage);
        let identity = open(&storage, true).identity();
        let told = compact(&storage, &DRY_RUN).unwrap();
        let report = compact(&storage, &options()).unwrap();
        assert_eq!(report.length_after, DATA + 6 * MIB);
        assert_eq!(
            (told.length_after, told.blocks_moved),
            (report.length_after, 3)
        );
        assert_eq!(report.blocks_moved, 3);
        assert_eq!(
            report.kept.iter().map(|kept| kept.bytes).sum::<u64>(),
            report.length_after
        );
        assert_eq!(storage.len().unwrap(), report.length_after);
        assert!(content(&storage) == before);
        let disk = open(&storage, true);
        assert_eq!(disk.info().unwrap().blocks_allocated, 6);
        assert_eq!(disk.identity(), identity, "no guest reads anything else");
        drop(disk);
        is_sound(&storage);
        assert!(matches!(
            compact(&storage, &options()),
            Err(CompactError::Fixed)
        ));
    }
}

#[test]
fn packing_can_be_cut_off_anywhere() {
    let whole = of_qemu(true);
    let before = content(&Arc::new(whole.fork()));
    for ops in 0.. {
        let storage = Arc::new(whole.fork());
        // A cut disk fails to close, too.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let options_of_disk = OpenOptions {
                punch_holes: false,
                ..OpenOptions::default()
            };
            let shared: Arc<dyn Storage> = storage.clone();
            let disk = Disk::open_storage(shared, Path::new("simulated"), &options_of_disk);
            if let Ok(disk) = disk {
                // A guest was at work: what begins with it is no sync for what follows.
                disk.write_at(&[0x32; 4096], MIB).unwrap();
                disk.flush().unwrap();
                storage.cut_after(ops);
                let _ = disk.compact(&options()).wait();
                let _ = disk.close();
            }
        }));
        done.unwrap();
        for mut choice in storage.choices(2, 2, ops) {
            let crashed = Arc::new(storage.crash(&mut choice));
            assert!(content(&crashed) == before, "cut after {ops}: {choice:?}");
            match compact(&crashed, &options()) {
                Ok(_) | Err(CompactError::Fixed) => {}
                Err(error) => panic!("cut after {ops}: {choice:?}: {error}"),
            }
            assert!(
                content(&crashed) == before,
                "cut after {ops}: {choice:?}: packed"
            );
            assert_eq!(
                crashed.len().unwrap(),
                DATA + 6 * MIB,
                "cut after {ops}: {choice:?}"
            );
            is_sound(&crashed);
        }
        if !storage.is_cut() {
            return;
        }
    }
}

#[test]
fn a_full_fixed_disk_is_left_alone_until_holes_are_asked_for() {
    for format in FORMATS {
        let storage = Arc::new(fixed(format, 6 * MIB));
        let disk = open(&storage, false);
        disk.write_at(&vec![0; size(6 * MIB)], 0).unwrap();
        for (byte, place) in [(1, 0), (2, 3 * MIB + 8192)] {
            disk.write_at(&vec![byte; 512 << 10], place).unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        let (before, length) = (content(&storage), storage.len().unwrap());
        assert!(
            matches!(compact(&storage, &options()), Err(CompactError::Fixed)),
            "{format:?}"
        );
        let stored = storage.allocated_bytes().unwrap();
        let told = compact(
            &storage,
            &CompactOptions {
                dry_run: true,
                ..PUNCH
            },
        )
        .unwrap();
        assert_eq!(
            storage.allocated_bytes().unwrap(),
            stored,
            "{format:?}: a dry run"
        );
        let identity = open(&storage, true).identity();
        let report = compact(&storage, &PUNCH).unwrap();
        assert_eq!(
            report.allocated_after,
            storage.allocated_bytes().unwrap(),
            "{format:?}"
        );
        assert_eq!(
            (told.length_after, report.length_after),
            (length, length),
            "{format:?}"
        );
        assert!(
            stored - report.allocated_after >= 5 * MIB - 8192,
            "{format:?}: {report:?}"
        );
        assert!(
            told.allocated_after.abs_diff(report.allocated_after) < 64 << 10,
            "{format:?}: {told:?}"
        );
        assert_eq!(
            report.kept.iter().map(|kept| kept.bytes).sum::<u64>(),
            length
        );
        assert!(content(&storage) == before, "{format:?}");
        assert_eq!(
            open(&storage, true).identity(),
            identity,
            "{format:?}: zeros are zeros"
        );
        is_sound(&storage);
    }
}

/// A fixed disk that holds a file system with junk where it is free.
fn with_fat(format: Format) -> (Arc<SimStorage>, Fat) {
    let fat = Fat::new(8 * MIB, 5);
    let storage = Arc::new(fixed(format, 8 * MIB));
    let disk = open(&storage, false);
    disk.write_at(&fat.bytes, 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    (Arc::new(storage.fork()), fat)
}

const FREE: CompactOptions = CompactOptions {
    fs_aware: true,
    ..PUNCH
};

#[test]
fn what_filesystems_call_free_goes_from_a_disk_that_no_child_takes_for_its_parent() {
    for format in FORMATS {
        let (whole, fat) = with_fat(format);
        let identity = open(&whole, true).identity();
        let storage = Arc::new(whole.fork());
        let told = compact(
            &storage,
            &CompactOptions {
                dry_run: true,
                ..FREE
            },
        )
        .unwrap();
        let report = compact(&storage, &FREE).unwrap();
        assert_eq!(fat.first_difference(&content(&storage)), None, "{format:?}");
        assert!(report.bytes_punched > MIB, "{format:?}: {report:?}");
        assert!(
            report.parts.iter().any(|part| part.reclaimed > MIB),
            "{format:?}: {report:?}"
        );
        assert!(told.new_identity && report.new_identity, "{format:?}");
        assert_ne!(open(&storage, true).identity(), identity, "{format:?}");
        is_sound(&storage);

        // Nobody is over it: a VHD keeps what other programs know it by.
        let storage = Arc::new(whole.fork());
        let vouched = CompactOptions {
            no_children: true,
            ..FREE
        };
        let report = compact(&storage, &vouched).unwrap();
        assert_eq!(report.new_identity, format == Format::Vhdx);
        let is_kept = open(&storage, true).identity() == identity;
        assert_eq!(is_kept, format == Format::Vhd);

        // At no moment is a byte gone under the old identity.
        for ops in 0.. {
            let storage = Arc::new(whole.fork());
            let disk = open(&storage, false);
            storage.cut_after(ops);
            let _ = disk.compact(&FREE).wait();
            let _ = disk.close();
            for mut choice in storage.choices(2, 1, ops) {
                let crashed = Arc::new(storage.crash(&mut choice));
                let found = content(&crashed);
                assert_eq!(
                    fat.first_difference(&found),
                    None,
                    "{format:?}: {ops}: {choice:?}"
                );
                let is_same = open(&crashed, true).identity() == identity;
                assert!(
                    !is_same || found == fat.bytes,
                    "{format:?}: cut after {ops}: {choice:?}"
                );
            }
            if !storage.is_cut() || ops > 14 {
                break;
            }
        }
    }
}

#[test]
fn a_guest_that_writes_meanwhile_wins() {
    const DISK: u64 = 4 * MIB;
    for format in FORMATS {
        let storage = Arc::new(fixed(format, DISK));
        let disk = open(&storage, false);
        disk.write_at(&vec![0; size(DISK)], 0).unwrap();
        let is_over = AtomicBool::new(false);
        let mut expected = vec![0_u8; size(DISK)];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..60 {
                    disk.compact(&PUNCH).wait().unwrap();
                }
                is_over.store(true, Ordering::SeqCst);
            });
            let mut random = Random::new(7);
            while !is_over.load(Ordering::SeqCst) {
                let place = random.below(DISK / 4096) * 4096;
                let byte = u8::try_from(random.below(3)).unwrap();
                let range = size(place)..size(place) + 4096;
                expected[range.clone()].fill(byte);
                disk.write_at(&expected[range], place).unwrap();
            }
        });
        let mut found = vec![0; size(DISK)];
        disk.read_at(&mut found, 0).unwrap();
        let lost = (0..)
            .zip(found.iter().zip(&expected))
            .find(|(_, (found, own))| found != own);
        assert_eq!(lost, None::<(u64, _)>, "{format:?}: a write was lost");
        disk.close().unwrap();
    }
}

/// The footer is where it is, and not where it would be without the gap before it.
#[test]
fn a_footer_after_a_gap_gets_the_new_identity() {
    let (whole, _) = with_fat(Format::Vhd);
    for gap in [512, 1 << 20] {
        let mut bytes = whole.to_bytes();
        let footer = bytes.split_off(bytes.len() - 512);
        bytes.resize(bytes.len() + gap, 0);
        bytes.extend(&footer);
        let storage = Arc::new(SimStorage::from_bytes(&bytes));
        let identity = open(&storage, true).identity();
        let report = compact(&storage, &FREE).unwrap();
        assert!(report.new_identity && report.bytes_punched > MIB);
        assert_ne!(open(&storage, true).identity(), identity, "{gap}");
        let after = storage.to_bytes();
        assert!(after[size(8 * MIB)..size(8 * MIB) + gap] == vec![0; gap]);
    }
}
