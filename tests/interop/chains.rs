//! Long chains of disks.

use std::path::{Path, PathBuf};

use vhdfs::disk::{Disk, MAX_CHAIN_LEN, OpenOptions};
use vhdfs::error::ErrorKind;

use crate::mirror::{Mirrored, compact, create_child, open, open_read_only, same_bytes};
use crate::qemu::Maker;
use crate::support::tools::extracted;

const MIB: u64 = 1 << 20;

const VHD: Maker = Maker::ours("vhd", 2 * MIB, 16 * MIB + 1024);
const VHDX: Maker = Maker::ours("vhdx", MIB, 16 * MIB + 1024);

/// Makes a disk and children of children of it, `count` in all, in blocks of `sizes` by turns. Each
/// holds something.
fn chain(maker: Maker, folder: &Path, sizes: [u64; 2], count: usize) -> (Mirrored, Vec<PathBuf>) {
    let mut disk = maker.make(folder, 11);
    disk.our_turn(10);
    let mut files = vec![disk.path.clone()];
    for (n, block_size) in (1..count).zip(sizes.into_iter().cycle()) {
        let path = folder.join(format!("{n}")).with_extension(maker.extension);
        disk.path = create_child(&disk.path, &path, block_size, 512);
        disk.block_size = block_size;
        files.insert(0, path);
        let leaf = open(&disk.path);
        for _ in 0..2 {
            let place = disk.place(512);
            disk.write(&leaf, place.start..place.end.min(place.start + 100_000));
        }
        let place = disk.place(4096);
        disk.discard(&leaf, place.start..place.end.min(place.start + 1_500_000));
        leaf.close().unwrap();
    }
    (disk, files)
}

fn long_chain(maker: Maker, sizes: [u64; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let (mut disk, files) = chain(maker, folder.path(), sizes, 64);
    assert_eq!(open_read_only(&disk.path).chain_len(), 64);
    disk.we_agree();
    disk.second_agrees(&files);
    if let Some(raw) = extracted(&disk.path) {
        same_bytes(&raw, &disk.raw);
    }
    for _ in 0..3 {
        disk.our_turn(5);
        disk.we_agree();
        disk.second_agrees(&files);
    }
    // What the youngest has of its own, and what it could do without: the same as its parent has.
    let leaf = open(&disk.path);
    disk.write(&leaf, 3 * MIB..9 * MIB);
    let mut same = vec![0; 6 << 20];
    leaf.parent().unwrap().read_at(&mut same, 10 * MIB).unwrap();
    disk.write(&leaf, 10 * MIB..16 * MIB);
    leaf.write_at(&same, 10 * MIB).unwrap();
    disk.holds(&same, 10 * MIB);
    disk.discard(&leaf, 4 * MIB..6 * MIB);
    leaf.flush().unwrap();
    let before = leaf.info().unwrap();
    compact(&leaf, false);
    let after = leaf.info().unwrap();
    assert!(after.blocks_allocated < before.blocks_allocated);
    assert!(after.file_length < before.file_length);
    leaf.close().unwrap();
    drop(leaf);
    disk.we_agree();
    disk.second_agrees(&files);
    if let Some(raw) = extracted(&disk.path) {
        same_bytes(&raw, &disk.raw);
    }
}

#[test]
fn a_chain_of_64_vhds() {
    long_chain(VHD, [512 << 10, 2 * MIB]);
}

#[test]
fn a_chain_of_64_vhdx() {
    long_chain(VHDX, [2 * MIB, MIB]);
}

#[test]
fn a_chain_that_is_too_long_is_refused() {
    for maker in [VHD, VHDX] {
        let folder = tempfile::tempdir().unwrap();
        let mut last = maker.make(folder.path(), 12);
        last.our_turn(8);
        for n in 1..=MAX_CHAIN_LEN {
            if n == MAX_CHAIN_LEN {
                assert_eq!(open_read_only(&last.path).chain_len(), MAX_CHAIN_LEN);
                last.we_agree();
                // The youngest takes changes.
                last.our_turn(3);
                last.we_agree();
            }
            let path = folder.path().join(format!("{n}"));
            let path = path.with_extension(maker.extension);
            last.path = create_child(&last.path, &path, 2 * MIB, 512);
        }
        for read_only in [true, false] {
            let options = OpenOptions {
                read_only,
                ..OpenOptions::default()
            };
            let error = Disk::open(&last.path, &options).unwrap_err();
            let text = error.to_string();
            let expected = "with its parents it is 129 disks or more; at most 128 are supported";
            assert!(text.ends_with(expected), "{text}");
            assert_eq!(error.kind(), ErrorKind::Incompatible);
        }
    }
}
