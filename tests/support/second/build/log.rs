//! Logs to replay, and those that nobody may.

use std::ops::Range;

use vhdfs::storage::Storage;
use vhdfs::units::FileOffset;

use super::super::bytes::{Guid, is_zero, put, seal_vhdx};
use super::super::log::{PAGE, Write};
use super::super::vhdx::{MIB, TABLE_LEN, TABLES_AT};
use super::super::{State, len, size};
use super::vhdx_file::{Built, table_entry};
use super::write;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// Its last sector was never written.
    Torn,
    /// A bit of its first sector is wrong.
    Checksum,
    /// It is of another log; the checksum is right.
    OtherLog,
    /// A data sector, or else a descriptor, is of another entry; the checksum is right.
    OtherEntry,
}

/// An entry to write.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogEntry {
    /// What it changes.
    pub(crate) writes: Vec<Write>,
    /// Its tail, as the index of an entry; the first one by default.
    pub(crate) tail: usize,
    /// The length that was durable; the file's by default.
    pub(crate) flushed: Option<u64>,
    /// The length that is needed; the file's by default.
    pub(crate) last: Option<u64>,
    /// What is wrong with it.
    pub(crate) damage: Option<Damage>,
}

impl LogEntry {
    /// An entry that changes this.
    pub(crate) fn of(writes: Vec<Write>) -> Self {
        let default = Self::default();
        Self { writes, ..default }
    }

    /// Its length in the log.
    fn len(&self) -> u64 {
        let pages = self.writes.iter().filter(|write| is_page(write)).count();
        let count = |n: usize| u64::try_from(n).expect("at most 64 bits");
        (64 + 32 * count(self.writes.len())).next_multiple_of(PAGE) + count(pages) * PAGE
    }

    fn bytes(&self, guid: &Guid, sequence: u64, tail: u64, lens: (u64, u64)) -> Vec<u8> {
        let mut bytes = vec![0; size(self.len())];
        let pages = self.writes.iter().filter(|write| is_page(write));
        let mut data_at = bytes.len() - pages.count() * size(PAGE);
        let small = |number: u64| u32::try_from(number).expect("small").to_le_bytes();
        put(&mut bytes, 0, b"loge");
        put(&mut bytes, 8, &small(self.len()));
        put(&mut bytes, 12, &small(tail));
        put(&mut bytes, 16, &sequence.to_le_bytes());
        let count = u32::try_from(self.writes.len()).expect("few");
        put(&mut bytes, 24, &count.to_le_bytes());
        put(&mut bytes, 32, guid);
        put(&mut bytes, 48, &lens.0.to_le_bytes());
        put(&mut bytes, 56, &lens.1.to_le_bytes());
        for (n, write) in self.writes.iter().enumerate() {
            let entry = 64 + 32 * n;
            put(&mut bytes, entry + 16, &write.place().start.to_le_bytes());
            put(&mut bytes, entry + 24, &sequence.to_le_bytes());
            match write {
                Write::Zero { len, .. } => {
                    put(&mut bytes, entry, b"zero");
                    put(&mut bytes, entry + 8, &len.to_le_bytes());
                }
                Write::Page { bytes: page, .. } => {
                    put(&mut bytes, entry, b"desc");
                    put(&mut bytes, entry + 4, &page[4092..]);
                    put(&mut bytes, entry + 8, &page[..8]);
                    let number = sequence.to_le_bytes();
                    put(&mut bytes, data_at, page);
                    put(&mut bytes, data_at, b"data");
                    put(&mut bytes, data_at + 4, &number[4..]);
                    put(&mut bytes, data_at + 4092, &number[..4]);
                    data_at += size(PAGE);
                }
            }
        }
        self.damage(&mut bytes);
        bytes
    }

    fn damage(&self, bytes: &mut [u8]) {
        let end = bytes.len();
        match self.damage {
            Some(Damage::OtherLog) => bytes[32] ^= 1,
            Some(Damage::OtherEntry) if self.writes.iter().any(is_page) => bytes[end - 4] ^= 1,
            Some(Damage::OtherEntry) => bytes[64 + 24] ^= 1,
            Some(Damage::Torn | Damage::Checksum) | None => {}
        }
        seal_vhdx(bytes);
        match self.damage {
            Some(Damage::Torn) => bytes[end - size(PAGE)..].fill(0),
            Some(Damage::Checksum) => bytes[4000] ^= 1,
            Some(Damage::OtherLog | Damage::OtherEntry) | None => {}
        }
    }
}

fn is_page(write: &Write) -> bool {
    matches!(write, Write::Page { .. })
}

/// A log to write.
#[derive(Clone, Debug)]
pub(crate) struct LogImage {
    /// Which entries are its own.
    pub(crate) guid: Guid,
    /// Where the first one starts; they may reach beyond the log's end.
    pub(crate) start: u64,
    /// The number of the first one.
    pub(crate) first: u64,
    /// The entries.
    pub(crate) entries: Vec<LogEntry>,
    /// Which headers name it.
    pub(crate) named: [bool; 2],
}

impl LogImage {
    /// A log of these entries, from the start, that both headers name.
    pub(crate) fn new(entries: Vec<LogEntry>) -> Self {
        Self {
            guid: [0x10; 16],
            start: 0,
            first: 1,
            entries,
            named: [true; 2],
        }
    }
}

impl Built {
    /// Puts `log` into the file, durably. What an earlier one left stays where it is not overwritten.
    pub(crate) fn write_log(&mut self, log: &LogImage) {
        let (log_at, log_len) = self.log;
        let file_len = self.sim.len().expect("known");
        let mut starts = Vec::new();
        let mut at = log.start;
        for (sequence, entry) in (log.first..).zip(&log.entries) {
            starts.push(at % log_len);
            let lens = (
                entry.flushed.unwrap_or(file_len / MIB * MIB),
                entry.last.unwrap_or(file_len.next_multiple_of(MIB)),
            );
            let tail = starts.get(entry.tail).copied();
            let tail = tail.expect("a tail is an earlier entry");
            let bytes = entry.bytes(&log.guid, sequence, tail, lens);
            for sector in bytes.chunks(size(PAGE)) {
                write(&self.sim, sector, log_at + at % log_len);
                at += PAGE;
            }
        }
        let guids = log
            .named
            .map(|named| if named { log.guid } else { [0; 16] });
        self.write_headers(guids, false);
        self.sim.sync().expect("the simulated host keeps it");
    }

    /// Bytes of the file as they are.
    pub(crate) fn bytes(&self, at: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![0; size(count)];
        let read = self.sim.read_exact_at(&mut bytes, FileOffset::new(at));
        read.expect("inside the file");
        bytes
    }

    /// The page of the block table with the entry of this index changed, and those changed so before.
    pub(crate) fn change_entry(&mut self, index: u64, state: State, at: u64) -> Write {
        self.table[size(index)] = table_entry(state, at);
        let first = index * 8 / PAGE * PAGE;
        let entries = self.table.iter().skip(size(first / 8)).take(512);
        let mut bytes: Vec<u8> = entries.flat_map(|entry| entry.to_le_bytes()).collect();
        bytes.resize(size(PAGE), 0);
        let at = self.bat.0 + first;
        Write::Page { at, bytes }
    }

    /// The pages of metadata, block table and bitmaps that make this file into `other`, which has all
    /// of them at the same places.
    pub(crate) fn pages_to(&self, other: &Self) -> Vec<Write> {
        let mut places: Vec<Range<u64>> = vec![
            TABLES_AT[0]..TABLES_AT[1] + TABLE_LEN,
            self.metadata_at..self.metadata_at + MIB,
            self.bat.0..self.bat.0 + self.bat.1,
        ];
        places.extend(other.bitmaps.values().map(|&at| at..at + MIB));
        let mut pages = Vec::new();
        for place in places {
            let count = place.end - place.start;
            let (old, new) = (
                self.bytes(place.start, count),
                other.bytes(place.start, count),
            );
            let both = old.chunks(size(PAGE)).zip(new.chunks(size(PAGE)));
            for (at, (old, new)) in (place.start..).step_by(size(PAGE)).zip(both) {
                match old == new {
                    true => {}
                    false if is_zero(new) => pages.push(Write::Zero { at, len: len(new) }),
                    false => pages.push(Write::Page {
                        at,
                        bytes: new.to_vec(),
                    }),
                }
            }
        }
        pages
    }
}
