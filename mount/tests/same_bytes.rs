//! `vhdfs compact` makes the same file of a file on Windows as here, byte for byte.
//!
//! `VHDFS_OTHER` is the command that runs the other build, arguments included; `scripts/test-windows` sets it. What may
//! differ is masked: in a VHDX the three GUIDs of each header, the log's GUID in the entries of the log, which are random,
//! and the checksums over them. In a VHD nothing may: compaction changes neither its time stamp nor its identity.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use common::{create, exit_code, has, json, stderr, vhdfs};
use serde_json::Value;
use vhdfs::disk::{Disk, HostParents, OpenOptions};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const PIECE: usize = 64 << 10;

/// Bytes without a pattern, always the same.
fn noise(len: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..len / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

fn tool(program: &str, arguments: &[&str], file: &Path) {
    let output = (Command::new(program).args(arguments).arg(file).output()).unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

fn open(path: &Path) -> Arc<Disk> {
    let options = OpenOptions {
        punch_holes: false,
        ..OpenOptions::default()
    };
    Disk::open_with(path, &options, &HostParents::beside(path, &[])).unwrap()
}

/// Writes what is not zero of a raw disk.
fn fill(path: &Path, raw: &Path) {
    let (disk, raw) = (open(path), File::open(raw).unwrap());
    let mut piece = vec![0; PIECE];
    for offset in (0..SIZE).step_by(PIECE) {
        raw.read_exact_at(&mut piece, offset).unwrap();
        if piece.iter().any(|byte| *byte != 0) {
            disk.write_at(&piece, offset).unwrap();
        }
    }
    disk.close().unwrap();
}

/// A raw disk with ext4, half of whose content was deleted.
fn ext4(place: &Path) -> PathBuf {
    let (files, raw) = (place.join("files"), place.join("ext4"));
    fs::create_dir(&files).unwrap();
    fs::write(files.join("goes"), noise(12 * MIB)).unwrap();
    fs::write(files.join("stays"), noise(8 * MIB)).unwrap();
    File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let files = files.to_str().unwrap();
    tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", files], &raw);
    tool("debugfs", &["-w", "-R", "rm goes"], &raw);
    raw
}

/// A raw disk with NTFS, whose free space is full of what was there before.
fn ntfs(place: &Path) -> PathBuf {
    let raw = place.join("ntfs");
    fs::write(&raw, noise(SIZE)).unwrap();
    tool("mkntfs", &["-q", "-F", "-Q"], &raw);
    raw
}

/// Blocks of data, and between them such as became zero piece by piece, so that they are still there.
fn half_dead(path: &Path) {
    let disk = open(path);
    for block in 0..12 {
        disk.write_at(&noise(2 * MIB), block * 4 * MIB).unwrap();
        let zeros = vec![0; PIECE];
        for at in (0..2 * MIB).step_by(PIECE).filter(|_| block % 2 == 0) {
            disk.write_at(&zeros, block * 4 * MIB + at).unwrap();
        }
    }
    disk.close().unwrap();
}

/// Makes every disk; the names of all.
fn make(place: &Path, disks: &Path) -> Vec<&'static str> {
    let at = |name: &str| disks.join(name);
    let raws = [ext4(place), ntfs(place)];
    for (name, raw) in [
        ("ext4.vhdx", &raws[0]),
        ("ext4.vhd", &raws[0]),
        // Of what others are over, free space stays.
        ("base.vhdx", &raws[0]),
        ("base.vhd", &raws[0]),
        ("ntfs.vhdx", &raws[1]),
        ("ntfs.vhd", &raws[1]),
    ] {
        create(&at(name), &["--size", "64M", "--block-size", "2M"]);
        fill(&at(name), raw);
    }
    for name in ["zeros.vhdx", "zeros.vhd"] {
        create(&at(name), &["--size", "64M", "--block-size", "1M"]);
        half_dead(&at(name));
    }
    for (child, parent) in [("child.avhdx", "base.vhdx"), ("child.avhd", "base.vhd")] {
        create(&at(child), &["--parent", at(parent).to_str().unwrap()]);
        // Among the parent's bytes and where it has none; some of it the same as there.
        fill(&at(child), &raws[0]);
        half_dead(&at(child));
    }
    // Its log is full of what QEMU had there.
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "vhdx"]);
    convert.args(["-o", "subformat=dynamic,block_size=2M"]);
    assert!(
        convert
            .arg(&raws[1])
            .arg(at("qemu.vhdx"))
            .status()
            .unwrap()
            .success()
    );
    // Stored whole, as it would be there: how many moves one entry of the log has depends on whether they
    // take new space of the host.
    let bytes = fs::read(at("qemu.vhdx")).unwrap();
    fs::write(at("qemu.vhdx"), bytes).unwrap();
    vec![
        "qemu.vhdx",
        "zeros.vhdx",
        "zeros.vhd",
        "child.avhdx",
        "child.avhd",
        "base.vhdx",
        "base.vhd",
        "ext4.vhdx",
        "ext4.vhd",
        "ntfs.vhdx",
        "ntfs.vhd",
    ]
}

/// A path of this system for the other build, which runs under Wine if it is a program for Windows.
fn for_other(path: &Path, other: &str) -> String {
    let path = path.to_str().unwrap();
    match other.ends_with(".exe") {
        true => format!("Z:{}", path.replace('/', "\\")),
        false => path.to_owned(),
    }
}

/// A number as it is in the file, with its lowest byte first.
fn number(bytes: &[u8]) -> usize {
    let highest_first = bytes.iter().rev();
    highest_first.fold(0, |sum, byte| sum << 8 | usize::from(*byte))
}

/// What is random in a VHDX.
fn random_parts(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    for header in [64 << 10, 128 << 10] {
        // Checksum; the GUIDs of the file's and the data's last write, and of the log.
        parts.extend([header + 4..header + 8, header + 16..header + 64]);
    }
    let header = &bytes[64 << 10..];
    let (len, start) = (number(&header[68..72]), number(&header[72..80]));
    for entry in (start..start + len).step_by(4096) {
        if bytes[entry..].starts_with(b"loge") {
            parts.extend([entry + 4..entry + 8, entry + 32..entry + 48]);
        }
    }
    parts
}

/// The file with its random parts as zeros.
fn masked(path: &Path) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    if bytes.starts_with(b"vhdxfile") {
        for part in random_parts(&bytes) {
            bytes[part].fill(0);
        }
    }
    bytes
}

/// A report without what names the file or depends on how the host stores it.
fn report(output: &Output) -> Value {
    assert_eq!(exit_code(output), 0, "{}", stderr(output));
    let mut report = json(output);
    let object = report.as_object_mut().unwrap();
    for key in [
        "file",
        "allocated_before",
        "allocated_after",
        "bytes_read",
        "children",
    ] {
        object.remove(key);
    }
    report
}

#[test]
fn compaction_makes_the_same_file_on_windows() {
    let Ok(other) = std::env::var("VHDFS_OTHER") else {
        println!("skipped: VHDFS_OTHER is not set; scripts/test-windows runs this");
        return;
    };
    if !["mke2fs", "debugfs", "mkntfs", "qemu-img"]
        .into_iter()
        .all(has)
    {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let (here, there) = (place.path().join("here"), place.path().join("there"));
    fs::create_dir(&here).unwrap();
    fs::create_dir(&there).unwrap();
    let names = make(place.path(), &here);
    for name in &names {
        fs::copy(here.join(name), there.join(name)).unwrap();
    }
    for name in names {
        let before = fs::metadata(here.join(name)).unwrap().len();
        let arguments = ["compact", "--json", "--punch-holes=off", "--no-children"];
        let one = (vhdfs().args(arguments).arg(here.join(name)).output()).unwrap();
        let mut words = other.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(arguments);
        let two = command
            .arg(for_other(&there.join(name), &other))
            .output()
            .unwrap();
        let (one, two) = (report(&one), report(&two));
        assert_eq!(one, two, "{name}");
        let (one, two) = (masked(&here.join(name)), masked(&there.join(name)));
        assert_eq!(one.len(), two.len(), "{name}");
        let differs = one.iter().zip(&two).position(|(one, two)| one != two);
        assert_eq!(differs, None, "{name}: the first byte that differs");
        let after = u64::try_from(one.len()).unwrap();
        assert!(
            after < before || name.starts_with("base"),
            "{name}: nothing was compacted"
        );
        println!("{name}: {before} -> {after} bytes, the same on both");
    }
}
