//! A small FAT16 file system, byte by byte, for what must not depend on installed programs.

use vhdfs::storage::sim::Random;

use super::size;

/// Bytes of a sector, and of a cluster.
pub(crate) const SECTOR: u64 = 512;
const FATS: u64 = 2;
const ROOT_SECTORS: u64 = 32;

/// Where everything in use holds zeros.
const ZEROS: std::ops::Range<u64> = 12 << 20..13 << 20;

/// A file system with one file that has all clusters that are in use, and junk in those that are not.
pub(crate) struct Fat {
    pub(crate) bytes: Vec<u8>,
    /// Whether each sector is free.
    pub(crate) free: Vec<bool>,
    /// Where the first allocation table is, in bytes.
    pub(crate) table: u64,
}

impl Fat {
    /// Of `len` bytes, which must make between 4,085 and 65,524 clusters of a sector.
    pub(crate) fn new(len: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let sectors = len / SECTOR;
        let fat_sectors = (sectors * 2).div_ceil(SECTOR);
        let data = 1 + FATS * fat_sectors + ROOT_SECTORS;
        let clusters = sectors - data;
        let mut bytes = vec![0; size(len)];
        for (place, byte) in bytes.iter_mut().enumerate().skip(size(data * SECTOR)) {
            *byte = u8::try_from(1 + (place / 512 * 7 + place) % 255).unwrap();
        }
        boot_sector(&mut bytes, sectors, fat_sectors);

        // Runs of clusters in use and free ones, some as long as a block.
        let mut used = Vec::new();
        let mut cluster = 0;
        while cluster < clusters {
            let longest = [8, 64, 4096][size(random.below(3))];
            let end = (cluster + 1 + random.below(longest)).min(clusters);
            if random.below(2) == 0 {
                used.extend(cluster..end);
                let (start, end) = ((data + cluster) * SECTOR, (data + end) * SECTOR);
                let (start, end) = (start.max(ZEROS.start), end.min(ZEROS.end));
                if start < end {
                    bytes[size(start)..size(end)].fill(0);
                }
            }
            cluster = end;
        }
        let mut free = vec![false; size(sectors)];
        free[size(data)..].fill(true);
        let mut table = vec![0_u8; size(fat_sectors * SECTOR)];
        table[..4].copy_from_slice(&[0xf8, 0xff, 0xff, 0xff]);
        for (place, cluster) in used.iter().enumerate() {
            free[size(data + cluster)] = false;
            let next = used.get(place + 1).map_or(0xffff, |next| next + 2);
            let at = size((cluster + 2) * 2);
            let next = u16::try_from(next).unwrap().to_le_bytes();
            table[at..at + 2].copy_from_slice(&next);
        }
        for number in 0..FATS {
            let at = size((1 + number * fat_sectors) * SECTOR);
            bytes[at..at + table.len()].copy_from_slice(&table);
        }
        let entry = &mut bytes[size((1 + FATS * fat_sectors) * SECTOR)..];
        entry[..12].copy_from_slice(b"ALL     BIN\x20");
        let first = used.first().map_or(0, |first| first + 2);
        entry[26..28].copy_from_slice(&u16::try_from(first).unwrap().to_le_bytes());
        let file = u32::try_from(used.len()).unwrap() * 512;
        entry[28..32].copy_from_slice(&file.to_le_bytes());
        Self {
            bytes,
            free,
            table: SECTOR,
        }
    }

    /// The runs of free sectors, in bytes: start and length.
    pub(crate) fn free_runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (at, _) in (0..)
            .step_by(512)
            .zip(&self.free)
            .filter(|(_, free)| **free)
        {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == at => *len += SECTOR,
                _ => runs.push((at, SECTOR)),
            }
        }
        runs
    }

    /// The first sector that is in use and not as it was, of what a disk reads as.
    pub(crate) fn first_difference(&self, found: &[u8]) -> Option<u64> {
        let sectors = self.bytes.chunks(512).zip(found.chunks(512));
        (0..)
            .zip(sectors.zip(&self.free))
            .find_map(|(number, ((own, found), free))| (!free && own != found).then_some(number))
    }
}

fn boot_sector(bytes: &mut [u8], sectors: u64, fat_sectors: u64) {
    bytes[..11].copy_from_slice(b"\xeb\x3c\x90mkfs.fat");
    bytes[11..13].copy_from_slice(&512_u16.to_le_bytes());
    bytes[13] = 1;
    bytes[14] = 1;
    bytes[16] = 2;
    bytes[17..19].copy_from_slice(&512_u16.to_le_bytes());
    match u16::try_from(sectors) {
        Ok(sectors) => bytes[19..21].copy_from_slice(&sectors.to_le_bytes()),
        Err(_) => bytes[32..36].copy_from_slice(&u32::try_from(sectors).unwrap().to_le_bytes()),
    }
    bytes[21] = 0xf8;
    bytes[22..24].copy_from_slice(&u16::try_from(fat_sectors).unwrap().to_le_bytes());
    bytes[24] = 32;
    bytes[26] = 2;
    bytes[36] = 0x80;
    bytes[38] = 0x29;
    bytes[43..62].copy_from_slice(b"NO NAME    FAT16   ");
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
}
