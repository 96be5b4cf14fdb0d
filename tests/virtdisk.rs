//! The contract of CompactVirtualDisk and the functions around it, as their pages have it. What may
//! happen while an operation runs is tested beside the code, and both kinds once more from C.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

#[path = "virtdisk/disks.rs"]
mod disks;
#[path = "virtdisk/opening.rs"]
mod opening;
#[path = "virtdisk/sharing.rs"]
mod sharing;
mod support;

use std::fs;
use std::path::Path;

use disks::{
    DISK, FORMATS, MB, Made, ZEROS, child_of, content, format_of, large, len, verify_large,
};
use vhdfs::compact::CompactOptions;
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::virtdisk::*;

const METAOPS: u32 = VIRTUAL_DISK_ACCESS_METAOPS;
const ATTACHABLE: u32 = METAOPS | VIRTUAL_DISK_ACCESS_ATTACH_RO | VIRTUAL_DISK_ACCESS_DETACH;
const READ_ONLY: u32 = ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY;

fn try_open(path: &Path, access: u32) -> Result<VirtualDisk, Win32Error> {
    open_virtual_disk(&VirtualStorageType::UNKNOWN, path, access, 0, None)
}

fn open(path: &Path, access: u32) -> VirtualDisk {
    try_open(path, access).unwrap()
}

/// Why it does not open.
fn refused(path: &Path, access: u32) -> Win32Error {
    match try_open(path, access) {
        Err(error) => error,
        Ok(disk) => panic!("opened: {disk:?}"),
    }
}

#[test]
fn a_handle_must_carry_metaops() {
    for made in Made::each() {
        let rest = VIRTUAL_DISK_ACCESS_ALL & !METAOPS;
        for access in [VIRTUAL_DISK_ACCESS_NONE, VIRTUAL_DISK_ACCESS_READ, rest] {
            let disk = open(&made.path, access);
            let denied = Err(ERROR_ACCESS_DENIED);
            assert_eq!(compact_virtual_disk(&disk, 0, None), denied);
            let overlapped = Overlapped::new();
            let asked = compact_virtual_disk(&disk, 0, Some(&overlapped));
            assert_eq!((asked, overlapped.status()), (denied, None));
        }
        made.verify_all();
    }
}

#[test]
fn flags_other_than_the_known_are_refused() {
    for made in Made::each() {
        let disk = open(&made.path, METAOPS);
        for flags in [4, 8, 0x8000_0000, u32::MAX] {
            let refused = compact_virtual_disk(&disk, flags, None);
            assert_eq!(refused, Err(ERROR_INVALID_PARAMETER));
        }
        drop(disk);
        made.verify_all();
    }
}

/// The two flags of newer versions: no block is read, or none moved.
#[test]
fn the_newer_flags_do_as_they_say() {
    for flags in [
        COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN,
        COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES,
        COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN | COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES,
    ] {
        for made in Made::each() {
            let options = CompactOptions {
                scan: flags & COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN == 0,
                move_blocks: flags & COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES == 0,
                ..made.with_fs()
            };
            let predicted = made.predicted(options);
            let least = made.predicted(made.with_fs());
            // Without what is free, nothing that goes lies before what stays.
            let moves_count = format_of(&made.path) == Format::Vhdx || !options.scan;
            assert!(predicted > least || !moves_count, "{flags}");
            let (before, stored) = (made.len(), made.allocated());
            let disk = open(&made.path, ATTACHABLE);
            attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
            assert_eq!(compact_virtual_disk(&disk, flags, None), Ok(()));
            drop(disk);
            assert_eq!(made.len(), predicted, "{flags}");
            // No holes were made: Windows does not attach a file with holes.
            let cut = before - made.len();
            assert!(made.allocated() + cut + MB / 4 >= stored, "{flags}");
            made.verify();
        }
    }
}

/// METAOPS alone: only zeros go. The call blocks until it is done.
#[test]
fn agnostic_without_attaching() {
    for made in Made::each() {
        let predicted = made.predicted(CompactOptions::default());
        let before = made.len();
        let disk = open(&made.path, METAOPS);
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        assert_eq!(made.len(), predicted, "done, though the handle is open");
        if format_of(&made.path) == Format::Vhdx {
            // Nothing is left to do for who opens it next: no log to replay.
            let bytes = fs::read(&made.path).unwrap();
            let headers = [64 << 10, 128 << 10].map(|at| &bytes[at..at + 4096]);
            let latest = headers
                .into_iter()
                .max_by_key(|header| u64::from_le_bytes(header[8..16].try_into().unwrap()));
            assert_eq!(latest.unwrap()[48..64], [0; 16], "the log's identifier");
        }
        drop(disk);
        assert_eq!(made.len(), predicted);
        assert!(predicted <= before - ZEROS);
        made.verify_all();
    }
}

/// A handle that may attach, but has not: the same.
#[test]
fn the_right_to_attach_is_not_enough() {
    for made in Made::each() {
        let predicted = made.predicted(CompactOptions::default());
        let disk = open(&made.path, ATTACHABLE);
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        detach_virtual_disk(&disk, 0, 0).unwrap();
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        drop(disk);
        assert_eq!(made.len(), predicted);
        made.verify_all();
    }
}

/// Attached read-only: what the guest's file system calls free goes too.
#[test]
fn aware_while_attached() {
    for made in Made::each() {
        let predicted = made.predicted(made.with_fs());
        let agnostic = made.predicted(CompactOptions::default());
        let disk = open(&made.path, ATTACHABLE);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        detach_virtual_disk(&disk, 0, 0).unwrap();
        drop(disk);
        assert_eq!(made.len(), predicted);
        let is_vhdx = format_of(&made.path) == Format::Vhdx;
        assert_eq!(predicted < agnostic, is_vhdx, "{predicted}, {agnostic}");
        made.verify();
        // The page: first the one, then the other, produces the smallest. Here the first is enough.
        let disk = open(&made.path, METAOPS);
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        drop(disk);
        assert_eq!(made.len(), predicted);
        made.verify();
    }
}

#[test]
fn with_overlapped_it_goes_on_alone() {
    for made in Made::each() {
        let predicted = made.predicted(CompactOptions::default());
        let disk = open(&made.path, METAOPS);
        let overlapped = Overlapped::new();
        let started = compact_virtual_disk(&disk, 0, Some(&overlapped));
        assert_eq!(started, Err(ERROR_IO_PENDING));
        let progress = get_virtual_disk_operation_progress(&disk, &overlapped).unwrap();
        assert!(progress.current_value <= progress.completion_value);
        let known = [ERROR_IO_PENDING, ERROR_SUCCESS];
        assert!(known.contains(&progress.operation_status));
        assert_eq!(overlapped.wait(), Ok(()));
        let progress = get_virtual_disk_operation_progress(&disk, &overlapped).unwrap();
        assert_eq!(progress.operation_status, ERROR_SUCCESS);
        assert_eq!(progress.current_value, progress.completion_value);
        assert_eq!(made.len(), predicted);
        drop(disk);
        made.verify_all();
    }
}

#[test]
fn fixed_disks_are_refused() {
    for name in ["a.vhd", "a.vhdx"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let options = CreateOptions::new(format_of(&path), DiskType::Fixed, 4 * MB);
        create(&path, &options).unwrap();
        let disk = open(&path, ATTACHABLE);
        let wrong_type = Err(ERROR_VHD_INVALID_TYPE);
        assert_eq!(compact_virtual_disk(&disk, 0, None), wrong_type);
        assert_eq!(attach_virtual_disk(&disk, READ_ONLY, 0), Ok(()));
        let overlapped = Overlapped::new();
        let asked = compact_virtual_disk(&disk, 0, Some(&overlapped));
        assert_eq!((asked, overlapped.status()), (wrong_type, None));
    }
    assert_eq!(ERROR_VHD_INVALID_TYPE.code(), 0xc03a_001b);
}

#[test]
fn differencing_disks_are_compacted() {
    for extension in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let parent = folder.path().join("parent").with_extension(extension);
        large(&parent);
        let path = child_of(&parent);
        let options = OpenOptions {
            punch_holes: false,
            ..OpenOptions::default()
        };
        let child = Disk::open(&path, &options).unwrap();
        // The same as the parent has, and something of its own.
        child.write_at(&vec![7; 8 << 20], 16 * MB).unwrap();
        child.write_at(&[3; 1 << 20], 26 * MB).unwrap();
        child.close().unwrap();
        drop(child);
        let wanted = content(&path);
        let before = len(&path);
        let disk = open(&path, METAOPS);
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        drop(disk);
        assert!(len(&path) <= before - 8 * MB, "{before} {}", len(&path));
        assert!(content(&path) == wanted);
        verify_large(&parent);
    }
}

/// Compacting a parent leaves what its children read alone, attached or not.
#[test]
fn what_children_rely_on_stays() {
    for made in Made::each() {
        let child = made.child();
        let wanted = content(&child);
        let agnostic = made.predicted(CompactOptions::default());
        let disk = open(&made.path, ATTACHABLE);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        drop(disk);
        assert_eq!(made.len(), agnostic);
        assert!(content(&child) == wanted);
        made.verify_all();
    }
}

/// Who may attach or compact keeps others off; who only asks, or detaches, does not count.
#[test]
fn one_owner() {
    for made in Made::each() {
        let others = VIRTUAL_DISK_ACCESS_GET_INFO | VIRTUAL_DISK_ACCESS_DETACH;
        let asks = open(&made.path, others);
        for access in [METAOPS, ATTACHABLE, VIRTUAL_DISK_ACCESS_ATTACH_RO] {
            let disk = open(&made.path, access);
            for second in [
                METAOPS,
                VIRTUAL_DISK_ACCESS_ATTACH_RO,
                VIRTUAL_DISK_ACCESS_ATTACH_RW,
            ] {
                assert_eq!(refused(&made.path, second), ERROR_SHARING_VIOLATION);
            }
            drop(open(&made.path, others));
            drop(disk);
        }
        // Another program: it is told from us by its lock alone.
        let program = Disk::open(&made.path, &OpenOptions::default()).unwrap();
        assert_eq!(refused(&made.path, METAOPS), ERROR_SHARING_VIOLATION);
        let access = VIRTUAL_DISK_ACCESS_ATTACH_RO;
        assert_eq!(refused(&made.path, access), ERROR_SHARING_VIOLATION);
        drop(open(&made.path, others));
        drop((program, asks));
        made.verify_all();
    }
}

/// Opening a file whose compaction was cut short finishes that: unused space at its end goes.
#[test]
fn reopening_an_interrupted_disk_shrinks_it() {
    for made in Made::each() {
        drop(open(&made.path, METAOPS));
        let least = made.len();
        let mut bytes = fs::read(&made.path).unwrap();
        let end = bytes.len();
        let tail = match format_of(&made.path) {
            // The footer is the last thing to move.
            Format::Vhd => bytes.split_off(end - 512),
            _ => Vec::new(),
        };
        bytes.resize(bytes.len() + (8 << 20), 0);
        bytes.extend(tail);
        fs::write(&made.path, bytes).unwrap();
        assert_eq!(made.len(), least + 8 * MB);
        // Not who only looks.
        drop(open(&made.path, VIRTUAL_DISK_ACCESS_READ));
        assert_eq!(made.len(), least + 8 * MB);
        drop(open(&made.path, METAOPS));
        assert_eq!(made.len(), least);
        made.verify_all();
    }
}
