//! What the options of `vhdfs compact` do to a disk with a file system and swap space.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::common::{exit_code, has, json, run, stderr};

const MIB: u64 = 1 << 20;
/// The partitions: where they begin, and their bytes.
const EXT4: (u64, u64) = (MIB, 64 * MIB);
const SWAP: (u64, u64) = (65 * MIB, 32 * MIB);

fn tool(program: &str, arguments: &[&str], file: &Path) {
    let output = (Command::new(program).args(arguments).arg(file).output()).unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

/// A disk of 100 MiB: ext4, 20 MiB of which were deleted and 8 MiB are zeros, swap space that was used,
/// and behind them nothing.
struct Sample {
    place: TempDir,
}

impl Sample {
    /// `None`, and it is said, where tools are missing.
    fn new() -> Option<Self> {
        let tools = [
            "mke2fs", "debugfs", "mkswap", "sfdisk", "qemu-img", "e2fsck",
        ];
        if !tools.into_iter().all(has) {
            return None;
        }
        let place = tempfile::tempdir().unwrap();
        let sample = Self { place };
        let (files, part, raw) = (
            sample.path("files"),
            sample.path("part"),
            sample.path("raw"),
        );
        fs::create_dir(&files).unwrap();
        fs::write(files.join("stays"), noise(8)).unwrap();
        fs::write(files.join("goes"), noise(20)).unwrap();
        fs::write(files.join("zeros"), vec![0; 8 << 20]).unwrap();
        File::create(&part).unwrap().set_len(EXT4.1).unwrap();
        let folder = files.to_str().unwrap();
        tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", folder], &part);
        tool("debugfs", &["-w", "-R", "rm goes"], &part);

        let swap = sample.path("swap");
        fs::write(&swap, noise(32)).unwrap();
        tool("mkswap", &[], &swap);
        let disk = File::create(&raw).unwrap();
        disk.set_len(100 * MIB).unwrap();
        let table = sample.path("table");
        fs::write(
            &table,
            "label: dos\nstart=2048, size=131072, type=83\nstart=133120, size=65536, type=82\n",
        )
        .unwrap();
        let words = format!("sfdisk -q {} < {}", raw.display(), table.display());
        tool("sh", &["-c", &words], Path::new("sh"));
        disk.write_all_at(&fs::read(&swap).unwrap(), SWAP.0)
            .unwrap();
        disk.write_all_at(&fs::read(&part).unwrap(), EXT4.0)
            .unwrap();
        Some(sample)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// The disk as a file of QEMU's, of blocks of 1 MiB; all zeros are stored, too.
    fn image(&self) -> PathBuf {
        let path = self.path("disk.vhdx");
        let words = [
            "convert",
            "-S",
            "0",
            "-f",
            "raw",
            "-O",
            "vhdx",
            "-o",
            "subformat=dynamic,block_size=1M",
        ];
        let raw = self.path("raw");
        let words: Vec<_> = words.into_iter().chain([raw.to_str().unwrap()]).collect();
        tool("qemu-img", &words, &path);
        path
    }

    /// Compacts a new image with `options`, and looks whether its files are there.
    fn compact(&self, options: &[&str]) -> Value {
        let image = self.image();
        let mut words = vec!["compact", "--json"];
        words.extend(options);
        words.push(image.to_str().unwrap());
        let output = run(&words);
        assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
        let report = json(&output);
        assert_eq!(report["length_after"], fs::metadata(&image).unwrap().len());

        let (after, part, kept) = (self.path("after"), self.path("part"), self.path("kept"));
        tool(
            "qemu-img",
            &["convert", "-O", "raw", image.to_str().unwrap()],
            &after,
        );
        let mut bytes = vec![0; usize::try_from(EXT4.1).unwrap()];
        File::open(&after)
            .unwrap()
            .read_exact_at(&mut bytes, EXT4.0)
            .unwrap();
        fs::write(&part, bytes).unwrap();
        let dump = format!("dump stays {}", kept.display());
        tool("debugfs", &["-R", &dump], &part);
        assert!(fs::read(kept).unwrap() == noise(8));
        tool("e2fsck", &["-fy"], &part);
        report
    }

    /// Makes the file system one of a machine that crashed just after a commit.
    fn crash(&self) {
        let (part, raw) = (self.path("part"), self.path("raw"));
        let disk = File::options().read(true).write(true).open(raw).unwrap();
        let mut bytes = vec![0; usize::try_from(EXT4.1).unwrap()];
        disk.read_exact_at(&mut bytes, EXT4.0).unwrap();
        fs::write(&part, &bytes).unwrap();
        tool("debugfs", &["-w", "-R", "feature needs_recovery"], &part);
        disk.write_all_at(&fs::read(&part).unwrap(), EXT4.0)
            .unwrap();
    }
}

/// The same bytes each time, none zero.
fn noise(mib: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0] | 1
    };
    (0..mib << 20).map(|_| next()).collect()
}

/// Length in MiB, and the MiB that each partition gave back.
fn result(report: &Value) -> (u64, Vec<u64>) {
    let mib = |value: &Value| value.as_u64().unwrap() / MIB;
    let parts = report["partitions"].as_array().unwrap();
    let parts = parts.iter().map(|part| mib(&part["reclaimed"]));
    (mib(&report["length_after"]), parts.collect())
}

#[test]
fn modes() {
    let Some(sample) = Sample::new() else { return };
    let none = Vec::new();
    let (all, pretrimmed) = (
        result(&sample.compact(&["--mode=full"])),
        result(&sample.compact(&["--mode=pretrimmed"])),
    );
    assert_eq!(result(&sample.compact(&[])), all);
    let quick = result(&sample.compact(&["--mode=quick"]));
    let prezeroed = result(&sample.compact(&["--mode", "prezeroed"]));
    assert_eq!(result(&sample.compact(&["--no-fs-aware"])), prezeroed);
    println!("full {all:?} quick {quick:?} prezeroed {prezeroed:?} pretrimmed {pretrimmed:?}");
    assert_eq!((&pretrimmed.1, &prezeroed.1), (&none, &none));
    // Zeros in a file, and in what was never used.
    assert!(prezeroed.0 + 20 < pretrimmed.0);
    // What was deleted.
    assert!(all.0 + 15 < prezeroed.0);
    // Zeros in a file stay.
    assert!((all.0 + 6..=all.0 + 12).contains(&quick.0));
    assert!(all.1[0] > 40 && all.1[1] == 0);
}

#[test]
fn swap_space_on_request() {
    let Some(sample) = Sample::new() else { return };
    let (without, with) = (sample.compact(&[]), sample.compact(&["--free-swap"]));
    assert!(
        without["partitions"][1]["skipped"]
            .as_str()
            .unwrap()
            .contains("swap"),
        "{without}"
    );
    let ((first, _), (second, parts)) = (result(&without), result(&with));
    assert_eq!((first - second, parts[1]), (31, 31), "{with}");
}

#[test]
fn a_crashed_file_system_on_request() {
    let Some(sample) = Sample::new() else { return };
    let (clean, prezeroed) = (
        result(&sample.compact(&[])),
        result(&sample.compact(&["--no-fs-aware"])),
    );
    sample.crash();
    let left = sample.compact(&[]);
    let part = &left["partitions"][0];
    assert!(
        part["skipped"]
            .as_str()
            .unwrap()
            .contains("--replay-journal"),
        "{left}"
    );
    assert_eq!(result(&left).0, prezeroed.0);
    let replayed = sample.compact(&["--replay-journal"]);
    assert_eq!(
        replayed["partitions"][0]["journal_replayed"], true,
        "{replayed}"
    );
    assert_eq!(result(&replayed), clean);
}

/// What a dry run says is what comes.
#[test]
fn a_dry_run_tells_all() {
    let Some(sample) = Sample::new() else { return };
    let image = sample.image();
    let sparse = sample.path("sparse.vhdx");
    let words = ["--sparse=always", image.to_str().unwrap()];
    tool("cp", &words, &sparse);
    for punch in ["auto", "on", "off"] {
        let copy = sample.path("copy.vhdx");
        tool("cp", &["--sparse=auto", sparse.to_str().unwrap()], &copy);
        let compact = |more: &[&str]| {
            let punch = format!("--punch-holes={punch}");
            let words = ["compact", "--json", &punch, copy.to_str().unwrap()];
            json(&run(words.iter().chain(more)))
        };
        let (said, done) = (compact(&["--dry-run"]), compact(&[]));
        let number = |report: &Value, key| report[key].as_u64().unwrap();
        assert_eq!(said["partitions"], done["partitions"], "{punch}");
        assert_eq!(said["kept"], done["kept"], "{punch}");
        for key in [
            "length_after",
            "blocks_dropped",
            "blocks_moved",
            "bytes_read",
        ] {
            assert_eq!(said[key], done[key], "{punch}: {key}");
        }
        let (said, done) = (
            number(&said, "allocated_after"),
            number(&done, "allocated_after"),
        );
        println!("{punch}: {said} said, {done} done");
        assert!(
            said.abs_diff(done) < MIB,
            "{punch}: {said} said, {done} done"
        );
    }
}

#[test]
fn holes_in_a_sparse_file() {
    let Some(sample) = Sample::new() else { return };
    let stored = || fs::metadata(sample.path("disk.vhdx")).unwrap().blocks() * 512;
    let off = sample.compact(&["--punch-holes=off"]);
    let without = stored();
    let on = sample.compact(&["--punch-holes=on"]);
    let with = stored();
    assert_eq!(on["allocated_after"], with);
    assert_eq!(off["length_after"], on["length_after"]);
    assert!(with + MIB < without, "{with}, without {without}");

    // And filled again, the disk reads the same.
    let (image, filled, copy) = (
        sample.path("disk.vhdx"),
        sample.path("filled.vhdx"),
        sample.path("copy.vhdx"),
    );
    let sparse =
        |file: &Path| json(&run(["info", "--json", file.to_str().unwrap()]))["sparse"].clone();
    let cp = |from: &Path, to: &Path| {
        tool(
            "cp",
            &["--sparse=auto", "--reflink=never", from.to_str().unwrap()],
            to,
        );
    };
    cp(&image, &filled);
    assert_eq!(sparse(&filled), true);
    let words = ["compact", "--unsparse", "--json", filled.to_str().unwrap()];
    let output = run(words);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    let done = json(&output);
    assert!(done["holes_filled"].as_u64().unwrap() > 8 * MIB, "{done}");
    assert!(
        done["allocated_after"].as_u64() >= done["length_after"].as_u64(),
        "{done}"
    );
    cp(&filled, &copy);
    assert_eq!(
        (sparse(&filled), sparse(&copy)),
        (false.into(), false.into())
    );
    tool("qemu-img", &["compare", image.to_str().unwrap()], &copy);
}

/// A fixed disk keeps its length; the host gets back what the file system does not need.
#[test]
fn a_fixed_disk_gives_back_what_is_free_as_holes() {
    let Some(sample) = Sample::new() else {
        return;
    };
    let raw = fs::read(sample.path("raw")).unwrap();
    for name in ["fixed.vhd", "fixed.vhdx"] {
        let path = sample.path(name);
        let file = path.to_str().unwrap();
        let made = run(["create", "--size", "100M", "--type", "fixed", file]);
        assert_eq!(exit_code(&made), 0, "{}", stderr(&made));
        {
            use vhdfs::disk::{Disk, OpenOptions};
            let options = OpenOptions {
                punch_holes: false,
                ..OpenOptions::default()
            };
            let disk = Disk::open(&path, &options).unwrap();
            disk.write_at(&raw, 0).unwrap();
            disk.close().unwrap();
        }
        let length = fs::metadata(&path).unwrap().len();
        let words = ["compact", "--json", "--punch-holes=on"];
        let told = json(&run([&words[..], &["--dry-run", file]].concat()));
        let report = json(&run([&words[..], &[file]].concat()));
        assert_eq!(report["length_after"], length);
        assert_eq!(told["partitions"], report["partitions"]);
        assert_eq!(told["new_identity"], true);
        let bytes = |report: &Value, name: &str| report[name].as_u64().unwrap();
        let given = bytes(&report, "allocated_before") - bytes(&report, "allocated_after");
        // Zeros, what was deleted, and what is behind the partitions.
        assert!(given > 25 * MIB, "{report}");
        assert!(
            bytes(&report["partitions"][0], "reclaimed") > 18 * MIB,
            "{report}"
        );
        let (after, part, kept) = (
            sample.path("after"),
            sample.path("part"),
            sample.path("kept"),
        );
        tool("qemu-img", &["convert", "-O", "raw", file], &after);
        let after = fs::read(&after).unwrap();
        let ext4 = usize::try_from(EXT4.0).unwrap()..usize::try_from(EXT4.0 + EXT4.1).unwrap();
        fs::write(&part, &after[ext4]).unwrap();
        tool(
            "debugfs",
            &["-R", &format!("dump stays {}", kept.display())],
            &part,
        );
        assert!(fs::read(&kept).unwrap() == noise(8));
        tool("e2fsck", &["-fn"], &part);
        super::common::assert_clean(&path);
    }
}
