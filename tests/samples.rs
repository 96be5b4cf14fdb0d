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
        assert!(report.is_clean(), "{}: {report:?}", known.name);
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
        ("xen-snap.vhd", ErrorKind::Incompatible, "differencing"),
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
                dry_run: false,
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
