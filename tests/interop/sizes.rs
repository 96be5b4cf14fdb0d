//! Large sectors, large blocks, large disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{DiskType, Format};

use crate::mirror::{
    Mirrored, compact, content, create_child, host_file, is_sound, open, open_read_only, same_bytes,
};
use crate::qemu::Maker;
use crate::support::image::pattern;
use crate::support::second::Chain;
use crate::support::size;
use crate::support::tools::{Mounted, extracted, installed};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// A dynamic VHDX in `folder` with sectors of 4096 bytes.
fn with_4k_sectors(folder: &Path, disk_len: u64, block_size: u64) -> PathBuf {
    let path = folder.join("disk.vhdx");
    let options = CreateOptions {
        block_size: Some(u32::try_from(block_size).unwrap()),
        sector_size: 4096,
        ..CreateOptions::new(Format::Vhdx, DiskType::Dynamic, disk_len)
    };
    create(&path, &options).unwrap();
    path
}

/// All who know large sectors read what the disk must hold; QEMU does not.
fn all_agree(disk: &Mirrored, files: &[PathBuf], libvhdi: bool) {
    disk.we_agree();
    disk.second_agrees(files);
    if let Some(raw) = extracted(&disk.path) {
        same_bytes(&raw, &disk.raw);
    }
    if libvhdi && let Some(mounted) = Mounted::new(&disk.path) {
        same_bytes(&mounted.disk(), &disk.raw);
    }
}

#[test]
fn sectors_of_4096_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = with_4k_sectors(folder.path(), 20 * MIB + 8192, MIB);
    let mut disk = Mirrored::new(&path, 21);
    let mut files = vec![path];
    for _ in 0..5 {
        disk.our_turn(6);
        all_agree(&disk, &files, true);
    }
    for name in ["child.vhdx", "grandchild.vhdx"] {
        let path = create_child(&disk.path, &folder.path().join(name), 2 * MIB, 4096);
        disk = disk.child(&path, 2 * MIB);
        files.insert(0, path);
        for _ in 0..5 {
            disk.our_turn(6);
            // libvhdi reads zeroed blocks from the parent.
            all_agree(&disk, &files, false);
        }
    }
}

/// Places around every border of a multiple of `step` of the disk get data, or lose it.
fn around_borders(disk: &mut Mirrored, step: u64) {
    let borders = (0..=disk.disk_len / step).map(|n| n * step);
    let ours = open(&disk.path);
    for border in borders.chain([disk.disk_len]) {
        let start = border.saturating_sub(disk.below(200_000));
        let end = (border + disk.below(200_000)).min(disk.disk_len);
        match disk.below(3) {
            0 => disk.discard(&ours, start..end),
            _ if start < end => disk.write(&ours, start..end),
            _ => {}
        }
    }
    if disk.below(2) == 0 {
        compact(&ours, false);
    }
    ours.close().unwrap();
}

/// A disk, then a child of it, of several chunks of blocks: each has a bitmap.
fn several_chunks(folder: &Path, path: &Path, block_size: u64, sector_size: u64, chunk: u64) {
    let mut disk = Mirrored::new(path, 22);
    let mut files = vec![path.to_owned()];
    let path = folder.join("child.vhdx");
    for round in 0..6 {
        if round == 2 {
            let path = create_child(&disk.path, &path, block_size, sector_size);
            disk = disk.child(&path, block_size);
            files.insert(0, path);
        }
        around_borders(&mut disk, chunk);
        disk.we_agree_on_content();
        disk.second_agrees(&files);
    }
}

#[test]
fn blocks_of_1_mib_in_several_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let chunk = 4096 * MIB;
    let maker = Maker::ours("vhdx", MIB, 5 * chunk + 9 * MIB);
    let path = maker.create(folder.path());
    several_chunks(folder.path(), &path, MIB, 512, chunk);

    let folder = tempfile::tempdir().unwrap();
    let chunk = 8 * chunk;
    let path = with_4k_sectors(folder.path(), 3 * chunk + 9 * MIB, MIB);
    several_chunks(folder.path(), &path, MIB, 4096, chunk);
}

#[test]
fn blocks_of_256_mib() {
    let folder = tempfile::tempdir().unwrap();
    let maker = Maker::ours("vhdx", 256 * MIB, 5 * 1024 * MIB + 512);
    let path = maker.create(folder.path());
    several_chunks(folder.path(), &path, 256 * MIB, 512, 4096 * MIB);
    if installed(&["qemu-img"]) {
        is_sound(&path);
    }
}

const LARGEST: u64 = 64 << 40;
/// Tells the test that runs in a process of its own which file to use.
const FILE: &str = "VHDFS_TEST_FILE";

/// What the largest disk holds in the end, in pieces of 1 MiB.
fn expected() -> Vec<(u64, Vec<u8>)> {
    let places = [0, 5 * TIB + 7 * MIB, 31 * TIB, LARGEST - MIB];
    let piece = |at: u64| {
        let mut bytes = vec![0; size(MIB)];
        pattern(at >> 20, at / 512, &mut bytes);
        (at, bytes)
    };
    places.into_iter().map(piece).collect()
}

/// The most memory that this process has had so far, in bytes.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

#[test]
#[ignore = "run by the others, in a process of its own"]
fn use_the_largest_disk() {
    let Some(path) = std::env::var_os(FILE).map(PathBuf::from) else {
        return;
    };
    let disk = open(&path);
    for (at, bytes) in expected() {
        disk.write_at(&bytes, at).unwrap();
    }
    // What lies beside it does not stay: blocks before it in the file, and behind it.
    for at in [TIB, 40 * TIB, LARGEST - 900 * MIB] {
        disk.write_at(&[7; 3 << 20], at).unwrap();
    }
    disk.flush().unwrap();
    disk.discard(6 * TIB, 25 * TIB).unwrap();
    disk.discard(TIB, 4 * TIB).unwrap();
    disk.write_zeroes(32 * TIB, 32 * TIB - MIB).unwrap();
    compact(&disk, true);
    assert!(content(&disk) == expected());
    disk.close().unwrap();
    drop(disk);
    assert!(content(&open_read_only(&path)) == expected());
    if let Some(bytes) = peak_memory() {
        println!("memory={bytes}");
    }
}

/// Uses a disk of 64 TiB in a process of its own, checks the file, and says how much memory that
/// took, where it can be told.
fn largest_disk(block_size: u64) -> Option<u64> {
    let folder = tempfile::tempdir().unwrap();
    let maker = Maker::ours("vhdx", block_size, LARGEST);
    let path = maker.create(folder.path());
    let test = Command::new(std::env::current_exe().unwrap())
        .args([
            "sizes::use_the_largest_disk",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(FILE, &path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&test.stdout).into_owned();
    assert!(
        test.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&test.stderr)
    );
    let chain = Chain::open([host_file(&path)]).unwrap();
    let image = chain.child();
    image.check_closed().unwrap();
    image.check_compact().unwrap();
    assert_eq!(chain.disk_len(), LARGEST);
    assert!(chain.content(MIB) == expected());
    let in_use = image
        .blocks()
        .into_iter()
        .filter(|(_, block)| block.state.has_data());
    let blocks: Vec<u64> = in_use.map(|(number, _)| number).collect();
    let of_expected: Vec<u64> = expected().iter().map(|(at, _)| at / block_size).collect();
    assert_eq!(blocks, of_expected);
    let line = said.lines().find_map(|line| line.strip_prefix("memory="));
    line.map(|bytes| bytes.parse().unwrap())
}

#[test]
fn disks_of_64_tib_take_little_memory() {
    for (block_size, most) in [(256 * MIB, 100 * MIB), (32 * MIB, 300 * MIB)] {
        let Some(memory) = largest_disk(block_size) else {
            continue;
        };
        println!("blocks of {} MiB: {} MiB", block_size / MIB, memory / MIB);
        assert!(memory < most, "{} MiB of memory", memory / MIB);
    }
}

/// So many blocks need memory in any case: their table alone has 512 MiB.
#[test]
fn a_disk_of_64_tib_has_any_blocks() {
    if let Some(memory) = largest_disk(MIB) {
        println!("blocks of 1 MiB: {} MiB", memory / MIB);
    }
}
