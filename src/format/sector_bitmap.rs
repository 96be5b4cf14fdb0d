//! Which sectors of a block are in its slot: one bit each.

use crate::units::{div_ceil, u64_from, usize_from};

/// Where the first sector's bit is in a byte of a [`SectorBitmap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOrder {
    /// In the most significant bit: VHD.
    MsbFirst,
    /// In the least significant bit: VHDX.
    LsbFirst,
}

/// Which sectors of a block are in its slot.
///
/// A clear bit means that the sector reads as the parent has it, or as zeros where there is no
/// parent, whatever lies in the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectorBitmap {
    bytes: Box<[u8]>,
    sectors: u64,
    order: BitOrder,
}

impl SectorBitmap {
    /// The bitmap of a block of `sectors` sectors; `bytes` may be padded.
    pub fn new(bytes: Box<[u8]>, sectors: u64, order: BitOrder) -> Self {
        Self {
            bytes,
            sectors,
            order,
        }
    }

    /// A bitmap of `sectors` sectors without a set bit.
    pub fn empty(sectors: u64, order: BitOrder) -> Self {
        Self::new(
            vec![0; usize_from(div_ceil(sectors, 8))].into(),
            sectors,
            order,
        )
    }

    fn mask(&self, sector: u64) -> u8 {
        match self.order {
            BitOrder::MsbFirst => 0x80 >> (sector % 8),
            BitOrder::LsbFirst => 1 << (sector % 8),
        }
    }

    /// The bytes, as in the file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether sector `sector` of the block is in its slot. Sectors beyond the block are not.
    pub fn is_written(&self, sector: u64) -> bool {
        self.bytes
            .get(usize_from(sector / 8))
            .is_some_and(|byte| byte & self.mask(sector) != 0)
    }

    /// Whether every sector of the block is in its slot.
    pub fn is_full(&self) -> bool {
        self.run_end(0, self.sectors) == self.sectors && (self.sectors == 0 || self.is_written(0))
    }

    /// Whether no sector of the block is in its slot.
    pub fn is_empty(&self) -> bool {
        self.run_end(0, self.sectors) == self.sectors && !self.is_written(0)
    }

    /// The end of the run of equal bits that starts at `sector`; at most `end`.
    pub fn run_end(&self, sector: u64, end: u64) -> u64 {
        let first = self.is_written(sector);
        let whole = if first { 0xff } else { 0 };
        let mut at = sector.saturating_add(1);
        while at < end {
            if at.is_multiple_of(8) && self.bytes.get(usize_from(at / 8)) == Some(&whole) {
                at = at.saturating_add(8);
            } else if self.is_written(at) == first {
                at = at.saturating_add(1);
            } else {
                break;
            }
        }
        at.min(end)
    }

    /// Sets the bits from `first` up to, not including, `end`; those beyond the block are ignored.
    pub fn set(&mut self, first: u64, end: u64) {
        let mut at = first;
        let end = end
            .min(self.sectors)
            .min(u64_from(self.bytes.len()).saturating_mul(8));
        while at < end {
            let mask = self.mask(at);
            if let Some(byte) = self.bytes.get_mut(usize_from(at / 8)) {
                if at.is_multiple_of(8) && end.saturating_sub(at) >= 8 {
                    *byte = 0xff;
                    at = at.saturating_add(8);
                    continue;
                }
                *byte |= mask;
            }
            at = at.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_and_found_in_both_orders() {
        for (order, first_byte) in [(BitOrder::MsbFirst, 0x1f), (BitOrder::LsbFirst, 0xf8)] {
            let mut bitmap = SectorBitmap::empty(64, order);
            assert!(bitmap.is_empty());
            bitmap.set(3, 21);
            assert_eq!(bitmap.bytes()[0], first_byte);
            let runs = |at| (bitmap.is_written(at), bitmap.run_end(at, 64));
            assert_eq!(
                [runs(0), runs(3), runs(21)],
                [(false, 3), (true, 21), (false, 64)]
            );
            bitmap.set(0, 100);
            assert!(bitmap.is_full());
        }
    }
}
