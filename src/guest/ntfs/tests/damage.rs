//! Damage anywhere: nothing of it may free what files have, and nothing may panic or hang.

use proptest::prelude::*;

use super::build::{
    BITMAP, CLUSTER, CLUSTERS, Image, LIST, LOG, MFT_BITMAP, MIRROR, OWNED, RECORD, ROOT, put,
};
use super::{assert_refused, look, refused};
use crate::units::{u64_from, usize_from};

/// Records in use.
const RECORDS: [u64; 15] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 24, 25, 26, 28, 29];

#[test]
fn torn_records() {
    for number in RECORDS {
        for stride in [510, 511, 1022, 1023] {
            let mut image = Image::new();
            image.bytes[Image::place(number) + stride] ^= 0x10;
            assert_refused(&image, "damaged");
        }
        let mut image = Image::new();
        put(&mut image.bytes, Image::place(number), b"BAAD");
        assert_refused(&image, "damaged");
        let mut image = Image::new();
        put(
            &mut image.bytes,
            Image::place(number),
            &vec![0; usize_from(RECORD)],
        );
        assert_refused(&image, "damaged");
    }
}

#[test]
fn torn_records_of_nobody() {
    let mut image = Image::new();
    put(&mut image.bytes, Image::place(30), b"BAAD");
    assert_refused(&image, "record 30 was marked as torn");
    put(&mut image.bytes, Image::place(30), b"FILE");
    assert_refused(&image, "record 30 was written in part");
    put(&mut image.bytes, Image::place(30), b"DATA");
    assert!(look(&image).is_ok(), "never was a record");
}

#[test]
fn torn_node_of_the_root() {
    let mut image = Image::new();
    image.bytes[usize_from(ROOT * CLUSTER) + 1023] ^= 1;
    assert_refused(&image, "the root folder was written in part");
}

#[test]
fn records_and_their_bitmap() {
    for number in RECORDS {
        let mut image = Image::new();
        image.mark_record(number, false);
        assert_refused(&image, "is in use, but not marked so");
    }
    let mut image = Image::new();
    image.mark_record(30, true);
    assert_refused(&image, "record 30 is lost");
    for number in [32, 40, 63] {
        let mut image = Image::new();
        image.mark_record(number, true);
        assert_refused(&image, "$MFT is shorter than its bitmap says");
    }
    let mut image = Image::new();
    image.edit(29, |bytes| bytes[0x16] = 0);
    assert!(look(&image).is_ok(), "marked, not in use: it holds nothing");
    let mut image = Image::new();
    image.edit(29, |bytes| bytes[0x2c] = 28);
    assert_refused(&image, "the head of record 29");
}

#[test]
fn the_copy_of_the_table() {
    for number in 0..4 {
        let mut image = Image::new();
        let at = usize_from(MIRROR * CLUSTER + number * RECORD);
        image.bytes[at + 8] ^= 1;
        assert_refused(&image, "$MFTMirr is not what $MFT is");
    }
}

#[test]
fn metadata_that_lies() {
    let system = [0, 1, 2, 5, 6];
    // Sizes and places of metadata: the first and last cluster, all three sizes, the runs.
    let fields = [16, 24, 32, 40, 42, 48, 50, 56, 58, 64, 65, 67];
    for number in system {
        for field in fields {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = Image::new();
                let at = Image::place(number) + 0x38;
                // The attribute that is mapped to clusters, behind those that are not.
                let mut start = at;
                while image.bytes[start + 8] == 0 {
                    start += usize::from(image.bytes[start + 4]);
                }
                let before = image.bytes[start + field];
                image.edit(number, |bytes| {
                    bytes[start + field - Image::place(number)] = value
                });
                match look(&image) {
                    Ok(volume) => {
                        let harmless =
                            before == value || volume.free == look(&Image::new()).unwrap().free;
                        assert!(harmless, "record {number}, {field} = {value:#x}");
                    }
                    Err(_) => assert!(!refused(&image).0.is_empty()),
                }
            }
        }
    }
}

/// Places of all metadata, in bytes.
fn metadata() -> Vec<usize> {
    let used = 0x200;
    let records = RECORDS
        .into_iter()
        .map(|number| Image::place(number)..Image::place(number) + used);
    let others = [
        (0, 0x54),
        (MFT_BITMAP, 8),
        (BITMAP, 32),
        (LIST, 96),
        (ROOT, 0x140),
        (LOG.start, 64),
    ];
    let others = others.into_iter().chain([(MIRROR, usize_from(CLUSTER))]);
    let others =
        others.map(|(lcn, len)| usize_from(lcn * CLUSTER)..usize_from(lcn * CLUSTER) + len);
    records.chain(others).flatten().collect()
}

/// Damage is survived: what files have stays theirs.
fn assert_nothing_lost(image: &Image, what: &str) {
    let Ok(volume) = look(image) else { return };
    let size = u64_from(image.bytes.len());
    assert!(volume.free.iter().all(|run| run.end <= size), "{what}");
    for lcn in OWNED.into_iter().flatten() {
        let cluster = lcn * CLUSTER..(lcn + 1) * CLUSTER;
        assert!(
            !volume.free.overlaps(&cluster),
            "{what} frees cluster {lcn}"
        );
    }
    assert!(
        !volume.free.overlaps(&(CLUSTERS * CLUSTER..size)),
        "{what} frees the end"
    );
}

#[test]
fn every_byte_once() {
    let mut image = Image::new();
    for (index, at) in metadata().into_iter().enumerate() {
        let before = image.bytes[at];
        image.bytes[at] ^= 1 << (index % 8);
        assert_nothing_lost(&image, &format!("bit {} at {at:#x}", index % 8));
        image.bytes[at] = before;
    }
}

/// Changes a record the way only its writer can: below the fixups.
fn change(image: &mut Image, number: u64, changes: &[(usize, u8)]) {
    image.edit(number, |bytes| {
        for (at, value) in changes {
            bytes[at % usize_from(RECORD)] = *value;
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn wild_records(
        number in proptest::sample::select(&RECORDS[..]),
        changes in proptest::collection::vec((0x10..0x180_usize, any::<u8>()), 1..6),
    ) {
        let mut image = Image::new();
        change(&mut image, number, &changes);
        // It only must end: what a file that was changed says of itself cannot be known.
        let _ = look(&image);
    }

    #[test]
    fn wild_bytes(places in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8)) {
        let all = metadata();
        let mut image = Image::new();
        for (index, value) in &places {
            image.bytes[*index.get(&all)] = *value;
        }
        let _ = look(&image);
    }
}
