use std::ops::Range;

use super::{Slot, read};
use crate::guest::Trouble;
use crate::guest::testing::{Disk, gpt_entries, random};
use crate::guest::view::View;

const LINUX: [u8; 16] = *b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4";
const LDM_DATA: [u8; 16] = *b"\xa0\x60\x9b\xaf\x31\x14\x62\x4f\xbc\x68\x33\x11\x71\x4a\x69\xad";
const RAID: [u8; 16] = *b"\x0f\x88\x9d\xa1\xfc\x05\x3b\x4d\xa0\x06\x74\x3f\x0f\x84\x91\x1e";

fn found(disk: &Disk) -> Result<Option<Vec<Slot>>, String> {
    read(&View::whole(disk)).map_err(|trouble| match trouble {
        Trouble::Skip { reason, .. } => reason,
        Trouble::Io(error) => error.to_string(),
    })
}

/// The names and places of partitions, or why there are none.
type Listed = Result<Option<Vec<(String, Range<u64>)>>, String>;

/// Number and sectors of each partition.
fn ranges(disk: &Disk) -> Listed {
    let short = |slot: Slot| {
        let sectors = slot.range.start / disk.sector..slot.range.end / disk.sector;
        (slot.name.replace("partition ", ""), sectors)
    };
    Ok(found(disk)?.map(|slots| slots.into_iter().map(short).collect()))
}

fn list(slots: &[(u32, Range<u64>)]) -> Listed {
    Ok(Some(
        (slots.iter())
            .map(|(number, range)| (number.to_string(), range.clone()))
            .collect(),
    ))
}

fn refused(disk: &Disk, why: &str) {
    let found = found(disk);
    assert!(
        found.as_ref().is_err_and(|reason| reason.contains(why)),
        "{found:?}, not {why}"
    );
}

/// A disk with two primary partitions and three logical ones, whose chain goes back and forth.
fn mbr(sector: u64) -> Disk {
    let mut disk = Disk::new(1000 * sector, sector);
    disk.mbr_entry(0, 0, 0x83, 10, 90);
    disk.mbr_entry(0, 1, 0x05, 100, 800);
    disk.mbr_entry(0, 3, 0x07, 900, 100);
    disk.mbr_entry(100, 0, 0x83, 10, 90);
    disk.mbr_entry(100, 1, 0x05, 400, 100);
    disk.mbr_entry(500, 0, 0x82, 1, 99);
    disk.mbr_entry(500, 1, 0x05, 200, 200);
    disk.mbr_entry(300, 0, 0x83, 50, 150);
    disk
}

#[test]
fn primary_and_logical_partitions() {
    for sector in [512, 4096] {
        let expected = [
            (1, 10..100),
            (4, 900..1000),
            (5, 110..200),
            (6, 501..600),
            (7, 350..500),
        ];
        assert_eq!(ranges(&mbr(sector)), list(&expected));
    }
}

#[test]
fn no_table() {
    assert_eq!(ranges(&Disk::new(0, 512)), Ok(None));
    assert_eq!(ranges(&Disk::new(511, 512)), Ok(None));
    assert_eq!(ranges(&Disk::new(512, 512)), Ok(None));
    assert_eq!(ranges(&Disk::new(1 << 20, 4096)), Ok(None));
    let mut disk = Disk::new(1 << 20, 512);
    disk.put(510, &[0x55, 0xaa]);
    assert_eq!(ranges(&disk), Ok(None), "a table without entries");
    let mut disk = mbr(512);
    disk.put(510, &[0]);
    assert_eq!(ranges(&disk), Ok(None), "no signature");
    let mut disk = mbr(512);
    disk.put(446 + 32, &[0x12]);
    refused(&disk, "neither a partition table nor a boot sector");
    disk.put(0, b"\xeb\x58\x90EXTLINUX\0\x02");
    assert_eq!(ranges(&disk), Ok(None), "a boot sector's code");
    refused(&Disk::new(4096, 520), "sectors of 520 bytes");
}

#[test]
fn chains_that_cannot_be_relied_on() {
    let mut disk = mbr(512);
    disk.mbr_entry(300, 1, 0x05, 400, 100);
    refused(&disk, "without an end");
    let mut disk = mbr(512);
    disk.put(300 * 512 + 510, &[0]);
    refused(&disk, "breaks off at sector 300");
    let mut disk = mbr(512);
    disk.mbr_entry(300, 1, 0x05, 800, 100);
    disk.mbr_entry(900, 0, 0x83, 1, 5);
    refused(&disk, "breaks off at sector 900");
    let mut disk = mbr(512);
    disk.mbr_entry(300, 1, 0x0f, u64::from(u32::MAX), 100);
    refused(&disk, "breaks off");
    let mut disk = mbr(512);
    disk.mbr_entry(300, 1, 0x83, 10, 10);
    refused(&disk, "two logical partitions in one record");
    let mut disk = mbr(512);
    disk.mbr_entry(500, 2, 0x85, 300, 10);
    refused(&disk, "forks");
    let mut disk = mbr(512);
    disk.mbr_entry(0, 2, 0x0f, 5, 2);
    refused(&disk, "more than one extended");
    let mut disk = Disk::new(1 << 20, 512);
    disk.mbr_entry(0, 0, 0x05, 1, 1500);
    for record in 0..200 {
        disk.mbr_entry(1 + record * 2, 0, 0x83, 1, 1);
        disk.mbr_entry(1 + record * 2, 1, 0x05, record * 2 + 2, 2);
    }
    refused(&disk, "without an end");
}

#[test]
fn partitions_in_each_other() {
    let mut disk = mbr(512);
    disk.mbr_entry(0, 2, 0x83, 99, 1);
    refused(&disk, "overlap: partition 1 and partition 3");
    let mut disk = mbr(512);
    disk.mbr_entry(0, 2, 0x83, 890, 10);
    refused(&disk, "overlap: the extended partition and partition 3");
    let mut disk = mbr(512);
    disk.mbr_entry(0, 2, 0x83, 0, 10);
    refused(&disk, "overlap: the partition table and partition 3");
    let mut disk = mbr(512);
    disk.mbr_entry(300, 0, 0x83, 50, 151);
    refused(&disk, "overlap: partition 7 and the record");
    let mut disk = mbr(512);
    disk.mbr_entry(300, 0, 0x83, 0, 10);
    refused(&disk, "overlap: ");
    let mut disk = mbr(512);
    disk.mbr_entry(300, 0, 0x83, 1, 600);
    refused(&disk, "outside of the extended one");
}

#[test]
fn partitions_beyond_the_disk() {
    let mut disk = mbr(512);
    disk.mbr_entry(0, 3, 0x07, 900, 101);
    refused(&disk, "too small for its partition table: partition 4 ends");
    disk.mbr_entry(0, 3, 0x07, u64::from(u32::MAX), u64::from(u32::MAX));
    refused(&disk, "too small");
    let mut disk = mbr(512);
    disk.bytes.truncate(850 * 512);
    refused(&disk, "too small");
}

#[test]
fn types_that_say_enough() {
    let mut disk = mbr(512);
    disk.mbr_entry(0, 3, 0x42, 900, 100);
    refused(&disk, "dynamic disk");
    let mut disk = mbr(512);
    disk.mbr_entry(0, 3, 0xfd, 900, 100);
    disk.mbr_entry(0, 2, 0, 2, 3);
    let slots = found(&disk).unwrap().unwrap();
    let kept = |name: &str| {
        let slot = slots.iter().find(|slot| slot.name == name).unwrap();
        slot.kept.map(|kept| kept.reason)
    };
    assert_eq!(kept("partition 1"), None);
    assert!(kept("partition 3").unwrap().contains("no type"));
    assert!(kept("partition 4").unwrap().contains("RAID"));

    let mut disk = Disk::new(1 << 20, 512);
    disk.gpt(&[(LINUX, 40..100), (RAID, 100..200)]);
    let slots = found(&disk).unwrap().unwrap();
    assert_eq!(slots[0].kept, None);
    assert_eq!(slots[1].kept.unwrap().content, Some("Linux RAID"));
    disk.gpt(&[(LINUX, 40..100), (LDM_DATA, 100..200)]);
    refused(&disk, "dynamic disk");
}

/// The boot sector of a FAT volume over the whole disk, whose code lies where entries would.
fn superfloppy(code: &[u8]) -> Disk {
    let mut disk = Disk::new(1 << 20, 512);
    disk.put(0, b"\xeb\x3c\x90MSDOS5.0\0\x02\x04\x01\0\x02");
    disk.put(446, code);
    disk.put(510, &[0x55, 0xaa]);
    disk
}

#[test]
fn boot_sectors_are_no_tables() {
    assert_eq!(ranges(&superfloppy(&[0; 64])), Ok(None));
    assert_eq!(ranges(&superfloppy(b"BOOTMGR is missing")), Ok(None));
    let mut entry = [0; 64];
    entry[..16].copy_from_slice(b"\0pressB any keyB");
    assert_eq!(
        ranges(&superfloppy(&entry)),
        Ok(None),
        "beyond the disk, and LDM's type"
    );
    // One that makes sense is taken for one, whatever stands before it.
    entry[..16].copy_from_slice(b"\0\0\0\0\x83\0\0\0\x10\0\0\0\x10\0\0\0");
    assert_eq!(ranges(&superfloppy(&entry)), list(&[(1, 16..32)]));
    // Nor if only some of it does.
    entry[16..32].copy_from_slice(b"\0\0\0\0\x83\0\0\0\0\0\x10\0\x10\0\0\0");
    refused(&superfloppy(&entry), "too small");
    // Without a volume's sizes it is a table, and wrong.
    let mut disk = superfloppy(&[0; 64]);
    disk.put(11, &[0; 3]);
    disk.mbr_entry(0, 0, 0x83, 1, 1 << 20);
    refused(&disk, "too small");
}

const PARTITIONS: [([u8; 16], Range<u64>); 3] =
    [(LINUX, 40..100), (LINUX, 300..301), (LINUX, 100..300)];

fn gpt(sector: u64) -> Disk {
    let mut disk = Disk::new(1000 * sector, sector);
    disk.gpt(&PARTITIONS);
    disk
}

fn all() -> Listed {
    list(&[(1, 40..100), (2, 300..301), (3, 100..300)])
}

#[test]
fn a_gpt_and_its_backup() {
    for sector in [512, 4096] {
        let mut disk = gpt(sector);
        assert_eq!(ranges(&disk), all());
        // The backup's place does not matter while the other copy is good, nor that it is gone.
        disk.put(999 * sector, &[0; 92]);
        assert_eq!(ranges(&disk), all());
        let mut disk = gpt(sector);
        disk.put(sector + 60, &[1]);
        assert_eq!(
            ranges(&disk),
            all(),
            "the backup, for the header's checksum is wrong"
        );
        let mut disk = gpt(sector);
        disk.put(2 * sector + 60, &[1]);
        assert_eq!(
            ranges(&disk),
            all(),
            "the backup, for the entries' checksum is wrong"
        );
        disk.put(999 * sector + 60, &[1]);
        refused(&disk, "neither copy is intact");
    }
}

#[test]
fn a_disk_that_was_grown() {
    let mut disk = gpt(512);
    disk.bytes.resize(2000 * 512, 0);
    assert_eq!(ranges(&disk), all());
    // Nobody finds the backup in the middle without the primary one.
    disk.put(512 + 60, &[1]);
    refused(&disk, "neither copy is intact");
    let mut disk = gpt(512);
    disk.bytes.truncate(600 * 512);
    assert_eq!(ranges(&disk), all(), "cut, but behind all partitions");
    disk.bytes.truncate(300 * 512);
    refused(&disk, "too small");
}

#[test]
fn copies_that_disagree() {
    let mut disk = gpt(512);
    let entries = gpt_entries(&[(LINUX, 40..101)]);
    disk.put(512 * 967, &entries);
    disk.gpt_header(999, 1, 967, &entries);
    refused(&disk, "two copies disagree");
}

#[test]
fn tables_of_other_sectors() {
    let mut disk = gpt(512);
    disk.sector = 4096;
    refused(
        &disk,
        "counts in sectors of 512 bytes, but has itself sectors of 4096",
    );
    let mut disk = gpt(4096);
    disk.sector = 512;
    refused(&disk, "counts in sectors of 4096 bytes");
}

#[test]
fn two_tables() {
    let mut disk = gpt(512);
    disk.mbr_entry(0, 1, 0x83, 100, 200);
    assert_eq!(ranges(&disk), all(), "which agree");
    disk.mbr_entry(0, 2, 0x83, 100, 201);
    refused(&disk, "two partition tables, MBR and GPT, that disagree");
    let mut disk = gpt(512);
    disk.put(446, &[0; 66]);
    refused(&disk, "its first sector does not tell of");
    disk.put(512, &[0; 92]);
    refused(&disk, "its first sector does not tell of");
    disk.put(999 * 512, &[0; 92]);
    assert_eq!(ranges(&disk), Ok(None));
    // Of a GPT that was given up, something often stays.
    let mut disk = gpt(512);
    disk.put(446, &[0; 64]);
    disk.mbr_entry(0, 0, 0x83, 500, 100);
    refused(&disk, "its first sector does not tell of");
    disk.put(512 + 20, &[1]);
    disk.put(999 * 512 + 20, &[1]);
    assert_eq!(ranges(&disk), list(&[(1, 500..600)]));
}

#[test]
fn entries_that_cannot_be() {
    for partition in [
        39..40,
        1..5,
        966..967,
        999..1000,
        100..u64::MAX,
        60..std::hint::black_box(50),
    ] {
        let mut disk = gpt(512);
        let fits = partition == (39..40) || partition == (966..967);
        let name = format!("{partition:?}");
        disk.gpt(&[(LINUX, 40..60), (LINUX, partition)]);
        assert_eq!(found(&disk).is_ok(), fits, "{name}");
        if !fits {
            refused(&disk, "partition 2 lies outside of what it may use");
        }
    }
    let mut disk = gpt(512);
    disk.gpt(&[(LINUX, 40..60), (LINUX, 59..70)]);
    refused(&disk, "overlap: partition 1 and partition 2");
    // Sums that overflow.
    let entries = gpt_entries(&[(LINUX, 1 << 63..(1 << 63) + 1)]);
    disk.put(1024, &entries);
    disk.gpt_header(1, 999, 2, &entries);
    disk.put(999 * 512, &[0; 92]);
    assert!(found(&disk).is_err());
}

/// Changes a field of a header, whose checksum stays right.
fn set(disk: &mut Disk, header: u64, at: u64, value: u64) {
    let start = header * disk.sector;
    disk.put(start + at, &value.to_le_bytes());
    disk.put(start + 16, &[0; 4]);
    let bytes = &disk.bytes[crate::units::usize_from(start)..][..92];
    let crc = crc32fast::hash(bytes);
    disk.put(start + 16, &crc.to_le_bytes());
}

#[test]
fn headers_that_cannot_be() {
    const LAST_USABLE: u64 = 48;
    let mut fresh = gpt(512);
    fresh.gpt(&[(LINUX, 40..100)]);
    fresh.put(999 * 512, &[0; 92]);
    let mut disk = fresh.clone();
    set(&mut disk, 1, LAST_USABLE, 99);
    assert_eq!(ranges(&disk), list(&[(1, 40..100)]));
    set(&mut disk, 1, LAST_USABLE, 98);
    refused(&disk, "partition 1 lies outside of what it may use");

    // Partitions where the table itself lies.
    for (first, partition) in [
        (1, 1..2),
        (2, 2..3),
        (2, 33..40),
        (34, 960..968),
        (34, 998..1000),
    ] {
        let mut disk = fresh.clone();
        disk.gpt(&[(LINUX, partition.clone())]);
        for header in [1, 999] {
            set(&mut disk, header, 40, first);
            set(&mut disk, header, LAST_USABLE, 999);
        }
        refused(&disk, "overlap: ");
        disk.put(512, &[0; 92]);
        assert!(
            found(&disk).is_err() || partition == (2..3) || partition == (33..40),
            "{partition:?}"
        );
    }

    // A backup from elsewhere.
    let mut disk = gpt(512);
    disk.put(512, &[0; 92]);
    assert_eq!(ranges(&disk), all());
    set(&mut disk, 999, 24, 998);
    refused(&disk, "neither copy is intact");
}

#[test]
fn more_entries_than_anybody_has() {
    let mut disk = Disk::new(8 << 20, 512);
    let mut entries = gpt_entries(&[(LINUX, 10_000..10_001)]);
    for (len, fits) in [(2 << 20, true), (3 << 20, false)] {
        entries.resize(len, 0);
        disk.mbr_entry(0, 0, 0xee, 1, 16383);
        disk.put(1024, &entries);
        disk.gpt_header(1, 16383, 2, &entries);
        assert_eq!(found(&disk).is_ok(), fits, "{:?}", found(&disk));
    }
}

#[test]
fn headers_of_all_kinds() {
    // Every field of the header, with a checksum that is right: nothing panics or asks for too much.
    let fresh = gpt(512);
    for at in (8..92).step_by(4) {
        for value in [0, 1, 127, 129, 0x0001_0001, u32::MAX / 2, u32::MAX] {
            let mut disk = fresh.clone();
            disk.put(512 + at, &value.to_le_bytes());
            disk.put(512 + 16, &[0; 4]);
            let crc = crc32fast::hash(&disk.bytes[512..604]);
            disk.put(512 + 16, &crc.to_le_bytes());
            let found = ranges(&disk);
            assert!(found.is_err() || found == all(), "{at} {value} {found:?}");
        }
    }
}

#[test]
fn garbage_neither_panics_nor_hangs() {
    for (seed, fresh) in [mbr(512), mbr(4096), gpt(512), gpt(4096)]
        .iter()
        .enumerate()
    {
        let mut random = random(crate::units::u64_from(seed) + 1);
        for _ in 0..1500 {
            let mut disk = fresh.clone();
            for _ in 0..=random(6) {
                let sector = [0, 1, 2, 100, 300, 500, 999][crate::units::usize_from(random(7))];
                let at = sector * disk.sector + random(if sector == 0 { 66 } else { 130 });
                let at = if sector == 0 || random(2) == 0 {
                    at + 446 - 64
                } else {
                    at
                };
                let byte = crate::units::low_u8(random(256));
                disk.put(at.min(disk.len() - 1), &[byte]);
            }
            if let Ok(Some(slots)) = found(&disk) {
                for (number, slot) in slots.iter().enumerate() {
                    assert!(slot.range.start < slot.range.end && slot.range.end <= disk.len());
                    let clear = |other: &Slot| {
                        other.range.end <= slot.range.start || slot.range.end <= other.range.start
                    };
                    assert!(slots[..number].iter().all(clear));
                }
            }
        }
    }
}
