//! Nobody else's bytes: what compaction gives up is not read by another disk, and what comes in its place
//! is not another disk's.
//!
//! On a file system that the tests write themselves, in memory; a child over it has the same one.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use support::fat::Fat;
use support::size;
use vhdfs::compact::{CompactOptions, CompactReport, IdlePolicy, IdleWork, Next};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::error::{ErrorKind, OpenError};
use vhdfs::format::parent::NewParent;
use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;

const DISK: u64 = 6 << 20;
const FORMATS: [Format; 2] = [Format::Vhd, Format::Vhdx];

/// An empty disk, in memory.
fn make(format: Format, parent: Option<&Disk>) -> Arc<SimStorage> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let disk_type = match parent {
        Some(_) => DiskType::Differencing,
        None => DiskType::Dynamic,
    };
    let options = CreateOptions {
        block_size: Some(match format {
            Format::Vhd => 512 << 10,
            _ => 1 << 20,
        }),
        parent: parent.map(|parent| NewParent {
            identity: parent.identity(),
            disk_len: DISK,
            sector_size: 512,
            mtime: SystemTime::now(),
            relative: ".\\parent".to_owned(),
            absolute: "C:\\parent".to_owned(),
        }),
        ..CreateOptions::new(format, disk_type, DISK)
    };
    create(&path, &options).unwrap();
    Arc::new(SimStorage::from_file(&path).unwrap())
}

fn open(
    storage: &Arc<SimStorage>,
    parent: Option<&Arc<Disk>>,
    read_only: bool,
) -> Result<Arc<Disk>, OpenError> {
    let storage: Arc<dyn Storage> = storage.clone();
    let options = OpenOptions {
        punch_holes: false,
        read_only,
        ..OpenOptions::default()
    };
    Disk::open_over(storage, Path::new("simulated"), &options, parent.cloned())
}

/// A disk with the bytes of `fat` and a boot sector that makes nothing of them: nothing is free there.
fn full_base(format: Format, fat: &Fat) -> Arc<Disk> {
    let storage = base(format, fat);
    let disk = open(&storage, None, false).unwrap();
    disk.write_at(&[0xff; 512], 0).unwrap();
    drop(disk);
    open(&storage, None, true).unwrap()
}

/// A disk with `fat`, closed.
fn base(format: Format, fat: &Fat) -> Arc<SimStorage> {
    let storage = make(format, None);
    let disk = open(&storage, None, false).unwrap();
    disk.write_at(&fat.bytes, 0).unwrap();
    disk.close().unwrap();
    storage
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut found = vec![0; size(DISK)];
    disk.read_at(&mut found, 0).unwrap();
    found
}

fn compact(disk: &Arc<Disk>, options: CompactOptions) -> CompactReport {
    disk.compact(&options).wait().unwrap()
}

fn fs_aware() -> CompactOptions {
    CompactOptions {
        fs_aware: true,
        ..CompactOptions::default()
    }
}

/// All ways to compact, with what makes a difference to children.
fn ways() -> impl Iterator<Item = CompactOptions> {
    let flags = [false, true];
    let both = move |fs_aware| flags.map(|punch_holes| (fs_aware, punch_holes));
    let ways = flags.into_iter().flat_map(both);
    ways.map(|(fs_aware, punch_holes)| CompactOptions {
        fs_aware,
        punch_holes,
        ..CompactOptions::default()
    })
}

/// Runs the background's work until there is nothing more to do.
fn idle(disk: &Arc<Disk>) {
    let policy = IdlePolicy {
        idle_after: std::time::Duration::ZERO,
        min_reclaim: 1,
        punch_holes: true,
        fs_aware: true,
        ..IdlePolicy::default()
    };
    let mut work = IdleWork::new(Arc::clone(disk), policy);
    loop {
        match work.step() {
            Next::Again => {}
            Next::Done => return,
            other => panic!("{other:?}"),
        }
    }
}

/// The sectors of a disk that differ from `wanted`, of those that are free or not.
fn differing(fat: &Fat, found: &[u8], wanted: &[u8], free: bool) -> usize {
    let sectors = found.chunks(512).zip(wanted.chunks(512)).zip(&fat.free);
    { sectors }
        .filter(|((found, wanted), is_free)| **is_free == free && found != wanted)
        .count()
}

/// Whole blocks and parts of blocks, each over bytes of the parent's.
#[test]
fn what_a_guest_discarded_stays_zero() {
    let fat = Fat::new(DISK, 2);
    let mut wanted = fat.bytes.clone();
    for (start, len) in fat.free_runs() {
        wanted[size(start)..size(start + len)].fill(0);
    }
    for format in FORMATS {
        let parent = full_base(format, &fat);
        let storage = make(format, Some(&parent));
        let child = open(&storage, Some(&parent), false).unwrap();
        child.write_at(&fat.bytes[..512], 0).unwrap();
        for (start, len) in fat.free_runs() {
            child.discard(start, len).unwrap();
        }
        assert!(content(&child) == wanted, "{format:?}");
        child.close().unwrap();
        drop(child);
        for way in ways() {
            let fork = Arc::new(storage.fork());
            let child = open(&fork, Some(&parent), false).unwrap();
            compact(&child, way);
            assert!(content(&child) == wanted, "{format:?} {way:?}");
        }
        let child = open(&storage, Some(&parent), false).unwrap();
        idle(&child);
        assert!(content(&child) == wanted, "{format:?}, in the background");
    }
}

/// What was deleted in a child may become zeros, but not what its parent has there.
#[test]
fn what_is_free_in_a_child_never_shows_the_parent() {
    let fat = Fat::new(DISK, 3);
    let mut own = fat.bytes.clone();
    for (start, len) in fat.free_runs() {
        own[size(start)..size(start + len)]
            .iter_mut()
            .for_each(|byte| *byte = byte.wrapping_add(1).max(1));
    }
    for format in FORMATS {
        let parent = full_base(format, &fat);
        let storage = make(format, Some(&parent));
        let child = open(&storage, Some(&parent), false).unwrap();
        // Some of it again as it is in the parent already.
        child.write_at(&own, 0).unwrap();
        child.close().unwrap();
        drop(child);
        let verify = |child: &Disk, what: &str| {
            let found = content(child);
            assert_eq!(differing(&fat, &found, &own, false), 0, "{format:?} {what}");
            let sectors = found.chunks(512).zip(own.chunks(512)).zip(&fat.free);
            let neither = |((found, own), is_free): &((&[u8], &[u8]), &bool)| {
                **is_free && found != own && found.iter().any(|byte| *byte != 0)
            };
            assert_eq!({ sectors }.filter(neither).count(), 0, "{format:?} {what}");
        };
        for way in ways() {
            let fork = Arc::new(storage.fork());
            let child = open(&fork, Some(&parent), false).unwrap();
            compact(&child, way);
            verify(&child, &format!("{way:?}"));
            drop(child);
            verify(&open(&fork, Some(&parent), true).unwrap(), "once more");
        }
        let child = open(&storage, Some(&parent), false).unwrap();
        idle(&child);
        verify(&child, "in the background");
    }
}

/// A file system that uses all of some block.
fn with_a_full_block() -> Fat {
    let full = |fat: &Fat| fat.free.chunks(2048).any(|block| !block.contains(&true));
    (1..).map(|seed| Fat::new(DISK, seed)).find(full).unwrap()
}

/// A child's blocks that are the same as what its parent has free are not left to the parent, which may
/// lose them; nor as what the parent's parent has free.
#[test]
fn a_child_does_not_rely_on_what_is_free_in_a_parent() {
    let fat = with_a_full_block();
    for (format, levels) in [
        (Format::Vhd, 1),
        (Format::Vhdx, 1),
        (Format::Vhd, 2),
        (Format::Vhdx, 2),
    ] {
        let lowest = base(format, &fat);
        let below = open(&lowest, None, true).unwrap();
        let parent = match levels {
            1 => below.clone(),
            _ => {
                // Its own file system is another one, that uses everything.
                let middle = make(format, Some(&below));
                let disk = open(&middle, Some(&below), false).unwrap();
                disk.write_at(&[0xff; 512], 0).unwrap();
                drop(disk);
                open(&middle, Some(&below), true).unwrap()
            }
        };
        let wanted = content(&parent);
        let storage = make(format, Some(&parent));
        let child = open(&storage, Some(&parent), false).unwrap();
        child.write_at(&wanted, 0).unwrap();
        let blocks = child.info().unwrap().blocks_allocated;
        let report = compact(&child, CompactOptions::default());
        assert!(
            report.blocks_dropped > 0 && report.blocks_dropped < blocks,
            "{format:?} {levels}: some are in use in the parent, {report:?}"
        );
        assert!(content(&child) == wanted);
        drop((child, parent, below));

        // Somebody vouches for it that there is no child.
        let disk = open(&lowest, None, false).unwrap();
        compact(&disk, fs_aware());
        assert!(differing(&fat, &content(&disk), &fat.bytes, true) > 0);
        drop(disk);
        if (format, levels) == (Format::Vhd, 1) {
            let below = open(&lowest, None, true).unwrap();
            let child = open(&storage, Some(&below), true).unwrap();
            assert!(content(&child) == wanted, "{format:?}");
        }
    }
}

/// Before anything goes that a child could read, a VHDX is another disk.
#[test]
fn a_vhdx_that_gave_up_free_space_is_another_disk() {
    let fat = Fat::new(DISK, 5);
    let storage = base(Format::Vhdx, &fat);
    let parent = open(&storage, None, true).unwrap();
    let child = make(Format::Vhdx, Some(&parent));
    drop(parent);

    let disk = open(&storage, None, false).unwrap();
    let dry_run = CompactOptions {
        dry_run: true,
        ..fs_aware()
    };
    compact(&disk, dry_run);
    compact(&disk, CompactOptions::default());
    assert!(!disk.has_new_identity(), "nothing went that can be read");
    drop(disk);
    let still = open(&storage, None, true).unwrap();
    assert!(open(&child, Some(&still), true).is_ok());
    drop(still);

    let disk = open(&storage, None, false).unwrap();
    compact(&disk, fs_aware());
    assert!(disk.has_new_identity());
    let identity = disk.identity();
    // There is no more to give: no further reason to be another disk.
    drop(disk);
    let disk = open(&storage, None, false).unwrap();
    compact(&disk, fs_aware());
    assert_eq!(disk.identity(), identity);
    drop(disk);
    let changed = open(&storage, None, true).unwrap();
    let refused = open(&child, Some(&changed), true).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ParentMismatch);

    // Holes in blocks that stay are the same.
    let no_block = |fat: &Fat| fat.free.chunks(2048).all(|block| block.contains(&false));
    let fat = { (1..).map(|seed| Fat::new(DISK, seed)) }.find(no_block);
    let disk = open(&base(Format::Vhdx, &fat.unwrap()), None, false).unwrap();
    let report = compact(&disk, fs_aware());
    assert!(report.blocks_dropped == 0 && !disk.has_new_identity());
    let punching = CompactOptions {
        punch_holes: true,
        ..fs_aware()
    };
    let report = compact(&disk, punching);
    assert!(report.bytes_punched > 0 && disk.has_new_identity());
}

/// At whatever moment the power is cut: where free bytes are gone, so is the identity.
#[test]
fn the_identity_is_new_before_anything_goes() {
    let fat = Fat::new(DISK, 6);
    let storage = base(Format::Vhdx, &fat);
    let old = open(&storage, None, true).unwrap().identity();
    let disk = open(&storage, None, false).unwrap();
    let cuts = Arc::new(Mutex::new(Vec::new()));
    let kept = cuts.clone();
    storage.on_op(move |storage, op| {
        if op.kind.changes() {
            kept.lock().push(storage.fork());
        }
    });
    let punching = CompactOptions {
        punch_holes: true,
        ..fs_aware()
    };
    compact(&disk, punching);
    storage.clear_hook();
    drop(disk);
    let (mut same, mut gone) = (0, 0);
    for cut in std::mem::take(&mut *cuts.lock()) {
        let choices = cut.choices(0, 3, 1);
        let after = choices.into_iter().map(|mut choice| cut.crash(&mut choice));
        for state in after.chain([cut.kill()]) {
            let disk = open(&Arc::new(state), None, false).unwrap();
            let lost = differing(&fat, &content(&disk), &fat.bytes, true);
            assert!(
                lost == 0 || disk.identity() != old,
                "{lost} sectors are gone from the disk that children know"
            );
            if lost == 0 { same += 1 } else { gone += 1 }
        }
    }
    assert!(same > 3 && gone > 3, "{same} {gone}");
}

/// Where a child has nothing of its own, what is free reads as the parent has it: holes beside it make no
/// zeros of that, also not in the book that is kept of zeros.
#[test]
fn what_shows_of_the_parent_does_not_count_as_zero_once_it_was_free() {
    const BLOCK: usize = 1 << 20;
    let fat = (1..)
        .map(|seed| Fat::new(DISK, seed))
        .find(|fat| {
            fat.free[3 * BLOCK / 512..5 * BLOCK / 512]
                .iter()
                .all(|free| *free)
        })
        .unwrap();
    let mut below = vec![0x55; size(DISK)];
    let used = fat.free.iter().position(|free| *free).unwrap() * 512;
    below[..used].copy_from_slice(&fat.bytes[..used]);
    let storage = make(Format::Vhdx, None);
    let disk = open(&storage, None, false).unwrap();
    disk.write_at(&below, 0).unwrap();
    drop(disk);
    let parent = open(&storage, None, true).unwrap();
    let child = make(Format::Vhdx, Some(&parent));
    let child = open(&child, Some(&parent), false).unwrap();
    // In a block that is free but for one granule, which is a file's that has no name.
    let place = u64::try_from(3 * BLOCK).unwrap();
    child.write_at(&[7; 4096], place).unwrap();
    let mut table = fat.bytes[512..used].to_vec();
    let entry = cluster_of(&fat, place) * 2;
    for copy in 0..2 {
        let at = copy * size(DISK / 512 * 2) + entry;
        table[at..at + 16].fill(0xff);
    }
    child.write_at(&table, 512).unwrap();
    let punching = CompactOptions {
        punch_holes: true,
        ..fs_aware()
    };
    compact(&child, punching);
    // Its guest starts again, and writes.
    child.write_zeroes(place, 4096).unwrap();
    let wanted = content(&child);
    assert!(wanted[3 * BLOCK..4 * BLOCK].contains(&0x55));
    let without = CompactOptions {
        drop_identical: false,
        ..CompactOptions::default()
    };
    compact(&child, without);
    assert!(content(&child) == wanted);
}

/// The number of the cluster that starts at a disk offset.
fn cluster_of(fat: &Fat, at: u64) -> usize {
    let table_sectors = (fat.bytes.len() / 512 * 2).div_ceil(512);
    let data = 1 + 2 * table_sectors + 32;
    size(at / 512) - data + 2
}

/// A copy, and a child over that, may have the identity that the disk has had since its guest wrote.
#[test]
fn what_is_free_goes_under_an_identity_that_nobody_has_seen() {
    let fat = Fat::new(DISK, 7);
    let storage = base(Format::Vhdx, &fat);
    let disk = open(&storage, None, false).unwrap();
    disk.write_at(&fat.bytes[..512], 0).unwrap();
    let written = disk.identity();
    let copy = Arc::new(storage.fork());
    compact(&disk, fs_aware());
    assert!(differing(&fat, &content(&disk), &fat.bytes, true) > 0);
    assert_ne!(disk.identity(), written);
    let copy = open(&copy, None, true).unwrap();
    assert_eq!(copy.identity(), written);
    let child = make(Format::Vhdx, Some(&copy));
    drop(copy);
    drop(disk);
    let disk = open(&storage, None, true).unwrap();
    let refused = open(&child, Some(&disk), true).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ParentMismatch);
}
