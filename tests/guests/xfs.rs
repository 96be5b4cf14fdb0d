//! XFS, made by mkfs.xfs, filled by the kernel, measured by xfs_db, judged by xfs_repair.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::{Outcome, Survey, SurveyOptions, survey};

use crate::rig::{self, Mounted, RawDisk};
use crate::support::tools::{installed, run, tool};

const MIB: u64 = 1 << 20;

/// A folder with a sparse disk of 320 MiB, the least that mkfs.xfs likes, and a place to mount it.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// `None`, and it is said, where something is missing.
    fn new() -> Option<Self> {
        if !installed(&["mkfs.xfs", "xfs_db", "xfs_repair"]) || !rig::can_mount() {
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        Some(Self { folder })
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Makes the filesystem; `false` where this mkfs.xfs will not.
    fn make(&self, words: &[&str]) -> bool {
        rig::blank(&self.image(), 320 * MIB);
        let output = run(
            "mkfs.xfs",
            &[&["-q", "-f"], words].concat(),
            &[&self.image()],
        );
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            println!("skipped: mkfs.xfs {words:?}: {said}");
        }
        output.status.success()
    }

    fn mount(&self) -> Mounted {
        let at = self.folder.path().join("mount");
        Mounted::kernel(&self.image(), &at, "xfs", "loop")
    }

    fn copy(&self, name: &str) -> PathBuf {
        let copy = self.folder.path().join(name);
        tool("cp", &["--sparse=always"], &[&self.image(), &copy]);
        copy
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
    assert_eq!(survey.parts[0].content, Some("XFS"));
    match &survey.parts[0].outcome {
        Outcome::Read {
            reported_free,
            free,
            ..
        } => (*reported_free, *free),
        Outcome::Skipped { reason } => panic!("XFS {reason}"),
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

/// A number that xfs_db prints behind `name`.
fn number(path: &Path, commands: &[&str], name: &str) -> u64 {
    let words: Vec<_> = commands
        .iter()
        .flat_map(|command| ["-c", command])
        .collect();
    let said = tool("xfs_db", &[&["-r"], &words[..]].concat(), &[path]);
    let line = said.lines().find_map(|line| line.strip_prefix(name));
    let word = line.unwrap_or_else(|| panic!("no {name} in {said}"));
    word.trim_start_matches([' ', '='])
        .parse()
        .expect("a number")
}

/// Bytes that are free, as xfs_db lists them, and those of them that are in no free list.
fn told(path: &Path) -> (u64, u64) {
    let block = number(path, &["sb 0", "p blocksize"], "blocksize");
    let groups = number(path, &["sb 0", "p agcount"], "agcount");
    let total = number(path, &["freesp -s"], "total free blocks");
    let listed: u64 = (0..groups)
        .map(|group| number(path, &[&format!("agf {group}"), "p flcount"], "flcount"))
        .sum();
    (total * block, (total - listed) * block)
}

/// Files of all sizes, and then so many small ones that each group's free space is in many pieces.
fn fill(folder: &Path, pieces: u64) {
    rig::fill(folder, 7, 40, |number| number % 3 == 0);
    let small = folder.join("small");
    fs::create_dir_all(&small).expect("a folder");
    for number in 0..pieces {
        fs::write(small.join(number.to_string()), [1; 900]).expect("written");
    }
    tool("sync", &["-f"], &[folder]);
    for number in (0..pieces).step_by(2) {
        fs::remove_file(small.join(number.to_string())).expect("deleted");
    }
}

/// Spoils all that is free, and sees that nobody minds.
fn nothing_else_is_lost(bench: &Bench) {
    let before = rig::contents(bench.mount().path());
    let found = look(&bench.image());
    let disk = RawDisk::open(&bench.image(), 512);
    for range in found.free.iter() {
        disk.spoil(range.start, range.end);
    }
    tool("xfs_repair", &["-n"], &[&bench.image()]);
    let after = rig::contents(bench.mount().path());
    assert!(before == after, "files differ");
    // Now the guest may use it all again.
    fill(bench.mount().path(), 10);
    tool("xfs_repair", &["-n"], &[&bench.image()]);
}

fn works(words: &[&str], pieces: u64) {
    let Some(bench) = Bench::new() else { return };
    if !bench.make(words) {
        return;
    }
    assert_eq!(read(&bench.image()), told(&bench.image()), "new");
    fill(bench.mount().path(), pieces);
    assert_eq!(read(&bench.image()), told(&bench.image()), "used");
    nothing_else_is_lost(&bench);
}

#[test]
fn version_5() {
    works(&[], 1500);
}

#[test]
fn version_4_that_counts_as_it_goes() {
    works(&["-m", "crc=0", "-l", "lazy-count=0,version=1"], 600);
}

#[test]
fn version_4() {
    works(&["-m", "crc=0", "-b", "size=512"], 1500);
}

#[test]
fn deep_btrees_in_small_groups() {
    works(
        &["-b", "size=1024", "-d", "agcount=16", "-m", "rmapbt=1"],
        4000,
    );
}

#[test]
fn large_blocks() {
    works(&["-b", "size=65536", "-m", "rmapbt=1"], 600);
}

#[test]
fn large_sectors_and_a_striped_log() {
    works(&["-s", "size=4096", "-l", "su=256k"], 600);
}
