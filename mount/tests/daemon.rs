//! How a mount begins and ends.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Mount, assert_clean, create, eventually, exit_code, run, stderr, vhdfs};
use rustix::process::{Pid, Signal, kill_process};

fn sample() -> Option<Mount> {
    Mount::new(&["--no-compact"], |source| {
        create(&source.join("a.vhd"), &["--size", "64M"])
    })
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn is_running(pid: i32) -> bool {
    // A zombie that nobody waits for has ended, too.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

fn write(path: &Path) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    file.write_all_at(&[5; 3 << 20], 1 << 20).unwrap();
    file
}

#[test]
fn unmounting_waits_until_all_is_closed() {
    let Some(mount) = sample() else { return };
    let pid = mount.pid();
    drop(write(&mount.at("a.vhd.raw")));
    mount.unmount();
    assert!(!is_running(pid) && !mount.is_mounted());
    assert_clean(&mount.behind("a.vhd"));
    let again = run([Path::new("unmount"), &mount.mount_point()]);
    assert_eq!(exit_code(&again), 1);
    assert!(stderr(&again).starts_with("vhdfs: "), "{}", stderr(&again));
}

#[test]
fn a_mount_in_use_stays() {
    let Some(mount) = sample() else { return };
    let file = write(&mount.at("a.vhd.raw"));
    let refused = run([Path::new("unmount"), &mount.mount_point()]);
    assert_eq!(exit_code(&refused), 1);
    assert!(stderr(&refused).contains("in use"), "{}", stderr(&refused));
    file.write_all_at(b"on", 0).unwrap();
    drop(file);
    mount.unmount();
}

#[test]
fn a_signal_ends_it_cleanly() {
    for number in [Signal::TERM, Signal::INT] {
        let Some(mount) = sample() else { return };
        let pid = mount.pid();
        drop(write(&mount.at("a.vhd.raw")));
        signal(pid, number);
        eventually("it ends", || !is_running(pid));
        assert!(!mount.is_mounted());
        assert_clean(&mount.behind("a.vhd"));
    }
}

#[test]
fn a_signal_ends_it_cleanly_while_it_is_in_use() {
    let Some(mount) = sample() else { return };
    let pid = mount.pid();
    let file = write(&mount.at("a.vhd.raw"));
    signal(pid, Signal::TERM);
    eventually("it ends", || !is_running(pid));
    assert!(!mount.is_mounted());
    assert!(file.write_all_at(b"late", 0).is_err());
    assert_clean(&mount.behind("a.vhd"));
    mount.mount(&[]);
    let mut found = vec![0; 3 << 20];
    let again = File::open(mount.at("a.vhd.raw")).unwrap();
    again.read_exact_at(&mut found, 1 << 20).unwrap();
    assert!(found.iter().all(|byte| *byte == 5));
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let Some(mount) = sample() else { return };
    let pid = mount.pid();
    let file = write(&mount.at("a.vhd.raw"));
    signal(pid, Signal::KILL);
    eventually("it ends", || !is_running(pid));
    drop(file);
    // The dead mount is in the way, and unmounting it needs no daemon.
    mount.unmount();
    mount.mount(&[]);
    let mut found = vec![0; 3 << 20];
    File::open(mount.at("a.vhd.raw"))
        .unwrap()
        .read_exact_at(&mut found, 1 << 20)
        .unwrap();
    assert!(found.iter().all(|byte| *byte == 5));
    mount.unmount();
    assert_clean(&mount.behind("a.vhd"));
}

fn start_foreground(mount: &Mount, options: &[&str]) -> Child {
    let mut command = vhdfs();
    command
        .args(["mount", "--foreground"])
        .args(options)
        .stderr(Stdio::piped());
    let child = command
        .arg(mount.source())
        .arg(mount.mount_point())
        .spawn()
        .unwrap();
    eventually("it is mounted", || mount.is_mounted());
    child
}

#[test]
fn in_the_foreground_the_exit_code_is_the_daemons() {
    let Some(mount) = sample() else { return };
    mount.unmount();
    let mut child = start_foreground(&mount, &[]);
    signal(i32::try_from(child.id()).unwrap(), Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let child = start_foreground(&mount, &[]);
    mount.unmount();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        stderr(&output).contains("is mounted at"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn what_cannot_be_mounted_is_said_at_once() {
    let Some(mount) = sample() else { return };
    let (source, mount_point) = (mount.source(), mount.mount_point());
    let below = source.join("below");
    fs::create_dir(&below).unwrap();
    let missing = source.join("missing");
    for (from, to, text) in [
        (&missing, &below, "missing"),
        (&source, &missing, "missing"),
        (&source, &mount_point, "mounted already"),
        (&source, &below, "mount it elsewhere"),
        (&source, &source, "would hide its own disks"),
        (&below, &source, "would hide"),
        (&mount.behind("a.vhd"), &below, "not a directory"),
    ] {
        let output = run([Path::new("mount"), from, to]);
        assert_eq!(exit_code(&output), 1);
        assert!(
            stderr(&output).starts_with("vhdfs: "),
            "{}",
            stderr(&output)
        );
        assert!(stderr(&output).contains(text), "{}", stderr(&output));
    }
    let usage = run([Path::new("mount"), &source]);
    assert_eq!(exit_code(&usage), 2);
}

#[test]
fn mount_programs_can_start_it() {
    let Some(mount) = sample() else { return };
    mount.unmount();
    let mut helper = vhdfs();
    helper
        .arg0("mount.fuse.vhdfs")
        .arg(mount.source())
        .arg(mount.mount_point());
    let output = helper
        .args(["-n", "-o", "ro,nofail,idle-after=9s"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        File::options()
            .write(true)
            .open(mount.at("a.vhd.raw"))
            .is_err()
    );
    mount.unmount();
}

#[test]
fn an_ordinary_user_can_mount() {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || !common::can_mount() || !common::has("fusermount3") || !common::has("setpriv") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    for name in ["source", "mnt"] {
        fs::create_dir(path(name)).unwrap();
        std::os::unix::fs::chown(path(name), Some(65534), Some(65534)).unwrap();
    }
    // The way there is open to them; the binary may not be, so it comes along.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(root.path(), mode).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_vhdfs"), path("vhdfs")).unwrap();
    let as_user = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(path("vhdfs"));
        command
            .args(arguments)
            .current_dir(root.path())
            .output()
            .unwrap()
    };
    assert!(
        as_user(&["create", "--size", "8M", "source/a.vhd"])
            .status
            .success()
    );
    let output = as_user(&["mount", "source", "mnt"]);
    if stderr(&output).contains("/dev/fuse") || stderr(&output).contains("Permission denied") {
        println!("skipped: {}", stderr(&output));
        return;
    }
    assert!(output.status.success(), "{}", stderr(&output));
    let info = as_user(&["unmount", "mnt"]);
    assert!(info.status.success(), "{}", stderr(&info));
    assert_clean(&path("source/a.vhd"));
}

/// A shell with a copy of the mounts of its own, which does `script` once its input ends; `None` where that
/// cannot be had.
fn elsewhere(mount: &Mount, script: &str) -> Option<Child> {
    let can = Command::new("unshare").args(["-m", "true"]).output();
    if !can.is_ok_and(|done| done.status.success()) {
        println!("skipped: no mount namespaces here");
        return None;
    }
    let child = (Command::new("unshare").args(["-m", "sh", "-c", script]))
        .env("MNT", mount.mount_point())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    Some(child)
}

/// Waits until it has said something.
fn hear(child: &mut Child) {
    let mut said = [0; 3];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(&said, b"ok\n");
}

#[test]
fn a_copy_of_the_mount_that_nobody_uses_keeps_nothing_open() {
    let Some(mount) = sample() else { return };
    let Some(mut other) = elsewhere(&mount, "echo ok; read line") else {
        return;
    };
    hear(&mut other);
    let pid = mount.pid();
    drop(write(&mount.at("a.vhd.raw")));
    let started = Instant::now();
    mount.unmount();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(!is_running(pid));
    assert_clean(&mount.behind("a.vhd"));
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn what_is_open_in_another_namespace_is_served_until_it_is_closed() {
    let Some(mount) = sample() else { return };
    create(&mount.behind("b.vhd"), &["--size", "64M"]);
    let script = "exec 3<>$MNT/a.vhd.raw; echo ok; read line; \
                  printf late >&3 && sync -d /proc/self/fd/3 && echo ok; read line";
    let Some(mut other) = elsewhere(&mount, script) else {
        return;
    };
    hear(&mut other);
    let pid = mount.pid();
    drop(write(&mount.at("b.vhd.raw")));
    let refused = run([Path::new("unmount"), &mount.mount_point()]);
    assert_eq!(exit_code(&refused), 1);
    let text = stderr(&refused);
    assert!(text.contains("still mounted in another"), "{text}");
    assert!(
        text.contains(&format!("sh (process {})", other.id())),
        "{text}"
    );
    assert!(!mount.is_mounted() && is_running(pid));
    // The other disk is closed, and can be had.
    assert_clean(&mount.behind("b.vhd"));
    let open = vhdfs::disk::Disk::open(&mount.behind("b.vhd"), &Default::default());
    drop(open.unwrap());

    let mut input = other.stdin.take().unwrap();
    input.write_all(b"go on\n").unwrap();
    hear(&mut other);
    drop(input);
    other.wait().unwrap();
    eventually("the daemon ends", || !is_running(pid));
    assert_clean(&mount.behind("a.vhd"));
    mount.mount(&[]);
    let mut found = [0; 4];
    let file = File::open(mount.at("a.vhd.raw")).unwrap();
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"late");
}

#[test]
fn a_signal_ends_it_whoever_has_a_copy_of_the_mount() {
    let Some(mount) = sample() else { return };
    let script = "exec 3<>$MNT/a.vhd.raw; echo ok; read line";
    let Some(mut other) = elsewhere(&mount, script) else {
        return;
    };
    hear(&mut other);
    let pid = mount.pid();
    signal(pid, Signal::TERM);
    eventually("it ends", || !is_running(pid));
    assert_clean(&mount.behind("a.vhd"));
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn a_clean_end_logs_no_trouble() {
    let Some(mount) = sample() else { return };
    drop(write(&mount.at("a.vhd.raw")));
    mount.unmount();
    let log = mount.log();
    assert!(log.contains("is unmounted"), "{log}");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}
