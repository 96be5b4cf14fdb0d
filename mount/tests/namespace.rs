//! What a mount shows, and what it refuses.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use common::{Mount, create, errno, eventually};
use rustix::io::Errno;

fn sample() -> Option<Mount> {
    Mount::new(&[], |source| {
        create(&source.join("a.vhd"), &["--size", "64M"]);
        fs::create_dir(source.join("sub")).unwrap();
        create(&source.join("sub/b.AVHD"), &["--size", "8M"]);
        fs::write(source.join("notes.txt"), "not shown").unwrap();
        symlink("a.vhd", source.join("link.vhd")).unwrap();
    })
}

#[test]
fn disks_come_and_go_with_the_directory() {
    let Some(mount) = sample() else { return };
    assert_eq!(mount.names(""), ["a.vhd.raw", "sub"]);
    assert_eq!(mount.names("sub"), ["b.AVHD.raw"]);
    assert_eq!(
        fs::metadata(mount.at("sub/b.AVHD.raw")).unwrap().len(),
        8 << 20
    );

    create(&mount.behind("sub/new.vhd"), &["--size", "1G"]);
    assert_eq!(mount.names("sub"), ["b.AVHD.raw", "new.vhd.raw"]);
    fs::rename(mount.behind("sub/new.vhd"), mount.behind("moved.vhd")).unwrap();
    assert!(!mount.at("sub/new.vhd.raw").exists());
    assert_eq!(
        fs::metadata(mount.at("moved.vhd.raw")).unwrap().len(),
        1 << 30
    );
    fs::remove_file(mount.behind("moved.vhd")).unwrap();
    assert!(!mount.at("moved.vhd.raw").exists());
    fs::create_dir(mount.behind("sub/deep")).unwrap();
    assert!(mount.at("sub/deep").is_dir());
    mount.unmount();
}

#[test]
fn another_file_under_the_same_name_is_another_disk() {
    let Some(mount) = sample() else { return };
    let shown = mount.at("a.vhd.raw");
    fs::OpenOptions::new().write(true).open(&shown).unwrap();
    let old = File::open(&shown).unwrap();
    assert_eq!(
        fs::read(&shown).unwrap().len(),
        64 << 20,
        "now the kernel has all of it cached"
    );
    // Made elsewhere, with other content, and moved over.
    let other = mount.behind("other.vhd");
    create(&other, &["--size", "64M"]);
    let writer = File::options()
        .write(true)
        .open(mount.at("other.vhd.raw"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&writer, b"other", 0).unwrap();
    drop(writer);
    eventually("unused disks are closed", || {
        mount.status("other.vhd.raw")["state"] == "closed"
    });
    fs::rename(&other, mount.behind("a.vhd")).unwrap();
    assert_eq!(&fs::read(&shown).unwrap()[..5], b"other");
    let mut first = [9; 5];
    std::os::unix::fs::FileExt::read_exact_at(&old, &mut first, 0).unwrap();
    assert_eq!(first, [0; 5], "the open one is still the old disk");
}

#[test]
fn attributes_are_the_backing_files() {
    let Some(mount) = sample() else { return };
    let (shown, backing) = (mount.at("a.vhd.raw"), mount.behind("a.vhd"));
    fs::set_permissions(&backing, fs::Permissions::from_mode(0o751)).unwrap();
    let (of_shown, of_backing) = (
        fs::metadata(&shown).unwrap(),
        fs::metadata(&backing).unwrap(),
    );
    assert_eq!(of_shown.len(), 64 << 20);
    assert_eq!(of_shown.blocks(), of_backing.blocks());
    assert_eq!(of_shown.mode() & 0o7777, 0o640);
    assert_eq!(
        (of_shown.uid(), of_shown.gid()),
        (of_backing.uid(), of_backing.gid())
    );
    assert_eq!(of_shown.modified().unwrap(), of_backing.modified().unwrap());

    let sizes = |path: &std::path::Path| rustix::fs::statvfs(path).unwrap();
    assert_eq!(
        sizes(&mount.mount_point()).f_blocks,
        sizes(&mount.source()).f_blocks
    );
}

#[test]
fn what_cannot_be_opened_is_listed_and_logged_once() {
    let Some(mount) = sample() else { return };
    fs::write(mount.behind("bad.vhd"), vec![7; 10_000]).unwrap();
    for _ in 0..3 {
        assert_eq!(
            fs::metadata(mount.at("bad.vhd.raw")).unwrap().mode() & 0o7777,
            0
        );
        assert_eq!(
            errno(File::open(mount.at("bad.vhd.raw"))),
            Errno::IO.raw_os_error()
        );
    }
    let lines = mount
        .log()
        .lines()
        .filter(|line| line.contains("bad.vhd"))
        .count();
    assert_eq!(lines, 1, "{}", mount.log());
    assert!(File::open(mount.at("a.vhd.raw")).is_ok(), "the others work");
}

#[test]
fn a_write_protected_file_is_read_only() {
    let Some(mount) = sample() else { return };
    fs::set_permissions(mount.behind("a.vhd"), fs::Permissions::from_mode(0o444)).unwrap();
    let shown = mount.at("a.vhd.raw");
    assert_eq!(fs::metadata(&shown).unwrap().mode() & 0o7777, 0o444);
    let refused = errno(File::options().write(true).open(&shown));
    assert_eq!(refused, Errno::ACCESS.raw_os_error());
    assert_eq!(fs::read(&shown).unwrap().len(), 64 << 20);
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let mount = Mount::new(&["--read-only"], |source| {
        create(&source.join("a.vhd"), &["--size", "64M"]);
    });
    let Some(mount) = mount else { return };
    let before = fs::metadata(mount.behind("a.vhd")).unwrap();
    assert_eq!(fs::read(mount.at("a.vhd.raw")).unwrap().len(), 64 << 20);
    let refused = errno(File::options().write(true).open(mount.at("a.vhd.raw")));
    assert_eq!(refused, Errno::ROFS.raw_os_error());
    mount.unmount();
    let after = fs::metadata(mount.behind("a.vhd")).unwrap();
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
}

#[test]
fn a_disk_in_use_elsewhere_is_busy() {
    if !common::has("qemu-io") {
        return;
    }
    let Some(mount) = sample() else { return };
    // Ours while a guest has it, and free again soon after.
    let held = File::options()
        .write(true)
        .open(mount.at("a.vhd.raw"))
        .unwrap();
    let other = || {
        let mut command = Command::new("qemu-img");
        command
            .args(["info", "-f", "vpc"])
            .arg(mount.behind("a.vhd"))
            .output()
            .unwrap()
    };
    assert!(
        !other().status.success(),
        "qemu-img refuses what we have open"
    );
    drop(held);
    eventually("qemu-img gets it", || other().status.success());
}

#[test]
fn the_namespace_cannot_be_changed() {
    let Some(mount) = sample() else { return };
    let eperm = Errno::PERM.raw_os_error();
    let (disk, new) = (mount.at("a.vhd.raw"), mount.at("new.vhd.raw"));
    assert_eq!(errno(File::create_new(&new)), eperm, "create");
    assert_eq!(errno(fs::create_dir(mount.at("dir"))), eperm, "mkdir");
    assert_eq!(errno(fs::remove_file(&disk)), eperm, "unlink");
    assert_eq!(errno(fs::remove_dir(mount.at("sub"))), eperm, "rmdir");
    assert_eq!(errno(fs::rename(&disk, &new)), eperm, "rename");
    assert_eq!(errno(fs::hard_link(&disk, &new)), eperm, "link");
    assert_eq!(errno(symlink(&disk, &new)), eperm, "symlink");
    assert_eq!(errno(File::create(&disk)), eperm, "O_TRUNC");
    let file = File::options().write(true).open(&disk).unwrap();
    assert_eq!(errno(file.set_len(1)), eperm, "shrink");
    assert_eq!(errno(file.set_len(1 << 40)), eperm, "grow");
    file.set_len(64 << 20).unwrap();
    let mode = fs::Permissions::from_mode(0o600);
    assert_eq!(errno(fs::set_permissions(&disk, mode)), eperm, "chmod");
    assert_eq!(fs::metadata(&disk).unwrap().len(), 64 << 20);
    assert_eq!(
        errno(fs::metadata(mount.at("none"))),
        Errno::NOENT.raw_os_error()
    );
}

#[test]
fn thousands_of_disks_are_listed_quickly() {
    let mount = Mount::new(&["--no-compact"], |source| {
        create(&source.join("0.vhd"), &["--size", "1G"]);
        for n in 1..5000 {
            fs::copy(source.join("0.vhd"), source.join(format!("{n}.vhd"))).unwrap();
        }
    });
    let Some(mount) = mount else { return };
    for _ in 0..2 {
        let begun = std::time::Instant::now();
        let mut count = 0;
        for entry in fs::read_dir(mount.mount_point()).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().len(), 1 << 30);
            count += 1;
        }
        let took = begun.elapsed();
        println!("{count} disks in {took:?}");
        assert_eq!(count, 5000);
        assert!(took < std::time::Duration::from_secs(5), "{took:?}");
    }
}

#[test]
fn a_directory_is_gone_on_with_wherever_the_reader_was() {
    let Some(mount) = sample() else { return };
    for n in 0..2000 {
        fs::write(mount.behind(&format!("sub/{n:0100}.vhd")), []).unwrap();
    }
    let directory = File::open(mount.at("sub")).unwrap();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    // The next few names, with where to go on behind each.
    let mut next = || {
        let mut reader = rustix::fs::RawDir::new(&directory, &mut buffer);
        let mut found = Vec::new();
        while let Some(entry) = reader.next() {
            let entry = entry.unwrap();
            found.push((entry.next_entry_cookie(), entry.file_name().to_owned()));
            if reader.is_buffer_empty() {
                break;
            }
        }
        found
    };
    let go_to = |cookie| rustix::fs::seek(&directory, rustix::fs::SeekFrom::Start(cookie)).unwrap();
    let first = next();
    assert!(first.len() > 8 && first[0].1.as_bytes() == b".");
    // Some go, among them the one that the reader stands behind, and some come.
    let mut seen: Vec<_> = first[..8].iter().map(|(_, name)| name.clone()).collect();
    for gone in &seen[4..] {
        let name = gone.to_str().unwrap().trim_end_matches(".raw");
        fs::remove_file(mount.behind(&format!("sub/{name}"))).unwrap();
    }
    fs::write(mount.behind("sub/new.vhd"), []).unwrap();
    go_to(first[7].0);
    loop {
        let more = next();
        if more.is_empty() {
            break;
        }
        seen.extend(more.into_iter().map(|(_, name)| name));
    }
    let listed = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), listed, "once each");
    seen.retain(|name| name.as_bytes() != b"new.vhd.raw");
    assert_eq!(seen.len(), 2 + 1 + 2000);
    go_to(0);
    assert_eq!(next()[0].1.as_bytes(), b".");
}

#[test]
fn open_directories_take_no_memory() {
    let Some(mount) = sample() else { return };
    for n in 0..3000 {
        fs::write(mount.behind(&format!("sub/{n:0200}.vhd")), []).unwrap();
    }
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: u64 = line
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        kib * 1024
    };
    assert_eq!(mount.names("sub").len(), 3001);
    let before = resident();
    let open: Vec<_> = (0..150)
        .map(|_| {
            let mut entries = fs::read_dir(mount.at("sub")).unwrap();
            entries.next().unwrap().unwrap();
            entries
        })
        .collect();
    let more = resident() - before;
    assert!(more < 32 << 20, "{} directories: {more} bytes", open.len());
}
