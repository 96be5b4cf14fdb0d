//! What is damaged in both of its copies, and what was cut off.

use super::*;
use crate::image::ImageOptions;
use crate::image::vhdx::headers::write_next;
use crate::image::vhdx::open::{open, probe};

/// Fills what is behind the fields of both headers, so that their checksums do not fit.
fn blur_headers(sim: &SimStorage) {
    for place in [HEADER_1, HEADER_2] {
        sim.write_all_at(&[0x6b; 4016], place.plus(80)).unwrap();
    }
}

/// The same behind the entries of both region tables.
fn blur_regions(sim: &SimStorage) {
    for place in [REGION_TABLE_1, REGION_TABLE_2] {
        sim.write_all_at(&[0x6b; 5000], place.plus(20_000)).unwrap();
    }
}

#[test]
fn two_damaged_headers_that_agree() {
    let sim = good();
    blur_headers(&sim);
    repairs(
        &sim,
        true,
        "no log is to be replayed",
        "both headers written anew",
    );
    // Their GUIDs may differ, and the later one counts.
    let sim = good();
    let mut current = read_header(&sim).unwrap();
    write_next(&sim, &mut current, &|header| {
        header.data_write_guid = Uuid::from_u128(9);
    })
    .unwrap();
    blur_headers(&sim);
    let found = read_header(&sim).unwrap().header;
    assert_eq!(found.data_write_guid, Uuid::from_u128(9));
    repairs(
        &sim,
        true,
        "no log is to be replayed",
        "both headers written anew",
    );
}

#[test]
fn two_damaged_region_tables_that_agree() {
    let sim = good();
    blur_regions(&sim);
    let text = "both have the same entries";
    repairs(&sim, true, text, "both region tables written anew");
    blur_regions(&sim);
    blur_headers(&sim);
    repairs(&sim, true, text, "both headers written anew");
}

#[test]
fn damage_that_leaves_nothing_to_rely_on() {
    type Change = fn(&SimStorage);
    let cases: [(Change, &str); 9] = [
        (
            |sim| change_headers(sim, &|header| header.log_guid = Uuid::from_u128(3)),
            "they name a log",
        ),
        (
            |sim| {
                let mut current = read_header(sim).unwrap();
                write_next(sim, &mut current, &|header| {
                    header.log_guid = Uuid::from_u128(3)
                })
                .unwrap();
            },
            "they name a log",
        ),
        (
            |sim| {
                let mut current = read_header(sim).unwrap();
                write_next(sim, &mut current, &|header| header.log_offset = 8 * MIB).unwrap();
            },
            "contradict each other",
        ),
        (
            |sim| sim.write_all_at(b"x", HEADER_2).unwrap(),
            "of a log is not known",
        ),
        (
            |sim| change_headers(sim, &|header| header.log_len = 5),
            "multiples of 1 MiB",
        ),
        // Of a file of which more is wrong nothing is believed.
        (
            |sim| set_entry(sim, 5, 6, DATA),
            "nothing is to be relied on",
        ),
        (
            |sim| set_entry(sim, 5, 6, DATA + 9 * BLOCK),
            "nothing is to be relied on",
        ),
        (|sim| set_entry(sim, 5, 4, 0), "nothing is to be relied on"),
        (
            |sim| {
                blur_regions(sim);
                sim.write_all_at(&[1], REGION_TABLE_2.plus(16 + 18))
                    .unwrap();
            },
            "region table",
        ),
    ];
    for (damage, text) in cases {
        let sim = good();
        damage(&sim);
        blur_headers(&sim);
        let before = sim.to_bytes();
        only_finds(&sim, text);
        assert!(sim.to_bytes() == before, "{text}: changed");
        let error = probe(&sim).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

/// What is cut off is not there: neither in a block that is only cut through, nor by the length that a
/// log has.
#[test]
fn what_was_cut_off_does_not_read_as_zeros() {
    let cut = good();
    cut.set_len(DATA + 2 * BLOCK - 4096).unwrap();
    let logged = good();
    leave_log(&logged, Vec::new(), DATA + 2 * BLOCK);
    logged.set_len(DATA + 2 * BLOCK - MIB).unwrap();
    for sim in [cut, logged] {
        let end = sim.len().unwrap();
        let options = ImageOptions {
            read_only: true,
            punch_holes: false,
        };
        let opened = open(Arc::new(sim.fork()), options, &|_| Ok(())).unwrap();
        let (map, storage) = (opened.image.map(), opened.image.storage());
        let slot = map.get(BlockIndex::new(2)).slot().unwrap();
        assert_eq!(slot, at(DATA + BLOCK));
        let mut buf = vec![0; usize_from(end - slot.get())];
        storage.read_exact_at(&mut buf, slot).unwrap();
        assert!(storage.read_exact_at(&mut buf, slot.plus(1)).is_err());
        assert!(probe(&sim).unwrap().not_writable.is_some());
    }
}
