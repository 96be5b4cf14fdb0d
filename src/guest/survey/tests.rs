use std::ops::Range;

use rangemap::RangeSet;

use super::{Reader, survey_with};
use crate::guest::lvm;
use crate::guest::testing::{Disk, random};
use crate::guest::view::View;
use crate::guest::{Outcome, Rest, Survey, SurveyOptions, Trouble, Volume};
use crate::units::{low_u8, u64_from, usize_from};

const MIB: u64 = 1 << 20;
const LINUX: [u8; 16] = [3; 16];

/// A filesystem whose first bytes are its name, then its size and what is free, in MiB.
const FAKE: Reader = Reader {
    is_here: |view| starts(view, b"FAKE").map(|here| here.then_some("fake")),
    read: |view| {
        let bytes = view.read(4, 4)?;
        match bytes[0] {
            0 => return Err(Trouble::skip("was not unmounted cleanly")),
            1 => return Err(Trouble::hibernated("belongs to a guest that sleeps")),
            _ => {}
        }
        let range = u64::from(bytes[1]) * MIB..u64::from(bytes[2].max(bytes[1])) * MIB;
        if range.is_empty() {
            return Err(Trouble::skip("is full"));
        }
        Ok(Volume {
            rest: Rest::Unmounted,
            size: u64::from(bytes[0]) * MIB,
            reported_free: range.end - range.start,
            free: RangeSet::from_iter([range]),
        })
    },
};

/// Another, which is always all in use.
const OTHER: Reader = Reader {
    is_here: |view| {
        let here = view.len() > 2048 && view.read(2000, 5)? == b"OTHER";
        Ok(here.then_some("other"))
    },
    read: |_| Err(Trouble::skip("is full")),
};

fn starts(view: &View<'_>, name: &[u8]) -> Result<bool, Trouble> {
    Ok(view.len() > 16 && view.read(0, u64_from(name.len()))? == name)
}

fn surveyed(disk: &Disk) -> Survey {
    survey_with(disk, &SurveyOptions::default(), &[FAKE, OTHER]).unwrap()
}

/// Each part's name, content, and either its free bytes in MiB or why it is in use.
fn lines(survey: &Survey) -> Vec<String> {
    (survey.parts.iter())
        .map(|part| {
            let content = part.content.unwrap_or("-");
            match &part.outcome {
                Outcome::Read { free, .. } => format!("{} {content}: {}", part.name, free / MIB),
                Outcome::Skipped { reason } => format!("{} {content} {reason}", part.name),
            }
        })
        .collect()
}

fn free(survey: &Survey) -> Vec<Range<u64>> {
    (survey.free.iter())
        .map(|range| range.start / MIB..range.end / MIB)
        .collect()
}

/// Three partitions, of 4, 8 and 3 MiB, from 1 MiB on.
fn disk() -> Disk {
    let mut disk = Disk::new(17 * MIB, 512);
    let sectors = |range: Range<u64>| range.start * 2048..range.end * 2048;
    disk.gpt(&[
        (LINUX, sectors(1..5)),
        (LINUX, sectors(5..13)),
        (LINUX, sectors(13..16)),
    ]);
    disk.put(MIB, b"FAKE\x04\x01\x03");
    disk.put(5 * MIB, b"FAKE\x07\x02\x06");
    disk.put(13 * MIB, b"FAKE\x03\x01\x03");
    disk
}

fn swap(disk: &mut Disk, at: u64, mark: &[u8]) {
    disk.put(at, &[0; 16]);
    disk.put(at + 4086, mark);
    disk.put(at + 1024, &[1, 0, 0, 0, 255, 0, 0, 0]);
}

#[test]
fn every_part_has_its_line() {
    let survey = surveyed(&disk());
    let expected = [
        "partition 1 fake: 2",
        "partition 2 fake: 4",
        "partition 3 fake: 2",
    ];
    assert_eq!(lines(&survey), expected);
    assert_eq!(free(&survey), [2..4, 7..11, 14..16]);
    let second = &survey.parts[1];
    assert_eq!((second.start, second.size), (5 * MIB, 8 * MIB));
    assert!(survey.evidence.still_holds(&disk()).unwrap());
    for at in [450, 512, 1024 + 32, MIB, 5 * MIB + 4, 13 * MIB + 2000] {
        let mut changed = disk();
        changed.put(at, &[0xff]);
        assert!(!survey.evidence.still_holds(&changed).unwrap(), "{at}");
    }
}

#[test]
fn a_disk_without_partitions() {
    let mut disk = Disk::new(8 * MIB, 4096);
    disk.put(0, b"FAKE\x08\x01\x08");
    let survey = surveyed(&disk);
    assert_eq!(lines(&survey), ["the disk fake: 7"]);
    assert_eq!(free(&survey), vec![1..8]);
    for len in [0, 1, 511, 512, 5000, MIB] {
        let survey = surveyed(&Disk::new(len, 512));
        assert_eq!(
            lines(&survey),
            ["the disk - holds nothing that is known here"]
        );
    }
}

#[test]
fn what_is_not_read_is_in_use() {
    let mut disk = disk();
    disk.put(MIB + 4, &[0]);
    disk.put(5 * MIB, b"\0\0\0\0");
    let survey = surveyed(&disk);
    let expected = [
        "partition 1 fake was not unmounted cleanly",
        "partition 2 - holds nothing that is known here",
        "partition 3 fake: 2",
    ];
    assert_eq!(lines(&survey), expected);
    assert_eq!(free(&survey), vec![14..16]);
}

#[test]
fn what_exceeds_its_part_is_in_use() {
    let mut disk = disk();
    disk.put(MIB + 4, &[5]);
    disk.put(5 * MIB + 4, &[5]);
    let survey = surveyed(&disk);
    assert_eq!(free(&survey), vec![14..16]);
    assert_eq!(
        lines(&survey)[0],
        "partition 1 fake claims 5242880 bytes, but has 4194304"
    );
    let why = "partition 2 fake claims 6291456 bytes, but has 8388608";
    assert_eq!(lines(&survey)[1], why, "free beyond what it says it spans");
}

#[test]
fn what_is_in_use_by_its_type() {
    let mut disk = Disk::new(8 * MIB, 512);
    disk.mbr_entry(0, 0, 0xfd, 2048, 8192);
    disk.mbr_entry(0, 1, 0xfd, 10240, 2048);
    disk.put(MIB, b"FAKE\x04\x01\x03");
    let volume = lvm::tests::volume(&lvm::tests::description(&[]));
    disk.put(5 * MIB, &volume.bytes);
    let survey = surveyed(&disk);
    assert!(survey.free.is_empty());
    let why = "is marked as a member of a RAID array";
    assert_eq!(
        lines(&survey),
        [
            format!("partition 1 fake {why}"),
            format!("partition 2 LVM2 {why}")
        ]
    );
    disk.mbr_entry(0, 0, 0x83, 2048, 8192);
    disk.mbr_entry(0, 1, 0x8e, 10240, 2048);
    let survey = surveyed(&disk);
    let known = "holds nothing that is known here";
    assert_eq!(
        lines(&survey),
        [
            "partition 1 fake: 2",
            &format!("volume vg0/home - {known}"),
            &format!("volume vg0/root - {known}"),
            "unused space of vg0 LVM2: 0",
        ]
    );
    // Volumes count from the start of their partition, also those in pieces.
    let root = &survey.parts[2];
    let extent = |number: u64| 5 * MIB + (64 << 10) + number * 4096;
    assert_eq!(
        root.ranges,
        [extent(30)..extent(50), extent(10)..extent(15)]
    );
    assert!(survey.free.contains(&extent(0)) && !survey.free.contains(&extent(10)));
    // One in another one.
    disk.put(extent(100), &volume.bytes[..2048]);
    let why = "volume vg0/home LVM2 belongs to a storage pool";
    assert_eq!(lines(&surveyed(&disk))[1], why);
}

#[test]
fn a_guest_that_sleeps() {
    let mut asleep = disk();
    asleep.put(5 * MIB + 4, &[1]);
    let survey = surveyed(&asleep);
    assert!(survey.free.is_empty());
    let why = "counts as in use, because partition 2 belongs to a guest that sleeps";
    assert_eq!(lines(&survey)[0], format!("partition 1 fake {why}"));
    assert_eq!(
        lines(&survey)[1],
        "partition 2 fake belongs to a guest that sleeps"
    );

    let mut asleep = disk();
    swap(&mut asleep, 13 * MIB, b"S1SUSPEND\0");
    assert!(surveyed(&asleep).free.is_empty());
    // Even where it cannot be said what the part holds.
    asleep.put(13 * MIB + 2000, b"OTHER");
    let survey = surveyed(&asleep);
    assert!(survey.free.is_empty());
    assert!(lines(&survey)[2].contains("the marks of other and of Linux swap"));
    let mut asleep = disk();
    asleep.put(13 * MIB + 4, &[1]);
    asleep.put(13 * MIB, b"FAKE\x01\x01\x03");
    asleep.put(13 * MIB + 2000, b"OTHER");
    assert!(surveyed(&asleep).free.is_empty());
    // Nor where its type says that it is not to be read.
    let mut asleep = Disk::new(8 * MIB, 512);
    asleep.mbr_entry(0, 0, 0xfd, 2048, 2048);
    asleep.mbr_entry(0, 1, 0x83, 4096, 8192);
    asleep.put(2 * MIB, b"FAKE\x04\x01\x03");
    assert_eq!(free(&surveyed(&asleep)), vec![3..5]);
    swap(&mut asleep, MIB, b"LINHIB0001");
    let survey = surveyed(&asleep);
    assert!(survey.free.is_empty());
    assert!(lines(&survey)[0].contains("is marked as a member of a RAID array"));
}

#[test]
fn swap_space_if_asked_for() {
    let mut disk = disk();
    swap(&mut disk, 13 * MIB, b"SWAPSPACE2");
    let survey = surveyed(&disk);
    let kept =
        "partition 3 Linux swap is swap space, which counts as in use unless it is asked for";
    assert_eq!(lines(&survey)[2], kept);
    assert_eq!(free(&survey), [2..4, 7..11]);
    let survey = survey_with(&disk, &SurveyOptions { swap: true }, &[FAKE, OTHER]).unwrap();
    assert!(survey.free.contains(&(13 * MIB + 4096)) && !survey.free.contains(&(13 * MIB + 4095)));
    assert_eq!(survey.free.last(), Some(&(13 * MIB + 4096..14 * MIB)));
}

#[test]
fn two_marks_are_one_too_many() {
    let mut disk = disk();
    disk.put(MIB + 2000, b"OTHER");
    disk.put(13 * MIB - 8192, &[0xfc, 0x4e, 0x2b, 0xa9]);
    disk.put(13 * MIB + 446 + 4, &[0x83, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0]);
    disk.put(13 * MIB + 510, &[0x55, 0xaa]);
    let survey = surveyed(&disk);
    let expected = [
        "partition 1 - holds the marks of fake and of other: which of them counts is not known",
        "partition 2 - holds the marks of fake and of Linux RAID: which of them counts is not known",
        "partition 3 - holds the marks of fake and of a partition table: which of them counts is not \
         known",
    ];
    assert_eq!(lines(&survey), expected);
    assert!(survey.free.is_empty());
}

#[test]
fn marks_outside_of_partitions() {
    // A whole disk in an array whose superblock is at the end, behind the last partition.
    for (at, mark) in [
        (17 * MIB - 8192, &[0xfc, 0x4e, 0x2b, 0xa9][..]),
        (17 * MIB - 1024, b"Intel Raid ISM Cfg Sig. "),
        (2000, b"OTHER"),
        (
            4096 + 24,
            b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        ),
    ] {
        let mut disk = disk();
        // Not among the entries, whose checksum it would break.
        disk.put(17 * MIB - 33 * 512, &[0; 32 * 512]);
        if at == 2000 || at == 4096 + 24 {
            disk.put(0, &[0; 34 * 512]);
            disk.put(17 * MIB - 512, &[0; 512]);
            disk.mbr_entry(0, 0, 0x83, 2048, 8192);
        }
        disk.put(at, mark);
        let survey = surveyed(&disk);
        assert!(survey.free.is_empty());
        let line = &lines(&survey)[0];
        assert!(line.starts_with("the disk - holds the marks of "), "{line}");
        assert!(line.contains("and of a partition table"), "{line}");
    }
    // Two that cannot be read anyway.
    let mut disk = Disk::new(8 * MIB, 512);
    disk.put(32 << 10, b"\x01CD001");
    disk.put(34 << 10, b"\0BEA01");
    let both = "the disk ISO 9660 holds a filesystem that cannot be read here";
    assert_eq!(lines(&surveyed(&disk)), [both]);
    disk.put(512, b"LABELONE");
    assert!(lines(&surveyed(&disk))[0].contains("the marks of "));
    // In a partition, it is the partition's.
    let mut disk = Disk::new(8 * MIB, 512);
    disk.mbr_entry(0, 0, 0x83, 2048, 4096);
    disk.mbr_entry(0, 1, 0x83, 6144, 10240);
    disk.put(MIB, b"FAKE\x02\x01\x02");
    disk.put(8 * MIB - 8192, &[0xfc, 0x4e, 0x2b, 0xa9]);
    let survey = surveyed(&disk);
    let second = "partition 2 Linux RAID is a member of an array of disks";
    assert_eq!(lines(&survey), ["partition 1 fake: 1", second]);
}

#[test]
fn known_by_their_marks() {
    let end = 8 * MIB;
    let cases: &[(&str, u64, &[u8])] = &[
        ("LUKS", 0, b"LUKS\xba\xbe"),
        ("BitLocker", 3, b"-FVE-FS-"),
        ("Linux RAID", 0, b"\xfc\x4e\x2b\xa9"),
        ("Linux RAID", 4096, b"\xfc\x4e\x2b\xa9"),
        ("Linux RAID", end - 8192, b"\xfc\x4e\x2b\xa9"),
        ("Linux RAID", end - 65536, b"\xfc\x4e\x2b\xa9"),
        ("Linux RAID", end - 65536, b"\xa9\x2b\x4e\xfc"),
        ("DDF RAID", end - 512, b"\xde\x11\xde\x11"),
        ("DRBD", end - 4096 + 60, b"\x83\x74\x02\x6d"),
        ("ZFS", 16384, b"\x01\x01\0\0\0\0\0\0\0\0\0\x01"),
        ("ZFS", (256 + 16) << 10, b"\x01\x01\0\0\0\0\0\0\0\0\0\x01"),
        (
            "ZFS",
            end - (512 << 10) + 16384,
            b"\x01\x01\0\0\0\0\0\0\0\0\0\x01",
        ),
        (
            "ZFS",
            end - (256 << 10) + 16384,
            b"\x01\x01\0\0\0\0\0\0\0\0\0\x01",
        ),
        ("ReFS", 3, b"ReFS\0\0\0\0"),
        ("APFS", 32, b"NXSB"),
        ("VMFS", 2 * MIB, b"\x5e\xf1\xab\x2f"),
        ("ISO 9660", 32769, b"CD001"),
        ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
        ("HFS+", 1024, b"H+\0\x04"),
        ("LVM2", 512, b"LABELONE"),
    ];
    for (name, at, mark) in cases {
        // At the disk's end as at that of a length that no block divides.
        for ragged in [0, 512 * 3] {
            let mut disk = Disk::new(end + ragged, 512);
            disk.put(*at + if *name == "DDF RAID" { ragged } else { 0 }, mark);
            let survey = surveyed(&disk);
            assert_eq!(survey.parts[0].content, Some(*name));
            assert!(survey.free.is_empty());
            disk.put(0, b"FAKE\x08\x01\x07");
            if *at > 6 {
                let line = &lines(&surveyed(&disk))[0];
                assert!(
                    line.contains(&format!("the marks of fake and of {name}")),
                    "{line}"
                );
            }
        }
    }
}

#[test]
fn disks_as_a_whole_in_use() {
    let mut broken = disk();
    broken.put(512 + 30, &[1]);
    broken.put(17 * MIB - 512 + 30, &[1]);
    let survey = surveyed(&broken);
    assert_eq!(survey.parts.len(), 1);
    assert!(lines(&survey)[0].starts_with("the disk - has a GPT of which neither copy is intact"));
    assert_eq!((survey.parts[0].start, survey.parts[0].size), (0, 17 * MIB));
    assert!(survey.free.is_empty());
}

#[test]
fn errors_of_the_host_are_errors() {
    for bad in [0, 600, MIB, 13 * MIB + 3, 17 * MIB - 10] {
        let mut disk = disk();
        disk.bad = Some(bad);
        let survey = survey_with(&disk, &SurveyOptions::default(), &[FAKE, OTHER]);
        assert!(survey.is_err(), "{bad}");
    }
    let mut disk = disk();
    disk.bad = Some(3 * MIB + 100_000);
    assert_eq!(surveyed(&disk).parts.len(), 3, "nothing was read there");
}

#[test]
fn garbage_is_in_use_or_within_its_part() {
    let mut random = random(11);
    for _ in 0..400 {
        let mut disk = disk();
        for _ in 0..=random(8) {
            let base =
                [0, 512, 1024, MIB, 5 * MIB, 13 * MIB, 17 * MIB - 512][usize_from(random(7))];
            disk.put(base + random(128), &[low_u8(random(256))]);
        }
        let survey = surveyed(&disk);
        for range in survey.free.iter() {
            let inside = survey
                .parts
                .iter()
                .any(|part| range.start >= part.start && range.end <= part.start + part.size);
            assert!(inside, "{range:?} {:?}", survey.parts);
            assert!(range.start >= 2 * MIB && range.end <= 16 * MIB);
        }
    }
}
