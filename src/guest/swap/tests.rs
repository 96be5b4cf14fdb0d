use std::ops::Range;

use super::{is_here, read};
use crate::guest::testing::Disk;
use crate::guest::view::View;
use crate::guest::{Trouble, Volume};

const LEN: u64 = 1 << 20;

fn swap(page: u64, last: u32, bad: &[u32]) -> Disk {
    let mut disk = Disk::new(LEN, 512);
    disk.put(page - 10, b"SWAPSPACE2");
    disk.put(1024, &[1]);
    disk.put(1028, &last.to_le_bytes());
    disk.put(1032, &[u8::try_from(bad.len()).unwrap()]);
    for (number, page) in (0..).zip(bad) {
        disk.put(1536 + 4 * number, &page.to_le_bytes());
    }
    disk
}

fn found(disk: &Disk) -> Result<Volume, (String, bool)> {
    let view = View::whole(disk);
    assert_eq!(is_here(&view).unwrap(), Some("Linux swap"));
    read(&view).map_err(|trouble| match trouble {
        Trouble::Skip { reason, hibernated } => (reason, hibernated),
        Trouble::Io(error) => (error.to_string(), false),
    })
}

fn refused(disk: &Disk, why: &str) {
    let found = found(disk);
    let matches = |(reason, asleep): &(String, bool)| reason.contains(why) && !asleep;
    assert!(found.as_ref().is_err_and(matches), "{found:?}, not {why}");
}

fn free(volume: &Volume) -> Vec<Range<u64>> {
    volume.free.iter().cloned().collect()
}

#[test]
fn all_pages_but_the_first_and_the_bad() {
    for page in [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10] {
        let last = u32::try_from(LEN / page - 1).unwrap();
        let volume = found(&swap(page, last, &[])).unwrap();
        assert_eq!((volume.size, volume.reported_free), (LEN, LEN - page));
        assert_eq!(free(&volume), vec![page..LEN]);
    }
    let volume = found(&swap(4096, 200, &[7, 3, 3, 200])).unwrap();
    assert_eq!(volume.size, 201 * 4096);
    let pages: Vec<_> = (free(&volume).iter())
        .map(|run| run.start / 4096..run.end / 4096)
        .collect();
    assert_eq!(pages, [1..3, 4..7, 8..200]);
    assert_eq!(volume.reported_free, 197 * 4096);
}

#[test]
fn what_cannot_be() {
    refused(
        &swap(4096, 256, &[]),
        "claims 1052672 bytes, but has 1048576",
    );
    refused(&swap(4096, u32::MAX, &[]), "claims");
    refused(&swap(4096, 0, &[]), "claims");
    refused(&swap(4096, 255, &[256]), "a bad page 256, but only 255");
    refused(&swap(4096, 255, &[0]), "a bad page 0");
    let mut disk = swap(4096, 255, &[]);
    disk.put(1032, &638_u32.to_le_bytes());
    refused(&disk, "638 bad pages");
    disk.put(1032, &u32::MAX.to_le_bytes());
    refused(&disk, "bad pages");
    let mut disk = swap(4096, 255, &[]);
    disk.put(1024, &[0, 0, 0, 1]);
    refused(&disk, "is of version 16777216, not 1");
    let mut disk = swap(4096, 255, &[]);
    disk.put(65526, b"SWAPSPACE2");
    refused(&disk, "disagree");
    let mut disk = swap(4096, 255, &[]);
    disk.put(4086, b"SWAP-SPACE");
    refused(&disk, "disagree");
}

#[test]
fn a_system_that_sleeps() {
    for mark in ["S1SUSPEND", "S2SUSPEND", "ULSUSPEND", "LINHIB0001"] {
        for page in [4 << 10, 64 << 10] {
            let mut disk = swap(4096, 255, &[]);
            disk.put(page - 10, b"\0\0\0\0\0\0\0\0\0\0");
            disk.put(page - 10, mark.as_bytes());
            assert!(found(&disk).is_err_and(|(_, asleep)| asleep), "{mark}");
        }
    }
    let mut disk = swap(4096, 255, &[]);
    disk.put(0, b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c");
    assert!(found(&disk).is_err_and(|(_, asleep)| asleep));
}

#[test]
fn no_swap_space() {
    for len in [0, 7, 4095, 4096, 65536, 1 << 20] {
        let disk = Disk::new(len, 512);
        assert_eq!(is_here(&View::whole(&disk)).unwrap(), None);
    }
}
