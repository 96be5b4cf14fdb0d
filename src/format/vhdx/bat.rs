//! The block allocation table: for each payload block and each sector-bitmap block its state and
//! its place.

use super::{BITMAP_BLOCK_LEN, CHUNK_SECTORS, MIB};
use crate::units::{BlockIndex, FileOffset, FileRange, low_u32, u64_from_u32};

/// Bytes in an entry.
pub const BAT_ENTRY_LEN: u64 = 8;

const STATE_MASK: u64 = 7;
const RESERVED_MASK: u64 = 0x000f_fff8;
/// The state of a sector-bitmap block that lies in the file.
const BITMAP_PRESENT: u64 = 6;

/// The state of a payload block. [MS-VHDX 2.5.1.1]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadState {
    /// 0: reads as the parent has it, or as zeros.
    NotPresent,
    /// 1: reads as zeros. May name a place that holds the block's own old content.
    Undefined,
    /// 2: reads as zeros.
    Zero,
    /// 3: unmapped by the guest; reads as zeros. May name a place as 1 does.
    Unmapped,
    /// 6: in the file.
    FullyPresent,
    /// 7: the sectors that the sector bitmap says are in the file, the others in the parent.
    PartiallyPresent,
}

impl PayloadState {
    /// The state's number.
    pub fn bits(self) -> u64 {
        match self {
            Self::NotPresent => 0,
            Self::Undefined => 1,
            Self::Zero => 2,
            Self::Unmapped => 3,
            Self::FullyPresent => 6,
            Self::PartiallyPresent => 7,
        }
    }
}

/// An entry of the table, as it is. [MS-VHDX 2.5.1]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatEntry(u64);

impl BatEntry {
    /// The entry of a payload block in `state` at `offset`, a multiple of 1 MiB; 0 for no place.
    ///
    /// # Panics
    /// For an offset that is no multiple of 1 MiB: our allocator never gives such a place.
    pub fn payload(state: PayloadState, offset: FileOffset) -> Self {
        assert!(offset.get().is_multiple_of(MIB), "a block at {offset}");
        Self(offset.get() | state.bits())
    }

    /// The entry of a sector-bitmap block at `offset`, a multiple of 1 MiB; of one that is not
    /// there, `None`.
    ///
    /// # Panics
    /// For an offset that is no multiple of 1 MiB.
    pub fn bitmap(offset: Option<FileOffset>) -> Self {
        let Some(offset) = offset else {
            return Self(0);
        };
        assert!(offset.get().is_multiple_of(MIB), "a block at {offset}");
        Self(offset.get() | BITMAP_PRESENT)
    }

    /// The entry that lies in the file as `bytes`.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_le_bytes(bytes))
    }

    /// As it lies in the file.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    /// The number of its state.
    pub fn state_bits(self) -> u64 {
        self.0 & STATE_MASK
    }

    /// What it says of a payload block; `None` for the reserved states 4 and 5.
    pub fn payload_state(self) -> Option<PayloadState> {
        Some(match self.state_bits() {
            0 => PayloadState::NotPresent,
            1 => PayloadState::Undefined,
            2 => PayloadState::Zero,
            3 => PayloadState::Unmapped,
            6 => PayloadState::FullyPresent,
            7 => PayloadState::PartiallyPresent,
            _ => return None,
        })
    }

    /// Whether it says of a sector-bitmap block that it is there.
    pub fn is_bitmap_present(self) -> bool {
        // OpenVMM takes 7 as 6.
        self.state_bits() >= BITMAP_PRESENT
    }

    /// The place it names, a multiple of 1 MiB; 0 for none.
    pub fn offset(self) -> FileOffset {
        FileOffset::new(self.0 & !(STATE_MASK | RESERVED_MASK))
    }

    /// Its reserved bits, which must be 0.
    pub fn reserved(self) -> u64 {
        self.0 & RESERVED_MASK
    }

    /// The same without a place.
    #[must_use]
    pub fn without_place(self) -> Self {
        Self(self.0 & (STATE_MASK | RESERVED_MASK))
    }

    /// Whether nothing is set in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// What an entry of the table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatSlot {
    /// A payload block.
    Payload(BlockIndex),
    /// The sector-bitmap block of the chunk with this number.
    Bitmap(u32),
    /// Nothing: it lies behind the last entry that the disk needs.
    Padding,
}

/// Where in the table the entry of each block is.
///
/// Behind the entries of each chunk's payload blocks stands that of its sector-bitmap block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatGeometry {
    /// Bytes of data in a block: one of [`super::BLOCK_SIZES`].
    pub block_size: u64,
    /// Bytes in a logical sector: 512 or 4096.
    pub sector_size: u64,
    /// The disk's size in bytes, at most [`super::MAX_DISK_LEN`].
    pub disk_len: u64,
    /// Whether the disk has a parent, so that every chunk has a sector bitmap.
    pub differencing: bool,
}

impl BatGeometry {
    /// Payload blocks in a chunk, at least 16.
    pub fn chunk_ratio(&self) -> u64 {
        self.sector_size
            .saturating_mul(CHUNK_SECTORS)
            .checked_div(self.block_size)
            .map_or(1, |ratio| ratio.max(1))
    }

    /// Payload blocks of the disk.
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.disk_len.div_ceil(self.block_size.max(1))).unwrap_or(u32::MAX)
    }

    /// Chunks of the disk, the last one perhaps not full.
    pub fn chunks(&self) -> u32 {
        let chunks = u64_from_u32(self.blocks()).div_ceil(self.chunk_ratio());
        u32::try_from(chunks).unwrap_or(u32::MAX)
    }

    /// Entries that the table needs. There may be more, which mean nothing.
    pub fn entries(&self) -> u64 {
        let ratio = self.chunk_ratio();
        if self.differencing {
            u64_from_u32(self.chunks()).saturating_mul(ratio.saturating_add(1))
        } else {
            let blocks = u64_from_u32(self.blocks());
            blocks.saturating_add(blocks.saturating_sub(1).checked_div(ratio).unwrap_or(0))
        }
    }

    /// The number of the entry of payload block `block`.
    pub fn payload_index(&self, block: BlockIndex) -> u64 {
        u64_from_u32(block.get()).saturating_add(u64_from_u32(self.chunk_of(block)))
    }

    /// The blocks of chunk `chunk`.
    pub fn blocks_of(&self, chunk: u32) -> impl Iterator<Item = BlockIndex> + use<> {
        let first = u64_from_u32(chunk).saturating_mul(self.chunk_ratio());
        let end = first
            .saturating_add(self.chunk_ratio())
            .min(u64_from_u32(self.blocks()));
        (first..end).map(|block| BlockIndex::new(low_u32(block)))
    }

    /// The number of the entry of the sector-bitmap block of chunk `chunk`.
    pub fn bitmap_index(&self, chunk: u32) -> u64 {
        let ratio = self.chunk_ratio();
        u64_from_u32(chunk)
            .saturating_mul(ratio.saturating_add(1))
            .saturating_add(ratio)
    }

    /// What entry `index` is for.
    pub fn slot(&self, index: u64) -> BatSlot {
        let ratio = self.chunk_ratio();
        let group = ratio.saturating_add(1);
        let chunk = index.checked_div(group).unwrap_or(0);
        let within = index.checked_rem(group).unwrap_or(0);
        if within == ratio {
            return match u32::try_from(chunk) {
                Ok(number) if index < self.entries() => BatSlot::Bitmap(number),
                _ => BatSlot::Padding,
            };
        }
        match u32::try_from(index.saturating_sub(chunk)) {
            Ok(block) if block < self.blocks() => BatSlot::Payload(BlockIndex::new(block)),
            _ => BatSlot::Padding,
        }
    }

    /// The chunk that `block` belongs to.
    pub fn chunk_of(&self, block: BlockIndex) -> u32 {
        let chunk = u64_from_u32(block.get())
            .checked_div(self.chunk_ratio())
            .unwrap_or(0);
        u32::try_from(chunk).unwrap_or(u32::MAX)
    }

    /// Sectors in a block; a multiple of 8.
    pub fn sectors_per_block(&self) -> u64 {
        self.block_size.checked_div(self.sector_size).unwrap_or(0)
    }

    /// The bytes of its chunk's sector-bitmap block, which lies at `bitmap`, that hold the bits of
    /// `block`.
    pub fn bits_of(&self, block: BlockIndex, bitmap: FileOffset) -> FileRange {
        let len = self
            .sectors_per_block()
            .checked_div(8)
            .unwrap_or(0)
            .min(BITMAP_BLOCK_LEN);
        let within = u64_from_u32(block.get())
            .checked_rem(self.chunk_ratio())
            .unwrap_or(0);
        FileRange::new(bitmap.plus(within.saturating_mul(len)), len)
    }

    /// Where in the file entry `index` of the table at `bat` lies.
    pub fn entry_at(bat: FileOffset, index: u64) -> FileOffset {
        bat.plus(index.saturating_mul(BAT_ENTRY_LEN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(block_mib: u64, sector_size: u64, blocks: u64, differencing: bool) -> BatGeometry {
        BatGeometry {
            block_size: block_mib * MIB,
            sector_size,
            disk_len: blocks * block_mib * MIB,
            differencing,
        }
    }

    #[test]
    fn ratios_are_those_of_the_specification() {
        let ratio = |block, sector| geometry(block, sector, 1, false).chunk_ratio();
        assert_eq!(ratio(1, 512), 4096);
        assert_eq!(ratio(2, 512), 2048);
        assert_eq!(ratio(32, 512), 128);
        assert_eq!(ratio(256, 512), 16);
        assert_eq!(ratio(1, 4096), 32768);
        assert_eq!(ratio(256, 4096), 128);
    }

    #[test]
    fn every_entry_has_one_use() {
        for (block_mib, sector_size, blocks) in [
            (256, 512, 1),
            (256, 512, 16),
            (256, 512, 17),
            (32, 512, 300),
            (256, 4096, 129),
        ] {
            for differencing in [false, true] {
                let geometry = geometry(block_mib, sector_size, blocks, differencing);
                let chunks = blocks.div_ceil(geometry.chunk_ratio());
                assert_eq!(u64::from(geometry.chunks()), chunks);
                let mut payload = 0;
                let mut bitmaps = 0;
                for index in 0..geometry.entries() {
                    match geometry.slot(index) {
                        BatSlot::Payload(block) => {
                            assert_eq!(geometry.payload_index(block), index);
                            assert_eq!(u64::from(block.get()), payload);
                            payload += 1;
                        }
                        BatSlot::Bitmap(chunk) => {
                            assert_eq!(geometry.bitmap_index(chunk), index);
                            assert_eq!(u64::from(chunk), bitmaps);
                            bitmaps += 1;
                        }
                        // Of the last chunk, only where its bitmap's entry stands behind.
                        BatSlot::Padding => assert!(differencing && payload == blocks),
                    }
                }
                assert_eq!(payload, blocks);
                assert_eq!(
                    bitmaps,
                    if differencing {
                        chunks
                    } else {
                        (blocks - 1) / geometry.chunk_ratio()
                    }
                );
                assert_eq!(geometry.slot(geometry.entries()), BatSlot::Padding);
            }
        }
    }

    #[test]
    fn entries_survive_the_file() {
        let states = [
            PayloadState::NotPresent,
            PayloadState::Undefined,
            PayloadState::Zero,
            PayloadState::Unmapped,
            PayloadState::FullyPresent,
            PayloadState::PartiallyPresent,
        ];
        for state in states {
            let entry = BatEntry::payload(state, FileOffset::new(5 * MIB));
            let read = BatEntry::from_bytes(entry.to_bytes());
            assert_eq!(read.payload_state(), Some(state));
            assert_eq!((read.offset().get(), read.reserved()), (5 * MIB, 0));
        }
        let odd = BatEntry::from_bytes(0x0030_0005_u64.wrapping_add(8).to_le_bytes());
        assert_eq!(odd.payload_state(), None);
        assert_eq!(
            (odd.offset().get(), odd.reserved(), odd.state_bits()),
            (3 * MIB, 8, 5)
        );
        let bitmap = BatEntry::bitmap(Some(FileOffset::new(MIB)));
        assert!(bitmap.is_bitmap_present() && !BatEntry::bitmap(None).is_bitmap_present());
    }

    #[test]
    fn bits_of_a_block_lie_in_its_chunks_bitmap() {
        let geometry = geometry(256, 512, 40, true);
        let bits = geometry.bits_of(BlockIndex::new(17), FileOffset::new(MIB));
        assert_eq!(bits, FileRange::new(FileOffset::new(MIB + 65536), 65536));
        assert_eq!(geometry.chunk_of(BlockIndex::new(17)), 1);
    }
}
