//! QEMU agrees with us after everything that we do to a disk.

use std::fs;
use std::path::{Path, PathBuf};

use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{DiskType, Format};

use crate::mirror::{Mirrored, compact, host_file, open, qemu_format};
use crate::support::tools::{installed, tool};
use crate::support::{env_number, second};

const MIB: u64 = 1 << 20;

/// A kind of disk, and who makes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maker {
    /// What follows the dot.
    pub(crate) extension: &'static str,
    /// What QEMU is told, or `None` if we make it.
    pub(crate) qemu: Option<&'static str>,
    pub(crate) block_size: u64,
    pub(crate) disk_len: u64,
    pub(crate) fixed: bool,
}

impl Maker {
    /// A dynamic disk of ours.
    pub(crate) const fn ours(extension: &'static str, block_size: u64, disk_len: u64) -> Self {
        Self {
            extension,
            qemu: None,
            block_size,
            disk_len,
            fixed: false,
        }
    }

    /// The same kind of disk as QEMU makes it with these options.
    pub(crate) const fn by_qemu(self, options: &'static str) -> Self {
        Self {
            qemu: Some(options),
            ..self
        }
    }

    /// The same, fixed.
    pub(crate) const fn fixed(self) -> Self {
        Self {
            fixed: true,
            ..self
        }
    }

    /// Makes the disk in `folder`, with its mirror.
    pub(crate) fn make(&self, folder: &Path, seed: u64) -> Mirrored {
        Mirrored::new(&self.create(folder), seed)
    }

    /// Makes the disk in `folder`.
    pub(crate) fn create(&self, folder: &Path) -> PathBuf {
        let path = folder.join("disk").with_extension(self.extension);
        if let Some(options) = self.qemu {
            let subformat = if self.fixed { "fixed" } else { "dynamic" };
            let options = format!("subformat={subformat},{options}");
            let image = path.to_str().unwrap();
            let size = self.disk_len.to_string();
            let words = [
                "create",
                "-q",
                "-f",
                qemu_format(&path),
                "-o",
                &options,
                image,
                &size,
            ];
            tool("qemu-img", &words, &[]);
        } else {
            let format = match self.extension {
                "vhdx" => Format::Vhdx,
                _ => Format::Vhd,
            };
            let disk_type = match self.fixed {
                true => DiskType::Fixed,
                false => DiskType::Dynamic,
            };
            let options = CreateOptions {
                block_size: Some(u32::try_from(self.block_size).unwrap()),
                ..CreateOptions::new(format, disk_type, self.disk_len)
            };
            create(&path, &options).unwrap();
        }
        path
    }
}

/// Does `turns` things to the disk, one or some at a time; all agree after each turn, and in the end
/// nothing is left for a compaction to do.
fn live(maker: Maker, turns: u64) {
    if !installed(&["qemu-img"]) {
        return;
    }
    for seed in 1..=env_number("VHDFS_SOAK", 1) {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = maker.make(folder.path(), seed);
        disk.agree();
        for turn in 0..turns {
            let count = if turn % 4 == 3 { 8 } else { 1 };
            disk.our_turn(count);
            disk.agree();
        }
        let last = open(&disk.path);
        let end = disk.disk_len;
        disk.write(&last, end - 3000..end);
        compact(&last, false);
        last.close().unwrap();
        drop(last);
        disk.agree();
        disk.second_agrees(std::slice::from_ref(&disk.path));
        let file = host_file(&disk.path);
        let image = second::read_checked(&*file).unwrap();
        image.check_closed().unwrap();
        if !maker.fixed {
            image.check_compact().unwrap();
        }
        let stored = file.allocated_bytes().unwrap();
        assert!(stored <= fs::metadata(&disk.path).unwrap().len() + MIB);
    }
}

// Sizes that cylinders, heads and sectors can tell exactly, and that they cannot.
const VHD: Maker = Maker::ours("vhd", 2 * MIB, 40 * MIB + 1536);
const VHDX: Maker = Maker::ours("vhdx", MIB, 30 * MIB + 512);

#[test]
fn agrees_on_a_dynamic_vhd_of_ours() {
    live(VHD, 16);
    live(Maker::ours("vhd", 512 << 10, 20 * MIB), 12);
}

#[test]
fn agrees_on_a_dynamic_vhd_of_its_own() {
    live(VHD.by_qemu("force_size=on"), 16);
    live(VHD.by_qemu("force_size=off"), 12);
}

#[test]
fn agrees_on_a_vhdx_of_blocks_of_1_mib() {
    live(VHDX, 16);
    live(VHDX.by_qemu("block_size=1M"), 16);
}

#[test]
fn agrees_on_a_vhdx_of_blocks_of_2_mib() {
    let maker = Maker::ours("vhdx", 2 * MIB, 60 * MIB + 512);
    live(maker, 16);
    live(maker.by_qemu("block_size=2M,log_size=2M"), 16);
    live(maker.by_qemu("block_size=2M,block_state_zero=off"), 12);
}

#[test]
fn agrees_on_a_vhdx_of_blocks_of_32_mib() {
    let maker = Maker::ours("vhdx", 32 * MIB, 160 * MIB + 512);
    live(maker, 12);
    live(maker.by_qemu("block_size=32M"), 12);
}

#[test]
fn agrees_on_a_fixed_vhdx() {
    let maker = Maker::ours("vhdx", 2 * MIB, 40 * MIB + 512).fixed();
    live(maker, 12);
    live(maker.by_qemu("block_size=2M"), 12);
}
