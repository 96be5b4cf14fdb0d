//! Journals built here, and what is found in them.

use std::collections::BTreeMap;

use super::super::blocks::{Blocks, JOURNAL_MAGIC};
use super::super::checksum::crc32c;
use super::super::journal::Journal;
use super::super::superblock::RawSuperblock;
use super::build::{BLOCKS, Image, JOURNAL_AT, JOURNAL_LEN};
use super::{Trouble, View, free_blocks, raw, read_image, refused, usize_from};
use crate::units::{low_u32, u64_from};

const SEED_UUID: [u8; 16] = [0x77; 16];

/// What a transaction does.
enum Step {
    /// New content of blocks, each filled with this byte.
    Write(&'static [(u64, u8)]),
    /// New content of a block, all of it.
    Put(u64, Vec<u8>),
    Revoke(&'static [u64]),
    Commit,
}

/// Writes a log. `incompat`: the features that say how.
struct Writer<'i> {
    image: &'i mut Image,
    incompat: u32,
    next: u64,
    last: u64,
    sequence: u32,
    seed: u32,
}

impl<'i> Writer<'i> {
    fn new(image: &'i mut Image, incompat: u32, start: u64) -> Self {
        image.journal(|raw| {
            raw.start.set(low_u32(start));
            raw.feature_incompat.set(incompat);
            raw.checksum_type = 4;
        });
        image.superblock(|raw| raw.feature_incompat.set(raw.feature_incompat.get() | 4));
        let mut writer = Self {
            image,
            incompat,
            next: start,
            last: JOURNAL_LEN,
            sequence: 7,
            seed: crc32c(!0, &SEED_UUID),
        };
        writer.seal();
        writer
    }

    /// Makes the checksums of both superblocks right.
    fn seal(&mut self) {
        seal_journal(self.image);
        self.image.seal();
    }

    fn has(&self, bit: u32) -> bool {
        self.incompat & bit != 0
    }

    /// Puts the next block of the log, with what checksum it needs at its `sum_at`.
    fn put(&mut self, mut block: Vec<u8>, sum_at: Option<usize>) {
        block.resize(1024, 0);
        if let Some(at) = sum_at.filter(|_| self.has(0x18)) {
            let sum = crc32c(self.seed, &block);
            block[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        }
        let at = JOURNAL_AT + self.next;
        self.image.block(at).copy_from_slice(&block);
        self.next += 1;
        if self.next == self.last {
            self.next = 1;
        }
    }

    fn header(&self, kind: u32) -> Vec<u8> {
        let words = [kind, self.sequence].map(u32::to_be_bytes);
        [JOURNAL_MAGIC, words[0], words[1]].concat()
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write(blocks) => {
                let filled = |(block, byte): &(u64, u8)| (*block, vec![*byte; 1024]);
                self.write(&blocks.iter().map(filled).collect::<Vec<_>>());
            }
            Step::Put(block, bytes) => self.write(&[(*block, bytes.clone())]),
            Step::Revoke(blocks) => {
                let len = if self.has(2) { 8 } else { 4 };
                let mut block = self.header(5);
                let used = low_u32(u64_from(16 + blocks.len() * len));
                block.extend(used.to_be_bytes());
                for number in *blocks {
                    block.extend(&number.to_be_bytes()[8 - len..]);
                }
                self.put(block, Some(1020));
            }
            Step::Commit => {
                let block = self.header(2);
                self.put(block, Some(16));
                self.sequence = self.sequence.wrapping_add(1);
            }
        }
    }

    fn write(&mut self, blocks: &[(u64, Vec<u8>)]) {
        let mut descriptor = self.header(1);
        let mut contents = Vec::new();
        for (number, (block, bytes)) in blocks.iter().enumerate() {
            let mut bytes = bytes.clone();
            let mut flags = if number == 0 { 0 } else { 2 };
            if number + 1 == blocks.len() {
                flags |= 8;
            }
            if bytes[..4] == JOURNAL_MAGIC {
                bytes[..4].fill(0);
                flags |= 1;
            }
            let sum = crc32c(crc32c(self.seed, &self.sequence.to_be_bytes()), &bytes);
            let low = low_u32(*block).to_be_bytes();
            let high = low_u32(block >> 32).to_be_bytes();
            descriptor.extend(low);
            if self.has(0x10) {
                descriptor.extend([0, 0, 0, flags]);
                descriptor.extend(high);
                descriptor.extend(sum.to_be_bytes());
            } else {
                descriptor.extend(if self.has(8) {
                    [sum.to_be_bytes()[2], sum.to_be_bytes()[3]]
                } else {
                    [0; 2]
                });
                descriptor.extend([0, flags]);
                descriptor.extend(high.iter().filter(|_| self.has(2)));
                descriptor.extend([0; 2].iter().filter(|_| self.has(8)));
            }
            if number == 0 {
                descriptor.extend([0xdd; 16]);
            }
            contents.push(bytes);
        }
        self.put(descriptor, Some(1020));
        for bytes in contents {
            self.put(bytes, None);
        }
    }
}

fn seal_journal(image: &mut Image) {
    image.journal(|raw| raw.checksum.set(0));
    let at = usize_from(JOURNAL_AT * 1024);
    let sum = crc32c(!0, &image.bytes[at..at + 1024]);
    image.journal(|raw| raw.checksum.set(sum));
}

/// A log of a few transactions, for mischief.
pub(super) fn some(image: &mut Image) {
    let mut writer = Writer::new(image, 0x12, 3);
    for step in [
        Step::Write(&[(200, 1), (201, 2)]),
        Step::Revoke(&[200]),
        Step::Commit,
        Step::Write(&[(202, 1)]),
        Step::Commit,
    ] {
        writer.step(&step);
    }
}

/// What a log with these steps has for which block: the first and the last byte of it.
fn found(incompat: u32, start: u64, steps: &[Step]) -> Result<BTreeMap<u64, (u8, u8)>, Trouble> {
    let mut image = Image::new();
    let mut writer = Writer::new(&mut image, incompat, start);
    steps.iter().for_each(|step| writer.step(step));
    replayed(&image)
}

fn replayed(image: &Image) -> Result<BTreeMap<u64, (u8, u8)>, Trouble> {
    let view = View::whole(image);
    let superblock = raw(&view.read(1024, 1024)?)?.parse()?;
    let disk = Blocks::on_disk(&view, 1024);
    let journal = Journal::open(&disk, &superblock.geometry, 8)?;
    let overlay = journal.replay(&disk, BLOCKS)?;
    let numbers: Vec<u64> = overlay.keys().copied().collect();
    let blocks = Blocks::replayed(&view, 1024, overlay);
    let mut found = BTreeMap::new();
    for number in numbers {
        let block = blocks.read(number)?;
        found.insert(number, (block[0], block[1023]));
    }
    Ok(found)
}

/// Every way to write a log: with tags of all sizes, with and without checksums.
const WAYS: [u32; 6] = [0, 0x2, 0x8, 0xa, 0x10, 0x12];

#[test]
fn the_newest_that_is_committed_counts() {
    for way in WAYS {
        let steps = [
            Step::Write(&[(200, 1), (201, 1), (202, 1)]),
            Step::Commit,
            Step::Write(&[(201, 2)]),
            Step::Write(&[(203, 2)]),
            Step::Commit,
            Step::Write(&[(200, 3)]),
        ];
        let found = found(way, 1, &steps).unwrap();
        let expected = [(200, (1, 1)), (201, (2, 2)), (202, (1, 1)), (203, (2, 2))];
        assert_eq!(found, BTreeMap::from(expected), "{way:#x}");
    }
}

#[test]
fn revoked_up_to_its_transaction() {
    for way in WAYS {
        let steps = [
            Step::Write(&[(200, 1), (201, 1), (202, 1)]),
            Step::Commit,
            // It counts for what comes later in the same one, too.
            Step::Revoke(&[200, 201]),
            Step::Write(&[(201, 2)]),
            Step::Commit,
            Step::Write(&[(200, 3)]),
            Step::Commit,
            // Not committed: does not count.
            Step::Revoke(&[202]),
        ];
        let found = found(way, 1, &steps).unwrap();
        assert_eq!(
            found,
            BTreeMap::from([(200, (3, 3)), (202, (1, 1))]),
            "{way:#x}"
        );
    }
}

#[test]
fn an_escaped_block_gets_its_start_back() {
    let mut bytes = vec![9; 1024];
    bytes[..4].copy_from_slice(&JOURNAL_MAGIC);
    for way in WAYS {
        let steps = [Step::Put(210, bytes.clone()), Step::Commit];
        assert_eq!(
            found(way, 1, &steps).unwrap(),
            BTreeMap::from([(210, (0xc0, 9))])
        );
    }
}

#[test]
fn around_the_end_of_the_ring() {
    let steps = [
        Step::Write(&[(200, 1), (201, 1), (202, 1)]),
        Step::Commit,
        Step::Write(&[(203, 2)]),
        Step::Commit,
    ];
    let all = BTreeMap::from([(200, (1, 1)), (201, (1, 1)), (202, (1, 1)), (203, (2, 2))]);
    for way in WAYS {
        for start in 1..JOURNAL_LEN {
            assert_eq!(found(way, start, &steps).unwrap(), all, "{way:#x} {start}");
        }
    }
}

#[test]
fn a_full_ring_ends_where_it_began() {
    // 31 blocks: 10 transactions of 3, and one block that is not one.
    let steps: Vec<Step> = (0..10)
        .flat_map(|_| [Step::Write(&[(200, 1)]), Step::Commit])
        .collect();
    assert_eq!(found(0, 5, &steps).unwrap().len(), 1);
    // One transaction that follows itself.
    let steps: Vec<Step> = (0..31).map(|_| Step::Revoke(&[200])).collect();
    let Err(Trouble::Skip { reason, .. }) = found(0, 5, &steps) else {
        panic!("read");
    };
    assert!(reason.contains("circle"), "{reason}");
}

#[test]
fn numbers_of_transactions_wrap_around() {
    let mut image = Image::new();
    let mut writer = Writer::new(&mut image, 0x12, 1);
    writer.image.journal(|raw| raw.sequence.set(u32::MAX));
    writer.sequence = u32::MAX;
    for step in [
        Step::Write(&[(200, 1)]),
        Step::Commit,
        Step::Write(&[(200, 2)]),
        Step::Commit,
    ] {
        writer.step(&step);
    }
    writer.seal();
    assert_eq!(replayed(&image).unwrap(), BTreeMap::from([(200, (2, 2))]));
}

#[test]
fn a_wrong_checksum_is_damage_once_committed() {
    let mut image = Image::new();
    let mut writer = Writer::new(&mut image, 0x12, 1);
    // Descriptor 1, blocks 2 and 3, revoke 4, commit 5; descriptor 6, block 7, never committed.
    for step in [
        Step::Write(&[(200, 1), (201, 1)]),
        Step::Revoke(&[205]),
        Step::Commit,
        Step::Write(&[(202, 1)]),
    ] {
        writer.step(&step);
    }
    assert_eq!(replayed(&image).unwrap().len(), 2);
    for block in 1..8 {
        for at in [12, 30, 500, 1023] {
            let mut image = image.clone();
            image.block(JOURNAL_AT + block)[at] ^= 0x10;
            assert_eq!(replayed(&image).is_ok(), block > 5, "{block} {at}");
        }
    }
}

#[test]
fn blocks_that_cannot_be() {
    for (block, reason) in [(BLOCKS, "cannot have"), (JOURNAL_AT + 4, "cannot have")] {
        let mut image = Image::new();
        let mut writer = Writer::new(&mut image, 0x10, 1);
        writer.step(&Step::Put(block, vec![0; 1024]));
        writer.step(&Step::Commit);
        refused(&image, reason);
    }
    // Above 32 bits only with the feature.
    for (way, there) in [(0x10, true), (0x12, false), (0, true), (0x2, false)] {
        let steps = [Step::Put(200 | 1 << 32, vec![0; 1024]), Step::Commit];
        assert_eq!(found(way, 1, &steps).is_ok(), there, "{way:#x}");
    }
}

#[test]
fn journals_that_are_not_read() {
    let refused_for = |change: &dyn Fn(&mut Image), reason: &str| {
        let mut image = Image::new();
        some(&mut image);
        change(&mut image);
        seal_journal(&mut image);
        image.seal();
        refused(&image, reason);
    };
    refused_for(
        &|image| image.journal(|raw| raw.feature_incompat.set(0x16)),
        "asynchronous",
    );
    refused_for(
        &|image| image.journal(|raw| raw.feature_incompat.set(0x52)),
        "not known here",
    );
    refused_for(
        &|image| image.journal(|raw| raw.feature_compat.set(1)),
        "asynchronous",
    );
    refused_for(
        &|image| image.journal(|raw| raw.feature_compat.set(2)),
        "not known here",
    );
    refused_for(
        &|image| image.journal(|raw| raw.feature_ro_compat.set(1)),
        "not known here",
    );
    refused_for(
        &|image| image.journal(|raw| raw.feature_incompat.set(0x1a)),
        "wrong checksum",
    );
    refused_for(
        &|image| image.journal(|raw| raw.checksum_type = 1),
        "wrong checksum",
    );
    refused_for(&|image| image.journal(|raw| raw.errno.set(5)), "given up");
    refused_for(
        &|image| image.journal(|raw| raw.blocksize.set(2048)),
        "makes no sense",
    );
    refused_for(
        &|image| image.journal(|raw| raw.maxlen.set(33)),
        "makes no sense",
    );
    refused_for(
        &|image| image.journal(|raw| raw.first.set(0)),
        "makes no sense",
    );
    refused_for(
        &|image| image.journal(|raw| raw.start.set(32)),
        "makes no sense",
    );
    refused_for(
        &|image| image.journal(|raw| raw.header.blocktype.set(2)),
        "damaged superblock",
    );
    refused_for(
        &|image| image.journal(|raw| raw.header.magic = [0; 4]),
        "damaged superblock",
    );
    // It says that it was unmounted, and has a log all the same.
    refused_for(
        &|image| image.superblock(|raw| raw.feature_incompat.set(raw.feature_incompat.get() & !4)),
        "does not say so",
    );
}

#[test]
fn a_change_in_the_journal() {
    let mut image = Image::new();
    let before = free_blocks(&image);
    // Block 240 is given out, block 230 given back.
    let mut after = image.clone();
    after.set(240, true);
    after.set(230, false);
    after.seal();
    let bitmap = image.bitmap_block(3);
    let steps = [bitmap, 2].map(|block| Step::Put(block, after.block(block).to_vec()));
    let mut writer = Writer::new(&mut image, 0x12, 1);
    steps.iter().for_each(|step| writer.step(step));
    let uncommitted = writer.image.clone();
    writer.step(&Step::Commit);
    let volume = read_image(&image).unwrap();
    assert_eq!(volume.rest, crate::guest::Rest::Replayed);
    assert_eq!(volume.reported_free, u64_from(before.len()) * 1024);
    // Free is what is so before and after.
    let both: Vec<u64> = before
        .iter()
        .copied()
        .filter(|block| *block != 240)
        .collect();
    assert_eq!(free_blocks(&image), both);
    assert_eq!(free_blocks(&uncommitted), before);
}

#[test]
fn a_bitmap_that_was_not_there_before() {
    let mut image = Image::new();
    // On the disk, group 3 has no bitmap, and what lies in its place says that much is in use.
    let mut after = image.clone();
    let bitmap = image.bitmap_block(3);
    let copies = [bitmap, 2].map(|block| Step::Put(block, after.block(block).to_vec()));
    image.block(bitmap).fill(0xff);
    image.descriptor(3, |raw| {
        raw.flags.set(2);
        raw.free_blocks_count_lo.set(54);
    });
    image.seal();
    let mut writer = Writer::new(&mut image, 0x12, 1);
    copies.iter().for_each(|step| writer.step(step));
    writer.step(&Step::Commit);
    assert_eq!(free_blocks(&image), free_blocks(&Image::new()));
}

#[test]
fn a_superblock_in_the_journal() {
    let with = |change: fn(&mut RawSuperblock)| {
        let mut image = Image::new();
        let mut after = image.clone();
        after.superblock(|raw| raw.feature_incompat.set(raw.feature_incompat.get() | 4));
        after.superblock(change);
        after.seal();
        let block = after.block(1).to_vec();
        let mut writer = Writer::new(&mut image, 0x12, 1);
        writer.step(&Step::Put(1, block));
        writer.step(&Step::Commit);
        image
    };
    // Its count is stale, and does not matter.
    free_blocks(&with(|raw| raw.free_blocks_count_lo.set(1)));
    refused(&with(|raw| raw.blocks_count_lo.set(250)), "being resized");
    refused(&with(|raw| raw.last_orphan.set(12)), "while they were open");
    refused(&with(|raw| raw.state.set(2)), "errors");
    refused(
        &with(|raw| raw.feature_ro_compat.set(0x4401)),
        "not known here",
    );
}

#[test]
fn metadata_that_moves_in_the_journal() {
    let mut image = Image::new();
    let mut after = image.clone();
    after.move_bitmap(3, 240);
    after.set(240, true);
    let free = after.free_in(3);
    after.descriptor(3, |raw| raw.free_blocks_count_lo.set(free));
    after.seal();
    let steps = [240, 2].map(|block| Step::Put(block, after.block(block).to_vec()));
    let mut writer = Writer::new(&mut image, 0x12, 1);
    steps.iter().for_each(|step| writer.step(step));
    writer.step(&Step::Commit);
    refused(&image, "has moved the metadata of group 3");
}

/// Of longer journals, which can hold some, the tests with a kernel tell.
#[test]
fn too_short_for_fast_commits() {
    let mut image = Image::new();
    some(&mut image);
    image.journal(|raw| raw.feature_incompat.set(0x32));
    seal_journal(&mut image);
    assert!(replayed(&image).is_ok());
    let steps = [Step::Write(&[(200, 1), (201, 1), (202, 1)]), Step::Commit];
    let Err(Trouble::Skip { reason, .. }) = found(0x32, 30, &steps) else {
        panic!("read");
    };
    assert!(reason.contains("wraps around"), "{reason}");
}
