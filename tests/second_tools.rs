//! What other programs make of the files that the second reading builds, and it of theirs. Where a
//! program is missing, the test skips and says so.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use support::image::Style;
use support::samples::{samples, unpack};
use support::second::build::Bits;
use support::second::build::log::{LogEntry, LogImage};
use support::second::build::model::{Model, compare, save};
use support::second::build::vhd::VhdImage;
use support::second::build::vhdx::{Layout, Order, Slot, VhdxImage};
use support::second::{Chain, State, read};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::FileOffset;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = MIB;

/// Runs a program; `None`, and it is said, where there is none.
fn run(program: &str, arguments: &[&OsStr]) -> Option<Output> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: {program}: {error}");
            None
        }
    }
}

/// Runs `qemu-img`; it must succeed.
fn qemu_img(arguments: &[&OsStr]) -> Option<()> {
    let output = run("qemu-img", arguments)?;
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Some(())
}

/// What the raw disk at `path` holds, without zeros: offset and bytes of each `piece`.
fn raw_content(path: &Path, piece: usize) -> Vec<(u64, Vec<u8>)> {
    let raw = SimStorage::from_file(path).unwrap();
    let end = FileOffset::new(raw.len().unwrap());
    let mut found = Vec::new();
    let mut at = FileOffset::new(0);
    while let Some(data) = raw.next_data(at, end).unwrap() {
        let piece = u64::try_from(piece).unwrap();
        let start = data.start.get() / piece * piece;
        let mut bytes = vec![0; usize::try_from(piece.min(end.get() - start)).unwrap()];
        raw.read_exact_at(&mut bytes, FileOffset::new(start))
            .unwrap();
        if bytes.iter().any(|&byte| byte != 0) {
            found.push((start, bytes));
        }
        at = FileOffset::new(start + piece);
    }
    found
}

/// What QEMU makes of the file at `path`, as a raw disk beside it.
fn converted(path: &Path, format: &str) -> Option<PathBuf> {
    let raw = path.with_extension("raw");
    let words = ["convert", "-f", format, "-O", "raw"].map(OsStr::new);
    qemu_img(&[&words[..], &[path.as_os_str(), raw.as_os_str()]].concat())?;
    Some(raw)
}

fn reader(path: &Path) -> impl Fn(&mut [u8], u64) {
    let file = File::open(path).unwrap();
    move |buf: &mut [u8], offset: u64| {
        (&file).seek(SeekFrom::Start(offset)).unwrap();
        (&file).read_exact(buf).unwrap();
    }
}

#[test]
fn qemu_reads_what_is_built() {
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
        let check = ["check", "-f", "vhdx"].map(OsStr::new);
        let Some(()) = qemu_img(&[&check[..], &[path.as_os_str()]].concat()) else {
            return;
        };
        let raw = converted(&path, "vhdx").unwrap();
        compare(&[image], &reader(&raw)).unwrap_or_else(|error| panic!("file {n}: {error}"));
        fs::remove_file(raw).unwrap();
    }
    for style in [Style::Packed, Style::Aligned, Style::Xen, Style::Gapped] {
        let small = 128 << 10;
        let image = VhdImage::dynamic(small, 12 * small - 1024, style, &[3, 0, 11, 7, 5]);
        let path = folder.path().join("disk.vhd");
        save(&image.build(), &path);
        let raw = converted(&path, "vpc").unwrap();
        compare(&[&image], &reader(&raw)).unwrap();
    }
}

#[test]
fn qemu_and_we_read_the_same_samples() {
    let Some(samples) = samples() else { return };
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
        let Some(raw) = converted(&path, format) else {
            return;
        };
        let chain = Chain::open([sim]).unwrap();
        assert!(chain.content(65536) == raw_content(&raw, 65536), "{name}");
        fs::remove_file(path).unwrap();
        fs::remove_file(raw).unwrap();
    }
}

#[test]
fn qemu_replays_the_sample_log_to_the_same() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = unpack(&samples, folder.path(), "iotest-dirtylog-10G-4M.vhdx");
    let before: Arc<dyn Storage> = Arc::new(SimStorage::from_file(&path).unwrap());
    let chain = Chain::open([before.clone()]).unwrap();
    let repair = ["check", "-q", "-f", "vhdx", "-r", "all"].map(OsStr::new);
    let Some(()) = qemu_img(&[&repair[..], &[path.as_os_str()]].concat()) else {
        return;
    };
    let raw = converted(&path, "vhdx").unwrap();
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
        let repair = ["check", "-q", "-f", "vhdx", "-r", "all"].map(OsStr::new);
        let Some(()) = qemu_img(&[&repair[..], &[path.as_os_str()]].concat()) else {
            return;
        };
        let raw = converted(&path, "vhdx").unwrap();
        compare(&[&after], &reader(&raw)).unwrap();
    }
}

/// A directory that libvhdi mounted.
struct Mounted(PathBuf);

impl Mounted {
    /// The file's disk; `None`, and it is said, where nothing can be mounted.
    fn new(path: &Path) -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            println!("skipped: no /dev/fuse");
            return None;
        }
        let mountpoint = path.with_extension("mount");
        fs::create_dir_all(&mountpoint).unwrap();
        let output = run("vhdimount", &[path.as_os_str(), mountpoint.as_os_str()])?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() && said.contains("fuse") {
            println!("skipped: vhdimount: {said}");
            return None;
        }
        assert!(output.status.success(), "vhdimount: {said}");
        Some(Self(mountpoint))
    }

    /// The disk, of a chain the child's.
    fn disk(&self) -> PathBuf {
        let disks = (1..).map(|n| self.0.join(format!("vhdi{n}")));
        let last = disks.take_while(|disk| disk.exists()).last();
        last.expect("a disk")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("fusermount", &[OsStr::new("-u"), self.0.as_os_str()])
            .or_else(|| run("umount", &[self.0.as_os_str()]));
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
    let Some(samples) = samples() else { return };
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
    let Some(output) = run("sha256sum", &[raw.as_os_str()]) else {
        return;
    };
    let sum = String::from_utf8(output.stdout).unwrap();
    assert!(sum.starts_with("179cefe8b0587f12"), "{sum}");
}
