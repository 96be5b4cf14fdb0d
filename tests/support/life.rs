//! Small disks, and what happens to them.

use vhdfs::storage::sim::{Random, SimStorage};

use super::guest::Guest;
use super::image::{Image, Style, pattern};
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
    /// The disk at first.
    pub(crate) image: Image,
}

impl Life {
    /// The same for the same seed.
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
        Self { random, image }
    }

    /// Anything after anything else. Where operations may fail, whole sectors only, and the disk is
    /// not opened again.
    pub(crate) fn live(&self, guest: &mut Guest) {
        let mut random = self.random;
        let unit = if guest.is_tolerant() { 512 } else { 1 };
        let mut work = guest.idle_work();
        for _ in 0..4 + random.below(16) {
            let block = random.below(8) * BLOCK;
            let within = random.below(BLOCK) / unit * unit;
            let len = (1 + random.below(BLOCK - within)).next_multiple_of(unit);
            match random.below(16) {
                0..4 => guest.write(block + within, len.min(3072)),
                4 => guest.write(block + within, len),
                5 => guest.write_zero_bytes(block + within, len),
                6 => guest.write_zero_bytes(block, BLOCK),
                7 | 8 => guest.discard(block, BLOCK),
                9 => guest.discard(block + within, len),
                10 => guest.write_zeroes(block, (2 * BLOCK).min(8 * BLOCK - block)),
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
