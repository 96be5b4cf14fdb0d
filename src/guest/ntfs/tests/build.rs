//! A small NTFS volume, built by hand, with every structure that is read.
//!
//! ```text
//! cluster  0     4       12     16    20      64       128   140..180, 200  255
//!          $Boot $MFT(1) bitmaps root $MFT(2) $LogFile mirror files          part of one, boot copy
//! ```

use std::ops::Range;

use crate::guest::Source;
use crate::guest::ntfs::record::undo_fixups;
use crate::units::{low_u8, low_u32, u64_from, usize_from};

pub(super) const CLUSTER: u64 = 4096;
pub(super) const RECORD: u64 = 1024;
/// Whole clusters of the volume; half of one and the copy of the boot sector follow.
pub(super) const CLUSTERS: u64 = 255;
/// Where the parts lie.
pub(super) const MFT: [Range<u64>; 2] = [4..8, 20..24];
pub(super) const MFT_BITMAP: u64 = 12;
pub(super) const BITMAP: u64 = 13;
pub(super) const LIST: u64 = 14;
pub(super) const ROOT: u64 = 16;
pub(super) const LOG: Range<u64> = 64..96;
pub(super) const MIRROR: u64 = 128;
/// In use without an owner.
pub(super) const LOST: Range<u64> = 210..212;
/// The file that lies in several records, and where.
pub(super) const SPLIT: [u64; 3] = [24, 25, 26];
pub(super) const HIBERNATION: u64 = 27;
/// What all files together own.
pub(super) const OWNED: [Range<u64>; 12] = [
    0..2,
    4..8,
    12..13,
    13..14,
    14..15,
    16..17,
    20..24,
    64..96,
    128..129,
    140..150,
    160..180,
    200..204,
];

/// The volume, as a disk of its own.
#[derive(Clone)]
pub(in super::super) struct Image {
    pub(in super::super) bytes: Vec<u8>,
}

impl Source for Image {
    fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }

    fn sector_size(&self) -> u64 {
        512
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let start = usize_from(offset);
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn utf16(name: &str) -> Vec<u8> {
    name.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// A reference to a record: the sequence numbers here are the record's number plus 1.
pub(super) fn reference(number: u64) -> u64 {
    number | (number + 1) << 48
}

/// An attribute whose value lies in the record.
pub(super) fn resident(kind: u32, instance: u8, name: &str, value: &[u8]) -> Vec<u8> {
    let name = utf16(name);
    let value_at = (24 + name.len()).next_multiple_of(8);
    let mut bytes = vec![0; (value_at + value.len()).next_multiple_of(8)];
    head(&mut bytes, kind, instance, &name, 24);
    put(
        &mut bytes,
        16,
        &low_u32(u64_from(value.len())).to_le_bytes(),
    );
    bytes[20] = low_u8(u64_from(value_at));
    put(&mut bytes, value_at, value);
    bytes
}

fn head(bytes: &mut [u8], kind: u32, instance: u8, name: &[u8], name_at: usize) {
    put(bytes, 0, &kind.to_le_bytes());
    put(bytes, 4, &low_u32(u64_from(bytes.len())).to_le_bytes());
    bytes[9] = low_u8(u64_from(name.len() / 2));
    bytes[10] = low_u8(u64_from(name_at));
    bytes[14] = instance;
    put(bytes, name_at, name);
}

/// An attribute whose value lies in clusters: `(first, clusters)`, of a hole `(0, clusters)`.
pub(super) fn mapped(
    kind: u32,
    instance: u8,
    name: &str,
    from: u64,
    runs: &[(u64, u64)],
    sizes: [u64; 2],
) -> Vec<u8> {
    let name = utf16(name);
    let (mut pairs, mut last, mut next) = (Vec::new(), 0, from);
    for (lcn, count) in runs {
        next += count;
        pairs.extend([
            if *lcn == 0 { 0x02 } else { 0x22 },
            low_u8(*count),
            low_u8(count >> 8),
        ]);
        if *lcn != 0 {
            let delta = lcn.wrapping_sub(last);
            pairs.extend([low_u8(delta), low_u8(delta >> 8)]);
            last = *lcn;
        }
    }
    pairs.push(0);
    let pairs_at = (64 + name.len()).next_multiple_of(8);
    let mut bytes = vec![0; (pairs_at + pairs.len()).next_multiple_of(8)];
    head(&mut bytes, kind, instance, &name, 64);
    bytes[8] = 1;
    put(&mut bytes, 16, &from.to_le_bytes());
    put(&mut bytes, 24, &next.wrapping_sub(1).to_le_bytes());
    bytes[32] = low_u8(u64_from(pairs_at));
    let [all, size] = sizes;
    put(&mut bytes, 40, &(all * CLUSTER).to_le_bytes());
    put(&mut bytes, 48, &size.to_le_bytes());
    put(&mut bytes, 56, &size.to_le_bytes());
    put(&mut bytes, pairs_at, &pairs);
    bytes
}

/// The entry of an attribute list.
pub(super) fn entry(kind: u32, from: u64, holder: u64, instance: u8) -> Vec<u8> {
    let mut bytes = vec![0; 32];
    put(&mut bytes, 0, &kind.to_le_bytes());
    bytes[4] = 32;
    bytes[7] = 26;
    put(&mut bytes, 8, &from.to_le_bytes());
    put(&mut bytes, 16, &reference(holder).to_le_bytes());
    bytes[24] = instance;
    bytes
}

/// A record, not yet protected.
fn record(number: u64, base: u64, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![0; usize_from(RECORD)];
    put(&mut bytes, 0, b"FILE");
    put(&mut bytes, 4, &[0x30, 0, 3, 0]);
    put(
        &mut bytes,
        0x10,
        &[low_u8(number + 1), 0, 1, 0, 0x38, 0, 1, 0],
    );
    put(&mut bytes, 0x1c, &low_u32(RECORD).to_le_bytes());
    put(&mut bytes, 0x20, &base.to_le_bytes());
    put(&mut bytes, 0x2c, &low_u32(number).to_le_bytes());
    let all = attributes.concat();
    put(&mut bytes, 0x38, &all);
    put(&mut bytes, 0x38 + all.len(), &[0xff; 4]);
    put(
        &mut bytes,
        0x18,
        &low_u32(u64_from(0x38 + all.len() + 8)).to_le_bytes(),
    );
    bytes
}

/// Protects what is written sector by sector.
pub(super) fn protect(bytes: &mut [u8]) {
    let at = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
    let number = [bytes[at].wrapping_add(1), 0x77];
    put(bytes, at, &number);
    for stride in 1..=bytes.len() / 512 {
        let end = stride * 512;
        bytes.copy_within(end - 2..end, at + 2 * stride);
        put(bytes, end - 2, &number);
    }
}

/// A restart page of the journal.
pub(super) fn restart(lsn: u8, version: u8, in_use: bool, clean: bool) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    put(&mut bytes, 0, b"RSTR");
    put(&mut bytes, 4, &[0x1e, 0, 9, 0]);
    put(&mut bytes, 16, &4096_u32.to_le_bytes());
    put(&mut bytes, 20, &4096_u32.to_le_bytes());
    put(&mut bytes, 24, &[0x30, 0, 2 - version, 0, version, 0]);
    bytes[0x30] = lsn;
    bytes[0x38] = 1;
    let client = if in_use { [0, 0] } else { [0xff, 0xff] };
    put(&mut bytes, 0x3c, &client);
    bytes[0x3e] = if clean { 2 } else { 0 };
    protect(&mut bytes);
    bytes
}

/// The value of a FILE_NAME.
pub(super) fn file_name(name: &str) -> Vec<u8> {
    let units = utf16(name);
    let mut bytes = vec![0; 0x42];
    bytes[0x40] = low_u8(u64_from(units.len() / 2));
    bytes.extend(units);
    bytes
}

/// A FILE_NAME, in the entry of an index.
pub(super) fn index_entry(number: u64, name: &str) -> Vec<u8> {
    let name = file_name(name);
    let mut bytes = vec![0; (16 + name.len()).next_multiple_of(8)];
    put(&mut bytes, 0, &reference(number).to_le_bytes());
    bytes[8] = low_u8(u64_from(bytes.len()));
    bytes[10] = low_u8(u64_from(name.len()));
    put(&mut bytes, 16, &name);
    bytes
}

/// The entries of an index node, with their head; `at` is where the first lies.
pub(super) fn index_entries(entries: &[Vec<u8>], at: u8) -> Vec<u8> {
    let last = [0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0];
    let all = [entries.concat(), last.to_vec()].concat();
    let mut bytes = vec![0; usize::from(at)];
    bytes[0] = at;
    put(
        &mut bytes,
        4,
        &low_u32(u64::from(at) + u64_from(all.len())).to_le_bytes(),
    );
    bytes.extend(all);
    bytes
}

impl Image {
    /// A volume that is clean. Its log was emptied; $MFT lies in two records and in two places, a file
    /// in three; another one has holes and a second stream.
    pub(super) fn new() -> Self {
        let mut image = Self {
            bytes: vec![0; usize_from(CLUSTERS * CLUSTER + CLUSTER / 2 + 512)],
        };
        image.boot();
        put(
            &mut image.bytes,
            usize_from(LOG.start * CLUSTER),
            &vec![0xff; usize_from(32 * CLUSTER)],
        );
        image.system_files();
        image.files();
        let mirrored =
            image.bytes[usize_from(MFT[0].start * CLUSTER)..][..usize_from(CLUSTER)].to_vec();
        put(&mut image.bytes, usize_from(MIRROR * CLUSTER), &mirrored);
        for range in OWNED.into_iter().chain([LOST]) {
            range.for_each(|lcn| image.mark(lcn, true));
        }
        image
    }

    fn boot(&mut self) {
        let mut boot = [0; 512];
        put(&mut boot, 3, b"NTFS    ");
        put(&mut boot, 11, &[0, 2, 8]);
        boot[21] = 0xf8;
        put(&mut boot, 0x28, &(CLUSTERS * 8 + 4).to_le_bytes());
        boot[0x30] = low_u8(MFT[0].start);
        boot[0x38] = low_u8(MIRROR);
        boot[0x40] = 0xf6;
        boot[0x44] = 1;
        put(&mut self.bytes, 0, &boot);
        let end = self.bytes.len() - 512;
        put(&mut self.bytes, end, &boot);
    }

    fn system_files(&mut self) {
        let list = [
            entry(0x80, 0, 0, 1),
            entry(0x80, 4, 15, 0),
            entry(0xb0, 0, 0, 2),
        ];
        let mft = [
            resident(0x20, 0, "", &list.concat()),
            mapped(0x80, 1, "", 0, &[(4, 4)], [8, 32 * RECORD]),
            mapped(0xb0, 2, "", 0, &[(MFT_BITMAP, 1)], [1, 8]),
        ];
        self.add(0, 0, &mft);
        self.add(
            15,
            reference(0),
            &[mapped(0x80, 0, "", 4, &[(20, 4)], [0, 0])],
        );
        self.add(
            1,
            0,
            &[mapped(0x80, 0, "", 0, &[(MIRROR, 1)], [1, CLUSTER])],
        );
        self.add(
            2,
            0,
            &[mapped(
                0x80,
                0,
                "",
                0,
                &[(LOG.start, 32)],
                [32, 32 * CLUSTER],
            )],
        );
        let version = [0, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0];
        self.add(3, 0, &[resident(0x70, 0, "", &version)]);
        self.add(4, 0, &[]);
        let entries = [index_entry(24, "split"), index_entry(28, "other")];
        let root = [
            vec![0x30, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0, 1, 0, 0, 0],
            index_entries(&entries, 16),
        ];
        let root = [
            resident(0x90, 0, "$I30", &root.concat()),
            mapped(0xa0, 1, "$I30", 0, &[(ROOT, 1)], [1, CLUSTER]),
        ];
        self.add(5, 0, &root);
        self.node(&[index_entry(29, "Also")]);
        self.add(6, 0, &[mapped(0x80, 0, "", 0, &[(BITMAP, 1)], [1, 32])]);
        self.add(7, 0, &[mapped(0x80, 0, "", 0, &[(0, 2)], [2, 8192])]);
        // Cluster 0 is written as a hole by `mapped`: here it is none.
        self.edit(7, |bytes| put(bytes, 0x38 + 64, &[0x11, 2, 0, 0]));
        let bad = mapped(
            0x80,
            0,
            "$Bad",
            0,
            &[(0, CLUSTERS)],
            [CLUSTERS, CLUSTERS * CLUSTER],
        );
        self.add(8, 0, &[bad]);
        put(&mut self.bytes, usize_from(BITMAP * CLUSTER) + 31, &[0x80]);
    }

    fn files(&mut self) {
        let [base, second, third] = SPLIT;
        let list = [
            entry(0x80, 0, base, 1),
            entry(0x80, 10, second, 0),
            entry(0x80, 20, third, 3),
        ];
        put(&mut self.bytes, usize_from(LIST * CLUSTER), &list.concat());
        let attributes = [
            mapped(0x20, 0, "", 0, &[(LIST, 1)], [1, 96]),
            mapped(0x80, 1, "", 0, &[(140, 10)], [30, 30 * CLUSTER]),
        ];
        self.add(base, 0, &attributes);
        self.add(
            second,
            reference(base),
            &[mapped(0x80, 0, "", 10, &[(170, 10)], [0, 0])],
        );
        self.add(
            third,
            reference(base),
            &[mapped(0x80, 3, "", 20, &[(160, 10)], [0, 0])],
        );
        let holes = [
            // So long that the next head lies across two sectors, where the fixups are.
            resident(0x100, 3, "", &[0x77; 424]),
            mapped(
                0x80,
                0,
                "",
                0,
                &[(200, 1), (0, 500), (203, 1), (0, 9)],
                [511, 511 * CLUSTER],
            ),
            mapped(0x80, 1, "stream", 0, &[(201, 2)], [2, 8000]),
            mapped(0x80, 2, "none", 0, &[], [0, 0]),
        ];
        self.add(28, 0, &holes);
        self.add(29, 0, &[resident(0x80, 0, "", b"small")]);
    }

    /// The byte where a record lies.
    pub(super) fn place(number: u64) -> usize {
        let half = 16;
        let [first, second] = MFT;
        usize_from(match number < half {
            true => first.start * CLUSTER + number * RECORD,
            false => second.start * CLUSTER + (number - half) * RECORD,
        })
    }

    /// Adds a record in use.
    pub(super) fn add(&mut self, number: u64, base: u64, attributes: &[Vec<u8>]) {
        let mut bytes = record(number, base, attributes);
        protect(&mut bytes);
        put(&mut self.bytes, Self::place(number), &bytes);
        self.mark_record(number, true);
    }

    /// Changes a record, and its copy where it has one.
    pub(super) fn edit(&mut self, number: u64, change: impl FnOnce(&mut [u8])) {
        let at = Self::place(number);
        let bytes = &mut self.bytes[at..at + usize_from(RECORD)];
        assert!(undo_fixups(bytes), "protected");
        change(bytes);
        protect(bytes);
        if number < 4 {
            let copy = usize_from(MIRROR * CLUSTER + number * RECORD);
            self.bytes.copy_within(at..at + usize_from(RECORD), copy);
        }
    }

    /// Writes the node of the root folder that lies outside its record.
    pub(super) fn node(&mut self, entries: &[Vec<u8>]) {
        let mut node = vec![0; usize_from(CLUSTER)];
        put(&mut node, 0, b"INDX");
        put(&mut node, 4, &[0x28, 0, 9, 0]);
        put(&mut node, 0x18, &index_entries(entries, 0x28));
        protect(&mut node);
        put(&mut self.bytes, usize_from(ROOT * CLUSTER), &node);
    }

    /// Writes the two restart pages of the log, and something behind them.
    pub(super) fn log(&mut self, first: &[u8], second: &[u8]) {
        let at = usize_from(LOG.start * CLUSTER);
        put(&mut self.bytes, at, first);
        put(&mut self.bytes, at + 4096, second);
        put(&mut self.bytes, at + 8192, b"RCRD");
    }

    /// Marks a cluster as in use or free.
    pub(super) fn mark(&mut self, lcn: u64, used: bool) {
        self.bit(BITMAP, lcn, used);
    }

    /// Marks a record as in use or free.
    pub(super) fn mark_record(&mut self, number: u64, used: bool) {
        self.bit(MFT_BITMAP, number, used);
    }

    fn bit(&mut self, bitmap: u64, index: u64, set: bool) {
        let byte = &mut self.bytes[usize_from(bitmap * CLUSTER + index / 8)];
        let bit = 1 << (index % 8);
        *byte = if set { *byte | bit } else { *byte & !bit };
    }
}
