//! The journal: whether it holds anything, and which blocks it has newer than the disk.
//!
//! A transaction is a row of blocks in a ring: descriptors, each followed by the blocks that it
//! describes, revokes, and a commit. Only what is committed counts. Replaying here means to find,
//! for each block of the filesystem, where in the journal its newest content lies; nothing is
//! written.
//!
//! ```text
//!   superblock | descriptor, blocks ... | revoke | commit || descriptor ...
//! ```
//!
//! Sources: the kernel's `fs/jbd2/recovery.c` and `include/linux/jbd2.h`, e2fsprogs'
//! `e2fsck/recovery.c`. Where those two, or their versions, replay different things, nothing is.

mod log;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blocks::{Blocks, JOURNAL_MAGIC};
use super::checksum::{crc32c, without};
use super::inode::File;
use super::superblock::Geometry;
use crate::guest::Trouble;
use crate::units::u64_from;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

/// Checksums of whole transactions: of no use but with asynchronous commits.
const COMPAT_CHECKSUM: u32 = 0x1;
const INCOMPAT_REVOKE: u32 = 0x1;
const INCOMPAT_64BIT: u32 = 0x2;
/// Commits may be on the disk before what they commit: a wrong checksum is then no damage.
const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
const INCOMPAT_KNOWN: u32 = INCOMPAT_REVOKE
    | INCOMPAT_64BIT
    | INCOMPAT_ASYNC_COMMIT
    | INCOMPAT_CSUM_V2
    | INCOMPAT_CSUM_V3
    | INCOMPAT_FAST_COMMIT;
const CHECKSUM_CRC32C: u8 = 4;

/// Where in the superblock its checksum is, of all its 1024 bytes.
const CHECKSUM_AT: u64 = 0xfc;
const SUPERBLOCK_LEN: usize = 1024;

/// Blocks kept for fast commits where the superblock does not say how many, and the least that must
/// remain for others. (`JBD2_DEFAULT_FAST_COMMIT_BLOCKS`, `JBD2_MIN_JOURNAL_BLOCKS`)
const DEFAULT_FAST_COMMIT_BLOCKS: u64 = 256;
const MIN_LOG_BLOCKS: u64 = 1024;

/// What each of the journal's own blocks begins with. `journal_header_t`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// 0: `h_magic`.
    pub(super) magic: [u8; 4],
    /// 4: `h_blocktype`.
    pub(super) blocktype: U32,
    /// 8: `h_sequence`: the transaction's number.
    pub(super) sequence: U32,
}

/// The journal's superblock, but for its end. `journal_superblock_t`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawJournalSuperblock {
    /// 0x00: `s_header`.
    pub(super) header: RawHeader,
    /// 0x0c: `s_blocksize`.
    pub(super) blocksize: U32,
    /// 0x10: `s_maxlen`: blocks of the journal.
    pub(super) maxlen: U32,
    /// 0x14: `s_first`: the first block of the ring.
    pub(super) first: U32,
    /// 0x18: `s_sequence`: of the first transaction to be replayed.
    pub(super) sequence: U32,
    /// 0x1c: `s_start`: where that one begins; 0 where there is none.
    pub(super) start: U32,
    /// 0x20: `s_errno`: not 0 once it was given up.
    pub(super) errno: U32,
    /// 0x24: `s_feature_compat`. This and all that follows is only of version 2.
    pub(super) feature_compat: U32,
    /// 0x28: `s_feature_incompat`.
    pub(super) feature_incompat: U32,
    /// 0x2c: `s_feature_ro_compat`.
    pub(super) feature_ro_compat: U32,
    /// 0x30: `s_uuid`.
    pub(super) uuid: [u8; 16],
    /// 0x40: `s_nr_users` to `s_max_trans_data`.
    pub(super) users: [u8; 16],
    /// 0x50: `s_checksum_type`.
    pub(super) checksum_type: u8,
    /// 0x51: `s_padding2`.
    pub(super) padding: [u8; 3],
    /// 0x54: `s_num_fc_blks`.
    pub(super) fast_commit_blocks: U32,
    /// 0x58: `s_head`, `s_padding`.
    pub(super) rest: [u8; 164],
    /// 0xfc: `s_checksum`.
    pub(super) checksum: U32,
}

/// The tag of a block, with checksums of version 3. `journal_block_tag3_t`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawTag3 {
    /// 0: `t_blocknr`.
    pub(super) block_lo: U32,
    /// 4: `t_flags`.
    pub(super) flags: U32,
    /// 8: `t_blocknr_high`.
    pub(super) block_hi: U32,
    /// 12: `t_checksum`.
    pub(super) checksum: U32,
}

/// The tag of a block. Of these only 8 bytes are there without the feature `64bit`, and 2 more than
/// there should be with checksums of version 2. `journal_block_tag_t`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawTag {
    /// 0: `t_blocknr`.
    pub(super) block_lo: U32,
    /// 4: `t_checksum`: the lower half.
    pub(super) checksum: U16,
    /// 6: `t_flags`.
    pub(super) flags: U16,
    /// 8: `t_blocknr_high`.
    pub(super) block_hi: U32,
}

/// What a commit begins with. `struct commit_header`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawCommit {
    /// 0: the header.
    pub(super) header: RawHeader,
    /// 12: `h_chksum_type`, `h_chksum_size`, `h_padding`.
    pub(super) kind: [u8; 4],
    /// 16: `h_chksum`: the first of eight.
    pub(super) checksum: U32,
    /// 20: the other seven.
    pub(super) unused: [U32; 7],
    /// 48: `h_commit_sec`.
    pub(super) seconds: U64,
    /// 56: `h_commit_nsec`.
    pub(super) nanoseconds: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == 12);
    assert!(size_of::<RawJournalSuperblock>() == 256);
    assert!(size_of::<RawTag3>() == 16);
    assert!(size_of::<RawTag>() == 12);
    assert!(size_of::<RawCommit>() == 60);
};

/// A journal that makes sense.
pub(super) struct Journal {
    pub(super) file: File,
    /// The ring: from here, up to not including there.
    first: u64,
    last: u64,
    /// Blocks of the journal.
    len: u64,
    /// The first transaction to be replayed, and where it begins; 0 where there is none.
    sequence: u32,
    start: u64,
    /// The feature bits that say how to read it.
    incompat: u32,
    compat: u32,
    /// What every checksum begins with.
    seed: u32,
}

impl Journal {
    /// Reads the superblock of the journal in inode `number`.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged, or has features that are not known.
    pub(super) fn open(
        blocks: &Blocks<'_>,
        geometry: &Geometry,
        number: u32,
    ) -> Result<Self, Trouble> {
        let file = File::open(blocks, geometry, number)?;
        let place = file.place(0).ok_or_else(|| bad("is empty"))?;
        let block = blocks.read(place)?;
        let (raw, _) = RawJournalSuperblock::read_from_prefix(&block)
            .map_err(|_| bad("has a damaged superblock"))?;
        let [compat, incompat] = features(&raw)?;
        let checked = incompat & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3);
        if checked != 0 {
            let covered = without(&block[..SUPERBLOCK_LEN], CHECKSUM_AT, 4);
            let right = crc32c(!0, &covered) == raw.checksum.get();
            let both = checked == INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3;
            if both || !right || raw.checksum_type != CHECKSUM_CRC32C {
                return Err(bad("has a superblock with a wrong checksum"));
            }
        }
        if raw.errno.get() != 0 {
            return Err(bad(
                "was given up after an error: its own system should check it",
            ));
        }
        let number = |field: U32| u64::from(field.get());
        let (first, len, start) = (number(raw.first), number(raw.maxlen), number(raw.start));
        let last = match incompat & INCOMPAT_FAST_COMMIT {
            0 => len,
            _ => {
                let kept = match number(raw.fast_commit_blocks) {
                    0 => DEFAULT_FAST_COMMIT_BLOCKS,
                    kept => kept,
                };
                let rest = len.checked_sub(kept);
                rest.filter(|rest| *rest >= MIN_LOG_BLOCKS).unwrap_or(len)
            }
        };
        if number(raw.blocksize) != geometry.block_size
            || len > file.blocks
            || first == 0
            || first >= last
            || start != 0 && !(first..last).contains(&start)
        {
            return Err(bad("has a superblock that makes no sense"));
        }
        Ok(Self {
            file,
            first,
            last,
            len,
            sequence: raw.sequence.get(),
            start,
            incompat,
            compat,
            seed: crc32c(!0, &raw.uuid),
        })
    }

    /// Whether it holds nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.start == 0
    }

    fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    /// Whether its blocks have checksums.
    fn is_checked(&self) -> bool {
        self.has(INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3)
    }

    /// Reads the journal's block `index`.
    fn read(&self, blocks: &Blocks<'_>, index: u64) -> Result<Vec<u8>, Trouble> {
        let place = self.file.place(index).filter(|_| index < self.len);
        blocks.read(place.ok_or_else(|| bad("points behind its end"))?)
    }
}

fn bad(what: &str) -> Trouble {
    Trouble::skip(format!("has a journal that {what}"))
}

/// The features that say how to read the journal, if all are known.
fn features(raw: &RawJournalSuperblock) -> Result<[u32; 2], Trouble> {
    if raw.header.magic != JOURNAL_MAGIC {
        return Err(bad("has a damaged superblock"));
    }
    match raw.header.blocktype.get() {
        SUPERBLOCK_V1 => return Ok([0; 2]),
        SUPERBLOCK_V2 => {}
        _ => return Err(bad("has a damaged superblock")),
    }
    let unknown = [
        raw.feature_compat.get() & !COMPAT_CHECKSUM,
        raw.feature_incompat.get() & !INCOMPAT_KNOWN,
        raw.feature_ro_compat.get(),
    ];
    match unknown {
        [0, 0, 0] => Ok([raw.feature_compat.get(), raw.feature_incompat.get()]),
        _ => Err(bad("has features that are not known here")),
    }
}

/// Whether transaction `a` came before `b`: numbers wrap around.
fn is_before(a: u32, b: u32) -> bool {
    let distance = b.wrapping_sub(a);
    distance != 0 && distance < 1 << 31
}

/// Whether the checksum at the end of a descriptor or a revoke is right.
fn tail_is_right(seed: u32, block: &[u8]) -> bool {
    let at = block.len() - 4;
    let found: [u8; 4] = [block[at], block[at + 1], block[at + 2], block[at + 3]];
    let sum = crc32c(crc32c(seed, &block[..at]), &[0; 4]);
    found == sum.to_be_bytes()
}

/// Whether the checksum of a commit is right.
fn commit_is_right(seed: u32, block: &[u8]) -> bool {
    let at = std::mem::offset_of!(RawCommit, checksum);
    let found = [block[at], block[at + 1], block[at + 2], block[at + 3]];
    let blank = without(block, u64_from(at), 4);
    found == crc32c(seed, &blank).to_be_bytes()
}
