//! Programs that know nothing of image locks: what they have open is left alone, and what they want to open
//! they get.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use common::{
    Mount, NOBODY, assert_clean, create, errno, eventually, exit_code, run, stderr, vhdfs,
};
use rustix::io::Errno;
use vhdfs::disk::{Disk, OpenOptions};

const FORMATS: [&str; 2] = ["vhd", "vhdx"];
const MIB: u64 = 1 << 20;

/// A disk of which every second block is to go: what is left has to move.
fn make_fat(path: &Path, mib: u64) {
    create(path, &["--size", "1G", "--block-size", "2M"]);
    let options = OpenOptions {
        punch_holes: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open(path, &options).unwrap();
    for block in 0..mib / 2 {
        let fill = u8::try_from(block % 2 * (1 + block % 250)).unwrap();
        // Something first: a block of zeros takes no space.
        disk.write_at(&[1], block * 2 * MIB).unwrap();
        disk.write_at(&vec![fill; 2 << 20], block * 2 * MIB)
            .unwrap();
    }
    disk.close().unwrap();
}

/// Whether the file system of the tests has leases.
fn has_leases() -> bool {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let file = vhdfs::storage::host::HostFile::create_new(&path).unwrap();
    let has = file.take_lease().unwrap() == vhdfs::storage::host::Hold::Alone;
    if !has {
        println!("skipped: no leases in the temporary directory");
    }
    has
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// Changes with every change of the file.
fn look(path: &Path) -> (u64, SystemTime, u64) {
    let found = fs::metadata(path).unwrap();
    (found.len(), found.modified().unwrap(), found.blocks())
}

fn writer(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn what_another_program_has_open_for_writing_is_left_alone() {
    if !has_leases() {
        return;
    }
    let names = FORMATS.map(|format| format!("a.{format}"));
    let mut held = Vec::new();
    let options = ["--idle-after", "0s", "--min-reclaim", "1M"];
    let Some(mount) = Mount::new(&options, |source| {
        for name in &names {
            make_fat(&source.join(name), 32);
            held.push(writer(&source.join(name)));
        }
    }) else {
        return;
    };
    let before = names
        .each_ref()
        .map(|name| fs::read(mount.behind(name)).unwrap());
    let own = format!("process {}, lockless", std::process::id());
    eventually("both are named", || {
        names.iter().all(|name| {
            let log = mount.log();
            log.lines().any(|line| {
                line.contains(name.as_str()) && line.contains("left alone") && line.contains(&own)
            })
        })
    });
    for (name, before) in names.iter().zip(&before) {
        let path = mount.behind(name);
        let text = path.to_str().unwrap();
        for arguments in [&["compact", text][..], &["check", "--repair", text]] {
            // The daemon, which tries again and again, has it locked for a moment.
            eventually("who has it open is named", || {
                let output = run(arguments);
                assert_eq!(exit_code(&output), 1, "{arguments:?}");
                let error = stderr(&output);
                error.contains(&own) && error.contains("for writing")
            });
        }
        // A guest may look, also longer, and not write.
        let shown = mount.at(&format!("{name}.raw"));
        let guest = File::open(&shown).unwrap();
        guest.read_exact_at(&mut [0; 512], 2 * MIB).unwrap();
        let refused = File::options().write(true).open(&shown);
        assert_eq!(errno(refused), Errno::BUSY.raw_os_error());
        drop(guest);
        sleep(Duration::from_millis(100));
        assert!(fs::read(&path).unwrap() == *before, "{name} was changed");
    }
    held.clear();
    for name in &names {
        let path = mount.behind(name);
        eventually("it is taken up afterwards", || length(&path) < 24 * MIB);
    }
    mount.unmount();
    names
        .iter()
        .for_each(|name| assert_clean(&mount.behind(name)));
}

/// Waits until somebody changes the file, and opens it then; what it looks like does not change any more.
fn cut_in(path: &Path, before: (u64, SystemTime, u64), write: bool) {
    eventually("work begins", || look(path) != before);
    let asked = Instant::now();
    let file = File::options().read(true).write(write).open(path).unwrap();
    let (waited, opened) = (asked.elapsed(), look(path));
    sleep(Duration::from_millis(100));
    assert_eq!(look(path), opened, "changed in another program's hands");
    println!("let in after {waited:?}");
    assert!(waited < Duration::from_secs(5), "{waited:?}");
    drop(file);
}

#[test]
fn who_opens_a_file_that_the_daemon_works_on_gets_it() {
    if !has_leases() {
        return;
    }
    for format in FORMATS {
        let name = format!("a.{format}");
        let mut before = None;
        let Some(mount) = Mount::new(&["--idle-after", "0s", "-v"], |source| {
            make_fat(&source.join(&name), 192);
            before = Some(look(&source.join(&name)));
        }) else {
            return;
        };
        let path = mount.behind(&name);
        cut_in(&path, before.unwrap(), false);
        let now = look(&path);
        if length(&path) > 110 * MIB {
            cut_in(&path, now, true);
        }
        eventually("it is done in the end", || length(&path) < 110 * MIB);
        assert!(mount.said("left to another program") <= 1);
        mount.unmount();
        assert_clean(&path);
    }
}

fn start(arguments: &[&str]) -> Child {
    let (silent, piped) = (Stdio::null(), Stdio::piped());
    let mut command = vhdfs();
    command.args(arguments).stdout(silent).stderr(piped);
    command.spawn().unwrap()
}

#[test]
fn compaction_waits_for_readers_and_leaves_the_file_to_writers() {
    if !has_leases() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let path = directory.path().join(format!("a.{format}"));
        let text = path.to_str().unwrap();
        make_fat(&path, 192);
        let reader = File::open(&path).unwrap();
        let before = look(&path);
        let first = start(&["compact", text]);
        sleep(Duration::from_millis(200));
        assert_eq!(look(&path), before);
        drop(reader);
        cut_in(&path, before, true);
        let output = first.wait_with_output().unwrap();
        let error = stderr(&output);
        // On a quick host it may have been through.
        if output.status.code() == Some(1) {
            assert!(error.contains("another program opens the file"), "{error}");
            let before = look(&path);
            let second = start(&["compact", text]);
            if length(&path) > 110 * MIB {
                cut_in(&path, before, false);
            }
            let output = second.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
        }
        assert!(length(&path) < 110 * MIB);
        assert_clean(&path);
    }
}

#[test]
fn children_that_come_while_another_program_reads_the_file_count() {
    if !has_leases() {
        return;
    }
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = directory.path().join("a.vhd");
    make_fat(&path, 192);
    let child = other.path().join("child.vhd");
    create(&child, &["--parent", path.to_str().unwrap()]);
    let before = look(&path);
    let mut command = vhdfs();
    command.args(["compact", "--json"]).arg(&path);
    let compaction = command.stdout(Stdio::piped()).spawn().unwrap();
    eventually("work begins", || look(&path) != before);
    let reader = File::open(&path).unwrap();
    // On a quick host it may have been through.
    let is_let_in = length(&path) > 110 * MIB;
    fs::rename(&child, directory.path().join("child.vhd")).unwrap();
    drop(reader);
    let output = compaction.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    println!("let in: {is_let_in}");
    assert!(!is_let_in || text.contains("child.vhd"), "{text}");
    assert!(length(&path) < 110 * MIB);
}

#[test]
fn a_copy_that_is_made_in_pieces_arrives_whole() {
    let directory = tempfile::tempdir().unwrap();
    let original = directory.path().join("a.vhdx");
    make_fat(&original, 16);
    let bytes = fs::read(&original).unwrap();
    let end = u64::try_from(bytes.len()).unwrap();
    let half = bytes.len() / 2;
    // Tables and all.
    let least = ["--min-reclaim", "1M"];
    let options = [&["--idle-after", "0s", "--quiet-time", "1s"], &least[..]].concat();
    let Some(mount) = Mount::new(&options, |source| {
        let copy = File::create(source.join("copy.vhdx")).unwrap();
        copy.set_len(end).unwrap();
        copy.write_all_at(&bytes[..half], 0).unwrap();
    }) else {
        return;
    };
    let path = mount.behind("copy.vhdx");
    let mut at = half;
    for piece in bytes[half..].chunks(half / 5) {
        sleep(Duration::from_millis(400));
        // Closed again each time, as some do.
        let file = writer(&path);
        file.write_all_at(piece, u64::try_from(at).unwrap())
            .unwrap();
        at += piece.len();
    }
    assert!(fs::read(&path).unwrap() == bytes, "the copy is not whole");
    eventually("it is taken up afterwards", || length(&path) < end);
}

#[test]
fn where_the_host_cannot_tell_a_file_must_have_been_quiet() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be another user");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vhd");
    make_fat(&path, 16);
    let mode = |bits| fs::Permissions::from_mode(bits);
    fs::set_permissions(directory.path(), mode(0o777)).unwrap();
    fs::set_permissions(&path, mode(0o666)).unwrap();
    // Somebody who may write to the file and is not its owner has no lease on it.
    let binary = directory.path().join("vhdfs");
    fs::copy(env!("CARGO_BIN_EXE_vhdfs"), &binary).unwrap();
    let compact = |quiet: &str| {
        let mut command = Command::new(&binary);
        command.uid(NOBODY).gid(NOBODY);
        command.args(["compact", "--quiet-time", quiet]).arg(&path);
        command.output().unwrap()
    };
    let before = length(&path);
    let output = compact("5m");
    assert_eq!(exit_code(&output), 1);
    let error = stderr(&output);
    assert!(error.contains("--quiet-time 0s"), "{error}");
    assert_eq!(length(&path), before);
    let output = compact("0s");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(length(&path) < before);
}
