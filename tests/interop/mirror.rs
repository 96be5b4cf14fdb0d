//! A disk file, and a raw file beside it of what it must hold.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdfs::check::{CheckOptions, check};
use vhdfs::compact::{CompactError, CompactOptions};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, ExtentKind, OpenOptions};
use vhdfs::format::parent::NewParent;
use vhdfs::image;
use vhdfs::storage::Storage;
use vhdfs::storage::host::{HostFile, HostOptions};
use vhdfs::storage::sim::Random;

use crate::support::image::pattern;
use crate::support::second::{self, Chain};
use crate::support::tools::{raw_content, tool};
use crate::support::{len, size};

const PIECE: u64 = 1 << 20;

/// A disk file that is changed by turns, and what it must hold.
pub(crate) struct Mirrored {
    /// The disk file. Nobody has it open between two turns.
    pub(crate) path: PathBuf,
    /// The raw file.
    pub(crate) raw: PathBuf,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// Bytes in a block.
    pub(crate) block_size: u64,
    /// Where every discarded or zeroed range starts and ends on a multiple of this; `None`: nothing is
    /// discarded or zeroed.
    pub(crate) zeroing_unit: Option<u64>,
    mirror: File,
    random: Random,
    writes: u64,
}

/// The file at `path`, to be read whoever has it open.
pub(crate) fn host_file(path: &Path) -> Arc<dyn Storage> {
    let options = HostOptions {
        read_only: true,
        lock: false,
        ..HostOptions::default()
    };
    Arc::new(HostFile::open(path, &options).unwrap())
}

/// The disk at `path`, not to be changed.
pub(crate) fn open_read_only(path: &Path) -> Arc<Disk> {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    Disk::open(path, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// The disk at `path`, to be changed.
pub(crate) fn open(path: &Path) -> Arc<Disk> {
    Disk::open(path, &OpenOptions::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// Creates a child at `path`, in blocks of `block_size`, of the disk at `parent`, which is beside it
/// and has sectors of `sector_size`.
pub(crate) fn create_child(
    parent: &Path,
    path: &Path,
    block_size: u64,
    sector_size: u64,
) -> PathBuf {
    let probe = image::probe(&*host_file(parent), parent).unwrap();
    let name = parent.file_name().unwrap().to_str().unwrap();
    let options = CreateOptions::differencing(NewParent {
        identity: probe.identity,
        disk_len: probe.virtual_size,
        sector_size,
        mtime: parent.metadata().unwrap().modified().unwrap(),
        relative: format!(".\\{name}"),
        // libvhdi takes the name out of it, and looks beside the child.
        absolute: format!("C:\\disks\\{name}"),
    });
    let options = CreateOptions {
        block_size: Some(u32::try_from(block_size).unwrap()),
        ..options
    };
    create(path, &options).unwrap();
    path.to_owned()
}

/// What QEMU calls the format of the file at `path`.
pub(crate) fn qemu_format(path: &Path) -> &'static str {
    match path.extension().is_some_and(|name| name == "vhdx") {
        true => "vhdx",
        false => "vpc",
    }
}

/// QEMU reads from the file at `path` what the raw file holds.
pub(crate) fn qemu_compares(path: &Path, raw: &Path) {
    let words = ["compare", "-f", qemu_format(path), "-F", "raw"];
    let said = tool("qemu-img", &words, &[path, raw]);
    // It only warns of another size if all that lies beyond is zeros.
    assert!(said.starts_with("Images are identical."), "{said}");
}

/// Both checkers, and QEMU's where it has one, find the file sound.
pub(crate) fn is_sound(path: &Path) {
    if qemu_format(path) == "vhdx" {
        let said = tool("qemu-img", &["check", "-f", "vhdx"], &[path]);
        assert!(said.contains("No errors"), "{said}");
    }
    let report = check(path, &CheckOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    second::read_checked(&*host_file(path)).unwrap();
}

/// What `disk` holds, without zeros: offset and bytes of each MiB, of those that may hold anything.
pub(crate) fn content(disk: &Disk) -> Vec<(u64, Vec<u8>)> {
    let stored = (disk.extents(0)).filter(|extent| extent.kind == ExtentKind::Data);
    let all: BTreeSet<u64> = stored
        .flat_map(|extent| extent.offset / PIECE..(extent.offset + extent.len).div_ceil(PIECE))
        .collect();
    let read = all.into_iter().map(|number| {
        let at = number * PIECE;
        let mut bytes = vec![0; size(PIECE.min(disk.len() - at))];
        disk.read_at(&mut bytes, at).unwrap();
        (at, bytes)
    });
    read.filter(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))
        .collect()
}

/// Writes what `disk` reads as to a raw file at `raw`.
pub(crate) fn export(disk: &Disk, raw: &Path) {
    let file = File::create(raw).unwrap();
    file.set_len(disk.len()).unwrap();
    for (at, bytes) in content(disk) {
        file.write_all_at(&bytes, at).unwrap();
    }
}

/// Bytes of both files are the same from the first to the last.
pub(crate) fn same_bytes(one: &Path, other: &Path) {
    let files = [one, other].map(|path| File::open(path).unwrap());
    let lens = files.each_ref().map(|file| file.metadata().unwrap().len());
    assert_eq!(lens[0], lens[1], "{} is as long", one.display());
    for (at, count) in pieces(0..lens[0]) {
        let [a, b] = files.each_ref().map(|file| {
            let mut bytes = vec![0; size(count)];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        });
        assert!(a == b, "{} differs behind {at:#x}", one.display());
    }
}

fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let end = range.end;
    (range.start..end)
        .step_by(size(PIECE))
        .map(move |at| (at, PIECE.min(end - at)))
}

impl Mirrored {
    /// The disk at `path`, which is empty, and a mirror of it. What happens to it follows from
    /// `seed`.
    pub(crate) fn new(path: &Path, seed: u64) -> Self {
        let disk = open_read_only(path);
        let info = disk.info().unwrap();
        Self::with_shape(path, info.virtual_size, info.block_size, seed)
    }

    /// The disk at `path`, and a mirror of what we read from it.
    pub(crate) fn of_content(path: &Path, seed: u64) -> Self {
        let mirrored = Self::new(path, seed);
        export(&open_read_only(path), &mirrored.raw);
        mirrored
    }

    fn with_shape(path: &Path, disk_len: u64, block_size: u64, seed: u64) -> Self {
        let raw = path.with_extension("mirror");
        let mirror = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&raw);
        let mirror = mirror.unwrap();
        mirror.set_len(disk_len).unwrap();
        Self {
            path: path.to_owned(),
            raw,
            disk_len,
            block_size,
            zeroing_unit: Some(1),
            mirror,
            random: Random::new(seed),
            writes: seed << 16,
        }
    }

    /// Another mirror of what this one has, for a child at `path` of blocks of `block_size`.
    pub(crate) fn child(&self, path: &Path, block_size: u64) -> Self {
        let seed = self.writes + 1;
        let child = Self::with_shape(path, self.disk_len, block_size, seed);
        for (at, bytes) in raw_content(&self.raw, PIECE) {
            child.mirror.write_all_at(&bytes, at).unwrap();
        }
        child
    }

    /// Notes that the disk holds `bytes` at `at`.
    pub(crate) fn holds(&self, bytes: &[u8], at: u64) {
        self.mirror.write_all_at(bytes, at).unwrap();
    }

    fn holds_zeros(&self, range: Range<u64>) {
        let mut old = vec![0; 64 << 10];
        for at in range.clone().step_by(64 << 10) {
            let old = &mut old[..size((range.end - at).min(64 << 10))];
            self.mirror.read_exact_at(old, at).unwrap();
            // What is a hole stays one, which QEMU compares at once.
            if old.iter().any(|&byte| byte != 0) {
                old.fill(0);
                self.holds(old, at);
            }
        }
    }

    /// A number below `limit`, by the seed.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.random.below(limit)
    }

    /// A place: its start and end, multiples of `unit` unless the disk's end cuts it.
    pub(crate) fn place(&mut self, unit: u64) -> Range<u64> {
        let start = self.random.below(self.disk_len) / unit * unit;
        let most = [2000, 200_000, 5_000_000][size(self.random.below(3))];
        let count = (1 + self.random.below(most)).next_multiple_of(unit);
        start..(start + count).min(self.disk_len)
    }

    fn any_place(&mut self, least: u64) -> Range<u64> {
        let units = [1, 512, 4096, self.block_size.max(4096)];
        let unit = units[size(self.random.below(4))].max(least);
        self.place(unit)
    }

    /// Writes what was never written before to `range` of `disk`.
    pub(crate) fn write(&mut self, disk: &Disk, range: Range<u64>) {
        let mut bytes = vec![0; size(range.end - range.start)];
        self.writes += 1;
        pattern(self.writes, range.start / 512, &mut bytes);
        disk.write_at(&bytes, range.start).unwrap();
        self.holds(&bytes, range.start);
    }

    /// Discards `range` of `disk`.
    pub(crate) fn discard(&mut self, disk: &Disk, range: Range<u64>) {
        disk.discard(range.start, range.end - range.start).unwrap();
        self.holds_zeros(range);
    }

    /// Does anything that a guest or a user may do to `disk`.
    pub(crate) fn act(&mut self, disk: &Arc<Disk>) {
        let what = match (self.random.below(16), self.zeroing_unit) {
            (6..=11, None) => 0,
            (what, _) => what,
        };
        let place = match (what, self.zeroing_unit) {
            (6..=11, Some(unit)) => self.any_place(unit),
            _ => self.any_place(1),
        };
        let count = place.end - place.start;
        // The harness shows it where a test fails.
        println!("{what}: {place:#x?} of {}", self.path.display());
        match what {
            0..=5 => return self.write(disk, place),
            6 => disk.write_at(&vec![0; size(count)], place.start).unwrap(),
            7 | 8 => disk.write_zeroes(place.start, count).unwrap(),
            9..=11 => return self.discard(disk, place),
            12 | 13 => return disk.flush().unwrap(),
            _ => return compact(disk, what == 14),
        }
        self.holds_zeros(place);
    }

    /// Opens the disk, does `count` things to it, and closes it.
    pub(crate) fn our_turn(&mut self, count: u64) {
        let disk = open(&self.path);
        for _ in 0..count {
            self.act(&disk);
        }
        disk.close().unwrap();
    }

    /// The file is sound, and QEMU and we read from it what it must hold.
    pub(crate) fn agree(&self) {
        is_sound(&self.path);
        qemu_compares(&self.path, &self.raw);
        self.we_agree();
    }

    /// We read from the file what it must hold.
    pub(crate) fn we_agree(&self) {
        self.we_read_from(&self.path);
    }

    /// The same of a large disk: what is said to be a hole is not looked at.
    pub(crate) fn we_agree_on_content(&self) {
        let disk = open_read_only(&self.path);
        assert_eq!(disk.len(), self.disk_len);
        assert!(content(&disk) == raw_content(&self.raw, PIECE));
    }

    /// We read from the file at `path` what ours must hold.
    pub(crate) fn we_read_from(&self, path: &Path) {
        let disk = open_read_only(path);
        assert_eq!(disk.len(), self.disk_len);
        for (at, count) in pieces(0..self.disk_len) {
            let (mut found, mut expected) = (vec![0x99; size(count)], vec![0x66; size(count)]);
            disk.read_at(&mut found, at).unwrap();
            self.mirror.read_exact_at(&mut expected, at).unwrap();
            assert!(found == expected, "we read other bytes behind {at:#x}");
        }
    }

    /// The second reading finds in `files`, the child first, what the disk must hold.
    pub(crate) fn second_agrees(&self, files: &[PathBuf]) {
        let chain = Chain::open(files.iter().map(|path| host_file(path))).unwrap();
        chain.check().unwrap();
        assert_eq!(chain.disk_len(), self.disk_len);
        let found = chain.content(PIECE);
        assert!(found == raw_content(&self.raw, PIECE));
        assert!(found.iter().all(|(_, bytes)| len(bytes) > 0));
    }
}

/// Compacts all that can be.
pub(crate) fn compact(disk: &Arc<Disk>, punch_holes: bool) {
    let options = CompactOptions {
        punch_holes,
        ..CompactOptions::default()
    };
    match disk.compact(&options).wait() {
        Ok(_) | Err(CompactError::Fixed) => {}
        Err(error) => panic!("compaction: {error}"),
    }
}
