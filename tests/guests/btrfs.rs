//! btrfs, made by mkfs.btrfs, filled by the kernel, measured by btrfs, judged by btrfs check.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::{Outcome, Survey, SurveyOptions, survey};

use crate::rig::{self, Mounted, RawDisk};
use crate::support::tools::{installed, run, tool};

const MIB: u64 = 1 << 20;

/// A folder with a sparse disk, and a place to mount it.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// `None`, and it is said, where something is missing, or mkfs.btrfs does not know the `words`.
    fn new(words: &[&str]) -> Option<Self> {
        if !installed(&["mkfs.btrfs", "btrfs"]) || !rig::can_mount() {
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let bench = Self { folder };
        rig::blank(&bench.image(), 512 * MIB);
        let output = run("mkfs.btrfs", &[&["-q"], words].concat(), &[&bench.image()]);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            println!("skipped: mkfs.btrfs {words:?}: {said}");
        }
        output.status.success().then_some(bench)
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn mount(&self, options: &str) -> Mounted {
        let at = self.folder.path().join("mount");
        let options = format!("loop,{options}");
        Mounted::kernel(&self.image(), &at, "btrfs", &options)
    }

    fn copy(&self, name: &str) -> PathBuf {
        let copy = self.folder.path().join(name);
        tool("cp", &["--sparse=always"], &[&self.image(), &copy]);
        copy
    }

    /// What btrfs calls free, of a filesystem that nobody changes meanwhile.
    fn told(&self) -> u64 {
        let mounted = self.mount("ro");
        let said = tool(
            "btrfs",
            &["filesystem", "usage", "--raw"],
            &[mounted.path()],
        );
        let mut free = 0;
        for line in said.lines() {
            if let Some(bytes) = line.trim().strip_prefix("Device unallocated:") {
                free += bytes.trim().parse::<u64>().expect("a number");
            }
            // As "Metadata,DUP: Size:33554432, Used:180224 (0.54%)".
            let Some((kind, rest)) = line.split_once(": Size:") else {
                continue;
            };
            let (size, used) = rest.split_once(", Used:").expect("both");
            let used = used.split(' ').next().expect("a number");
            let [size, used] = [size, used].map(|word| word.parse::<u64>().expect("a number"));
            free += (size - used) * if kind.ends_with(",DUP") { 2 } else { 1 };
        }
        free
    }
}

fn look(path: &Path) -> Survey {
    let disk = RawDisk::open(path, 512);
    survey(&disk, &SurveyOptions::default()).expect("readable")
}

/// Bytes that are reported free, and that may go.
fn read(path: &Path) -> (u64, u64) {
    let survey = look(path);
    assert_eq!(survey.parts.len(), 1, "{:?}", survey.parts);
    assert_eq!(survey.parts[0].content, Some("btrfs"));
    match &survey.parts[0].outcome {
        Outcome::Read {
            reported_free,
            free,
            ..
        } => (*reported_free, *free),
        Outcome::Skipped { reason } => panic!("btrfs {reason}"),
    }
}

/// Why it is in use.
fn skipped(path: &Path) -> String {
    let survey = look(path);
    assert!(survey.free.is_empty());
    match &survey.parts[0].outcome {
        Outcome::Skipped { reason } => reason.clone(),
        Outcome::Read { .. } => panic!("read"),
    }
}

/// What is reported, and the reserved parts less: the first MiB, and the second superblock.
fn check_free(bench: &Bench) {
    let (reported, free) = read(&bench.image());
    assert_eq!(reported, bench.told());
    assert_eq!(reported - free, MIB + (64 << 10));
}

/// Files, subvolumes, snapshots, shared and compressed extents, and a part of all that deleted.
fn fill(folder: &Path) {
    let subvolume = folder.join("subvolume");
    tool("btrfs", &["subvolume", "create"], &[&subvolume]);
    rig::fill(&subvolume, 7, 40, |number| number % 3 == 0);
    for name in ["kept", "gone"] {
        let snapshot = folder.join(name);
        tool(
            "btrfs",
            &["subvolume", "snapshot"],
            &[&subvolume, &snapshot],
        );
        fs::write(snapshot.join("own"), vec![7; 50_000]).expect("written");
    }
    fs::write(folder.join("plain"), vec![8; 3_000_000]).expect("written");
    tool(
        "cp",
        &["--reflink=always"],
        &[&folder.join("plain"), &folder.join("shared")],
    );
    let shared = File::options()
        .write(true)
        .open(folder.join("shared"))
        .expect("a file");
    shared
        .write_all_at(&vec![9; 100_000], 1_000_000)
        .expect("written");
    let small = folder.join("small");
    fs::create_dir_all(&small).expect("a folder");
    for number in 0..600 {
        fs::write(small.join(number.to_string()), vec![3; 4000]).expect("written");
    }
    tool("sync", &["-f"], &[folder]);
    for number in (0..600).step_by(2) {
        fs::remove_file(small.join(number.to_string())).expect("deleted");
    }
    fs::remove_file(folder.join("plain")).expect("deleted");
    tool(
        "btrfs",
        &["subvolume", "delete", "-C"],
        &[&folder.join("gone")],
    );
}

fn check(path: &Path) {
    tool("btrfs", &["check", "--readonly"], &[path]);
}

/// Spoils all that is free, and sees that nobody minds.
fn nothing_else_is_lost(bench: &Bench) {
    let before = rig::contents(bench.mount("ro").path());
    let found = look(&bench.image());
    let disk = RawDisk::open(&bench.image(), 512);
    for range in found.free.iter() {
        disk.spoil(range.start, range.end);
    }
    check(&bench.image());
    let mounted = bench.mount("rw");
    let after = rig::contents(mounted.path());
    assert!(before == after, "files differ");
    // Now the guest may use it all again.
    rig::fill(mounted.path(), 11, 20, |number| number % 2 == 0);
    drop(mounted);
    tool("btrfs", &["check", "--check-data-csum"], &[&bench.image()]);
}

fn works(words: &[&str], options: &str) {
    let Some(bench) = Bench::new(words) else {
        return;
    };
    check_free(&bench);
    fill(bench.mount(options).path());
    check_free(&bench);
    nothing_else_is_lost(&bench);
}

#[test]
fn as_it_comes() {
    works(&[], "rw");
}

#[test]
fn a_space_cache_and_compression() {
    works(
        &["-R", "^free-space-tree", "-m", "single"],
        "space_cache=v1,compress=zstd",
    );
}

#[test]
fn mixed_groups() {
    works(&["--mixed", "--csum", "xxhash"], "compress-force=lzo");
}

#[test]
fn another_identity_and_another_size() {
    let Some(bench) = Bench::new(&[]) else { return };
    if !installed(&["btrfstune"]) {
        return;
    }
    tool("btrfstune", &["-m"], &[&bench.image()]);
    let mounted = bench.mount("rw");
    fill(mounted.path());
    tool(
        "btrfs",
        &["filesystem", "resize", "-100m"],
        &[mounted.path()],
    );
    drop(mounted);
    // What is behind it is not its own.
    check_free(&bench);
    let behind = 412 * MIB..512 * MIB;
    assert!(!look(&bench.image()).free.overlaps(&behind));
    nothing_else_is_lost(&bench);
    // Cut off, so that the filesystem is larger than its disk.
    let file = File::options()
        .write(true)
        .open(bench.image())
        .expect("a file");
    file.set_len(411 * MIB).expect("shorter");
    assert!(skipped(&bench.image()).contains("more than the"));
}

/// The committed view of a disk in use is sound, whatever was written since.
#[test]
fn a_copy_of_a_disk_in_use() {
    let Some(bench) = Bench::new(&[]) else { return };
    let mounted = bench.mount("commit=300");
    fill(mounted.path());
    tool("sync", &["-f"], &[mounted.path()]);
    let committed = rig::contents(mounted.path());
    fs::write(mounted.path().join("late"), vec![5; 2_000_000]).expect("written");
    let copy = bench.copy("copy");
    // What fsync saves until the next commit is in no tree that is read here.
    let late = File::open(mounted.path().join("late")).expect("a file");
    late.sync_all().expect("saved");
    let logged = bench.copy("logged");
    drop((late, mounted));

    let found = look(&copy);
    assert!(read(&copy).1 > 0);
    let disk = RawDisk::open(&copy, 512);
    for range in found.free.iter() {
        disk.spoil(range.start, range.end);
    }
    check(&copy);
    fs::rename(&copy, bench.image()).expect("moved");
    assert!(
        rig::contents(bench.mount("ro").path()) == committed,
        "files differ"
    );
    assert!(skipped(&logged).contains("its log of fsync calls"));
}

/// btrfs looks the same whether its system sleeps or was shut down.
#[test]
fn a_system_that_sleeps_in_a_file() {
    let Some(bench) = Bench::new(&["--mixed"]) else {
        return;
    };
    let mut memory = vec![1; 1 << 20];
    memory[4086..4096].copy_from_slice(b"S1SUSPEND\0");
    let mounted = bench.mount("rw");
    fs::write(mounted.path().join("small"), &memory[..8192]).expect("written");
    tool("sync", &["-f"], &[mounted.path()]);
    assert!(read(&bench.copy("copy")).1 > 0);
    fs::write(mounted.path().join("swapfile"), &memory).expect("written");
    drop(mounted);
    assert!(skipped(&bench.image()).contains("memory of a system that sleeps"));
}

#[test]
fn what_is_not_one_plain_device_is_left_alone() {
    let Some(bench) = Bench::new(&[]) else { return };
    if !installed(&["btrfstune"]) {
        return;
    }
    tool("btrfstune", &["-S", "1"], &[&bench.image()]);
    assert!(skipped(&bench.image()).contains("a seed"));
    let other = bench.folder.path().join("other");
    rig::blank(&other, 512 * MIB);
    tool(
        "mkfs.btrfs",
        &["-q", "-f", "-d", "raid0"],
        &[&bench.image(), &other],
    );
    for image in [&bench.image(), &other] {
        assert!(skipped(image).contains("spans 2 devices"));
    }
}

#[test]
fn small_nodes_and_two_of_all() {
    works(&["-n", "4096", "-d", "dup", "--csum", "sha256"], "rw");
}

#[test]
fn large_nodes() {
    works(&["-n", "65536", "--csum", "blake2"], "rw");
}

#[test]
fn a_tree_of_block_groups_and_simple_quotas() {
    works(&["-O", "block-group-tree,squota"], "rw");
}
