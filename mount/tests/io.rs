//! Reading, writing and discarding through a mount.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;

use common::{Mount, assert_clean, create, errno, eventually, stored};
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

const MIB: u64 = 1 << 20;
const LEN: u64 = 64 * MIB;

fn sample(options: &[&str]) -> Option<Mount> {
    Mount::new(options, |source| {
        create(&source.join("a.vhd"), &["--size", "64M"]);
        create(&source.join("f.vhd"), &["--size", "64M", "--type", "fixed"]);
    })
}

fn open(mount: &Mount, name: &str) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(mount.at(name))
        .unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|n| u8::try_from(n % 251).unwrap() ^ seed | 1)
        .collect()
}

#[test]
fn any_size_and_alignment() {
    let Some(mount) = sample(&["--no-compact"]) else {
        return;
    };
    for name in ["a.vhd.raw", "f.vhd.raw"] {
        let file = open(&mount, name);
        let mut model = vec![0; usize::try_from(LEN).unwrap()];
        let places = [
            (0, 1),
            (511, 2),
            (4095, 8193),
            (2 * MIB - 3, 7),
            (5 * MIB + 1, 3_000_001),
        ];
        for (n, (offset, len)) in places.into_iter().chain([(LEN - 5, 5)]).enumerate() {
            let data = pattern(len, u8::try_from(n).unwrap());
            file.write_all_at(&data, offset).unwrap();
            model[usize::try_from(offset).unwrap()..][..len].copy_from_slice(&data);
        }
        file.sync_all().unwrap();
        assert!(fs::read(mount.at(name)).unwrap() == model, "{name}");
        drop(file);
    }
    mount.unmount();
    mount.mount(&["--no-compact"]);
    let read = fs::read(mount.at("a.vhd.raw")).unwrap();
    assert_eq!(read[511], pattern(2, 1)[0]);
    assert!(
        read == fs::read(mount.at("f.vhd.raw")).unwrap(),
        "after a remount"
    );
    mount.unmount();
    assert_clean(&mount.behind("a.vhd"));
    assert_clean(&mount.behind("f.vhd"));
}

#[test]
fn the_end_of_the_disk() {
    let Some(mount) = sample(&[]) else { return };
    let file = open(&mount, "a.vhd.raw");
    let mut buffer = [7; 100];
    assert_eq!(file.read_at(&mut buffer, LEN - 10).unwrap(), 10);
    assert_eq!(file.read_at(&mut buffer, LEN).unwrap(), 0);
    assert_eq!(
        file.write_at(&buffer, LEN - 10).unwrap(),
        10,
        "as much as fits"
    );
    assert_eq!(
        errno(file.write_at(&buffer, LEN)),
        Errno::FBIG.raw_os_error()
    );
    assert_eq!(file.metadata().unwrap().len(), LEN);
}

#[test]
fn discarded_ranges_read_as_zeros_and_take_no_space() {
    let Some(mount) = sample(&["--idle-after", "100ms", "--min-reclaim", "1M"]) else {
        return;
    };
    let file = open(&mount, "a.vhd.raw");
    file.write_all_at(&pattern(16 << 20, 3), 0).unwrap();
    file.sync_all().unwrap();
    let full = stored(&mount.at("a.vhd.raw"));
    assert!(
        full > 16 * MIB && full == stored(&mount.behind("a.vhd")),
        "du tells the truth"
    );

    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 4 * MIB, 4 * MIB).unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 9 * MIB + 5, MIB).unwrap();
    rustix::fs::fallocate(&file, punch, LEN - MIB, 5 * MIB).unwrap();
    let read = fs::read(mount.at("a.vhd.raw")).unwrap();
    let mut expected = pattern(16 << 20, 3);
    expected[4 << 20..8 << 20].fill(0);
    expected[(9 << 20) + 5..(10 << 20) + 5].fill(0);
    assert!(read[..16 << 20] == expected);
    eventually("the space is given back", || {
        stored(&mount.at("a.vhd.raw")) <= full - 4 * MIB
    });

    let refused = [
        (FallocateFlags::empty(), Errno::OPNOTSUPP),
        (FallocateFlags::KEEP_SIZE, Errno::OPNOTSUPP),
        (FallocateFlags::COLLAPSE_RANGE, Errno::OPNOTSUPP),
    ];
    for (mode, expected) in refused {
        assert_eq!(
            rustix::fs::fallocate(&file, mode, 0, MIB),
            Err(expected),
            "{mode:?}"
        );
    }
    let beyond = rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, LEN - MIB, 2 * MIB);
    assert_eq!(beyond, Err(Errno::FBIG));
    let reader = File::open(mount.at("a.vhd.raw")).unwrap();
    assert!(rustix::fs::fallocate(&reader, punch, 0, MIB).is_err());
    drop((file, reader));
    mount.unmount();
    assert_clean(&mount.behind("a.vhd"));
}

#[test]
fn holes_can_be_found() {
    let Some(mount) = sample(&["--no-compact"]) else {
        return;
    };
    let file = open(&mount, "a.vhd.raw");
    file.write_all_at(&pattern(1 << 20, 1), 10 * MIB).unwrap();
    let seek = |from| rustix::fs::seek(&file, from);
    let data = seek(rustix::fs::SeekFrom::Data(0)).unwrap();
    assert!((8 * MIB..=10 * MIB).contains(&data), "{data}");
    let hole = seek(rustix::fs::SeekFrom::Hole(data)).unwrap();
    assert!((11 * MIB..=12 * MIB).contains(&hole), "{hole}");
    assert_eq!(seek(rustix::fs::SeekFrom::Data(hole)), Err(Errno::NXIO));
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(LEN)), Err(Errno::NXIO));
    let mut whole = open(&mount, "f.vhd.raw");
    assert_eq!(whole.seek(SeekFrom::End(0)).unwrap(), LEN);
}

#[test]
fn direct_and_mapped_access_see_each_other() {
    let Some(mount) = sample(&["--no-compact"]) else {
        return;
    };
    let direct = |write| {
        let mut options = File::options();
        let flags = i32::from_ne_bytes(OFlags::DIRECT.bits().to_ne_bytes());
        options
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(mount.at("a.vhd.raw"))
            .unwrap()
    };
    let cached = open(&mount, "a.vhd.raw");
    let mut byte = [0];
    cached.read_exact_at(&mut byte, 4096).unwrap();
    // Aligned as O_DIRECT asks for elsewhere.
    let file = direct(true);
    let page = pattern(3 * 4096, 9);
    let start = page.as_ptr().align_offset(4096);
    let aligned = &page[start..start + 4096];
    file.write_all_at(aligned, 4096).unwrap();
    let mut found = vec![0; 4096];
    cached.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == aligned, "the cache does not hide a direct write");
    cached.write_all_at(b"cached", 8192).unwrap();
    let mut found = [0; 6];
    direct(false).read_exact_at(&mut found, 8192).unwrap();
    assert_eq!(&found, b"cached");
    drop((file, cached));

    if common::has("fio") {
        for engine in ["mmap", "psync", "libaio"] {
            let output = Command::new("fio")
                .args([
                    "--name=t",
                    "--rw=randwrite",
                    "--bs=4k",
                    "--size=16M",
                    "--verify=crc32c",
                ])
                .args([
                    "--end_fsync=1",
                    "--iodepth=16",
                    "--overwrite=1",
                    "--allow_file_create=0",
                ])
                .arg(format!("--ioengine={engine}"))
                .arg(format!("--direct={}", u8::from(engine == "libaio")))
                .arg(format!("--filename={}", mount.at("a.vhd.raw").display()))
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{engine}: {text}");
        }
    }
    mount.unmount();
    assert_clean(&mount.behind("a.vhd"));
}

#[test]
fn a_deleted_disk_works_on() {
    let Some(mount) = sample(&[]) else { return };
    let file = open(&mount, "a.vhd.raw");
    fs::remove_file(mount.behind("a.vhd")).unwrap();
    file.write_all_at(b"still here", MIB).unwrap();
    file.sync_all().unwrap();
    let mut found = [0; 10];
    file.read_exact_at(&mut found, MIB).unwrap();
    assert_eq!(&found, b"still here");
    assert_eq!(file.metadata().unwrap().len(), LEN);
}

#[test]
fn idle_disks_shrink_while_they_are_open() {
    let Some(mount) = sample(&["--idle-after", "200ms", "--min-reclaim", "1M"]) else {
        return;
    };
    let file = open(&mount, "a.vhd.raw");
    let data = pattern(32 << 20, 5);
    file.write_all_at(&data, 0).unwrap();
    file.sync_all().unwrap();
    let full = fs::metadata(mount.behind("a.vhd")).unwrap().len();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, 24 * MIB).unwrap();
    // Zeros that are written count like discarded ranges.
    file.write_all_at(&vec![0; 4 << 20], 24 * MIB).unwrap();
    file.sync_all().unwrap();
    eventually("the file is cut", || {
        fs::metadata(mount.behind("a.vhd")).unwrap().len() < full - 27 * MIB
    });
    eventually("it says so", || {
        mount.status("a.vhd.raw")["state"] == "compact"
    });
    let mut found = vec![1; 32 << 20];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found[..28 << 20].iter().all(|byte| *byte == 0));
    assert!(found[28 << 20..] == data[28 << 20..]);
    drop(file);
    mount.unmount();
    assert_clean(&mount.behind("a.vhd"));
    let again = common::run([
        "compact",
        "--json",
        "--dry-run",
        mount.behind("a.vhd").to_str().unwrap(),
    ]);
    let report = common::json(&again);
    assert_eq!(report["length_before"], report["length_after"], "{report}");
}
