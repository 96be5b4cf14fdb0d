//! Files to test with, and what a guest reads from them.

pub(crate) mod log;
pub(crate) mod model;
pub(crate) mod vhd;
pub(crate) mod vhdx;
pub(crate) mod vhdx_file;

use std::ops::Range;

use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Random, SimStorage};
use vhdfs::units::FileOffset;

use crate::support::image::pattern;

/// What nobody may read: in gaps, in sectors that belong to the parent, in blocks that are not there.
pub(super) const JUNK: u8 = 0xd5;

/// Which sectors of a block are in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// All.
    All,
    /// None, though the block has its place.
    None,
    /// Those in one of the ranges.
    Sectors(Vec<Range<u64>>),
    /// Any, by this seed.
    Random(u64),
}

impl Bits {
    /// Whether sector `sector` of the block is there.
    pub(crate) fn has(&self, sector: u64) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Sectors(ranges) => ranges.iter().any(|range| range.contains(&sector)),
            Self::Random(seed) => Random::new(seed << 32 ^ sector).next() & 1 == 1,
        }
    }
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Other bytes in each sector.
    Full,
    /// The same in the first half, and zeros.
    Half,
    /// Zeros.
    Zeros,
}

impl Fill {
    /// Fills `data`, the block at `disk_offset` of the disk that `tag` tells from others.
    fn fill(self, tag: u64, disk_offset: u64, data: &mut [u8]) {
        data.fill(0);
        let half = data.len() / 2;
        match self {
            Self::Full => pattern(tag, disk_offset / 512, data),
            Self::Half => pattern(tag, disk_offset / 512, &mut data[..half]),
            Self::Zeros => {}
        }
    }
}

fn write(sim: &SimStorage, bytes: &[u8], at: u64) {
    let written = sim.write_all_at(bytes, FileOffset::new(at));
    written.expect("the simulated host takes it");
}
