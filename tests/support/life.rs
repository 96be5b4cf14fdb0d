//! Small disks, and what happens to them.

use vhdfs::storage::sim::{Random, SimStorage};

use super::guest::Guest;
use super::image::{Image, Style, pattern};
use super::matrix::Spec;
use super::oracle::Oracle;
use super::size;

/// Bytes in a block. Small, so that thousands of states are cheap; what matters is the same at any
/// size.
pub(crate) const BLOCK: u64 = 128 << 10;

/// A disk of eight blocks, of which `blocks` are there in the order of the file, half full of data.
pub(crate) fn disk(style: Style, blocks: &[u64]) -> (SimStorage, Oracle) {
    build(&Image::new(BLOCK, 8 * BLOCK, style, blocks))
}

/// The file of `image`, its blocks half full of data, and what it holds.
pub(crate) fn build(image: &Image) -> (SimStorage, Oracle) {
    let mut oracle = Oracle::new(image.disk_len);
    let storage = image.build(|block, data| {
        // The rest stays zero, as in any real block.
        let half = data.len() / 2;
        let start = block * image.block_size;
        pattern(block, start / 512, &mut data[..half]);
        oracle.holds(start, data);
    });
    (storage, oracle)
}

/// What happens to a disk, drawn from a seed.
pub(crate) struct Life {
    random: Random,
    kind: Kind,
}

/// The disk at first.
enum Kind {
    Vhd(Image),
    Any(Spec),
}

impl Life {
    /// Of a dynamic VHD. The same for the same seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let styles = [Style::Packed, Style::Aligned, Style::Xen, Style::Gapped];
        let style = styles[size(random.below(4))];
        let mut blocks: Vec<u64> = (0..8).collect();
        for n in 0..blocks.len() {
            blocks.swap(n, size(random.below(8)));
        }
        blocks.truncate(size(random.below(7)));
        let mut image = Image::new(BLOCK, 8 * BLOCK, style, &blocks);
        image.exact = random.below(3) == 0;
        let kind = Kind::Vhd(image);
        Self { random, kind }
    }

    /// Of a disk of any kind.
    pub(crate) fn on(spec: Spec) -> Self {
        Self {
            random: Random::new(spec.seed ^ 0x5eed),
            kind: Kind::Any(spec),
        }
    }

    /// The file and what it holds.
    pub(crate) fn start(&self) -> (SimStorage, Oracle) {
        match &self.kind {
            Kind::Vhd(image) => build(image),
            Kind::Any(spec) => {
                let start = spec.start();
                let oracle = start.oracle();
                (start.storage, oracle)
            }
        }
    }

    /// Anything after anything else. Where operations may fail, whole sectors only, and the disk is
    /// not opened again.
    pub(crate) fn live(&self, guest: &mut Guest) {
        let mut random = self.random;
        let block_size = match &self.kind {
            Kind::Vhd(_) => BLOCK,
            Kind::Any(spec) => spec.block_size,
        };
        let unit = if guest.is_tolerant() { 512 } else { 1 };
        let mut work = guest.idle_work();
        for _ in 0..4 + random.below(16) {
            let block = random.below(8) * block_size;
            let within = random.below(block_size) / unit * unit;
            let len = (1 + random.below(block_size - within)).next_multiple_of(unit);
            match random.below(16) {
                0..4 => guest.write(block + within, len.min(3072)),
                4 => guest.write(block + within, len),
                5 => guest.write_zero_bytes(block + within, len),
                6 => guest.write_zero_bytes(block, block_size),
                7 | 8 => guest.discard(block, block_size),
                9 => guest.discard(block + within, len),
                10 => guest.write_zeroes(block, (2 * block_size).min(8 * block_size - block)),
                11 | 12 => guest.flush(),
                13 => guest.compact(),
                14 => {
                    guest.idle(&mut work, 1 + u32::try_from(random.below(12)).unwrap());
                }
                _ if guest.is_tolerant() => guest.flush(),
                _ => {
                    // The old disk is gone before the new one is opened.
                    drop(work);
                    guest.reopen();
                    work = guest.idle_work();
                }
            }
        }
    }
}
