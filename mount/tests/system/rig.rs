//! A directory of VHDs, the daemon that serves it, and a guest file system on a loop device. Dropping it
//! undoes all of that, whatever state a failed test left.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// The binary under test.
pub(crate) const VHDFS: &str = env!("CARGO_BIN_EXE_vhdfs");

/// Why whole-system tests cannot run here, if so.
pub(crate) fn obstacle() -> Option<String> {
    if rustix::process::geteuid().as_raw() != 0 {
        return Some("needs root for loop devices and mounts".into());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if File::options().read(true).write(true).open(device).is_err() {
            return Some(format!("needs {device}"));
        }
    }
    for tool in [
        "fio",
        "qemu-img",
        "mkfs.ext4",
        "fsck.ext4",
        "losetup",
        "fstrim",
    ] {
        if Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_err()
        {
            return Some(format!("needs {tool} (scripts/setup installs it)"));
        }
    }
    None
}

/// Runs a program that must succeed; returns what it printed.
pub(crate) fn run<I>(program: &str, arguments: I) -> String
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments);
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    String::from_utf8(output.stdout).expect("programs print UTF-8")
}

/// Runs a vhdfs command with `--json`, which must succeed, and returns what it reports.
pub(crate) fn report(arguments: &[&str], file: &Path) -> serde_json::Value {
    let printed = run(
        VHDFS,
        arguments
            .iter()
            .map(OsStr::new)
            .chain([OsStr::new("--json"), file.as_os_str()]),
    );
    let parsed: serde_json::Value =
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error} in {printed}"));
    match parsed {
        serde_json::Value::Array(mut reports) => reports.remove(0),
        single => single,
    }
}

/// A number out of a report.
pub(crate) fn number(report: &serde_json::Value, key: &str) -> u64 {
    report[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key} in {report}"))
}

/// Length of a file in bytes.
pub(crate) fn length(path: &Path) -> u64 {
    fs::metadata(path).expect("the file exists").len()
}

/// Polls until `done`; fails with `what` after `limit`.
pub(crate) fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) struct Rig {
    /// Of the disks: `vhd` or `vhdx`.
    extension: &'static str,
    place: TempDir,
    daemon: Option<Child>,
    loop_device: Option<String>,
    files_mounted: bool,
    /// How long a disk has to be idle before it is compacted, as the daemon is told.
    pub(crate) idle_after: &'static str,
}

impl Rig {
    pub(crate) fn new(extension: &'static str) -> Rig {
        let place = tempfile::tempdir().expect("a temporary directory");
        for name in ["disks", "mnt", "files"] {
            fs::create_dir(place.path().join(name)).expect("a fresh directory");
        }
        Rig {
            extension,
            place,
            daemon: None,
            loop_device: None,
            files_mounted: false,
            idle_after: "300ms",
        }
    }

    /// A path in the test's own directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// The disk file of that name, which is without extension.
    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        self.path("disks")
            .join(format!("{name}.{}", self.extension))
    }

    /// What the daemon serves for the disk of that name.
    pub(crate) fn raw(&self, name: &str) -> PathBuf {
        self.path("mnt")
            .join(format!("{name}.{}.raw", self.extension))
    }

    /// Of the disks: `vhd` or `vhdx`.
    pub(crate) fn extension(&self) -> &'static str {
        self.extension
    }

    /// What QEMU calls the format.
    pub(crate) fn qemu_format(&self) -> &'static str {
        if self.extension == "vhd" {
            "vpc"
        } else {
            self.extension
        }
    }

    /// Where the guest's file system is mounted.
    pub(crate) fn files(&self) -> PathBuf {
        self.path("files")
    }

    /// Starts the daemon; returns once it serves. It does not ask filesystems: what is compared byte by
    /// byte must not lose what is free.
    pub(crate) fn serve(&mut self) {
        self.serve_with(&["--fs-aware", "off"]);
    }

    /// Starts the daemon with further `options`; returns once it serves.
    pub(crate) fn serve_with(&mut self, options: &[&str]) {
        assert!(self.daemon.is_none());
        let log = File::options()
            .append(true)
            .create(true)
            .open(self.path("log"))
            .expect("a log");
        let child = Command::new(VHDFS)
            .args([
                "mount",
                "--foreground",
                "--idle-after",
                self.idle_after,
                "--quiet-time",
                "0s",
                "--min-reclaim",
                "1MiB",
            ])
            .args(options)
            .args([self.path("disks"), self.path("mnt")])
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("vhdfs starts");
        self.daemon = Some(child);
        let mount_point = self.path("mnt");
        wait_until("the mount", Duration::from_secs(10), || {
            is_mount_point(&mount_point)
        });
    }

    /// Sends the daemon a signal. Not with a program: to start one, this process forks, and the child's
    /// copies of files on the mount are closed, which a stopped daemon would never answer.
    pub(crate) fn signal(&self, signal: Signal) {
        let daemon = self.daemon.as_ref().expect("the daemon runs");
        let pid = i32::try_from(daemon.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process id");
        rustix::process::kill_process(pid, signal).expect("the daemon is ours");
    }

    /// Kills the daemon as hard as can be and clears away what the guest had on it.
    pub(crate) fn crash(&mut self) {
        self.signal(Signal::KILL);
        self.daemon
            .take()
            .expect("the daemon runs")
            .wait()
            .expect("a child to wait for");
        self.clear_guest();
        run("umount", ["--lazy".as_ref(), self.path("mnt").as_os_str()]);
    }

    /// `vhdfs unmount`, after which the daemon must end without an error.
    pub(crate) fn unmount(&mut self) {
        run(VHDFS, ["unmount".as_ref(), self.path("mnt").as_os_str()]);
        let status = self
            .daemon
            .take()
            .expect("the daemon runs")
            .wait()
            .expect("a child");
        assert!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.log()
        );
    }

    /// What the daemon said so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Puts a loop device on a served disk.
    pub(crate) fn attach(&mut self, name: &str) -> String {
        let device = run(
            "losetup",
            [
                "--find".as_ref(),
                "--show".as_ref(),
                self.raw(name).as_os_str(),
            ],
        );
        let device = device.trim().to_owned();
        self.loop_device = Some(device.clone());
        device
    }

    /// Mounts the guest's file system from the loop device.
    pub(crate) fn mount_files(&mut self) {
        let device = self.loop_device.clone().expect("a loop device");
        run(
            "mount",
            [
                "-o".as_ref(),
                "noatime".as_ref(),
                OsStr::new(&device),
                self.files().as_os_str(),
            ],
        );
        self.files_mounted = true;
    }

    /// Unmounts the guest's file system and takes the loop device off.
    pub(crate) fn detach(&mut self) {
        run("umount", [self.files()]);
        self.files_mounted = false;
        run(
            "losetup",
            [
                "--detach".to_owned(),
                self.loop_device.take().expect("a loop device"),
            ],
        );
    }

    /// As `detach`, but for a guest whose disk may be dead.
    fn clear_guest(&mut self) {
        if std::mem::take(&mut self.files_mounted) {
            attempt("umount", &[self.files().as_os_str()]);
            attempt("umount", &["--lazy".as_ref(), self.files().as_os_str()]);
        }
        if let Some(device) = self.loop_device.take() {
            attempt("losetup", &["--detach".as_ref(), OsStr::new(&device)]);
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The reason is rarely in the test alone.
            eprintln!("the daemon said:\n{}", self.log());
        }
        self.clear_guest();
        if let Some(mut daemon) = self.daemon.take() {
            // It may be stopped, and a stopped daemon would hold up the unmount for ever.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        attempt("umount", &["--lazy".as_ref(), self.path("mnt").as_os_str()]);
    }
}

/// Runs a clean-up command whose failure means that there was nothing to clean up.
fn attempt(program: &str, arguments: &[&OsStr]) {
    let _ = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

fn is_mount_point(path: &Path) -> bool {
    Command::new("mountpoint")
        .arg("-q")
        .arg(path)
        .status()
        .is_ok_and(|status| status.success())
}

/// Says on the terminal, past the test harness's capture, that a test did not run.
pub(crate) fn say_skipped(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "skipped {test}: {reason}");
}

/// The start of a file: for a VHD its headers and BAT, for small disks all of it.
pub(crate) fn head_of(path: &Path, length: usize) -> Vec<u8> {
    let mut head = vec![0; length];
    let mut file = File::open(path).expect("the file exists");
    file.read_exact(&mut head)
        .expect("the file is longer than that");
    head
}
