//! Compaction by what a guest's file system calls free: nothing else goes, whatever happens meanwhile.
//!
//! On a file system that the tests write themselves; `tests/guests` has real ones.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use support::fat::Fat;
use support::{env_number, size};
use vhdfs::check::{CheckOptions, check_storage};
use vhdfs::compact::{CompactOptions, CompactReport, IdlePolicy, IdleWork, Next};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::error::CompactError;
use vhdfs::format::parent::NewParent;
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{OpKind, Random, SimStorage};
use vhdfs::units::FileOffset;

const DISK: u64 = 24 << 20;

#[derive(Clone, Copy, Debug)]
struct Kind {
    format: Format,
    child: bool,
}

const KINDS: [Kind; 4] = [
    Kind {
        format: Format::Vhd,
        child: false,
    },
    Kind {
        format: Format::Vhdx,
        child: false,
    },
    Kind {
        format: Format::Vhd,
        child: true,
    },
    Kind {
        format: Format::Vhdx,
        child: true,
    },
];

/// A disk that holds a file system, in memory, and its parent.
struct Made {
    storage: SimStorage,
    parent: Option<Arc<Disk>>,
    fat: Fat,
}

impl Made {
    fn new(kind: Kind, seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = |disk_type| CreateOptions {
            block_size: Some(match kind.format {
                Format::Vhd => 512 << 10,
                _ => 1 << 20,
            }),
            ..CreateOptions::new(kind.format, disk_type, DISK)
        };
        let fat = Fat::new(DISK, seed);
        let path = folder.path().join("disk");
        let mut parent = None;
        if kind.child {
            let path = folder.path().join("parent");
            create(&path, &options(DiskType::Dynamic)).unwrap();
            let below = Disk::open(&path, &OpenOptions::default()).unwrap();
            for at in (0..DISK).step_by(3 << 20) {
                let mut piece = fat.bytes[size(at)..size(at) + (1 << 20)].to_vec();
                if at == 12 << 20 {
                    // Where the child has zeros, the parent has none.
                    piece.fill(0x77);
                }
                below.write_at(&piece, at).unwrap();
            }
            below.close().unwrap();
            parent = Some(below);
        }
        let new_parent = parent.as_ref().map(|below| NewParent {
            identity: below.identity(),
            disk_len: DISK,
            sector_size: 512,
            mtime: SystemTime::now(),
            relative: ".\\parent".to_owned(),
            absolute: "C:\\parent".to_owned(),
        });
        let disk_type = match kind.child {
            true => DiskType::Differencing,
            false => DiskType::Dynamic,
        };
        let options = CreateOptions {
            parent: new_parent,
            ..options(disk_type)
        };
        create(&path, &options).unwrap();
        let storage = SimStorage::from_file(&path).unwrap();
        let made = Self {
            storage: storage.fork(),
            parent,
            fat,
        };
        let storage = Arc::new(storage);
        let disk = made.open(&storage);
        for (at, piece) in (0..).step_by(1 << 20).zip(made.fat.bytes.chunks(1 << 20)) {
            disk.write_at(piece, at).unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        Self {
            storage: storage.fork(),
            ..made
        }
    }

    fn open(&self, storage: &Arc<SimStorage>) -> Arc<Disk> {
        let storage: Arc<dyn Storage> = storage.clone();
        let options = OpenOptions {
            punch_holes: false,
            ..OpenOptions::default()
        };
        Disk::open_over(
            storage,
            Path::new("simulated"),
            &options,
            self.parent.clone(),
        )
        .unwrap()
    }

    /// All that is in use reads as it did, and the file is sound.
    fn verify(&self, storage: &Arc<SimStorage>) -> Result<(), String> {
        let disk = self.open(storage);
        let found = content(&disk);
        drop(disk);
        if let Some(sector) = self.fat.first_difference(&found) {
            return Err(format!("sector {sector} is not what it was"));
        }
        let report = check_storage(&**storage, &CheckOptions::default()).unwrap();
        match report.is_clean() {
            true => Ok(()),
            false => Err(format!("{report:?}")),
        }
    }
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut found = vec![0; size(DISK)];
    disk.read_at(&mut found, 0).unwrap();
    found
}

fn options() -> CompactOptions {
    CompactOptions {
        fs_aware: true,
        ..CompactOptions::default()
    }
}

fn compact(disk: &Arc<Disk>, options: CompactOptions) -> CompactReport {
    disk.compact(&options).wait().unwrap()
}

/// The file ends as short as if the guest had zeroed what is free.
#[test]
fn what_is_free_goes() {
    for (kind, seed) in KINDS
        .into_iter()
        .flat_map(|kind| [(kind, 1), (kind, 2), (kind, 3)])
    {
        let made = Made::new(kind, seed);
        let storage = Arc::new(made.storage.fork());
        let disk = made.open(&storage);
        let predicted = compact(
            &disk,
            CompactOptions {
                dry_run: true,
                ..options()
            },
        );
        assert!(
            content(&disk) == made.fat.bytes,
            "a dry run changes nothing"
        );
        let report = compact(&disk, options());
        drop(disk);
        made.verify(&storage).unwrap();
        let len = storage.len().unwrap();
        assert_eq!(
            (report.length_after, predicted.length_after),
            (len, len),
            "{kind:?}"
        );
        assert_eq!(report.kept.iter().map(|kept| kept.bytes).sum::<u64>(), len);
        assert_eq!(predicted.parts, report.parts);
        let [part] = &report.parts[..] else {
            panic!("{report:?}")
        };
        let free: u64 = made.fat.free_runs().iter().map(|(_, len)| len).sum();
        assert_eq!((part.content, &part.skipped), (Some("FAT16"), &None));
        assert_eq!(part.free, free);
        assert!(part.reclaimed > 0 && part.reclaimed <= free, "{part:?}");

        let zeroed = Arc::new(made.storage.fork());
        let disk = made.open(&zeroed);
        for (start, len) in made.fat.free_runs() {
            disk.write_zeroes(start, len).unwrap();
        }
        compact(&disk, CompactOptions::default());
        drop(disk);
        let least = zeroed.len().unwrap();
        assert_eq!(len, least, "{kind:?}");
    }
}

/// Holes are punched for what is free inside blocks that stay.
#[test]
fn free_parts_of_blocks_are_punched() {
    for kind in KINDS {
        let made = Made::new(kind, 4);
        let storage = Arc::new(made.storage.fork());
        let disk = made.open(&storage);
        compact(&disk, options());
        let before = storage.allocated_bytes().unwrap();
        let punching = CompactOptions {
            punch_holes: true,
            ..options()
        };
        let report = compact(&disk, punching);
        let after = storage.allocated_bytes().unwrap();
        assert!(report.bytes_punched > 0 && before - after >= report.bytes_punched / 2);
        assert_eq!(compact(&disk, punching).bytes_punched, 0, "once is enough");
        drop(disk);
        made.verify(&storage).unwrap();
    }
}

/// Power is cut at any moment: what is in use is there.
#[test]
fn power_cuts() {
    let soak = env_number("VHDFS_SOAK", 1);
    for kind in KINDS {
        let made = Arc::new(Made::new(kind, 5));
        let mut random = Random::new(env_number("VHDFS_SEED", 1));
        let storage = Arc::new(made.storage.fork());
        let disk = made.open(&storage);
        // Not all: each state is read in full.
        let (every, number) = (4_u64.div_ceil(soak), AtomicU64::new(0));
        let cuts = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let kept = cuts.clone();
        storage.on_op(move |storage, op| {
            if op.kind.changes() && number.fetch_add(1, Ordering::Relaxed) % every == 0 {
                kept.lock().push(storage.fork());
            }
        });
        let punching = CompactOptions {
            punch_holes: true,
            ..options()
        };
        compact(&disk, punching);
        storage.clear_hook();
        drop(disk);
        let cuts = std::mem::take(&mut *cuts.lock());
        assert!(cuts.len() > 3, "{kind:?}: {}", cuts.len());
        for cut in &cuts {
            let choices = cut.choices(0, 4, random.next());
            for _ in 0..3 {
                let choice = &choices[size(random.below(choices.len().try_into().unwrap()))];
                let after = Arc::new(cut.crash(&mut choice.clone()));
                if let Err(error) = made.verify(&after) {
                    panic!("{kind:?}, {choice:?}: {error}; {:#?}", cut.unsynced());
                }
            }
        }
        println!("{kind:?}: {} cuts", cuts.len());
    }
}

/// A guest writes, unannounced, at any moment: its data is there, and what is in use.
#[test]
fn writes_at_any_moment() {
    for kind in KINDS {
        let made = Made::new(kind, 6);
        let (_, calls) = written_at(&made, u64::MAX);
        let step = calls.div_ceil(12 * env_number("VHDFS_SOAK", 1)).max(1);
        let mut given_up = 0;
        for moment in (0..calls).step_by(size(step)) {
            let (report, _) = written_at(&made, moment);
            given_up += u32::from(report.not_surveyed.is_some());
        }
        assert!(given_up > 0, "{kind:?}: no write came in the middle");
    }
}

/// Compacts while a guest writes at the given call of the host; says what was done in how many calls.
fn written_at(made: &Made, moment: u64) -> (CompactReport, u64) {
    let storage = Arc::new(made.storage.fork());
    let disk = made.open(&storage);
    let runs = made.fat.free_runs();
    let (start, _) = *runs.iter().max_by_key(|(_, len)| *len).unwrap();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn({
        let disk = Arc::clone(&disk);
        move || {
            wait.recv().unwrap();
            disk.write_at(&[0x5a; 512], start + 512).unwrap();
        }
    });
    let calls = Arc::new(AtomicU64::new(0));
    let (now, counted) = (go.clone(), Arc::clone(&calls));
    storage.on_op(move |_, _| {
        if counted.fetch_add(1, Ordering::Relaxed) == moment {
            let _ = now.send(());
            // Not waited for any longer: the block may be held on this very thread.
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    let report = compact(&disk, options());
    let calls = calls.load(Ordering::Relaxed);
    let _ = go.send(());
    writer.join().unwrap();
    storage.clear_hook();
    let found = content(&disk);
    assert_eq!(made.fat.first_difference(&found), None, "{moment}");
    let place = size(start + 512);
    assert_eq!(found[place..place + 512], [0x5a; 512], "{moment}");
    (report, calls)
}

/// Somebody opens the disk for writing: from then on nothing that is free goes.
#[test]
fn an_open_for_writing_ends_it() {
    let made = Made::new(KINDS[0], 7);
    let storage = Arc::new(made.storage.fork());
    let disk = made.open(&storage);
    disk.begin_writing();
    let report = compact(&disk, options());
    assert!(report.not_surveyed.is_some() && report.parts.is_empty());
    assert!(content(&disk) == made.fat.bytes);
    disk.end_writing();

    let number = Arc::new(AtomicU64::new(0));
    let seen = number.clone();
    let guest = Arc::clone(&disk);
    storage.on_op(move |_, op| {
        // In the middle of the scan.
        if op.kind == OpKind::Read && seen.fetch_add(1, Ordering::Relaxed) == 60 {
            guest.begin_writing();
        }
    });
    let report = compact(&disk, options());
    storage.clear_hook();
    assert!(number.load(Ordering::Relaxed) > 60);
    assert!(report.not_surveyed.is_some(), "{report:?}");
    assert!(content(&disk) == made.fat.bytes);
    disk.end_writing();
    assert!(compact(&disk, options()).not_surveyed.is_none());
    drop(disk);
    made.verify(&storage).unwrap();
}

/// Once somebody may write, nothing goes any more: not even the rest of what was just verified.
#[test]
fn nothing_goes_once_a_writer_is_in() {
    let made = Made::new(KINDS[0], 11);
    let run = |punch_free: bool, moment: u64, kind: OpKind| {
        let storage = Arc::new(made.storage.fork());
        let disk = made.open(&storage);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let is_in = Arc::new(AtomicBool::new(false));
        let writer = std::thread::spawn({
            let (disk, is_in) = (Arc::clone(&disk), Arc::clone(&is_in));
            move || {
                wait.recv().ok()?;
                disk.begin_writing();
                let found = content(&disk);
                is_in.store(true, Ordering::SeqCst);
                Some(found)
            }
        });
        // Operations of that kind, and those of them before anything changed.
        let counts = Arc::new(parking_lot::Mutex::new((0, 0, Some(go))));
        let counted = Arc::clone(&counts);
        storage.on_op(move |_, op| {
            let mut counted = counted.lock();
            if op.kind.changes() && counted.1 == 0 {
                counted.1 = counted.0;
            }
            if op.kind != kind {
                return;
            }
            counted.0 += 1;
            if counted.0 == moment
                && let Some(go) = counted.2.take()
            {
                drop(counted);
                go.send(()).unwrap();
                // If it cannot get in before this step ends, that is not waited for.
                let began = Instant::now();
                while !is_in.load(Ordering::SeqCst) && began.elapsed().as_millis() < 300 {
                    std::thread::yield_now();
                }
            }
        });
        let options = CompactOptions {
            punch_free,
            ..options()
        };
        let report = compact(&disk, options);
        storage.clear_hook();
        let before_changes = counts.lock().1;
        counts.lock().2 = None;
        if let Some(then) = writer.join().unwrap() {
            assert!(then == content(&disk), "{kind:?} {moment}");
            assert!(report.not_surveyed.is_some(), "{report:?}");
            disk.end_writing();
        }
        before_changes
    };
    run(true, 1, OpKind::PunchHole);
    // Right before blocks are dropped, the metadata were just read again.
    let reads = run(false, u64::MAX, OpKind::Read);
    for moment in [reads - 1, reads] {
        run(false, moment, OpKind::Read);
    }
}

/// The metadata changes behind our back: it is noticed before anything goes.
#[test]
fn changed_metadata_is_noticed() {
    let made = Made::new(KINDS[0], 8);
    let storage = Arc::new(made.storage.fork());
    let disk = made.open(&storage);
    // Where the first block, which holds the boot sector, lies in the file.
    let bytes = storage.to_bytes();
    let boot = bytes
        .windows(11)
        .position(|part| *part == made.fat.bytes[..11])
        .unwrap();
    let entry = made.fat.table + 2 * 20_000;
    let at = FileOffset::new(u64::try_from(boot).unwrap() + entry);
    let number = Arc::new(AtomicU64::new(0));
    let seen = number.clone();
    storage.on_op(move |storage, op| {
        if op.kind == OpKind::Read && seen.fetch_add(1, Ordering::Relaxed) == 60 {
            storage.write_all_at(&[3, 0], at).unwrap();
        }
    });
    let report = compact(&disk, options());
    storage.clear_hook();
    let reason = report.not_surveyed.expect("noticed");
    assert!(reason.contains("changed"), "{reason}");
    drop(disk);
    let mut wanted = made.fat.bytes.clone();
    wanted[size(entry)..size(entry) + 2].copy_from_slice(&[3, 0]);
    assert!(content(&made.open(&storage)) == wanted);
}

/// A FAT may be mounted, with no mark on the disk that says so. Nobody answers for it in the background.
#[test]
fn the_background_does_not_believe_what_may_be_mounted() {
    for kind in KINDS {
        let made = Made::new(kind, 12);
        let compacted = |work: &dyn Fn(&Arc<Disk>)| {
            let storage = Arc::new(made.storage.fork());
            let disk = made.open(&storage);
            work(&disk);
            assert!(disk.close().is_ok());
            made.verify(&storage).unwrap();
            (storage.len().unwrap(), content(&disk) == made.fat.bytes)
        };
        let idle = compacted(&|disk| {
            let policy = IdlePolicy {
                idle_after: Duration::ZERO,
                min_reclaim: 1,
                punch_holes: false,
                fs_aware: true,
                ..IdlePolicy::default()
            };
            let mut work = IdleWork::new(Arc::clone(disk), policy);
            while matches!(work.step(), Next::Again) {}
        });
        let options = CompactOptions {
            drop_identical: false,
            ..CompactOptions::default()
        };
        let without = compacted(&|disk| drop(compact(disk, options)));
        assert_eq!((idle, idle.1), (without, true), "{kind:?}");
    }
}

#[test]
fn it_can_be_cancelled_in_the_survey() {
    let made = Made::new(KINDS[1], 9);
    let storage = Arc::new(made.storage.fork());
    let disk = made.open(&storage);
    let (stop, wait) = std::sync::mpsc::channel::<()>();
    let wait = parking_lot::Mutex::new(wait);
    let number = AtomicU64::new(0);
    storage.on_op(move |_, _| {
        if number.fetch_add(1, Ordering::Relaxed) == 1 {
            let _ = wait.lock().recv();
        }
    });
    let operation = disk.compact(&options());
    operation.cancel();
    stop.send(()).unwrap();
    assert!(matches!(operation.wait(), Err(CompactError::Cancelled)));
    storage.clear_hook();
    assert!(content(&disk) == made.fat.bytes);
}

/// What is not clean stays, and it is said why.
#[test]
fn a_dirty_file_system_stays() {
    let mut made = Made::new(KINDS[0], 10);
    let storage = Arc::new(made.storage.fork());
    let disk = made.open(&storage);
    // The table's second entry: "not cleanly unmounted".
    made.fat.bytes[size(made.fat.table) + 3] = 0x7f;
    for copy in 0..2 {
        let at = made.fat.table + copy * (DISK / 512 * 2);
        disk.write_at(&[0x7f], at + 3).unwrap();
        made.fat.bytes[size(at) + 3] = 0x7f;
    }
    let report = compact(&disk, options());
    let reason = report.parts[0].skipped.as_deref().expect("skipped");
    assert!(reason.contains("unmount"), "{reason}");
    assert!(content(&disk) == made.fat.bytes);
    let kept = report.kept.iter().map(|kept| &kept.reason);
    assert!(
        { kept }.any(|reason| reason.contains("was skipped")),
        "{report:?}"
    );
}
