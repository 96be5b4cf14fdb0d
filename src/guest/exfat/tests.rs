//! Volumes built by hand, right and wrong.

mod image;

use std::ops::Range;

use proptest::prelude::*;

use crate::guest::Volume;
use crate::guest::clusters::memory::Memory;
use crate::guest::view::View;
use image::{CLUSTER, COUNT, D, END, HEAP, Image, ROOT, SECTOR, TABLES, USED, raw};

/// That changing a filled volume makes it refused for `reason`.
fn refuses(reason: &str, change: impl Fn(&mut Image)) {
    let mut image = Image::filled();
    change(&mut image);
    let said = image.read().expect_err(reason);
    assert!(said.contains(reason), "{said}, not: {reason}");
}

fn is_free(volume: &Volume, cluster: u32) -> bool {
    let at = u64::try_from(Image::cluster(cluster)).unwrap();
    volume.free.contains(&at)
}

#[test]
fn what_the_bitmap_does_not_mark_is_free() {
    let volume = Image::filled().read().unwrap();
    for cluster in 2..COUNT + 2 {
        let used = USED.iter().any(|run| run.contains(&cluster));
        assert_eq!(is_free(&volume, cluster), !used, "{cluster}");
    }
    let sum: u64 = volume.free.iter().map(|run| run.end - run.start).sum();
    assert_eq!((sum, volume.reported_free), ((101 - 17) * 1024, sum));
    assert_eq!(volume.rest, crate::guest::Rest::Unmarked);
    let heap = u64::try_from(HEAP).unwrap();
    let within = |run: &Range<u64>| run.start >= heap && run.end + 512 <= volume.size;
    assert!(volume.free.iter().all(within));
}

#[test]
fn other_boot_sectors_are_not_taken_for_it() {
    let name = |bytes: &[u8]| {
        let memory = Memory(bytes);
        super::is_here(&View::whole(&memory)).unwrap()
    };
    let image = Image::filled();
    assert_eq!(name(&image.bytes), Some("exFAT"));
    assert_eq!(name(&image.bytes[..512]), Some("exFAT"));
    assert_eq!(name(&image.bytes[..511]), None);
    for at in [0, 3, 10, 510] {
        let mut other = image.clone();
        other.bytes[at] ^= 1;
        assert_eq!(name(&other.bytes), None, "{at}");
    }
}

#[test]
fn boot_regions_that_contradict_are_refused() {
    refuses("boot region with a wrong checksum", |image| {
        image.bytes[20] = 1
    });
    refuses("boot region with a wrong checksum", |image| {
        image.bytes[700] = 1
    });
    refuses("boot region with a wrong checksum", |image| {
        image.bytes[12 * SECTOR - 1] ^= 1
    });
    refuses("backup boot region with", |image| {
        image.bytes[13 * SECTOR] = 1
    });
    refuses("differs from its backup", |image| {
        let backup = image.bytes[12 * SECTOR..24 * SECTOR].to_vec();
        image.put(100, &[7]);
        image.seal();
        image.put(12 * SECTOR, &backup);
    });
    // Flags of the backup are not kept, nor the percentage.
    let mut image = Image::filled();
    image.put(12 * SECTOR + 106, &[2, 0]);
    image.put(112, &[77]);
    assert!(image.read().is_ok());
    let sealed = |reason: &str, at: usize, bytes: &[u8]| {
        refuses(reason, |image| {
            image.put(at, bytes);
            image.seal();
        });
    };
    for (at, bytes) in [
        (11, &[1][..]),
        (80, &[23]),
        (84, &[3]),
        (84, &[0]),
        (88, &[24]),
        (92, &[0]),
        (92, &[0, 1]),
        (92, &[102]),
        (96, &[1]),
        (96, &[103]),
        (108, &[8]),
        (108, &[13]),
        (109, &[17]),
        (109, &[255]),
        (110, &[0]),
        (110, &[3]),
    ] {
        sealed("makes no sense", at, bytes);
    }
    sealed("makes no sense", 106, &[1]);
    // A table of one sector has entries for 126 clusters.
    for (clusters, reason) in [(126, "bitmap"), (127, "makes no sense")] {
        refuses(reason, |image| {
            image.bytes.resize(200 * CLUSTER, 0);
            image.put(72, &[0x20, 1]);
            image.put(92, &[clusters]);
            image.seal();
        });
    }
    sealed("revision", 105, &[2]);
    sealed("clusters", 92, &[1, 0, 0, 0x20]);
    sealed("spans", 72, &[0, 1]);
}

#[test]
fn marks_of_an_unclean_one_count() {
    refuses("not unmounted cleanly", |image| image.put(106, &[2]));
    refuses("bad place", |image| image.put(106, &[4]));
    refuses("unknown flags", |image| image.put(106, &[8]));
    refuses("unknown flags", |image| image.put(107, &[1]));
}

#[test]
fn what_is_in_use_and_not_marked_is_refused() {
    for cluster in USED[..6].iter().cloned().flatten() {
        refuses("marked as free", |image| image.mark(cluster, false));
    }
    let mut image = Image::filled();
    image.mark(50, false);
    assert!(is_free(&image.read().unwrap(), 50), "it was nobody's");
}

#[test]
fn chains_that_contradict_are_refused() {
    refuses("in two files", |image| image.link(10, 20));
    refuses("in two files", |image| image.link(12, 12));
    refuses("in two files", |image| image.link(11, 2));
    refuses("in two files", |image| image.link(8, 4));
    refuses("breaks off at 12", |image| image.link(12, 0));
    refuses("breaks off at 12", |image| image.link(12, 0xffff_fff7));
    refuses("breaks off at 12", |image| image.link(12, COUNT + 2));
    refuses("clusters for 2048", |image| image.link(12, END));
    refuses("clusters for 1024", |image| image.link(3, END));
    refuses("begin as one", |image| image.link(0, 0xffff_ff00));
    refuses("begin as one", |image| image.link(1, 0));
    refuses("in two files", |image| {
        let at = Image::cluster(ROOT[0]) + 224;
        image.file(at, 0x20, raw(0xc0, 3, 1, 10, 3000));
    });
}

#[test]
fn files_that_contradict_are_refused() {
    let stream = |reason: &str, kind: u8, entry: [u8; 32]| {
        refuses(reason, |image| {
            image.file(Image::cluster(ROOT[0]) + 320, kind, entry);
        });
    };
    stream("contradicts itself", 0x20, raw(0xc0, 1, 1025, 40, 1024));
    stream("contradicts itself", 0x20, raw(0xc0, 0, 0, 40, 1024));
    stream("marked as free", 0x20, raw(0xc0, 3, 0, 40, 1024));
    stream("clusters for 0", 0x20, raw(0xc0, 3, 0, 40, 0));
    stream("does not have", 0x20, raw(0xc0, 1, 0, 0, 1024));
    stream("does not have", 0x20, raw(0xc0, 3, 0, 101, 4000));
    stream("does not have", 0x20, raw(0xc0, 3, 0, 101, u64::MAX));
    stream("in two files", 0x20, raw(0xc0, 3, 0, 22, 1024));
    stream("not where it lies", 0x20, raw(0xc1, 1, 0, 0, 0));
    stream("folder of 1040 bytes", 0x10, raw(0xc0, 3, 1040, 20, 1040));
    stream("in two files", 0x10, raw(0xc0, 3, 1024, 30, 1024));
    let huge = (256 << 20) + 32;
    stream("folder of 268435488", 0x10, raw(0xc0, 3, huge, 20, huge));
    refuses("wrong checksum", |image| {
        image.bytes[Image::cluster(ROOT[0]) + 230] ^= 1;
    });
    refuses("cut off", |image| {
        image.bytes[Image::cluster(ROOT[0]) + 256] = 0x40;
    });
    refuses("cut off", |image| {
        image.put(Image::cluster(34) + CLUSTER - 32, &raw(0x85, 2, 0, 0, 0));
        for at in (0..CLUSTER - 32).step_by(32) {
            image.bytes[Image::cluster(34) + at] = 1;
        }
    });
    // What a vendor keeps beside a file counts.
    refuses("in two files", |image| {
        image.put(Image::cluster(D) + 1120 + 20, &[34]);
        image.seal_set(Image::cluster(D) + 1024);
    });
    refuses("unknown kind of entry", |image| {
        image.put(Image::cluster(D) + 1120, &[0xc2]);
        image.seal_set(Image::cluster(D) + 1024);
    });
}

#[test]
fn folders_are_read_to_their_end() {
    let with = |len: u64| {
        let mut image = Image::filled();
        image.put(Image::cluster(34), &[1; 512]);
        image.put(Image::cluster(34) + 512, &raw(0x84, 0, 0, 0, 0));
        let stream = raw(0xc0, 1, len, 34, len);
        image.file(Image::cluster(D) + 1152, 0x10, stream);
        image.read()
    };
    assert!(with(512).is_ok());
    assert!(with(544).unwrap_err().contains("unknown kind of entry"));
}

#[test]
fn roots_that_contradict_are_refused() {
    let root = Image::cluster(ROOT[0]);
    for (at, what) in [(64, "bitmap"), (96, "up-case")] {
        refuses(what, |image| image.bytes[root + at] = 1);
        refuses(what, |image| {
            image.bytes.copy_within(root + at..root + at + 32, root);
            image.put(root + 20, &[50, 0, 0, 0, 13, 0]);
            image.link(50, END);
        });
    }
    refuses("bitmap", |image| image.bytes[root + 65] = 1);
    refuses("bitmap", |image| image.bytes[root + 64 + 24] = 12);
    refuses("clusters for", |image| image.put(root + 64 + 24, &[1, 4]));
    for kind in [0x84, 0x86, 0xc0, 0x80, 0xe0] {
        refuses("unknown kind of entry", |image| image.bytes[root] = kind);
    }
    refuses("its root elsewhere", |image| {
        image.put(Image::cluster(34), &raw(0x83, 0, 0, 0, 0));
    });
    // Nobody knows what it is for, but whose its clusters are.
    let benign = |flags: u8, cluster: u32| {
        let mut image = Image::filled();
        let mut entry = raw(0xa5, 0, 0, cluster, 1000);
        entry[4] = flags;
        image.put(root, &entry);
        image.seal_set(root);
        image.read()
    };
    assert!(benign(0, 60).is_ok());
    assert!(benign(3, 50).is_ok());
    assert!(benign(3, 60).unwrap_err().contains("marked as free"));
    assert!(benign(1, 20).unwrap_err().contains("in two files"));
}

#[test]
fn of_two_bitmaps_both_must_say_free() {
    let image = Image::with_fats(2);
    let volume = image.read().unwrap();
    let all = volume.reported_free;
    assert!(is_free(&volume, 60));
    for (active, own) in [(0_u8, 5_u32), (1, 2)] {
        let mut image = image.clone();
        image.put(106, &[active]);
        // In the bitmap that is not in use, and in the table that is not in use.
        image.bytes[Image::cluster(own) + 7] |= 4;
        image.put(TABLES[1 - usize::from(active)] + 12 * 4, &[0; 4]);
        let volume = image.read().unwrap();
        assert!(!is_free(&volume, 60) && is_free(&volume, 61));
        assert_eq!(volume.reported_free, all);
        image.put(TABLES[usize::from(active)] + 12 * 4, &[0; 4]);
        assert!(image.read().is_err());
    }
}

proptest! {
    /// Whatever stands where, nothing panics, and it comes to an end.
    #[test]
    fn damage_never_panics(
        places in prop::collection::vec((0_usize..120_000, any::<u8>()), 1..8),
        seal: bool,
    ) {
        let mut image = Image::filled();
        for (at, byte) in places {
            // Most of it is clusters without structures.
            let at = if at % 3 == 0 { at % 120 } else { at % image.bytes.len() };
            image.bytes[at] = byte;
        }
        if seal {
            image.seal();
        }
        let _ = image.read();
    }
}

#[test]
fn one_wrong_byte_frees_nothing_that_is_in_use() {
    let mut image = Image::filled();
    let root = Image::cluster(ROOT[0]);
    let places = (0..24 * SECTOR)
        .step_by(7)
        .chain(0..120)
        .chain(TABLES[0]..HEAP)
        .chain(Image::cluster(2)..Image::cluster(2) + 16)
        .chain(root..root + 1500)
        .chain(Image::cluster(D) + 1000..Image::cluster(D) + 1300);
    for at in places {
        for flip in [0x01, 0x10, 0x80, 0xff] {
            image.bytes[at] ^= flip;
            let result = image.read();
            image.bytes[at] ^= flip;
            let Ok(volume) = result else { continue };
            // What no folder knows has only the bitmap.
            for cluster in USED[..6].iter().cloned().flatten() {
                assert!(!is_free(&volume, cluster), "{at:#x}: {cluster}");
            }
        }
    }
}
