//! Other users, their files, and what they may try.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{
    Mount, NOBODY, as_user, assert_clean, copy_program, create, errno, eventually, exit_code, json,
    run, stderr, vhdfs,
};
use vhdfs::compact::IdlePolicy;
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::library::{Library, LibraryOptions, NodeId};

use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags, makedev, mknodat};
use rustix::io::Errno;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// What `acl(5)` has for a file whose group's digit says `mask`, with one named user.
fn set_list(path: &Path, named: (u32, u16), group: u16, mask: u16, other: u16) -> bool {
    let mut list = 2_u32.to_le_bytes().to_vec();
    let entries = [
        (1, 6, u32::MAX),
        (2, named.1, named.0),
        (4, group, u32::MAX),
        (0x10, mask, u32::MAX),
        (0x20, other, u32::MAX),
    ];
    for (tag, allowed, id) in entries {
        list.extend(u16::to_le_bytes(tag));
        list.extend(allowed.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let name = "system.posix_acl_access";
    rustix::fs::setxattr(path, name, &list, XattrFlags::empty()).is_ok()
}

fn may_read(path: &Path) -> bool {
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut [0]))
        .is_ok()
}

fn may_write(path: &Path) -> bool {
    File::options().write(true).open(path).is_ok()
}

#[test]
fn a_mount_gives_no_rights_that_the_files_do_not() {
    let files = [
        ("public.vhd", 0o644, 0, 0),
        ("writable.vhd", 0o666, 0, 0),
        ("private.vhd", 0o600, 0, 0),
        ("groups.vhd", 0o660, 0, 0),
        ("theirs.vhd", 0o600, NOBODY, 0),
        ("their_groups.vhdx", 0o640, 0, NOBODY),
        ("not_the_groups.vhdx", 0o604, 0, NOBODY),
        ("protected.vhd", 0o444, NOBODY, NOBODY),
        ("set_id.vhd", 0o4755, 0, 0),
        ("hidden/inner.vhd", 0o666, 0, 0),
        ("shown/inner.vhd", 0o644, 0, 0),
        ("denied_by_list.vhd", 0o664, 0, 0),
        ("mask_is_not_the_group.vhd", 0o660, 0, NOBODY),
    ];
    let mut has_lists = true;
    let mount = Mount::new(&["--no-compact"], |source| {
        for directory in ["hidden", "shown"] {
            fs::create_dir(source.join(directory)).unwrap();
        }
        for (name, mode, uid, gid) in files {
            let path = source.join(name);
            create(&path, &["--size", "8M"]);
            chown(&path, Some(uid), Some(gid)).unwrap();
            set_mode(&path, mode);
        }
        set_mode(&source.join("hidden"), 0o700);
        has_lists = set_list(&source.join("denied_by_list.vhd"), (NOBODY, 0), 4, 6, 4)
            && set_list(&source.join("mask_is_not_the_group.vhd"), (1, 6), 0, 6, 0);
    });
    let Some(mount) = mount else { return };
    mount.open_the_way();
    let look = |name: &str| {
        let shown = mount.at(&format!("{name}.raw"));
        let backing = mount.behind(name);
        let of = |path: &Path| (may_read(path), may_write(path));
        as_user(NOBODY, || (of(&shown), of(&backing)))
    };
    // Without --allow-other nobody else comes in.
    let Some((shown, backing)) = look("public.vhd") else {
        return;
    };
    assert_eq!((shown, backing), ((false, false), (true, false)));

    mount.unmount();
    mount.mount(&["--no-compact", "--allow-other"]);
    if !has_lists {
        println!("skipped: the file system has no access control lists");
    }
    for (name, ..) in files {
        let (shown, backing) = look(name).unwrap();
        assert_eq!(
            shown, backing,
            "{name}: reading and writing, shown and backing"
        );
        let mode = fs::metadata(mount.at(&format!("{name}.raw")))
            .unwrap()
            .mode();
        assert_eq!(mode & 0o7111, 0, "{name}");
    }
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let place = mount.mount_point();
    let line = table
        .lines()
        .find(|line| line.contains(place.to_str().unwrap()))
        .unwrap();
    assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
}

#[test]
fn a_child_shows_nobody_what_its_parent_does_not() {
    let mount = Mount::new(&["--no-compact", "--allow-other"], |source| {
        fs::create_dir(source.join("inner")).unwrap();
        create(&source.join("inner/base.vhdx"), &["--size", "8M"]);
        let child = source.join("child.vhdx");
        let base = source.join("inner/base.vhdx");
        create(&child, &["--parent", base.to_str().unwrap()]);
        chown(&child, Some(NOBODY), Some(NOBODY)).unwrap();
        set_mode(&base, 0o600);
    });
    let Some(mount) = mount else { return };
    mount.open_the_way();
    let shown = mount.at("child.vhdx.raw");
    let read = || as_user(NOBODY, || File::open(&shown).map(drop));
    let Some(refused) = read() else { return };
    assert_eq!(errno(refused), Errno::ACCESS.raw_os_error());
    assert_eq!(errno(read().unwrap()), Errno::ACCESS.raw_os_error());
    assert_eq!(
        mount.said("base.vhdx is not readable"),
        1,
        "{}",
        mount.log()
    );
    File::open(&shown).unwrap();
    set_mode(&mount.behind("inner/base.vhdx"), 0o644);
    read().unwrap().unwrap();
    // Its directory counts, too.
    set_mode(&mount.behind("inner"), 0o700);
    assert_eq!(errno(read().unwrap()), Errno::ACCESS.raw_os_error());
}

#[test]
fn strangers_are_told_no_names() {
    let mount = Mount::new(&["--no-compact", "--allow-other"], |source| {
        fs::create_dir(source.join("hidden")).unwrap();
        create(&source.join("hidden/secret.vhd"), &["--size", "8M"]);
        set_mode(&source.join("hidden"), 0o700);
    });
    let Some(mount) = mount else { return };
    mount.open_the_way();
    let _open = File::open(mount.at("hidden/secret.vhd.raw")).unwrap();
    assert!(mount.status("").to_string().contains("secret"));
    let Some(theirs) = as_user(NOBODY, || mount.status("")) else {
        return;
    };
    assert!(!theirs.to_string().contains("secret"), "{theirs}");
    assert_eq!(theirs["disks_open"], 1);
}

#[test]
fn only_plain_files_are_disks() {
    let mut socket = None;
    let special = |source: &Path, socket: &mut Option<UnixListener>| {
        let rw = Mode::from_raw_mode(0o666);
        mknodat(CWD, source.join("fifo.vhd"), FileType::Fifo, rw, 0).unwrap();
        *socket = Some(UnixListener::bind(source.join("socket.vhdx")).unwrap());
        // Not everybody may make these.
        let null = makedev(1, 3);
        let _ = mknodat(
            CWD,
            source.join("device.vhd"),
            FileType::CharacterDevice,
            rw,
            null,
        );
        symlink("/etc/passwd", source.join("link.vhd")).unwrap();
        symlink("a.vhd", source.join("inside.vhd")).unwrap();
        symlink("/nowhere", source.join("dangling.vhdx")).unwrap();
        symlink("/etc", source.join("directory")).unwrap();
    };
    let mount = Mount::new(&["--idle-after", "0s"], |source| {
        create(&source.join("a.vhd"), &["--size", "8M"]);
        special(source, &mut socket);
    });
    let Some(mount) = mount else { return };
    assert_eq!(mount.names(""), ["a.vhd.raw"]);
    for name in [
        "fifo.vhd",
        "socket.vhdx",
        "device.vhd",
        "link.vhd",
        "inside.vhd",
        "dangling.vhdx",
    ] {
        let shown = mount.at(&format!("{name}.raw"));
        assert_eq!(
            errno(File::open(shown)),
            Errno::NOENT.raw_os_error(),
            "{name}"
        );
    }
    assert!(!mount.at("directory").exists() && !mount.at("directory/passwd").exists());
    // One that comes later, in the place of a disk that the kernel knows.
    let shown = mount.at("a.vhd.raw");
    assert_eq!(fs::metadata(&shown).unwrap().len(), 8 << 20);
    for name in ["fifo.vhd", "link.vhd", "device.vhd"] {
        if fs::rename(mount.behind(name), mount.behind("a.vhd")).is_ok() {
            assert!(File::open(&shown).is_err(), "{name}");
        }
    }
    // Nor is a link followed that a directory has become.
    fs::create_dir(mount.behind("sub")).unwrap();
    create(&mount.behind("sub/b.vhd"), &["--size", "8M"]);
    assert!(may_read(&mount.at("sub/b.vhd.raw")));
    let elsewhere = mount.source().with_file_name("elsewhere");
    fs::rename(mount.behind("sub"), &elsewhere).unwrap();
    symlink(&elsewhere, mount.behind("sub")).unwrap();
    assert!(File::open(mount.at("sub/b.vhd.raw")).is_err());
    mount.unmount();
}

#[test]
fn a_fifo_does_not_hang_a_command() {
    let root = tempfile::tempdir().unwrap();
    let fifo = root.path().join("x.vhd");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    let fifo = fifo.to_str().unwrap();
    let backup = root.path().join("none");
    for arguments in [
        &["info"][..],
        &["check"],
        &["check", "--repair", "--backup"],
        &["check", "--restore", backup.to_str().unwrap()],
        &["check", "--restore", fifo],
        &["compact"],
        &["map"],
        &["create", "--size", "8M"],
    ] {
        let mut child = vhdfs();
        child
            .args(arguments)
            .arg(fifo)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = child.spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let code = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.code();
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("{arguments:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(code, Some(1), "{arguments:?}");
    }
    // Nobody reads it: a writer finds no other end.
    let flags = OFlags::WRONLY | OFlags::NONBLOCK;
    let alone = rustix::fs::open(fifo, flags, Mode::empty());
    assert_eq!(alone.unwrap_err(), Errno::NXIO);
}

/// What a guest may write to make its disk look like another one: a VHD's footer and a VHDX's start.
fn forgeries(root: &Path) -> Vec<Vec<u8>> {
    let (vhd, vhdx) = (root.join("forged.vhd"), root.join("forged.vhdx"));
    create(&vhd, &["--size", "64M"]);
    create(&vhdx, &["--size", "64M"]);
    let vhd = fs::read(vhd).unwrap();
    let mut vhdx = fs::read(vhdx).unwrap();
    vhdx.truncate(4 << 20);
    vec![vhd[vhd.len() - 512..].to_vec(), vhd, vhdx]
}

#[test]
fn a_guest_that_forges_headers_changes_nothing() {
    const LEN: u64 = 16 << 20;
    let disks = [
        ("dynamic.vhd", "dynamic"),
        ("fixed.vhd", "fixed"),
        ("dynamic.vhdx", "dynamic"),
        ("fixed.vhdx", "fixed"),
    ];
    let mount = Mount::new(&["--idle-after", "0s"], |source| {
        for (name, kind) in disks {
            create(&source.join(name), &["--size", "16M", "--type", kind]);
        }
    });
    let Some(mount) = mount else { return };
    let facts = |name: &str| {
        let info = json(&run([
            "info",
            "--json",
            mount.behind(name).to_str().unwrap(),
        ]));
        ["format", "type", "virtual_size", "identity", "block_size"].map(|key| info[key].clone())
    };
    let root = tempfile::tempdir().unwrap();
    for (name, _) in disks {
        let shown = mount.at(&format!("{name}.raw"));
        let before = facts(name);
        for forged in forgeries(root.path()) {
            for at in [0, LEN - u64::try_from(forged.len()).unwrap()] {
                let file = File::options().read(true).write(true).open(&shown).unwrap();
                file.write_all_at(&forged, at).unwrap();
                file.sync_all().unwrap();
                drop(file);
                mount.unmount();
                // The identity of a VHDX changes with its content.
                let (now, kept) = (facts(name), if name.ends_with('x') { 3 } else { 5 });
                assert_eq!(now[..kept], before[..kept], "{name} {at:#x}");
                assert_clean(&mount.behind(name));
                mount.mount(&["--idle-after", "0s"]);
                assert_eq!(fs::metadata(&shown).unwrap().len(), LEN, "{name} {at:#x}");
                let mut found = vec![0; forged.len()];
                File::open(&shown)
                    .unwrap()
                    .read_exact_at(&mut found, at)
                    .unwrap();
                assert!(found == forged, "{name} {at:#x}");
            }
        }
        for forged in ["forged.vhd", "forged.vhdx"] {
            let _ = fs::remove_file(root.path().join(forged));
        }
    }
}

/// Whether a terminal or a reader of the log could be deceived by it.
fn deceives(text: &str) -> bool {
    text.contains(['\u{1b}', '\u{202e}', '\u{9b}'])
}

#[test]
fn names_do_nothing_to_a_terminal_or_a_log() {
    let evil = "a\u{1b}[2J\u{202e}\u{9b}b\nforged: clean";
    let mount = Mount::new(&[], |source| {
        fs::write(source.join(format!("{evil}.vhd")), [7; 9000]).unwrap();
        let parent = source.join(format!("{evil}-p.vhd"));
        create(&parent, &["--size", "8M"]);
        create(
            &source.join(format!("{evil}-c.vhd")),
            &["--parent", parent.to_str().unwrap()],
        );
        fs::remove_file(parent).unwrap();
    });
    let Some(mount) = mount else { return };
    for name in mount.names("") {
        assert!(File::open(mount.at(&name)).is_err());
    }
    mount.unmount();
    assert!(
        mount.log().contains("\\u{1b}[2J\\u{202e}"),
        "{}",
        mount.log()
    );
    assert!(!deceives(&mount.log()), "{}", mount.log());
    assert!(!mount.log().lines().any(|line| line.starts_with("forged")));
    for command in ["info", "check", "compact", "map"] {
        for name in [format!("{evil}.vhd"), format!("{evil}-c.vhd")] {
            let output = run([Path::new(command), &mount.behind(&name)]);
            let text = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("\\u{1b}[2J\\u{202e}"), "{command}: {text:?}");
            assert!(!deceives(&text), "{command}: {text:?}");
            assert!(
                !text.lines().any(|line| line.starts_with("forged")),
                "{command}: {text:?}"
            );
        }
    }
}

#[test]
fn commands_of_a_stranger_change_nothing() {
    let root = tempfile::tempdir().unwrap();
    set_mode(root.path(), 0o777);
    let binary = root.path().join("vhdfs");
    copy_program(&binary);
    let disk = root.path().join("a.vhd");
    create(&disk, &["--size", "64M"]);
    set_mode(&disk, 0o644);
    // Something to repair.
    let file = File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&[0; 512], 0).unwrap();
    drop(file);
    let before = fs::read(&disk).unwrap();
    let as_nobody = |arguments: &[&str]| -> Option<i32> {
        let mut command = Command::new(&binary);
        command.args(arguments).arg(&disk).current_dir(root.path());
        let output = as_user(NOBODY, move || command.output().unwrap())?;
        Some(exit_code(&output))
    };
    let Some(found) = as_nobody(&["check"]) else {
        return;
    };
    assert_eq!(found, 1, "what they may read they may check");
    for arguments in [
        &["check", "--repair"][..],
        &["check", "--repair", "--backup"],
        &["compact"],
        &["create", "--size", "8M"],
    ] {
        assert_eq!(as_nobody(arguments), Some(1), "{arguments:?}");
        assert!(fs::read(&disk).unwrap() == before, "{arguments:?}");
    }
    assert_eq!(
        fs::read_dir(root.path()).unwrap().count(),
        2,
        "no backup is left"
    );
    // A backup may hold what was deleted: it is for who made it.
    assert_eq!(
        exit_code(&run([
            "check",
            "--repair",
            "--backup",
            disk.to_str().unwrap()
        ])),
        0
    );
    let backup = root.path().join("a.vhd.backup");
    assert_eq!(fs::metadata(&backup).unwrap().mode() & 0o7777, 0o600);
    let read = as_user(NOBODY, || fs::read(&backup)).unwrap();
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(
        exit_code(&run([
            Path::new("check"),
            Path::new("--restore"),
            &backup,
            &disk
        ])),
        0
    );
    assert!(fs::read(&disk).unwrap() == before);
}

/// A disk of nobody's: a file system whose free space is full, and a block of zeros behind it. In the same
/// directory lies a file that nobody but its owner can look into.
fn beside_a_closed_file() -> tempfile::TempDir {
    const FILE_SYSTEM: u64 = 64 << 20;
    let root = tempfile::tempdir().unwrap();
    let (path, image) = (root.path().join("a.vhd"), root.path().join("image"));
    create(&path, &["--size", "66M"]);
    fs::File::create(&image)
        .unwrap()
        .set_len(FILE_SYSTEM)
        .unwrap();
    // In one group, whose inodes are few, so that all that is in use lies at its start.
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext2", "-b", "4096", "-N", "64"])
        .args(["-O", "^resize_inode"])
        .arg(&image);
    assert!(make.status().unwrap().success());
    let disk = Disk::open(&path, &OpenOptions::default()).unwrap();
    disk.write_at(&vec![7; 66 << 20], 0).unwrap();
    // All that a file system has which is that small and empty.
    disk.write_at(&fs::read(&image).unwrap()[..1 << 20], 0)
        .unwrap();
    disk.write_at(&vec![0; 2 << 20], FILE_SYSTEM).unwrap();
    disk.close().unwrap();
    drop(disk);
    fs::remove_file(image).unwrap();
    let closed = root.path().join("closed.vhd");
    create(&closed, &["--size", "8M"]);
    set_mode(&closed, 0);
    for place in [root.path(), &path] {
        chown(place, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    root
}

#[test]
fn what_may_be_a_child_keeps_what_is_free() {
    let root = beside_a_closed_file();
    let binary = root.path().join("vhdfs");
    copy_program(&binary);
    let (disk, closed) = (root.path().join("a.vhd"), root.path().join("closed.vhd"));
    let length = || fs::metadata(&disk).unwrap().len();
    let before = length();
    let mut command = Command::new(&binary);
    command.args(["compact", "--dry-run", "--json"]).arg(&disk);
    let Some(output) = as_user(NOBODY, move || command.output().unwrap()) else {
        return;
    };
    let reason = json(&output)["not_fs_aware"].to_string();
    assert!(
        reason.contains(closed.to_str().unwrap()) && reason.contains("cannot be read"),
        "{reason}"
    );

    let visit = |least: u64, no_other_children: bool| {
        let policy = IdlePolicy {
            idle_after: Duration::ZERO,
            min_reclaim: 1,
            punch_holes: false,
            fs_aware: true,
            ..IdlePolicy::default()
        };
        let options = LibraryOptions {
            compact: Some(policy),
            no_other_children,
            quiet_time: Duration::ZERO,
            ..LibraryOptions::default()
        };
        let library = as_user(NOBODY, || Library::open(root.path(), options).unwrap()).unwrap();
        eventually("a visit", || {
            length() < before - least && library.status().is_empty()
        });
        library.close();
    };
    // The block of zeros goes.
    visit(0, false);
    assert!(length() > before - (4 << 20), "{before} -> {}", length());
    fs::remove_file(&closed).unwrap();
    visit(48 << 20, true);
}

/// The background looks once more right before it gives up what is free.
#[test]
fn a_child_that_comes_before_what_is_free_goes_keeps_it() {
    let root = beside_a_closed_file();
    fs::remove_file(root.path().join("closed.vhd")).unwrap();
    let path = root.path().join("a.vhd");
    let length = || fs::metadata(&path).unwrap().len();
    let policy = IdlePolicy {
        idle_after: Duration::from_millis(500),
        min_reclaim: 1,
        punch_holes: false,
        fs_aware: true,
        ..IdlePolicy::default()
    };
    let options = LibraryOptions {
        compact: Some(policy),
        no_other_children: true,
        quiet_time: Duration::ZERO,
        linger: Duration::ZERO,
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    let found = library.lookup(NodeId::ROOT, OsStr::new("a.vhd.raw"));
    let handle = library.open_disk(found.unwrap().node, true).unwrap();
    handle.disk().write_at(&[7; 512], 65 << 20).unwrap();
    handle.disk().flush().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let copy = elsewhere.path().join("a.vhd");
    fs::copy(&path, &copy).unwrap();
    let before = length();
    drop(handle);
    create(
        &root.path().join("child.vhd"),
        &["--parent", copy.to_str().unwrap()],
    );
    eventually("the end of the work", || library.status().is_empty());
    library.close();
    let (before, after) = (before >> 20, length() >> 20);
    assert!(after + 16 > before, "{before} MiB became {after}");
}
