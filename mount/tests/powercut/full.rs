//! A file system that is really full: a small tmpfs with two disks, and one elsewhere.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::common::{errno, eventually, exit_code, run, stderr};
use crate::guest::{Guest, open};
use crate::rig::{Rig, VHD, VHDX, create};
use crate::support::image::pattern;
use crate::support::oracle::{After, Oracle};

const LEN: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// A mounted tmpfs, which goes away by itself.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None`, with a reason printed, where it cannot be mounted.
    fn new(place: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&place).unwrap();
        let size = format!("size={size}");
        let words = ["-t", "tmpfs", "-o", &size, "tmpfs"];
        let output = Command::new("mount").args(words).arg(&place).output();
        let output = output.unwrap();
        if !output.status.success() {
            println!("skipped: cannot mount a tmpfs: {}", stderr(&output));
            return None;
        }
        Some(Self(place))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A user of one disk.
struct User {
    guest: Guest,
    disk: File,
}

impl User {
    fn new(shown: &Path) -> Self {
        Self {
            guest: Guest::new(LEN, Oracle::new(LEN)),
            disk: open(shown).unwrap(),
        }
    }

    fn write(&self, number: u64) -> std::io::Result<()> {
        let mut bytes = vec![0; 1 << 20];
        pattern(number + 1, 0, &mut bytes);
        self.guest.write_bytes(&self.disk, number * MIB, &bytes)
    }

    fn discard(&self, number: u64) {
        let hole = FallocateFlags::PUNCH_HOLE;
        let done = (self.guest).change_zeros(&self.disk, number * MIB, MIB, hole);
        done.unwrap();
    }

    fn check(&self) {
        self.guest.flush(&self.disk).unwrap();
        self.guest.check_disk(&self.disk, After::Kill).unwrap();
    }
}

#[test]
fn a_full_file_system() {
    full(&[]);
}

#[test]
fn a_full_file_system_without_holes() {
    full(&["--punch-holes", "off"]);
}

fn full(options: &[&str]) {
    let Some(mut rig) = Rig::new() else { return };
    let Some(_small) = Tmpfs::new(rig.beside("small"), "24M") else {
        return;
    };
    let files = ["small/a.vhd", "small/b.vhdx", "c.vhd"];
    for (name, kind) in files.iter().zip([VHD, VHDX, VHD]) {
        create(kind, &rig.beside(name), "64M");
    }
    rig.serve(options);
    let [a, b, c] = files.map(|name| User::new(&rig.shown(name)));
    for number in 0..4 {
        b.write(number).unwrap();
    }
    b.check();
    let mut filled = 0;
    while filled < 60 && a.write(filled).is_ok() {
        filled += 1;
    }
    assert!((8..24).contains(&filled), "{filled}");
    for number in 40..60 {
        let failed = a.write(number).and_then(|()| b.write(number));
        assert_eq!(errno(failed), Errno::NOSPC.raw_os_error());
        c.write(number).unwrap();
    }
    // What has its place needs no room.
    for user in [&a, &b] {
        user.write(1).unwrap();
        user.check();
    }
    c.check();
    rig.assert_alive();
    for name in ["a.vhd", "b.vhdx"] {
        let log = rig.log();
        let told = log
            .lines()
            .filter(|line| line.contains(name) && line.contains("error"));
        assert!(told.count() <= 2, "{log}");
    }

    // Without a byte of room, blocks move and the file gets shorter; then another disk can grow.
    let path = rig.beside("small/a.vhd");
    let len = || path.metadata().unwrap().len();
    let before = len();
    for number in (0..filled).step_by(2) {
        a.discard(number);
    }
    eventually("the file is shorter", || len() + 4 * MIB < before);
    eventually("there is room for another disk", || b.write(30).is_ok());
    b.write(30).unwrap();
    for user in [&a, &b, &c] {
        user.check();
    }

    let users = [a, b, c].map(|user| user.guest);
    rig.unmount();
    for name in files {
        let path = rig.beside(name);
        let words = ["compact", "--json", "--no-fs-aware"].map(Path::new);
        let output = run(words.into_iter().chain([&*path]));
        assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
        crate::common::assert_clean(&path);
    }
    rig.serve(options);
    for (name, guest) in files.iter().zip(&users) {
        let disk = open(&rig.shown(name)).unwrap();
        guest.check_disk(&disk, After::Kill).unwrap();
    }
    rig.unmount();
}
