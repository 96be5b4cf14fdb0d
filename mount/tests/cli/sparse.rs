//! Holes of disk files: what `info` says of them, and `compact --unsparse`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::storage::Storage;
use vhdfs::storage::holes::hole_bytes;
use vhdfs::storage::host::{HostFile, HostOptions};
use vhdfs::units::{FileOffset, FileRange};

use super::common::{Tmpfs, assert_clean, create, exit_code, json, run, stderr, stored};

const MIB: u64 = 1 << 20;

fn host_file(path: &Path, read_only: bool) -> HostFile {
    let options = HostOptions {
        read_only,
        lock: false,
        no_follow: false,
    };
    HostFile::open(path, &options).unwrap()
}

fn holes(path: &Path) -> u64 {
    hole_bytes(&host_file(path, true)).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A disk of 16 MiB with 5 MiB of data, two of which are zeros inside blocks, and with holes.
fn with_holes(path: &Path, kind: &[&str]) {
    create(path, &[&["--size", "16M"], kind].concat());
    let disk = Disk::open(path, &OpenOptions::default()).unwrap();
    disk.write_at(&vec![7; 5 << 20], 3 * 512).unwrap();
    disk.discard(MIB, MIB).unwrap();
    disk.discard(3 * MIB, MIB).unwrap();
    disk.close().unwrap();
}

fn content(path: &Path) -> Vec<u8> {
    let look = OpenOptions {
        read_only: true,
        lock: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open(path, &look).unwrap();
    let mut bytes = vec![0; usize::try_from(disk.len()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn info(path: &Path) -> Value {
    json(&run(["info", "--json", text(path)]))
}

#[test]
fn holes_are_told_and_filled() {
    let root = tempfile::tempdir().unwrap();
    for (name, kind) in [
        ("a.vhd", &[][..]),
        ("a.vhdx", &[]),
        ("f.vhd", &["--type", "fixed"]),
        ("f.vhdx", &["--type", "fixed"]),
    ] {
        let path = root.path().join(name);
        with_holes(&path, kind);
        let (before, bytes) = (content(&path), fs::read(&path).unwrap());
        let found = info(&path);
        assert_eq!(found["sparse"], true, "{name}");
        assert_eq!(found["hole_bytes"], holes(&path), "{name}");
        let refused = found["windows_refuses"][0].as_str().unwrap();
        assert!(
            refused.contains("the file") && refused.contains("--unsparse"),
            "{refused}"
        );

        let said = json(&run([
            "compact",
            "--unsparse",
            "--dry-run",
            "--json",
            text(&path),
        ]));
        assert!(fs::read(&path).unwrap() == bytes, "{name}: a dry run wrote");
        assert_eq!(info(&path)["hole_bytes"], found["hole_bytes"], "{name}");
        let output = run(["compact", "--unsparse", "--json", text(&path)]);
        assert_eq!(exit_code(&output), 0, "{name}: {}", stderr(&output));
        let done = json(&output);
        let number = |report: &Value, key: &str| report[key].as_u64().unwrap();
        let length = fs::metadata(&path).unwrap().len();
        assert_eq!(holes(&path), 0, "{name}");
        assert!(stored(&path) >= length, "{name}");
        assert_eq!(done["allocated_after"], stored(&path), "{name}");
        for report in [&said, &done] {
            assert_eq!(report["length_after"], length, "{name}: {report}");
            assert!(
                number(report, "allocated_after").abs_diff(stored(&path)) < 64 << 10,
                "{report}"
            );
        }
        let (said, done) = (number(&said, "holes_filled"), number(&done, "holes_filled"));
        assert!(
            said.abs_diff(done) < 64 << 10,
            "{name}: {said} said, {done} done"
        );
        assert!(content(&path) == before, "{name}: content");
        assert_clean(&path);

        let dense = info(&path);
        assert_eq!(
            (&dense["sparse"], &dense["hole_bytes"]),
            (&json!(false), &json!(0))
        );
        assert_eq!(dense["windows_refuses"], json!([]), "{name}");
        let words = String::from_utf8(run(["info", text(&path)]).stdout).unwrap();
        assert!(words.contains("Windows         attaches it"), "{words}");
        // Once more there is nothing to do.
        let again = json(&run(["compact", "--unsparse", "--json", text(&path)]));
        assert_eq!(again["holes_filled"], 0, "{name}");
    }
}

#[test]
fn a_chain_is_as_sparse_as_its_parents() {
    let root = tempfile::tempdir().unwrap();
    let (base, child) = (
        root.path().join("base.vhdx"),
        root.path().join("child.vhdx"),
    );
    with_holes(&base, &[]);
    create(&child, &["--parent", text(&base)]);
    let refused = |path: &Path| info(path)["windows_refuses"].as_array().unwrap().len();
    assert_eq!((refused(&base), refused(&child)), (1, 2));
    let before = content(&child);
    for file in [&base, &child] {
        let output = run(["compact", "--unsparse", text(file)]);
        assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    }
    assert_eq!((refused(&base), refused(&child)), (0, 0));
    assert!(content(&child) == before);
    // Without its parent it is of no use there.
    fs::remove_file(&base).unwrap();
    let alone = info(&child)["windows_refuses"].to_string();
    assert!(alone.contains("without its parent"), "{alone}");
}

#[test]
fn what_others_have_open_is_not_filled() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("f.vhd");
    with_holes(&path, &["--type", "fixed"]);
    let (bytes, before) = (fs::read(&path).unwrap(), holes(&path));
    let held = Disk::open(&path, &OpenOptions::default()).unwrap();
    let output = run(["compact", "--unsparse", text(&path)]);
    assert_eq!(exit_code(&output), 1);
    assert!(stderr(&output).contains("in use"), "{}", stderr(&output));
    // In a directory, that is how it is.
    let output = run(["compact", "--unsparse", "--json", text(root.path())]);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    let left = json(&output)[0]["left_alone"].to_string();
    assert!(left.contains("in use"), "{left}");
    assert_eq!(holes(&path), before);
    drop(held);
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn without_room_nothing_is_filled() {
    let Some(root) = Tmpfs::new("12m") else {
        return;
    };
    let path = root.path().join("f.vhd");
    with_holes(&path, &["--type", "fixed"]);
    let before = holes(&path);
    let outputs = [&["--dry-run"][..], &[]].map(|more| {
        let words = ["compact", "--unsparse", text(&path)];
        run(words.iter().chain(more))
    });
    let after = holes(&path);
    for output in outputs {
        assert_eq!(exit_code(&output), 1);
        let error = stderr(&output);
        assert!(
            error.contains("its holes are not filled: that takes"),
            "{error}"
        );
    }
    assert_eq!(after, before);
}

/// The tools that keep holes look for them as we do, and find none.
#[test]
fn copies_of_a_filled_file_have_no_holes() {
    let root = tempfile::tempdir().unwrap();
    let (path, copy) = (root.path().join("a.vhdx"), root.path().join("copy.vhdx"));
    with_holes(&path, &[]);
    // Allocated and never written: `cp` may leave that out.
    let file = host_file(&path, false);
    file.write_zeroes(FileRange::new(FileOffset::new(3 << 20), 256 << 10))
        .unwrap();
    drop(file);
    run(["compact", "--unsparse", text(&path)]);
    let words = ["--sparse=auto", "--reflink=never", text(&path), text(&copy)];
    let copied = std::process::Command::new("cp").args(words).status();
    assert!(copied.unwrap().success());
    assert_eq!(holes(&copy), 0);
}
