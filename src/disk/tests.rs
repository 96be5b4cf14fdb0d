//! Tests of what a disk does with its file.

mod gates;
mod trims;
mod twins;

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::{Disk, DiskType, Format, OpenOptions};
use crate::create::{CreateOptions, create_in};
use crate::format::parent::NewParent;
use crate::storage::Storage;
use crate::storage::sim::SimStorage;
use crate::units::{FileOffset, u64_from, usize_from};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;

fn options(format: Format, kind: DiskType) -> CreateOptions {
    CreateOptions {
        block_size: (kind != DiskType::Fixed || format == Format::Vhdx).then_some(1 << 20),
        ..CreateOptions::new(format, kind, DISK)
    }
}

fn created(options: &CreateOptions) -> Arc<SimStorage> {
    let storage = Arc::new(SimStorage::new());
    create_in(&*storage, options).unwrap();
    storage
}

fn open(storage: &Arc<SimStorage>, parent: Option<&Arc<Disk>>) -> Arc<Disk> {
    let options = OpenOptions {
        punch_holes: true,
        ..OpenOptions::default()
    };
    Disk::open_over(
        storage.clone(),
        Path::new("tested"),
        &options,
        parent.cloned(),
    )
    .unwrap()
}

/// A disk in which all is data.
fn full(format: Format, kind: DiskType) -> (Arc<SimStorage>, Arc<Disk>) {
    let storage = created(&options(format, kind));
    let disk = open(&storage, None);
    disk.write_at(&vec![7; usize_from(DISK)], 0).unwrap();
    disk.flush().unwrap();
    (storage, disk)
}

/// A child, in which nothing is written, of a disk in which all is data.
fn child(format: Format) -> (Arc<SimStorage>, Arc<Disk>, Arc<Disk>) {
    let (_, parent) = full(format, DiskType::Dynamic);
    parent.close().unwrap();
    let new_parent = NewParent {
        identity: parent.identity(),
        disk_len: DISK,
        sector_size: 512,
        mtime: SystemTime::UNIX_EPOCH,
        relative: ".\\parent".to_owned(),
        absolute: "C:\\parent".to_owned(),
    };
    let storage = created(&CreateOptions {
        parent: Some(new_parent),
        ..options(format, DiskType::Differencing)
    });
    let disk = open(&storage, Some(&parent));
    (storage, parent, disk)
}

fn read(disk: &Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut found = vec![1; usize_from(len)];
    disk.read_at(&mut found, offset).unwrap();
    found
}

/// The bytes of the file from `at` on.
fn in_file(storage: &SimStorage, at: FileOffset, len: u64) -> Vec<u8> {
    let mut found = vec![1; usize_from(len)];
    storage.read_exact_at(&mut found, at).unwrap();
    assert_eq!(u64_from(found.len()), len);
    found
}
