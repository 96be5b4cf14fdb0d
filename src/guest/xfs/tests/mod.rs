//! All that can be wrong with an XFS.

mod image;

use proptest::prelude::*;

use self::image::{
    BLOCK_SIZE, BY_BLOCK, BY_COUNT, Disk, FIRST_RECORD, FREE_INODES, INODES, Image, LIST, LOG_LEN,
    REFCOUNTS, REVERSE_MAP, ROOT_INODE, Record, SECTOR, block, sector,
};
use super::*;
use crate::units::u64_from;

fn look(bytes: &[u8]) -> Result<Volume, String> {
    let disk = Disk(bytes);
    let view = View::whole(&disk);
    match read(&view) {
        Ok(volume) => Ok(volume),
        Err(Trouble::Skip { reason, hibernated }) => {
            assert!(!hibernated);
            Err(reason)
        }
        Err(Trouble::Io(error)) => panic!("{error}"),
    }
}

/// Why an image is in use after a `change`.
fn skipped(has_crc: bool, change: impl Fn(&mut Image)) -> String {
    let mut image = Image::new(has_crc);
    change(&mut image);
    image.seal();
    look(&image.bytes).expect_err("in use")
}

/// That nothing is free, or exactly what was.
fn same_or_skipped(bytes: &[u8]) {
    if let Ok(volume) = look(bytes) {
        assert_eq!(volume.free, image::free());
    }
}

#[test]
fn both_versions() {
    for has_crc in [true, false] {
        let image = Image::new(has_crc);
        let size = u64_from(image.bytes.len());
        let volume = look(&image.bytes).unwrap();
        assert_eq!(volume.free, image::free());
        assert_eq!(volume.size, size);
        let free: u64 = volume.free.iter().map(|run| run.end - run.start).sum();
        assert_eq!(volume.reported_free, free + 8 * u64_from(BLOCK_SIZE));
        assert_eq!(volume.rest, Rest::Unmarked);
    }
}

#[test]
fn the_name_is_told_by_the_magic_number() {
    let name = |bytes: &[u8]| {
        let disk = Disk(bytes);
        is_here(&View::whole(&disk)).unwrap()
    };
    let image = Image::new(true);
    assert_eq!(name(&image.bytes), Some("XFS"));
    assert_eq!(name(&image.bytes[..511]), None);
    assert_eq!(name(&image.bytes[1..]), None);
    assert_eq!(name(&[]), None);
}

#[test]
fn any_changed_byte_of_sealed_metadata_is_noticed() {
    let mut image = Image::new(true);
    for (at, len, _) in Image::sealed() {
        for at in at..at + len {
            image.bytes[at] ^= 0x10;
            assert!(look(&image.bytes).is_err(), "byte {at}");
            image.bytes[at] ^= 0x10;
        }
    }
}

#[test]
fn any_changed_byte_without_checksums_changes_nothing_or_all() {
    let mut image = Image::new(false);
    for (at, len, _) in Image::sealed() {
        for at in at..at + len {
            let bit = [0x01, 0x04, 0x10, 0x80][at % 4];
            image.bytes[at] ^= bit;
            same_or_skipped(&image.bytes);
            image.bytes[at] ^= bit;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Damage under right checksums: no sum overflows, no loop is endless, the counts tell.
    #[test]
    fn damage_that_is_sealed(
        has_crc: bool,
        which in 0_usize..20,
        words in prop::collection::vec((0_usize..256, prop::sample::select(vec![
            0, 1, 2, 3, 5, 7, 100, 101, 639, 640, 0x0001_0002, 0x7fff_ffff, 0x8000_0000, u32::MAX,
        ])), 1..3),
    ) {
        let mut image = Image::new(has_crc);
        let (at, len, _) = Image::sealed()[which];
        for (word, value) in words {
            image.put32(at + word * 4 % len, value);
        }
        image.seal();
        same_or_skipped(&image.bytes);
    }

    #[test]
    fn damage_to_the_log(at in 0_usize..LOG_LEN * SECTOR, byte: u8) {
        let mut image = Image::new(true);
        image.bytes[Image::log_block(0) + at] = byte;
        same_or_skipped(&image.bytes);
    }

    #[test]
    fn a_view_that_ends_early(len in 0_usize..Image::new(true).bytes.len()) {
        let mut image = Image::new(true);
        image.bytes.truncate(len);
        prop_assert!(look(&image.bytes).is_err());
    }
}

#[test]
fn what_is_not_known_is_left_alone() {
    let at = sector(0, 0);
    let cases: [(usize, u32, &str); 11] = [
        (208, 1, "features that are not known here (compat 0x1)"),
        (
            212,
            0x1f,
            "features that are not known here (ro_compat 0x10)",
        ),
        (
            216,
            0x20f,
            "features that are not known here (incompat 0x200)",
        ),
        (216, 0x1f, "is marked as damaged"),
        (220, 1, "not unmounted cleanly"),
        (
            200,
            0x0400_018a,
            "features that are not known here (features2 0x4000000)",
        ),
        (
            204,
            0x10,
            "features that are not known here (features2 0x10)",
        ),
        (
            100,
            0xb6a5_0200,
            "features that are not known here (version 0xb6a5)",
        ),
        (
            100,
            0xb4a6_0200,
            "features that are not known here (version 0x6)",
        ),
        (124, 0x0a00_0100, "not made to the end"),
        (28, 5, "realtime device"),
    ];
    for (field, value, reason) in cases {
        let found = skipped(true, |image| image.put32(at + field, value));
        assert!(found.contains(reason), "{found}");
    }
    let external = |image: &mut Image| image.put(at + 48, &[0; 8]);
    let found = skipped(true, external);
    assert!(found.contains("another device"), "{found}");
    // What only version 5 has means nothing before.
    let mut image = Image::new(false);
    image.put32(at + 220, 1);
    image.put32(at + 216, 0x200);
    look(&image.bytes).unwrap();
    let found = skipped(false, |image| image.put32(at + 200, 0x10a));
    assert!(found.contains("features2 0x100"), "{found}");
}

#[test]
fn features_that_change_nothing() {
    let mut image = Image::new(true);
    // nrext64, exchange ranges, parent pointers; and a metadata directory, whose filesystems have
    // other things where the inodes stood.
    for group in 0..2 {
        image.put32(sector(group, 0) + 216, 0x1ef);
        image.put(sector(group, 0) + 72, &[0x7f; 8]);
    }
    image.seal();
    assert_eq!(look(&image.bytes).unwrap().free, image::free());
}

#[test]
fn copies_must_describe_the_same() {
    let copy = sector(1, 0);
    for (field, value) in [(8, 1), (12, 1288), (84, 641), (88, 3), (96, 31)] {
        let found = skipped(true, |image| image.put32(copy + field, value));
        assert!(
            found.contains("group 1") || found.contains("its log"),
            "{found}"
        );
    }
}

#[test]
fn counts_must_agree() {
    let agf = |field| sector(0, 1) + field;
    let one_less = |at| skipped(true, |image| image.put32(at, image.get32(at) - 1));
    assert!(one_less(sector(0, 0) + 148).contains("free blocks in its superblock"));
    for field in [52, 56, 60] {
        let found = one_less(agf(field));
        assert!(
            found.contains("counts its free blocks disagrees"),
            "{found}"
        );
    }
    // A count of the list and its ends.
    for field in [40, 44, 48] {
        assert!(one_less(agf(field)).contains("AGFL of group 0"));
    }
    // Older kernels did not count the blocks of btrees, where they counted free ones as they went.
    let mut image = Image::new(false);
    image.put32(agf(60), 0);
    assert!(look(&image.bytes).is_err());
    for group in 0..2 {
        image.put32(sector(group, 0) + 200, 0x08);
    }
    assert_eq!(look(&image.bytes).unwrap().free, image::free());
}

#[test]
fn the_btrees_must_list_the_same() {
    let first = |root| block(0, root + 1) + 56;
    // One block longer, in either, or both: then the sum is wrong.
    let longer = |image: &mut Image, root| image.put32(first(root) + 4, 2);
    let only_one = skipped(true, |image| longer(image, BY_BLOCK));
    assert!(only_one.contains("damaged metadata"), "{only_one}");
    let missing = skipped(true, |image| {
        // The last record is gone, and what the group counts too.
        let leaf = block(0, BY_BLOCK + 2);
        image.put(leaf + 6, &64_u16.to_be_bytes());
    });
    assert!(missing.contains("disagrees"), "{missing}");
}

/// Moves a free run in both btrees, so that nothing but the place is wrong.
fn moved_to(from: u32, to: u32) -> String {
    skipped(true, |image| {
        for root in [BY_BLOCK, BY_COUNT] {
            for at in (block(0, root)..block(0, root + 3)).step_by(4) {
                let in_header = (at - block(0, root)) % BLOCK_SIZE < 56;
                if !in_header && image.get32(at) == from {
                    image.put32(at, to);
                }
            }
        }
    })
}

#[test]
fn what_is_in_use_cannot_be_free() {
    // The first run is one block, which sorts first by number and by count.
    for number in [
        BY_BLOCK,
        BY_BLOCK + 1,
        BY_COUNT,
        BY_COUNT + 2,
        LIST,
        LIST + 3,
        INODES,
        FREE_INODES,
        REVERSE_MAP,
        REFCOUNTS,
        ROOT_INODE,
    ] {
        let found = moved_to(100, number);
        let expected = format!("block {number} of group 0, which is both free and in use");
        assert!(found.contains(&expected), "{found}");
    }
    for number in [0, 1, 640, u32::MAX] {
        assert!(moved_to(100, number).contains("free-space btrees"));
    }
    let mut image = Image::new(true);
    // The log over free blocks, in both superblocks.
    let mut bytes = Vec::new();
    for group in 0..2 {
        image.put(sector(group, 0) + 54, &((1 << 10) + 90_u16).to_be_bytes());
    }
    bytes.extend_from_slice(&image.bytes[Image::log_block(0)..][..LOG_LEN * SECTOR]);
    image.put(block(1, 90), &bytes);
    image.seal();
    let found = look(&image.bytes).expect_err("in use");
    assert!(
        found.contains("block 90 of group 1, which is both"),
        "{found}"
    );
}

#[test]
fn btree_blocks_must_be_where_they_belong() {
    let leaf = block(0, BY_BLOCK + 1);
    let root = block(0, BY_BLOCK);
    let pointer = root + 56 + 80 * 8;
    let cases: [(usize, u32); 10] = [
        (leaf + 4, 0x0001_0041),          // level
        (leaf + 4, 0x0000_0000),          // empty
        (leaf + 4, 0x0000_0100),          // more than fit
        (leaf + 8, 4),                    // left sibling
        (leaf + 12, u32::MAX),            // right sibling
        (block(0, BY_BLOCK + 2) + 12, 9), // the last one's
        (leaf + 20, 0),                   // place
        (leaf + 32, 0),                   // uuid
        (leaf + 48, 1),                   // owner
        (pointer + 4, BY_BLOCK + 1),      // the same leaf twice
    ];
    for (at, value) in cases {
        let found = skipped(true, |image| image.put32(at, value));
        assert!(
            found.contains("of group 0, in its free-space btrees"),
            "{found}"
        );
    }
    // A key that its leaf does not begin with.
    let found = skipped(true, |image| image.put32(root + 56, 99));
    assert!(found.contains("in its free-space btrees"), "{found}");
    // A root that points to itself, and levels that nothing has.
    assert!(skipped(true, |image| image.put32(pointer, BY_BLOCK)).contains("btrees"));
    for levels in [0, 3, 10, u32::MAX] {
        let found = skipped(true, |image| image.put32(sector(0, 1) + 28, levels));
        assert!(found.contains("group 0"), "{found}");
    }
}

#[test]
fn a_log_in_every_clean_shape() {
    let record = |at, cycle, header_blocks, data_blocks| Record {
        at,
        cycle,
        header_blocks,
        data_blocks,
    };
    for record in [
        FIRST_RECORD,
        record(10, 1, 1, 1),
        record(10, 7, 1, 1),
        record(0, 7, 1, 5),
        record(LOG_LEN - 2, 7, 1, 1),
        record(LOG_LEN - 1, 7, 1, 1),
        record(LOG_LEN - 3, 7, 1, 5),
        record(LOG_LEN - 3, 7, 8, 4),
        record(LOG_LEN - 9, 7, 8, 1),
        record(20, u32::MAX - 1, 2, 9),
    ] {
        for has_crc in [true, false] {
            // Long headers came with version 2.
            if !has_crc && record.header_blocks > 1 {
                continue;
            }
            let mut image = Image::new(has_crc);
            image.write_log(record);
            look(&image.bytes).unwrap();
            for header_len in [324, 328] {
                image.seal_log(record, header_len);
                look(&image.bytes).unwrap();
            }
            image.bytes[Image::log_block(record.at + record.header_blocks) + 100] ^= 1;
            let found = look(&image.bytes).expect_err("in use");
            assert!(found.contains("checksum of the last record"), "{found}");
        }
    }
}

#[test]
fn a_log_that_is_not_clean() {
    let record = Record {
        at: 10,
        cycle: 7,
        ..FIRST_RECORD
    };
    let at = Image::log_block(10);
    let with = |change: &dyn Fn(&mut Image)| {
        skipped(true, |image| {
            image.write_log(record);
            change(image);
        })
    };
    let unclean = |change: &dyn Fn(&mut Image)| {
        let found = with(change);
        assert!(found.contains("not unmounted cleanly"), "{found}");
    };
    let damaged = |change: &dyn Fn(&mut Image)| {
        let found = with(change);
        assert!(found.contains("damaged metadata"), "{found}");
    };
    // Two operations; an operation of a transaction; one that is no unmount.
    unclean(&|image| image.put32(at + 40, 2));
    unclean(&|image| image.bytes[at + SECTOR + 8] = 0x69);
    unclean(&|image| image.bytes[at + SECTOR + 9] = 0x01);
    // Something was written behind it.
    unclean(&|image| image.put32(at + 2 * SECTOR, 7));
    // Rounds that follow no order, or that no log is in.
    unclean(&|image| image.put32(Image::log_block(40), 7));
    unclean(&|image| image.put32(Image::log_block(40), 5));
    unclean(&|image| image.put32(Image::log_block(3), 6));
    unclean(&|image| image.put32(Image::log_block(3), 8));
    unclean(&|image| image.put(Image::log_block(0), &[0; LOG_LEN * SECTOR]));
    // A whole round without a record.
    unclean(&|image| {
        (0..LOG_LEN).for_each(|number| image.put32(Image::log_block(number), 7));
    });
    damaged(&|image| image.bytes[at + 304] ^= 1);
    damaged(&|image| image.put32(at + 8, 4));
    damaged(&|image| image.put32(at + 12, 0));
    damaged(&|image| image.put32(at + 12, u32::MAX));
    damaged(&|image| image.put32(at + 16, 6));
    damaged(&|image| image.put32(at + 20, 11));
    damaged(&|image| image.put32(at + 320, u32::MAX));
    // IRIX knew no identity.
    let mut image = Image::new(true);
    image.write_log(record);
    image.put(at + 304, &[0; 16]);
    look(&image.bytes).unwrap();
}

#[test]
fn the_geometry_must_make_sense() {
    let at = sector(0, 0);
    for (field, value) in [
        (4, 0),
        (4, 2048),
        (4, 1 << 31),
        (8, 1),
        (84, 0),
        (84, 8),
        (84, u32::MAX),
        (88, 0),
        (88, u32::MAX),
        (96, 0),
        (96, 1000),
        (96, u32::MAX),
        (104, 0),
        (120, 0x0b09_0901),
        (120, 0x0a09_09ff),
        (124, 0x0b00_0000),
    ] {
        let found = skipped(true, |image| image.put32(at + field, value));
        assert!(
            found.contains("damaged metadata"),
            "{field} {value}: {found}"
        );
    }
    let grown = skipped(true, |image| {
        image.put32(at + 12, 0x7fff_ffff);
        image.put32(at + 88, 0x7fff_ffff_u32.div_ceil(640));
    });
    assert!(grown.contains("more than the"), "{grown}");
}
