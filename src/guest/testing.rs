//! Disks in memory, for the tests of this module.

use std::io;
use std::ops::Range;

use super::view::Source;
use crate::units::{low_u32, u64_from, usize_from};

/// A disk in memory, all zeros at first.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) bytes: Vec<u8>,
    pub(super) sector: u64,
    /// Where the host cannot read.
    pub(super) bad: Option<u64>,
}

impl Disk {
    pub(super) fn new(len: u64, sector: u64) -> Self {
        Self {
            bytes: vec![0; usize_from(len)],
            sector,
            bad: None,
        }
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[usize_from(at)..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }

    pub(super) fn sectors(&self) -> u64 {
        self.len() / self.sector
    }

    /// Writes an entry of a boot record in sector `record`: its place in the table, type, first sector
    /// and sectors.
    pub(super) fn mbr_entry(&mut self, record: u64, slot: u64, kind: u8, start: u64, count: u64) {
        let at = record * self.sector;
        self.put(at + 510, &[0x55, 0xaa]);
        let entry = at + 446 + 16 * slot;
        self.put(entry + 4, &[kind]);
        self.put(entry + 8, &low_u32(start).to_le_bytes());
        self.put(entry + 12, &low_u32(count).to_le_bytes());
    }

    /// Writes a GPT with these partitions: type, first sector and sectors; the backup at the end.
    pub(super) fn gpt(&mut self, partitions: &[([u8; 16], Range<u64>)]) {
        self.mbr_entry(0, 0, 0xee, 1, self.sectors() - 1);
        let entries = gpt_entries(partitions);
        let len = u64_from(entries.len()).div_ceil(self.sector);
        let last = self.sectors() - 1;
        self.put(2 * self.sector, &entries);
        self.put((last - len) * self.sector, &entries);
        self.gpt_header(1, last, 2, &entries);
        self.gpt_header(last, 1, last - len, &entries);
    }

    pub(super) fn gpt_header(&mut self, at: u64, other: u64, entries_at: u64, entries: &[u8]) {
        let len = u64_from(entries.len()).div_ceil(self.sector);
        let mut header = b"EFI PART\0\0\x01\0\x5c\0\0\0".to_vec();
        header.extend([0; 8]);
        for number in [at, other, 2 + len, self.sectors() - 2 - len] {
            header.extend(number.to_le_bytes());
        }
        header.extend([7; 16]);
        header.extend(entries_at.to_le_bytes());
        header.extend(low_u32(u64_from(entries.len()) / 128).to_le_bytes());
        header.extend(128_u32.to_le_bytes());
        header.extend(crc32fast::hash(entries).to_le_bytes());
        let crc = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        self.put(at * self.sector, &header);
    }
}

/// 128 entries, the first of them used.
pub(super) fn gpt_entries(partitions: &[([u8; 16], Range<u64>)]) -> Vec<u8> {
    let mut entries = vec![0; 128 * 128];
    for (entry, (kind, sectors)) in entries.chunks_exact_mut(128).zip(partitions) {
        entry[..16].copy_from_slice(kind);
        entry[16..32].fill(9);
        entry[32..40].copy_from_slice(&sectors.start.to_le_bytes());
        entry[40..48].copy_from_slice(&(sectors.end - 1).to_le_bytes());
    }
    entries
}

impl Source for Disk {
    fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }

    fn sector_size(&self) -> u64 {
        self.sector
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + u64_from(buf.len());
        if self.bad.is_some_and(|bad| range.contains(&bad)) {
            return Err(io::Error::other("bad sector"));
        }
        buf.copy_from_slice(&self.bytes[usize_from(range.start)..usize_from(range.end)]);
        Ok(())
    }
}

/// Numbers that look random, the same for the same seed.
pub(super) fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) % below
    }
}
