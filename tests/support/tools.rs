//! Other programs that read and write disks. Where one is missing, a test skips and says so.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::FileOffset;

use super::size;

/// Whether all of these programs are installed. Which one is not, it says.
pub(crate) fn installed(programs: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let missing = programs
        .iter()
        .find(|program| !env::split_paths(&path).any(|folder| folder.join(program).is_file()));
    if let Some(program) = missing {
        println!("skipped: no {program}");
    }
    missing.is_none()
}

/// Runs an installed program with `words`, then `paths`, in English.
pub(crate) fn run(program: &str, words: &[&str], paths: &[&Path]) -> Output {
    Command::new(program)
        .args(words)
        .args(paths)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs an installed program, which must succeed, and gives what it says.
pub(crate) fn tool(program: &str, words: &[&str], paths: &[&Path]) -> String {
    let output = run(program, words, paths);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = output.status;
    assert!(
        status.success(),
        "{program} {words:?} {paths:?}: {status}: {text}"
    );
    text
}

/// What QEMU makes of the file at `path`, as a raw disk beside it.
pub(crate) fn converted(path: &Path, format: &str) -> PathBuf {
    let raw = path.with_extension("raw");
    let words = ["convert", "-f", format, "-O", "raw"];
    tool("qemu-img", &words, &[path, &raw]);
    raw
}

/// The disk of the file at `path` as 7-Zip reads it, as a raw disk beside it; `None`, and it is said,
/// where there is no 7-Zip.
pub(crate) fn extracted(path: &Path) -> Option<PathBuf> {
    let names = ["7z", "7zz"];
    let program = names.into_iter().find(|program| installed(&[program]))?;
    if !tool(program, &["i"], &[]).contains(" VHDX ") {
        println!("skipped: {program} does not know VHDX: older than 21.07");
        return None;
    }
    // Of the disk itself, not of partitions that it may hold.
    let as_type = match path.extension().is_some_and(|name| name == "vhdx") {
        true => "-tvhdx",
        false => "-tvhd",
    };
    let listed = tool(program, &["l", "-ba", as_type], &[path]);
    assert_eq!(listed.lines().count(), 1, "{listed}");
    let raw = path.with_extension("7z");
    let output = Command::new(program)
        .args(["x", "-so", as_type])
        .arg(path)
        .stdout(File::create(&raw).expect("a new file"))
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}");
    Some(raw)
}

/// Has QEMU replay the log of the VHDX at `path`.
pub(crate) fn replayed_by_qemu(path: &Path) {
    tool(
        "qemu-img",
        &["check", "-q", "-f", "vhdx", "-r", "all"],
        &[path],
    );
}

/// What the raw disk at `path` holds, without zeros: offset and bytes of each `piece`.
pub(crate) fn raw_content(path: &Path, piece: u64) -> Vec<(u64, Vec<u8>)> {
    let raw = SimStorage::from_file(path).expect("a raw disk");
    let end = FileOffset::new(raw.len().expect("known"));
    let mut found = Vec::new();
    let mut at = FileOffset::new(0);
    while let Some(data) = raw.next_data(at, end).expect("known") {
        let start = data.start.get() / piece * piece;
        let mut bytes = vec![0; size(piece.min(end.get() - start))];
        let read = raw.read_exact_at(&mut bytes, FileOffset::new(start));
        read.expect("inside the file");
        if bytes.iter().any(|&byte| byte != 0) {
            found.push((start, bytes));
        }
        at = FileOffset::new(start + piece);
    }
    found
}

/// Reads from the file at `path`.
pub(crate) fn reader(path: &Path) -> impl Fn(&mut [u8], u64) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    move |buf: &mut [u8], offset: u64| {
        (&file).seek(SeekFrom::Start(offset)).expect("a place");
        (&file).read_exact(buf).expect("readable");
    }
}

/// A directory that libvhdi mounted.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// The disk of the file at `path`; `None`, and it is said, where nothing can be mounted.
    pub(crate) fn new(path: &Path) -> Option<Self> {
        if !installed(&["vhdimount"]) {
            return None;
        }
        if !Path::new("/dev/fuse").exists() {
            println!("skipped: no /dev/fuse");
            return None;
        }
        let mountpoint = path.with_extension("mount");
        fs::create_dir_all(&mountpoint).expect("a folder");
        let output = run("vhdimount", &[], &[path, &mountpoint]);
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() && said.contains("fuse") {
            println!("skipped: vhdimount: {said}");
            return None;
        }
        assert!(output.status.success(), "vhdimount: {said}");
        Some(Self(mountpoint))
    }

    /// The disk, of a chain the child's.
    pub(crate) fn disk(&self) -> PathBuf {
        let disks = (1..).map(|n| self.0.join(format!("vhdi{n}")));
        let last = disks.take_while(|disk| disk.exists()).last();
        last.expect("a disk")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let tried = ["fusermount", "fusermount3"].map(|program| (program, Some("-u")));
        for (program, word) in tried.into_iter().chain([("umount", None)]) {
            let mut command = Command::new(program);
            command.args(word.map(OsStr::new)).arg(&self.0);
            if command.output().is_ok_and(|output| output.status.success()) {
                return;
            }
        }
    }
}
