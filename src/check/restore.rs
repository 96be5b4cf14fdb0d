//! Putting back what a repair changed.
//!
//! Nothing is written before the whole backup was read and fits its checksums, and each sector that it
//! has was found in the file as it was before the repair or as the repair left it. That holds for a
//! file whose repair, or whose restoring, was interrupted, too; so after an interruption it is simply
//! done again. A file that was changed since then is refused.

use std::io;

use super::backup::{HEADER_LEN, Header, Record, checksum_of};
use super::rehearsal::place_of;
use crate::storage::Storage;
use crate::units::{FileOffset, SECTOR_SIZE, u64_from, usize_from};

/// Bytes of a backup that are read at once.
const PIECE: u64 = 64 << 10;

/// Why nothing was put back.
#[derive(Debug)]
pub(super) enum Refusal {
    /// What is wrong with the backup.
    Backup(String),
    /// What of the file does not fit.
    File(String),
    /// The host, while the backup was read.
    BackupIo(io::Error),
    /// The host, with the file.
    FileIo(io::Error),
}

/// Makes `file` again what it was when `backup` was saved, durably. How many sectors were put back.
///
/// # Errors
/// Where `backup` is none, or not that of `file`, nothing was changed. Where the host fails half-way,
/// it is to be done again; until then the file may not open.
pub(super) fn restore(backup: &dyn Storage, file: &dyn Storage) -> Result<u64, Refusal> {
    let header = read_header(backup)?;
    let file_len = file.len().map_err(Refusal::FileIo)?;
    let (shortest, longest) = header.lengths;
    if !(shortest..=longest).contains(&file_len) {
        return Err(Refusal::File(format!(
            "it has {file_len} bytes, and the repair left {shortest} to {longest}"
        )));
    }
    let mut records = Records::new(backup, &header);
    while let Some(record) = records.next()? {
        check_record(&record, &header, file, file_len)?;
    }
    if records.crc != header.records_crc {
        return Err(Refusal::Backup(
            "its records do not fit their checksum".to_owned(),
        ));
    }
    put_back(backup, &header, file, file_len)
}

fn put_back(
    backup: &dyn Storage,
    header: &Header,
    file: &dyn Storage,
    file_len: u64,
) -> Result<u64, Refusal> {
    file.sync().map_err(Refusal::FileIo)?;
    if file_len < header.file_len {
        file.set_len(header.file_len).map_err(Refusal::FileIo)?;
    }
    let mut count = 0_u64;
    let mut step = None;
    let mut run = Run::default();
    let mut records = Records::new(backup, header);
    while let Some(record) = records.next()? {
        let at = place_of(record.sector);
        let mut now = vec![0; record.old.len()];
        file.read_exact_at(&mut now, at).map_err(Refusal::FileIo)?;
        if now == record.old {
            continue;
        }
        let is_next_step = step.is_some_and(|step| step != record.step);
        if is_next_step || !run.goes_on_at(at) {
            run.write(file).map_err(Refusal::FileIo)?;
            run.at = at;
        }
        if is_next_step {
            // The steps of the repair in the opposite order, each durable before the next.
            file.sync().map_err(Refusal::FileIo)?;
        }
        step = Some(record.step);
        run.bytes.extend(&record.old);
        count = count.saturating_add(1);
    }
    let mut finish = || -> io::Result<()> {
        run.write(file)?;
        file.sync()?;
        if file.len()? != header.file_len {
            file.set_len(header.file_len)?;
            file.sync()?;
        }
        Ok(())
    };
    finish().map_err(Refusal::FileIo)?;
    Ok(count)
}

/// Sectors that lie one behind the other, to be written at once.
#[derive(Default)]
struct Run {
    at: FileOffset,
    bytes: Vec<u8>,
}

impl Run {
    /// Whether what lies at `at` may follow.
    fn goes_on_at(&self, at: FileOffset) -> bool {
        let len = u64_from(self.bytes.len());
        len < PIECE && self.at.plus(len) == at
    }

    fn write(&mut self, file: &dyn Storage) -> io::Result<()> {
        if !self.bytes.is_empty() {
            file.write_all_at(&self.bytes, self.at)?;
            self.bytes.clear();
        }
        Ok(())
    }
}

fn read_header(backup: &dyn Storage) -> Result<Header, Refusal> {
    let len = backup.len().map_err(Refusal::BackupIo)?;
    if len < HEADER_LEN {
        return Err(Refusal::Backup(format!("it has only {len} bytes")));
    }
    let mut bytes = [0; 64];
    (backup.read_exact_at(&mut bytes, FileOffset::new(0))).map_err(Refusal::BackupIo)?;
    let header = Header::parse(&bytes).map_err(|reason| Refusal::Backup(reason.to_owned()))?;
    let expected = HEADER_LEN.checked_add(header.records_len);
    if expected != Some(len) {
        return Err(Refusal::Backup(format!(
            "it has {len} bytes, and its header says {} and {HEADER_LEN}",
            header.records_len
        )));
    }
    let (shortest, longest) = header.lengths;
    if !(shortest..=longest).contains(&header.file_len) || i64::try_from(longest).is_err() {
        return Err(Refusal::Backup(
            "the lengths in it contradict each other".to_owned(),
        ));
    }
    Ok(header)
}

/// That the record lies in the file that its header describes, and that `file` has it in one of the
/// states that it had, or not at all.
fn check_record(
    record: &Record,
    header: &Header,
    file: &dyn Storage,
    file_len: u64,
) -> Result<(), Refusal> {
    let at = place_of(record.sector);
    let len = u64_from(record.old.len());
    let room = header.file_len.saturating_sub(at.get());
    if len == 0 || len != room.min(SECTOR_SIZE) {
        let sector = record.sector;
        return Err(Refusal::Backup(format!(
            "its sector {sector} is not in the file"
        )));
    }
    let there = file_len.saturating_sub(at.get()).min(SECTOR_SIZE);
    let mut now = vec![0; usize_from(there)];
    if !now.is_empty() {
        (file.read_exact_at(&mut now, at)).map_err(Refusal::FileIo)?;
    }
    let crc = checksum_of(&now);
    // What was cut off is not there, or reads as zeros where restoring it was interrupted.
    let was_cut = at.get().saturating_add(SECTOR_SIZE) > header.lengths.0
        && now.iter().all(|byte| *byte == 0);
    let is_known = was_cut || crc == checksum_of(&record.old) || record.versions.contains(&crc);
    if is_known {
        return Ok(());
    }
    Err(Refusal::File(format!(
        "at file offset {at} it holds neither what was there before the repair nor what the repair \
         wrote"
    )))
}

/// The records of a backup, one after the other.
struct Records<'a> {
    backup: &'a dyn Storage,
    /// Where to read on, and how much is left.
    at: FileOffset,
    left: u64,
    buffer: Vec<u8>,
    taken: usize,
    /// The checksum of what was read so far.
    crc: u32,
}

impl<'a> Records<'a> {
    fn new(backup: &'a dyn Storage, header: &Header) -> Self {
        Self {
            backup,
            at: FileOffset::new(HEADER_LEN),
            left: header.records_len,
            buffer: Vec::new(),
            taken: 0,
            crc: 0,
        }
    }

    fn next(&mut self) -> Result<Option<Record>, Refusal> {
        if self.left == 0 && self.taken == self.buffer.len() {
            return Ok(None);
        }
        let sector = u64::from_le_bytes(self.array()?);
        let step = u32::from_le_bytes(self.array()?);
        let count = u16::from_le_bytes(self.array()?);
        let len = u16::from_le_bytes(self.array()?);
        let mut versions = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            versions.push(u32::from_le_bytes(self.array()?));
        }
        let old = self.take(usize::from(len))?.to_owned();
        Ok(Some(Record {
            sector,
            step,
            versions,
            old,
        }))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    /// The next `len` bytes: at most 65535.
    fn take(&mut self, len: usize) -> Result<&[u8], Refusal> {
        if self.buffer.len().saturating_sub(self.taken) < len {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            let more = self.left.min(PIECE);
            let old = self.buffer.len();
            self.buffer.resize(old.saturating_add(usize_from(more)), 0);
            let place = &mut self.buffer[old..];
            (self.backup.read_exact_at(place, self.at)).map_err(Refusal::BackupIo)?;
            self.crc = crc32c::crc32c_append(self.crc, place);
            self.at = self.at.plus(more);
            self.left = self.left.saturating_sub(more);
        }
        let end = self.taken.saturating_add(len);
        let found = self.buffer.get(self.taken..end);
        let found =
            found.ok_or_else(|| Refusal::Backup("its last record is cut off".to_owned()))?;
        self.taken = end;
        Ok(found)
    }
}
