//! Types for places and sizes, and the checked conversions between integer widths.
//!
//! *Disk offset*: where the guest sees a byte. *File offset*: where it lies in the host file. Both
//! count bytes. The two are never mixed: a function that takes one does not accept the other.
//!
//! This is the only file of the crate that may convert with `as`.

#![expect(
    clippy::as_conversions,
    reason = "the checked conversions of all other files stand here"
)]

use std::fmt;

/// Bytes in a sector: the unit of VHD structures, and what a disk writes atomically.
pub const SECTOR_SIZE: u64 = 512;

/// Bytes in a granule: the unit in which a block's zero and unknown parts are tracked.
pub const GRANULE_SIZE: u64 = 4096;

macro_rules! offset_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The offset `bytes` bytes from the start.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// Bytes from the start.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The place `bytes` further on. Saturates: offsets are checked against lengths below
            /// 2^63 when they enter the program, so a saturated one fails the next range check.
            #[must_use]
            pub const fn plus(self, bytes: u64) -> Self {
                Self(self.0.saturating_add(bytes))
            }

            /// Bytes from `start` to here, 0 where `start` lies behind.
            pub const fn since(self, start: Self) -> u64 {
                self.0.saturating_sub(start.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset_type!(
    /// A byte's place on the disk, as the guest sees it.
    DiskOffset
);
offset_type!(
    /// A byte's place in the host file.
    FileOffset
);

macro_rules! range_type {
    ($(#[$doc:meta])* $name:ident, $offset:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name {
            /// The first byte.
            pub start: $offset,
            /// How many bytes; may be 0.
            pub len: u64,
        }

        impl $name {
            /// `len` bytes from `start`.
            pub const fn new(start: $offset, len: u64) -> Self {
                Self { start, len }
            }

            /// The bytes from `start` up to, not including, `end`; empty where `end` lies before.
            pub const fn between(start: $offset, end: $offset) -> Self {
                Self { start, len: end.since(start) }
            }

            /// The first byte behind the range.
            pub const fn end(self) -> $offset {
                self.start.plus(self.len)
            }

            /// Whether it holds no byte.
            pub const fn is_empty(self) -> bool {
                self.len == 0
            }

            /// Whether the two share a byte.
            pub fn overlaps(self, other: Self) -> bool {
                !self.is_empty() && !other.is_empty()
                    && self.start < other.end() && other.start < self.end()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}..{:#x}", self.start.get(), self.end().get())
            }
        }
    };
}

range_type!(
    /// A run of bytes on the disk.
    DiskRange,
    DiskOffset
);
range_type!(
    /// A run of bytes in the host file.
    FileRange,
    FileOffset
);

/// The number of a payload block: disk offset divided by the block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(u32);

impl BlockIndex {
    /// The block numbered `index`, from 0.
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// Its number, from 0.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Its number as an index into a table in memory.
    pub const fn index(self) -> usize {
        usize_from_u32(self.0)
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A length in memory as a byte count. Lossless: no supported platform has pointers over 64 bits.
pub const fn u64_from(len: usize) -> u64 {
    len as u64
}

/// A 32-bit number as a 64-bit one, where `u64::from` cannot be called.
pub const fn u64_from_u32(n: u32) -> u64 {
    n as u64
}

/// A 32-bit number as an index. Lossless: the crate does not build for pointers under 32 bits.
pub const fn usize_from_u32(n: u32) -> usize {
    n as usize
}

/// A byte count as a length in memory.
///
/// # Panics
/// Where it does not fit. Callers pass lengths of buffers, or of parts of them, that exist.
pub const fn usize_from(bytes: u64) -> usize {
    assert!(bytes <= usize::MAX as u64, "length does not fit in memory");
    bytes as usize
}

/// The low 8 bits.
pub const fn low_u8(n: u64) -> u8 {
    (n & 0xff) as u8
}

/// The low 32 bits.
pub const fn low_u32(n: u64) -> u32 {
    (n & 0xffff_ffff) as u32
}

/// `a / b`, rounded up. `b` must not be 0.
pub const fn div_ceil(a: u64, b: u64) -> u64 {
    a.div_ceil(b)
}

/// The smallest multiple of `to` that is at least `n`; saturates. `to` must not be 0.
pub const fn round_up(n: u64, to: u64) -> u64 {
    n.div_ceil(to).saturating_mul(to)
}

/// The largest multiple of `to` that is at most `n`. `to` must not be 0.
pub const fn round_down(n: u64, to: u64) -> u64 {
    n - n % to
}

const _: () = assert!(size_of::<usize>() >= 4, "indices are 32 bits wide");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = FileRange::between(FileOffset::new(10), FileOffset::new(20));
        assert_eq!(range.len, 10);
        assert!(range.overlaps(FileRange::new(FileOffset::new(19), 1)));
        assert!(!range.overlaps(FileRange::new(FileOffset::new(20), 1)));
        assert!(!range.overlaps(FileRange::new(FileOffset::new(15), 0)));
        assert!(FileRange::between(FileOffset::new(20), FileOffset::new(10)).is_empty());
    }

    #[test]
    fn rounding() {
        assert_eq!(
            (round_up(1, 512), round_up(512, 512), round_up(0, 512)),
            (512, 512, 0)
        );
        assert_eq!(round_down(1023, 512), 512);
        assert_eq!(round_up(u64::MAX, 512), u64::MAX, "saturates");
    }
}
