//! The second reading of the formats, on files that other programs made and on those that it builds.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::sync::Arc;

use support::image::Style;
use support::samples::{samples, unpack};
use support::second::build::model::{Model, compare};
use support::second::build::vhd::{VhdImage, VhdKind};
use support::second::build::vhdx::{Layout, Order, Slot, VhdxImage};
use support::second::build::{Bits, Fill};
use support::second::{Chain, Image, State, read, read_checked};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::FileOffset;

const MIB: u64 = 1 << 20;
/// The smallest block of a VHDX; a chunk has 4096 of them if sectors have 512 bytes.
const BLOCK: u64 = MIB;
const CHUNK: u64 = 4096 * MIB;

/// The files, the child first.
fn chain<const N: usize>(files: [SimStorage; N]) -> Result<Chain, String> {
    let files = files.map(|file| -> Arc<dyn Storage> { Arc::new(file) });
    Chain::open(files)
}

/// Builds nothing, reads `files`, and finds nothing wrong, and what `models` say.
fn judge<const N: usize>(files: [SimStorage; N], models: [&dyn Model; N]) -> Chain {
    let chain = chain(files).unwrap();
    chain.check().unwrap();
    for (_, image) in chain.links() {
        image.check_closed().unwrap();
    }
    assert_eq!(chain.disk_len(), models[0].disk_len());
    compare(&models, &|buf, offset| chain.read_at(buf, offset)).unwrap();
    chain
}

#[test]
fn samples_are_read_and_found_right() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Name, size, blocks of which the table says something, and those that are in the file.
    for (name, disk_len, told, there) in [
        ("d2v-zerofilled.vhd", 263_454_720, 126, 126),
        ("hyperv2012r2-dynamic.vhd", 136_365_211_648, 0, 0),
        ("virtualpc-dynamic.vhd", 136_365_211_648, 0, 0),
        ("ext2.vhd", 4_212_736, 1, 1),
        ("xen-dyn.vhd", 16 * MIB, 8, 8),
        ("xen-big.vhd", 16 * MIB, 0, 0),
        ("xen-snap.vhd", 16 * MIB, 0, 0),
        ("qemu10-forcesize-dyn.vhd", 8 * MIB, 2, 2),
        ("qemu10-fixed-511footer.vhd", MIB, 0, 0),
        ("iotest-dynamic-1G.vhdx", 1 << 30, 32, 3),
        ("iotest-dirtylog-10G-4M.vhdx", 10 << 30, 18, 18),
        ("test-disk2vhd.vhdx", 268_435_456, 128, 128),
        ("qemu10-dyn-1M.vhdx", 16 * MIB, 16, 2),
    ] {
        let path = unpack(&samples, folder.path(), name);
        let sim = SimStorage::from_file(&path).unwrap();
        let image = read_checked(&sim).unwrap_or_else(|error| panic!("{name}: {error}"));
        let blocks = image.blocks();
        let in_file = blocks.values().filter(|block| block.state.has_data());
        let found = (image.disk_len(), blocks.len(), in_file.count());
        assert_eq!(found, (disk_len, told, there), "{name}");
        match &image {
            Image::Vhd(vhd) => vhd.check_unnamed_sectors(&sim).unwrap(),
            Image::Vhdx(vhdx) => assert_eq!(vhdx.log.is_live(), name.contains("dirtylog")),
        }
        // QEMU leaves two headers that differ.
        let odd = name.contains("dirtylog") || name == "qemu10-dyn-1M.vhdx";
        assert_eq!(image.check_closed().is_err(), odd, "{name}");
        std::fs::remove_file(path).unwrap();
    }
    for name in ["image.vhd", "image-differential.vhd"] {
        let path = unpack(&samples, folder.path(), name);
        let error = read(&SimStorage::from_file(&path).unwrap()).unwrap_err();
        assert!(error.contains("checksum 0xfffff683"), "{name}: {error}");
    }
}

#[test]
fn xen_snapshot_shows_its_parent() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().unwrap();
    let load = |name| SimStorage::from_file(&unpack(&samples, folder.path(), name)).unwrap();
    // All that it holds is zeros, of which its batmap says that all are there.
    let base = load("xen-dyn.vhd");
    let block = read(&base).unwrap().blocks()[&3];
    let data_at = FileOffset::new(block.at + 512 + 8192);
    base.write_all_at(&[0x77; 4096], data_at).unwrap();
    let parent = chain([base.fork()]).unwrap();
    let snapshot = chain([load("xen-snap.vhd"), base]).unwrap();
    snapshot.check().unwrap();
    let locators = snapshot.child().locators();
    let keys: Vec<&str> = locators.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["name", "MacX", "W2ku", "W2ru"]);
    assert_eq!(locators[3].1, ".\\xen-dyn.vhd");
    let expected = [(6 * MIB + 8192, vec![0x77; 4096])];
    assert_eq!(parent.content(4096), expected);
    assert_eq!(snapshot.content(4096), expected);

    let error = chain([load("xen-snap.vhd"), load("xen-big.vhd")]).unwrap_err();
    assert!(error.starts_with("the parent is"), "{error}");
    let error = chain([load("xen-snap.vhd")]).unwrap_err();
    assert_eq!(error, "the last file has a parent too");
}

#[test]
fn dynamic_and_fixed_vhdx_of_every_shape() {
    for layout in [Layout::Packed, Layout::Gapped] {
        for order in [Order::Windows, Order::Qemu, Order::Behind] {
            for large_sectors in [false, true] {
                // The last block ends behind the disk.
                let disk_len = 21 * MIB + 12 * 4096;
                let blocks = [5, 0, 10, 3, 4, 7];
                let image = VhdxImage::dynamic(2 * BLOCK, disk_len, layout, &blocks);
                let image = image.with_order(order).with_state(1, State::Zero);
                let mut image = image.with_state(2, State::Unmapped);
                if large_sectors {
                    image = image.with_4k_sectors();
                }
                let chain = judge([image.build().sim], [&image]);
                let sector = if large_sectors { 4096 } else { 512 };
                assert_eq!(chain.child().sector_size(), sector);
                let holes = layout == Layout::Gapped || order == Order::Qemu;
                let compact = chain.child().check_compact();
                assert_eq!(
                    compact.is_ok(),
                    !holes || order == Order::Behind,
                    "{compact:?}"
                );
            }
        }
    }
    let fixed = VhdxImage::fixed(BLOCK, 5 * BLOCK - 512);
    judge([fixed.build().sim], [&fixed]);
}

#[test]
fn blocks_behind_a_chunk_are_found_behind_its_bitmap() {
    let blocks = [8192, 1, 4097, 4095, 4096, 9000];
    let base = VhdxImage::dynamic(BLOCK, 9 << 30, Layout::Packed, &blocks);
    judge([base.build().sim], [&base]);
    // The second entry behind the first chunk's: a reader that forgets the bitmap's finds another.
    let image = read(&base.build().sim).unwrap();
    assert_eq!(image.vhdx().block_entry(4096), 4097);

    let slots = [
        Slot::partial(4096, Bits::Random(1)),
        Slot::partial(8191, Bits::Random(2)),
        Slot::full(4095),
        Slot::partial(1, Bits::Random(3)),
        Slot::partial(9215, Bits::Random(4)),
    ];
    let child = VhdxImage::child(&base, Layout::Packed, &slots);
    let chain = judge([child.build().sim, base.build().sim], [&child, &base]);
    assert_eq!(chain.child().vhdx().bitmaps().len(), 3);

    // Large sectors: 32 GiB in a chunk.
    let blocks = [0, 32767, 32768, 40000];
    let base = VhdxImage::dynamic(BLOCK, 40 << 30, Layout::Packed, &blocks).with_4k_sectors();
    let slots = [32767, 32768, 40959].map(|n| Slot::partial(n, Bits::Random(n)));
    let child = VhdxImage::child(&base, Layout::Gapped, &slots);
    judge([child.build().sim, base.build().sim], [&child, &base]);
}

#[test]
fn chains_of_vhdx_in_every_state() {
    for large_sectors in [false, true] {
        let mut base = VhdxImage::dynamic(2 * BLOCK, 24 * MIB, Layout::Packed, &[8, 1, 2, 3, 4, 5]);
        if large_sectors {
            base = base.with_4k_sectors();
        }
        for slot in 1..6 {
            base.slot_mut(slot).fill = Fill::Full;
        }
        let slots = [
            Slot::partial(0, Bits::Sectors(vec![0..1, 7..9, 200..300])),
            Slot::partial(1, Bits::Random(9)),
            Slot::full(2),
            Slot::anchor(3, State::Unmapped),
            Slot::partial(5, Bits::None),
            Slot::partial(6, Bits::All),
        ];
        let mut child = VhdxImage::child(&base, Layout::Gapped, &slots);
        child = child.with_state(4, State::Zero);
        // Larger than its parent.
        child.disk_len = 30 * MIB;
        let slots = [
            Slot::partial(7, Bits::Random(5)),
            Slot::partial(1, Bits::Random(6)),
            Slot::full(14),
        ];
        let mut grandchild = VhdxImage::child(&child, Layout::Packed, &[]);
        // Smaller than its parent, and of other blocks.
        grandchild.block_size = BLOCK;
        grandchild.disk_len = 29 * MIB;
        grandchild.place(Layout::Packed, slots);
        let models: [&dyn Model; 3] = [&grandchild, &child, &base];
        let files = [&grandchild, &child, &base].map(|image| image.build().sim);
        let chain = judge(files, models);
        let middle = &chain.links()[1].1;
        assert!(
            middle
                .check_compact()
                .unwrap_err()
                .contains("block 3 keeps")
        );
        let named = middle.vhdx().sectors_of(&*chain.links()[1].0, 0);
        assert_eq!(named.iter().filter(|named| **named).count(), 103);
    }
}

#[test]
fn chains_of_vhd() {
    const SMALL: u64 = 128 << 10;
    for style in [Style::Packed, Style::Aligned, Style::Xen, Style::Gapped] {
        let base = VhdImage::dynamic(SMALL, 12 * SMALL - 1024, style, &[3, 0, 11, 7, 5]);
        let child = VhdImage::child(&base, style, &[(0, Bits::Random(3)), (11, Bits::Random(4))]);
        let blocks = [
            (0, Bits::None),
            (4, Bits::All),
            (11, Bits::Sectors(vec![3..5, 9..10])),
        ];
        let mut grandchild = VhdImage::child(&child, style, &blocks);
        grandchild.disk_len = 14 * SMALL;
        if let VhdKind::Differencing(parent) = &mut grandchild.kind {
            parent.before_table = false;
            parent.space_in_bytes = false;
        }
        let files = [&grandchild, &child, &base].map(VhdImage::build);
        let chain = judge(files, [&grandchild, &child, &base]);
        let locators = chain.child().locators();
        assert_eq!(locators[2], ("W2ru".to_owned(), ".\\parent.vhd".to_owned()));
        let compact = chain.links()[2].1.check_compact();
        assert_eq!(compact.is_err(), style == Style::Gapped, "{compact:?}");
    }
    let fixed = VhdImage::fixed(3 * MIB - 512);
    judge([fixed.build()], [&fixed]);
    let child = VhdImage::new(
        VhdImage::child(&fixed, Style::Packed, &[]).kind,
        4 * MIB,
        3 * MIB - 512,
        Style::Aligned,
        &[(0, Bits::Random(8))],
    );
    judge([child.build(), fixed.build()], [&child, &fixed]);
}

#[test]
fn odd_vhdx_that_others_make() {
    let mut image = VhdxImage::dynamic(BLOCK, 8 * BLOCK, Layout::Packed, &[1, 0]);
    (image.twin_headers, image.tail) = (true, 512);
    let chain = judge([image.build().sim], [&image]);
    let compact = chain.child().check_compact().unwrap_err();
    assert!(compact.contains("the file at"), "{compact}");

    // QEMU cuts the last block where the disk ends.
    let mut image = VhdxImage::dynamic(2 * BLOCK, 3 * BLOCK, Layout::Packed, &[0, 1]);
    image.cut = BLOCK;
    let cut = self::chain([image.build().sim]).unwrap();
    compare(&[&image], &|buf, offset| cut.read_at(buf, offset)).unwrap();
    assert!(cut.check().unwrap_err().contains("reaches beyond"));

    // Two headers of one number that differ.
    image.twin_headers = true;
    image.data_write_guids[0] = [1; 16];
    let error = read(&image.build().sim).unwrap_err();
    assert!(error.contains("that differ"), "{error}");
    assert_eq!(CHUNK / BLOCK, image.chunk_ratio() * 2);
}
