//! ext2, ext3 and ext4, made and checked by e2fsprogs, filled by the kernel.

mod dirty;
mod refused;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhdfs::guest::{Outcome, Part, Rest, SurveyOptions, survey};

use crate::rig::{Mounted, RawDisk, blank, can_mount, contents, fill};
use crate::support::tools::{installed, run, tool};

const MIB: u64 = 1 << 20;

/// A name, what `mke2fs` is told, and how large the disk is.
type Variant = (&'static str, &'static str, u64);

/// A folder for disks: in memory where there is plenty, since each `sync` waits for the host's disk.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let room = rustix::fs::statvfs(memory).map_or(0, |found| found.f_bavail * found.f_frsize);
    match room > 2 << 30 {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    }
    .unwrap()
}

fn can_test() -> bool {
    installed(&["mke2fs", "dumpe2fs", "e2fsck", "debugfs", "tune2fs"])
}

fn make(folder: &Path, (name, words, size): Variant) -> PathBuf {
    let path = folder.join(format!("{name}.raw"));
    blank(&path, size);
    let words: Vec<&str> = ["-q", "-F"].into_iter().chain(words.split(' ')).collect();
    tool("mke2fs", &words, &[&path]);
    path
}

/// What a survey of the disk says: its only part, and the free ranges.
fn look(path: &Path) -> (Part, Vec<(u64, u64)>) {
    let found = survey(&RawDisk::open(path, 512), &SurveyOptions::default()).unwrap();
    assert_eq!(found.parts.len(), 1);
    let free = found.free.iter().map(|run| (run.start, run.end)).collect();
    (found.parts[0].clone(), free)
}

fn sum(free: &[(u64, u64)]) -> u64 {
    free.iter().map(|(start, end)| end - start).sum()
}

/// Sees that the disk is left alone for this `reason`, before which its filesystem's name may stand.
fn refused_for(path: &Path, reason: &str, what: &str) {
    let (part, free) = look(path);
    let Outcome::Skipped { reason: said } = part.outcome else {
        panic!("{what}: read as {part:?}");
    };
    assert!(free.is_empty(), "{what}");
    let said = format!("{} {said}", part.content.unwrap_or("nothing"));
    assert!(said.contains(reason), "{what}: {said}");
}

/// Bytes that `dumpe2fs` calls free.
fn told_free(path: &Path) -> u64 {
    let said = tool("dumpe2fs", &["-h"], &[path]);
    let field = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    field("Free blocks:") * field("Block size:")
}

fn debugfs(path: &Path, command: &str) -> String {
    tool("debugfs", &["-w", "-R", command], &[path])
}

fn spoil(path: &Path, free: &[(u64, u64)]) {
    let disk = RawDisk::open(path, 512);
    for (start, end) in free {
        disk.spoil(*start, *end);
    }
}

fn mounted(path: &Path, options: &str) -> Mounted {
    let options = format!("loop{options}");
    Mounted::kernel(path, &path.with_extension("mnt"), "ext4", &options)
}

/// Fills the disk and deletes some: by the kernel if it can, else by `debugfs`.
fn used(path: &Path, seed: u64, by_kernel: bool) {
    let keep = |number| number % 3 == 0;
    if by_kernel {
        fill(mounted(path, "").path(), seed, 24, keep);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), seed, 24, |_| true);
    let script = folder.path().join("script");
    let mut lines = String::new();
    for number in 0..24 {
        let name = folder.path().join(format!("d{}/f{number}", number % 7));
        lines += &format!("write {} f{number}\n", name.display());
    }
    for number in (0..24).filter(|number| !keep(*number)) {
        lines += &format!("rm f{number}\n");
    }
    fs::write(&script, lines).unwrap();
    let words = ["-w", "-f", script.to_str().unwrap()];
    tool("debugfs", &words, &[path]);
    // It does not keep count of quotas.
    run("e2fsck", &["-f", "-y"], &[path]);
}

/// What files the disk has: by the kernel if it can, else by `debugfs`.
fn files(path: &Path, by_kernel: bool) -> BTreeMap<PathBuf, Vec<u8>> {
    if by_kernel {
        return contents(mounted(path, ",ro").path());
    }
    let folder = tempfile::tempdir().unwrap();
    debugfs(path, &format!("rdump / {}", folder.path().display()));
    contents(folder.path())
}

/// Sees that the tools and the survey agree, and that nothing rests on what is free.
fn agrees(name: &str, path: &Path, by_kernel: bool) {
    let (part, free) = look(path);
    let told = told_free(path);
    let outcome = Outcome::Read {
        reported_free: told,
        free: sum(&free),
        rest: Rest::Unmounted,
    };
    assert_eq!(part.outcome, outcome, "{name}");
    // The last cluster may be cut off by the disk's end.
    assert!(sum(&free) <= told && told - sum(&free) < 64 << 10, "{name}");
    let before = files(path, by_kernel);
    assert!(!before.is_empty(), "{name}");
    spoil(path, &free);
    tool("e2fsck", &["-f", "-n"], &[path]);
    assert!(files(path, by_kernel) == before, "{name}");
}

fn all_agree(variants: &[Variant], by_kernel: bool) {
    if !can_test() || by_kernel && !can_mount() {
        return;
    }
    let folder = folder();
    for variant in variants {
        let path = make(folder.path(), *variant);
        used(&path, variant.2, by_kernel);
        agrees(variant.0, &path, by_kernel);
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn old_layouts() {
    let variants = [
        ("ext2", "-t ext2", 64 * MIB),
        ("ext2-1k", "-t ext2 -b 1024", 64 * MIB + 512),
        ("ext2-2k", "-t ext2 -b 2048 -I 128", 64 * MIB),
        ("rev0", "-t ext2 -r 0 -b 1024", 40 * MIB),
        (
            "dense",
            "-t ext2 -b 1024 -O ^sparse_super,^resize_inode",
            64 * MIB,
        ),
        ("ext3", "-t ext3", 96 * MIB),
        ("ext3-1k", "-t ext3 -b 1024", 96 * MIB),
        ("no-64bit", "-t ext4 -O ^64bit", 64 * MIB),
        ("no-journal", "-t ext4 -O ^has_journal", 64 * MIB),
    ];
    all_agree(&variants, true);
}

#[test]
fn groups_and_descriptors() {
    let variants = [
        ("ext4", "-t ext4", 256 * MIB),
        ("ext4-2k", "-t ext4 -b 2048", 96 * MIB),
        ("no-flex", "-t ext4 -b 1024 -O ^flex_bg", 96 * MIB),
        ("meta-bg", "-t ext4 -O meta_bg,^resize_inode", 160 * MIB),
        (
            "meta-bg-1k",
            "-t ext4 -b 1024 -g 1024 -O meta_bg,^resize_inode",
            64 * MIB,
        ),
        (
            "uninit-bg",
            "-t ext4 -b 1024 -O uninit_bg,^metadata_csum,^64bit",
            128 * MIB,
        ),
        (
            "uninit-bg-64",
            "-t ext4 -O uninit_bg,^metadata_csum",
            300 * MIB,
        ),
        (
            "super2",
            "-t ext4 -b 1024 -O sparse_super2 -E num_backup_sb=2",
            128 * MIB,
        ),
        (
            "super2-1",
            "-t ext4 -b 1024 -O sparse_super2 -E num_backup_sb=1",
            64 * MIB,
        ),
        (
            "super2-0",
            "-t ext4 -b 1024 -O sparse_super2 -E num_backup_sb=0",
            64 * MIB,
        ),
        (
            "many-groups",
            "-t ext4 -b 1024 -g 512 -E resize=4000000",
            64 * MIB,
        ),
    ];
    all_agree(&variants, true);
}

#[test]
fn features() {
    let variants = [
        ("bigalloc", "-t ext4 -O bigalloc", 160 * MIB + 12 * 1024),
        (
            "bigalloc-1k",
            "-t ext4 -b 1024 -C 8192 -O bigalloc",
            96 * MIB + 3 * 1024,
        ),
        (
            "bigalloc-meta",
            "-t ext4 -b 1024 -C 4096 -g 4096 -O bigalloc,meta_bg,^resize_inode",
            64 * MIB,
        ),
        ("orphan-file", "-t ext4 -O orphan_file", 64 * MIB),
        ("inline-data", "-t ext4 -O inline_data", 64 * MIB),
        ("mmp", "-t ext4 -O mmp", 64 * MIB),
        ("seed", "-t ext4 -O metadata_csum_seed", 64 * MIB),
        (
            "encrypt",
            "-t ext4 -O encrypt,verity,stable_inodes",
            64 * MIB,
        ),
        ("large-dir", "-t ext4 -O large_dir,ea_inode", 64 * MIB),
        ("fast-commit", "-t ext4 -O fast_commit", 64 * MIB),
        ("small-inodes", "-t ext4 -I 128", 64 * MIB),
    ];
    all_agree(&variants, true);
}

/// What this kernel may not mount.
#[test]
fn without_the_kernel() {
    let variants = [
        ("casefold", "-t ext4 -O casefold", 64 * MIB),
        ("quota", "-t ext4 -O quota,project", 64 * MIB),
        ("64k", "-t ext4 -b 65536", 512 * MIB),
        ("by-debugfs", "-t ext4", 64 * MIB),
    ];
    all_agree(&variants, false);
}

/// What a filesystem becomes over the years.
#[test]
fn resized_and_converted() {
    if !can_test() || !can_mount() || !installed(&["resize2fs"]) {
        return;
    }
    let folder = folder();
    let cases: [(Variant, &[&[&str]]); 5] = [
        (
            ("grown", "-t ext4 -b 1024", 32 * MIB),
            &[
                &["resize2fs", "-f", "%", "96M"],
                &["resize2fs", "-f", "%", "50M"],
            ],
        ),
        (
            ("narrow", "-t ext4", 64 * MIB),
            &[&["resize2fs", "-s", "%"]],
        ),
        (
            ("wide", "-t ext4 -O ^64bit", 64 * MIB),
            &[&["resize2fs", "-b", "%"]],
        ),
        (
            ("ext3-to-4", "-t ext3 -I 256", 64 * MIB),
            &[
                &["tune2fs", "-O", "extents,uninit_bg,dir_index,flex_bg", "%"],
                &["e2fsck", "-f", "-y", "-D", "%"],
                &["tune2fs", "-O", "metadata_csum", "%"],
            ],
        ),
        (
            ("other-uuid", "-t ext4", 64 * MIB),
            &[
                &["tune2fs", "-O", "metadata_csum_seed", "%"],
                &["tune2fs", "-U", "random", "%"],
            ],
        ),
    ];
    for (variant, commands) in cases {
        let path = make(folder.path(), variant);
        used(&path, 21, true);
        for words in commands {
            let words = words.iter().map(|word| match *word {
                "%" => path.to_str().unwrap(),
                word => word,
            });
            let words: Vec<&str> = words.collect();
            run("e2fsck", &["-f", "-p"], &[&path]);
            run(words[0], &words[1..], &[]);
        }
        used(&path, 22, true);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(100 * MIB).unwrap();
        agrees(variant.0, &path, true);
        fs::remove_file(path).unwrap();
    }
}

/// A large disk, of which most groups have no bitmaps.
#[test]
fn large_and_sparse() {
    if !can_test() {
        return;
    }
    let folder = folder();
    for variant in [
        ("large", "-t ext4 -J size=8", 100 << 30),
        (
            "larger",
            "-t ext4 -O meta_bg,^resize_inode -E lazy_journal_init=1 -J size=8",
            400 << 30,
        ),
    ] {
        let path = make(folder.path(), variant);
        if can_mount() {
            used(&path, 3, true);
        }
        let (part, free) = look(&path);
        let told = told_free(&path);
        assert_eq!(sum(&free), told);
        assert!(
            matches!(part.outcome, Outcome::Read { reported_free, .. } if reported_free == told)
        );
        // Too much to spoil all: both ends of each run.
        let ends = (free.iter()).flat_map(|(start, end)| {
            let few = 32 << 10;
            [
                (*start, end.min(&(start + few)).to_owned()),
                (*start.max(&(end - few.min(*end))), *end),
            ]
        });
        if variant.0 == "large" {
            spoil(&path, &ends.collect::<Vec<_>>());
            tool("e2fsck", &["-f", "-n"], &[&path]);
        }
        fs::remove_file(path).unwrap();
    }
}
