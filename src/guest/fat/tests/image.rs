//! Volumes built by hand, of 512-byte clusters.

use super::super::boot::Kind;
use crate::guest::Volume;
use crate::guest::clusters::memory::{Memory, read_with};
use crate::guest::view::View;

pub(super) const SECTOR: usize = 512;
pub(super) const KINDS: [Kind; 3] = [Kind::Fat12, Kind::Fat16, Kind::Fat32];

/// A volume of one-sector clusters.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) kind: Kind,
    pub(super) bytes: Vec<u8>,
    /// First sectors.
    pub(super) tables: [usize; 2],
    pub(super) root: usize,
    pub(super) heap: usize,
    pub(super) clusters: usize,
}

impl Image {
    /// Nothing but the root.
    pub(super) fn empty(kind: Kind) -> Self {
        // FAT32 with so few clusters is not by the book, but read by all.
        let clusters = if kind == Kind::Fat16 { 4300 } else { 101 };
        let (reserved, table, root) = match kind {
            Kind::Fat12 => (1, 1, 2),
            Kind::Fat16 => (1, 17, 2),
            Kind::Fat32 => (8, 1, 0),
        };
        let tables = [reserved, reserved + table];
        let heap = reserved + 2 * table + root;
        // Less than a cluster stays at the end.
        let mut image = Self {
            kind,
            bytes: vec![0; (heap + clusters) * SECTOR + 100],
            tables,
            root: if root == 0 { heap } else { heap - root },
            heap,
            clusters,
        };
        let total = u32::try_from(heap + clusters).unwrap();
        image.put(0, &[0xeb, 0x3c, 0x90]);
        image.put(3, b"by hand ");
        image.put(0x0b, &[0x00, 0x02, 1, reserved.to_le_bytes()[0], 0, 2]);
        image.put(0x15, &[0xf8]);
        image.put(0x20, &total.to_le_bytes());
        image.put(0x1fe, &[0x55, 0xaa]);
        if kind == Kind::Fat32 {
            image.put(0x24, &[1, 0, 0, 0]);
            image.put(0x2c, &[2]);
            image.put(0x30, &[1, 0, 6, 0]);
            image.put(0x42, &[0x29]);
            image.put(0x52, b"FAT32   ");
            image.bytes.copy_within(..SECTOR, 6 * SECTOR);
            image.link(2, image.end());
        } else {
            image.put(0x11, &[32]);
            image.put(0x16, &table.to_le_bytes()[..2]);
            image.put(0x26, &[0x29]);
            image.put(
                0x36,
                if kind == Kind::Fat12 {
                    b"FAT12   "
                } else {
                    b"FAT16   "
                },
            );
        }
        image.link(0, image.end() & !0xff | 0xf8);
        image.link(1, image.end());
        image
    }

    /// What [`Self::USED`] says, and free clusters.
    pub(super) fn filled(kind: Kind) -> Self {
        let mut image = Self::empty(kind);
        let end = image.end();
        let links = [
            (4, 5),
            (5, 9),
            (9, end),
            (10, end),
            (11, end),
            (12, end),
            (13, end),
        ];
        for (cluster, next) in links {
            image.link(cluster, next);
        }
        image.link(20, end - 8);
        image.link(30, 31);
        image.link(31, end - 3);
        let root = image.root * SECTOR;
        image.entry(root, 0, b"LABEL      ", 0x08, 0, 0);
        image.entry(root, 1, b"Al\0o\0n\0g\0 \0", 0x0f, 99, 99);
        image.entry(root, 2, b"A       TXT", 0x20, 4, 1100);
        image.entry(root, 3, b"EMPTY      ", 0x20, 0, 0);
        image.entry(root, 4, b"\xe5ELETED    ", 0x20, 40, 900);
        image.entry(root, 5, b"D          ", 0x10, 10, 0);
        image.entry(root, 7, b"BEYOND     ", 0x20, 50, 1);
        image.folder(10, 0);
        image.entry(image.cluster(10), 2, b"B          ", 0x20, 11, 512);
        image.entry(image.cluster(10), 3, b"E          ", 0x10, 12, 0);
        image.folder(12, 10);
        image.entry(image.cluster(12), 2, b"C          ", 0x20, 13, 0);
        image
    }

    /// Clusters of a filled one that are not free, but for the root of FAT32.
    pub(super) const USED: [usize; 10] = [4, 5, 9, 10, 11, 12, 13, 20, 30, 31];

    pub(super) fn end(&self) -> u32 {
        match self.kind {
            Kind::Fat12 => 0xfff,
            Kind::Fat16 => 0xffff,
            Kind::Fat32 => 0x0fff_ffff,
        }
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn cluster(&self, number: usize) -> usize {
        (self.heap + number - 2) * SECTOR
    }

    pub(super) fn link(&mut self, cluster: usize, next: u32) {
        for table in self.tables {
            self.link_in(table, cluster, next);
        }
    }

    pub(super) fn link_in(&mut self, table: usize, cluster: usize, next: u32) {
        let start = table * SECTOR;
        let bytes = next.to_le_bytes();
        match self.kind {
            Kind::Fat12 => {
                let at = start + cluster * 3 / 2;
                let old = u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]);
                let next = u16::from_le_bytes([bytes[0], bytes[1]]);
                let new = match cluster % 2 {
                    0 => old & 0xf000 | next,
                    _ => old & 0x000f | next << 4,
                };
                self.put(at, &new.to_le_bytes());
            }
            Kind::Fat16 => self.put(start + cluster * 2, &bytes[..2]),
            // The highest bits are nobody's.
            Kind::Fat32 => {
                let odd = (next | 0xa000_0000).to_le_bytes();
                self.put(start + cluster * 4, &odd);
            }
        }
    }

    pub(super) fn entry(
        &mut self,
        at: usize,
        number: usize,
        name: &[u8; 11],
        kind: u8,
        first: u32,
        len: u32,
    ) {
        let mut entry = [0; 32];
        entry[..11].copy_from_slice(name);
        entry[11] = kind;
        let first = first.to_le_bytes();
        entry[20..22].copy_from_slice(&first[2..]);
        entry[26..28].copy_from_slice(&first[..2]);
        entry[28..].copy_from_slice(&len.to_le_bytes());
        self.put(at + number * 32, &entry);
    }

    pub(super) fn folder(&mut self, cluster: u32, parent: u32) {
        let at = self.cluster(usize::try_from(cluster).unwrap());
        self.entry(at, 0, b".          ", 0x10, cluster, 0);
        self.entry(at, 1, b"..         ", 0x10, parent, 0);
    }

    pub(super) fn read(&self) -> Result<Volume, String> {
        read_with(&self.bytes, super::super::read)
    }

    pub(super) fn name(&self) -> Option<&'static str> {
        let memory = Memory(&self.bytes);
        super::super::is_here(&View::whole(&memory)).unwrap()
    }

    /// Says why it is not read.
    pub(super) fn refused(&self) -> String {
        self.read().expect_err("refused")
    }
}
