//! The commands for single files: what they print and how they end.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[cfg(unix)]
#[path = "cli/compact.rs"]
mod compact;
#[path = "cli/directories.rs"]
mod directories;
#[cfg(unix)]
#[path = "cli/sparse.rs"]
mod sparse;
#[path = "cli/words.rs"]
mod words;

use std::fs;
use std::path::Path;

use common::{create, exit_code, json, run, stderr, vhdfs};
use serde_json::{Value, json};

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

#[test]
fn info_tells_what_a_file_is() {
    let root = tempfile::tempdir().unwrap();
    let (dynamic, fixed) = (root.path().join("d.vhd"), root.path().join("f.vhd"));
    create(&dynamic, &["--size", "10G"]);
    create(&fixed, &["--size", "8MiB", "--type", "fixed"]);
    let one = run([Path::new("info"), Path::new("--json"), &dynamic]);
    let info = json(&one);
    let expected = [
        "allocated_bytes",
        "block_size",
        "blocks_allocated",
        "blocks_total",
        "children",
        "children_unread",
        "creator",
        "file",
        "file_length",
        "format",
        "hole_bytes",
        "identity",
        "parents",
        "physical_sector_size",
        "sector_size",
        "sparse",
        "type",
        "virtual_size",
        "windows_refuses",
    ];
    assert_eq!(keys(&info), expected);
    assert_eq!(info["format"], "vhd");
    assert_eq!(info["type"], "dynamic");
    assert_eq!(info["virtual_size"], 10u64 << 30);
    assert_eq!(info["block_size"], 2 << 20);
    assert_eq!(info["blocks_allocated"], 0);
    assert_eq!(info["file_length"], fs::metadata(&dynamic).unwrap().len());

    let several = json(&run([
        Path::new("info"),
        Path::new("--json"),
        &dynamic,
        &fixed,
    ]));
    assert_eq!(several.as_array().unwrap().len(), 2);
    assert_eq!(several[1]["type"], "fixed");
    let text = run([Path::new("info"), &dynamic, &fixed]);
    assert!(
        String::from_utf8(text.stdout)
            .unwrap()
            .contains("dynamic vhd")
    );
}

#[test]
fn errors_go_to_stderr_and_into_the_json() {
    let root = tempfile::tempdir().unwrap();
    let (good, bad) = (root.path().join("good.vhd"), root.path().join("bad.vhd"));
    create(&good, &["--size", "8M"]);
    fs::write(&bad, [1; 2000]).unwrap();
    let output = run([Path::new("info"), Path::new("--json"), &good, &bad]);
    assert_eq!(exit_code(&output), 1);
    let report = json(&output);
    assert_eq!(report[0]["type"], "dynamic");
    assert_eq!(keys(&report[1]), ["error", "file"]);
    assert!(
        stderr(&output).starts_with("vhdfs: "),
        "{}",
        stderr(&output)
    );
    assert!(stderr(&output).contains("bad.vhd"), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1);
}

#[test]
fn usage_errors_are_told_apart() {
    for arguments in [
        &["frobnicate"][..],
        &[],
        &["info"],
        &["create", "x.vhd"],
        &["create", "--type", "differencing", "--size", "8M", "x.vhd"],
        &["create", "--size", "8M", "--sector-size", "1024", "x.vhdx"],
        &["create", "--size", "10X", "x.vhd"],
        &["compact", "--punch-holes", "maybe", "x.vhd"],
        &["compact", "--punch-holes", "on", "--unsparse", "x.vhd"],
        &["compact", "--min-reclaim", "101%", "x.vhd"],
        &["compact", "--min-reclaim", "1M", "--unsparse", "x.vhd"],
        &["map", "--json", "--ascii", "x.vhd"],
        &["mount", "a", "b", "-o", "frobnicate"],
        &["check", "--dry-run", "x.vhd"],
        &["check", "--backup", "x.vhd"],
        &["check", "--repair", "--backup", "--dry-run", "x.vhd"],
        &["check", "--restore", "b", "x.vhd", "y.vhd"],
        &["check", "--restore", "b", "--repair", "x.vhd"],
        &["create", "--size", "8M", "--format", "vhdx", "x.vhd"],
        &[
            "create", "--size", "8M", "--parent", "p.vhd", "--type", "fixed", "x.vhd",
        ],
        &["create", "--size", "1G", "--block-size", "512M", "x.vhdx"],
        &["create", "--size", "100T", "x.vhd"],
    ] {
        let output = run(arguments);
        assert_eq!(exit_code(&output), 2, "{arguments:?}: {}", stderr(&output));
    }
    assert_eq!(exit_code(&run(["--help"])), 0);
    assert_eq!(exit_code(&run(["--version"])), 0);
}

#[test]
fn create_does_not_overwrite() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    create(&path, &["--size", "8M", "--block-size", "512K"]);
    let before = fs::read(&path).unwrap();
    let again = vhdfs()
        .args(["create", "--size", "8M"])
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(exit_code(&again), 1);
    assert!(fs::read(&path).unwrap() == before);
    let wrong = root.path().join("wrong.vhd");
    let mut command = vhdfs();
    command.args(["create", "--size", "8M", "--block-size", "3M"]);
    let output = command.arg(&wrong).output().unwrap();
    assert_eq!(exit_code(&output), 2, "{}", stderr(&output));
    assert!(!wrong.exists());
}

/// A disk with `blocks` blocks of data, of which every other is zeros.
fn half_dead(path: &Path, blocks: u64) {
    use vhdfs::disk::{Disk, OpenOptions};
    create(path, &["--size", "256M"]);
    let disk = Disk::open(
        path,
        &OpenOptions {
            punch_holes: false,
            ..OpenOptions::default()
        },
    )
    .unwrap();
    for block in 0..blocks {
        disk.write_at(&vec![7; 2 << 20], block << 21).unwrap();
    }
    for block in (0..blocks).step_by(2) {
        // So that no block is dropped on the way: not all of it at once.
        disk.write_at(&vec![0; 1 << 20], block << 21).unwrap();
        disk.write_at(&vec![0; 1 << 20], (block << 21) + (1 << 20))
            .unwrap();
    }
    disk.close().unwrap();
}

#[test]
fn compact_does_what_it_predicts() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    half_dead(&path, 20);
    let file = path.to_str().unwrap();
    let before = fs::metadata(&path).unwrap();
    let predicted = json(&run(["compact", "--json", "--dry-run", file]));
    assert_eq!(
        fs::metadata(&path).unwrap().modified().unwrap(),
        before.modified().unwrap()
    );
    let output = run(["compact", "--json", file]);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    let done = json(&output);
    let expected = [
        "allocated_after",
        "allocated_before",
        "blocks_dropped",
        "blocks_moved",
        "bytes_read",
        "children",
        "file",
        "kept",
        "length_after",
        "length_before",
        "new_identity",
        "not_fs_aware",
        "partitions",
    ];
    assert_eq!(keys(&done), expected);
    assert_eq!(done["length_before"], before.len());
    assert_eq!(done["length_after"], fs::metadata(&path).unwrap().len());
    assert_eq!(done["length_after"], predicted["length_after"]);
    assert!(
        done["length_after"].as_u64().unwrap() < 11 * (2 << 20) + (1 << 20),
        "{done}"
    );
    for kept in done["kept"].as_array().unwrap() {
        assert_eq!(keys(kept), ["bytes", "reason"]);
    }
    let again = json(&run(["compact", "--json", file]));
    assert_eq!(again["blocks_dropped"], 0);
    assert_eq!(again["length_before"], again["length_after"]);
    common::assert_clean(&path);
    let text = String::from_utf8(run(["compact", file]).stdout).unwrap();
    assert!(text.contains("0 blocks dropped"), "{text}");
}

/// What cannot be done is not predicted.
#[test]
fn a_file_that_was_cut_is_not_compacted() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    half_dead(&path, 4);
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(7 << 20).unwrap();
    drop(file);
    let file = path.to_str().unwrap();
    let refused = |arguments: &[&str]| {
        let output = run(["compact"].iter().chain(arguments).chain(&[file]));
        assert_eq!(exit_code(&output), 1, "{output:?}");
        stderr(&output)
    };
    let error = refused(&[]);
    assert!(error.contains("the file was cut"), "{error}");
    assert_eq!(refused(&["--dry-run"]), error);
}

#[test]
fn nobody_has_to_listen() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    half_dead(&path, 4);
    // What is found is told by the exit code alone.
    for (file, code) in [(&path, 0), (&root.path().join("missing.vhd"), 1)] {
        let (out, (_, err)) = (std::io::pipe().unwrap().1, std::io::pipe().unwrap());
        let mut info = common::vhdfs();
        info.arg("info").arg(file).stdout(out).stderr(err);
        assert_eq!(info.status().unwrap().code(), Some(code));
    }
}

#[test]
fn a_fixed_disk_is_not_compacted() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("f.vhd");
    create(&path, &["--size", "8M", "--type", "fixed"]);
    let output = run([Path::new("compact"), &path]);
    assert_eq!(exit_code(&output), 1);
    assert!(stderr(&output).contains("fixed"), "{}", stderr(&output));
}

#[test]
fn check_finds_and_repairs() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    create(&path, &["--size", "64M"]);
    let file = path.to_str().unwrap();
    let clean = json(&run(["check", "--json", file]));
    assert_eq!(keys(&clean), ["errors", "file", "repaired", "warnings"]);
    assert_eq!(clean["errors"], json!([]));
    // The footer at the end gets lost.
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len - 512)
        .unwrap();
    let broken = run(["check", "--json", file]);
    assert_eq!(exit_code(&broken), 1, "{}", json(&broken));
    let repaired = run(["check", "--repair", "--json", file]);
    assert_eq!(exit_code(&repaired), 0, "{}", json(&repaired));
    assert_ne!(json(&repaired)["repaired"], json!([]));
    common::assert_clean(&path);
    let text = String::from_utf8(run(["check", file]).stdout).unwrap();
    assert!(text.ends_with("clean\n"), "{text}");
}

/// A raw file under the name of a VHD gets a footer; a file that was cut gets its length, with zeros, where
/// that is asked for; and each of them can be had back.
#[test]
fn check_brings_back_what_can_be() {
    let root = tempfile::tempdir().unwrap();
    let repair = |path: &Path, more: &[&str]| {
        let file = path.to_str().unwrap();
        run([&["check", "--repair"], more, &[file]].concat())
    };
    let restored = |path: &Path, before: &[u8]| {
        let backup = path.with_extension(format!("{}.backup", path.extension().unwrap().display()));
        let undone = run([Path::new("check"), Path::new("--restore"), &backup, path]);
        assert_eq!(exit_code(&undone), 0, "{}", stderr(&undone));
        assert!(fs::read(path).unwrap() == before, "not what it was");
    };
    let raw = root.path().join("raw.vhd");
    let bytes = vec![7; 1 << 20];
    fs::write(&raw, &bytes).unwrap();
    let info = run([Path::new("info"), &raw]);
    let text = stderr(&info);
    assert!(
        text.contains("raw data") && text.contains("check --repair"),
        "{text}"
    );
    assert_eq!(exit_code(&repair(&raw, &["--dry-run"])), 0);
    assert!(fs::read(&raw).unwrap() == bytes, "a dry run wrote");
    assert_eq!(exit_code(&repair(&raw, &["--backup"])), 0);
    assert_eq!(fs::metadata(&raw).unwrap().len(), (1 << 20) + 512);
    common::assert_clean(&raw);
    restored(&raw, &bytes);

    for name in ["cut.vhd", "cut.vhdx"] {
        let path = root.path().join(name);
        half_dead(&path, 4);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - (3 << 20))
            .unwrap();
        drop(file);
        let before = fs::read(&path).unwrap();
        let refused = repair(&path, &["--backup"]);
        assert_eq!(exit_code(&refused), 1, "{name}");
        let text = String::from_utf8(refused.stdout).unwrap();
        assert!(
            text.contains("read-only") && text.contains("--zero-lost"),
            "{text}"
        );
        assert!(fs::read(&path).unwrap() == before, "{name}: changed");
        let done = repair(&path, &["--backup", "--zero-lost"]);
        assert_eq!(exit_code(&done), 0, "{}", stderr(&done));
        common::assert_clean(&path);
        restored(&path, &before);
    }
}

/// A disk whose footer has no copy, and its bytes.
fn to_repair(root: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let path = root.join("a.vhd");
    create(&path, &["--size", "64M"]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[..512].fill(0);
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[test]
fn a_repair_can_be_tried_saved_and_undone() {
    let root = tempfile::tempdir().unwrap();
    let (path, before) = to_repair(root.path());
    let file = path.to_str().unwrap();
    let tried = run(["check", "--repair", "--dry-run", file]);
    assert_eq!(exit_code(&tried), 0, "{}", stderr(&tried));
    let text = String::from_utf8(tried.stdout).unwrap();
    assert!(
        text.contains("would repair: the copy at the start"),
        "{text}"
    );
    assert!(fs::read(&path).unwrap() == before, "a dry run wrote");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);

    // A name that is taken is left alone, whatever has it.
    let backup = root.path().join("a.vhd.backup2");
    fs::write(root.path().join("a.vhd.backup"), "mine").unwrap();
    let saved = json(&run(["check", "--repair", "--backup", "--json", file]));
    assert_eq!(saved["backup"], backup.to_str().unwrap());
    assert_ne!(saved["repaired"], json!([]));
    common::assert_clean(&path);
    assert_eq!(fs::read(root.path().join("a.vhd.backup")).unwrap(), b"mine");

    let undo = |backup: &Path| run([Path::new("check"), Path::new("--restore"), backup, &path]);
    let undone = undo(&backup);
    assert_eq!(exit_code(&undone), 0, "{}", stderr(&undone));
    assert!(fs::read(&path).unwrap() == before, "not what it was");
    assert_eq!(exit_code(&undo(&backup)), 0, "once more does no harm");
    let refused = undo(&root.path().join("a.vhd.backup"));
    assert_eq!(exit_code(&refused), 1);
    assert!(
        stderr(&refused).contains("not a usable backup"),
        "{}",
        stderr(&refused)
    );

    // Nothing to do, nothing to save.
    run(["check", "--repair", file]);
    let clean = json(&run(["check", "--repair", "--backup", "--json", file]));
    assert_eq!(keys(&clean), ["errors", "file", "repaired", "warnings"]);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
}

#[cfg(target_os = "linux")]
#[test]
fn without_room_for_a_backup_nothing_is_repaired() {
    let Some(root) = common::Tmpfs::new("256k") else {
        return;
    };
    let (path, before) = to_repair(root.path());
    let _ = fs::write(root.path().join("filler"), vec![1; 1 << 20]);
    let output = run([
        Path::new("check"),
        Path::new("--repair"),
        Path::new("--backup"),
        &path,
    ]);
    let (after, left) = (
        fs::read(&path).unwrap(),
        fs::read_dir(root.path()).unwrap().count(),
    );
    assert_eq!(exit_code(&output), 1);
    assert!(
        stderr(&output).contains("cannot save"),
        "{}",
        stderr(&output)
    );
    assert!(after == before);
    assert_eq!(left, 2, "half a backup is left");
}

#[test]
fn map_draws_the_file() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    half_dead(&path, 8);
    let output = run(["map", "--ascii", path.to_str().unwrap()]);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains('#') || text.contains('?'), "{text}");
    assert!(
        text.contains("metadata") && text.contains("one character"),
        "{text}"
    );
}

#[test]
fn map_lists_the_file() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    half_dead(&path, 8);
    let map = json(&run(["map", "--json", path.to_str().unwrap()]));
    let expected = [
        "blocks_beyond_end",
        "bytes_beyond_end",
        "file",
        "file_length",
        "regions",
    ];
    assert_eq!(keys(&map), expected);
    let (mut end, mut of_kind) = (0, std::collections::BTreeMap::new());
    for region in map["regions"].as_array().unwrap() {
        assert_eq!(keys(region), ["kind", "len", "start"]);
        assert_eq!(region["start"], end);
        let len = region["len"].as_u64().unwrap();
        end += len;
        *of_kind.entry(region["kind"].as_str().unwrap()).or_insert(0) += len;
    }
    assert_eq!(map["file_length"], end);
    assert_eq!(end, fs::metadata(&path).unwrap().len());
    let kinds: Vec<_> = of_kind.keys().copied().collect();
    assert!(
        ["dead", "live", "metadata"]
            .iter()
            .all(|kind| kinds.contains(kind)),
        "{kinds:?}"
    );
    assert_eq!(of_kind["dead"], 4 * ((2 << 20) + 512));
}

/// What a file has lost is drawn, and counted.
#[test]
fn map_shows_what_lies_beyond_the_end() {
    let root = tempfile::tempdir().unwrap();
    // With what a VHD has before each block, a sector and a gap, and its footer.
    for (name, before_block, footer) in [("a.vhd", 4096, 512), ("a.vhdx", 0, 0)] {
        let path = root.path().join(name);
        half_dead(&path, 8);
        let before = fs::metadata(&path).unwrap().len();
        let map = || json(&run(["map", "--no-scan", "--json", path.to_str().unwrap()]));
        assert_eq!(map()["bytes_beyond_end"], 0);
        let whole = run(["map", "--ascii", path.to_str().unwrap()]);
        assert!(!String::from_utf8(whole.stdout).unwrap().contains('!'));
        // In the middle of the data of the third block from the end.
        let cut = before - footer - 2 * ((2 << 20) + before_block) - (1 << 20);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(cut).unwrap();
        drop(file);
        let cut_map = map();
        assert_eq!(cut_map["blocks_beyond_end"], 3, "{name}");
        assert_eq!(cut_map["bytes_beyond_end"], 5 << 20, "{name}");
        let last = cut_map["regions"].as_array().unwrap().last().unwrap();
        let end = last["start"].as_u64().unwrap() + last["len"].as_u64().unwrap();
        assert_eq!(end, cut, "{name}");
        let text = run(["map", "--no-scan", "--ascii", path.to_str().unwrap()]);
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(
            text.contains("the file was cut") && text.contains("!!!!"),
            "{text}"
        );
        assert!(text.contains("5.0 MiB of 3 blocks"), "{text}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_is_safe() {
    use rustix::process::{Pid, Signal, kill_process};
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    half_dead(&path, 100);
    let mut command = vhdfs();
    command
        .arg("compact")
        .arg(&path)
        .stdout(std::process::Stdio::null());
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    // It may have been quicker.
    let _ = kill_process(pid, Signal::INT);
    let code = child.wait().unwrap().code();
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
    common::assert_clean(&path);
    let output = run([Path::new("compact"), &path]);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
}
