//! The log of a VHDX: which of its entries count, and what they change.

use std::ops::Range;

use super::bytes::{Guid, guid, is_zero, le32, le64, put, require, vhdx_checksum};
use crate::support::{len, size};

/// Bytes of a page that the log changes, and of a sector of the log.
pub(crate) const PAGE: u64 = 4096;
const HEADER_LEN: u64 = 64;
const DESCRIPTOR_LEN: u64 = 32;
/// Below lie the file identifier and the headers, which the log never changes.
const FIRST_TARGET: u64 = 192 << 10;

/// A change that an entry asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// The page at this file offset becomes this.
    Page { at: u64, bytes: Vec<u8> },
    /// The bytes there become zeros.
    Zero { at: u64, len: u64 },
}

impl Write {
    /// The bytes of the file that change.
    pub(crate) fn place(&self) -> Range<u64> {
        match self {
            Self::Page { at, .. } => *at..at.saturating_add(PAGE),
            Self::Zero { at, len } => *at..at.saturating_add(*len),
        }
    }

    /// Changes `buf`, the bytes of the file from `buf_at` on.
    pub(super) fn apply(&self, buf: &mut [u8], buf_at: u64) {
        let place = self.place();
        let start = place.start.max(buf_at);
        let end = place.end.min(buf_at + len(buf));
        if start >= end {
            return;
        }
        let part = &mut buf[size(start - buf_at)..size(end - buf_at)];
        match self {
            Self::Page { at, bytes } => {
                part.copy_from_slice(&bytes[size(start - at)..size(end - at)]);
            }
            Self::Zero { .. } => part.fill(0),
        }
    }
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it starts in the log.
    pub(crate) at: u64,
    /// Its length. It goes on at the log's start where it reaches beyond its end.
    pub(crate) len: u64,
    /// Its number.
    pub(crate) sequence: u64,
    /// Where the oldest entry starts that was not known applied when this one was written.
    pub(crate) tail: u64,
    /// A length of the file that was durable when this was written.
    pub(crate) flushed: u64,
    /// The length that the file must have at least once this is applied.
    pub(crate) last: u64,
    /// What it changes, in order.
    pub(crate) writes: Vec<Write>,
}

/// The log, as the current header gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    /// Where it lies in the file.
    pub(crate) at: u64,
    /// Its length.
    pub(crate) len: u64,
    /// Zeros where there is nothing to replay.
    pub(crate) guid: Guid,
    /// The entries to replay, oldest first. Those of no change are among them.
    pub(crate) entries: Vec<Entry>,
}

impl Log {
    /// Whether a header names entries: the file is in use, or was not closed.
    pub(crate) fn is_live(&self) -> bool {
        !is_zero(&self.guid)
    }

    /// Whether replay changes anything.
    pub(crate) fn needs_replay(&self) -> bool {
        self.entries.iter().any(|entry| !entry.writes.is_empty())
    }

    /// All that replay writes, in order.
    pub(crate) fn writes(&self) -> Vec<Write> {
        let writes = self.entries.iter().flat_map(|entry| &entry.writes);
        writes.cloned().collect()
    }

    /// The file's length after replay, if it was `real` before.
    pub(crate) fn grown(&self, real: u64) -> u64 {
        let written = self.entries.iter().flat_map(|entry| &entry.writes);
        let ends = written.map(|write| write.place().end);
        let last = self.entries.last().map(|entry| entry.last);
        ends.chain(last).fold(real, u64::max)
    }

    /// Reads the entries to replay from `ring`, the log's bytes, for a file of `file_len` bytes.
    pub(super) fn load(&mut self, ring: &[u8], file_len: u64) -> Result<(), String> {
        self.entries = active(ring, &self.guid)?;
        let flushed = self.entries.last().map_or(0, |entry| entry.flushed);
        require!(
            flushed <= file_len,
            "the file is cut: {file_len:#x} bytes, {flushed:#x} were there by its log"
        );
        Ok(())
    }

    /// Checks what an implementation that wrote the entries must have kept to.
    pub(super) fn check(&self) -> Result<(), String> {
        for entry in &self.entries {
            let (number, flushed, last) = (entry.sequence, entry.flushed, entry.last);
            require!(
                flushed.is_multiple_of(1 << 20) && last.is_multiple_of(1 << 20),
                "log entry {number}: lengths {flushed:#x} and {last:#x} are not whole MiB"
            );
            require!(
                flushed <= last,
                "log entry {number}: length {flushed:#x} durable, but {last:#x} needed"
            );
            for place in entry.writes.iter().map(Write::place) {
                let in_log = place.start < self.at + self.len && place.end > self.at;
                require!(
                    place.start >= FIRST_TARGET && !in_log,
                    "log entry {number} changes {place:#x?}"
                );
            }
        }
        Ok(())
    }
}

/// The entries of the active sequence, from its tail to its head.
fn active(ring: &[u8], log_guid: &Guid) -> Result<Vec<Entry>, String> {
    let mut best: Vec<Entry> = Vec::new();
    let mut wrong = Vec::new();
    let mut at = 0;
    while at < len(ring) {
        let mut found = sequence(ring, log_guid, at, &mut wrong);
        let Some(head) = found.last() else {
            at += PAGE;
            continue;
        };
        let number = head.sequence;
        let Some(tail) = found.iter().position(|entry| entry.at == head.tail) else {
            wrong.push(format!(
                "entry {number}: its tail {:#x} is no entry",
                head.tail
            ));
            at += PAGE;
            continue;
        };
        at += found.iter().map(|entry| entry.len).sum::<u64>();
        if best.last().is_none_or(|head| head.sequence < number) {
            best = found.split_off(tail);
        }
    }
    require!(
        !best.is_empty(),
        "a header names a log, but no sequence of entries is valid: {wrong:?}"
    );
    Ok(best)
}

/// The valid entries in a row from `start` on.
fn sequence(ring: &[u8], log_guid: &Guid, start: u64, wrong: &mut Vec<String>) -> Vec<Entry> {
    let mut found: Vec<Entry> = Vec::new();
    let mut used = 0;
    while used < len(ring) {
        let at = (start + used) % len(ring);
        if !ring[size(at)..].starts_with(b"loge") {
            break;
        }
        let entry = match parse(ring, log_guid, at) {
            Ok(entry) => entry,
            Err(error) => {
                wrong.push(format!("entry at {at:#x}: {error}"));
                break;
            }
        };
        let follows = |last: &Entry| last.sequence.checked_add(1) == Some(entry.sequence);
        if !found.last().is_none_or(follows) || used + entry.len > len(ring) {
            break;
        }
        used += entry.len;
        found.push(entry);
    }
    found
}

/// The entry at `at`.
fn parse(ring: &[u8], log_guid: &Guid, at: u64) -> Result<Entry, String> {
    let entry_len = u64::from(le32(ring, size(at) + 8));
    require!(
        entry_len.is_multiple_of(PAGE) && entry_len > 0 && entry_len < len(ring),
        "length {entry_len:#x}"
    );
    let mut bytes = vec![0; size(entry_len)];
    let before_end = size((len(ring) - at).min(entry_len));
    let (first, wrapped) = bytes.split_at_mut(before_end);
    first.copy_from_slice(&ring[size(at)..][..before_end]);
    wrapped.copy_from_slice(&ring[..wrapped.len()]);

    require!(guid(&bytes, 32) == *log_guid, "of another log");
    require!(le32(&bytes, 4) == vhdx_checksum(&bytes), "wrong checksum");
    require!(le32(&bytes, 28) == 0, "reserved bytes are not zero");
    let (sequence, tail) = (le64(&bytes, 16), u64::from(le32(&bytes, 12)));
    require!(sequence > 0, "sequence number 0");
    require!(
        tail < len(ring) && tail.is_multiple_of(PAGE),
        "tail {tail:#x}"
    );
    let count = u64::from(le32(&bytes, 24));
    let descriptors_end = (HEADER_LEN + count * DESCRIPTOR_LEN).next_multiple_of(PAGE);
    require!(descriptors_end <= entry_len, "{count} descriptors");

    let mut writes = Vec::new();
    let mut data_at = descriptors_end;
    for n in 0..count {
        let descriptor = &bytes[size(HEADER_LEN + n * DESCRIPTOR_LEN)..][..size(DESCRIPTOR_LEN)];
        let data = bytes.get(size(data_at)..).unwrap_or_default();
        let write = parse_write(descriptor, data, sequence);
        let write = write.map_err(|error| format!("descriptor {n}: {error}"))?;
        if matches!(write, Write::Page { .. }) {
            data_at += PAGE;
        }
        writes.push(write);
    }
    require!(
        data_at == entry_len,
        "length {entry_len:#x} instead of {data_at:#x}"
    );
    Ok(Entry {
        at,
        len: entry_len,
        sequence,
        tail,
        flushed: le64(&bytes, 48),
        last: le64(&bytes, 56),
        writes,
    })
}

/// What `descriptor` asks for; `data` starts with the sector of the next page.
fn parse_write(descriptor: &[u8], data: &[u8], sequence: u64) -> Result<Write, String> {
    require!(le64(descriptor, 24) == sequence, "of another entry");
    let at = le64(descriptor, 16);
    require!(at.is_multiple_of(PAGE), "file offset {at:#x}");
    if descriptor.starts_with(b"zero") {
        let len = le64(descriptor, 8);
        require!(len.is_multiple_of(PAGE), "length {len:#x}");
        return Ok(Write::Zero { at, len });
    }
    require!(descriptor.starts_with(b"desc"), "unknown signature");
    let sector = data.get(..size(PAGE)).ok_or("its data is missing")?;
    require!(sector.starts_with(b"data"), "its data has no signature");
    let (high, low) = (le32(sector, 4), le32(sector, 4092));
    require!(
        u64::from(high) << 32 | u64::from(low) == sequence,
        "its data is of another entry"
    );
    let mut bytes = sector.to_vec();
    put(&mut bytes, 0, &descriptor[8..16]);
    put(&mut bytes, 4092, &descriptor[4..8]);
    Ok(Write::Page { at, bytes })
}
