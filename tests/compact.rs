//! What compaction must not believe, and what must not keep it from its work.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tempfile::TempDir;
use vhdfs::compact::{CompactError, CompactOptions, IdlePolicy, IdleWork, Next};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::format::parent::NewParent;
use vhdfs::storage::sim::{OpKind, SimStorage};

const DISK: u64 = 8 << 20;

/// A new differencing VHD.
struct Child {
    /// Open, and in need of its folder until it is closed.
    parent: Arc<Disk>,
    path: PathBuf,
    _folder: TempDir,
}

impl Child {
    /// Over a parent that begins with `data`.
    fn over(data: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (parent_path, path) = (
            folder.path().join("parent.vhd"),
            folder.path().join("a.vhd"),
        );
        create(&parent_path, &CreateOptions::dynamic(DISK)).expect("created");
        let parent = Disk::open(&parent_path, &OpenOptions::default()).expect("opened");
        parent.write_at(data, 0).expect("written");
        let new_parent = NewParent {
            identity: parent.identity(),
            disk_len: DISK,
            sector_size: 512,
            mtime: SystemTime::now(),
            relative: ".\\parent.vhd".to_owned(),
            absolute: "C:\\parent.vhd".to_owned(),
        };
        let options = CreateOptions {
            parent: Some(new_parent),
            ..CreateOptions::new(Format::Vhd, DiskType::Differencing, DISK)
        };
        create(&path, &options).expect("created");
        Self {
            parent,
            path,
            _folder: folder,
        }
    }
}

/// The budget of a step of scanning is used up by comparing with the parent, too, in whole sectors.
/// Of a granule of which only the first sectors are zero nothing may be given back.
#[test]
fn zeros_are_told_by_whole_granules() {
    let child = Child::over(&vec![0x77; 2 << 20]);
    drop(child.parent);
    let disk = Disk::open(&child.path, &OpenOptions::default()).expect("opened");
    // The comparison reads the first sector and finds a difference there: a MiB less a sector is
    // left of the step, which ends one sector before a granule does.
    disk.write_zeroes(0, 512).expect("zeroed");
    let mut wanted = vec![0x77; 2 << 20];
    wanted[..512].fill(0);
    let zeros = (1 << 20) - 4096..(1 << 20) - 512;
    disk.write_zeroes(u64::try_from(zeros.start).expect("small"), 4096 - 512)
        .expect("zeroed");
    wanted[zeros].fill(0);
    disk.write_at(&[9; 512], (1 << 20) - 512).expect("written");
    wanted[(1 << 20) - 512..1 << 20].fill(9);
    let compact = CompactOptions {
        punch_holes: true,
        ..CompactOptions::default()
    };
    disk.compact(&compact).wait().expect("compacted");

    let mut found = vec![0; wanted.len()];
    disk.read_at(&mut found, 0).expect("read");
    assert!(found == wanted);
}

/// A block that held what its parent has is gone at once. What a guest puts there while the compaction
/// goes on is its own.
#[test]
fn what_was_the_same_is_not_so_for_ever() {
    const BLOCK: u64 = 2 << 20;
    let child = Child::over(&[7; 4096]);
    let storage = Arc::new(SimStorage::from_file(&child.path).expect("loaded"));
    let options = OpenOptions {
        punch_holes: false,
        ..OpenOptions::default()
    };
    let parent = Some(child.parent);
    let disk = Disk::open_over(storage.clone(), &child.path, &options, parent).expect("opened");
    // The first is as in the parent.
    for block in 0..3 {
        disk.write_at(&[7; 4096], block * BLOCK).expect("written");
    }

    let guest = Mutex::new(Some(Arc::clone(&disk)));
    let dropped = AtomicBool::new(false);
    storage.on_op(move |_, op| match op.kind {
        OpKind::Write => dropped.store(true, Ordering::Relaxed),
        OpKind::Read if dropped.load(Ordering::Relaxed) => {
            let guest = guest.lock().take();
            if let Some(disk) = guest {
                disk.write_at(&[9; 4096], 0).expect("written");
            }
        }
        _ => {}
    });
    let report = disk.compact(&CompactOptions::default()).wait();
    storage.clear_hook();
    report.expect("compacted");
    let mut found = [0; 4096];
    disk.read_at(&mut found, 0).expect("read");
    assert!(found == [9; 4096]);
}

/// A guest that reads in the middle of a run ends it, but changes nothing: the next run has to do the rest.
#[test]
fn a_read_in_between_only_puts_it_off() {
    const BLOCK: u64 = 2 << 20;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.vhd");
    create(&path, &CreateOptions::dynamic(4 * BLOCK)).expect("created");
    let disk = Disk::open(&path, &OpenOptions::default()).expect("opened");
    for block in 0..4 {
        disk.write_at(&[7; 4096], block * BLOCK).expect("written");
    }
    disk.write_zeroes(0, 3 * BLOCK).expect("zeroed");
    let policy = IdlePolicy {
        idle_after: Duration::from_millis(20),
        min_reclaim: 1,
        ..IdlePolicy::default()
    };
    let mut work = IdleWork::new(Arc::clone(&disk), policy);
    let mut has_read = false;
    loop {
        match work.step() {
            Next::Again | Next::Wait(_) if !has_read => {
                disk.read_at(&mut [0; 512], 3 * BLOCK).expect("read");
                has_read = true;
            }
            Next::Again => {}
            Next::Wait(wait) => std::thread::sleep(wait),
            Next::Done => break,
            Next::Failed(error) => panic!("{error}"),
        }
    }
    assert!(has_read, "never in the middle of a run");
    let left = std::fs::metadata(&path).expect("there").len();
    assert!(left < 2 * BLOCK, "{left} bytes are left");
}

/// A guest that is never idle, and writes to every block that stays, gets a file as short as a silent one's.
#[test]
fn a_guest_that_never_sleeps_gets_a_short_file() {
    const BLOCK: u64 = 2 << 20;
    const BLOCKS: u64 = 24;
    for (name, format) in [("a.vhd", Format::Vhd), ("a.vhdx", Format::Vhdx)] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        let options = CreateOptions::new(format, DiskType::Dynamic, BLOCKS * BLOCK);
        create(&path, &options).expect("created");
        let disk = Disk::open(&path, &OpenOptions::default()).expect("opened");
        for block in 0..BLOCKS {
            disk.write_at(&[7; 4096], block * BLOCK).expect("written");
        }
        for block in 0..BLOCKS / 2 {
            disk.write_zeroes(block * BLOCK, BLOCK).expect("zeroed");
        }
        let policy = IdlePolicy {
            idle_after: Duration::from_secs(3600),
            min_reclaim: 1,
            ..IdlePolicy::default()
        };
        let mut work = IdleWork::new(Arc::clone(&disk), policy);
        let mut report = None;
        // Time passes without a pause: how long that is, is not asked here.
        for step in 0_u64.. {
            assert!(step < 20_000, "{name}: no end of it");
            match work.step() {
                Next::Again | Next::Wait(_) => {}
                Next::Done => {
                    report = work.take_report();
                    break;
                }
                Next::Failed(error) => panic!("{error}"),
            }
            report = work.take_report();
            if report.is_some() {
                break;
            }
            let block = BLOCKS / 2 + step % (BLOCKS / 2);
            disk.write_at(&[9; 4096], block * BLOCK + step % 256 * 4096)
                .expect("written");
            disk.read_at(&mut [0; 512], block * BLOCK).expect("read");
        }
        let report = report.expect("it has ended");
        assert!(report.beside_guest > Duration::ZERO, "{report:?}");
        assert!(report.blocks_moved >= BLOCKS / 2 - 1, "{name}: {report}");
        disk.close().expect("closed");
        let left = std::fs::metadata(&path).expect("there").len();
        drop((work, disk));
        let disk = Disk::open(&path, &OpenOptions::default()).expect("opened");
        let again = disk.compact(&CompactOptions::default()).wait();
        let again = again.expect("compacted");
        assert_eq!(again.blocks_moved, 0, "{name}: {again:?}");
        assert_eq!(again.length_after, left, "{name}");
    }
}

/// What a run left out because of its policy is done once that allows it.
#[test]
fn another_policy_begins_anew() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.vhd");
    create(&path, &CreateOptions::dynamic(DISK)).expect("created");
    let disk = Disk::open(&path, &OpenOptions::default()).expect("opened");
    disk.write_at(&[7; 4096], 0).expect("written");
    let policy = |fs_aware| IdlePolicy {
        idle_after: Duration::ZERO,
        min_reclaim: 1,
        fs_aware,
        ..IdlePolicy::default()
    };
    let mut work = IdleWork::new(Arc::clone(&disk), policy(false));
    while matches!(work.step(), Next::Again) {}
    work.set_policy(policy(false));
    assert!(matches!(work.step(), Next::Done));
    work.set_policy(policy(true));
    assert!(matches!(work.step(), Next::Again));
}

/// Work that no guest asked for ends when another program wants the file, and goes on later.
#[test]
fn it_ends_when_another_program_wants_the_file() {
    const BLOCK: u64 = 2 << 20;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.vhd");
    create(&path, &CreateOptions::dynamic(8 * BLOCK)).expect("created");
    let storage = Arc::new(SimStorage::from_file(&path).expect("loaded"));
    let disk = Disk::open_storage(storage.clone(), &path, &OpenOptions::default()).expect("opened");
    for block in 0..8 {
        disk.write_at(&[7; 4096], block * BLOCK).expect("written");
    }
    for block in 0..4 {
        disk.write_zeroes(block * BLOCK, BLOCK).expect("zeroed");
    }
    let copied = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&copied);
    storage.on_op(move |storage, op| match op.kind {
        // The first dead block leaves the table.
        OpKind::Write => storage.set_wanted(true),
        OpKind::CopyWithin => noted.store(true, Ordering::Relaxed),
        _ => {}
    });
    let ended = disk.compact(&CompactOptions::default()).wait();
    storage.clear_hook();
    assert!(matches!(ended, Err(CompactError::Wanted)), "{ended:?}");
    assert!(!copied.load(Ordering::Relaxed), "another step was begun");
    storage.set_wanted(false);
    let report = disk
        .compact(&CompactOptions::default())
        .wait()
        .expect("compacted");
    assert!(report.blocks_moved > 0 && report.length_after < 5 * BLOCK);
}
