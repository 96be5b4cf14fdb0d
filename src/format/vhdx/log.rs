//! The log: pages of metadata that are changed together, and which of them count.
//!
//! The log is a ring of 4 KiB sectors. An *entry* replaces pages of the file, or zeroes ranges of
//! it; it may wrap around the ring's end. Entries with sequence numbers that follow one another form
//! a *sequence*. The *active* one is what has to be replayed: see [`active_sequence`].
//!
//! ```text
//!   header and descriptors      1 sector for up to 126 descriptors, 1 for each 128 further ones
//!   data sectors                1 for each page, in the order of the descriptors
//! ```
//!
//! Bounds: a log is read once, twice where a sequence wraps, in pieces of a sector; memory is
//! proportional to the entries of a sequence.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{PAGE, checksum_without, guid_from_bytes, guid_to_bytes};
use crate::units::{FileOffset, FileRange, low_u32, u64_from, u64_from_u32, usize_from};

/// The bytes of a page of metadata, or of a sector of the log.
pub type Page = [u8; 4096];

const ENTRY_SIGNATURE: [u8; 4] = *b"loge";
const PAGE_SIGNATURE: [u8; 4] = *b"desc";
const ZERO_SIGNATURE: [u8; 4] = *b"zero";
const DATA_SIGNATURE: [u8; 4] = *b"data";
const CHECKSUM_AT: usize = 4;
const HEADER_LEN: u64 = 64;
const DESCRIPTOR_LEN: u64 = 32;
/// Descriptors in the first sector of an entry.
const FIRST_DESCRIPTORS: u64 = (PAGE - HEADER_LEN) / DESCRIPTOR_LEN;

/// The start of an entry. [MS-VHDX] 2.3.1.1
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntryHeader {
    /// 0: `loge`.
    signature: [u8; 4],
    /// 4: CRC-32C of all of the entry.
    checksum: U32,
    /// 8: bytes of the entry, a multiple of 4096.
    entry_length: U32,
    /// 12: where in the log the oldest entry lies that is to be replayed if this is the newest.
    tail: U32,
    /// 16: one more than that of the entry before; not 0.
    sequence_number: U64,
    /// 24: may be 0.
    descriptor_count: U32,
    /// 28: 0.
    reserved: U32,
    /// 32: that of the file's header.
    log_guid: [u8; 16],
    /// 48: a length that the file is known to have had, durably.
    flushed_file_offset: U64,
    /// 56: the length that the file needs once the entry is applied.
    last_file_offset: U64,
}

/// What an entry does to one page or range: a zero or a data descriptor. [MS-VHDX] 2.3.1.2, 2.3.1.3
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    /// 0: `desc` or `zero`.
    signature: [u8; 4],
    /// 4: the page's last 4 bytes; of a zero descriptor 0.
    trailing: [u8; 4],
    /// 8: the page's first 8 bytes; of a zero descriptor the range's length.
    leading: [u8; 8],
    /// 16: where in the file.
    file_offset: U64,
    /// 24: the entry's.
    sequence_number: U64,
}

/// A page, but for its first 8 and last 4 bytes. [MS-VHDX] 2.3.1.4
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawData {
    /// 0: `data`.
    signature: [u8; 4],
    /// 4: the upper half of the entry's sequence number.
    sequence_high: U32,
    /// 8: the page's bytes from 8 on.
    bytes: [u8; 4084],
    /// 4092: the lower half.
    sequence_low: U32,
}

const _: () = {
    assert!(size_of::<RawEntryHeader>() == 64);
    assert!(size_of::<RawDescriptor>() == 32);
    assert!(size_of::<RawData>() == 4096);
};

/// What an entry does when it is applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Replaces a page of the file.
    Page {
        /// Where, a multiple of 4096.
        at: FileOffset,
        /// By what.
        bytes: Arc<Page>,
    },
    /// Zeroes a range of whole pages.
    Zeros(FileRange),
}

/// An entry to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// One more than that of the entry before; not 0.
    pub sequence_number: u64,
    /// Where in the log the oldest entry lies that is not yet durably applied; may be this one.
    pub tail: u64,
    /// The log's.
    pub log_guid: Uuid,
    /// A length that the file is known to have durably, a multiple of 1 MiB.
    pub flushed_file_offset: u64,
    /// The length that the file needs, a multiple of 1 MiB.
    pub last_file_offset: u64,
    /// What it changes.
    pub changes: Vec<Change>,
}

/// Bytes in the log of an entry that replaces `pages` pages and zeroes `zeros` ranges.
pub fn entry_len(pages: u64, zeros: u64) -> u64 {
    let descriptors = DESCRIPTOR_LEN.saturating_mul(pages.saturating_add(zeros));
    HEADER_LEN
        .saturating_add(descriptors)
        .div_ceil(PAGE)
        .saturating_add(pages)
        .saturating_mul(PAGE)
}

impl LogEntry {
    /// As it lies in the log, from its first sector on.
    ///
    /// # Panics
    /// Where it does not fit the fields of 32 bits: a log has at most 1 GiB.
    pub fn encode(&self) -> Vec<u8> {
        let count = u64_from(self.changes.len());
        let pages = (self.changes.iter()).filter(|change| matches!(change, Change::Page { .. }));
        let pages = u64_from(pages.count());
        let len = entry_len(pages, count.saturating_sub(pages));
        let field = |n: u64| U32::new(u32::try_from(n).expect("a log has at most 1 GiB"));
        let header = RawEntryHeader {
            signature: ENTRY_SIGNATURE,
            checksum: U32::new(0),
            entry_length: field(len),
            tail: field(self.tail),
            sequence_number: U64::new(self.sequence_number),
            descriptor_count: field(count),
            reserved: U32::new(0),
            log_guid: guid_to_bytes(self.log_guid),
            flushed_file_offset: U64::new(self.flushed_file_offset),
            last_file_offset: U64::new(self.last_file_offset),
        };
        let mut bytes = Vec::with_capacity(usize_from(len));
        bytes.extend_from_slice(header.as_bytes());
        for change in &self.changes {
            bytes.extend_from_slice(self.descriptor(change).as_bytes());
        }
        let data_at = len.saturating_sub(pages.saturating_mul(PAGE));
        bytes.resize(usize_from(data_at), 0);
        for change in &self.changes {
            if let Change::Page { bytes: page, .. } = change {
                bytes.extend_from_slice(self.data(page).as_bytes());
            }
        }
        let checksum = checksum_without(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn descriptor(&self, change: &Change) -> RawDescriptor {
        let (signature, trailing, leading, at) = match change {
            Change::Page { at, bytes } => {
                let raw: RawData = zerocopy::transmute!(**bytes);
                let mut leading = [0; 8];
                leading[..4].copy_from_slice(&raw.signature);
                leading[4..].copy_from_slice(raw.sequence_high.as_bytes());
                (PAGE_SIGNATURE, raw.sequence_low.to_bytes(), leading, *at)
            }
            Change::Zeros(range) => (
                ZERO_SIGNATURE,
                [0; 4],
                U64::new(range.len).to_bytes(),
                range.start,
            ),
        };
        RawDescriptor {
            signature,
            trailing,
            leading,
            file_offset: U64::new(at.get()),
            sequence_number: U64::new(self.sequence_number),
        }
    }

    fn data(&self, page: &Page) -> RawData {
        let raw: RawData = zerocopy::transmute!(*page);
        RawData {
            signature: DATA_SIGNATURE,
            sequence_high: U32::new(low_u32(self.sequence_number >> 32)),
            sequence_low: U32::new(low_u32(self.sequence_number)),
            ..raw
        }
    }
}

/// Where a log is read from.
#[expect(clippy::len_without_is_empty, reason = "a log is never empty")]
pub trait LogSource {
    /// Why it cannot be read.
    type Error;

    /// Bytes of the log, a multiple of 4096.
    fn len(&self) -> u64;

    /// Reads the sector at `at`, a multiple of 4096 inside the log.
    ///
    /// # Errors
    /// The source's.
    fn read(&mut self, at: u64, sector: &mut Page) -> Result<(), Self::Error>;

    /// The first sector at or after `at` that may hold anything but zeros.
    ///
    /// # Errors
    /// The source's.
    fn next_data(&mut self, at: u64) -> Result<Option<u64>, Self::Error>;
}

/// What a valid entry says, but for its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// Bytes in the log.
    pub len: u64,
    /// Where in the log replaying starts if this is the newest entry.
    pub tail: u64,
    /// Its sequence number.
    pub sequence_number: u64,
    /// Its descriptors.
    pub descriptor_count: u64,
    /// A length that the file has had, durably.
    pub flushed_file_offset: u64,
    /// The length that the file needs.
    pub last_file_offset: u64,
    checksum: u32,
}

/// A change as an entry in the log describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// The page at `at` of the file becomes what [`LoggedPage::restore`] makes of a sector.
    Page {
        /// Where in the file, a multiple of 4096.
        at: FileOffset,
        /// The rest.
        page: LoggedPage,
    },
    /// A range of whole pages becomes zeros.
    Zeros(FileRange),
}

/// A page that the log has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedPage {
    /// Where in the log its sector lies.
    pub data_at: u64,
    sequence_number: u64,
    leading: [u8; 8],
    trailing: [u8; 4],
}

impl LoggedPage {
    /// Makes the page of the sector that holds it. Says whether that is the right sector.
    pub fn restore(&self, sector: &mut Page) -> bool {
        let is_right = is_data(sector, self.sequence_number);
        sector[..8].copy_from_slice(&self.leading);
        sector[4092..].copy_from_slice(&self.trailing);
        is_right
    }
}

fn is_data(sector: &Page, sequence_number: u64) -> bool {
    let raw: RawData = zerocopy::transmute!(*sector);
    raw.signature == DATA_SIGNATURE
        && raw.sequence_high.get() == low_u32(sequence_number >> 32)
        && raw.sequence_low.get() == low_u32(sequence_number)
}

impl EntryHeader {
    /// Decodes the start of an entry; `None` where there is none of the log `guid` with `log_len`
    /// bytes.
    fn parse(sector: &Page, guid: Uuid, log_len: u64) -> Option<Self> {
        let (raw, _) = RawEntryHeader::read_from_prefix(sector).ok()?;
        let header = Self {
            len: u64_from_u32(raw.entry_length.get()),
            tail: u64_from_u32(raw.tail.get()),
            sequence_number: raw.sequence_number.get(),
            descriptor_count: u64_from_u32(raw.descriptor_count.get()),
            flushed_file_offset: raw.flushed_file_offset.get(),
            last_file_offset: raw.last_file_offset.get(),
            checksum: raw.checksum.get(),
        };
        let descriptors = header.descriptor_count;
        let is_valid = raw.signature == ENTRY_SIGNATURE
            && guid_from_bytes(raw.log_guid) == guid
            && header.sequence_number != 0
            && header.len.is_multiple_of(PAGE)
            && header.len <= log_len
            && header.tail.is_multiple_of(PAGE)
            && header.tail < log_len
            // All descriptors are of pages at most, all of ranges at least.
            && header.len >= entry_len(0, descriptors)
            && header.len <= entry_len(descriptors, 0);
        is_valid.then_some(header)
    }

    fn descriptor_sectors(&self) -> u64 {
        entry_len(0, self.descriptor_count) / PAGE
    }

    /// The descriptors in sector `number` of the entry, in the part of it that may hold any.
    fn descriptors_in(&self, number: u64) -> u64 {
        const FURTHER: u64 = PAGE / DESCRIPTOR_LEN;
        let before = match number.checked_sub(1) {
            None => return self.descriptor_count.min(FIRST_DESCRIPTORS),
            Some(further) => further
                .saturating_mul(FURTHER)
                .saturating_add(FIRST_DESCRIPTORS),
        };
        self.descriptor_count.saturating_sub(before).min(FURTHER)
    }
}

/// Reads the entry of log `guid` at `at`, and gives `visit` its changes in order, before it is known
/// whether the entry is valid. `None` where there is no valid one.
///
/// # Errors
/// The source's.
pub fn read_entry<S: LogSource>(
    source: &mut S,
    guid: Uuid,
    at: u64,
    mut visit: impl FnMut(Descriptor),
) -> Result<Option<EntryHeader>, S::Error> {
    let log_len = source.len();
    let mut sector: Page = [0; 4096];
    source.read(at, &mut sector)?;
    let Some(header) = EntryHeader::parse(&sector, guid, log_len) else {
        return Ok(None);
    };
    let descriptor_sectors = header.descriptor_sectors();
    let mut pages = 0_u64;
    let mut place = at;
    let mut checksum = checksum_without(&sector, CHECKSUM_AT);
    for number in 0..header.len / PAGE {
        if number > 0 {
            place = around(place, PAGE, log_len);
            source.read(place, &mut sector)?;
            checksum = crc32c::crc32c_append(checksum, &sector);
        }
        if number >= descriptor_sectors {
            if !is_data(&sector, header.sequence_number) {
                return Ok(None);
            }
            continue;
        }
        let start = if number == 0 { HEADER_LEN } else { 0 };
        let (raws, _) = sector[usize_from(start)..].as_chunks::<32>();
        for raw in raws.iter().take(usize_from(header.descriptors_in(number))) {
            let data_at = descriptor_sectors
                .saturating_add(pages)
                .saturating_mul(PAGE);
            let data_at = around(at, data_at, log_len);
            match parse_descriptor(zerocopy::transmute!(*raw), header.sequence_number, data_at) {
                Some(descriptor) => {
                    pages = pages
                        .saturating_add(u64::from(matches!(descriptor, Descriptor::Page { .. })));
                    visit(descriptor);
                }
                None => return Ok(None),
            }
        }
    }
    let zeros = header.descriptor_count.saturating_sub(pages);
    let is_valid = header.len == entry_len(pages, zeros) && header.checksum == checksum;
    Ok(is_valid.then_some(header))
}

fn parse_descriptor(raw: RawDescriptor, sequence_number: u64, data_at: u64) -> Option<Descriptor> {
    let at = raw.file_offset.get();
    if raw.sequence_number.get() != sequence_number || !at.is_multiple_of(PAGE) {
        return None;
    }
    let at = FileOffset::new(at);
    match raw.signature {
        PAGE_SIGNATURE => Some(Descriptor::Page {
            at,
            page: LoggedPage {
                data_at,
                sequence_number,
                leading: raw.leading,
                trailing: raw.trailing,
            },
        }),
        ZERO_SIGNATURE => {
            let len = u64::from_le_bytes(raw.leading);
            let fits = len.is_multiple_of(PAGE) && at.get().checked_add(len).is_some();
            fits.then(|| Descriptor::Zeros(FileRange::new(at, len)))
        }
        _ => None,
    }
}

/// The place `by` bytes behind `at` in a ring of `len` bytes; `by` is at most `len`.
fn around(at: u64, by: u64, len: u64) -> u64 {
    let sum = at.saturating_add(by);
    sum.checked_sub(len).unwrap_or(sum)
}

/// What has to be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Where in the log the entries lie, in the order of replay.
    pub entries: Vec<u64>,
    /// The number of the last one.
    pub sequence_number: u64,
    /// A length that the file has had, durably: a shorter file was cut.
    pub flushed_file_offset: u64,
    /// The length that the file needs.
    pub last_file_offset: u64,
    /// Whether no entry changes anything: then the file is as it should be, but for its length.
    pub is_empty: bool,
}

/// Entries that follow one another.
#[derive(Debug, Default)]
struct Run {
    /// Where each lies, and whether it changes anything.
    entries: Vec<(u64, bool)>,
    last: Option<EntryHeader>,
    len: u64,
}

impl Run {
    /// The run of valid entries from `start` on.
    fn read<S: LogSource>(source: &mut S, guid: Uuid, start: u64) -> Result<Self, S::Error> {
        let mut run = Self::default();
        let log_len = source.len();
        while run.len < log_len {
            let at = around(start, run.len, log_len);
            let Some(header) = read_entry(source, guid, at, |_| {})? else {
                break;
            };
            let follows = run.last.is_none_or(|last| {
                last.sequence_number.checked_add(1) == Some(header.sequence_number)
            });
            let len = run.len.saturating_add(header.len);
            if !follows || len > log_len {
                break;
            }
            run.entries.push((at, header.descriptor_count > 0));
            run.last = Some(header);
            run.len = len;
        }
        Ok(run)
    }

    /// The part of the run that is to be replayed, if its last entry's tail is one of them.
    fn into_sequence(self) -> Option<Sequence> {
        let last = self.last?;
        let first = (self.entries.iter()).position(|(at, _)| *at == last.tail)?;
        let entries = self.entries.get(first..)?;
        Some(Sequence {
            entries: entries.iter().map(|(at, _)| *at).collect(),
            sequence_number: last.sequence_number,
            flushed_file_offset: last.flushed_file_offset,
            last_file_offset: last.last_file_offset,
            is_empty: entries.iter().all(|(_, changes)| !changes),
        })
    }
}

/// The active sequence of log `guid`: of all runs of valid entries with following numbers whose last
/// one's tail is among them, the one with the highest last number; from that tail on.
///
/// # Errors
/// The source's.
pub fn active_sequence<S: LogSource>(
    source: &mut S,
    guid: Uuid,
) -> Result<Option<Sequence>, S::Error> {
    let log_len = source.len();
    let mut best: Option<Sequence> = None;
    let mut at = 0;
    while at < log_len {
        let Some(start) = source.next_data(at)? else {
            break;
        };
        if start >= log_len {
            break;
        }
        let run = Run::read(source, guid, start)?;
        // Parts of a run end as the run does, and with the same tail: nothing to be found there.
        at = start.saturating_add(run.len.max(PAGE));
        if let Some(sequence) = run.into_sequence()
            && best
                .as_ref()
                .is_none_or(|best| best.sequence_number < sequence.sequence_number)
        {
            best = Some(sequence);
        }
    }
    Ok(best)
}
