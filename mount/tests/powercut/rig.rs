//! The program under test over a faulty host.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhdfs::storage::sim::SimStorage;

use crate::common::{can_mount, eventually, exit_code, json, run, stderr, vhdfs};
use crate::host::Host;
use crate::host::orders::{Answer, Order};

/// A directory in which there is a faulty host, `host`, and what the program shows of it.
pub(crate) struct Rig {
    host: Host,
    daemon: Option<Child>,
    place: TempDir,
}

/// How a disk is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) extension: &'static str,
    pub(crate) has_parent: bool,
}

pub(crate) const VHD: Kind = Kind {
    extension: "vhd",
    has_parent: false,
};
pub(crate) const VHDX: Kind = Kind {
    extension: "vhdx",
    has_parent: false,
};
pub(crate) const VHD_CHILD: Kind = Kind {
    has_parent: true,
    ..VHD
};
pub(crate) const VHDX_CHILD: Kind = Kind {
    has_parent: true,
    ..VHDX
};

impl Kind {
    pub(crate) fn file(self, name: &str) -> String {
        format!("{name}.{}", self.extension)
    }

    /// The smallest, so that blocks come and go.
    pub(crate) fn block_size(self) -> &'static str {
        match self.extension {
            "vhd" => "512K",
            _ => "1M",
        }
    }

    /// What QEMU calls the format.
    pub(crate) fn qemu_format(self) -> &'static str {
        match self.extension {
            "vhd" => "vpc",
            other => other,
        }
    }
}

impl Rig {
    /// An empty host. `None`, with a reason printed, where that is not possible.
    pub(crate) fn new() -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let place = tempfile::tempdir().unwrap();
        for name in ["source", "source/host", "mnt"] {
            fs::create_dir(place.path().join(name)).unwrap();
        }
        Some(Self {
            host: Host::start(&place.path().join("source/host")),
            daemon: None,
            place,
        })
    }

    pub(crate) fn order(&mut self, order: &Order) -> Answer {
        self.host.order(order)
    }

    /// A disk file on the host.
    pub(crate) fn behind(&self, name: &str) -> PathBuf {
        self.host.path(name)
    }

    /// What the program shows for a disk file on the host.
    pub(crate) fn raw(&self, name: &str) -> PathBuf {
        self.shown(&format!("host/{name}"))
    }

    /// A disk file elsewhere in the directory.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.place.path().join("source").join(name)
    }

    /// What the program shows for it.
    pub(crate) fn shown(&self, name: &str) -> PathBuf {
        self.mount_point().join(format!("{name}.raw"))
    }

    /// A path outside of the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn mount_point(&self) -> PathBuf {
        self.place.path().join("mnt")
    }

    /// What the daemons said so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Starts the daemon.
    pub(crate) fn serve(&mut self, options: &[&str]) {
        assert!(self.daemon.is_none());
        let log = File::options()
            .append(true)
            .create(true)
            .open(self.path("log"))
            .unwrap();
        let mut daemon = vhdfs()
            .args(["mount", "--foreground", "--fs-aware", "off"])
            .args([
                "--idle-after",
                "20ms",
                "--quiet-time",
                "0s",
                "--min-reclaim",
                "64K",
            ])
            .args(options)
            .args([self.path("source"), self.mount_point()])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_mounted(&self.mount_point()) {
            let in_time = Instant::now() < deadline && daemon.try_wait().unwrap().is_none();
            assert!(in_time, "not mounted:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        self.daemon = Some(daemon);
    }

    /// The daemon lives.
    pub(crate) fn assert_alive(&mut self) {
        let daemon = self.daemon.as_mut().unwrap();
        let ended = daemon.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}\n{}", self.log());
    }

    /// Kills the daemon, if there is one, and takes its mount away.
    pub(crate) fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
        let mount_point = self.mount_point();
        if is_mounted(&mount_point) {
            let umount = Command::new("umount").arg("-l").arg(mount_point).status();
            assert!(umount.unwrap().success());
        }
    }

    /// `vhdfs unmount`, after which the daemon must end well.
    pub(crate) fn unmount(&mut self) {
        // A program that another test is just starting shares our descriptors for a moment.
        eventually("unmounted", || {
            let output = run([Path::new("unmount"), &self.mount_point()]);
            output.status.success()
        });
        let status = self.daemon.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Makes an empty disk on the host.
    pub(crate) fn create(&self, kind: Kind, name: &str, size: &str) {
        create(kind, &self.behind(&kind.file(name)), size);
    }

    /// Makes a disk on the host that reads as `parent`.
    pub(crate) fn create_child(&self, kind: Kind, name: &str, parent: &str) {
        let mut command = vhdfs();
        command
            .args(["create", "--block-size", kind.block_size(), "--parent"])
            .arg(self.behind(&kind.file(parent)))
            .arg(self.behind(&kind.file(name)));
        assert_done(&command.output().unwrap());
    }

    /// Runs `vhdfs compact` on a disk file that nobody has open.
    pub(crate) fn compact(&self, name: &str) -> Output {
        let path = self.behind(name);
        // The file was just written, on a host without leases.
        let words = ["compact", "--json", "--no-fs-aware", "--quiet-time=0s"].map(Path::new);
        run(words.into_iter().chain([&*path]))
    }

    /// `vhdfs check` finds nothing.
    pub(crate) fn assert_clean(&self, name: &str) {
        let path = self.behind(name);
        let output = run([Path::new("check"), Path::new("--json"), &path]);
        assert_eq!(
            exit_code(&output),
            0,
            "{} {}",
            json(&output),
            stderr(&output)
        );
        let report = json(&output);
        assert_eq!(report["errors"], serde_json::json!([]), "{report}");
    }

    /// What a disk file is now, for the second reader.
    pub(crate) fn image(&self, name: &str) -> Arc<SimStorage> {
        Arc::new(SimStorage::from_file(&self.behind(name)).unwrap())
    }
}

/// Makes an empty disk.
pub(crate) fn create(kind: Kind, path: &Path, size: &str) {
    let options = ["create", "--block-size", kind.block_size(), "--size", size];
    assert_done(&vhdfs().args(options).arg(path).output().unwrap());
}

fn assert_done(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

fn is_mounted(place: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let place = place.to_str().unwrap();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(place))
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The reason is rarely in the test alone. The end will do.
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = lines.len().saturating_sub(20);
            eprintln!("the daemon said at last:\n{}", lines[last..].join("\n"));
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.mount_point())
            .stderr(Stdio::null())
            .status();
    }
}
