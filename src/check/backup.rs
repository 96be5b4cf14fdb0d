//! What a repair changes, saved before it does.
//!
//! # The format
//! Numbers are little-endian. A sector is 512 bytes of the file, or what is there of the last one.
//!
//! | offset | bytes | in the header |
//! |---|---|---|
//! | 0 | 8 | `vhdfsbak` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | CRC-32C of the records |
//! | 16 | 8 | bytes of records; they start at offset 64 and end the file |
//! | 24 | 8 | the file's length before the repair |
//! | 32 | 8 | the shortest that it is on the way |
//! | 40 | 8 | the longest |
//! | 48 | 12 | zeros |
//! | 60 | 4 | CRC-32C of the header up to here |
//!
//! | offset | bytes | in a record |
//! |---|---|---|
//! | 0 | 8 | the number of the sector |
//! | 8 | 4 | the step of the repair that changes it last |
//! | 12 | 2 | n, the number of its later contents |
//! | 14 | 2 | m, the bytes of it that are in the file: 1 to 512 |
//! | 16 | 4n | CRC-32C of each later content, filled up with zeros to 512 bytes |
//! | 16 + 4n | m | its content before the repair |
//!
//! Records come in the order in which they are put back: what was cut off first, then the last steps
//! first. Of a dynamic VHD all of its headers and its block table are among them, changed or not, so that
//! a file that was used since the repair is told apart; a VHDX says so in the headers, which every repair
//! changes. A backup is complete where both checksums fit.

use std::cmp::Reverse;
use std::io;

use super::rehearsal::{Script, checksum, place_of, sectors_of};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, SECTOR_SIZE, u64_from, usize_from};

const SIGNATURE: [u8; 8] = *b"vhdfsbak";
const VERSION: u32 = 1;
pub(super) const HEADER_LEN: u64 = 64;
/// The step of what is cut off: put back before all others.
const CUT_OFF: u32 = u32::MAX;
/// Bytes that are read or written at once.
const PIECE: u64 = 64 << 10;

/// The fixed part of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of records.
    pub(super) records_len: u64,
    /// Their checksum.
    pub(super) records_crc: u32,
    /// The file's length before the repair.
    pub(super) file_len: u64,
    /// The shortest and the longest that it is on the way.
    pub(super) lengths: (u64, u64),
}

impl Header {
    fn to_bytes(self) -> [u8; 64] {
        let mut bytes = [0; 64];
        let words = [
            self.records_len,
            self.file_len,
            self.lengths.0,
            self.lengths.1,
        ];
        bytes[..8].copy_from_slice(&SIGNATURE);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.records_crc.to_le_bytes());
        for (place, word) in bytes[16..48].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header in `bytes`, or what is wrong with it.
    pub(super) fn parse(bytes: &[u8; 64]) -> Result<Self, &'static str> {
        let (words, _) = bytes.as_chunks::<8>();
        let (halves, _) = bytes.as_chunks::<4>();
        if bytes[..8] != SIGNATURE {
            return Err("it does not start with `vhdfsbak`: it is none, or was not finished");
        }
        if u32::from_le_bytes(halves[15]) != crc32c::crc32c(&bytes[..60]) {
            return Err("its header does not fit its checksum");
        }
        if u32::from_le_bytes(halves[2]) != VERSION {
            return Err("it is of a later version of vhdfs: use that one");
        }
        Ok(Self {
            records_crc: u32::from_le_bytes(halves[3]),
            records_len: u64::from_le_bytes(words[2]),
            file_len: u64::from_le_bytes(words[3]),
            lengths: (u64::from_le_bytes(words[4]), u64::from_le_bytes(words[5])),
        })
    }
}

/// One sector, as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Its number.
    pub(super) sector: u64,
    /// The step of the repair that changes it last.
    pub(super) step: u32,
    /// Checksums of its later contents.
    pub(super) versions: Vec<u32>,
    /// Its content before the repair, as far as it was in the file.
    pub(super) old: Vec<u8>,
}

/// Saves what `script` changes in `file`, and what lies in `guards`, to `backup`, an empty file; durably
/// but for its name.
///
/// # Errors
/// Where the host fails; `backup` is then good for nothing.
pub(super) fn save(
    file: &dyn Storage,
    script: &Script,
    guards: &[FileRange],
    backup: &dyn Storage,
) -> io::Result<()> {
    let file_len = file.len()?;
    let mut writer = Writer {
        backup,
        at: FileOffset::new(HEADER_LEN),
        buffer: Vec::new(),
        crc: 0,
    };
    let record = |sector: u64, step: u32| -> io::Result<Option<Record>> {
        let at = place_of(sector);
        let len = file_len.saturating_sub(at.get()).min(SECTOR_SIZE);
        let mut old = vec![0; usize_from(len)];
        file.read_exact_at(&mut old, at)?;
        let versions = script
            .touched
            .get(&sector)
            .map(|history| history.versions.clone());
        Ok((len > 0).then(|| Record {
            sector,
            step,
            versions: versions.unwrap_or_default(),
            old,
        }))
    };
    let cut_at = script.lengths.0.div_ceil(SECTOR_SIZE);
    for sector in cut_off(file, script, cut_at, file_len) {
        if let Some(record) = record(sector?, CUT_OFF)? {
            writer.add(&record)?;
        }
    }
    let touched =
        (script.touched.range(..cut_at)).map(|(sector, history)| (history.after, *sector));
    let guards = guards.iter().flat_map(|range| sectors_of(*range));
    let guards = guards.filter(|sector| *sector < cut_at && !script.touched.contains_key(sector));
    let mut rest: Vec<(u32, u64)> = touched.chain(guards.map(|sector| (0, sector))).collect();
    rest.sort_unstable_by_key(|(step, sector)| (Reverse(*step), *sector));
    rest.dedup();
    for (step, sector) in rest {
        if let Some(record) = record(sector, step)? {
            writer.add(&record)?;
        }
    }
    let (records_len, records_crc) = writer.finish()?;
    let header = Header {
        records_len,
        records_crc,
        file_len,
        lengths: script.lengths,
    };
    backup.write_all_at(&header.to_bytes(), FileOffset::new(0))?;
    backup.sync()
}

/// The sectors from number `first` on to the end of the file that hold anything, or that are written
/// to on the way.
fn cut_off<'a>(
    file: &'a dyn Storage,
    script: &'a Script,
    first: u64,
    file_len: u64,
) -> impl Iterator<Item = io::Result<u64>> + 'a {
    let end = FileOffset::new(file_len);
    let mut at = place_of(first);
    let mut found: std::vec::IntoIter<u64> = Vec::new().into_iter();
    let mut buffer = Vec::new();
    std::iter::from_fn(move || {
        loop {
            if let Some(sector) = found.next() {
                return Some(Ok(sector));
            }
            if at >= end {
                return None;
            }
            let piece = FileRange::between(at, at.plus(PIECE).min(end));
            buffer.resize(usize_from(piece.len), 0);
            if let Err(error) = file.read_exact_at(&mut buffer, at) {
                at = end;
                return Some(Err(error));
            }
            let numbers = at.get() / SECTOR_SIZE..;
            let held = numbers.zip(buffer.chunks(512)).filter(|(sector, bytes)| {
                bytes.iter().any(|byte| *byte != 0) || script.touched.contains_key(sector)
            });
            found = Vec::from_iter(held.map(|(sector, _)| sector)).into_iter();
            at = piece.end();
        }
    })
}

/// Writes records one behind the other.
struct Writer<'a> {
    backup: &'a dyn Storage,
    at: FileOffset,
    buffer: Vec<u8>,
    crc: u32,
}

impl Writer<'_> {
    fn add(&mut self, record: &Record) -> io::Result<()> {
        let count = |len: usize| u16::try_from(len).map_err(io::Error::other);
        let (versions, len) = (count(record.versions.len())?, count(record.old.len())?);
        self.buffer.extend(record.sector.to_le_bytes());
        self.buffer.extend(record.step.to_le_bytes());
        self.buffer.extend(versions.to_le_bytes());
        self.buffer.extend(len.to_le_bytes());
        for version in &record.versions {
            self.buffer.extend(version.to_le_bytes());
        }
        self.buffer.extend(&record.old);
        if u64_from(self.buffer.len()) >= PIECE {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.backup.write_all_at(&self.buffer, self.at)?;
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.at = self.at.plus(u64_from(self.buffer.len()));
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<(u64, u32)> {
        self.write()?;
        Ok((self.at.since(FileOffset::new(HEADER_LEN)), self.crc))
    }
}

/// The checksum of a sector of which `bytes` are in the file.
pub(super) fn checksum_of(bytes: &[u8]) -> u32 {
    let mut whole = [0; 512];
    let len = bytes.len().min(whole.len());
    whole[..len].copy_from_slice(&bytes[..len]);
    checksum(&whole)
}
