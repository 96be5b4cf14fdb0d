//! XFS, made by mkfs.xfs, filled by the kernel, measured by xfs_db, judged by xfs_repair.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::{Outcome, Survey, SurveyOptions, survey};

use crate::rig::{self, Mounted, RawDisk};
use crate::support::tools::{installed, run, tool};

const MIB: u64 = 1 << 20;
/// Bytes of a disk.
const SIZE: u64 = 128 * MIB;

/// A folder with a sparse disk, and a place to mount it.
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

    /// Makes the filesystem; `false`, and it is said, where this mkfs.xfs will not.
    fn make(&self, size: u64, words: &[&str]) -> bool {
        rig::blank(&self.image(), size);
        // Before there was that word, nothing needed it: small filesystems were fine.
        for first in [&["--unsupported"][..], &[]] {
            let all = [first, &["-q", "-f"], words].concat();
            let output = run("mkfs.xfs", &all, &[&self.image()]);
            if output.status.success() {
                return true;
            }
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let said = said.lines().next().unwrap_or_default();
            println!("skipped: mkfs.xfs {all:?}: {said}");
        }
        false
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

fn works(size: u64, words: &[&str], pieces: u64) {
    let Some(bench) = Bench::new() else { return };
    if !bench.make(size, words) {
        return;
    }
    assert_eq!(read(&bench.image()), told(&bench.image()), "new");
    fill(bench.mount().path(), pieces);
    assert_eq!(read(&bench.image()), told(&bench.image()), "used");
    nothing_else_is_lost(&bench);
}

#[test]
fn version_5() {
    works(SIZE, &[], 1500);
}

/// This kernel may not know version 4: mkfs.xfs fills it, and xfs_repair frees what it finds unused.
fn works_unmounted(words: &[&str]) {
    let Some(bench) = Bench::new() else { return };
    let files = bench.folder.path().join("files");
    fs::create_dir(&files).expect("a folder");
    let mut list = String::from("/dev/null\n0 0\nd--755 0 0\n");
    for number in 0..600 {
        let path = files.join(number.to_string());
        fs::write(&path, vec![1; 700 + number % 7 * 900]).expect("written");
        list += &format!("f{number} ---644 0 0 {}\n", path.display());
    }
    list += "$\n";
    let prototype = bench.folder.path().join("prototype");
    fs::write(&prototype, list).expect("written");
    let prototype = prototype.to_str().expect("a name");
    if !bench.make(SIZE, &[words, &["-p", prototype]].concat()) {
        return;
    }
    assert_eq!(read(&bench.image()), told(&bench.image()), "new");
    // Every second file loses its inode, so that its blocks are lost, and found.
    let root = number(&bench.image(), &["sb 0", "p rootino"], "rootino");
    let clear = |number: u64| format!("inode {number}");
    let numbers: Vec<_> = (root + 5..root + 500).step_by(2).map(clear).collect();
    let commands = numbers
        .iter()
        .flat_map(|inode| ["-c", inode, "-c", "write core.mode 0"]);
    let words: Vec<_> = ["-x"].into_iter().chain(commands).collect();
    tool("xfs_db", &words, &[&bench.image()]);
    run("xfs_repair", &[], &[&bench.image()]);
    assert_eq!(read(&bench.image()), told(&bench.image()), "used");
    let disk = RawDisk::open(&bench.image(), 512);
    for range in look(&bench.image()).free.iter() {
        disk.spoil(range.start, range.end);
    }
    tool("xfs_repair", &["-n"], &[&bench.image()]);
}

#[test]
fn version_4_that_counts_as_it_goes() {
    works_unmounted(&["-m", "crc=0", "-l", "lazy-count=0,version=1"]);
}

#[test]
fn version_4() {
    works_unmounted(&["-m", "crc=0", "-b", "size=512"]);
}

#[test]
fn deep_btrees_in_small_groups() {
    works(
        SIZE,
        &["-b", "size=1024", "-d", "agcount=6", "-m", "rmapbt=1"],
        4000,
    );
}

#[test]
fn large_blocks() {
    works(
        300 * MIB,
        &["-b", "size=65536", "-d", "agcount=2", "-m", "reflink=0"],
        600,
    );
}

#[test]
fn large_sectors_and_a_striped_log() {
    works(SIZE, &["-s", "size=4096", "-l", "su=256k"], 600);
}

/// Each save writes 256 KiB, so that the log goes round several times.
#[test]
fn a_log_that_went_round() {
    let Some(bench) = Bench::new() else { return };
    if !bench.make(SIZE, &["-l", "su=256k,size=7m", "-m", "reflink=0,rmapbt=0"]) {
        return;
    }
    for round in 0..6 {
        let mounted = bench.mount();
        for number in 0..7 + round {
            let file = File::create(mounted.path().join(number.to_string())).expect("a file");
            file.write_all_at(b"saved", round).expect("written");
            file.sync_all().expect("saved");
        }
        let copy = bench.copy("copy");
        drop(mounted);
        assert!(skipped(&copy).contains("not unmounted cleanly"), "{round}");
        assert_eq!(read(&bench.image()), told(&bench.image()), "{round}");
    }
}

#[test]
fn another_identity_and_another_size() {
    let Some(bench) = Bench::new() else { return };
    if !bench.make(SIZE, &[]) || !installed(&["xfs_admin", "xfs_growfs"]) {
        return;
    }
    tool("xfs_admin", &["-U", "generate"], &[&bench.image()]);
    let file = File::options()
        .write(true)
        .open(bench.image())
        .expect("a file");
    file.set_len(150 * MIB).expect("longer");
    let mounted = bench.mount();
    tool("xfs_growfs", &[], &[mounted.path()]);
    fill(mounted.path(), 10);
    drop(mounted);
    assert_eq!(read(&bench.image()), told(&bench.image()));
    nothing_else_is_lost(&bench);
    file.set_len(149 * MIB).expect("shorter");
    assert!(skipped(&bench.image()).contains("more than the"));
}

#[test]
fn a_disk_in_use_is_left_alone() {
    let Some(bench) = Bench::new() else { return };
    if !bench.make(SIZE, &[]) {
        return;
    }
    let mounted = bench.mount();
    fill(mounted.path(), 10);
    tool("sync", &["-f"], &[mounted.path()]);
    assert!(skipped(&bench.copy("copy")).contains("not unmounted cleanly"));
    if installed(&["fsfreeze"]) {
        tool("fsfreeze", &["--freeze"], &[mounted.path()]);
        let frozen = bench.copy("frozen");
        tool("fsfreeze", &["--unfreeze"], &[mounted.path()]);
        assert!(skipped(&frozen).contains("not unmounted cleanly"));
    }
    drop(mounted);
    assert_eq!(read(&bench.image()), told(&bench.image()));
}

#[test]
fn what_is_not_sound_is_left_alone() {
    let Some(bench) = Bench::new() else { return };
    if !bench.make(SIZE, &[]) {
        return;
    }
    let changed = |place: &str, field: &str, value: &str, reason: &str| {
        let copy = bench.copy("copy");
        let write = format!("write -d {field} {value}");
        tool("xfs_db", &["-x", "-c", place, "-c", &write], &[&copy]);
        let found = skipped(&copy);
        assert!(found.contains(reason), "{field}: {found}");
    };
    changed(
        "sb 0",
        "features_incompat",
        "0x8000",
        "features that are not known",
    );
    changed(
        "sb 0",
        "features_ro_compat",
        "0x8000",
        "features that are not known",
    );
    changed(
        "sb 0",
        "features_log_incompat",
        "1",
        "not unmounted cleanly",
    );
    changed("sb 0", "features_incompat", "0x1b", "marked as damaged");
    changed("sb 0", "inprogress", "1", "not made to the end");
    changed("sb 0", "rblocks", "1", "realtime device");
    changed("sb 0", "logstart", "0", "on another device");
    changed("sb 0", "fdblocks", "7", "run xfs_repair");
    changed("sb 1", "dblocks", "7", "a copy of its superblock");
    changed("agf 0", "freeblks", "7", "counts its free blocks disagrees");
    changed("agf 1", "longest", "7", "counts its free blocks disagrees");
    changed("agf 1", "flcount", "7", "the AGFL of group 1");
}
