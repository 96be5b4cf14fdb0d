//! Disks to compact, and what must be left of them.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::TempDir;
use vhdfs::check::{CheckOptions, check};
use vhdfs::compact::CompactOptions;
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::format::parent::NewParent;

use crate::support::fat::Fat;
use crate::support::size;

pub(crate) const MB: u64 = 1 << 20;
/// Bytes of the disk: a file system, and zeros behind it.
pub(crate) const DISK: u64 = FAT + ZEROS;
const FAT: u64 = 12 * MB;
pub(crate) const ZEROS: u64 = 4 * MB;

/// Each format, by the extension of its files.
pub(crate) const FORMATS: [&str; 2] = ["vhd", "vhdx"];

/// A dynamic disk whose blocks are all there: a file system with junk in its free clusters, and zeros.
pub(crate) struct Made {
    pub(crate) folder: TempDir,
    pub(crate) path: PathBuf,
    fat: Fat,
}

impl Made {
    pub(crate) fn new(extension: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk").with_extension(extension);
        let options = CreateOptions {
            block_size: Some(1 << 20),
            ..CreateOptions::new(format_of(&path), DiskType::Dynamic, DISK)
        };
        create(&path, &options).expect("created");
        let fat = Fat::new(FAT, 1);
        let disk = open(&path, false);
        disk.write_at(&vec![1; size(DISK)], 0).expect("written");
        disk.write_at(&fat.bytes, 0).expect("written");
        disk.write_at(&vec![0; size(DISK - FAT)], FAT)
            .expect("written");
        disk.close().expect("closed");
        Self { folder, path, fat }
    }

    /// One of each format.
    pub(crate) fn each() -> impl Iterator<Item = Self> {
        FORMATS.into_iter().map(Self::new)
    }

    /// The file's length.
    pub(crate) fn len(&self) -> u64 {
        len(&self.path)
    }

    /// Bytes that the host stores for it.
    pub(crate) fn allocated(&self) -> u64 {
        open(&self.path, true).allocated_bytes().expect("known")
    }

    /// The length that compaction with these options would reach.
    pub(crate) fn predicted(&self, options: CompactOptions) -> u64 {
        predicted(&self.path, options)
    }

    /// With everything that CompactVirtualDisk does to it: what is free in a VHD stays, for a child that is
    /// elsewhere could not tell.
    pub(crate) fn with_fs(&self) -> CompactOptions {
        CompactOptions {
            fs_aware: format_of(&self.path) == Format::Vhdx,
            ..CompactOptions::default()
        }
    }

    /// What is in use reads as it did, and the file is sound.
    pub(crate) fn verify(&self) {
        let found = content(&self.path);
        let different = self.fat.first_difference(&found[..size(FAT)]);
        assert_eq!(different, None, "a sector that is in use");
        assert!(found[size(FAT)..].iter().all(|byte| *byte == 0));
        verify(&self.path);
    }

    /// As [`Self::verify`]; and what is free reads as it did.
    pub(crate) fn verify_all(&self) {
        assert!(content(&self.path)[..size(FAT)] == self.fat.bytes[..]);
        self.verify();
    }

    /// An empty disk over this one.
    pub(crate) fn child(&self) -> PathBuf {
        child_of(&self.path)
    }
}

/// An empty disk over the one at `parent`, beside it.
pub(crate) fn child_of(parent: &Path) -> PathBuf {
    let path = parent.with_file_name("child");
    let path = path.with_extension(parent.extension().expect("an extension"));
    let name = parent.file_name().expect("a name").to_string_lossy();
    let disk = open(parent, true);
    let parent = NewParent {
        identity: disk.identity(),
        disk_len: disk.len(),
        sector_size: 512,
        mtime: SystemTime::now(),
        relative: format!(".\\{name}"),
        absolute: String::new(),
    };
    create(&path, &CreateOptions::differencing(parent)).expect("created");
    path
}

/// A disk on which there is enough to do that it takes a while.
pub(crate) fn large(path: &Path) {
    const HALF: u64 = 16 * MB;
    let options = CreateOptions::new(format_of(path), DiskType::Dynamic, 2 * HALF);
    create(path, &options).expect("created");
    let disk = open(path, false);
    disk.write_at(&vec![7; size(2 * HALF)], 0).expect("written");
    disk.write_at(&vec![0; size(HALF)], 0).expect("written");
    disk.close().expect("closed");
}

/// A disk as [`large`] makes it is sound and holds what it did.
pub(crate) fn verify_large(path: &Path) {
    let found = content(path);
    let (zeros, data) = found.split_at(found.len() / 2);
    assert!(zeros.iter().all(|byte| *byte == 0) && data.iter().all(|byte| *byte == 7));
    verify(path);
}

pub(crate) fn len(path: &Path) -> u64 {
    fs::metadata(path).expect("a file").len()
}

pub(crate) fn predicted(path: &Path, options: CompactOptions) -> u64 {
    let options = CompactOptions {
        dry_run: true,
        ..options
    };
    let report = open(path, true).compact(&options).wait();
    report.expect("predicted").length_after
}

pub(crate) fn content(path: &Path) -> Vec<u8> {
    let disk = open(path, true);
    let mut found = vec![0; size(disk.len())];
    disk.read_at(&mut found, 0).expect("read");
    found
}

fn verify(path: &Path) {
    let report = check(path, &CheckOptions::default()).expect("checked");
    assert!(report.is_clean(), "{report:?}");
}

fn open(path: &Path, read_only: bool) -> std::sync::Arc<Disk> {
    let options = OpenOptions {
        read_only,
        punch_holes: false,
        ..OpenOptions::default()
    };
    Disk::open(path, &options).expect("opened")
}

pub(crate) fn format_of(path: &Path) -> Format {
    match path.extension().is_some_and(|name| name == "vhdx") {
        true => Format::Vhdx,
        false => Format::Vhd,
    }
}
