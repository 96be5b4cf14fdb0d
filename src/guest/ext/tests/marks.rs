//! Where the journal lies, who has the filesystem mounted, and what was deleted while it was open.

use super::build::{Image, JOURNAL_AT, JOURNAL_INODE, SEED};
use super::{free_blocks, low_u32, refusal, refused, u64_from, usize_from};
use crate::guest::ext::checksum::crc32c;
use crate::units::low_u8;

/// An image of which these blocks, which were free, are in use.
fn with_used(blocks: &[u64]) -> Image {
    let mut image = Image::new();
    for block in blocks {
        assert!(!image.is_set(*block));
        image.set(*block, true);
        let group = (block - 1) / 64;
        let free = image.free_in(group);
        image.descriptor(group, |raw| raw.free_blocks_count_lo.set(free));
    }
    let free = image.clear_blocks().len();
    image.superblock(|raw| raw.free_blocks_count_lo.set(low_u32(u64_from(free))));
    image.seal();
    image
}

fn put(image: &mut Image, at: u64, bytes: &[u8]) {
    image.bytes[usize_from(at)..][..bytes.len()].copy_from_slice(bytes);
}

/// A header of a node with so many entries, of at most so many, of this depth.
fn header(entries: u8, max: u8, depth: u8) -> [u8; 12] {
    [0x0a, 0xf3, entries, 0, max, 0, depth, 0, 0, 0, 0, 0]
}

fn extent(block: u8, len: u8, at: u64) -> [u8; 12] {
    [block, 0, 0, 0, len, 0, 0, 0, low_u8(at), 0, 0, 0]
}

fn index(block: u8, at: u64) -> [u8; 12] {
    [block, 0, 0, 0, low_u8(at), 0, 0, 0, 0, 0, 0, 0]
}

fn seed_of(inode: u64) -> u32 {
    crc32c(crc32c(SEED, &low_u32(inode).to_le_bytes()), &[0; 4])
}

/// A block as a node of the journal's tree.
fn put_node(image: &mut Image, block: u64, parts: &[[u8; 12]]) {
    put(image, block * 1024, &parts.concat());
    let sum = crc32c(seed_of(JOURNAL_INODE), &image.block(block)[..1020]);
    put(image, block * 1024 + 1020, &sum.to_le_bytes());
}

/// The journal in two extents, below two nodes.
fn with_tree() -> Image {
    let mut image = with_used(&[172, 173, 174]);
    let root = image.inode_at(JOURNAL_INODE) + 0x28;
    put(&mut image, root, &[header(1, 4, 2), index(0, 172)].concat());
    put_node(
        &mut image,
        172,
        &[header(2, 84, 1), index(0, 173), index(16, 174)],
    );
    put_node(
        &mut image,
        173,
        &[header(1, 84, 0), extent(0, 16, JOURNAL_AT)],
    );
    put_node(
        &mut image,
        174,
        &[header(1, 84, 0), extent(16, 16, JOURNAL_AT + 16)],
    );
    image.seal();
    image
}

#[test]
fn a_journal_below_a_tree() {
    let image = with_tree();
    assert_eq!(free_blocks(&image), image.clear_blocks());
    for block in [172, 173, 174] {
        // Its nodes belong to it, and have checksums.
        let mut damaged = image.clone();
        damaged.block(block)[700] ^= 1;
        refused(&damaged, "damaged tree");
        let mut free = image.clone();
        free.set(block, false);
        let count = free.free_in(2);
        free.descriptor(2, |raw| raw.free_blocks_count_lo.set(count));
        free.seal();
        refused(&free, "its metadata free");
    }
    let changed = |block, parts: &[[u8; 12]]| {
        let mut image = with_tree();
        put_node(&mut image, block, parts);
        refusal(&image)
    };
    // Round in a circle, another depth, a gap, blocks twice, empty nodes, blocks that do not exist.
    for said in [
        changed(173, &[header(1, 84, 1), index(0, 172)]),
        changed(172, &[header(2, 84, 1), index(0, 172), index(16, 172)]),
        changed(174, &[header(1, 84, 0), extent(17, 15, JOURNAL_AT + 17)]),
        changed(174, &[header(1, 84, 0), extent(16, 16, JOURNAL_AT)]),
        changed(174, &[header(0, 84, 0)]),
        changed(174, &[header(1, 84, 0), extent(16, 0, JOURNAL_AT)]),
        changed(174, &[header(1, 84, 0), extent(16, 16, 250)]),
        changed(174, &[header(85, 85, 0), extent(16, 16, JOURNAL_AT + 16)]),
        changed(174, &[header(1, 84, 0), extent(16, 15, JOURNAL_AT + 16)]),
    ] {
        assert!(said.contains("inode 8"), "{said}");
    }
}

/// The journal by block numbers, as ext3 has it.
fn with_numbers() -> Image {
    let mut image = with_used(&[172]);
    let inode = image.inode_at(JOURNAL_INODE);
    put(&mut image, inode + 0x20, &[0; 4]);
    for number in 0..12 {
        let block = low_u32(JOURNAL_AT + number).to_le_bytes();
        put(&mut image, inode + 0x28 + number * 4, &block);
    }
    put(&mut image, inode + 0x28 + 48, &172_u32.to_le_bytes());
    for number in 12..32 {
        let block = low_u32(JOURNAL_AT + number).to_le_bytes();
        put(&mut image, 172 * 1024 + (number - 12) * 4, &block);
    }
    image.seal();
    image
}

#[test]
fn a_journal_by_numbers() {
    let image = with_numbers();
    assert_eq!(free_blocks(&image), image.clear_blocks());
    let changed = |at: u64, number: u32| {
        let mut image = with_numbers();
        let root = image.inode_at(JOURNAL_INODE) + 0x28;
        let at = if at < 60 {
            root + at
        } else {
            172 * 1024 + at - 60
        };
        put(&mut image, at, &number.to_le_bytes());
        image.seal();
        refusal(&image)
    };
    assert!(changed(4, 0).contains("has holes"));
    assert!(changed(48, 0).contains("has holes"));
    assert!(changed(48, 253).contains("do not exist"));
    assert!(changed(60, u32::MAX).contains("do not exist"));
    assert!(changed(64, 140).contains("a block twice"));
    assert!(changed(48, 141).contains("a block twice"));
}

#[test]
fn files_that_cannot_be_the_journal() {
    let changed = |at: u64, byte: u8| {
        let mut image = Image::new();
        let inode = image.inode_at(JOURNAL_INODE);
        put(&mut image, inode + at, &[byte]);
        image.seal();
        refusal(&image)
    };
    // A folder, no name, encrypted, inline, another size.
    assert!(changed(1, 0x41).contains("no plain file"));
    assert!(changed(0x1a, 0).contains("no plain file"));
    assert!(changed(0x21, 0x08).contains("no plain file"));
    assert!(changed(0x23, 0x10).contains("no plain file"));
    assert!(changed(0x04, 1).contains("wrong size"));
    assert!(changed(0x6f, 1).contains("wrong size"));
    assert!(changed(0x05, 0x84).contains("has holes"));
}

/// A block of mount protection with this sequence.
fn with_protection(sequence: u32) -> Image {
    let mut image = with_used(&[240]);
    image.superblock(|raw| {
        raw.feature_incompat.set(raw.feature_incompat.get() | 0x100);
        raw.mmp_block.set(240);
    });
    put(&mut image, 240 * 1024, &0x004d_4d50_u32.to_le_bytes());
    put(&mut image, 240 * 1024 + 4, &sequence.to_le_bytes());
    put(&mut image, 240 * 1024 + 16, b"a host\0junk");
    let sum = crc32c(SEED, &image.block(240)[..1020]);
    put(&mut image, 240 * 1024 + 1020, &sum.to_le_bytes());
    image.seal();
    image
}

#[test]
fn mount_protection() {
    let image = with_protection(0xff4d_4d50);
    assert_eq!(free_blocks(&image), image.clear_blocks());
    let mut free = image.clone();
    free.set(240, false);
    let count = free.free_in(3);
    free.descriptor(3, |raw| raw.free_blocks_count_lo.set(count));
    free.seal();
    refused(&free, "its metadata free");
    refused(&with_protection(1), "in use by the machine \"ahost\"");
    refused(&with_protection(0xe24d_4d50), "in use by the machine");
    for at in [0, 5, 300, 1023] {
        let mut image = image.clone();
        image.block(240)[at] ^= 1;
        refused(&image, "damaged block of mount protection");
    }
    for (place, reason) in [
        (0, "damaged block"),
        (253, "damaged block"),
        (u64::MAX, "damaged block"),
        (1 << 60, "damaged block"),
        (3, "damaged block"),
    ] {
        let mut image = image.clone();
        image.superblock(|raw| raw.mmp_block.set(place));
        image.seal();
        refused(&image, reason);
    }
}

/// A file of orphans in inode 11, of one block, and a log that says that it may hold some.
fn with_orphans(list: &[u8]) -> Image {
    let mut image = with_used(&[241]);
    let inode = image.inode_at(11);
    put(&mut image, inode, &0x8180_u16.to_le_bytes());
    put(&mut image, inode + 4, &1024_u32.to_le_bytes());
    put(&mut image, inode + 0x1a, &[1]);
    put(&mut image, inode + 0x20, &0x8_0000_u32.to_le_bytes());
    put(
        &mut image,
        inode + 0x28,
        &[header(1, 4, 0), extent(0, 1, 241)].concat(),
    );
    put(&mut image, inode + 0x80, &[32, 0]);
    image.seal_inode(11);
    put(&mut image, 241 * 1024, list);
    put(
        &mut image,
        241 * 1024 + 1016,
        &0x0b10_ca04_u32.to_le_bytes(),
    );
    let sum = crc32c(seed_of(11), &241_u64.to_le_bytes());
    let sum = crc32c(sum, &image.block(241)[..1016]);
    put(&mut image, 241 * 1024 + 1020, &sum.to_le_bytes());
    image.superblock(|raw| {
        raw.feature_incompat.set(raw.feature_incompat.get() | 4);
        raw.feature_ro_compat
            .set(raw.feature_ro_compat.get() | 0x1_0000);
        raw.feature_compat.set(raw.feature_compat.get() | 0x1000);
        raw.orphan_file_inum.set(11);
    });
    image.seal();
    image
}

#[test]
fn a_file_of_orphans() {
    let image = with_orphans(&[]);
    assert_eq!(free_blocks(&image), image.clear_blocks());
    refused(&with_orphans(&[0, 0, 0, 0, 12]), "while they were open");
    for at in [9, 1015, 1016, 1021] {
        let mut image = image.clone();
        image.block(241)[at] ^= 1;
        refused(&image, "damaged list of orphans");
    }
    // Unmounted filesystems do not say that they may have some.
    let mut clean = image.clone();
    clean.superblock(|raw| raw.feature_incompat.set(raw.feature_incompat.get() & !4));
    clean.seal();
    refused(&clean, "while they were open");
}
