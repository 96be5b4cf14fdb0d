use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::error::{ErrorKind, OpenError};
use crate::storage::host::{HostFile, HostOptions, Sharing};

fn open(path: &Path, read_only: bool) -> Result<HostFile, OpenError> {
    HostFile::open(
        path,
        &HostOptions {
            read_only,
            ..HostOptions::default()
        },
    )
}

/// The text of the refusal.
fn in_use(result: Result<HostFile, OpenError>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    error.to_string()
}

fn image() -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    (directory, path)
}

#[test]
fn writers_are_alone() {
    let (_directory, path) = image();
    let writer = open(&path, false).unwrap();
    for read_only in [false, true] {
        let text = in_use(open(&path, read_only));
        assert!(text.contains("it has the file open for writing"), "{text}");
    }
    let unlocked = HostOptions {
        lock: false,
        ..HostOptions::default()
    };
    HostFile::open(&path, &unlocked).unwrap();
    drop(writer);
    open(&path, false).unwrap();
}

#[test]
fn readers_share() {
    let (_directory, path) = image();
    let first = open(&path, true).unwrap();
    let second = open(&path, true).unwrap();
    let text = in_use(open(&path, false));
    assert!(
        text.contains("it lets nobody write to the file meanwhile"),
        "{text}"
    );
    drop(first);
    in_use(open(&path, false));
    drop(second);
    open(&path, false).unwrap();
}

#[test]
fn refused_opens_leave_no_lock() {
    let (_directory, path) = image();
    let reader = open(&path, true).unwrap();
    in_use(open(&path, false));
    open(&path, true).unwrap();
    drop(reader);
}

#[test]
fn a_created_file_is_locked() {
    let (directory, _) = image();
    let path = directory.path().join("new");
    let created = HostFile::create_new(&path).unwrap();
    in_use(open(&path, true));
    drop(created);
    open(&path, true).unwrap();
}

/// The file as who has its disk attached has it.
fn attached(path: &Path, before: HostFile) -> HostFile {
    let attached = HostFile::open_shared(path, Sharing::Attached).unwrap();
    drop(before);
    attached
}

#[test]
fn who_has_it_attached_lets_in_readers_and_one_who_compacts() {
    for read_only in [true, false] {
        let (_directory, path) = image();
        let compact = || HostFile::open_shared(&path, Sharing::Compact);
        let attach = || HostFile::open_shared(&path, Sharing::Attached);
        let before = open(&path, read_only).unwrap();
        in_use(compact());
        let first = attached(&path, before);
        assert!(!first.is_attached().unwrap(), "by nobody else");

        let compactor = compact().unwrap();
        assert!(compactor.is_attached().unwrap());
        in_use(compact());
        for read_only in [true, false] {
            let text = in_use(open(&path, read_only));
            assert!(text.contains("it has the file open for writing"), "{text}");
        }
        drop(compactor);

        for second in [open(&path, false), attach()] {
            let text = in_use(second);
            assert!(text.contains("it has the disk attached"), "{text}");
        }
        // A reader relies on what the one who compacts would change.
        let reader = open(&path, true).unwrap();
        let text = in_use(compact());
        assert!(text.contains("it lets nobody write"), "{text}");
        drop(reader);
        drop(compact().unwrap());
        drop(first);
        assert!(!open(&path, false).unwrap().is_attached().unwrap());
    }
}

/// A VHD: of a raw image QEMU's readers do not lock out writers. `None` where there is no `qemu-img`.
fn vhd() -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let (directory, path) = image();
    let mut create = Command::new("qemu-img");
    match create
        .args(["create", "-q", "-f", "vpc"])
        .arg(&path)
        .arg("4M")
        .output()
    {
        Ok(output) => assert!(output.status.success()),
        Err(_) => {
            println!("skipped: no qemu-img");
            return None;
        }
    }
    Some((directory, path))
}

/// A `qemu-io` that has the image open until its input ends; `None` where there is none installed.
struct QemuIo(std::process::Child);

impl QemuIo {
    fn open(path: &Path, read_only: bool) -> Option<Self> {
        let mut command = Command::new("qemu-io");
        command
            .args(["-f", "vpc"])
            .args(read_only.then_some("-r"))
            .arg(path);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            println!("skipped: no qemu-io");
            return None;
        };
        // It answers once it has the image.
        writeln!(child.stdin.as_mut().unwrap(), "length").unwrap();
        let mut answers = BufReader::new(child.stdout.as_mut().unwrap());
        let mut answer = String::new();
        while !answer.contains("MiB") {
            answer.clear();
            assert!(
                answers.read_line(&mut answer).unwrap() > 0,
                "qemu-io has ended"
            );
        }
        Some(Self(child))
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn qemu_keeps_us_out() {
    let Some((_directory, path)) = vhd() else {
        return;
    };
    let Some(writer) = QemuIo::open(&path, false) else {
        return;
    };
    for read_only in [false, true] {
        let text = in_use(open(&path, read_only));
        assert!(text.contains("open for writing"), "{text}");
    }
    drop(writer);
    let Some(reader) = QemuIo::open(&path, true) else {
        return;
    };
    open(&path, true).unwrap();
    in_use(open(&path, false));
    drop(reader);
    open(&path, false).unwrap();
}

fn run(program: &str, arguments: &[&str], path: &Path) -> Option<Output> {
    let output = Command::new(program)
        .args(arguments)
        .arg(path)
        .stdin(Stdio::null())
        .output();
    if output.is_err() {
        println!("skipped: no {program}");
    }
    output.ok()
}

#[test]
fn we_keep_qemu_out() {
    let Some((_directory, path)) = vhd() else {
        return;
    };
    let info = |arguments: &[&str]| run("qemu-img", arguments, &path);
    let refused = |output: &Output, lock: &str| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(lock), "{text}");
    };
    let writer = open(&path, false).unwrap();
    let Some(output) = info(&["info", "-f", "vpc"]) else {
        return;
    };
    refused(&output, "Failed to get shared \"write\" lock");
    let shared = info(&["info", "-U", "-f", "vpc"]).unwrap();
    assert!(shared.status.success(), "-U asks for no lock");
    drop(writer);
    let _reader = open(&path, true).unwrap();
    assert!(info(&["info", "-f", "vpc"]).unwrap().status.success());
    let Some(output) = run("qemu-io", &["-f", "vpc", "-c", "write 0 512"], &path) else {
        return;
    };
    refused(&output, "Failed to get \"write\" lock");
}

#[test]
fn who_has_it_attached_keeps_qemus_writers_out() {
    let Some((_directory, path)) = vhd() else {
        return;
    };
    let _attached = attached(&path, open(&path, true).unwrap());
    let Some(output) = run("qemu-io", &["-f", "vpc", "-c", "write 0 512"], &path) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("Failed to get \"resize\" lock"), "{text}");
    let read = run("qemu-io", &["-r", "-f", "vpc", "-c", "read 0 512"], &path).unwrap();
    assert!(read.status.success());
}
