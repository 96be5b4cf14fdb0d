//! What a file can make us allocate by the size that it claims: see the threat model in `src/lib.rs`.
//!
//! The largest VHDX has 67 million blocks. The disks here have some millions, so that the test is quick; what a
//! block may take is the same.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use vhdfs::check::{CheckOptions, check};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions, RegionKind};
use vhdfs::image::{glance, identify};
use vhdfs::library::{Library, LibraryOptions, NodeId};
use vhdfs::storage::host::{HostFile, HostOptions};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// Blocks of 1 MiB in 3 TiB.
const BLOCKS: u64 = 3 * MIB;

/// Payload blocks before the entry of a chunk's sector bitmap.
const CHUNK: u64 = 4096;

/// What does not go by the number of blocks: buffers, the log.
const FIXED: u64 = 8 * MIB;

/// A VHDX of [`BLOCKS`] blocks, each with an entry that names the place of `place_of`.
fn full(path: &Path, place_of: impl Fn(u64) -> u64) {
    let options = CreateOptions {
        block_size: Some(1 << 20),
        ..CreateOptions::new(Format::Vhdx, DiskType::Dynamic, BLOCKS * MIB)
    };
    create(path, &options).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let table = {
        let mut regions = vec![0; 64 << 10];
        file.read_exact_at(&mut regions, 192 << 10).unwrap();
        let entry = { regions[16..].chunks(32) }
            .find(|entry| entry.starts_with(&[0x66, 0x77, 0xc2, 0x2d]))
            .unwrap();
        u64::from_le_bytes(entry[16..24].try_into().unwrap())
    };
    for first in (0..BLOCKS).step_by(1 << 16) {
        let mut bytes = Vec::new();
        for block in first..first + (1 << 16) {
            bytes.extend((place_of(block) | 6).to_le_bytes());
            if block % CHUNK == CHUNK - 1 {
                bytes.extend([0; 8]);
            }
        }
        file.write_all_at(&bytes, table + 8 * (first + first / CHUNK))
            .unwrap();
    }
}

/// Bytes that `work` allocated at most, beside what was there.
fn peak<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let done = work();
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    (done, u64::try_from(peak).unwrap())
}

/// One test, for the allocator counts for all of the process.
#[test]
fn a_table_takes_memory_by_its_blocks_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let sound = folder.path().join("sound.vhdx");
    full(&sound, |block| (block + 1024) * MIB);
    let set_len = |path: &Path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len((BLOCKS + 1024) * MIB).unwrap();
    };
    set_len(&sound);
    let hostile = folder.path().join("hostile.vhdx");
    full(&hostile, |block| (block + 1024) * MIB);
    let overlapping = folder.path().join("overlapping.vhdx");
    full(&overlapping, |block| match block {
        2_000_000 => 1_000_000 * MIB,
        block => (block + 1024) * MIB,
    });
    set_len(&overlapping);

    for path in [&sound, &hostile, &overlapping] {
        let look = HostOptions {
            read_only: true,
            lock: false,
            no_follow: false,
        };
        let file = HostFile::open(path, &look).unwrap();
        // A listing: the size alone, whatever the table.
        let started = Instant::now();
        let (size, bytes) = peak(|| glance(&file, path).unwrap().virtual_size);
        assert_eq!(size, 3 * TIB);
        assert!(bytes < 2 * MIB, "glance: {bytes}");
        let (_, bytes) = peak(|| identify(&file, path).unwrap());
        assert!(bytes < 2 * MIB, "identify: {bytes}");
        assert!(started.elapsed() < Duration::from_secs(1));

        // A word of four bytes a block, what is known of each, a bit for each MiB of the file.
        let options = OpenOptions {
            read_only: true,
            lock: false,
            ..OpenOptions::default()
        };
        let (disk, bytes) = peak(|| Disk::open(path, &options).unwrap());
        assert!(bytes < BLOCKS * 6 + FIXED, "open: {bytes}");
        assert_eq!(disk.info().unwrap().blocks_allocated, BLOCKS);
        let started = Instant::now();
        let (regions, bytes) = peak(|| {
            disk.scan().unwrap();
            disk.regions()
        });
        assert!(bytes < BLOCKS * 32 + FIXED, "map: {bytes}");
        assert!(started.elapsed() < Duration::from_secs(20), "{started:?}");
        let dead = regions
            .iter()
            .filter(|region| region.kind == RegionKind::Dead);
        let dead: u64 = dead.map(|region| region.range.len).sum();
        let expected = if *path == hostile { 0 } else { BLOCKS * MIB };
        assert!(dead <= expected && dead + 2048 * MIB >= expected, "{dead}");
        drop(disk);

        let (report, bytes) = peak(|| check(path, &CheckOptions::default()).unwrap());
        // Where something overlaps, a list of all.
        let most = if *path == overlapping { 40 } else { 6 };
        assert!(bytes < BLOCKS * most + FIXED, "check: {bytes}");
        assert_eq!(report.is_clean(), *path == sound, "{report:?}");
    }

    // A directory of such files: what is looked up costs nothing.
    create(
        &folder.path().join("small.vhd"),
        &CreateOptions::dynamic(MIB),
    )
    .unwrap();
    let library = Library::open(folder.path(), LibraryOptions::default()).unwrap();
    let look = |name: &str| library.lookup(NodeId::ROOT, name.as_ref()).unwrap().node;
    let (nodes, bytes) = peak(|| ["small.vhd.raw", "hostile.vhdx.raw"].map(look));
    assert!(bytes < 2 * MIB, "lookups: {bytes}");
    assert_ne!(nodes[0], nodes[1]);
    drop(library);

    let (disk, bytes) = peak(|| Disk::open(&sound, &OpenOptions::default()).unwrap());
    assert!(bytes < BLOCKS * 6 + FIXED, "open for writing: {bytes}");
    drop(disk);
    let refused = Disk::open(&overlapping, &OpenOptions::default()).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("block 2000000") && text.contains("block 998976"),
        "{text}"
    );
}
