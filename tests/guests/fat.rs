//! FAT12, FAT16 and FAT32 by dosfstools, filled with mtools: the kernel need not know them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::{Outcome, Survey, SurveyOptions, survey};

use crate::rig::{RawDisk, blank, contents, fill};
use crate::support::tools::{installed, run, tool};

const TOOLS: &[&str] = &["mkfs.vfat", "fsck.vfat", "mcopy", "mdel", "mmd", "mdeltree"];

/// Volumes that were made, by number in the folder.
struct Rig {
    folder: tempfile::TempDir,
    image: PathBuf,
}

impl Rig {
    /// An empty volume of `len` bytes by `mkfs.vfat WORDS`; `None`, and it is said, without tools.
    fn new(len: u64, words: &[&str]) -> Option<Self> {
        if !installed(TOOLS) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        blank(&image, len);
        tool("mkfs.vfat", words, &[&image]);
        Some(Self { folder, image })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs one of mtools on the image.
    fn mtool(&self, program: &str, words: &[&str], paths: &[&Path]) {
        let image = self.image.to_str().unwrap();
        let all = ["MTOOLS_SKIP_CHECK=1", program, "-i", image];
        tool("env", &[&all, words].concat(), paths);
    }

    /// Fills it with files until they are in pieces, and deletes some.
    fn fill(&self, seed: u64, files: u64) {
        let keep = |number: u64| number % 3 != 1;
        for round in ["one", "two"] {
            let host = self.path(round);
            fs::create_dir(&host).unwrap();
            fill(&host, seed, files, |_| true);
            self.mtool("mcopy", &["-s"], &[&host, Path::new("::")]);
            let gone = (0..files).filter(|number| !keep(*number));
            let gone = gone.map(|number| format!("::{round}/d{}/f{number}", number % 7));
            let gone: Vec<_> = gone.collect();
            self.mtool("mdel", &[], &gone.iter().map(Path::new).collect::<Vec<_>>());
        }
        self.mtool("mdeltree", &["::one/d3"], &[]);
        self.mtool("mmd", &["::empty"], &[]);
    }

    fn survey(&self) -> Survey {
        let disk = RawDisk::open(&self.image, 512);
        survey(&disk, &SurveyOptions::default()).unwrap()
    }

    /// Why it is in use.
    fn skipped(&self) -> String {
        match &self.survey().parts[..] {
            [part] => match &part.outcome {
                Outcome::Skipped { reason } => format!("{:?}: {reason}", part.content),
                other => panic!("{other:?}"),
            },
            parts => panic!("{parts:?}"),
        }
    }

    /// All files.
    fn contents(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let out = self.path(name);
        fs::create_dir(&out).unwrap();
        self.mtool("mcopy", &["-s", "-n", "::"], &[&out]);
        contents(&out)
    }

    /// Bytes in free clusters, by `fsck.vfat`, which must find nothing wrong.
    fn checked(&self) -> u64 {
        let said = tool("fsck.vfat", &["-n", "-v"], &[&self.image]);
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let cluster = said
            .lines()
            .find_map(|line| number(line.trim().strip_suffix("bytes per cluster")?));
        let counts = said.lines().find_map(|line| {
            let (_, counts) = line.strip_suffix(" clusters")?.rsplit_once(' ')?;
            let (used, all) = counts.split_once('/')?;
            Some(number(all)? - number(used)?)
        });
        counts.expect("counts") * cluster.expect("a size")
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.image).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let file = File::open(&self.image).unwrap();
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// Where the first table begins, and how long one is, from the boot sector.
    fn table(&self) -> (u64, u64) {
        let short = |at| u64::from(u16::from_le_bytes(self.get(at)));
        let sector = short(0x0b);
        let len = match short(0x16) {
            0 => u64::from(u32::from_le_bytes(self.get(0x24))),
            len => len,
        };
        (short(0x0e) * sector, len * sector)
    }
}

/// A filled volume is read as `name`, its own tools agree, and nothing depends on what is free.
fn agrees(name: &str, len: u64, files: u64, words: &[&str]) {
    let Some(rig) = Rig::new(len, words) else {
        return;
    };
    assert_free(&rig, name, len);
    rig.fill(len, files);
    let survey = assert_free(&rig, name, len);
    unspoiled(&rig, &survey);
    let files = rig.contents("files");
    assert!(files.len() > 4, "{words:?}");
}

/// All files hold the same after what is free was overwritten.
fn unspoiled(rig: &Rig, survey: &Survey) {
    let before = rig.contents("before");
    let disk = RawDisk::open(&rig.image, 512);
    for range in survey.free.iter() {
        // Most of a large volume was never used.
        let edge = (range.end - range.start).min(8 * MIB);
        disk.spoil(range.start, range.start + edge);
        disk.spoil(range.end - edge, range.end);
    }
    rig.checked();
    assert!(before == rig.contents("after"), "other files");
}

fn assert_free(rig: &Rig, name: &str, len: u64) -> Survey {
    let survey = rig.survey();
    let [part] = &survey.parts[..] else {
        panic!("{:?}", survey.parts);
    };
    let Outcome::Read { reported_free, .. } = part.outcome else {
        panic!("{part:?}");
    };
    assert_eq!((part.content, part.start, part.size), (Some(name), 0, len));
    assert_eq!(reported_free, rig.checked());
    let free: u64 = survey
        .free
        .iter()
        .map(|range| range.end - range.start)
        .sum();
    assert_eq!(free, reported_free);
    survey
}

const MIB: u64 = 1 << 20;

#[test]
fn fat12_agrees() {
    agrees("FAT12", 1440 << 10, 5, &["-F", "12"]);
    agrees("FAT12", 30 * MIB + 512, 16, &["-F", "12", "-s", "16", "-a"]);
}

#[test]
fn fat16_agrees() {
    agrees("FAT16", 40 * MIB, 20, &["-F", "16", "-s", "4"]);
    agrees("FAT16", 32 * MIB, 16, &["-F", "16", "-f", "1", "-s", "2"]);
    agrees(
        "FAT16",
        40 * MIB,
        20,
        &["-F", "16", "-S", "4096", "-s", "2", "-r", "1024"],
    );
}

#[test]
fn fat32_agrees() {
    let agrees = |len, files, words: &[&str]| {
        agrees("FAT32", len, files, &[&["-F", "32"], words].concat());
    };
    agrees(40 * MIB, 20, &["-s", "1"]);
    agrees(40 * MIB, 20, &["-s", "1", "-f", "1", "-a"]);
    // mtools want no fewer clusters.
    agrees(300 * MIB, 27, &["-s", "8", "-R", "99"]);
    agrees(300 * MIB, 27, &["-S", "4096", "-s", "1"]);
}

#[test]
fn large_volumes_are_read() {
    // 2^23 clusters, of which the first that is tried is far behind.
    let len = 32 << 30;
    if let Some(rig) = Rig::new(len, &["-F", "32", "-s", "8"]) {
        rig.put(512 + 492, &7_000_000_u32.to_le_bytes());
        let file = rig.path("file");
        fs::write(&file, [7; 100_000]).unwrap();
        rig.mtool("mcopy", &[], &[&file, Path::new("::")]);
        let survey = assert_free(&rig, "FAT32", len);
        let places = survey.free.iter().map(|range| range.start);
        assert!(places.max() > Some(7_000_000 * 4096), "{survey:?}");
        unspoiled(&rig, &survey);
    }
}

#[test]
fn bad_clusters_are_in_use() {
    let Some(rig) = Rig::new(1, &["--help"]) else {
        return;
    };
    let list = rig.path("bad");
    fs::write(&list, "2000\n2001\n2500\n").unwrap();
    for kind in ["12", "16", "32"] {
        blank(&rig.image, 24 * MIB);
        let list = list.to_str().unwrap();
        tool("mkfs.vfat", &["-F", kind, "-l", list], &[&rig.image]);
        // The hint for FAT32 forgets them.
        run("fsck.vfat", &["-a"], &[&rig.image]);
        let survey = assert_free(&rig, &format!("FAT{kind}"), 24 * MIB);
        for block in [2000, 2001, 2500] {
            let start = block * 1024;
            assert!(!survey.free.overlaps(&(start..start + 1024)), "{block}");
        }
    }
}

#[test]
fn unclean_ones_are_left_alone() {
    let marks: &[(&str, bool, u64, u8)] = &[
        ("12", false, 0x25, 0x01),
        ("16", false, 0x25, 0x01),
        ("32", false, 0x41, 0x01),
        ("32", false, 0x41, 0x02),
        ("16", true, 3, 0x80),
        ("16", true, 3, 0x40),
        ("32", true, 7, 0x08),
        ("32", true, 7, 0x04),
    ];
    for (kind, in_table, at, bit) in marks {
        let Some(rig) = Rig::new(24 * MIB, &["-F", kind]) else {
            return;
        };
        let (table, len) = rig.table();
        let places = match in_table {
            true => vec![table + at, table + len + at],
            false => vec![*at],
        };
        for place in places {
            let [old] = rig.get::<1>(place);
            rig.put(place, &[old ^ bit]);
        }
        let said = rig.skipped();
        assert!(said.contains("not unmounted cleanly"), "{said}");
        assert!(said.contains(&format!("FAT{kind}")), "{said}");
        // Its own checker sees the bit that it knows.
        let output = run("fsck.vfat", &["-n"], &[&rig.image]);
        let checked = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_dirty = matches!(bit, 0x01 | 0x80 | 0x08);
        assert_eq!(checked.contains("Dirty bit is set"), is_dirty, "{checked}");
    }
}

#[test]
fn damaged_ones_are_left_alone() {
    let Some(rig) = Rig::new(40 * MIB, &["-F", "32", "-s", "1"]) else {
        return;
    };
    rig.fill(1, 9);
    let (table, len) = rig.table();
    let clean = fs::read(&rig.image).unwrap();
    let damage = |places: &[u64], bytes: &[u8], reason: &str| {
        for place in places {
            rig.put(*place, bytes);
        }
        let said = rig.skipped();
        assert!(said.contains(reason), "{said}, not: {reason}");
        fs::write(&rig.image, &clean).unwrap();
    };
    // The chain of the first folder, which mtools put behind the root's cluster.
    damage(&[table + 12], &[0; 4], "differ");
    damage(&[table + len + 12], &[0; 4], "differ");
    damage(&[table + 12, table + len + 12], &[0; 4], "marked as free");
    damage(
        &[table + 12, table + len + 12],
        &[1, 0, 0, 0],
        "means nothing",
    );
    damage(&[table + 12, table + len + 12], &[3, 0, 0, 0], "two files");
    damage(&[0x0e], &[40], "differs from its backup");
    damage(&[0x2a], &[1], "version");
    damage(&[0x28], &[0x83], "copy 3");
    // Only one table counts, by the flags: the first does not agree with all systems' view.
    damage(&[0x28, table + len + 13], &[0x81], "differ");
    rig.put(0x28, &[0x80]);
    rig.put(table + len + 12, &[0; 4]);
    let read = rig.survey();
    assert!(matches!(read.parts[0].outcome, Outcome::Read { .. }));
}

#[test]
fn a_disk_with_a_table_for_windows_is_read() {
    let Some(rig) = Rig::new(40 * MIB, &["-F", "32", "--mbr=y"]) else {
        return;
    };
    rig.fill(2, 9);
    assert_free(&rig, "FAT32", 40 * MIB);
}
