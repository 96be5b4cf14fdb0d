//! What the tests of the built binary share: runs of it, and mounts that go away by themselves.

#![allow(dead_code, reason = "no test file uses all of it")]

#[cfg(unix)]
use std::fs::{self, File};
#[cfg(unix)]
use std::os::unix::fs::MetadataExt;
use std::path::Path;
#[cfg(unix)]
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

#[cfg(unix)]
use tempfile::TempDir;

/// The binary.
pub(crate) fn vhdfs() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vhdfs"))
}

/// Runs it with these arguments.
pub(crate) fn run<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    vhdfs()
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Copies the program to where others may run it. Not by ourselves: a process that another test starts
/// meanwhile would keep it open for writing, and then it cannot be run.
pub(crate) fn copy_program(to: &Path) {
    let mut copy = Command::new("cp");
    copy.arg(env!("CARGO_BIN_EXE_vhdfs")).arg(to);
    assert!(copy.status().unwrap().success());
}

pub(crate) fn exit_code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub(crate) fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&output.stdout)))
}

/// Makes a disk; `arguments` come before the file's name.
pub(crate) fn create(path: &Path, arguments: &[&str]) {
    let output = vhdfs()
        .arg("create")
        .args(arguments)
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[cfg(unix)]
/// Whether whole tests can run here; says why not.
pub(crate) fn can_mount() -> bool {
    let can = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_ok();
    if !can {
        println!("skipped: no access to /dev/fuse");
    }
    can
}

#[cfg(unix)]
/// Whether that program is installed; says so if not.
pub(crate) fn has(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .unwrap();
    if !found.status.success() {
        println!("skipped: {program} is not installed");
    }
    found.status.success()
}

#[cfg(unix)]
/// A small file system, which ends with it.
pub(crate) struct Tmpfs {
    root: TempDir,
}

#[cfg(unix)]
impl Tmpfs {
    /// One of so many bytes, as mount(8) takes them. `None`, and it is said, where that is not possible.
    pub(crate) fn new(size: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root mounts");
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(root.path())
            .status();
        if !mount.unwrap().success() {
            println!("skipped: no tmpfs may be mounted");
            return None;
        }
        Some(Self { root })
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }
}

#[cfg(unix)]
impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.path())
            .status();
    }
}

#[cfg(unix)]
/// Does `work` as that user, in no group but one of the same number. For root alone; `None` for others.
pub(crate) fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> Option<T> {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be another user");
        return None;
    }
    // Of this one thread alone: the kernel keeps these by thread.
    let work = move || {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
        set_thread_groups(&[]).unwrap();
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
        work()
    };
    Some(std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap()
    }))
}

/// The number in an environment variable; `otherwise` without one.
pub(crate) fn env_number(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(otherwise, |text| text.parse().unwrap())
}

/// Nobody in particular.
pub(crate) const NOBODY: u32 = 65534;

/// Waits until that is so.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(unix)]
/// A directory of disks, mounted.
pub(crate) struct Mount {
    root: TempDir,
}

#[cfg(unix)]
impl Mount {
    /// Mounts a directory that `prepare` has filled. `None` where that is not possible here.
    pub(crate) fn new(options: &[&str], prepare: impl FnOnce(&Path)) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let mount = Self {
            root: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(mount.source()).unwrap();
        fs::create_dir(mount.mount_point()).unwrap();
        prepare(&mount.source());
        mount.mount(options);
        Some(mount)
    }

    /// Mounts it, again if it has been unmounted. What others make in it is not waited for, unless
    /// `options` say so.
    pub(crate) fn mount(&self, options: &[&str]) {
        let quiet: &[&str] = match options.contains(&"--quiet-time") {
            true => &[],
            false => &["--quiet-time", "0s"],
        };
        let (source, log) = (self.source(), self.log_file());
        let mut command = vhdfs();
        command
            .arg("mount")
            .args(options)
            .args(quiet)
            .arg("--log-file")
            .arg(log);
        let output = command
            .arg(source)
            .arg(self.mount_point())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// Lets other users come as far as the disks and the mount.
    pub(crate) fn open_the_way(&self) {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(self.root.path(), mode).unwrap();
    }

    pub(crate) fn source(&self) -> PathBuf {
        self.root.path().join("source")
    }

    pub(crate) fn mount_point(&self) -> PathBuf {
        self.root.path().join("mnt")
    }

    /// A file of the mount.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.mount_point().join(name)
    }

    /// A file below the mount.
    pub(crate) fn behind(&self, name: &str) -> PathBuf {
        self.source().join(name)
    }

    fn log_file(&self) -> PathBuf {
        self.root.path().join("log")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap()
    }

    /// The lines of the log with that text.
    pub(crate) fn said(&self, text: &str) -> usize {
        self.log()
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }

    /// The names in a directory of the mount, sorted.
    pub(crate) fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at(directory)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    pub(crate) fn unmount(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let output = run([Path::new("unmount"), &self.mount_point()]);
            // A program that another test just starts has our files for a moment.
            let is_busy = stderr(&output).contains("in use") && Instant::now() < deadline;
            assert!(output.status.success() || is_busy, "{}", stderr(&output));
            if !is_busy {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The daemon's process id.
    pub(crate) fn pid(&self) -> i32 {
        let value = attribute(&self.mount_point(), "user.vhdfs.pid");
        value.parse().unwrap()
    }

    /// What the mount says of a disk, or of itself for the empty name.
    pub(crate) fn status(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&attribute(&self.at(name), "user.vhdfs.status")).unwrap()
    }

    pub(crate) fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(self.mount_point().to_str().unwrap())
    }
}

#[cfg(unix)]
impl Drop for Mount {
    fn drop(&mut self) {
        if self.is_mounted() {
            // Also where a failed test still holds files.
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.mount_point())
                .status();
        }
    }
}

#[cfg(unix)]
fn attribute(path: &Path, name: &str) -> String {
    let mut value = vec![0; 65536];
    let len = rustix::fs::getxattr(path, name, &mut value).unwrap();
    value.truncate(len);
    String::from_utf8(value).unwrap()
}

/// Asserts that a disk file is clean, and no longer than its content needs.
pub(crate) fn assert_clean(path: &Path) {
    let checked = run([Path::new("check"), Path::new("--json"), path]);
    assert_eq!(exit_code(&checked), 0, "{}", json(&checked));
    let report = json(&checked);
    assert_eq!(report["warnings"], serde_json::json!([]), "{report}");
}

#[cfg(unix)]
pub(crate) fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[cfg(unix)]
pub(crate) fn stored(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
