//! Filesystems that were not unmounted: read as their journals leave them, or left alone.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhdfs::guest::{Outcome, Rest};

use super::{
    MIB, Variant, can_test, files, fill, folder, look, make, mounted, refused_for, spoil, sum,
    told_free, used,
};
use crate::rig::{Mounted, can_mount};
use crate::support::tools::{run, tool};

/// A copy of the disk as it is at this moment.
fn copied(path: &Path) -> PathBuf {
    copied_to(path, "copy")
}

fn copied_to(path: &Path, extension: &str) -> PathBuf {
    let copy = path.with_extension(extension);
    tool("cp", &["--sparse=always"], &[path, &copy]);
    copy
}

/// Sees that the disk, which needs its journal replayed, is read as what replaying makes of it, and
/// that nothing rests on what is free.
fn agrees(name: &str, path: &Path) {
    let (part, free) = look(path);
    let replayed = copied_to(path, "replayed");
    let checked = run("e2fsck", &["-f", "-y"], &[&replayed]);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned()
        + &String::from_utf8_lossy(&checked.stderr);
    assert!(
        matches!(checked.status.code(), Some(0 | 1)),
        "{name}: {said}"
    );
    let outcome = Outcome::Read {
        reported_free: told_free(&replayed),
        free: sum(&free),
        rest: Rest::Replayed,
    };
    assert_eq!(part.outcome, outcome, "{name}");
    let (_, later) = look(&replayed);
    for (start, end) in &free {
        let inside = later.iter().any(|run| run.0 <= *start && *end <= run.1);
        assert!(
            inside,
            "{name}: {start}..{end} is in use once it is replayed"
        );
    }
    let before = files(&replayed, true);
    assert!(!before.is_empty(), "{name}");
    spoil(path, &free);
    drop(mounted(path, ""));
    tool("e2fsck", &["-f", "-n"], &[path]);
    assert!(files(path, true) == before, "{name}");
}

/// Makes many transactions, with blocks that are revoked, and leaves some of it in memory.
fn work(folder: &Path, rounds: u64) {
    for round in 0..rounds {
        let here = folder.join(format!("r{round}"));
        fs::create_dir(&here).unwrap();
        fill(&here, round, 10, |number| number % 4 != 0);
        for number in 0..60 {
            fs::write(
                here.join(format!("a name of some length {number}")),
                [1; 30],
            )
            .unwrap();
        }
        // What begins as a block of the journal does has to be escaped there.
        let block = [&[0xc0, 0x3b, 0x39, 0x98][..], &[7; 5000]].concat();
        fs::write(here.join("magic"), block).unwrap();
        tool("sync", &["-f"], &[folder]);
        if round % 3 != 0 {
            fs::remove_dir_all(folder.join(format!("r{}", round - 1))).unwrap();
        }
    }
    fill(&folder.join("r0"), 99, 12, |_| true);
    for number in 0..12 {
        fs::write(folder.join(format!("late {number}")), vec![5; 20_000]).unwrap();
    }
}

#[test]
fn copied_while_mounted() {
    if !can_test() || !can_mount() {
        return;
    }
    let folder = folder();
    let variants: [(Variant, &str); 7] = [
        (("ext3", "-t ext3 -b 1024 -J size=4", 64 * MIB), ""),
        (("ext4", "-t ext4", 96 * MIB), ""),
        (("wraps", "-t ext4 -b 1024 -J size=1", 64 * MIB), ""),
        (
            (
                "no-csum",
                "-t ext4 -O ^metadata_csum,^64bit -J size=4",
                64 * MIB,
            ),
            "",
        ),
        (
            ("data", "-t ext4 -b 1024 -J size=16", 64 * MIB),
            ",data=journal,nodelalloc",
        ),
        (("orphan-file", "-t ext4 -O orphan_file", 96 * MIB), ""),
        (("bigalloc", "-t ext4 -O bigalloc,uninit_bg", 160 * MIB), ""),
    ];
    for (variant, options) in variants {
        let path = make(folder.path(), variant);
        let copy = {
            let mounted = mounted(&path, options);
            work(mounted.path(), 7);
            copied(&path)
        };
        agrees(variant.0, &copy);
    }
}

/// Whatever mounts it once, the disk is read again as one that was unmounted.
#[test]
fn mounted_once_afterwards() {
    if !can_test() || !can_mount() {
        return;
    }
    let folder = folder();
    let path = make(folder.path(), ("once", "-t ext4", 64 * MIB));
    let copy = {
        let mounted = mounted(&path, "");
        work(mounted.path(), 3);
        copied(&path)
    };
    for how in ["ro", "rw", "e2fsck"] {
        let again = copied_to(&copy, "again");
        if how == "e2fsck" {
            run("e2fsck", &["-p"], &[&again]);
        } else {
            // The device has to be writable, whatever the mount.
            let device = tool("losetup", &["--find", "--show"], &[&again]);
            let device = Path::new(device.trim());
            let folder = again.with_extension("mnt");
            drop(Mounted::kernel(device, &folder, "ext4", how));
            tool("losetup", &["--detach"], &[device]);
        }
        super::agrees(how, &again, true);
    }
}

/// Nothing was ever written: the journal is empty, though it is in use.
#[test]
fn empty_but_mounted() {
    if !can_test() || !can_mount() {
        return;
    }
    let folder = folder();
    let path = make(folder.path(), ("idle", "-t ext4", 64 * MIB));
    used(&path, 1, true);
    let copy = {
        let _mounted = mounted(&path, "");
        copied(&path)
    };
    agrees("idle", &copy);
}

#[test]
fn left_alone_while_mounted() {
    if !can_test() || !can_mount() {
        return;
    }
    let folder = folder();
    let variants = [
        (
            ("ext2", "-t ext2", 32 * MIB),
            "",
            "ext2 was not unmounted cleanly",
        ),
        (
            ("none", "-t ext4 -O ^has_journal", 32 * MIB),
            "",
            "ext4 was not unmounted cleanly",
        ),
        (
            ("mmp", "-t ext4 -O mmp", 32 * MIB),
            "",
            "is in use by the machine",
        ),
        (("orphans", "-t ext4", 32 * MIB), "", "while they were open"),
        (
            ("orphan-file", "-t ext4 -O orphan_file", 32 * MIB),
            "",
            "while they were open",
        ),
        (
            ("fast", "-t ext4 -O fast_commit", 64 * MIB),
            "",
            "holds fast commits",
        ),
        (
            ("async", "-t ext4", 32 * MIB),
            ",journal_async_commit,data=writeback",
            "asynchronous commits",
        ),
    ];
    for (variant, options, reason) in variants {
        let path = make(folder.path(), variant);
        used(&path, 5, true);
        let mounted = mounted(&path, options);
        let held = File::create(mounted.path().join("held")).unwrap();
        held.write_all_at(&[3; 100_000], 0).unwrap();
        tool("sync", &["-f"], &[mounted.path()]);
        if variant.0.starts_with("orphan") {
            fs::remove_file(mounted.path().join("held")).unwrap();
            tool("sync", &["-f"], &[mounted.path()]);
        }
        // The first commit is a whole one; these may be fast.
        for number in 0..4 {
            let mut file = File::create(mounted.path().join(format!("new{number}"))).unwrap();
            file.write_all(&[4; 10_000]).unwrap();
            file.sync_all().unwrap();
        }
        refused_for(&copied(&path), reason, variant.0);
    }
}

/// The same change, from one filesystem to another that differs from it, in journals with each kind
/// of checksum, as `debugfs` writes them.
#[test]
fn journals_by_debugfs() {
    if !can_test() || !can_mount() {
        return;
    }
    let variants = [
        (
            "none",
            "-t ext4 -O ^metadata_csum,^64bit -b 1024 -J size=16",
            "jo",
        ),
        ("wide", "-t ext4 -O ^metadata_csum -b 1024 -J size=16", "jo"),
        ("v2", "-t ext4 -O ^64bit -b 1024 -J size=16", "jo -c -v 2"),
        ("v2-wide", "-t ext4 -b 1024 -J size=16", "jo -c -v 2"),
        ("v3", "-t ext4 -O ^64bit -b 1024 -J size=16", "jo -c -v 3"),
        ("v3-wide", "-t ext4 -b 1024 -J size=16", "jo -c -v 3"),
    ];
    for (name, words, open) in variants {
        let folder = folder();
        let path = make(folder.path(), (name, words, 48 * MIB));
        used(&path, 11, true);
        let target = copied(&path);
        {
            let mounted = mounted(&target, "");
            fill(mounted.path(), 12, 4, |number| number != 1);
            fs::remove_dir_all(mounted.path().join("d6")).unwrap();
        }
        let (old, new) = (fs::read(&path).unwrap(), fs::read(&target).unwrap());
        let journal = tool("debugfs", &["-R", "blocks <8>"], &[&path]);
        let skipped: BTreeSet<usize> = journal
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        let changed: Vec<usize> = (0..old.len() / 1024)
            .filter(|block| !skipped.contains(block))
            .filter(|block| old[block * 1024..][..1024] != new[block * 1024..][..1024])
            .collect();
        // First what is there already, then, by another transaction, what is new; and at the end what
        // is wrong, never committed.
        let mut script = format!("{open}\n");
        for (step, file) in [("jw -b", "old"), ("jw -b", "new"), ("jw -c -b", "wrong")] {
            let chunks = if file == "wrong" { 1 } else { usize::MAX };
            for (number, blocks) in changed.chunks(50).take(chunks).enumerate() {
                let list: Vec<String> = blocks.iter().map(usize::to_string).collect();
                let data = folder.path().join(format!("{file}{number}"));
                let bytes: Vec<u8> = (blocks.iter())
                    .flat_map(|block| match file {
                        "old" => old[block * 1024..][..1024].to_vec(),
                        "new" => new[block * 1024..][..1024].to_vec(),
                        _ => vec![0xee; 1024],
                    })
                    .collect();
                fs::write(&data, bytes).unwrap();
                script += &format!("{step} {} {}\n", list.join(","), data.display());
            }
        }
        script += "jc\n";
        let commands = folder.path().join("script");
        fs::write(&commands, script).unwrap();
        let said = tool(
            "debugfs",
            &["-w", "-f", commands.to_str().unwrap()],
            &[&path],
        );
        assert!(
            !said.contains("while") && !said.contains("jc:"),
            "{name}: {said}"
        );

        agrees(name, &path);
        assert!(files(&path, true) == files(&target, true), "{name}");
    }
}
