//! Partition tables and swap space by their own tools: each part where they say it is, nothing free that
//! they want.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::slice;
use std::sync::Arc;

use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::guest::{Outcome, Part, Source, Survey, SurveyOptions, survey};

use crate::rig::{Mounted, RawDisk, blank, can_mount, contents, fill};
use crate::support::samples::{samples, unpack};
use crate::support::size;
use crate::support::tools::{installed, run, tool};

pub(crate) const MIB: u64 = 1 << 20;

/// A loop device over a range of a file, with sectors of that size, until dropped.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    pub(crate) fn new(file: &Path, sector: u64, range: Range<u64>) -> Self {
        let numbers = [sector, range.start, range.end - range.start].map(|n| n.to_string());
        let [sector, start, len] = numbers.each_ref().map(String::as_str);
        let words = [
            "-f",
            "--show",
            "-b",
            sector,
            "-o",
            start,
            "--sizelimit",
            len,
        ];
        Self(tool("losetup", &words, &[file]).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["-d"], &[&self.0]);
    }
}

pub(crate) fn surveyed(path: &Path, sector: u64, swap: bool) -> Survey {
    survey(&RawDisk::open(path, sector), &SurveyOptions { swap }).unwrap()
}

pub(crate) fn part<'a>(survey: &'a Survey, name: &str) -> &'a Part {
    let part = survey.parts.iter().find(|part| part.name == name);
    part.unwrap_or_else(|| panic!("no {name} in {:?}", survey.parts))
}

/// Bytes that a part's own tools call free, all of which may go.
pub(crate) fn free(part: &Part) -> u64 {
    match part.outcome {
        Outcome::Read {
            reported_free,
            free,
            ..
        } => {
            assert_eq!(reported_free, free, "{part:?}");
            free
        }
        Outcome::Skipped { .. } => panic!("{part:?}"),
    }
}

pub(crate) fn skipped(part: &Part, why: &str) {
    match &part.outcome {
        Outcome::Skipped { reason } if reason.contains(why) => {}
        outcome => panic!("{}: {outcome:?}, not {why}", part.name),
    }
}

pub(crate) fn spoil(path: &Path, sector: u64, survey: &Survey) {
    let disk = RawDisk::open(path, sector);
    for range in survey.free.iter() {
        disk.spoil(range.start, range.end);
    }
}

/// Copies what `from` holds to the ranges of `to`, one after the other.
pub(crate) fn scatter(from: &Path, to: &Path, ranges: &[Range<u64>]) {
    let bytes = fs::read(from).unwrap();
    let to = File::options().write(true).open(to).unwrap();
    let mut rest = &bytes[..];
    for range in ranges {
        let (first, behind) = rest.split_at(size(range.end - range.start).min(rest.len()));
        to.write_all_at(first, range.start).unwrap();
        rest = behind;
    }
    assert!(rest.is_empty(), "too large for its place");
}

/// The other way.
pub(crate) fn gather(from: &Path, to: &Path, ranges: &[Range<u64>]) {
    let from = File::open(from).unwrap();
    let mut bytes = Vec::new();
    for range in ranges {
        let mut piece = vec![0; size(range.end - range.start)];
        from.read_exact_at(&mut piece, range.start).unwrap();
        bytes.extend(piece);
    }
    fs::write(to, bytes).unwrap();
}

/// An ext4 of that length in a file of its own, used and half emptied if anything can be mounted here.
pub(crate) fn ext4(path: &Path, len: u64, mounted: bool) {
    blank(path, len);
    tool("mkfs.ext4", &["-q", "-F", "-b", "4096"], &[path]);
    if mounted {
        let files = Mounted::kernel(path, &path.with_extension("files"), "ext4", "loop");
        fill(files.path(), len, 36, |number| number % 2 == 0);
    }
}

/// What dumpe2fs calls free, in bytes.
pub(crate) fn ext4_free(path: &Path) -> u64 {
    let text = tool("dumpe2fs", &["-h"], &[path]);
    let field = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].trim().parse().unwrap()
    };
    field("Free blocks:") * field("Block size:")
}

/// Runs a program on a disk with `script` for its input.
fn fed(program: &str, words: &[&str], disk: &Path, script: &str) {
    let mut child = Command::new(program)
        .args(words)
        .arg(disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}");
}

/// Number, start and size of each partition by `sfdisk -d`, but for the extended one.
fn by_sfdisk(disk: &Path, sector: u64) -> Vec<(String, u64, u64)> {
    let name = disk.to_str().unwrap();
    let field = |line: &str, key: &str| -> String {
        let rest = line.split(&format!("{key}=")).nth(1).unwrap();
        rest.split(',').next().unwrap().trim().to_owned()
    };
    (tool("sfdisk", &["-q", "-d"], &[disk]).lines())
        .filter(|line| line.starts_with(name) && !["5", "f"].contains(&&*field(line, "type")))
        .map(|line| {
            let number = line[name.len()..].split_whitespace().next().unwrap();
            let bytes = |key| field(line, key).parse::<u64>().unwrap() * sector;
            let number = number.trim_start_matches('p');
            (format!("partition {number}"), bytes("start"), bytes("size"))
        })
        .collect()
}

fn places(survey: &Survey) -> Vec<(String, u64, u64)> {
    (survey.parts.iter())
        .map(|part| (part.name.clone(), part.start, part.size))
        .collect()
}

#[test]
fn an_mbr_with_logical_partitions() {
    if !installed(&[
        "sfdisk",
        "mkfs.ext4",
        "dumpe2fs",
        "mkfs.vfat",
        "fsck.vfat",
        "mkswap",
        "losetup",
    ]) {
        return;
    }
    let mounts = can_mount();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (ext, fat, swap) = (path("ext"), path("fat"), path("swap"));
    ext4(&ext, 32 * MIB, mounts);
    blank(&fat, 20 * MIB);
    tool("mkfs.vfat", &["-F", "16"], &[&fat]);
    blank(&swap, 6 * MIB);
    tool("mkswap", &["-q"], &[&swap]);
    for sector in [512, 4096] {
        let disk = path(&format!("disk{sector}"));
        blank(&disk, 100 * MIB);
        let sectors = |mib: u64| mib * MIB / sector;
        let script = format!(
            "label: dos\nstart={}, size={}, type=83, bootable\nstart={}, type=5\nsize={}, type=c\n\
             size={}, type=82\nsize={}, type=83\n",
            sectors(1),
            sectors(32),
            sectors(33),
            sectors(20),
            sectors(6),
            sectors(4),
        );
        let expected = match sector {
            512 => {
                fed("sfdisk", &["-q"], &disk, &script);
                by_sfdisk(&disk, sector)
            }
            _ if !mounts => continue,
            _ => {
                let device = Loop::new(&disk, sector, 0..100 * MIB);
                fed(
                    "sfdisk",
                    &["-q", "--no-reread", "--no-tell-kernel"],
                    &device.0,
                    &script,
                );
                by_sfdisk(&device.0, sector)
            }
        };
        assert_eq!(expected.len(), 4);
        let range = |number: usize| {
            let (_, start, size) = expected[number];
            start..start + size
        };
        scatter(&ext, &disk, &[range(0)]);
        // FAT counts the sectors that it was made for; it is not 4096 here, whatever the disk says.
        scatter(&fat, &disk, &[range(1)]);
        scatter(&swap, &disk, &[range(2)]);
        let survey = surveyed(&disk, sector, false);
        assert_eq!(places(&survey), expected);
        assert_eq!(free(part(&survey, "partition 1")), ext4_free(&ext));
        assert_eq!(part(&survey, "partition 5").content, Some("FAT16"));
        skipped(
            part(&survey, "partition 6"),
            "is swap space, which counts as in use",
        );
        skipped(
            part(&survey, "partition 7"),
            "holds nothing that is known here",
        );

        let survey = surveyed(&disk, sector, true);
        assert_eq!(free(part(&survey, "partition 6")), 6 * MIB - 4096);
        spoil(&disk, sector, &survey);
        assert_eq!(places(&surveyed(&disk, sector, true)), expected);
        gather(&disk, &path("after"), &[range(0)]);
        tool("e2fsck", &["-fn"], &[&path("after")]);
        if mounts {
            let content = |image: &Path| {
                contents(Mounted::kernel(image, &path("files"), "ext4", "loop,ro").path())
            };
            assert!(content(&path("after")) == content(&ext), "other files");
        }
        gather(&disk, &path("after"), &[range(1)]);
        tool("fsck.vfat", &["-n"], &[&path("after")]);
        gather(&disk, &path("after"), &[range(2)]);
        let label = tool("swaplabel", &[], &[&path("after")]);
        assert!(label.contains("UUID"), "{label}");
    }
}

#[test]
fn a_gpt_its_backup_and_what_becomes_of_them() {
    if !installed(&["sgdisk", "mkfs.ext4", "dumpe2fs", "mkswap", "losetup"]) || !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let ext = path("ext");
    ext4(&ext, 40 * MIB, true);
    for sector in [512, 4096] {
        let disk = path(&format!("disk{sector}"));
        blank(&disk, 100 * MIB);
        let changed = |words: &[&str]| {
            let len = fs::metadata(&disk).unwrap().len();
            tool("sgdisk", words, &[&Loop::new(&disk, sector, 0..len).0])
        };
        let make = [
            "-n", "1:0:+1M", "-t", "1:ef02", "-n", "2:0:+40M", "-t", "2:8300", "-n", "5:0:+20M",
            "-t", "5:fd00", "-n", "3:0:+8M", "-t", "3:0c01",
        ];
        changed(&make);
        let by_sgdisk = || -> Vec<(String, u64, u64)> {
            (["1", "2", "3", "5"].iter())
                .map(|number| {
                    let text = changed(&["-i", number]);
                    let field = |name: &str| -> u64 {
                        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
                        line[name.len()..]
                            .split_whitespace()
                            .next()
                            .unwrap()
                            .parse()
                            .unwrap()
                    };
                    let (first, last) = (field("First sector:"), field("Last sector:"));
                    let len = (last - first + 1) * sector;
                    (format!("partition {number}"), first * sector, len)
                })
                .collect()
        };
        let expected = by_sgdisk();
        let range = expected[1].1..expected[1].1 + expected[1].2;
        scatter(&ext, &disk, slice::from_ref(&range));
        let as_expected = |what: &str| {
            let survey = surveyed(&disk, sector, false);
            assert_eq!(places(&survey), expected, "{what}");
            assert_eq!(
                free(part(&survey, "partition 2")),
                ext4_free(&ext),
                "{what}"
            );
            survey
        };
        let survey = as_expected("fresh");
        skipped(part(&survey, "partition 1"), "boot loader");
        skipped(part(&survey, "partition 3"), "Windows' own use");
        skipped(part(&survey, "partition 5"), "member of a RAID array");

        let file = File::options().read(true).write(true).open(&disk).unwrap();
        let whole = |why: &str| {
            let survey = surveyed(&disk, sector, false);
            skipped(part(&survey, "the disk"), why);
            assert!(survey.free.is_empty() && survey.parts.len() == 1);
        };
        changed(&["-h", "2"]);
        as_expected("with a hybrid MBR");
        let mut header = vec![0; size(sector)];
        file.read_exact_at(&mut header, sector).unwrap();
        file.write_all_at(&[0; 16], sector).unwrap();
        as_expected("the primary header is gone");
        file.write_all_at(&header, sector).unwrap();
        file.set_len(150 * MIB).unwrap();
        as_expected("grown");
        let other = surveyed(&disk, 4608 - sector, false);
        skipped(part(&other, "the disk"), "counts in sectors of");
        changed(&["-e"]);
        as_expected("grown, and its backup moved to the end");
        spoil(&disk, sector, &survey);
        let said = changed(&["-v"]);
        assert!(said.contains("No problems found"), "{said}");
        gather(&disk, &path("after"), &[range]);
        tool("e2fsck", &["-fn"], &[&path("after")]);
        file.write_all_at(&[0; 16], sector).unwrap();
        file.write_all_at(&[0; 16], 150 * MIB - sector).unwrap();
        whole("neither copy is intact");
        file.write_all_at(&header, sector).unwrap();
        file.set_len(60 * MIB).unwrap();
        whole("too small for its partition table");
    }
}

#[test]
fn filesystems_without_a_table() {
    if !installed(&["mkfs.vfat", "mkntfs", "mkfs.exfat"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["mkfs.vfat", "-I", "-F", "12"], "FAT12"),
        (&["mkfs.vfat", "-I", "-F", "16", "--mbr=y"], "FAT16"),
        (&["mkfs.vfat", "-I", "-F", "32"], "FAT32"),
        (&["mkntfs", "-q", "-Q", "-F"], "NTFS"),
        (&["mkfs.exfat"], "exFAT"),
    ];
    for (number, (words, name)) in cases.iter().enumerate() {
        let disk = folder.path().join(number.to_string());
        let len = if *name == "FAT12" { 4 * MIB } else { 64 * MIB };
        blank(&disk, len);
        tool(words[0], &words[1..], &[&disk]);
        let survey = surveyed(&disk, 512, false);
        let found = part(&survey, "the disk");
        assert_eq!((found.content, found.size), (Some(*name), len));
        assert!(free(found) > len / 2, "{found:?}");
    }
}

#[test]
fn swap_space_of_all_page_sizes() {
    if !installed(&["mkswap"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("swap");
    for page in [4096, 8192, 16384, 65536] {
        // Not a whole number of pages.
        blank(&disk, 10 * MIB + 3 * 4096);
        let said = tool("mkswap", &["-p", &page.to_string()], &[&disk]);
        let bytes = said
            .split('(')
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let survey = surveyed(&disk, 512, true);
        let found = part(&survey, "the disk");
        assert_eq!(found.content, Some("Linux swap"));
        assert_eq!(Some(free(found).to_string().as_str()), bytes, "{said}");
        skipped(&surveyed(&disk, 512, false).parts[0], "counts as in use");
        spoil(&disk, 512, &survey);
        assert_eq!(surveyed(&disk, 512, true).free, survey.free);
        let file = File::options().write(true).open(&disk).unwrap();
        file.write_all_at(b"S1SUSPEND\0", page - 10).unwrap();
        skipped(
            &surveyed(&disk, 512, true).parts[0],
            "the memory of a system that sleeps",
        );
        file.set_len(0).unwrap();
    }
}

/// The disk that an image holds.
struct Image(Arc<Disk>);

impl Source for Image {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn sector_size(&self) -> u64 {
        512
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.0.read_at(buf, offset).map_err(std::io::Error::other)
    }
}

#[test]
fn disks_that_other_programs_made() {
    let Some(samples) = samples().filter(|_| installed(&["bzip2"])) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in [
        ("ext2.vhd", Some("ext2")),
        ("test-disk2vhd.vhdx", None),
        ("hyperv2012r2-dynamic.vhd", None),
        ("xen-dyn.vhd", None),
    ] {
        let path = unpack(&samples, folder.path(), name);
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let disk = Image(Disk::open(&path, &options).unwrap());
        let survey = survey(&disk, &SurveyOptions::default()).unwrap();
        println!("{name}: {:?}", survey.parts);
        assert_eq!(survey.parts[0].content, content, "{name}");
    }
}

/// Disks are used again: what was there before must not be taken for what is there now.
#[test]
fn filesystems_over_each_other() {
    let makers: &[(&[&str], &str)] = &[
        (&["mkfs.ext4", "-q", "-F", "-b", "1024"], "ext4"),
        (&["mkfs.btrfs", "-q", "-f"], "btrfs"),
        // Which leaves the superblock of btrfs where it is.
        (&["mkntfs", "-q", "-Q", "-F"], "NTFS"),
        (&["mkfs.vfat", "-I", "-F", "16"], "FAT16"),
        (&["mkfs.xfs", "-q", "-f"], "XFS"),
        (&["mkfs.exfat"], "exFAT"),
        // Which leaves the boot sector.
        (&["mkswap", "-q"], "Linux swap"),
        (&["mkfs.vfat", "-I", "-F", "32"], "FAT32"),
        (&["mkfs.ext4", "-q", "-F"], "ext4"),
    ];
    let tools: Vec<_> = makers.iter().map(|(words, _)| words[0]).collect();
    if !installed(&tools) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    for pair in makers.windows(2) {
        let [(first, old), (second, new)] = pair else {
            continue;
        };
        blank(&disk, 320 * MIB);
        tool(first[0], &first[1..], &[&disk]);
        tool(second[0], &second[1..], &[&disk]);
        let survey = surveyed(&disk, 512, true);
        let found = part(&survey, "the disk");
        match found.content {
            Some(content) => {
                assert_eq!(content, *new);
                assert!(matches!(found.outcome, Outcome::Read { .. }), "{found:?}");
            }
            None => {
                skipped(found, "holds the marks of ");
                skipped(found, old);
                skipped(found, new);
            }
        }
    }
}
