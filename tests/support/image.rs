//! VHD files made and judged without the crate: a second reading of the format.

use std::collections::BTreeMap;

use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::FileOffset;

use super::{len, size};

const SECTOR: u64 = 512;
const UNUSED: u32 = u32::MAX;
const HEADER_AT: u64 = 512;
/// Where the block table lies.
pub(crate) const TABLE_AT: u64 = 1536;

/// A slot of an image to build, in the order of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    /// The block that it holds.
    pub(crate) block: u64,
    /// Bytes of nothing before its bitmap: a multiple of 512.
    pub(crate) gap: u64,
}

/// How blocks lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// As QEMU does: one after the other from the end of the table.
    Packed,
    /// As Windows does: data on 4 KiB, the footer at the end of a 4 KiB block.
    Aligned,
    /// As Xen does: 3584 bytes of gap before each bitmap.
    Xen,
    /// Gaps of every size, some of them larger than a block.
    Gapped,
}

/// A dynamic VHD to build.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// Bytes of data in a block.
    pub(crate) block_size: u64,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// Entries of the table beyond what the disk needs.
    pub(crate) spare_entries: u64,
    /// The slots.
    pub(crate) slots: Vec<Slot>,
    /// Whether the bitmaps name only the sectors that hold data, and the others hold junk. Else
    /// they name all.
    pub(crate) exact: bool,
    /// Bytes between the last slot and the footer.
    pub(crate) tail: u64,
}

impl Image {
    /// `blocks`, in the order of the file, laid out in `style`.
    pub(crate) fn new(block_size: u64, disk_len: u64, style: Style, blocks: &[u64]) -> Self {
        let bitmap = bitmap_size(block_size);
        let mut image = Self {
            block_size,
            disk_len,
            spare_entries: 0,
            slots: Vec::new(),
            exact: false,
            tail: 0,
        };
        if style == Style::Gapped {
            image.spare_entries = 130;
        }
        let mut at = image.floor();
        for (n, &block) in blocks.iter().enumerate() {
            let align = |gap: u64| {
                let bitmap_end = at + gap + bitmap;
                gap + (bitmap_end.next_multiple_of(4096) - bitmap_end)
            };
            let gap = match style {
                Style::Packed => 0,
                Style::Aligned => align(0),
                Style::Xen => align(3584),
                Style::Gapped => [512, 0, block_size + 5 * 512, 3584, 2 * block_size][n % 5],
            };
            image.slots.push(Slot { block, gap });
            at += gap + bitmap + block_size;
        }
        if style == Style::Aligned {
            image.tail = (at + SECTOR).next_multiple_of(4096) - SECTOR - at;
        }
        image
    }

    fn entries(&self) -> u64 {
        self.disk_len.div_ceil(self.block_size) + self.spare_entries
    }

    /// The end of the table.
    fn floor(&self) -> u64 {
        TABLE_AT + (self.entries() * 4).next_multiple_of(SECTOR)
    }

    /// The file, durable, with `fill` called for the data of each slot's block. Gaps hold junk.
    pub(crate) fn build(&self, mut fill: impl FnMut(u64, &mut [u8])) -> SimStorage {
        let mut table = vec![UNUSED; size(self.entries().next_multiple_of(128))];
        let mut at = self.floor();
        let sim = SimStorage::new();
        let write = |bytes: &[u8], at: u64| sim.write_all_at(bytes, FileOffset::new(at)).unwrap();
        for slot in &self.slots {
            write(&vec![0xa5; size(slot.gap)], at);
            at += slot.gap;
            table[size(slot.block)] = u32::try_from(at / SECTOR).unwrap();
            let mut data = vec![0; size(self.block_size)];
            fill(slot.block, &mut data);
            let mut bitmap = vec![0xff; size(bitmap_size(self.block_size))];
            if self.exact {
                leave_out_zeros(&mut bitmap, &mut data);
            }
            write(&bitmap, at);
            at += len(&bitmap);
            write(&data, at);
            at += self.block_size;
        }
        at += self.tail;
        let footer = footer(self.disk_len);
        write(&footer, 0);
        write(&header(self.entries(), self.block_size), HEADER_AT);
        let table: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        write(&table, TABLE_AT);
        write(&footer, at);
        sim.sync().unwrap();
        sim
    }
}

/// Takes the sectors of zeros out of the bitmap, and fills them with what nobody may read.
fn leave_out_zeros(bitmap: &mut [u8], data: &mut [u8]) {
    for (n, sector) in data.chunks_mut(512).enumerate() {
        if sector.iter().all(|&byte| byte == 0) {
            bitmap[n / 8] &= !(0x80 >> (n % 8));
            sector.fill(0xd5);
        }
    }
}

/// Bytes of a block's sector bitmap.
pub(crate) fn bitmap_size(block_size: u64) -> u64 {
    (block_size / SECTOR / 8).next_multiple_of(SECTOR)
}

/// The ones' complement of the sum of all bytes, but for the four of the field itself.
fn checksum(bytes: &[u8], field: usize) -> u32 {
    let outside = |n: usize| !(field..field + 4).contains(&n);
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(n, _)| outside(*n))
        .map(|(_, &b)| u32::from(b));
    !sum.sum::<u32>()
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn footer(disk_len: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    put(&mut bytes, 0, b"conectix");
    put(&mut bytes, 8, &2u32.to_be_bytes());
    put(&mut bytes, 12, &0x0001_0000u32.to_be_bytes());
    put(&mut bytes, 16, &HEADER_AT.to_be_bytes());
    put(&mut bytes, 28, b"win ");
    put(&mut bytes, 32, &0x000a_0000u32.to_be_bytes());
    put(&mut bytes, 36, b"Wi2k");
    put(&mut bytes, 40, &disk_len.to_be_bytes());
    put(&mut bytes, 48, &disk_len.to_be_bytes());
    // Small enough for any size: nobody looks at it where the creator is Windows.
    put(&mut bytes, 56, &[0, 1, 4, 17]);
    put(&mut bytes, 60, &3u32.to_be_bytes());
    put(&mut bytes, 68, &[7; 16]);
    let sum = checksum(&bytes, 64);
    put(&mut bytes, 64, &sum.to_be_bytes());
    bytes
}

fn header(entries: u64, block_size: u64) -> [u8; 1024] {
    let mut bytes = [0; 1024];
    put(&mut bytes, 0, b"cxsparse");
    put(&mut bytes, 8, &u64::MAX.to_be_bytes());
    put(&mut bytes, 16, &TABLE_AT.to_be_bytes());
    put(&mut bytes, 24, &0x0001_0000u32.to_be_bytes());
    put(
        &mut bytes,
        28,
        &u32::try_from(entries).unwrap().to_be_bytes(),
    );
    put(
        &mut bytes,
        32,
        &u32::try_from(block_size).unwrap().to_be_bytes(),
    );
    let sum = checksum(&bytes, 36);
    put(&mut bytes, 36, &sum.to_be_bytes());
    bytes
}

/// What a file looks like to another implementation.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// Whether the footer at the end is valid. If not, the copy at the start is.
    pub(crate) trailing_footer: bool,
    /// The file's length.
    pub(crate) file_len: u64,
    /// Bytes of a slot, bitmap included.
    pub(crate) slot_len: u64,
    /// Where the first slot may start.
    pub(crate) floor: u64,
    /// File offset of each block's bitmap.
    pub(crate) blocks: BTreeMap<u64, u64>,
}

impl View {
    /// Reads the structures of the file.
    ///
    /// # Errors
    /// What another implementation would stumble over: no valid footer, a bad header, blocks that
    /// overlap or reach beyond the end.
    pub(crate) fn read(storage: &dyn Storage) -> Result<Self, String> {
        let file_len = storage.len().unwrap();
        let read = |at: u64, count: u64| -> Result<Vec<u8>, String> {
            let mut bytes = vec![0; size(count)];
            let result = storage.read_exact_at(&mut bytes, FileOffset::new(at));
            result.map_err(|error| format!("reading {count} bytes at {at:#x}: {error}"))?;
            Ok(bytes)
        };
        let valid =
            |bytes: &[u8]| bytes.starts_with(b"conectix") && be32(bytes, 64) == checksum(bytes, 64);
        let trailing = read(file_len.saturating_sub(SECTOR), SECTOR)?;
        let leading = read(0, SECTOR)?;
        let trailing_footer = valid(&trailing);
        if !valid(&leading) {
            return Err("the footer's copy at the start is not valid".into());
        }
        if trailing_footer && trailing != leading {
            return Err("the two footers differ".into());
        }
        let header = read(HEADER_AT, 1024)?;
        if !header.starts_with(b"cxsparse") || be32(&header, 36) != checksum(&header, 36) {
            return Err("the dynamic header is not valid".into());
        }
        let (entries, block_size) = (be32(&header, 28), u64::from(be32(&header, 32)));
        let slot_len = bitmap_size(block_size) + block_size;
        let floor = TABLE_AT + (u64::from(entries) * 4).next_multiple_of(SECTOR);
        let table = read(TABLE_AT, floor - TABLE_AT)?;
        let entry = |n: u32| (u64::from(n), be32(&table, size(u64::from(n)) * 4));
        let used = (0..entries)
            .map(entry)
            .filter(|(_, entry)| *entry != UNUSED);
        let blocks = used
            .map(|(n, entry)| (n, u64::from(entry) * SECTOR))
            .collect();
        let view = Self {
            trailing_footer,
            file_len,
            slot_len,
            floor,
            blocks,
        };
        view.check_slots()?;
        Ok(view)
    }

    fn check_slots(&self) -> Result<(), String> {
        let end = self.file_len - if self.trailing_footer { SECTOR } else { 0 };
        let mut by_place: Vec<(u64, u64)> = self.blocks.iter().map(|(&n, &at)| (at, n)).collect();
        by_place.sort_unstable();
        let mut free_from = self.floor;
        for (at, block) in by_place {
            if at < free_from {
                return Err(format!(
                    "block {block} at {at:#x} overlaps what lies before it"
                ));
            }
            free_from = at + self.slot_len;
            if free_from > end {
                return Err(format!("block {block} at {at:#x} reaches beyond {end:#x}"));
            }
        }
        Ok(())
    }

    /// Checks that a compaction could not make the file shorter by a whole slot: no hole between
    /// metadata and blocks that a slot fits in, aligned, and no slack before the footer.
    pub(crate) fn check_compact(&self) -> Result<(), String> {
        if !self.trailing_footer {
            return Err("no footer at the end".into());
        }
        let mut places: Vec<u64> = self.blocks.values().copied().collect();
        places.sort_unstable();
        let last = places.last().map_or(self.floor, |at| at + self.slot_len);
        if places.len() > 1 {
            let mut free_from = places[0];
            for at in places {
                if at - free_from >= self.slot_len + 4096 {
                    return Err(format!("a hole of {:#x} at {free_from:#x}", at - free_from));
                }
                free_from = at + self.slot_len;
            }
        }
        if self.file_len > last + SECTOR + 4096 && !self.blocks.is_empty() {
            return Err(format!(
                "the last block ends at {last:#x}, the file {:#x}",
                self.file_len
            ));
        }
        Ok(())
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Fills `data` with what differs in each sector and from one `tag` to another.
pub(crate) fn pattern(tag: u64, first_sector: u64, data: &mut [u8]) {
    for (n, sector) in data.chunks_mut(512).enumerate() {
        let number = first_sector + u64::try_from(n).unwrap();
        let mut seed = vhdfs::storage::sim::Random::new(tag << 32 ^ number);
        for word in sector.chunks_mut(8) {
            let count = word.len();
            word.copy_from_slice(&seed.next().to_le_bytes()[..count]);
        }
    }
    debug_assert!(len(data) > 0);
}
