//! What other programs make of the files that the second reading builds, and it of theirs. Where a
//! program is missing, the test skips and says so.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;

use support::image::Style;
use support::samples::{samples, unpack};
use support::second::build::Bits;
use support::second::build::log::{LogEntry, LogImage};
use support::second::build::model::{Model, compare, save};
use support::second::build::vhd::VhdImage;
use support::second::build::vhdx::{Layout, Order, Slot, VhdxImage};
use support::second::{Chain, State, read};
use support::tools::{Mounted, converted, installed, raw_content, reader, replayed_by_qemu, tool};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::FileOffset;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = MIB;

#[test]
fn qemu_reads_what_is_built() {
    if !installed(&["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dynamic = |layout, order| {
        let disk_len = 21 * MIB + 512;
        let image = VhdxImage::dynamic(2 * BLOCK, disk_len, layout, &[5, 0, 10, 3, 4, 7]);
        image.with_order(order).with_state(1, State::Zero)
    };
    let images = [
        dynamic(Layout::Packed, Order::Windows).with_state(2, State::Undefined),
        dynamic(Layout::Gapped, Order::Qemu).with_state(2, State::Unmapped),
        dynamic(Layout::Gapped, Order::Behind),
        VhdxImage::dynamic(
            BLOCK,
            9 << 30,
            Layout::Packed,
            &[8192, 1, 4097, 4095, 4096, 9000],
        ),
        VhdxImage::fixed(BLOCK, 5 * BLOCK - 512),
    ];
    for (n, image) in images.iter().enumerate() {
        let path = folder.path().join(format!("{n}.vhdx"));
        save(&image.build().sim, &path);
        tool("qemu-img", &["check", "-f", "vhdx"], &[&path]);
        let raw = converted(&path, "vhdx");
        compare(&[image], &reader(&raw)).unwrap_or_else(|error| panic!("file {n}: {error}"));
        fs::remove_file(raw).unwrap();
    }
    for style in [Style::Packed, Style::Aligned, Style::Xen, Style::Gapped] {
        let small = 128 << 10;
        let image = VhdImage::dynamic(small, 12 * small - 1024, style, &[3, 0, 11, 7, 5]);
        let path = folder.path().join("disk.vhd");
        save(&image.build(), &path);
        let raw = converted(&path, "vpc");
        compare(&[&image], &reader(&raw)).unwrap();
    }
}

#[test]
fn qemu_and_we_read_the_same_samples() {
    let Some(samples) = samples().filter(|_| installed(&["qemu-img"])) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for (name, format) in [
        ("ext2.vhd", "vpc"),
        ("qemu10-forcesize-dyn.vhd", "vpc"),
        ("iotest-dynamic-1G.vhdx", "vhdx"),
        ("test-disk2vhd.vhdx", "vhdx"),
        ("qemu10-dyn-1M.vhdx", "vhdx"),
    ] {
        let path = unpack(&samples, folder.path(), name);
        let sim: Arc<dyn Storage> = Arc::new(SimStorage::from_file(&path).unwrap());
        let raw = converted(&path, format);
        let chain = Chain::open([sim]).unwrap();
        assert!(chain.content(65536) == raw_content(&raw, 65536), "{name}");
        fs::remove_file(path).unwrap();
        fs::remove_file(raw).unwrap();
    }
}

#[test]
fn qemu_replays_the_sample_log_to_the_same() {
    let Some(samples) = samples().filter(|_| installed(&["qemu-img"])) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = unpack(&samples, folder.path(), "iotest-dirtylog-10G-4M.vhdx");
    let before: Arc<dyn Storage> = Arc::new(SimStorage::from_file(&path).unwrap());
    let chain = Chain::open([before.clone()]).unwrap();
    replayed_by_qemu(&path);
    let raw = converted(&path, "vhdx");
    let content = chain.content(65536);
    assert!(content.len() > 10 && content == raw_content(&raw, 65536));
    let replayed = read(&SimStorage::from_file(&path).unwrap()).unwrap();
    assert!(!replayed.vhdx().log.is_live());
    assert_eq!(replayed.blocks(), chain.child().blocks());
    // The log has something to say: without it the table is another.
    let writes = chain.child().vhdx().log.writes();
    let differs = writes.iter().any(|write| {
        let mut page = vec![0; 4096];
        let at = FileOffset::new(write.place().start);
        before.read_exact_at(&mut page, at).unwrap();
        !matches!(write, support::second::log::Write::Page { bytes, .. } if *bytes == page)
    });
    assert!(differs);
}

#[test]
fn qemu_replays_built_logs_to_the_same() {
    if !installed(&["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let after = VhdxImage::dynamic(2 * BLOCK, 20 * MIB, Layout::Packed, &[5, 0, 3]);
    let mut before = after.clone();
    before.slot_mut(0).linked = false;
    before.slot_mut(3).linked = false;
    for start in [0, MIB - 4096, MIB - 8192] {
        let mut built = before.build();
        let empty = LogEntry::default();
        let link = LogEntry::of(built.pages_to(&after.build()));
        let mut log = LogImage::new(vec![empty, link.clone(), link]);
        (log.start, log.first) = (start, 1 << 40);
        built.write_log(&log);
        let path = folder.path().join("log.vhdx");
        save(&built.sim, &path);
        replayed_by_qemu(&path);
        let raw = converted(&path, "vhdx");
        compare(&[&after], &reader(&raw)).unwrap();
    }
}

/// Compares what libvhdi reads of `child` and of `base`, its parent; `None` where it cannot be run.
fn libvhdi_agrees(child: &VhdxImage, base: &VhdxImage) -> Option<()> {
    let folder = tempfile::tempdir().unwrap();
    save(&base.build().sim, &folder.path().join("parent.vhdx"));
    save(&child.build().sim, &folder.path().join("child.vhdx"));
    let models: [&dyn Model; 2] = [child, base];
    for (name, models) in [("parent.vhdx", &models[1..]), ("child.vhdx", &models)] {
        let mounted = Mounted::new(&folder.path().join(name))?;
        let result = compare(models, &reader(&mounted.disk()));
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    Some(())
}

#[test]
fn libvhdi_reads_children_of_vhdx() {
    for large_sectors in [false, true] {
        let with_sectors = |image: VhdxImage| match large_sectors {
            true => image.with_4k_sectors(),
            false => image,
        };
        // It looks at the bits of blocks that are not there, too, and reads blocks whose state is
        // zero from the parent.
        let child = |base: &VhdxImage, layout, slots: &[Slot]| {
            let mut child = VhdxImage::child(base, layout, slots);
            child.junk_bits = false;
            child
        };
        let blocks = [8, 1, 2, 3, 5];
        let base = VhdxImage::dynamic(2 * BLOCK, 24 * MIB, Layout::Packed, &blocks);
        let base = with_sectors(base);
        let slots = [
            Slot::partial(0, Bits::Sectors(vec![0..1, 7..9, 200..300])),
            Slot::partial(1, Bits::Random(9)),
            Slot::full(2),
            Slot::partial(5, Bits::None),
        ];
        let small = child(&base, Layout::Gapped, &slots);
        let Some(()) = libvhdi_agrees(&small, &base) else {
            return;
        };
        // Several chunks.
        let chunk = if large_sectors { 32768 } else { 4096 };
        let blocks = [2 * chunk, 1, chunk + 1, chunk - 1, chunk];
        let disk_len = (2 * chunk + 5) * BLOCK;
        let base = with_sectors(VhdxImage::dynamic(BLOCK, disk_len, Layout::Packed, &blocks));
        let partial = [1, chunk - 1, chunk, 2 * chunk + 4];
        let slots = partial.map(|block| Slot::partial(block, Bits::Random(block)));
        libvhdi_agrees(&child(&base, Layout::Packed, &slots), &base);
    }
}

#[test]
fn libvhdi_reads_children_of_vhd() {
    const SMALL: u64 = 128 << 10;
    let folder = tempfile::tempdir().unwrap();
    for style in [Style::Packed, Style::Aligned, Style::Xen, Style::Gapped] {
        let base = VhdImage::dynamic(SMALL, 12 * SMALL - 1024, style, &[3, 0, 11, 7, 5]);
        // Of each byte of a bitmap it takes all bits behind the first set one for set: ranges end
        // where bytes do. Where they start tells the order of the bits.
        let ranges = vec![3..8, 21..48, 63..64, 128..136, 250..256];
        let blocks = [
            (0, Bits::Sectors(ranges.clone())),
            (4, Bits::All),
            (11, Bits::Sectors(ranges)),
            (5, Bits::None),
        ];
        let child = VhdImage::child(&base, style, &blocks);
        save(&base.build(), &folder.path().join("parent.vhd"));
        let path = folder.path().join("child.vhd");
        save(&child.build(), &path);
        let Some(mounted) = Mounted::new(&path) else {
            return;
        };
        let result = compare(&[&child, &base], &reader(&mounted.disk()));
        result.unwrap_or_else(|error| panic!("{style:?}: {error}"));
    }
}

/// What `qemu-img` of another day made of the log's sample; see the samples' README.
#[test]
#[ignore = "hashes 10 GiB, which takes a minute"]
fn the_sample_log_gives_the_known_sum() {
    let Some(samples) = samples().filter(|_| installed(&["sha256sum"])) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = unpack(&samples, folder.path(), "iotest-dirtylog-10G-4M.vhdx");
    let sim: Arc<dyn Storage> = Arc::new(SimStorage::from_file(&path).unwrap());
    let chain = Chain::open([sim]).unwrap();
    let raw = folder.path().join("disk.raw");
    let mut file = File::create(&raw).unwrap();
    file.set_len(chain.disk_len()).unwrap();
    for (at, bytes) in chain.content(MIB) {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&bytes).unwrap();
    }
    let sum = tool("sha256sum", &[], &[&raw]);
    assert!(sum.starts_with("179cefe8b0587f12"), "{sum}");
}
