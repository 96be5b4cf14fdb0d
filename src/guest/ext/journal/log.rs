//! The walk through the log, from its start to the last commit.

use std::collections::HashMap;

use zerocopy::FromBytes;

use super::super::blocks::{Blocks, Copy, JOURNAL_MAGIC};
use super::super::checksum::crc32c;
use super::{
    COMMIT, COMPAT_CHECKSUM, DESCRIPTOR, INCOMPAT_64BIT, INCOMPAT_ASYNC_COMMIT, INCOMPAT_CSUM_V2,
    INCOMPAT_CSUM_V3, INCOMPAT_FAST_COMMIT, Journal, REVOKE, RawHeader, RawTag, RawTag3, bad,
    commit_is_right, is_before, tail_is_right,
};
use crate::guest::Trouble;
use crate::units::usize_from_u32;

/// The block's first four bytes were those of a block of the journal, and are not there.
/// (`JBD2_FLAG_ESCAPE`)
const FLAG_ESCAPE: u16 = 1;
/// No UUID follows the tag. (`JBD2_FLAG_SAME_UUID`)
const FLAG_SAME_UUID: u16 = 2;
/// The last tag of its descriptor. (`JBD2_FLAG_LAST_TAG`)
const FLAG_LAST_TAG: u16 = 8;
const UUID_LEN: usize = 16;
const HEADER_LEN: usize = 12;
/// The checksum that ends descriptors and revokes.
const TAIL_LEN: usize = 4;
/// More blocks than one transaction would revoke: each takes memory.
const MAX_REVOKED: usize = 4 << 20;

/// What a tag says of a block.
#[derive(Clone, Copy)]
struct Tag {
    /// The block of the filesystem.
    block: u64,
    flags: u16,
    checksum: u32,
}

/// The content of a block of the filesystem, in the journal.
#[derive(Clone, Copy)]
struct Found {
    copy: Copy,
    checksum: u32,
    sequence: u32,
}

/// A transaction of which no commit has been seen.
#[derive(Default)]
struct Pending {
    contents: Vec<(u64, Found)>,
    revoked: Vec<u64>,
    /// Some block of it has a wrong checksum, which is harmless only if it was never committed.
    damaged: bool,
}

/// A place in the log, and how much of the ring was seen.
struct Cursor<'j> {
    journal: &'j Journal,
    next: u64,
    left: u64,
}

impl Cursor<'_> {
    /// The next block's number in the journal.
    fn step(&mut self) -> Result<u64, Trouble> {
        let journal = self.journal;
        let Some(left) = self.left.checked_sub(1) else {
            return Err(bad("goes round in a circle"));
        };
        self.left = left;
        let at = self.next;
        self.next += 1;
        if self.next >= journal.last {
            self.next = journal.first;
            // Versions of Linux disagree on where such a ring ends.
            if journal.has(INCOMPAT_FAST_COMMIT) {
                return Err(bad("has room for fast commits and wraps around"));
            }
        }
        Ok(at)
    }
}

impl Journal {
    /// Finds what the journal has newer than the disk, for a filesystem that ends behind block
    /// `end`.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is in doubt what a system would replay.
    pub(in super::super) fn replay(
        &self,
        blocks: &Blocks<'_>,
        end: u64,
    ) -> Result<HashMap<u64, Copy>, Trouble> {
        if self.has(INCOMPAT_ASYNC_COMMIT) || self.compat & COMPAT_CHECKSUM != 0 {
            return Err(bad(
                "was written with asynchronous commits or their checksums",
            ));
        }
        let mut committed = HashMap::new();
        let mut sequence = self.sequence;
        if !self.is_empty() {
            let mut cursor = Cursor {
                journal: self,
                next: self.start,
                left: self.last - self.first,
            };
            while let Some(pending) = self.transaction(blocks, &mut cursor, sequence)? {
                for (block, found) in pending.contents {
                    if block >= end || self.file.holds(block) {
                        return Err(bad("has blocks that it cannot have"));
                    }
                    committed.insert(block, found);
                }
                // A revoke counts for its own transaction, too.
                for block in &pending.revoked {
                    committed.remove(block);
                }
                sequence = sequence.wrapping_add(1);
            }
        }
        self.check_contents(blocks, &committed)?;
        self.check_fast_commits(blocks, sequence)?;
        let copies = committed.into_iter();
        Ok(copies.map(|(block, found)| (block, found.copy)).collect())
    }

    /// Reads the transaction `sequence`, up to its commit. `None` where there is none, or its commit
    /// is missing.
    fn transaction(
        &self,
        blocks: &Blocks<'_>,
        cursor: &mut Cursor<'_>,
        sequence: u32,
    ) -> Result<Option<Pending>, Trouble> {
        let mut pending = Pending::default();
        loop {
            let block = self.read(blocks, cursor.next)?;
            let header = RawHeader::read_from_prefix(&block);
            let Ok((header, _)) = header.map_err(|_| ()) else {
                return Ok(None);
            };
            if header.magic != JOURNAL_MAGIC || header.sequence.get() != sequence {
                return Ok(None);
            }
            match header.blocktype.get() {
                DESCRIPTOR => {
                    cursor.step()?;
                    pending.damaged |= self.is_checked() && !tail_is_right(self.seed, &block);
                    for tag in self.tags(&block) {
                        let at = self.file.place(cursor.step()?);
                        let copy = Copy {
                            at: at.ok_or_else(|| bad("points behind its end"))?,
                            escaped: tag.flags & FLAG_ESCAPE != 0,
                        };
                        let found = Found {
                            copy,
                            checksum: tag.checksum,
                            sequence,
                        };
                        pending.contents.push((tag.block, found));
                    }
                }
                REVOKE => {
                    cursor.step()?;
                    pending.damaged |= self.is_checked() && !tail_is_right(self.seed, &block);
                    self.revoked(&block, &mut pending)?;
                }
                COMMIT => {
                    let right = !self.is_checked() || commit_is_right(self.seed, &block);
                    if pending.damaged || !right {
                        return Err(bad("has a wrong checksum: its own system should check it"));
                    }
                    cursor.step()?;
                    return Ok(Some(pending));
                }
                _ => return Ok(None),
            }
        }
    }

    /// The tags of a descriptor.
    fn tags(&self, block: &[u8]) -> Vec<Tag> {
        let tail = if self.is_checked() { TAIL_LEN } else { 0 };
        let len = match (self.has(INCOMPAT_CSUM_V3), self.has(INCOMPAT_64BIT)) {
            (true, _) => 16,
            (false, wide) => {
                let odd = if self.has(INCOMPAT_CSUM_V2) { 2 } else { 0 };
                if wide { 12 + odd } else { 8 + odd }
            }
        };
        let end = block.len() - tail;
        let mut tags = Vec::new();
        let mut at = HEADER_LEN;
        while at + len <= end {
            let tag = self.tag(&block[at..at + len]);
            tags.push(tag);
            at += len;
            if tag.flags & FLAG_SAME_UUID == 0 {
                at += UUID_LEN;
            }
            if tag.flags & FLAG_LAST_TAG != 0 {
                break;
            }
        }
        tags
    }

    fn tag(&self, bytes: &[u8]) -> Tag {
        let mut whole = [0; 16];
        whole[..bytes.len()].copy_from_slice(bytes);
        let high = |high: u32| match self.has(INCOMPAT_64BIT) {
            true => u64::from(high) << 32,
            false => 0,
        };
        if self.has(INCOMPAT_CSUM_V3) {
            let raw: RawTag3 = zerocopy::transmute!(whole);
            let flags = raw.flags.get().to_be_bytes();
            return Tag {
                block: high(raw.block_hi.get()) | u64::from(raw.block_lo.get()),
                flags: u16::from_be_bytes([flags[2], flags[3]]),
                checksum: raw.checksum.get(),
            };
        }
        let (raw, _): (RawTag, [u8; 4]) = zerocopy::transmute!(whole);
        Tag {
            block: high(raw.block_hi.get()) | u64::from(raw.block_lo.get()),
            flags: raw.flags.get(),
            checksum: u32::from(raw.checksum.get()),
        }
    }

    /// Adds the blocks that a revoke lists.
    fn revoked(&self, block: &[u8], pending: &mut Pending) -> Result<(), Trouble> {
        let tail = if self.is_checked() { TAIL_LEN } else { 0 };
        let word = |bytes: &[u8]| (bytes.first_chunk()).map_or(0, |n| u32::from_be_bytes(*n));
        let used = usize_from_u32(word(&block[HEADER_LEN..]));
        let start = HEADER_LEN + 4;
        if used > block.len() - tail {
            return Err(bad("has a damaged list of revoked blocks"));
        }
        let len = if self.has(INCOMPAT_64BIT) { 8 } else { 4 };
        let list = block.get(start..used).unwrap_or_default();
        pending.revoked.extend(list.chunks_exact(len).map(|entry| {
            let low = u64::from(word(&entry[len - 4..]));
            if len == 8 {
                u64::from(word(entry)) << 32 | low
            } else {
                low
            }
        }));
        match pending.revoked.len() > MAX_REVOKED {
            true => Err(bad("revokes more than can be")),
            false => Ok(()),
        }
    }

    /// Whether all blocks that would be replayed have the right checksums.
    fn check_contents(
        &self,
        blocks: &Blocks<'_>,
        committed: &HashMap<u64, Found>,
    ) -> Result<(), Trouble> {
        if !self.is_checked() {
            return Ok(());
        }
        // In the order in which they lie there.
        let mut all: Vec<&Found> = committed.values().collect();
        all.sort_unstable_by_key(|found| found.copy.at);
        for found in all {
            let seed = crc32c(self.seed, &found.sequence.to_be_bytes());
            let sum = crc32c(seed, &blocks.read(found.copy.at)?);
            let sum = if self.has(INCOMPAT_CSUM_V3) {
                sum
            } else {
                sum & 0xffff
            };
            if sum != found.checksum {
                return Err(bad("has a wrong checksum: its own system should check it"));
            }
        }
        Ok(())
    }

    /// Whether there are no fast commits to be replayed after transaction `sequence` - 1: those say what
    /// changed, not which blocks (`fs/ext4/fast_commit.c`).
    fn check_fast_commits(&self, blocks: &Blocks<'_>, sequence: u32) -> Result<(), Trouble> {
        /// What begins an area of fast commits: its kind, bytes of what follows, features, transaction.
        const TAG_HEAD: u16 = 9;
        if !self.has(INCOMPAT_FAST_COMMIT) || self.last == self.len {
            return Ok(());
        }
        // The area begins one block behind the ring's end; but what if it did not?
        for index in self.last..self.len.min(self.last + 2) {
            let block = self.read(blocks, index)?;
            let kind = u16::from_le_bytes([block[0], block[1]]);
            let transaction = u32::from_le_bytes([block[8], block[9], block[10], block[11]]);
            if kind == TAG_HEAD && !is_before(transaction, sequence) {
                return Err(bad("holds fast commits, which cannot be replayed here"));
            }
        }
        Ok(())
    }
}

const _: () = assert!(HEADER_LEN == size_of::<RawHeader>());
