//! Clusters of four blocks: one group, no checksums, no journal, and an end inside a cluster.
//!
//! ```text
//!   0-3     boot block, superblock, descriptors, reserved
//!   4-7     reserved 4
//!   8-11    bitmap 8, inode bitmap 9
//!   12-15   inodes 15
//!   16-19   inodes 16
//!   20-200  50 clusters in all, and one block
//! ```

use super::build::Image;
use super::{low_u32, read_image, refused};

const BLOCKS: u64 = 201;

/// With these clusters in use.
fn with_used(clusters: &[u64]) -> Image {
    let mut image = Image {
        bytes: vec![0; 256 * 1024],
    };
    let free = 51 - clusters.len();
    image.superblock(|raw| {
        raw.inodes_count.set(8);
        raw.blocks_count_lo.set(low_u32(BLOCKS));
        raw.free_blocks_count_lo
            .set(u32::try_from(free * 4).unwrap());
        raw.log_cluster_size.set(2);
        raw.blocks_per_group.set(256);
        raw.clusters_per_group.set(64);
        raw.inodes_per_group.set(8);
        raw.magic.set(0xef53);
        raw.state.set(1);
        raw.rev_level.set(1);
        raw.inode_size.set(256);
        raw.feature_incompat.set(0x2 | 0x40 | 0x80);
        raw.feature_ro_compat.set(0x1 | 0x200);
        raw.desc_size.set(64);
        raw.reserved_gdt_blocks.set(2);
    });
    image.descriptor(0, |raw| {
        raw.block_bitmap_lo.set(8);
        raw.inode_bitmap_lo.set(9);
        raw.inode_table_lo.set(15);
        raw.free_blocks_count_lo.set(u16::try_from(free).unwrap());
    });
    for cluster in clusters.iter().copied().chain(51..64) {
        image.block(8)[usize::try_from(cluster / 8).unwrap()] |= 1 << (cluster % 8);
    }
    image
}

#[test]
fn the_last_cluster_ends_where_the_filesystem_does() {
    let volume = read_image(&with_used(&[0, 1, 2, 3, 4, 7])).unwrap();
    let free: Vec<_> = volume.free.iter().cloned().collect();
    let kib = |from: u64, to: u64| from * 1024..to * 1024;
    assert_eq!(free, [kib(20, 28), kib(32, 201)]);
    assert_eq!(volume.size, BLOCKS * 1024);
    // As the tools have it: they count the whole of it.
    assert_eq!(volume.reported_free, 45 * 4096);
}

#[test]
fn a_cluster_with_some_metadata_is_in_use() {
    for own in 0..5 {
        let used: Vec<u64> = (0..5).filter(|cluster| *cluster != own).collect();
        refused(&with_used(&used), "its metadata free");
    }
}

#[test]
fn without_the_feature_metadata_stays_in_its_group() {
    for block in [0, BLOCKS - 1] {
        let mut image = with_used(&[0, 1, 2, 3, 4]);
        image.descriptor(0, |raw| raw.inode_table_lo.set(low_u32(block)));
        refused(
            &image,
            if block == 0 {
                "two pieces"
            } else {
                "where it cannot be"
            },
        );
    }
}

#[test]
fn bitmaps_are_left_out_only_with_checksums() {
    let mut image = with_used(&[0, 1, 2, 3, 4]);
    image.descriptor(0, |raw| raw.flags.set(2));
    refused(&image, "without the feature");
}
