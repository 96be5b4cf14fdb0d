//! A small XFS, built byte by byte.

use std::io;

use rangemap::RangeSet;

use crate::guest::Source;
use crate::guest::raw::crc32c_without;
use crate::units::{u64_from, usize_from, usize_from_u32};

pub(super) const BLOCK_SIZE: usize = 1024;
pub(super) const SECTOR: usize = 512;
pub(super) const GROUP_BLOCKS: u32 = 640;
/// The second group is shorter.
const BLOCKS: u32 = 2 * GROUP_BLOCKS - 8;
/// So many that the btrees have two levels.
const RUNS: u32 = 130;
const UUID: [u8; 16] = *b"the filesystem's";
const META_UUID: [u8; 16] = *b"was another once";
pub(super) const LOG_GROUP: u32 = 1;
pub(super) const LOG_START: u32 = 40;
/// 512-byte blocks of the log.
pub(super) const LOG_LEN: usize = 64;

// Blocks of each group.
pub(super) const BY_BLOCK: u32 = 2;
pub(super) const BY_COUNT: u32 = 5;
pub(super) const LIST: u32 = 8;
pub(super) const INODES: u32 = 12;
pub(super) const FREE_INODES: u32 = 13;
pub(super) const REVERSE_MAP: u32 = 14;
pub(super) const REFCOUNTS: u32 = 15;
pub(super) const ROOT_INODE: u32 = 16;

/// A disk in memory.
pub(super) struct Disk<'a>(pub(super) &'a [u8]);

impl Source for Disk<'_> {
    fn len(&self) -> u64 {
        u64_from(self.0.len())
    }

    fn sector_size(&self) -> u64 {
        512
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.copy_from_slice(&self.0[usize_from(offset)..][..buf.len()]);
        Ok(())
    }
}

/// The record that ends a log.
#[derive(Clone, Copy)]
pub(super) struct Record {
    /// 512-byte block that it begins at, in round `cycle`.
    pub(super) at: usize,
    pub(super) cycle: u32,
    pub(super) header_blocks: usize,
    pub(super) data_blocks: usize,
}

/// What mkfs.xfs leaves.
pub(super) const FIRST_RECORD: Record = Record {
    at: 0,
    cycle: 1,
    header_blocks: 1,
    data_blocks: 1,
};

/// A filesystem of two groups.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) has_crc: bool,
    pub(super) bytes: Vec<u8>,
}

impl Image {
    pub(super) fn new(has_crc: bool) -> Self {
        let mut image = Self {
            has_crc,
            bytes: vec![0; usize_from_u32(BLOCKS) * BLOCK_SIZE],
        };
        for group in 0..2 {
            image.write_superblock(group);
            image.write_agf(group);
            image.write_agi(group);
            image.write_agfl(group);
            let mut runs = runs(group);
            image.write_btree(group, b'B', &runs);
            runs.sort_by_key(|(start, count)| (*count, *start));
            image.write_btree(group, b'C', &runs);
        }
        image.write_log(FIRST_RECORD);
        image.seal();
        image
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn put32(&mut self, at: usize, n: u32) {
        self.put(at, &n.to_be_bytes());
    }

    pub(super) fn get32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn uuid(&self) -> [u8; 16] {
        if self.has_crc { META_UUID } else { UUID }
    }

    fn write_superblock(&mut self, group: u32) {
        let at = sector(group, 0);
        self.put(at, b"XFSB");
        self.put32(at + 4, 1024);
        self.put(at + 8, &u64::from(BLOCKS).to_be_bytes());
        self.put(at + 32, &UUID);
        let log = u64::from(LOG_GROUP) << 10 | u64::from(LOG_START);
        self.put(at + 48, &log.to_be_bytes());
        let inode = u64::from(ROOT_INODE) << 1;
        self.put(at + 56, &inode.to_be_bytes());
        self.put(at + 64, &u64::MAX.to_be_bytes());
        self.put32(at + 84, GROUP_BLOCKS);
        self.put32(at + 88, 2);
        self.put32(at + 96, u32::try_from(LOG_LEN / 2).unwrap());
        let version: u16 = if self.has_crc { 0xb4a5 } else { 0xb4a4 };
        self.put(at + 100, &version.to_be_bytes());
        self.put(at + 102, &512_u16.to_be_bytes());
        self.put(at + 106, &2_u16.to_be_bytes());
        self.put(at + 120, &[10, 9, 9, 1, 10]);
        // With what each group has in its list and its btrees.
        let free = (free_blocks(0) + free_blocks(1)) + 2 * (4 + self.btree_blocks());
        self.put(at + 144, &u64::from(free).to_be_bytes());
        self.put32(at + 200, if self.has_crc { 0x18a } else { 0x0a });
        if self.has_crc {
            self.put32(at + 212, 0x0f);
            self.put32(at + 216, 0x0f);
            self.put(at + 248, &META_UUID);
        }
    }

    /// Four leaves; two more blocks in the reverse map.
    fn btree_blocks(&self) -> u32 {
        if self.has_crc { 6 } else { 4 }
    }

    /// Entries of the free list, and where they begin.
    fn list(&self) -> (u32, usize) {
        if self.has_crc { (119, 36) } else { (128, 0) }
    }

    fn write_agf(&mut self, group: u32) {
        let at = sector(group, 1);
        self.put(at, b"XAGF");
        let (roots, levels) = ([BY_BLOCK, BY_COUNT, REVERSE_MAP], [2, 2, 1]);
        let list = [self.list().0 - 2, 1, 4];
        let counts = [free_blocks(group), 3, self.btree_blocks()];
        let fields = [[1, group, group_blocks(group)], roots, levels, list, counts];
        for (index, field) in fields.into_iter().flatten().enumerate() {
            self.put32(at + 4 + index * 4, field);
        }
        self.put(at + 64, &self.uuid());
        self.put32(at + 80, 3);
        self.put32(at + 88, REFCOUNTS);
    }

    fn write_agi(&mut self, group: u32) {
        let at = sector(group, 2);
        self.put(at, b"XAGI");
        for (index, field) in [1, group, group_blocks(group)].into_iter().enumerate() {
            self.put32(at + 4 + index * 4, field);
        }
        self.put32(at + 20, INODES);
        self.put(at + 296, &self.uuid());
        self.put32(at + 328, FREE_INODES);
    }

    /// A ring that goes round the end.
    fn write_agfl(&mut self, group: u32) {
        let at = sector(group, 3);
        let (len, entries) = self.list();
        if self.has_crc {
            self.put(at, b"XAFL");
            self.put32(at + 4, group);
            self.put(at + 8, &META_UUID);
        }
        for (block, entry) in (LIST..).zip([len - 2, len - 1, 0, 1]) {
            self.put32(at + entries + usize_from_u32(entry) * 4, block);
        }
    }

    pub(super) fn header_len(&self) -> usize {
        if self.has_crc { 56 } else { 16 }
    }

    /// A root and two leaves.
    fn write_btree(&mut self, group: u32, kind: u8, runs: &[(u32, u32)]) {
        let root = if kind == b'B' { BY_BLOCK } else { BY_COUNT };
        let room = (BLOCK_SIZE - self.header_len()) / 12;
        let none = u32::MAX;
        self.write_block(group, root, kind, (1, 2), (none, none));
        let root_at = block(group, root) + self.header_len();
        let leaves = [(none, root + 2), (root + 1, none)];
        for (index, leaf) in runs.chunks(runs.len() / 2).enumerate() {
            let number = root + 1 + u32::try_from(index).unwrap();
            self.write_block(group, number, kind, (0, leaf.len()), leaves[index]);
            let at = block(group, number) + self.header_len();
            for (index, (start, count)) in leaf.iter().enumerate() {
                self.put32(at + index * 8, *start);
                self.put32(at + index * 8 + 4, *count);
            }
            self.put32(root_at + index * 8, leaf[0].0);
            self.put32(root_at + index * 8 + 4, leaf[0].1);
            self.put32(root_at + room * 8 + index * 4, number);
        }
    }

    fn write_block(
        &mut self,
        group: u32,
        number: u32,
        kind: u8,
        (level, count): (u16, usize),
        (left, right): (u32, u32),
    ) {
        let at = block(group, number);
        self.put(
            at,
            &[b'A', b'B', if self.has_crc { b'3' } else { b'T' }, kind],
        );
        self.put(at + 4, &level.to_be_bytes());
        self.put(at + 6, &u16::try_from(count).unwrap().to_be_bytes());
        self.put32(at + 8, left);
        self.put32(at + 12, right);
        if self.has_crc {
            self.put(at + 16, &u64_from(at / SECTOR).to_be_bytes());
            self.put(at + 32, &META_UUID);
            self.put32(at + 48, group);
        }
    }

    /// Where log block `number` lies.
    pub(super) fn log_block(number: usize) -> usize {
        block(LOG_GROUP, LOG_START) + number % LOG_LEN * SECTOR
    }

    /// A log that ends with an unmount record; all before was used, all behind in the round before.
    pub(super) fn write_log(&mut self, record: Record) {
        let end = record.at + record.header_blocks + record.data_blocks;
        for number in 0..LOG_LEN {
            let newest = number < end;
            let wrapped = number + LOG_LEN < end;
            let cycle = record.cycle - u32::from(!newest) + u32::from(wrapped);
            self.put(Self::log_block(number), &[0; SECTOR]);
            self.put32(Self::log_block(number), cycle);
        }
        let at = Self::log_block(record.at);
        let len = u32::try_from(record.data_blocks * SECTOR).unwrap();
        let version = if self.has_crc { 2 } else { 1 };
        for (index, field) in [0xfeed_babe, record.cycle, version, len]
            .into_iter()
            .enumerate()
        {
            self.put32(at + index * 4, field);
        }
        let place = u64::from(record.cycle) << 32 | u64_from(record.at);
        self.put(at + 16, &place.to_be_bytes());
        self.put32(at + 40, 1);
        self.put(at + 304, &UUID);
        self.put32(
            at + 320,
            u32::try_from(record.header_blocks * 32768).unwrap(),
        );
        let at = Self::log_block(record.at + record.header_blocks);
        self.put(at + 4, &[0, 0, 0, 8, 0xaa, 0x20]);
    }

    /// Gives the last record its checksum, of a header of `header_len` bytes.
    pub(super) fn seal_log(&mut self, record: Record, header_len: usize) {
        let block = |number| Self::log_block(record.at + number);
        self.put(block(0) + 32, &[0; 4]);
        let mut covered = self.bytes[block(0)..block(0) + header_len].to_vec();
        for number in 1..record.header_blocks {
            covered.extend(&self.bytes[block(number)..][..260]);
        }
        for number in 0..record.data_blocks {
            covered.extend(&self.bytes[block(record.header_blocks + number)..][..SECTOR]);
        }
        self.put(block(0) + 32, &crc32c::crc32c(&covered).to_le_bytes());
    }

    /// Where metadata with checksums lies: start, length, where the checksum is.
    pub(super) fn sealed() -> Vec<(usize, usize, usize)> {
        let of = |group| {
            let sectors = [(0, 224), (1, 216), (2, 312), (3, 32)];
            let blocks = (BY_BLOCK..LIST).map(move |number| (block(group, number), BLOCK_SIZE, 52));
            sectors
                .map(|(number, crc)| (sector(group, number), SECTOR, crc))
                .into_iter()
                .chain(blocks)
        };
        (0..2).flat_map(of).collect()
    }

    /// Makes all checksums right.
    pub(super) fn seal(&mut self) {
        if !self.has_crc {
            return;
        }
        for (at, len, crc) in Self::sealed() {
            let found = crc32c_without(&self.bytes[at..at + len], crc);
            self.put(at + crc, &found.to_le_bytes());
        }
    }
}

pub(super) fn block(group: u32, number: u32) -> usize {
    usize_from_u32(group * GROUP_BLOCKS + number) * BLOCK_SIZE
}

pub(super) fn sector(group: u32, number: usize) -> usize {
    block(group, 0) + number * SECTOR
}

fn group_blocks(group: u32) -> u32 {
    GROUP_BLOCKS - 8 * group
}

/// Start and count of the free runs.
fn runs(group: u32) -> Vec<(u32, u32)> {
    let run = |number| (100 + number * 4, 1 + (number + group) % 3);
    (0..RUNS).map(run).collect()
}

fn free_blocks(group: u32) -> u32 {
    runs(group).iter().map(|(_, count)| count).sum()
}

/// What is free, in bytes.
pub(super) fn free() -> RangeSet<u64> {
    let range = |group, (start, count): (u32, u32)| {
        u64_from(block(group, start))..u64_from(block(group, start + count))
    };
    let of = |group| runs(group).into_iter().map(move |run| range(group, run));
    (0..2).flat_map(of).collect()
}
