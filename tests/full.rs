//! A full host: what was acknowledged stays, the disk can be opened, trimmed, compacted and used.

use std::path::Path;
use std::sync::Arc;

use vhdfs::check::{CheckOptions, check_storage};
use vhdfs::compact::CompactOptions;
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::error::ErrorKind;
use vhdfs::storage::sim::SimStorage;

const BLOCK: u64 = 1 << 20;
const BLOCKS: u64 = 128;
/// Of the host, in bytes: some forty blocks.
const CAPACITY: u64 = 40 << 20;

fn open(storage: &Arc<SimStorage>, punch_holes: bool) -> Arc<Disk> {
    let options = OpenOptions {
        punch_holes,
        ..OpenOptions::default()
    };
    let storage: Arc<SimStorage> = Arc::clone(storage);
    Disk::open_storage(storage, Path::new("full"), &options).expect("opened")
}

/// Writes to the start of one block after the other until there is no room; says how many it were.
fn fill(disk: &Disk) -> u64 {
    for block in 0..BLOCKS {
        let byte = u8::try_from(block + 1).expect("a byte");
        if let Err(error) = disk.write_at(&[byte; 1 << 20], block * BLOCK) {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            return block;
        }
    }
    panic!("the host was never full");
}

fn check_blocks(disk: &Disk, blocks: std::ops::Range<u64>) {
    let mut found = vec![0; 1 << 20];
    for block in blocks {
        disk.read_at(&mut found, block * BLOCK).expect("read");
        let byte = u8::try_from(block + 1).expect("a byte");
        assert!(found.iter().all(|found| *found == byte), "block {block}");
    }
}

fn full_host(format: Format, punch_holes: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("full");
    let options = CreateOptions {
        block_size: Some(1 << 20),
        ..CreateOptions::new(format, DiskType::Dynamic, BLOCKS * BLOCK)
    };
    create(&path, &options).expect("created");
    let storage = Arc::new(SimStorage::from_file(&path).expect("loaded"));
    storage.set_capacity(Some(CAPACITY));

    let disk = open(&storage, punch_holes);
    let filled = fill(&disk);
    assert!(filled > 30);
    disk.flush().expect("flushed");
    check_blocks(&disk, 0..filled);

    // What a busy guest discards is of use to it at once.
    disk.discard(0, 4 * BLOCK).expect("discarded");
    disk.write_at(&[9; 1 << 20], (BLOCKS - 1) * BLOCK)
        .expect("there is room");
    disk.write_at(&[0; 1 << 20], (BLOCKS - 1) * BLOCK)
        .expect("zeros need none");

    // Full again, closed, killed, opened: the file is good all the time.
    fill(&disk);
    disk.close().expect("closed");
    drop(disk);
    for storage in [Arc::new(storage.fork()), Arc::new(storage.kill())] {
        storage.set_capacity(Some(CAPACITY));
        let disk = open(&storage, punch_holes);
        check_blocks(&disk, 4..filled);
        disk.discard(8 * BLOCK, 8 * BLOCK).expect("discarded");
        let report = disk
            .compact(&CompactOptions::default())
            .wait()
            .expect("compacted");
        let most = (BLOCK + 4096) * filled + (4 << 20);
        assert!(report.length_after <= most, "{report:?}");
        check_blocks(&disk, 16..filled);
        disk.write_at(&[1; 1 << 20], (BLOCKS - 2) * BLOCK)
            .expect("there is room");
        drop(disk);
        let report = check_storage(&*storage, &CheckOptions::default()).expect("checked");
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn a_full_host_with_holes() {
    full_host(Format::Vhd, true);
}

#[test]
fn a_full_host_without_holes() {
    full_host(Format::Vhd, false);
}

#[test]
fn a_full_host_with_holes_and_a_vhdx() {
    full_host(Format::Vhdx, true);
}

#[test]
fn a_full_host_without_holes_and_a_vhdx() {
    full_host(Format::Vhdx, false);
}
