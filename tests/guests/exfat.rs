//! exFAT by exfatprogs, filled with exfat-fuse: the kernel need not know it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::{Outcome, Survey, SurveyOptions, survey};

use crate::rig::{Mounted, RawDisk, blank, can_mount, churn, contents, fill};
use crate::support::tools::{installed, tool};

const TOOLS: &[&str] = &[
    "mkfs.exfat",
    "fsck.exfat",
    "dump.exfat",
    "mount.exfat-fuse",
    "losetup",
];
const MIB: u64 = 1 << 20;

/// A loop device, until dropped: exfat-fuse mounts nothing else.
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path, sector_size: u64) -> Self {
        let sector_size = sector_size.to_string();
        let words = ["--find", "--show", "--sector-size", &sector_size];
        Self(PathBuf::from(tool("losetup", &words, &[image]).trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tool("losetup", &["--detach"], &[&self.0]);
    }
}

struct Rig {
    folder: tempfile::TempDir,
    image: PathBuf,
    sector_size: u64,
}

impl Rig {
    /// An empty volume of `len` bytes by `mkfs.exfat WORDS`; `None`, and it is said, without tools.
    fn new(len: u64, sector_size: u64, words: &[&str]) -> Option<Self> {
        if !installed(TOOLS) || !can_mount() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        blank(&image, len);
        tool("mkfs.exfat", words, &[&Loop::new(&image, sector_size).0]);
        Some(Self {
            folder,
            image,
            sector_size,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Mounts it, has it changed, and unmounts it.
    fn mounted<T>(&self, change: impl FnOnce(&Path) -> T) -> T {
        let device = Loop::new(&self.image, self.sector_size);
        let mounted = Mounted::kernel(&device.0, &self.path("files"), "exfat-fuse", "rw");
        change(mounted.path())
    }

    /// Fills it with files, some in pieces, and deletes some.
    fn fill(&self, seed: u64, files: u64) {
        self.mounted(|folder| {
            fill(folder, seed, files, |number| number % 3 != 1);
            let pieces = ["odd", "even"].map(|name| folder.join(name));
            for piece in 0..20_u8 {
                for path in &pieces {
                    let file = OpenOptions::new().append(true).create(true).open(path);
                    file.unwrap().write_all(&[piece; 70_000]).unwrap();
                }
            }
            fs::remove_file(&pieces[1]).unwrap();
            // More entries than a small cluster holds.
            let many = folder.join("many");
            fs::create_dir(&many).unwrap();
            for number in 0..60 {
                let name = format!("a rather long name, which takes several entries {number}");
                fs::write(many.join(name), [7; 10]).unwrap();
            }
            churn(folder, seed, 20);
            tool("sync", &["-f"], &[folder]);
        });
    }

    fn survey_of(&self, image: &Path) -> Survey {
        let disk = RawDisk::open(image, self.sector_size);
        survey(&disk, &SurveyOptions::default()).unwrap()
    }

    /// Why `image` is in use.
    fn skipped(&self, image: &Path) -> String {
        match &self.survey_of(image).parts[..] {
            [part] => match &part.outcome {
                Outcome::Skipped { reason } => format!("{:?}: {reason}", part.content),
                other => panic!("{other:?}"),
            },
            parts => panic!("{parts:?}"),
        }
    }

    /// That it is read, as its own tools do, which must find nothing wrong.
    fn assert_free(&self) -> Survey {
        tool("fsck.exfat", &["-n"], &[&self.image]);
        let said = tool("dump.exfat", &[], &[&self.image]);
        let number = |name: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(name));
            line.expect(name).trim().parse::<u64>().unwrap()
        };
        let expected = number("Free Clusters:") * number("Cluster size:");
        let survey = self.survey_of(&self.image);
        let [part] = &survey.parts[..] else {
            panic!("{:?}", survey.parts);
        };
        let Outcome::Read { reported_free, .. } = part.outcome else {
            panic!("{part:?}");
        };
        assert_eq!((part.content, reported_free), (Some("exFAT"), expected));
        let free: u64 = survey
            .free
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        assert_eq!(free, reported_free);
        survey
    }
}

/// A filled volume is read, its own tools agree, and nothing depends on what is free.
fn agrees(len: u64, sector_size: u64, files: u64, words: &[&str]) {
    let Some(rig) = Rig::new(len, sector_size, words) else {
        return;
    };
    rig.assert_free();
    rig.fill(len, files);
    let survey = rig.assert_free();
    let before = rig.mounted(contents);
    let disk = RawDisk::open(&rig.image, sector_size);
    for range in survey.free.iter() {
        disk.spoil(range.start, range.end);
    }
    rig.assert_free();
    let after = rig.mounted(contents);
    assert!(before == after, "{words:?}: other files");
    assert!(before.len() > 60);
}

#[test]
fn small_clusters_agree() {
    agrees(32 * MIB, 512, 16, &["-c", "512"]);
    agrees(40 * MIB, 512, 20, &["--pack-bitmap"]);
}

#[test]
fn large_clusters_agree() {
    agrees(56 * MIB, 512, 20, &["-c", "64K"]);
    agrees(128 * MIB, 512, 9, &["-c", "1M"]);
}

#[test]
fn large_sectors_agree() {
    agrees(48 * MIB, 4096, 20, &["-c", "8K"]);
}

#[test]
fn large_volumes_are_read() {
    if let Some(rig) = Rig::new(256 << 30, 512, &["-c", "32K"]) {
        rig.mounted(|folder| fs::create_dir(folder.join("a")).unwrap());
        rig.assert_free();
    }
}

#[test]
fn a_mounted_one_is_left_alone() {
    let Some(rig) = Rig::new(32 * MIB, 512, &[]) else {
        return;
    };
    let copy = rig.path("copy");
    rig.mounted(|folder| {
        // Its first answer comes when it has put the mark there.
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
        fs::copy(&rig.image, &copy).unwrap();
        assert!(rig.skipped(&copy).contains("not unmounted cleanly"));
        fs::write(folder.join("file"), [1; 100_000]).unwrap();
        tool("sync", &["-f"], &[folder]);
        fs::copy(&rig.image, &copy).unwrap();
        assert!(rig.skipped(&copy).contains("exFAT"));
        assert!(rig.skipped(&copy).contains("not unmounted cleanly"));
    });
    rig.assert_free();
}

#[test]
fn damaged_ones_are_left_alone() {
    let Some(rig) = Rig::new(32 * MIB, 512, &[]) else {
        return;
    };
    rig.fill(3, 9);
    rig.assert_free();
    let clean = fs::read(&rig.image).unwrap();
    let number = |at: usize| u64::from(u32::from_le_bytes(*clean[at..].first_chunk().unwrap()));
    let (fat, heap) = (number(80) * 512, number(88) * 512);
    let damage = |at: u64, bytes: &[u8], reason: &str| {
        let file = File::options().write(true).open(&rig.image).unwrap();
        file.write_all_at(bytes, at).unwrap();
        let said = rig.skipped(&rig.image);
        assert!(said.contains(reason), "{said}, not: {reason}");
        fs::write(&rig.image, &clean).unwrap();
    };
    damage(106, &[2], "not unmounted cleanly");
    damage(106, &[4], "met a bad place");
    damage(106, &[1], "makes no sense");
    damage(90, &[1], "wrong checksum");
    damage(
        12 * 512 + 90,
        &[1],
        "backup boot region with a wrong checksum",
    );
    damage(fat, &[0], "does not begin as one");
    // The bitmap lies in the first cluster, the up-case table in the next.
    damage(fat + 8, &[0], "breaks off");
    damage(fat + 8, &[3, 0, 0, 0], "in two files");
    damage(heap, &[0xfe], "marked as free");
    damage(heap + 1, &[0], "marked as free");
}
