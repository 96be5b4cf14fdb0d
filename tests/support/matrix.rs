//! Disks of every format and kind to test with, and what they hold.

use std::sync::Arc;

use vhdfs::disk::Disk;
use vhdfs::storage::sim::{Random, SimStorage};

use super::guest::open_parent;
use super::image::Style;
use super::oracle::Oracle;
use super::second::State;
use super::second::build::Bits;
use super::second::build::model::{Model, expect};
use super::second::build::vhd::{ParentOf, VhdImage, VhdKind};
use super::second::build::vhdx::{Layout, Order, Slot, VhdxImage, VhdxKind};
use super::size;

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Vhd,
    /// With sectors of this many bytes.
    Vhdx(u64),
}

/// A disk of eight blocks, the last of which its end may cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) format: Format,
    /// How many parents there are.
    pub(crate) parents: u32,
    /// A fixed VHDX.
    pub(crate) fixed: bool,
    /// Bytes in a block.
    pub(crate) block_size: u64,
    /// Draws what is where.
    pub(crate) seed: u64,
}

/// A disk to start with.
pub(crate) struct Start {
    pub(crate) storage: SimStorage,
    pub(crate) parent: Option<Arc<Disk>>,
    /// What it holds.
    pub(crate) bytes: Vec<u8>,
    pub(crate) block_size: u64,
}

impl Start {
    /// What a guest may read from it.
    pub(crate) fn oracle(&self) -> Oracle {
        let disk_len = u64::try_from(self.bytes.len()).unwrap();
        let mut oracle = Oracle::over(disk_len, self.parent.clone());
        // What only the parent has is not worth remembering.
        let mut below = vec![0; self.bytes.len()];
        oracle.base(0, &mut below);
        let sectors = self.bytes.chunks(512).zip(below.chunks(512));
        for (n, (own, parents)) in (0..).zip(sectors) {
            if own != parents {
                oracle.holds(n * 512, own);
            }
        }
        oracle
    }
}

/// One of each kind, in blocks of `vhd_block` bytes or 1 MiB.
pub(crate) fn kinds(vhd_block: u64, seed: u64) -> Vec<Spec> {
    let of = |format, parents, fixed| Spec {
        format,
        parents,
        fixed,
        block_size: if format == Format::Vhd {
            vhd_block
        } else {
            1 << 20
        },
        seed,
    };
    let mut specs = Vec::new();
    for format in [Format::Vhd, Format::Vhdx(512), Format::Vhdx(4096)] {
        specs.extend([0, 1, 3].map(|parents| of(format, parents, false)));
    }
    specs.push(of(Format::Vhdx(512), 0, true));
    specs
}

impl Spec {
    /// For people.
    pub(crate) fn name(&self) -> String {
        let kind = match (self.fixed, self.parents) {
            (true, _) => "fixed".to_owned(),
            (false, 0) => "dynamic".to_owned(),
            (false, parents) => format!("over {parents}"),
        };
        match self.format {
            Format::Vhd => format!("VHD {kind}"),
            Format::Vhdx(sector) => format!("VHDX/{sector} {kind}"),
        }
    }

    /// Builds it, and its parents.
    pub(crate) fn start(&self) -> Start {
        let mut random = Random::new(self.seed);
        let disk_len = 8 * self.block_size - 4096 * random.below(3);
        match self.format {
            Format::Vhd => self.vhd(disk_len, &mut random),
            Format::Vhdx(sector) => self.vhdx(disk_len, sector, &mut random),
        }
    }

    fn vhd(&self, disk_len: u64, random: &mut Random) -> Start {
        let mut chain: Vec<VhdImage> = Vec::new();
        for n in 0..=self.parents {
            let last = n == self.parents;
            let (block_size, disk_len) = self.shape(disk_len, last, 512 << 10, random);
            let style =
                [Style::Packed, Style::Aligned, Style::Xen, Style::Gapped][size(random.below(4))];
            let blocks = some_blocks(disk_len.div_ceil(block_size), random);
            let blocks = blocks.into_iter().map(|block| match (n, random.below(3)) {
                (0, 1..) | (_, 1) => (block, Bits::All),
                _ => (block, Bits::Random(random.next() >> 32)),
            });
            let blocks: Vec<(u64, Bits)> = blocks.collect();
            let kind = chain.last().map_or(VhdKind::Dynamic, |parent| {
                VhdKind::Differencing(ParentOf::new(parent.unique_id, "parent.vhd"))
            });
            let mut image = VhdImage::new(kind, block_size, disk_len, style, &blocks);
            image.tag = u64::from(n) + 1;
            image.unique_id = [u8::try_from(n).unwrap() + 7; 16];
            chain.push(image);
        }
        let files = chain.iter().map(VhdImage::build).collect();
        start(files, &chain)
    }

    fn vhdx(&self, disk_len: u64, sector: u64, random: &mut Random) -> Start {
        let mut chain: Vec<VhdxImage> = Vec::new();
        for n in 0..=self.parents {
            let last = n == self.parents;
            let (block_size, disk_len) = self.shape(disk_len, last, 2 << 20, random);
            let kind = match chain.last() {
                None if self.fixed => VhdxKind::Fixed,
                None => VhdxKind::Dynamic,
                // The same as in any child, but for sizes.
                Some(parent) => VhdxImage::child(parent, Layout::Packed, &[]).kind,
            };
            let mut image = VhdxImage::new(kind, block_size, disk_len, Layout::Packed, []);
            if sector == 4096 {
                image = image.with_4k_sectors();
            }
            let orders = [Order::Windows, Order::Qemu, Order::Windows, Order::Behind];
            image = image.with_order(orders[size(random.below(4))]);
            let layouts = [Layout::Packed, Layout::Gapped];
            let layout = layouts[size(random.below(if self.fixed { 1 } else { 2 }))];
            let slots = self.vhdx_slots(disk_len.div_ceil(block_size), n > 0, random);
            image.place(layout, slots);
            image.tag = u64::from(n) + 1;
            image.data_write_guids = [[u8::try_from(n).unwrap() + 0x21; 16]; 2];
            for block in 0..disk_len.div_ceil(block_size) {
                let placed = image.slots().any(|slot| slot.block == block);
                if !placed && !self.fixed && random.below(4) == 0 {
                    image = image.with_state(block, State::Zero);
                }
            }
            chain.push(image);
        }
        let files = chain.iter().map(|image| image.build().sim).collect();
        start(files, &chain)
    }

    fn vhdx_slots(&self, blocks: u64, child: bool, random: &mut Random) -> Vec<Slot> {
        if self.fixed {
            return (0..blocks).map(Slot::full).collect();
        }
        let slots = some_blocks(blocks, random).into_iter();
        slots
            .map(|block| match random.below(8) {
                0 => Slot::anchor(block, State::Unmapped),
                1 => Slot::anchor(block, State::Undefined),
                2..=4 if child => Slot::partial(block, Bits::Random(random.next() >> 32)),
                _ => Slot::full(block),
            })
            .collect()
    }

    /// Block size and length of a disk of the chain: parents are longer or shorter, in other blocks.
    fn shape(&self, disk_len: u64, last: bool, other: u64, random: &mut Random) -> (u64, u64) {
        if last {
            return (self.block_size, disk_len);
        }
        let block_size = [self.block_size, other][size(random.below(2))];
        let change = random.below(3) * 4096 * 9;
        let disk_len = match random.below(3) {
            0 => disk_len,
            1 => disk_len + change,
            _ => disk_len - change,
        };
        (block_size, disk_len)
    }
}

/// Some of `count` blocks, in any order.
fn some_blocks(count: u64, random: &mut Random) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..count).collect();
    for n in 0..blocks.len() {
        blocks.swap(n, size(random.below(count)));
    }
    blocks.truncate(size(count / 4 + random.below(count / 2 + 1)));
    blocks
}

/// Of files and what each holds, the oldest first.
fn start<M: Model>(files: Vec<SimStorage>, models: &[M]) -> Start {
    let models = models.iter().rev();
    let youngest_first: Vec<&dyn Model> = models.map(|model| -> &dyn Model { model }).collect();
    let child = youngest_first[0];
    let mut bytes = vec![0; size(child.disk_len())];
    expect(&youngest_first, &mut bytes, 0);
    let mut files = files;
    let storage = files.pop().expect("there is a child");
    let mut parent = None;
    for file in files {
        parent = Some(open_parent(file, parent.as_ref()));
    }
    Start {
        storage,
        parent,
        bytes,
        block_size: child.block_size(),
    }
}
