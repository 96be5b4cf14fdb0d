//! The log: whether the filesystem was unmounted cleanly.
//!
//! Each 512-byte block of the log carries the number of the round, or *cycle*, in which it was
//! written: in its first four bytes, or behind the magic number where a record begins. So the log
//! reads `n n n .. n-1 n-1 ..`, and where that changes is its *head*. After a clean unmount, the
//! record right before the head says so, and nothing else. [`xfs_log_recover.c` `xlog_find_head`,
//! `xlog_check_unmount_rec`]
//!
//! The kernel looks at the blocks around the head only. Here all are looked at: the numbers of a log
//! that was written to the end of each record follow the rule everywhere.

use zerocopy::byteorder::big_endian::{U32 as Be32, U64};
use zerocopy::byteorder::little_endian::U32 as Le32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::damaged;
use super::superblock::Superblock;
use crate::guest::Trouble;
use crate::guest::raw::structure;
use crate::guest::view::View;
use crate::units::{low_u32, u64_from, usize_from};

/// Bytes of a log block.
const BLOCK: u64 = 512;
/// What is read at once.
const PIECE: u64 = 1 << 20;

const MAGIC: u32 = 0xfeed_babe;
/// Bytes of a record that each block of its header has room to describe.
const HEADER_CYCLE_SIZE: u32 = 32 << 10;
/// The longest record. [`xfs_log_format.h` `XLOG_MAX_RECORD_BSIZE`]
const MAX_RECORD: u32 = 256 << 10;
const CRC_AT: usize = 32;
/// Bytes of the header that its checksum covers: 324 where the compiler did not pad it.
const HEADER_LENS: [usize; 2] = [328, 324];
/// Bytes that it covers of each further block of the header.
const MORE_HEADER_LEN: usize = 260;

const CLIENT_LOG: u8 = 0xaa;
const FLAG_UNMOUNT: u8 = 0x20;

/// A record's header. [`xfs_log_format.h` `xlog_rec_header`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: 0xfeedbabe.
    magic: Be32,
    /// 4: the round that it was written in.
    cycle: Be32,
    /// 8: bit 0 for version 1, bit 1 for version 2.
    version: Be32,
    /// 12: bytes behind the header.
    len: Be32,
    /// 16: where it lies: cycle, block.
    lsn: U64,
    /// 24: the oldest record that is needed.
    tail_lsn: U64,
    /// 32: CRC-32C; 0 for none, as mkfs has it.
    crc: Le32,
    /// 36: block of the record before.
    previous: Be32,
    /// 40: operations in it.
    operations: Be32,
    /// 44: the words whose places the cycle took.
    words: [Be32; 64],
    /// 300: how its contents are encoded.
    format: Be32,
    /// 304: of the superblock; zeros if IRIX wrote it.
    uuid: [u8; 16],
    /// 320: bytes of the buffer that it was written from.
    size: Be32,
}

const _: () = assert!(size_of::<RawHeader>() == 324);

/// An operation's header. [`xfs_log_format.h` `xlog_op_header`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawOperation {
    /// 0: transaction; on the disk, the cycle.
    transaction: Be32,
    /// 4: bytes of what follows.
    len: Be32,
    /// 8: 0x69 for a transaction, 0xaa for the log itself.
    client: u8,
    /// 9: 0x20 for an unmount record.
    flags: u8,
    /// 10: not used.
    reserved: [u8; 2],
}

const _: () = assert!(size_of::<RawOperation>() == 12);

/// The log, by its blocks.
struct Log<'a, 'v> {
    view: &'a View<'v>,
    start: u64,
    blocks: u64,
}

/// What the numbers of all blocks tell.
struct Found {
    /// The block that would be written next.
    head: u64,
    /// Where the last record before it begins.
    record: u64,
}

/// Checks that the log ends with an unmount record.
///
/// # Errors
/// [`Trouble::Skip`] where it does not, or is damaged; [`Trouble::Io`].
pub(super) fn check_clean(view: &View<'_>, fs: &Superblock) -> Result<(), Trouble> {
    let (group, place) = &fs.log;
    let log = Log {
        view,
        start: fs.offset(*group, place.start),
        blocks: u64::from(place.end - place.start) * (fs.block_size / BLOCK),
    };
    let found = log.scan()?;
    let header_bytes = log.read(found.record, 1)?;
    let header: RawHeader = structure(&header_bytes, 0)?;
    if header.uuid != fs.uuid && header.uuid != [0; 16] {
        return Err(damaged("a log of another filesystem"));
    }
    // Version 1 has no long headers, nor a size to tell them by.
    let size = match fs.log_v2 && header.version.get() & 2 != 0 {
        true => header.size.get(),
        false => 0,
    };
    let header_blocks = u64::from(size.div_ceil(HEADER_CYCLE_SIZE).max(1));
    let len = header.len.get();
    let placed = header.lsn.get() & 0xffff_ffff == found.record
        && header.lsn.get() >> 32 == u64::from(header.cycle.get())
        && matches!(header.version.get(), 1..=3)
        && size <= MAX_RECORD
        && (1..=MAX_RECORD).contains(&len);
    if !placed {
        return Err(damaged("the last record of its log"));
    }
    let data_blocks = u64::from(len).div_ceil(BLOCK);
    let end = found.record + header_blocks + data_blocks;
    let data = log.read(log.wrap(found.record + header_blocks), data_blocks)?;
    let operation: RawOperation = structure(&data, 0)?;
    let unmounted = log.wrap(end) == log.wrap(found.head)
        && header.operations.get() == 1
        && operation.client == CLIENT_LOG
        && operation.flags & FLAG_UNMOUNT != 0;
    if !unmounted {
        return Err(Trouble::skip(
            "was not unmounted cleanly: let its own system mount and unmount it once",
        ));
    }
    let more = log.read(log.wrap(found.record + 1), header_blocks - 1)?;
    let data = &data[..usize_from(u64::from(len))];
    if header.crc.get() != 0 && !crc_is_right(header.crc.get(), &header_bytes, &more, data) {
        return Err(damaged("the checksum of the last record of its log"));
    }
    Ok(())
}

/// Whether a record has the checksum `crc`. [`xfs_log.c` `xlog_cksum`]
fn crc_is_right(crc: u32, header: &[u8], more: &[u8], data: &[u8]) -> bool {
    HEADER_LENS.iter().any(|len| {
        let mut found = crc32c::crc32c(&header[..CRC_AT]);
        found = crc32c::crc32c_append(found, &[0; 4]);
        found = crc32c::crc32c_append(found, &header[CRC_AT + 4..*len]);
        for block in more.chunks(usize_from(BLOCK)) {
            found = crc32c::crc32c_append(found, &block[..MORE_HEADER_LEN]);
        }
        crc32c::crc32c_append(found, data) == crc
    })
}

impl Log<'_, '_> {
    /// The block that follows those of one round.
    fn wrap(&self, block: u64) -> u64 {
        block % self.blocks
    }

    /// Reads `count` blocks from `block` on, round the end.
    fn read(&self, block: u64, count: u64) -> Result<Vec<u8>, Trouble> {
        if count > self.blocks {
            return Err(damaged("the last record of its log"));
        }
        let before_end = count.min(self.blocks - block);
        let mut bytes = (self.view).read(self.start + block * BLOCK, before_end * BLOCK)?;
        bytes.extend(self.view.read(self.start, (count - before_end) * BLOCK)?);
        Ok(bytes)
    }

    /// Looks at the cycle of every block.
    fn scan(&self) -> Result<Found, Trouble> {
        let mut head = None;
        let mut first = None;
        let mut record_before_head = None;
        let mut last_record = None;
        let per_piece = PIECE / BLOCK;
        for at in (0..self.blocks).step_by(usize_from(per_piece)) {
            let piece = self.read(at, per_piece.min(self.blocks - at))?;
            for (index, block) in piece.chunks_exact(usize_from(BLOCK)).enumerate() {
                let number = at + u64_from(index);
                let (cycle, is_record) = cycle_of(block);
                let first = *first.get_or_insert(cycle);
                if head.is_none() && cycle != first {
                    head = Some(number);
                    record_before_head = last_record;
                }
                let expected = u64::from(first) - u64::from(head.is_some() && first > 0);
                if u64::from(cycle) != expected || first == 0 {
                    return Err(unclear());
                }
                if is_record {
                    last_record = Some(number);
                }
            }
        }
        // A record that begins before the end of the log may go on at its start.
        let record = record_before_head.or(last_record).ok_or_else(unclear)?;
        Ok(Found {
            head: head.unwrap_or(self.blocks),
            record,
        })
    }
}

/// The cycle of a log block, and whether a record begins in it.
fn cycle_of(block: &[u8]) -> (u32, bool) {
    let word = |at: usize| {
        let bytes = block[at..at + 4].iter();
        low_u32(bytes.fold(0_u64, |word, byte| word << 8 | u64::from(*byte)))
    };
    if word(0) == MAGIC {
        (word(4), true)
    } else {
        (word(0), false)
    }
}

/// The doubt about a log whose end cannot be found.
fn unclear() -> Trouble {
    Trouble::skip(
        "was not unmounted cleanly, or has a damaged log: let its own system mount and unmount it once",
    )
}
