//! Small filesystems built here, byte by byte, and what becomes of them when a byte is wrong.

mod build;
mod clusters;
mod log;
mod marks;

use proptest::prelude::*;

use self::build::{GROUPS, Image, JOURNAL_INODE};
use super::superblock::RawSuperblock;
use super::*;
use crate::guest::view::{Source, View};
use crate::units::{low_u32, u64_from};

fn read_image(image: &Image) -> Result<Volume, Trouble> {
    let view = View::whole(image);
    match is_here(&view)? {
        Some(_) => read(&view),
        None => Err(Trouble::skip("is not here")),
    }
}

/// Why the image is left alone.
#[track_caller]
fn refusal(image: &Image) -> String {
    match read_image(image) {
        Err(Trouble::Skip { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(image: &Image, reason: &str) {
    let said = refusal(image);
    assert!(said.contains(reason), "{said}");
}

/// The free blocks of an image that is read.
#[track_caller]
fn free_blocks(image: &Image) -> Vec<u64> {
    let volume = read_image(image).unwrap();
    assert_eq!(volume.size, image.len());
    (volume.free.iter().flat_map(|run| {
        assert!(run.start % 1024 == 0 && run.end % 1024 == 0);
        run.start / 1024..run.end / 1024
    }))
    .collect()
}

#[test]
fn free_is_what_bitmaps_have_clear() {
    let image = Image::new();
    let free = free_blocks(&image);
    assert_eq!(free, image.clear_blocks());
    let volume = read_image(&image).unwrap();
    assert_eq!(volume.rest, crate::guest::Rest::Unmounted);
    assert_eq!(volume.reported_free, u64_from(free.len()) * 1024);
}

#[test]
fn a_group_without_a_bitmap_holds_metadata_only() {
    let mut image = Image::new();
    for used in [230, 252] {
        image.set(used, false);
    }
    // The bitmap of group 2 moves to group 3, which has none itself, but something in its place.
    let (old, new) = (image.bitmap_block(2), 233);
    image.move_bitmap(2, new);
    image.set(old, false);
    let free = image.free_in(2);
    image.descriptor(2, |raw| raw.free_blocks_count_lo.set(free));
    let mut expected = image.clear_blocks();
    expected.retain(|block| *block != new);
    let nothing = image.bitmap_block(3);
    image.block(nothing).fill(0x55);
    image.descriptor(3, |raw| {
        raw.flags.set(2);
        raw.free_blocks_count_lo.set(60 - 7);
    });
    image.superblock(|raw| {
        raw.free_blocks_count_lo
            .set(low_u32(u64_from(expected.len())))
    });
    image.seal();
    assert_eq!(free_blocks(&image), expected);
}

#[test]
fn every_byte_with_a_checksum_counts() {
    let image = Image::new();
    let covered = [
        // The superblock, the descriptors, the bitmaps, the journal's inode.
        1024..2048,
        2048..2048 + 64 * GROUPS,
        image.bitmap_block(0) * 1024..image.bitmap_block(0) * 1024 + 8,
        image.bitmap_block(2) * 1024..image.bitmap_block(2) * 1024 + 8,
        image.inode_at(JOURNAL_INODE)..image.inode_at(JOURNAL_INODE) + 256,
    ];
    for at in covered.into_iter().flatten() {
        for bit in [0, 3, 7] {
            let mut image = image.clone();
            image.bytes[usize_from(at)] ^= 1 << bit;
            refusal(&image);
        }
    }
}

#[test]
fn superblocks_that_make_no_sense() {
    let refused = |change: fn(&mut RawSuperblock), reason: &str| {
        let mut image = Image::new();
        image.superblock(change);
        image.seal();
        let said = refusal(&image);
        assert!(said.contains(reason), "{reason}: {said}");
    };
    refused(|raw| raw.magic.set(0xef52), "is not here");
    refused(|raw| raw.log_block_size.set(7), "is not here");
    refused(|raw| raw.blocks_per_group.set(0), "is not here");
    refused(|raw| raw.rev_level.set(2), "unknown revision 2");
    refused(|raw| raw.rev_level.set(0), "revision 0");
    refused(|raw| raw.block_group_nr.set(1), "a copy of its superblock");
    refused(|raw| raw.checksum_type = 0, "unknown kind");
    refused(|raw| raw.log_cluster_size.set(1), "cluster size");
    refused(|raw| raw.log_cluster_size.set(u32::MAX), "cluster size");
    refused(|raw| raw.blocks_per_group.set(65), "size of groups");
    refused(
        |raw| raw.blocks_per_group.set(1024 * 8 + 8),
        "size of groups",
    );
    refused(|raw| raw.first_data_block.set(0), "first block");
    refused(|raw| raw.blocks_count_lo.set(1), "number of blocks");
    refused(|raw| raw.blocks_count_hi.set(u32::MAX), "number of blocks");
    refused(|raw| raw.inodes_count.set(9), "number of inodes");
    refused(|raw| raw.inodes_per_group.set(0), "number of inodes");
    refused(|raw| raw.inode_size.set(96), "size of inodes");
    refused(|raw| raw.inode_size.set(2048), "size of inodes");
    refused(|raw| raw.desc_size.set(32), "size of group descriptors");
    refused(|raw| raw.desc_size.set(2048), "size of group descriptors");
    refused(|raw| raw.reserved_gdt_blocks.set(300), "reserved blocks");
    refused(
        |raw| raw.reserved_gdt_blocks.set(1),
        "pieces of its metadata",
    );
    refused(|raw| raw.free_blocks_count_hi.set(1), "but counts");
    refused(|raw| raw.state.set(0), "not unmounted cleanly");
    refused(|raw| raw.state.set(0x21), "not unmounted cleanly");
    refused(|raw| raw.state.set(3), "errors");
    refused(|raw| raw.last_orphan.set(11), "while they were open");
    refused(|raw| raw.journal_dev.set(1), "another device");
    refused(|raw| raw.journal_uuid[3] = 1, "another device");
    refused(|raw| raw.journal_inum.set(0), "does not exist");
    refused(|raw| raw.journal_inum.set(9), "an inode 9");
    for bit in 0..32 {
        for place in 0..3 {
            let mut image = Image::new();
            image.superblock(|raw| {
                let fields = [
                    &mut raw.feature_compat,
                    &mut raw.feature_incompat,
                    &mut raw.feature_ro_compat,
                ];
                let [compat, incompat, ro_compat] = fields;
                let field = [compat, incompat, ro_compat][place].get() | 1 << bit;
                match place {
                    0 => raw.feature_compat.set(field),
                    1 => raw.feature_incompat.set(field),
                    _ => raw.feature_ro_compat.set(field),
                }
            });
            image.seal();
            let known = [0x1e3f, 0x3_f7d6, 0x1_b77f][place] & 1 << bit != 0;
            let result = read_image(&image);
            if !known {
                assert!(matches!(result, Err(Trouble::Skip { .. })), "{place} {bit}");
            }
        }
    }
}

#[test]
fn what_does_not_agree() {
    let refused = |change: &dyn Fn(&mut Image), reason: &str| {
        let mut image = Image::new();
        change(&mut image);
        image.seal();
        let said = refusal(&image);
        assert!(said.contains(reason), "{reason}: {said}");
    };
    // A block more or less in the bitmap than the descriptor has; the superblock's count follows.
    refused(
        &|image| image.set(image.group(3).start + 30, true),
        "counts",
    );
    // The descriptor follows, too, but the superblock's count does not.
    refused(
        &|image| {
            let free = image.free_in(3) - 1;
            image.set(image.group(3).start + 30, true);
            image.descriptor(3, |raw| raw.free_blocks_count_lo.set(free));
            image.superblock(|raw| {
                let count = raw.free_blocks_count_lo.get() + 1;
                raw.free_blocks_count_lo.set(count);
            });
        },
        "free blocks, but counts",
    );
    // A filesystem's own blocks are free: the copies, the bitmaps, the inodes, the journal.
    for block in [
        1, 2, 3, 4, 5, 65, 66, 67, 68, 69, 70, 129, 130, 131, 140, 171,
    ] {
        refused(
            &|image| {
                let group = (block - 1) / 64;
                image.set(block, false);
                let free = image.free_in(group) + 1;
                image.descriptor(group, |raw| raw.free_blocks_count_lo.set(free));
            },
            "its metadata free",
        );
    }
    // What is behind the end is free.
    refused(
        &|image| {
            let at = image.bitmap_block(3) * 1024 + 7;
            image.bytes[usize_from(at)] &= 0x7f;
        },
        "behind the end",
    );
    refused(
        &|image| image.descriptor(1, |raw| raw.block_bitmap_lo.set(4)),
        "two pieces",
    );
    refused(
        &|image| image.descriptor(1, |raw| raw.inode_bitmap_lo.set(140)),
        "two pieces",
    );
    let changes: [fn(&mut groups::RawDescriptor); 4] = [
        |raw| raw.block_bitmap_lo.set(0),
        |raw| raw.inode_table_lo.set(5000),
        |raw| raw.inode_table_hi.set(u32::MAX),
        |raw| raw.inode_table_lo.set(255),
    ];
    for change in changes {
        refused(&|image| image.descriptor(1, change), "where it cannot be");
    }
}

#[test]
fn what_only_looks_right() {
    // A bitmap with as many free blocks as it should have, but others.
    let mut image = Image::new();
    image.set(230, false);
    image.set(240, true);
    refused(&image, "wrong checksum");
    // Counts that are wrong, but not all together.
    let mut image = Image::new();
    let (more, less) = (image.free_in(0) + 1, image.free_in(1) - 1);
    image.descriptor(0, |raw| raw.free_blocks_count_lo.set(more));
    image.descriptor(1, |raw| raw.free_blocks_count_lo.set(less));
    image.seal();
    refused(&image, "of group 0, but counts");
}

#[test]
fn names() {
    let name = |compat, incompat, ro_compat| {
        let features = features::Features {
            compat,
            incompat,
            ro_compat,
        };
        features.name()
    };
    assert_eq!(name(0, 2, 1), "ext2");
    assert_eq!(name(4, 2, 3), "ext3");
    assert_eq!(name(4, 0x242, 3), "ext4");
    assert_eq!(name(4, 2, 0x10), "ext4");
    assert_eq!(name(0, 8, 0), "ext4 journal");
    // With a journal to replay.
    assert_eq!(name(4, 6, 3), "ext3");
    assert_eq!(name(4, 0x46, 3), "ext4");
}

#[test]
fn what_is_too_short() {
    let image = Image::new();
    for len in (0..2048).step_by(97).chain([2047]) {
        let mut image = image.clone();
        image.bytes.truncate(len);
        assert!(matches!(is_here(&View::whole(&image)), Ok(None)));
    }
    for len in (2048..image.bytes.len()).step_by(331) {
        let mut image = image.clone();
        image.bytes.truncate(len);
        refused(&image, "more than the");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes, with checksums that hide it: no panic, and no metadata is ever free.
    #[test]
    fn mischief(
        changes in prop::collection::vec((0..4096_usize, any::<u8>(), 0..6_usize), 1..6),
        dirty in any::<bool>(),
        checked in any::<bool>(),
    ) {
        let mut image = Image::new();
        if dirty {
            image.superblock(|raw| raw.feature_incompat.set(raw.feature_incompat.get() | 4));
            log::some(&mut image);
        }
        if !checked {
            image.superblock(|raw| raw.feature_ro_compat.set(raw.feature_ro_compat.get() & !0x400));
        }
        image.seal();
        let regions = [
            1024..2048,
            2048..2048 + 64 * 4,
            image.inode_at(JOURNAL_INODE)..image.inode_at(JOURNAL_INODE) + 128,
            build::JOURNAL_AT * 1024..(build::JOURNAL_AT + 12) * 1024,
            build::JOURNAL_AT * 1024..build::JOURNAL_AT * 1024 + 256,
            4096..image.len(),
        ];
        for (at, value, region) in changes {
            let region = regions[region].clone();
            let at = region.start + u64_from(at) % (region.end - region.start);
            image.bytes[usize_from(at)] = value;
        }
        image.seal();
        if let Ok(volume) = read_image(&image) {
            for own in [1..6_u64, 65..71] {
                let own = own.start * 1024..own.end * 1024;
                prop_assert!(!volume.free.overlaps(&own), "{:?}", volume.free);
            }
        }
    }
}
