//! Volumes built by hand, right and wrong.

mod image;

use std::ops::Range;

use proptest::prelude::*;

use super::boot::Kind;
use crate::guest::clusters::memory::Memory;
use crate::guest::view::View;
use image::{Image, KINDS, SECTOR};

/// That changing a filled volume makes it refused for `reason`.
fn refuses(kinds: &[Kind], reason: &str, change: impl Fn(&mut Image)) {
    for kind in kinds {
        let mut image = Image::filled(*kind);
        change(&mut image);
        let said = image.refused();
        assert!(said.contains(reason), "{kind:?}: {said}, not: {reason}");
    }
}

#[test]
fn what_no_chain_holds_is_free() {
    for kind in KINDS {
        let image = Image::filled(kind);
        assert_eq!(image.name(), Some(kind.name()));
        let volume = image.read().unwrap();
        let root = if kind == Kind::Fat32 { 2 } else { 4 };
        let used = |cluster| cluster == root || Image::USED.contains(&cluster);
        for cluster in 2..image.clusters + 2 {
            let at = u64::try_from(image.cluster(cluster)).unwrap();
            let is_free = volume.free.contains(&at);
            assert_eq!(is_free, !used(cluster), "{kind:?}: {cluster}");
        }
        let bytes = |range: &Range<u64>| range.end - range.start;
        assert_eq!(
            volume.free.iter().map(bytes).sum::<u64>(),
            volume.reported_free
        );
        let heap = u64::try_from(image.heap * SECTOR).unwrap();
        assert!(
            volume
                .free
                .iter()
                .all(|run| run.start >= heap && run.end <= volume.size)
        );
        assert_eq!(volume.size + 100, u64::try_from(image.bytes.len()).unwrap());
        assert_eq!(volume.rest, crate::guest::Rest::Unmarked, "{kind:?}");
    }
}

#[test]
fn an_odd_number_of_clusters_reaches_the_last() {
    for kind in KINDS {
        for cut in 0..4 {
            let mut image = Image::filled(kind);
            let total = u32::from_le_bytes(*image.bytes[0x20..].first_chunk().unwrap()) - cut;
            for sector in [0, 6 * SECTOR] {
                if sector == 0 || kind == Kind::Fat32 {
                    image.put(sector + 0x20, &total.to_le_bytes());
                }
            }
            let last = image.clusters + 1 - usize::try_from(cut).unwrap();
            let place = |image: &Image| u64::try_from(image.cluster(last)).unwrap();
            assert!(
                image.read().unwrap().free.contains(&place(&image)),
                "{kind:?}"
            );
            image.link(last, image.end());
            assert!(
                !image.read().unwrap().free.contains(&place(&image)),
                "{kind:?}"
            );
        }
    }
}

#[test]
fn other_boot_sectors_are_not_taken_for_it() {
    let filled = Image::filled(Kind::Fat16);
    let change = |at: usize, bytes: &[u8]| {
        let mut image = filled.clone();
        image.put(at, bytes);
        image.name()
    };
    assert_eq!(change(0, &[0xe9, 1, 2]), Some("FAT16"));
    let wrong: &[(usize, &[u8])] = &[
        (0, &[0xeb, 0x3c, 0]),
        (0, &[0xfa, 0x33, 0xc0]),
        (3, b"NTFS    "),
        (3, b"EXFAT   "),
        (3, b"-FVE-FS-"),
        (0x0b, &[0, 1]),
        (0x0b, &[0, 3]),
        (0x0b, &[0, 0x20]),
        (0x0d, &[0]),
        (0x0d, &[3]),
        (0x0e, &[0]),
        (0x10, &[0]),
        (0x10, &[5]),
        (0x11, &[0, 0]),
        (0x11, &[33]),
        (0x13, &[9]),
        (0x15, &[0xf1]),
        (0x16, &[0]),
        (0x20, &[0, 0, 0, 0]),
        (0x20, &[20, 0]),
        (0x20, &[0, 0, 0, 1]),
        (0x1fe, &[0, 0]),
    ];
    for (at, bytes) in wrong {
        assert_eq!(change(*at, bytes), None, "{at:#x}: {bytes:x?}");
    }
    for len in [0, 1, 511] {
        let memory = Memory(&filled.bytes[..len]);
        assert_eq!(super::is_here(&View::whole(&memory)).unwrap(), None);
    }
}

#[test]
fn a_partition_table_is_not_taken_for_it() {
    let with = |entry: [u8; 16]| {
        let mut image = Image::filled(Kind::Fat16);
        image.put(446, &entry);
        image.name()
    };
    assert_eq!(
        with([0, 1, 2, 3, 6, 1, 2, 3, 63, 0, 0, 0, 9, 9, 0, 0]),
        None
    );
    assert_eq!(
        with([0x80, 1, 2, 3, 6, 1, 2, 3, 0, 1, 0, 0, 0, 1, 0, 0]),
        None
    );
    // Messages of boot code; what `mkfs.vfat --mbr` writes; no kind.
    assert!(with(*b"Press any key...").is_some());
    assert!(with([0x80, 1, 2, 3, 6, 1, 2, 3, 0, 0, 0, 0, 9, 9, 0, 0]).is_some());
    assert!(with([0, 1, 2, 3, 0, 1, 2, 3, 63, 0, 0, 0, 9, 9, 0, 0]).is_some());
}

#[test]
fn each_mark_of_an_unclean_one_counts() {
    let unclean = "not unmounted cleanly";
    for state in [1, 2, 3] {
        let old = [Kind::Fat12, Kind::Fat16];
        refuses(&old, unclean, |image| image.put(0x25, &[state]));
        refuses(&[Kind::Fat32], unclean, |image| image.put(0x41, &[state]));
    }
    for mark in [0x7fff, 0xbfff] {
        refuses(&[Kind::Fat16], unclean, |image| image.link(1, mark));
    }
    for mark in [0x07ff_ffff, 0x0bff_ffff] {
        refuses(&[Kind::Fat32], unclean, |image| image.link(1, mark));
    }
}

#[test]
fn boot_sectors_that_contradict_are_refused() {
    refuses(&KINDS, "spans", |image| {
        image.bytes.truncate(image.bytes.len() - 101);
    });
    refuses(&[Kind::Fat16], "another kind", |image| {
        image.put(0x36, b"FAT12   ")
    });
    refuses(&[Kind::Fat12], "another kind", |image| {
        image.put(0x36, b"FAT16   ")
    });
    refuses(&[Kind::Fat32], "another kind", |image| {
        image.put(0x52, b"FAT16   ")
    });
    refuses(&[Kind::Fat32], "version 1", |image| image.put(0x2a, &[1]));
    refuses(&[Kind::Fat32], "its backup", |image| {
        image.put(6 * SECTOR + 0x0e, &[9])
    });
    refuses(&[Kind::Fat32], "its backup", |image| {
        image.put(6 * SECTOR + 0x2c, &[9])
    });
    refuses(&[Kind::Fat32], "BitLocker", |image| {
        image.put(424, &super::boot::BITLOCKER[1]);
    });
    // No backup is no contradiction, nor is what changes.
    for (at, bytes) in [
        (6 * SECTOR + 0x1fe, [0]),
        (0x32, [0]),
        (0x32, [9]),
        (0x47, [7]),
    ] {
        let mut image = Image::filled(Kind::Fat32);
        image.put(at, &bytes);
        assert!(image.read().is_ok(), "{at}");
    }
    // A table of one sector has entries for 126 clusters; ten sectors lie before them.
    let with = |sectors: u8| {
        let mut image = Image::filled(Kind::Fat32);
        image.bytes.resize(SECTOR * 200, 0);
        image.put(0x20, &[sectors]);
        image.put(6 * SECTOR + 0x20, &[sectors]);
        image.read()
    };
    assert!(with(10 + 126).is_ok());
    assert!(with(10 + 127).unwrap_err().contains("too short"));
}

#[test]
fn tables_that_differ_are_refused() {
    for table in [0, 1] {
        refuses(&KINDS, "differ", |image| {
            image.link_in(image.tables[table], image.clusters + 1, 0xfff);
        });
    }
    refuses(&KINDS, "begins with", |image| {
        image.link(0, image.end() & !0xff | 0xf0);
    });
    // By FAT32's flags only one of them counts.
    let with = |flags: u8, table: usize| {
        let mut image = Image::filled(Kind::Fat32);
        image.put(0x28, &[flags]);
        image.link_in(image.tables[table], 60, 0xfff_ffff);
        image.read()
    };
    assert!(with(0x80, 1).unwrap().reported_free > 0);
    let more = with(0x80, 1).unwrap().reported_free;
    assert_eq!(more - with(0x80, 0).unwrap().reported_free, 512);
    assert!(with(0x00, 1).unwrap_err().contains("differ"));
    assert!(with(0x81, 1).unwrap_err().contains("differ"));
    assert!(with(0x82, 1).unwrap_err().contains("uses copy 2"));
    let mut same = Image::filled(Kind::Fat32);
    same.put(0x28, &[0x81]);
    assert!(same.read().is_ok());
}

#[test]
fn chains_that_contradict_are_refused() {
    // A file, a folder, the middle of a file, and a chain's last.
    for cluster in [4, 5, 9, 10, 11, 12, 13] {
        refuses(&KINDS, "marked as free", |image| image.link(cluster, 0));
    }
    refuses(&KINDS, "in two files", |image| image.link(9, 4));
    refuses(&KINDS, "in two files", |image| image.link(5, 5));
    refuses(&KINDS, "in two files", |image| image.link(11, 12));
    refuses(&KINDS, "breaks off at 5", |image| {
        image.link(5, image.end() - 8)
    });
    refuses(&KINDS, "clusters for fewer", |image| {
        image.link(5, image.end())
    });
    refuses(&KINDS, "means nothing", |image| image.link(60, 1));
    refuses(&KINDS, "means nothing", |image| {
        image.link(5, image.end() - 9)
    });
    for kind in KINDS {
        let mut image = Image::filled(kind);
        let beyond = u32::try_from(image.clusters + 2).unwrap();
        image.link(60, beyond);
        assert!(image.refused().contains("means nothing"));
        image.link(60, beyond - 1);
        // A lost chain, wherever it leads, harms nobody.
        assert!(image.read().is_ok());
    }
}

#[test]
fn folders_that_contradict_are_refused() {
    let root = |image: &Image| image.root * SECTOR;
    let first = |cluster: u32| {
        move |image: &mut Image| image.entry(root(image), 2, b"A       TXT", 0x20, cluster, 1100)
    };
    refuses(&KINDS, "does not have", first(1));
    refuses(&KINDS, "does not have", first(0));
    refuses(&KINDS, "does not have", first(0xfff0));
    refuses(&KINDS, "marked as free", first(14));
    refuses(&KINDS, "in two files", |image| {
        image.entry(root(image), 2, b"A       TXT", 0x20, 11, 512);
    });
    refuses(&[Kind::Fat32], "does not have", first(0x1_0004));
    for kind in [Kind::Fat12, Kind::Fat16] {
        let mut image = Image::filled(kind);
        first(0x1_0004)(&mut image);
        assert!(image.read().is_ok(), "the high half is something else");
    }
    refuses(&KINDS, "clusters for fewer", |image| {
        image.entry(root(image), 2, b"A       TXT", 0x20, 4, 1537);
    });
    let begins = "does not begin as one";
    refuses(&KINDS, begins, |image| image.folder(12, 0));
    refuses(&KINDS, begins, |image| image.put(image.cluster(12), b"X"));
    refuses(&KINDS, begins, |image| {
        image.put(image.cluster(12) + 26, &[11])
    });
    refuses(&KINDS, begins, |image| {
        image.put(image.cluster(10) + 32 + 26, &[9])
    });
    refuses(&KINDS, begins, |image| {
        image.put(image.cluster(10) + 11, &[0x20])
    });
    refuses(&KINDS, "in two files", |image| {
        image.entry(image.cluster(12), 3, b"UP         ", 0x10, 10, 0);
    });
    // FAT32's root may go by its number.
    let mut image = Image::filled(Kind::Fat32);
    image.folder(10, 2);
    assert!(image.read().is_ok());
}

#[test]
fn folders_are_read_to_their_end() {
    let with = |clusters: usize, first: u32| {
        let mut image = Image::filled(Kind::Fat16);
        let last = 99 + clusters;
        for cluster in 100..=last {
            let next = u32::try_from(cluster + 1).unwrap();
            image.link(cluster, if cluster == last { image.end() } else { next });
            image.put(image.cluster(cluster), &[0xe5; SECTOR]);
        }
        let root = image.root * SECTOR;
        image.entry(root, 6, b"LONG       ", 0x10, 100, 0);
        image.entry(root, 7, &[0; 11], 0, 0, 0);
        image.folder(100, 0);
        image.entry(image.cluster(last), 15, b"LAST       ", 0x20, first, 1);
        image.read()
    };
    // It is read in several pieces.
    assert!(with(300, 30).is_ok());
    assert!(with(300, 40).unwrap_err().contains("marked as free"));
    assert!(with(4096, 30).is_ok());
    assert!(
        with(4097, 30)
            .unwrap_err()
            .contains("more than one can have")
    );
}

#[test]
fn a_windows_that_sleeps_is_left_alone() {
    for (header, len, sleeps) in [
        (b"hibr", 4096, true),
        (b"HIBR", 4096, true),
        (b"wake", 4096, false),
        (b"\0\0\0\0", 4096, false),
        (b"wake", 4095, true),
    ] {
        for kind in KINDS {
            let mut image = Image::filled(kind);
            for cluster in 50..58 {
                let next = u32::try_from(cluster + 1).unwrap();
                image.link(cluster, if cluster == 57 { image.end() } else { next });
            }
            image.entry(image.root * SECTOR, 6, b"HIBERFILSYS", 0x26, 50, len);
            image.entry(image.root * SECTOR, 7, &[0; 11], 0, 0, 0);
            image.put(image.cluster(50), header);
            match image.read() {
                Ok(_) => assert!(!sleeps, "{header:?}"),
                Err(reason) => assert!(sleeps && reason.ends_with("(true)"), "{reason}"),
            }
        }
    }
}

proptest! {
    /// Whatever stands where, nothing panics, and it comes to an end.
    #[test]
    fn damage_never_panics(
        kind in 0_usize..3,
        places in prop::collection::vec((0_usize..20_000, any::<u8>()), 1..8),
    ) {
        let mut image = Image::filled(KINDS[kind]);
        for (at, byte) in places {
            let at = at % image.bytes.len();
            image.bytes[at] = byte;
        }
        let _ = image.read();
    }
}

#[test]
fn one_wrong_byte_frees_nothing_that_is_in_use() {
    // What says where everything is and how large has no check in FAT12 and FAT16: were it wrong,
    // their own system would read and write other places just as we do.
    let unchecked = [
        0x0d, 0x0e, 0x10, 0x11, 0x12, 0x13, 0x14, 0x16, 0x17, 0x20, 0x21, 0x22, 0x23,
    ];
    for kind in KINDS {
        let mut image = Image::filled(kind);
        let places = (0..image.tables[0] * SECTOR)
            .chain(image.tables[0] * SECTOR..image.tables[0] * SECTOR + 100)
            .chain(image.tables[1] * SECTOR..image.tables[1] * SECTOR + 100)
            .chain(image.root * SECTOR..image.root * SECTOR + 300)
            .chain(image.cluster(10)..image.cluster(10) + 200)
            .chain(image.cluster(12)..image.cluster(12) + 200);
        let places: Vec<_> = places.collect();
        let checked = |at: &usize| kind == Kind::Fat32 || !unchecked.contains(at);
        for at in places.into_iter().filter(checked) {
            for flip in [0x01, 0x10, 0x80, 0xff] {
                image.bytes[at] ^= flip;
                let result = image.read();
                image.bytes[at] ^= flip;
                let Ok(volume) = result else { continue };
                for cluster in Image::USED {
                    let place = u64::try_from(image.cluster(cluster)).unwrap();
                    assert!(!volume.free.contains(&place), "{kind:?} {at:#x}: {cluster}");
                }
            }
        }
    }
}
