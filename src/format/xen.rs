//! Xen's addition to dynamic VHDs: the batmap, one bit a block that says "all sectors written".
//!
//! Layout from blktap's `libvhd.h`, and `mount/docs/reference/vhd.md`. The map is an optimisation only: a
//! clear bit makes a reader look at the block's sector bitmap, so that an empty map is always
//! right, while a set bit on a block without a slot is damage. A tapdisk refuses to open the disk
//! for writing where the checksum does not fit the map.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{FileOffset, FileRange, SECTOR_SIZE};

const COOKIE: [u8; 8] = *b"tdbatmap";

/// The batmap's header as it lies in the file, the first 32 bytes of a sector.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    cookie: [u8; 8],
    /// File offset of the map.
    batmap_offset: U64,
    /// Sectors of the map.
    batmap_size: U32,
    batmap_version: U32,
    /// Ones' complement of the sum of the map's bytes.
    checksum: U32,
    marker: u8,
    rest: [u8; 483],
}

const _: () = assert!(size_of::<RawHeader>() == 512);

/// A batmap's header.
#[derive(Clone, Debug)]
pub struct BatmapHeader {
    raw: RawHeader,
    at: FileOffset,
}

impl BatmapHeader {
    /// The batmap header in `sector`, which lies at `at`; `None` where there is none.
    pub fn parse(sector: &[u8; 512], at: FileOffset) -> Option<Self> {
        let raw: RawHeader = zerocopy::transmute!(*sector);
        (raw.cookie == COOKIE).then_some(Self { raw, at })
    }

    /// Where the header itself lies.
    pub fn range(&self) -> FileRange {
        FileRange::new(self.at, SECTOR_SIZE)
    }

    /// Where the map lies.
    pub fn map_range(&self) -> FileRange {
        let len = u64::from(self.raw.batmap_size.get()).saturating_mul(SECTOR_SIZE);
        FileRange::new(FileOffset::new(self.raw.batmap_offset.get()), len)
    }

    /// The header of the same map with all bits clear.
    #[must_use]
    pub fn emptied(&self) -> [u8; 512] {
        let mut raw = self.raw;
        raw.checksum = U32::new(!0);
        zerocopy::transmute!(raw)
    }

    /// Whether the header's checksum fits `map`.
    pub fn fits(&self, map: &[u8]) -> bool {
        let sum = map
            .iter()
            .fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        self.raw.checksum.get() == !sum
    }
}
