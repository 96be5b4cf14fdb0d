//! Disk images that other programs made do what is known of them.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use support::samples::{samples, unpack};
use vhdfs::check::{CheckOptions, check};
use vhdfs::compact::CompactOptions;
use vhdfs::disk::{Disk, DiskInfo, DiskType, OpenOptions};
use vhdfs::error::ErrorKind;
use vhdfs::units::{u64_from, usize_from};

/// What is known of a sample that opens.
struct Known {
    name: &'static str,
    disk_type: DiskType,
    virtual_size: u64,
    blocks_allocated: u64,
    /// The file's length after compaction, where all its blocks are zero.
    empties_to: Option<u64>,
}

const fn dynamic(name: &'static str, virtual_size: u64, blocks_allocated: u64) -> Known {
    Known {
        name,
        disk_type: DiskType::Dynamic,
        virtual_size,
        blocks_allocated,
        empties_to: None,
    }
}

const KNOWN: &[Known] = &[
    // The end of the table, where the first block began, and a footer.
    Known {
        empties_to: Some(2560),
        ..dynamic("d2v-zerofilled.vhd", 263_454_720, 126)
    },
    dynamic("hyperv2012r2-dynamic.vhd", 136_365_211_648, 0),
    // Virtual PC and QEMU see the product of the geometry, 136363130880; nothing is cut off here.
    dynamic("virtualpc-dynamic.vhd", 136_365_211_648, 0),
    dynamic("ext2.vhd", 4_212_736, 1),
    Known {
        empties_to: Some(4096),
        ..dynamic("xen-dyn.vhd", 16 << 20, 8)
    },
    dynamic("xen-big.vhd", 16 << 20, 0),
    dynamic("qemu10-forcesize-dyn.vhd", 8_388_608, 2),
    Known {
        disk_type: DiskType::Fixed,
        ..dynamic("qemu10-fixed-511footer.vhd", 1_048_576, 0)
    },
    dynamic("iotest-dynamic-1G.vhdx", 1 << 30, 3),
    dynamic("iotest-dirtylog-10G-4M.vhdx", 10 << 30, 18),
    dynamic("test-disk2vhd.vhdx", 256 << 20, 128),
    dynamic("qemu10-dyn-1M.vhdx", 16 << 20, 2),
];

/// Files that are not as they should be, though sound: a log to replay, a tail, headers of QEMU.
const UNTIDY: [&str; 3] = [
    "iotest-dirtylog-10G-4M.vhdx",
    "test-disk2vhd.vhdx",
    "qemu10-dyn-1M.vhdx",
];

fn open(path: &Path, read_only: bool) -> Arc<Disk> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Disk::open(path, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// The disk's content without its zeros: offset and bytes of each 64 KiB that holds data.
fn content(disk: &Disk) -> Vec<(u64, Vec<u8>)> {
    const PIECE: u64 = 64 << 10;
    let mut found = Vec::new();
    for extent in disk
        .extents(0)
        .filter(|extent| extent.kind == vhdfs::disk::ExtentKind::Data)
    {
        let mut at = extent.offset;
        let end = extent.offset + extent.len;
        while at < end {
            let mut piece = vec![0; usize_from(PIECE.min(end - at))];
            disk.read_at(&mut piece, at).expect("readable");
            if piece.iter().any(|byte| *byte != 0) {
                found.push((at, piece.clone()));
            }
            at += u64_from(piece.len());
        }
    }
    found
}

#[test]
fn samples_open_and_are_clean() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for known in KNOWN {
        let path = unpack(&samples, folder.path(), known.name);
        let before = fs::read(&path).expect("readable");
        let info: DiskInfo = open(&path, true).info().expect("told");
        assert_eq!(
            (info.disk_type, info.virtual_size, info.blocks_allocated),
            (known.disk_type, known.virtual_size, known.blocks_allocated),
            "{}",
            known.name
        );
        let report = check(&path, &CheckOptions::default()).expect("checked");
        let untidy = UNTIDY.contains(&known.name);
        assert!(report.is_clean() || untidy, "{}: {report:?}", known.name);
        assert!(
            fs::read(&path).expect("readable") == before,
            "{} changed",
            known.name
        );
    }
}

#[test]
fn compaction_reaches_the_predicted_length_and_keeps_the_content() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for known in KNOWN {
        let path = unpack(&samples, folder.path(), known.name);
        let disk = open(&path, false);
        let before = content(&disk);
        let dry = disk.compact(&CompactOptions {
            dry_run: true,
            ..CompactOptions::default()
        });
        let run = |disk: &Arc<Disk>| disk.compact(&CompactOptions::default()).wait();
        if known.disk_type == DiskType::Fixed {
            let error = run(&disk).expect_err("a fixed disk is refused");
            assert_eq!(error.kind(), ErrorKind::NotCompactable);
            continue;
        }
        let dry = dry.wait().expect("planned");
        let done = run(&disk).expect("compacted");
        assert_eq!(dry.length_after, done.length_after, "{}", known.name);
        assert_eq!(dry.blocks_dropped, done.blocks_dropped, "{}", known.name);
        assert_eq!(
            done.kept.iter().map(|kept| kept.bytes).sum::<u64>(),
            done.length_after
        );
        if let Some(length) = known.empties_to {
            assert_eq!(done.length_after, length, "{}", known.name);
        }
        assert!(content(&disk) == before, "{}", known.name);
        drop(disk);
        assert_eq!(fs::metadata(&path).expect("there").len(), done.length_after);
        let report = check(&path, &CheckOptions::default()).expect("checked");
        assert_eq!(
            (report.errors.len(), report.warnings.len()),
            (0, usize::from(known.name.starts_with("virtualpc"))),
            "{report:?}"
        );
        let again = run(&open(&path, false)).expect("compacted");
        assert_eq!(
            (again.blocks_dropped, again.blocks_moved),
            (0, 0),
            "{}",
            known.name
        );
        assert_eq!(again.length_after, done.length_after, "{}", known.name);
    }
}

#[test]
fn damaged_and_unsupported_samples_are_refused_and_explained() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (name, kind, reason) in [
        ("image.vhd", ErrorKind::Corrupt, "checksum 0xfffff683"),
        (
            "image-differential.vhd",
            ErrorKind::Corrupt,
            "checksum 0xfffff683",
        ),
    ] {
        let path = unpack(&samples, folder.path(), name);
        let before = fs::read(&path).expect("readable");
        for read_only in [true, false] {
            let options = OpenOptions {
                read_only,
                ..OpenOptions::default()
            };
            let error = Disk::open(&path, &options).expect_err("refused");
            assert_eq!(error.kind(), kind, "{name}");
            let text = error.to_string();
            assert!(text.contains(name) && text.contains(reason), "{text}");
        }
        let report = check(
            &path,
            &CheckOptions {
                repair: true,
                ..CheckOptions::default()
            },
        )
        .expect("checked");
        assert!(
            report.errors.iter().any(|error| error.contains(reason)),
            "{report:?}"
        );
        assert!(report.repaired.is_empty(), "{report:?}");
        assert!(
            fs::read(&path).expect("readable") == before,
            "{name} changed"
        );
    }
}

#[test]
fn a_511_byte_footer_is_completed_when_opened_for_writing() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = unpack(&samples, folder.path(), "qemu10-fixed-511footer.vhd");
    let disk = open(&path, false);
    disk.write_at(&[5; 4096], 1_048_576 - 4096)
        .expect("written");
    drop(disk);
    assert_eq!(fs::metadata(&path).expect("there").len(), 1_048_576 + 512);
    let report = check(&path, &CheckOptions::default()).expect("checked");
    assert_eq!(report, vhdfs::check::CheckReport::default());
}

/// Xen's child has no block of its own; its parent is found beside it by what Xen noted.
#[test]
fn xens_child_reads_as_its_parent_and_takes_writes() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let child = unpack(&samples, folder.path(), "xen-snap.vhd");
    let error = Disk::open(&child, &OpenOptions::default()).expect_err("without its parent");
    assert_eq!(error.kind(), ErrorKind::ParentMissing, "{error}");
    let parent = unpack(&samples, folder.path(), "xen-dyn.vhd");
    // Xen's sample holds nothing but zeros: something to see.
    let disk = open(&parent, false);
    disk.write_at(&[0x33; 5 << 20], 1 << 20).expect("written");
    drop(disk);

    let before = fs::read(&parent).expect("readable");
    let disk = open(&child, false);
    assert_eq!(disk.info().expect("told").disk_type, DiskType::Differencing);
    let mut all = vec![0; usize_from(disk.len())];
    disk.read_at(&mut all, 0).expect("readable");
    assert!(all[1 << 20..6 << 20].iter().all(|byte| *byte == 0x33));
    disk.write_at(&[0x44; 5000], (3 << 20) + 100)
        .expect("written");
    disk.discard(4 << 20, 100_000).expect("discarded");
    all[(3 << 20) + 100..][..5000].fill(0x44);
    all[4 << 20..][..100_000].fill(0);
    disk.close().expect("closed");
    drop(disk);

    let disk = open(&child, true);
    let mut read = vec![0; all.len()];
    disk.read_at(&mut read, 0).expect("readable");
    assert!(read == all);
    assert!(
        fs::read(&parent).expect("readable") == before,
        "the parent changed"
    );
    for path in [&child, &parent] {
        let report = check(path, &CheckOptions::default()).expect("checked");
        assert!(report.is_clean(), "{report:?}");
    }
}

/// What the log of the dirty sample says is there at once; replaying it changes nothing of that, and
/// QEMU's replay gives the same disk.
#[test]
fn a_dirty_log_is_replayed_as_qemu_does() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = unpack(&samples, folder.path(), "iotest-dirtylog-10G-4M.vhdx");
    let theirs = folder.path().join("theirs.vhdx");
    fs::copy(&path, &theirs).expect("copied");
    let dirty = fs::read(&path).expect("readable");
    let before = content(&open(&path, true));
    assert!(
        fs::read(&path).expect("readable") == dirty,
        "changed by a look"
    );
    assert!(!before.is_empty());

    let identity = open(&path, true).identity();
    let disk = open(&path, false);
    assert_eq!(disk.identity(), identity, "a replay is no change");
    assert!(content(&disk) == before);
    disk.close().expect("closed");
    drop(disk);
    assert!(fs::read(&path).expect("readable") != dirty);
    assert!(content(&open(&path, true)) == before);

    let qemu = |arguments: &[&std::ffi::OsStr]| {
        let done = std::process::Command::new("qemu-img")
            .args(arguments)
            .output();
        done.ok().map(|output| output.status.success())
    };
    let repaired = qemu(&[
        "check".as_ref(),
        "-r".as_ref(),
        "all".as_ref(),
        theirs.as_ref(),
    ]);
    if repaired.is_none() {
        return println!("skipped: no qemu-img");
    }
    let same = qemu(&["compare".as_ref(), path.as_ref(), theirs.as_ref()]);
    assert_eq!((repaired, same), (Some(true), Some(true)));
}
