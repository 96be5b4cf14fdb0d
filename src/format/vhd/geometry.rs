//! Cylinders, heads and sectors: what old guests and QEMU derive a disk's size from.

use crate::units::{SECTOR_SIZE, low_u8, low_u32};

/// The footer's disk geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors_per_track: u8,
}

impl Geometry {
    /// The geometry of a disk of `disk_len` bytes. [VHD 1.0, "CHS Calculation"]
    pub fn for_disk(disk_len: u64) -> Self {
        const LARGEST: u64 = 65535 * 16 * 255;
        let total = (disk_len / SECTOR_SIZE).min(LARGEST);
        let (sectors, heads, cylinder_times_heads) = if total >= 65535 * 16 * 63 {
            (255, 16, total / 255)
        } else {
            let mut sectors = 17;
            let mut product = total / 17;
            let mut heads = product.div_ceil(1024).max(4);
            if product >= heads.saturating_mul(1024) || heads > 16 {
                (sectors, heads, product) = (31, 16, total / 31);
            }
            if product >= heads.saturating_mul(1024) {
                (sectors, heads, product) = (63, 16, total / 63);
            }
            (sectors, heads, product)
        };
        let cylinders = low_u32(cylinder_times_heads.checked_div(heads).unwrap_or(0));
        Self {
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
            heads: low_u8(heads),
            sectors_per_track: low_u8(sectors),
        }
    }

    /// The bytes it describes, at most 127.5 GiB.
    pub fn disk_len(self) -> u64 {
        u64::from(self.cylinders)
            .saturating_mul(u64::from(self.heads))
            .saturating_mul(u64::from(self.sectors_per_track))
            .saturating_mul(SECTOR_SIZE)
    }

    /// Whether it is the one that says "look at `CurrentSize`" to every version of QEMU.
    pub fn is_largest(self) -> bool {
        (self.cylinders, self.heads, self.sectors_per_track) == (65535, 16, 255)
    }
}
