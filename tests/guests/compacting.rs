//! Whole compactions by what real file systems call free, on VHD and VHDX as QEMU makes them:
//! the file is as short as can be, everything else is where it was.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rangemap::RangeSet;
use vhdfs::check::{CheckOptions, check};
use vhdfs::compact::{CompactOptions, CompactReport, IdlePolicy, IdleWork, Next};
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::guest::{Survey, SurveyOptions, survey};

use crate::rig::{Mounted, RawDisk, blank, can_mount, churn, contents, fill};
use crate::support::tools::{installed, tool};
use crate::support::{env_number, len, len_of, size};

/// Where the partition begins on the disk.
const START: u64 = 1 << 20;

/// A file system, and how to use it.
struct Kind {
    /// As the report calls it.
    name: &'static str,
    /// Bytes of the partition.
    size: u64,
    tools: &'static [&'static str],
    make: &'static [&'static str],
    /// Finds damage without mending it.
    check: &'static [&'static str],
    mount: Mount,
}

enum Mount {
    /// By mount(8), as this type.
    Kernel(&'static str),
    /// By a program: its name, and words before image and folder.
    Fuse(&'static str, &'static [&'static str]),
    /// With mtools: files are copied in and out.
    Mtools,
}

const EXT4: Kind = Kind {
    name: "ext4",
    size: 200 << 20,
    tools: &["mkfs.ext4", "e2fsck"],
    make: &["mkfs.ext4", "-q", "-F"],
    check: &["e2fsck", "-fn"],
    mount: Mount::Kernel("ext4"),
};
const EXT2: Kind = Kind {
    name: "ext2",
    tools: &["mkfs.ext2", "e2fsck"],
    make: &["mkfs.ext2", "-q", "-F"],
    mount: Mount::Kernel("ext2"),
    ..EXT4
};
const XFS: Kind = Kind {
    name: "XFS",
    size: 320 << 20,
    tools: &["mkfs.xfs", "xfs_repair"],
    make: &["mkfs.xfs", "-q", "-f"],
    check: &["xfs_repair", "-n", "-f"],
    mount: Mount::Kernel("xfs"),
};
const BTRFS: Kind = Kind {
    name: "btrfs",
    size: 300 << 20,
    tools: &["mkfs.btrfs", "btrfs"],
    make: &["mkfs.btrfs", "-q", "-f"],
    check: &["btrfs", "check", "--readonly"],
    mount: Mount::Kernel("btrfs"),
};
const NTFS: Kind = Kind {
    name: "NTFS",
    size: 120 << 20,
    tools: &["mkntfs", "ntfs-3g", "ntfsfix"],
    make: &["mkntfs", "-q", "-Q", "-F", "-p", "2048", "-s", "512"],
    check: &["ntfsfix", "-n"],
    mount: Mount::Fuse("ntfs-3g", &[]),
};
const EXFAT: Kind = Kind {
    name: "exFAT",
    size: 120 << 20,
    tools: &["mkfs.exfat", "mount.exfat-fuse", "fsck.exfat"],
    make: &["mkfs.exfat"],
    check: &["fsck.exfat", "-n"],
    mount: Mount::Kernel("exfat-fuse"),
};
const FAT32: Kind = Kind {
    name: "FAT32",
    size: 120 << 20,
    tools: &["mkfs.vfat", "mcopy", "mdel", "fsck.vfat"],
    make: &["mkfs.vfat", "-F", "32", "-s", "1"],
    check: &["fsck.vfat", "-n"],
    mount: Mount::Mtools,
};

/// A disk with one partition, whose file system was filled and half emptied.
struct Made {
    kind: &'static Kind,
    folder: tempfile::TempDir,
    contents: BTreeMap<PathBuf, Vec<u8>>,
}

impl Made {
    /// `None`, and it is said, where something is missing for it.
    fn new(kind: &'static Kind, seed: u64) -> Option<Self> {
        Self::build(kind, seed, false)
    }

    /// The same, but copied from below its system, which has it mounted.
    fn in_use(kind: &'static Kind) -> Option<Self> {
        Self::build(kind, 1, true)
    }

    fn build(kind: &'static Kind, seed: u64, in_use: bool) -> Option<Self> {
        let needs_mount = !matches!(kind.mount, Mount::Mtools);
        if !installed(kind.tools) || !installed(&["sgdisk", "qemu-img"]) {
            return None;
        }
        if needs_mount && !can_mount() {
            return None;
        }
        let mut made = Self {
            kind,
            folder: tempfile::tempdir().unwrap(),
            contents: BTreeMap::new(),
        };
        let (part, disk) = (made.path("part"), made.path("raw"));
        blank(&disk, START + kind.size + START);
        let sectors = (kind.size / 512).to_string();
        tool("sgdisk", &["-n", &format!("1:2048:+{sectors}")], &[&disk]);
        blank(&part, kind.size);
        tool(kind.make[0], &kind.make[1..], &[&part]);
        made.contents = made.used(&part, |folder| {
            fill(folder, seed, 90, |number| number % 2 == 0);
            churn(folder, seed, 60);
            if in_use {
                tool("sync", &["-f"], &[folder]);
                write_through(&folder.join("logged"));
                copy(&part, &disk, 0, START, kind.size);
            }
        });
        if !in_use {
            copy(&part, &disk, 0, START, kind.size);
        }
        Some(made)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the file system in `part` holds, after `change` to a folder of it where it can be mounted.
    fn used(&self, part: &Path, change: impl Fn(&Path)) -> BTreeMap<PathBuf, Vec<u8>> {
        let at = self.path("files");
        let mounted = match self.kind.mount {
            Mount::Kernel(kind) => Mounted::kernel(part, &at, kind, "loop"),
            Mount::Fuse(program, words) => Mounted::fuse(program, words, part, &at),
            Mount::Mtools => return self.used_by_mtools(part, change),
        };
        change(mounted.path());
        contents(mounted.path())
    }

    fn used_by_mtools(&self, part: &Path, change: impl Fn(&Path)) -> BTreeMap<PathBuf, Vec<u8>> {
        // Everything goes in, and what `change` deletes goes again.
        let (all, out) = (self.path("all"), self.path("out"));
        fs::create_dir_all(&all).unwrap();
        change(&all);
        let image = part.to_str().unwrap().to_owned();
        for copy in ["first", "second"] {
            for entry in fs::read_dir(&all).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                let target = format!("::{copy}-{name}");
                tool("mcopy", &["-s", "-i", &image], &[&path, Path::new(&target)]);
            }
        }
        tool("mdeltree", &["-i", &image, "::first-*"], &[]);
        fs::create_dir_all(&out).unwrap();
        fs::remove_dir_all(&all).unwrap();
        tool("mcopy", &["-s", "-n", "-i", &image, "::"], &[&out]);
        let found = contents(&out);
        fs::remove_dir_all(&out).unwrap();
        found
    }

    /// The disk in a file of that format.
    fn image(&self, format: &str) -> PathBuf {
        let path = self.path(format);
        let (driver, options) = match format {
            "vhd" => ("vpc", "subformat=dynamic,force_size=on"),
            _ => ("vhdx", "subformat=dynamic,block_size=1M"),
        };
        let words = ["convert", "-f", "raw", "-O", driver, "-o", options];
        tool("qemu-img", &words, &[&self.path("raw"), &path]);
        path
    }

    fn survey(&self) -> Survey {
        let disk = RawDisk::open(&self.path("raw"), 512);
        survey(&disk, &SurveyOptions::default()).unwrap()
    }

    /// The disk of `image` is as it should be: what is in use did not change, files and checker agree.
    fn verify(&self, image: &Path, free: &RangeSet<u64>) {
        self.verify_bytes(image, free);
        let part = self.path("part-after");
        blank(&part, self.kind.size);
        copy(&self.path("after"), &part, START, 0, self.kind.size);
        tool(self.kind.check[0], &self.kind.check[1..], &[&part]);
        let found = self.used_read_only(&part);
        assert!(found == self.contents, "{}: other files", self.kind.name);
    }

    /// All but what is `free` is what it was.
    fn verify_bytes(&self, image: &Path, free: &RangeSet<u64>) {
        let name = self.kind.name;
        assert!(check(image, &CheckOptions::default()).unwrap().is_clean());
        let after = self.path("after");
        extract(image, &after);
        let (old, new) = (
            fs::read(self.path("raw")).unwrap(),
            fs::read(&after).unwrap(),
        );
        assert_eq!(old.len(), new.len());
        for used in free.gaps(&(0..len(&old))) {
            let (start, end) = (size(used.start), size(used.end));
            assert!(old[start..end] == new[start..end], "{name}: {used:?}");
        }
    }

    fn used_read_only(&self, part: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        match self.kind.mount {
            Mount::Mtools => {
                let out = self.path("out");
                fs::create_dir_all(&out).unwrap();
                let image = part.to_str().unwrap();
                tool("mcopy", &["-s", "-n", "-i", image, "::"], &[&out]);
                let found = contents(&out);
                fs::remove_dir_all(&out).unwrap();
                found
            }
            _ => self.used(part, |_| {}),
        }
    }
}

/// Writes a file so that it is durable before the file system's next commit.
fn write_through(path: &Path) {
    let mut file = File::create(path).unwrap();
    file.write_all(&[7; 300]).unwrap();
    file.sync_all().unwrap();
}

/// Copies what is not zero.
fn copy(from: &Path, to: &Path, start: u64, target: u64, len: u64) {
    let (from, to) = (
        File::open(from).unwrap(),
        File::options().write(true).open(to).unwrap(),
    );
    let mut piece = vec![0; 1 << 20];
    for at in (0..len).step_by(1 << 20) {
        let part = &mut piece[..size((len - at).min(1 << 20))];
        from.read_exact_at(part, start + at).unwrap();
        if part.iter().any(|byte| *byte != 0) {
            to.write_all_at(part, target + at).unwrap();
        }
    }
}

/// What the guest sees of `image`, in a raw file.
fn extract(image: &Path, raw: &Path) {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Disk::open(image, &options).unwrap();
    blank(raw, disk.len());
    let file = File::options().write(true).open(raw).unwrap();
    let mut piece = vec![0; 1 << 20];
    for at in (0..disk.len()).step_by(1 << 20) {
        let part = &mut piece[..size((disk.len() - at).min(1 << 20))];
        disk.read_at(part, at).unwrap();
        if part.iter().any(|byte| *byte != 0) {
            file.write_all_at(part, at).unwrap();
        }
    }
}

/// Bytes in the blocks of `image`, of a file system that has the smallest, that hold nothing but `byte`.
fn filled_with(byte: u8, image: &Path) -> u64 {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Disk::open(image, &options).unwrap();
    let mut piece = vec![0; 1 << 20];
    let mut filled = 0;
    for at in (0..disk.len()).step_by(1 << 20) {
        let part = &mut piece[..size((disk.len() - at).min(1 << 20))];
        disk.read_at(part, at).unwrap();
        let blocks = part.chunks_exact(1024);
        filled += len_of(
            &blocks
                .filter(|block| **block == [byte; 1024])
                .collect::<Vec<_>>(),
        );
    }
    filled * 1024
}

fn compact(image: &Path, fs_aware: bool) -> CompactReport {
    let options = CompactOptions {
        fs_aware,
        ..CompactOptions::default()
    };
    compact_with(image, &options)
}

/// Compacts the disk as an idle one.
fn compact_in_background(image: &Path) {
    let open = OpenOptions {
        punch_holes: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open(image, &open).unwrap();
    let policy = IdlePolicy {
        idle_after: Duration::ZERO,
        min_reclaim: 1,
        punch_holes: false,
        fs_aware: true,
        ..IdlePolicy::default()
    };
    let mut work = IdleWork::new(Arc::clone(&disk), policy);
    loop {
        match work.step() {
            Next::Again => {}
            Next::Wait(time) => std::thread::sleep(time),
            Next::Done => break,
            Next::Failed(error) => panic!("{error}"),
        }
    }
    disk.close().unwrap();
}

fn compact_with(image: &Path, options: &CompactOptions) -> CompactReport {
    let open = OpenOptions {
        punch_holes: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open(image, &open).unwrap();
    let report = disk.compact(options).wait().unwrap();
    disk.close().unwrap();
    report
}

/// The length that the file must have: what an empty one has, and its blocks in which something is
/// neither free nor zero.
fn least(made: &Made, format: &str, survey: &Survey) -> u64 {
    let raw = made.path("raw");
    let empty = made.path(&format!("empty.{format}"));
    let disk_len = fs::metadata(&raw).unwrap().len();
    let (driver, options, block, slot) = match format {
        "vhd" => (
            "vpc",
            "subformat=dynamic,force_size=on",
            2 << 20,
            512 + (2 << 20),
        ),
        _ => ("vhdx", "subformat=dynamic,block_size=1M", 1 << 20, 1 << 20),
    };
    let words = ["create", "-q", "-f", driver, "-o", options];
    tool(
        "qemu-img",
        &words,
        &[&empty, Path::new(&disk_len.to_string())],
    );
    // QEMU leaves room behind the headers of a VHDX, which a block can have.
    let headers = compact(&empty, false).length_after;
    let bytes = fs::read(&raw).unwrap();
    let live = (0..disk_len).step_by(size(block)).filter(|start| {
        let range = *start..(start + block).min(disk_len);
        let mut used = survey.free.gaps(&range);
        used.any(|used| {
            bytes[size(used.start)..size(used.end)]
                .iter()
                .any(|byte| *byte != 0)
        })
    });
    headers + u64::try_from(live.count()).unwrap() * slot
}

fn shrinks(kind: &'static Kind) {
    for seed in 1..=env_number("VHDFS_SOAK", 1) {
        let Some(made) = Made::new(kind, seed) else {
            return;
        };
        let survey = made.survey();
        for format in ["vhd", "vhdx"] {
            let image = made.image(format);
            let agnostic = made.path("agnostic");
            fs::copy(&image, &agnostic).unwrap();
            let without = compact(&agnostic, false).length_after;

            let report = compact(&image, true);
            let [part] = &report.parts[..] else {
                panic!("{report:?}")
            };
            assert_eq!(
                (part.content, &part.skipped),
                (Some(kind.name), &None),
                "{part:?}"
            );
            let length = fs::metadata(&image).unwrap().len();
            assert_eq!(length, report.length_after);
            assert_eq!(
                length,
                least(&made, format, &survey),
                "{}, {format}",
                kind.name
            );
            assert!(length + (16 << 20) < without, "{length}, without {without}");
            made.verify(&image, &survey.free);
            println!("{}, {format}: {without} without, {length} with", kind.name);
        }
    }
}

#[test]
fn ext4_shrinks() {
    shrinks(&EXT4);
}

#[test]
fn xfs_shrinks() {
    shrinks(&XFS);
}

#[test]
fn btrfs_shrinks() {
    shrinks(&BTRFS);
}

#[test]
fn ntfs_shrinks() {
    shrinks(&NTFS);
}

#[test]
fn exfat_shrinks() {
    shrinks(&EXFAT);
}

#[test]
fn fat32_shrinks() {
    shrinks(&FAT32);
}

/// Of a disk that was copied while its guest had it mounted, nothing goes but zeros, and the report says
/// why. Returns the report.
fn stays(kind: &'static Kind, format: &str, made: &Made) -> CompactReport {
    let image = made.image(format);
    let agnostic = made.path("agnostic");
    fs::copy(&image, &agnostic).unwrap();
    let without = compact(&agnostic, false);
    let report = compact(&image, true);
    assert_eq!(report.length_after, without.length_after, "{}", kind.name);
    assert_eq!(
        report.blocks_dropped, without.blocks_dropped,
        "{}",
        kind.name
    );
    let [part] = &report.parts[..] else {
        panic!("{report:?}")
    };
    assert_eq!((part.content, part.free), (Some(kind.name), 0));
    println!("{}: {}", kind.name, part.skipped.as_ref().unwrap());
    made.verify_bytes(&image, &RangeSet::new());
    report
}

#[test]
fn a_copy_of_a_disk_in_use_keeps_all() {
    for kind in [&XFS, &BTRFS, &EXFAT] {
        let Some(made) = Made::in_use(kind) else {
            continue;
        };
        stays(kind, "vhd", &made);
        stays(kind, "vhdx", &made);
    }
}

/// A machine mounts a file system, writes past its cache, and is saved at once: its disk is what it is.
#[test]
fn what_was_written_right_after_mounting_stays() {
    const WRITTEN: u64 = 8 << 20;
    for kind in [&EXT2, &EXT4, &XFS, &BTRFS] {
        if !installed(kind.tools) || !installed(&["qemu-img"]) || !can_mount() {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (part, raw, data) = (path("part"), path("raw"), path("data"));
        blank(&part, kind.size);
        tool(kind.make[0], &kind.make[1..], &[&part]);
        fs::write(&data, vec![0x5a; size(WRITTEN)]).unwrap();
        let made = Made {
            kind,
            contents: BTreeMap::new(),
            folder,
        };
        made.used(&part, |folder| {
            let mut of = std::ffi::OsString::from("of=");
            of.push(folder.join("new"));
            let words = ["oflag=direct", "bs=1M", "status=none"];
            let input = format!("if={}", data.display());
            tool("dd", &[&words[..], &[&input]].concat(), &[Path::new(&of)]);
            tool("cp", &["--sparse=always"], &[&part, &raw]);
        });
        let image = made.image("vhd");
        compact_in_background(&image);
        assert_eq!(filled_with(0x5a, &image), WRITTEN, "{}", kind.name);
    }
}

/// What ntfs-3g has mounted looks as if it were not; what Windows is to look through does not.
#[test]
fn a_dirty_ntfs_keeps_all() {
    let Some(made) = Made::new(&NTFS, 1) else {
        return;
    };
    tool("ntfsfix", &[], &[&made.path("part")]);
    copy(&made.path("part"), &made.path("raw"), 0, START, NTFS.size);
    stays(&NTFS, "vhd", &made);
    stays(&NTFS, "vhdx", &made);
}

/// ext4 tells what is free after a crash, if somebody says that it was one.
#[test]
fn a_crashed_ext4() {
    let Some(made) = Made::in_use(&EXT4) else {
        return;
    };
    let kept = stays(&EXT4, "vhd", &made);
    stays(&EXT4, "vhdx", &made);
    let options = CompactOptions {
        fs_aware: true,
        replay_journal: true,
        ..CompactOptions::default()
    };
    let image = made.image("vhd");
    let report = compact_with(&image, &options);
    assert!(report.parts[0].journal_replayed);
    assert!(report.length_after + (16 << 20) < kept.length_after);
    extract(&image, &made.path("after"));
    let part = made.path("part-after");
    blank(&part, EXT4.size);
    copy(&made.path("after"), &part, START, 0, EXT4.size);
    // Its own system replays the journal.
    assert!(made.used(&part, |_| {}) == made.contents);
    tool("e2fsck", &["-fn"], &[&part]);
}
