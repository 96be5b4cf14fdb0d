//! Volumes built by hand, of 1024-byte clusters.

use std::ops::Range;

use super::super::boot::checksum;
use crate::guest::Volume;
use crate::guest::clusters::memory::read_with;

pub(super) const SECTOR: usize = 512;
pub(super) const CLUSTER: usize = 1024;
pub(super) const COUNT: u32 = 101;
pub(super) const TABLES: [usize; 2] = [24 * SECTOR, 25 * SECTOR];
pub(super) const HEAP: usize = 26 * SECTOR;
pub(super) const END: u32 = 0xffff_ffff;
/// Clusters of the bitmaps; the second one's, of the root and of the folder `D`.
pub(super) const BITMAPS: [u32; 2] = [2, 5];
pub(super) const ROOT: [u32; 2] = [4, 8];
pub(super) const D: u32 = 30;
/// All that is in use.
pub(super) const USED: [Range<u32>; 7] = [2..5, 7..9, 10..13, 20..23, 30..32, 33..36, 50..51];

#[derive(Clone)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) fats: u8,
}

impl Image {
    pub(super) fn filled() -> Self {
        Self::with_fats(1)
    }

    pub(super) fn with_fats(fats: u8) -> Self {
        let len = HEAP + usize::try_from(COUNT).unwrap() * CLUSTER;
        // Less than a cluster stays at the end.
        let mut image = Self {
            bytes: vec![0; len + SECTOR + 7],
            fats,
        };
        image.put(0, &[0xeb, 0x76, 0x90]);
        image.put(3, b"EXFAT   ");
        let sectors = u64::try_from(len / SECTOR).unwrap() + 1;
        image.put(72, &sectors.to_le_bytes());
        for (at, number) in [(80, 24), (84, 1), (88, 26), (92, COUNT), (96, ROOT[0])] {
            image.put(at, &u32::to_le_bytes(number));
        }
        image.put(104, &[0, 1, 0, 0, 9, 1, fats, 0x80]);
        image.put(510, &[0x55, 0xaa]);
        image.fill();
        image.seal();
        image
    }

    /// Checksums and backup of the boot region.
    pub(super) fn seal(&mut self) {
        let sum = checksum(&self.bytes[..11 * SECTOR]).to_le_bytes();
        self.put(11 * SECTOR, &sum.repeat(SECTOR / 4));
        self.bytes.copy_within(..12 * SECTOR, 12 * SECTOR);
    }

    pub(super) fn fill(&mut self) {
        self.link(0, 0xffff_fff8);
        self.link(1, END);
        let chains: [&[u32]; 7] = [&[2], &[3, 7], &ROOT, &[10, 12, 11], &[33], &[34], &[5]];
        for chain in chains {
            for pair in chain.windows(2) {
                self.link(pair[0], pair[1]);
            }
            self.link(*chain.last().unwrap(), END);
        }
        // What the table says of clusters in no chain means nothing.
        for (cluster, value) in [(20, 10), (21, 0), (22, 77), (60, 4), (61, 0xffff_fff0)] {
            self.link(cluster, value);
        }
        for run in USED {
            run.for_each(|cluster| self.mark(cluster, true));
        }
        if self.fats == 2 {
            self.mark(BITMAPS[1], true);
        }
        let root = [Self::cluster(ROOT[0]), Self::cluster(ROOT[1])];
        let bitmap = |id, cluster| raw(0x81, id, 0, cluster, 13);
        self.put(root[0], &raw(0x83, 3, 0, 0, 0));
        self.put(root[0] + 32, &raw(0xa0, 0, 0, 0x1234, 0x5678));
        self.seal_set(root[0] + 32);
        self.put(root[0] + 64, &bitmap(0, 2));
        self.put(root[0] + 96, &raw(0x82, 0, 0, 3, 1500));
        self.file(root[0] + 128, 0x20, raw(0xc0, 1, 2500, 10, 2500));
        self.file(root[0] + 224, 0x20, raw(0xc0, 3, 1, 20, 3000));
        self.file(root[0] + 320, 0x20, raw(0xc0, 1, 0, 0, 0));
        for at in (root[0] + 416..root[0] + 512).step_by(32) {
            self.put(at, &raw(0x45, 2, 0, 70, 1000));
        }
        // The next one continues in the root's next cluster.
        for at in (root[0] + 512..root[0] + CLUSTER - 32).step_by(32) {
            self.put(at, &[1; 32]);
        }
        let mut folder = [
            raw(0x85, 2, 0x10, 0, 0),
            raw(0xc0, 3, 2048, D, 2048),
            raw(0xc1, 0, 0, 0, 0),
        ];
        folder[0][4] = 0x10;
        self.put(root[0] + CLUSTER - 32, &folder[0]);
        self.put(root[1], &folder[1..].concat());
        let all = folder.concat();
        self.put(root[0] + CLUSTER - 30, &set_checksum(&all).to_le_bytes());
        if self.fats == 2 {
            self.put(root[1] + 64, &bitmap(1, 5));
        }
        let d = Self::cluster(D);
        self.file(d + 1024, 0x20, raw(0xc0, 1, 0, 33, 1024));
        (0..d + 1024 - d)
            .step_by(32)
            .for_each(|at| self.put(d + at, &[2; 32]));
        self.put(d + 1024, &[0x85, 3]);
        self.put(d + 1120, &raw(0xe1, 3, 0, 35, 10));
        self.seal_set(d + 1024);
        self.file(d + 1152, 0x10, raw(0xc0, 1, 1024, 34, 1024));
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn cluster(number: u32) -> usize {
        HEAP + usize::try_from(number - 2).unwrap() * CLUSTER
    }

    pub(super) fn link(&mut self, cluster: u32, next: u32) {
        let at = usize::try_from(cluster).unwrap() * 4;
        for table in &TABLES[..usize::from(self.fats)] {
            self.put(table + at, &next.to_le_bytes());
        }
    }

    pub(super) fn mark(&mut self, cluster: u32, used: bool) {
        let at = usize::try_from(cluster - 2).unwrap();
        for bitmap in &BITMAPS[..usize::from(self.fats)] {
            let byte = &mut self.bytes[Self::cluster(*bitmap) + at / 8];
            *byte = *byte & !(1 << (at % 8)) | u8::from(used) << (at % 8);
        }
    }

    /// Puts a file's set of three.
    pub(super) fn file(&mut self, at: usize, attributes: u8, stream: [u8; 32]) {
        let mut first = raw(0x85, 2, 0, 0, 0);
        first[4] = attributes;
        self.put(at, &[first, stream, raw(0xc1, 0, 0, 0, 0)].concat());
        self.seal_set(at);
    }

    /// The checksum of the set at `at`.
    pub(super) fn seal_set(&mut self, at: usize) {
        let len = 32 * (usize::from(self.bytes[at + 1]) + 1);
        let sum = set_checksum(&self.bytes[at..at + len]).to_le_bytes();
        self.put(at + 2, &sum);
    }

    pub(super) fn read(&self) -> Result<Volume, String> {
        read_with(&self.bytes, super::super::read)
    }
}

/// An entry: type, count or flags, length that is valid, first cluster, length.
pub(super) fn raw(kind: u8, flags: u8, valid: u64, cluster: u32, len: u64) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[..2].copy_from_slice(&[kind, flags]);
    entry[8..16].copy_from_slice(&valid.to_le_bytes());
    entry[20..24].copy_from_slice(&cluster.to_le_bytes());
    entry[24..].copy_from_slice(&len.to_le_bytes());
    entry
}

pub(super) fn set_checksum(set: &[u8]) -> u16 {
    let bytes = set
        .iter()
        .enumerate()
        .filter(|(at, _)| !(2..4).contains(at));
    bytes.fold(0, |sum: u16, (_, byte)| {
        sum.rotate_right(1).wrapping_add(u16::from(*byte))
    })
}
