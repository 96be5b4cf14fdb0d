//! Directories instead of files: `compact`, `info` and `check`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhdfs::disk::{Disk, OpenOptions};

use super::common::{assert_clean, create, exit_code, json, run, stderr};

struct Sample {
    root: TempDir,
}

impl Sample {
    /// Disks that can be compacted, `a.vhd` and `sub/d.VHDX`, and others.
    fn new() -> Self {
        let sample = Self {
            root: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(sample.at("sub/empty")).unwrap();
        for name in ["a.vhd", "b.vhdx", "sub/d.VHDX"] {
            sample.dirty(name);
        }
        create(&sample.at("f.vhd"), &["--size", "4M", "--type", "fixed"]);
        let base = sample.at("b.vhdx");
        create(
            &sample.at("sub/c.vhdx"),
            &["--parent", base.to_str().unwrap()],
        );
        fs::write(sample.at("a.vhd.raw"), "no disk").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("a.vhd", sample.at("link.vhd")).unwrap();
        sample
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A disk with a block of data behind one of zeros.
    fn dirty(&self, name: &str) {
        let format = if name.ends_with("vhd") { "vhd" } else { "vhdx" };
        create(&self.at(name), &["--size", "64M", "--format", format]);
        let options = OpenOptions {
            punch_holes: false,
            ..OpenOptions::default()
        };
        let disk = Disk::open(&self.at(name), &options).unwrap();
        disk.write_at(&vec![7; 4 << 20], 0).unwrap();
        // So that the block is not dropped on the way: not all of it at once.
        for half in [0, 1 << 20] {
            disk.write_at(&vec![0; 1 << 20], half).unwrap();
        }
        disk.close().unwrap();
    }

    /// Runs a command for the directory: its exit code and JSON.
    fn run(&self, words: &[&str]) -> (i32, Value) {
        let directory = self.root.path().to_str().unwrap();
        let output = run(words.iter().chain(&["--json", directory]));
        println!("{}", stderr(&output));
        (exit_code(&output), json(&output))
    }

    /// The entries of a report: the name below the directory, and what became of it.
    fn entries(&self, report: &Value) -> Vec<(String, String)> {
        let entry = |entry: &Value| {
            let file = Path::new(entry["file"].as_str().unwrap());
            let file = file.strip_prefix(self.root.path()).unwrap();
            let left = entry["left_alone"].as_str().or(entry["error"].as_str());
            let name = file.to_str().unwrap().replace('\\', "/");
            (name, left.unwrap_or("done").to_owned())
        };
        report.as_array().unwrap().iter().map(entry).collect()
    }
}

fn has(entries: &[(String, String)], expected: &[(&str, &str)]) {
    assert_eq!(entries.len(), expected.len(), "{entries:?}");
    for ((name, what), (file, part)) in entries.iter().zip(expected) {
        assert!(
            name == file && what.contains(part),
            "{name}: {what}; {file}: {part}"
        );
    }
}

#[test]
fn a_directory_is_compacted() {
    let sample = Sample::new();
    let before = fs::read(sample.at("b.vhdx")).unwrap();
    let here = [
        ("a.vhd", "done"),
        ("b.vhdx", "parent of 1 child"),
        ("f.vhd", "fixed"),
    ];
    let below = [("sub/c.vhdx", "done"), ("sub/d.VHDX", "done")];
    let all = [&here[..], &below].concat();

    let (code, said) = sample.run(&["compact", "--recursive", "--dry-run"]);
    assert_eq!(code, 0);
    has(&sample.entries(&said), &all);
    let (code, done) = sample.run(&["compact"]);
    assert_eq!(code, 0);
    has(&sample.entries(&done), &here);
    let untouched = fs::metadata(sample.at("sub/d.VHDX")).unwrap().len();
    assert_eq!(untouched, said[4]["length_before"]);
    let (code, done) = sample.run(&["compact", "-r"]);
    assert_eq!(code, 0);
    has(&sample.entries(&done), &all);
    for (index, name) in [(0, "a.vhd"), (4, "sub/d.VHDX")] {
        assert_eq!(
            fs::metadata(sample.at(name)).unwrap().len(),
            said[index]["length_after"]
        );
        let shorter = said[index]["length_before"].as_u64() > said[index]["length_after"].as_u64();
        assert!(shorter, "{said}");
        assert_clean(&sample.at(name));
    }
    assert!(
        fs::read(sample.at("b.vhdx")).unwrap() == before,
        "the parent"
    );

    let directory = sample.root.path().to_str().unwrap();
    let text = String::from_utf8(run(["compact", "-r", directory]).stdout).unwrap();
    let last = text.lines().last().unwrap();
    assert!(
        last.starts_with("in all: 3 compacted, 2 left alone, 0 failed; "),
        "{text}"
    );
    // Named itself, it is compacted.
    let parent = sample.at("b.vhdx");
    let output = run(["compact", parent.to_str().unwrap()]);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    assert!(fs::read(&parent).unwrap().len() < before.len());
}

#[test]
fn one_bad_disk_fails_the_run_and_keeps_none_from_it() {
    let sample = Sample::new();
    fs::write(sample.at("0.vhd"), [1; 4096]).unwrap();
    let held = Disk::open(&sample.at("a.vhd"), &OpenOptions::default()).unwrap();
    let (code, done) = sample.run(&["compact", "-r"]);
    drop(held);
    assert_eq!(code, 1);
    let entries = sample.entries(&done);
    has(
        &entries[..3],
        &[
            ("0.vhd", "not a VHD"),
            ("a.vhd", "in use"),
            ("b.vhdx", "parent"),
        ],
    );
    assert_eq!(keys(&done[0]), ["error", "file"]);
    assert_eq!(keys(&done[1]), ["file", "left_alone"]);
    assert_eq!(entries[5], ("sub/d.VHDX".to_owned(), "done".to_owned()));
}

fn keys(value: &Value) -> Vec<&String> {
    value.as_object().unwrap().keys().collect()
}

#[test]
fn what_gives_back_little_is_left_alone() {
    let sample = Sample::new();
    let state = |name: &str| {
        let found = fs::metadata(sample.at(name)).unwrap();
        (
            fs::read(sample.at(name)).unwrap(),
            found.modified().unwrap(),
        )
    };
    let before = ["a.vhd", "sub/c.vhdx", "sub/d.VHDX"].map(state);
    for wanted in ["3M", "60%"] {
        for more in [&["--dry-run"][..], &[]] {
            let words = [&["compact", "-r", "--min-reclaim", wanted], more].concat();
            let (code, done) = sample.run(&words);
            assert_eq!(code, 0);
            for index in [0, 4] {
                let left = done[index]["left_alone"].as_str().unwrap();
                assert!(left.contains("2.0 MiB to be had, less than"), "{left}");
            }
        }
    }
    assert!(
        ["a.vhd", "sub/c.vhdx", "sub/d.VHDX"].map(state) == before,
        "left alone"
    );
    let (_, done) = sample.run(&["compact", "-r", "--min-reclaim", "2M"]);
    assert_eq!(done[0]["blocks_dropped"], 1);
    assert!(done[3]["left_alone"].is_string(), "{done}");
    assert_eq!(done[4]["blocks_dropped"], 1);
}

#[test]
fn a_directory_is_made_ready_for_windows() {
    let sample = Sample::new();
    let (code, done) = sample.run(&["compact", "-r", "--unsparse"]);
    assert_eq!(code, 0);
    // The parent and the fixed disk, too, which are not compacted.
    assert!(
        sample.entries(&done).iter().all(|(_, what)| what == "done"),
        "{done}"
    );
    assert_eq!(done[1]["length_before"], done[1]["length_after"]);
    let (code, found) = sample.run(&["info", "-r"]);
    assert_eq!(code, 0);
    let refused = found
        .as_array()
        .unwrap()
        .iter()
        .map(|info| &info["windows_refuses"]);
    let refused: Vec<_> = refused.collect();
    assert!(
        refused.len() == 5 && refused.iter().all(|why| **why == json!([])),
        "{refused:?}"
    );
    let (code, checked) = sample.run(&["check", "-r"]);
    assert_eq!(code, 0);
    has(
        &sample.entries(&checked),
        &["a.vhd", "b.vhdx", "f.vhd", "sub/c.vhdx", "sub/d.VHDX"].map(|name| (name, "done")),
    );
}

#[test]
fn no_disks_are_no_failure() {
    let sample = Sample::new();
    let empty = sample.at("sub/empty");
    for command in ["compact", "info", "check"] {
        let output = run([command, empty.to_str().unwrap()]);
        assert_eq!(exit_code(&output), 0);
        assert!(
            stderr(&output).contains("no disk files"),
            "{}",
            stderr(&output)
        );
        let output = run([command, "--json", empty.to_str().unwrap()]);
        assert_eq!(json(&output), json!([]));
    }
}

/// Nor what cannot be written to, for whatever reason.
#[cfg(unix)]
#[test]
fn what_may_not_be_changed_is_left_alone() {
    use std::os::unix::fs::PermissionsExt;

    use super::common::{NOBODY, as_user};
    let sample = Sample::new();
    let mode = |name: &str, mode| {
        fs::set_permissions(sample.at(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    for (name, bits) in [
        ("", 0o755),
        ("sub", 0o755),
        ("a.vhd", 0o444),
        ("b.vhdx", 0o444),
    ] {
        mode(name, bits);
    }
    mode("f.vhd", 0o444);
    let found = as_user(NOBODY, || sample.run(&["compact"]));
    let Some((code, done)) = found else { return };
    assert_eq!(code, 0);
    has(
        &sample.entries(&done),
        &["a.vhd", "b.vhdx", "f.vhd"].map(|name| (name, "cannot open the file")),
    );
    // A directory that nobody may read is one that may hold anything.
    mode("sub", 0);
    let (code, done) = as_user(NOBODY, || sample.run(&["compact", "-r"])).unwrap();
    mode("sub", 0o755);
    assert_eq!(code, 1);
    let entries = sample.entries(&done);
    assert_eq!(entries[3].0, "sub");
    assert_eq!(keys(&done[3]), ["error", "file"]);
}
