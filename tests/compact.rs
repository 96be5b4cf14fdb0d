//! What compaction must not believe.

use std::time::SystemTime;

use vhdfs::compact::CompactOptions;
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, OpenOptions};
use vhdfs::format::parent::NewParent;

const DISK: u64 = 8 << 20;

/// The budget of a step of scanning is used up by comparing with the parent, too, in whole sectors.
/// Of a granule of which only the first sectors are zero nothing may be given back.
#[test]
fn zeros_are_told_by_whole_granules() {
    let folder = tempfile::tempdir().expect("a folder");
    let (parent_path, path) = (
        folder.path().join("parent.vhd"),
        folder.path().join("a.vhd"),
    );
    create(&parent_path, &CreateOptions::dynamic(DISK)).expect("created");
    let parent = Disk::open(&parent_path, &OpenOptions::default()).expect("opened");
    parent.write_at(&vec![0x77; 2 << 20], 0).expect("written");
    let new_parent = NewParent {
        identity: parent.identity(),
        disk_len: DISK,
        sector_size: 512,
        mtime: SystemTime::now(),
        relative: ".\\parent.vhd".to_owned(),
        absolute: "C:\\parent.vhd".to_owned(),
    };
    drop(parent);
    let options = CreateOptions {
        parent: Some(new_parent),
        ..CreateOptions::new(Format::Vhd, DiskType::Differencing, DISK)
    };
    create(&path, &options).expect("created");

    let disk = Disk::open(&path, &OpenOptions::default()).expect("opened");
    // The comparison reads the first sector and finds a difference there: a MiB less a sector is
    // left of the step, which ends one sector before a granule does.
    disk.write_zeroes(0, 512).expect("zeroed");
    let mut wanted = vec![0x77; 2 << 20];
    wanted[..512].fill(0);
    let zeros = (1 << 20) - 4096..(1 << 20) - 512;
    disk.write_zeroes(u64::try_from(zeros.start).expect("small"), 4096 - 512)
        .expect("zeroed");
    wanted[zeros].fill(0);
    disk.write_at(&[9; 512], (1 << 20) - 512).expect("written");
    wanted[(1 << 20) - 512..1 << 20].fill(9);
    let compact = CompactOptions {
        punch_holes: true,
        ..CompactOptions::default()
    };
    disk.compact(&compact).wait().expect("compacted");

    let mut found = vec![0; wanted.len()];
    disk.read_at(&mut found, 0).expect("read");
    assert!(found == wanted);
}
