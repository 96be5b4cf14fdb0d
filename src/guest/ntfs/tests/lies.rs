//! Metadata whose sizes and places do not agree.

use super::build::{
    CLUSTER, Image, LIST, LOG, MFT_BITMAP, MIRROR, RECORD, SPLIT, entry, index_entries, mapped,
    put, reference, resident, restart,
};
use super::{assert_read, assert_refused, refused};
use crate::units::usize_from;

/// Where the first attribute of a record lies, and of one that is mapped to clusters its sizes.
const FIRST: usize = 0x38;
const ALLOCATED: usize = FIRST + 40;
const SIZE: usize = FIRST + 48;
const INITIALIZED: usize = FIRST + 56;

/// A place in a record, and what to write there.
type Change = (usize, &'static [u8]);

/// Changes bytes of a record.
fn edited(number: u64, changes: &[Change]) -> Image {
    let mut image = Image::new();
    image.edit(number, |bytes| {
        (changes.iter()).for_each(|(at, value)| put(bytes, *at, value));
    });
    image
}

#[test]
fn sizes_of_metadata() {
    let bitmap = 6;
    let cases: [(&[Change], &str); 7] = [
        (&[(FIRST + 12, &[1])], "is compressed"),
        (&[(FIRST + 13, &[0x40])], "is compressed or encrypted"),
        (
            &[(ALLOCATED + 1, &[0x20])],
            "record 6 is not as long as it says",
        ),
        (&[(SIZE + 1, &[0x20])], "record 6 is not as long as it says"),
        (&[(INITIALIZED, &[33])], "sizes that make no sense"),
        (&[(INITIALIZED, &[31])], "does not tell of every cluster"),
        (
            &[(SIZE, &[31]), (INITIALIZED, &[31])],
            "record 6 is not as long as it says",
        ),
    ];
    for (changes, words) in cases {
        assert_refused(&edited(bitmap, changes), words);
    }
    // From a cluster that is not the first.
    let image = edited(bitmap, &[(FIRST + 16, &[1]), (FIRST + 24, &[1])]);
    assert_refused(&image, "sizes that make no sense");
    let image = edited(bitmap, &[(0x20, &[24, 0, 0, 0, 0, 0, 25, 0])]);
    assert_refused(&image, "record 6 belongs to another file");
    // Fewer clusters than none.
    let mut image = Image::new();
    image.add(29, 0, &[mapped(0x80, 0, "", 5, &[], [0, 0])]);
    assert_read(&image);
    image.edit(29, |bytes| bytes[FIRST + 24] = 3);
    assert_refused(&image, "an attribute of record 29 makes no sense");
}

#[test]
fn holes_in_metadata() {
    let base = SPLIT[0];
    let mut image = Image::new();
    image.add(6, 0, &[mapped(0x80, 0, "", 0, &[(0, 1)], [1, 32])]);
    assert_refused(&image, "$Bitmap does not tell of every cluster");

    let mut image = Image::new();
    let list = mapped(0x20, 0, "", 0, &[(0, 1)], [1, 96]);
    let data = mapped(0x80, 1, "", 0, &[(140, 10)], [30, 30 * CLUSTER]);
    image.add(base, 0, &[list, data]);
    assert_refused(&image, "an attribute list has a hole");

    let mut image = Image::new();
    let hole = mapped(0x80, 0, "", 4, &[(0, 4)], [0, 0]);
    image.add(15, reference(0), &[hole]);
    assert_refused(&image, "$MFT does not hold itself");

    // All of the log is emptied but what is not there.
    let mut image = Image::new();
    let half = mapped(
        0x80,
        0,
        "",
        0,
        &[(LOG.start, 16), (0, 16)],
        [32, 32 * CLUSTER],
    );
    image.add(2, 0, &[half]);
    image.edit(2, |_| ());
    assert_refused(&image, "its log makes no sense");
    // Its restart pages need no more than themselves.
    image.log(&restart(1, 1, true, true), &restart(1, 1, true, true));
    assert_read(&image);
}

#[test]
fn bitmap_of_records_in_a_hole() {
    let list = [
        entry(0x80, 0, 0, 1),
        entry(0x80, 4, 15, 0),
        entry(0xb0, 0, 0, 2),
    ];
    let mft = |runs: &[(u64, u64)], clusters: u64| {
        let mut image = Image::new();
        let attributes = [
            resident(0x20, 0, "", &list.concat()),
            mapped(0x80, 1, "", 0, &[(4, 4)], [8, 32 * RECORD]),
            mapped(0xb0, 2, "", 0, runs, [clusters, clusters * CLUSTER]),
        ];
        image.add(0, 0, &attributes);
        image.edit(0, |_| ());
        image
    };
    assert_read(&mft(&[(MFT_BITMAP, 1), (0, 9)], 10));
    // Takes no place on the disk, but would take memory.
    let image = mft(&[(MFT_BITMAP, 1), (0, 1000)], 1001);
    assert_refused(&image, "metadata of record 0 is not as long as it says");
    let image = mft(&[(MFT_BITMAP, 1), (0, 10_000)], 10_001);
    assert_refused(&image, "metadata of record 0 is longer than it can be");
}

#[test]
fn holes_beyond_any_number() {
    let mut image = Image::new();
    let mut long = mapped(
        0x80,
        0,
        "",
        0,
        &[(LOG.start, 32), (0, 1), (0, 1)],
        [32, 32 * CLUSTER],
    );
    long[24..32].copy_from_slice(&((1_u64 << 62) + 31).to_le_bytes());
    put(&mut long, 64 + 5, &[0x08, 0, 0, 0, 0, 0, 0, 0, 0x40, 0]);
    image.add(2, 0, &[long]);
    image.edit(2, |_| ());
    assert_refused(&image, "metadata of record 2 is longer than it can be");
}

#[test]
fn parts_with_a_gap() {
    let mut image = Image::new();
    let list = [
        entry(0x80, 0, 0, 1),
        entry(0x80, 5, 15, 0),
        entry(0xb0, 0, 0, 2),
    ];
    image.edit(0, |bytes| put(bytes, FIRST + 24, &list.concat()));
    let part = mapped(0x80, 0, "", 5, &[(20, 4)], [0, 0]);
    image.add(15, reference(0), &[part]);
    assert_refused(&image, "metadata of record 0 lacks a part");
}

#[test]
fn the_table_and_its_copy_elsewhere() {
    // The copy that the table knows of is not the boot sector's.
    let mut image = Image::new();
    image.add(1, 0, &[mapped(0x80, 0, "", 0, &[(230, 1)], [1, CLUSTER])]);
    image.edit(1, |_| ());
    image.mark(230, true);
    let copy = usize_from(MIRROR * CLUSTER)..usize_from((MIRROR + 1) * CLUSTER);
    image.bytes.copy_within(copy, usize_from(230 * CLUSTER));
    assert_refused(&image, "$MFTMirr is not what $MFT is");
    // The table that the boot sector knows of is an old one.
    let mut image = Image::new();
    let table = usize_from(4 * CLUSTER)..usize_from(8 * CLUSTER);
    image.bytes.copy_within(table, usize_from(230 * CLUSTER));
    image.bytes[0x30] = 230;
    assert_refused(&image, "$MFT does not hold itself");
}

#[test]
fn log_that_makes_no_sense() {
    let mut image = Image::new();
    image.add(
        2,
        0,
        &[mapped(
            0x80,
            0,
            "",
            0,
            &[(LOG.start, 16)],
            [16, 16 * CLUSTER],
        )],
    );
    image.edit(2, |_| ());
    assert_refused(&image, "$LogFile is too short");
    let wrong: [&[(usize, u8)]; 4] = [
        // The restart area: in the fixups, beyond the page.
        &[(24, 0x28)],
        &[(24, 0xf8), (25, 0x0f)],
        // The first user is none.
        &[(0x3c, 1)],
        &[(0x38, 0)],
    ];
    for changes in wrong {
        let mut page = restart(1, 1, true, true);
        // None of these bytes is one that the fixups replace.
        (changes.iter()).for_each(|(at, value)| page[*at] = *value);
        let mut image = Image::new();
        image.log(&page, &page);
        assert_refused(&image, "its log makes no sense");
    }
    for size in [[0, 0], [0, 1], [0, 3]] {
        let mut page = restart(1, 1, true, true);
        page[16..18].copy_from_slice(&size);
        let mut image = Image::new();
        image.log(&page, &page);
        let (reason, _) = refused(&image);
        assert!(reason.contains("$LogFile makes no sense"), "{reason}");
    }
}

/// A volume with this root folder.
fn root(node_size: u8, entries: &[u8], nodes: &[(u64, u64)]) -> Image {
    let head = [0x30, 0, 0, 0, 1, 0, 0, 0, 0, node_size, 0, 0, 1, 0, 0, 0];
    let clusters: u64 = nodes.iter().map(|run| run.1).sum();
    let attributes = [
        resident(0x90, 0, "$I30", &[&head, entries].concat()),
        mapped(0xa0, 1, "$I30", 0, nodes, [clusters, clusters * CLUSTER]),
    ];
    let mut image = Image::new();
    image.add(5, 0, &attributes);
    image
}

#[test]
fn root_folder_that_makes_no_sense() {
    let none = index_entries(&[], 16);
    assert_read(&root(16, &none, &[(16, 1)]));
    for node_size in [0, 1, 3] {
        let image = root(node_size, &none, &[(16, 1)]);
        assert_refused(&image, "has a root folder of 4096 bytes, which is not read");
    }
    let long = root(16, &none, &[(16, 1), (0, 20_000)]);
    assert_refused(&long, "bytes, which is not read");
    // Entries that never end.
    let mut endless = index_entries(&[vec![0; 16 + 0x42]], 16);
    endless[16 + 10] = 0x42;
    assert_refused(
        &root(16, &endless, &[(16, 1)]),
        "the root folder makes no sense",
    );
    endless[16 + 8] = 15;
    assert_refused(
        &root(16, &endless, &[(16, 1)]),
        "the root folder makes no sense",
    );
    endless[16 + 8] = 16 + 0x42;
    assert_read(&root(16, &endless, &[(16, 1)]));
    let mut image = Image::new();
    image.add(5, 0, &[]);
    assert_refused(&image, "the root folder has no index");
}

#[test]
fn list_that_makes_no_sense() {
    for length in [0, 8, 25, 200] {
        let mut image = Image::new();
        image.bytes[usize_from(LIST * CLUSTER) + 4] = length;
        assert_refused(&image, "an attribute list makes no sense");
    }
    let mut image = Image::new();
    image.bytes[usize_from(LIST * CLUSTER) + 6] = 9;
    assert_refused(&image, "an attribute list makes no sense");
}
