//! A raw disk with guest filesystems made by their own tools, and what may be done to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::Source;
use vhdfs::storage::sim::Random;

use crate::support::tools::{run, tool};

/// A raw disk in a file.
pub(crate) struct RawDisk {
    file: File,
    len: u64,
    sector_size: u64,
}

impl RawDisk {
    pub(crate) fn open(path: &Path, sector_size: u64) -> Self {
        let file = File::options().read(true).write(true).open(path);
        let file = file.expect("a raw disk");
        let len = file.metadata().expect("its length").len();
        Self {
            file,
            len,
            sector_size,
        }
    }

    /// Overwrites all of a range with what nobody can mistake for zeros or metadata.
    pub(crate) fn spoil(&self, start: u64, end: u64) {
        let junk = vec![0xa5_u8; 1 << 20];
        let mut at = start;
        while at < end {
            let len = (end - at).min(1 << 20);
            let part = &junk[..usize::try_from(len).expect("small")];
            self.file.write_all_at(part, at).expect("written");
            at += len;
        }
    }
}

impl Source for RawDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn sector_size(&self) -> u64 {
        self.sector_size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// Creates a sparse file of `len` bytes.
pub(crate) fn blank(path: &Path, len: u64) {
    let file = File::create(path).expect("a new file");
    file.set_len(len).expect("a sparse file");
}

/// Why filesystems cannot be mounted here, if so: it is said.
pub(crate) fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    let loops = File::open("/dev/loop-control").is_ok();
    if !root || !loops {
        println!("skipped: needs root and loop devices");
    }
    root && loops
}

/// A mounted filesystem, until dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// Mounts the kernel's way the file or part of a file: `options` like `loop,offset=1048576`.
    pub(crate) fn kernel(image: &Path, at: &Path, kind: &str, options: &str) -> Self {
        fs::create_dir_all(at).expect("a folder");
        tool("mount", &["-t", kind, "-o", options], &[image, at]);
        Self(at.to_owned())
    }

    /// Mounts with a FUSE program that is called `program WORDS IMAGE FOLDER`.
    pub(crate) fn fuse(program: &str, words: &[&str], image: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).expect("a folder");
        tool(program, words, &[image, at]);
        Self(at.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..50 {
            if run("umount", &[], &[&self.0]).status.success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("{} stays mounted", self.0.display());
    }
}

/// Writes files of many sizes into `folder`, the same for the same `seed`, and deletes those of which
/// `keep` says no to their number.
pub(crate) fn fill(folder: &Path, seed: u64, files: u64, keep: impl Fn(u64) -> bool) {
    let sizes = [
        0, 1, 700, 5_000, 40_000, 130_000, 600_000, 1_500_000, 4_000_000,
    ];
    for number in 0..files {
        let below = folder.join(format!("d{}", number % 7));
        fs::create_dir_all(&below).expect("a folder");
        let size = sizes[usize::try_from((number + seed) % 9).expect("small")];
        let mut state = seed ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let bytes: Vec<u8> = (0..size)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[0] | 1
            })
            .collect();
        fs::write(below.join(format!("f{number}")), bytes).expect("written");
    }
    // What was only in the page cache would never leave a trace on the disk.
    tool("sync", &["-f"], &[folder]);
    for number in (0..files).filter(|number| !keep(*number)) {
        let path = folder.join(format!("d{}/f{number}", number % 7));
        fs::remove_file(path).expect("deleted");
    }
}

/// All files below `folder`, by name below it, with what they hold.
pub(crate) fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).expect("a folder") {
            let path = entry.expect("an entry").path();
            let kind = fs::symlink_metadata(&path).expect("an entry").file_type();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                let name = path.strip_prefix(folder).expect("inside").to_owned();
                found.insert(name, fs::read(&path).expect("readable"));
            }
        }
    }
    found
}

/// Changes what [`fill`] left, at random, the same for the same `seed`: appends, truncates, overwrites,
/// renames, deletes, makes anew.
pub(crate) fn churn(folder: &Path, seed: u64, changes: u64) {
    let mut random = Random::new(seed);
    for number in 0..changes {
        let mut files: Vec<PathBuf> = contents(folder).into_keys().collect();
        files.sort();
        let place = random.below(files.len().max(1).try_into().expect("a number"));
        let chosen = files.get(usize::try_from(place).expect("small"));
        let Some(path) = chosen.map(|name| folder.join(name)) else {
            return;
        };
        let bytes = vec![u8::try_from(1 + number % 255).expect("a byte"); 123_456];
        let file = || File::options().write(true).open(&path).expect("a file");
        match random.below(6) {
            0 => {
                let end = file().metadata().expect("its length").len();
                file().write_all_at(&bytes, end).expect("appended");
            }
            1 => {
                let end = file().metadata().expect("its length").len();
                file().set_len(random.below(end + 1)).expect("cut");
            }
            2 => file().write_all_at(&bytes, 0).expect("overwritten"),
            3 => fs::rename(&path, path.with_extension(format!("r{number}"))).expect("renamed"),
            4 => fs::remove_file(&path).expect("deleted"),
            _ => fs::write(path.with_extension(format!("n{number}")), &bytes).expect("written"),
        }
        if number % 16 == 0 {
            tool("sync", &["-f"], &[folder]);
        }
    }
}
