//! Filesystems whose metadata is damaged at random: no reader panics or hangs, and none calls free
//! what a file holds.
//!
//! The latter can be demanded of one wrong byte, since what is in use is told twice or has a checksum
//! wherever it matters, with two exceptions: the sizes in the boot sector of FAT12 and FAT16 stand
//! nowhere else, and of the bitmaps of ext2 only the sums do, so that it is one wrong bit there. It
//! cannot be demanded of more wrong bytes, which may agree with each other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use vhdfs::guest::{Outcome, Source, Survey, SurveyOptions, survey};
use vhdfs::storage::sim::Random;

use crate::rig::{Mounted, blank, can_mount};
use crate::support::tools::{installed, tool};
use crate::support::{env_number, len, len_of, size};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What each sector of each file begins with, before the file's number.
const TAG: [u8; 12] = *b"of the file ";
const FILES: u8 = 24;

/// A filesystem, and how to make a small one.
struct Kind {
    /// As the survey calls it.
    name: &'static str,
    len: u64,
    make: &'static [&'static str],
    mount: Mount,
    /// Where one wrong byte can mislead, and its own system as well.
    unchecked: Range<u64>,
    /// How many bits of a byte may be wrong.
    bits: u64,
    /// How often one goes wrong.
    times: u64,
}

/// What most have.
const USUAL: Kind = Kind {
    name: "",
    len: 16 * MIB,
    make: &[],
    mount: Mount::Mtools,
    unchecked: 0..0,
    bits: 8,
    times: 250,
};

enum Mount {
    /// By the kernel, or by a program that is installed as a helper of `mount`: as this type.
    Helper(&'static str),
    /// By a program.
    Fuse(&'static str),
    /// With mtools, by copying in.
    Mtools,
}

/// A disk with wrong bytes, which remembers what was read.
struct Damaged<'a> {
    file: &'a File,
    len: u64,
    /// Where, and what to flip.
    wrong: Vec<(u64, u8)>,
    reads: Mutex<Vec<Range<u64>>>,
}

impl Source for Damaged<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn sector_size(&self) -> u64 {
        SECTOR
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + len(buf);
        assert!(end <= self.len, "a read beyond the end");
        self.file.read_exact_at(buf, offset)?;
        for (at, flip) in &self.wrong {
            if (offset..end).contains(at) {
                buf[size(at - offset)] ^= flip;
            }
        }
        self.reads.lock().push(offset..end);
        Ok(())
    }
}

impl<'a> Damaged<'a> {
    fn new(file: &'a File, len: u64, wrong: Vec<(u64, u8)>) -> Self {
        Self {
            file,
            len,
            wrong,
            reads: Mutex::default(),
        }
    }

    fn survey(&self) -> Survey {
        survey(self, &SurveyOptions::default()).unwrap()
    }
}

/// Whether a file stays.
fn stays(number: u8) -> bool {
    !number.is_multiple_of(3)
}

fn write_files(folder: &Path) {
    for number in 0..FILES {
        let sectors = 8 + u64::from(number) * 5 % 90;
        let mut bytes = vec![number | 1; size(sectors * SECTOR)];
        for sector in bytes.chunks_mut(size(SECTOR)) {
            sector[..12].copy_from_slice(&TAG);
            sector[12] = number;
        }
        let below = folder.join(format!("d{}", number % 4));
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join(format!("f{number}")), bytes).unwrap();
    }
}

fn names_of_deleted() -> Vec<String> {
    let gone = (0..FILES).filter(|number| !stays(*number));
    gone.map(|number| format!("d{}/f{number}", number % 4))
        .collect()
}

/// A volume with files, some of them deleted.
fn make(kind: &Kind, folder: &Path) -> Option<PathBuf> {
    let image = folder.join("image");
    let needed: &[&str] = match kind.mount {
        Mount::Helper("exfat-fuse") => &["mount.exfat-fuse"],
        Mount::Helper(_) => &[],
        Mount::Fuse(program) => &[program],
        Mount::Mtools => &["mcopy", "mdel"],
    };
    if !installed(&kind.make[..1]) || !installed(needed) {
        return None;
    }
    if !matches!(kind.mount, Mount::Mtools) && !can_mount() {
        return None;
    }
    blank(&image, kind.len);
    tool(kind.make[0], &kind.make[1..], &[&image]);
    let at = folder.join("files");
    let mounted = match kind.mount {
        Mount::Helper(name) => Mounted::kernel(&image, &at, name, "loop"),
        Mount::Fuse(program) => Mounted::fuse(program, &[], &image, &at),
        Mount::Mtools => {
            write_files(&at);
            let words = ["MTOOLS_SKIP_CHECK=1", "mcopy", "-s", "-i", image.to_str()?];
            let folders: Vec<_> = (0..4).map(|number| at.join(format!("d{number}"))).collect();
            let mut paths: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
            paths.push(Path::new("::"));
            tool("env", &words, &paths);
            let gone: Vec<_> = (names_of_deleted().iter())
                .map(|name| PathBuf::from(format!("::{name}")))
                .collect();
            let words = ["MTOOLS_SKIP_CHECK=1", "mdel", "-i", image.to_str()?];
            tool(
                "env",
                &words,
                &gone.iter().map(PathBuf::as_path).collect::<Vec<_>>(),
            );
            return Some(image);
        }
    };
    write_files(mounted.path());
    tool("sync", &["-f"], &[mounted.path()]);
    for name in names_of_deleted() {
        fs::remove_file(mounted.path().join(name)).unwrap();
    }
    drop(mounted);
    Some(image)
}

/// Where the sectors of files that stay lie, and those of files that are gone.
fn sectors(image: &Path) -> [Vec<u64>; 2] {
    let bytes = fs::read(image).unwrap();
    let mut found = [Vec::new(), Vec::new()];
    let mut of = BTreeSet::new();
    for (at, sector) in (0..)
        .step_by(size(SECTOR))
        .zip(bytes.chunks_exact(size(SECTOR)))
    {
        if sector.starts_with(&TAG) {
            found[usize::from(!stays(sector[12]))].push(at);
            of.insert(sector[12]);
        }
    }
    assert!(
        (0..FILES)
            .filter(|file| stays(*file))
            .all(|file| of.contains(&file))
    );
    found
}

/// A byte of what was read, preferably one that says something, and what to flip of it.
fn wrong(random: &mut Random, file: &File, reads: &[Range<u64>], bits: u64) -> (u64, u8) {
    let mut chosen = 0;
    for _ in 0..16 {
        let range = &reads[size(random.below(len_of(reads)))];
        chosen = range.start + random.below(range.end - range.start);
        let mut byte = [0];
        file.read_exact_at(&mut byte, chosen).unwrap();
        if byte != [0] {
            break;
        }
    }
    let bit = 1 << random.below(8);
    let any = u8::try_from(1 + random.below(255)).unwrap();
    (chosen, if random.below(bits) == 0 { bit } else { any })
}

fn survives(kind: &Kind) {
    let folder = tempfile::tempdir().unwrap();
    let Some(image) = make(kind, folder.path()) else {
        return;
    };
    let [kept, gone] = sectors(&image);
    let file = File::open(&image).unwrap();
    let clean = Damaged::new(&file, kind.len, Vec::new());
    let found = clean.survey();
    let [part] = &found.parts[..] else {
        panic!("{:?}", found.parts);
    };
    assert_eq!(part.content, Some(kind.name));
    assert!(matches!(part.outcome, Outcome::Read { .. }), "{part:?}");
    let frees = |found: &Survey, sectors: &[u64]| {
        let mut all = sectors.iter().copied();
        all.find(|at| found.free.overlaps(&(*at..at + SECTOR)))
    };
    assert_eq!(frees(&found, &kept), None);
    assert!(frees(&found, &gone).is_some(), "nothing to go wrong");

    let reads = clean.reads.into_inner();
    let soak = env_number("VHDFS_SOAK", 1);
    let mut random = Random::new(soak);
    let mut read_all_the_same = 0;
    for _ in 0..kind.times * soak {
        let (at, flip) = wrong(&mut random, &file, &reads, kind.bits);
        let found = Damaged::new(&file, kind.len, vec![(at, flip)]).survey();
        read_all_the_same += u64::from(!found.free.is_empty());
        if !kind.unchecked.contains(&at) {
            let lost = frees(&found, &kept);
            assert_eq!(lost, None, "{}: {flip:#x} at {at:#x}", kind.name);
        }
    }
    for _ in 0..kind.times / 3 * soak {
        let wrongs = 2 + random.below(12);
        let all = (0..wrongs).map(|_| wrong(&mut random, &file, &reads, kind.bits));
        Damaged::new(&file, kind.len, all.collect()).survey();
    }
    for _ in 0..kind.times / 10 * soak {
        let len = random.below(kind.len);
        let found = Damaged::new(&file, len, Vec::new()).survey();
        assert_eq!(found.free.len(), 0, "{}: cut to {len}", kind.name);
    }
    println!(
        "{}: {read_all_the_same} of {} read all the same",
        kind.name,
        kind.times * soak
    );
}

#[test]
fn fat() {
    for (name, len, make, unchecked) in [
        ("FAT12", 4 * MIB, &["mkfs.vfat", "-F", "12"][..], 0x0b..0x24),
        ("FAT16", 16 * MIB, &["mkfs.vfat", "-F", "16"], 0x0b..0x24),
        (
            "FAT32",
            36 * MIB,
            &["mkfs.vfat", "-F", "32", "-s", "1"],
            0..0,
        ),
    ] {
        survives(&Kind {
            name,
            len,
            make,
            unchecked,
            ..USUAL
        });
    }
}

#[test]
fn exfat() {
    survives(&Kind {
        name: "exFAT",
        make: &["mkfs.exfat"],
        mount: Mount::Helper("exfat-fuse"),
        ..USUAL
    });
}

#[test]
fn ext() {
    survives(&Kind {
        name: "ext4",
        make: &["mkfs.ext4", "-q", "-F"],
        mount: Mount::Helper("ext4"),
        ..USUAL
    });
    survives(&Kind {
        name: "ext2",
        make: &["mkfs.ext2", "-q", "-F"],
        mount: Mount::Helper("ext2"),
        bits: 1,
        ..USUAL
    });
}

#[test]
fn ntfs() {
    survives(&Kind {
        name: "NTFS",
        make: &["mkntfs", "-q", "-Q", "-F"],
        mount: Mount::Fuse("ntfs-3g"),
        ..USUAL
    });
}

#[test]
fn xfs() {
    survives(&Kind {
        name: "XFS",
        len: 300 * MIB,
        make: &["mkfs.xfs", "-q", "-f"],
        mount: Mount::Helper("xfs"),
        // It reads a long log each time.
        times: 60,
        ..USUAL
    });
}

#[test]
fn btrfs() {
    survives(&Kind {
        name: "btrfs",
        len: 128 * MIB,
        make: &["mkfs.btrfs", "-q", "-f"],
        mount: Mount::Helper("btrfs"),
        times: 120,
        ..USUAL
    });
}
