//! Tests of the library on real directories.

#[cfg(unix)]
mod hung;
#[cfg(target_os = "linux")]
mod others;
#[cfg(windows)]
mod windows;

use std::ffi::OsStr;
use std::fs;
use std::num::NonZeroUsize;
#[cfg(unix)]
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::compact::IdlePolicy;
use crate::create::{CreateOptions, create};
use crate::storage::host::{HostFile, HostOptions};

const SIZE: u64 = 8 << 20;

fn make_disk(path: &Path) {
    let options = CreateOptions {
        block_size: Some(2 << 20),
        ..CreateOptions::dynamic(SIZE)
    };
    create(path, &options).unwrap();
}

/// A directory with `a.vhd` and `sub/b.VHD`.
fn sample() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    make_disk(&root.path().join("a.vhd"));
    fs::create_dir(root.path().join("sub")).unwrap();
    make_disk(&root.path().join("sub/b.VHD"));
    root
}

fn open(root: &TempDir) -> Library {
    Library::open(root.path(), LibraryOptions::default()).unwrap()
}

fn entries(directory: &Directory) -> Vec<Entry> {
    let mut entries = Vec::new();
    let read = directory.read(&mut |entry| {
        entries.push(entry);
        ControlFlow::Continue(())
    });
    read.unwrap();
    entries
}

fn names(library: &Library, node: NodeId) -> Vec<String> {
    let entries = entries(&library.directory(node).unwrap()).into_iter();
    let names = entries.map(|e| e.name.to_string_lossy().into_owned());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// Whether it is shown as a file that may be written.
pub(super) fn is_writable(shown: &Attributes) -> bool {
    #[cfg(unix)]
    return shown.mode & 0o222 != 0;
    #[cfg(windows)]
    return shown.file_attributes & 1 == 0;
}

fn lookup(library: &Library, name: &str) -> Attributes {
    library.lookup(NodeId::ROOT, OsStr::new(name)).unwrap()
}

/// Waits until that is so.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn shows_disks_and_directories_alone() {
    let root = sample();
    fs::write(root.path().join("notes.txt"), "x").unwrap();
    fs::write(root.path().join("c.vhdx.txt"), "x").unwrap();
    #[cfg(unix)]
    symlink("a.vhd", root.path().join("link.vhd")).unwrap();
    #[cfg(unix)]
    symlink("/", root.path().join("everything")).unwrap();
    fs::create_dir(root.path().join("a.vhd.raw")).unwrap();
    let library = open(&root);

    assert_eq!(names(&library, NodeId::ROOT), ["a.vhd.raw", "sub"]);
    let sub = lookup(&library, "sub");
    assert_eq!(sub.kind, NodeKind::Directory);
    assert_eq!(names(&library, sub.node), ["b.VHD.raw"]);
    assert_eq!(
        lookup(&library, "a.vhd.raw").kind,
        NodeKind::Disk,
        "the disk hides the directory"
    );

    for name in [
        "a.vhd",
        "link.vhd",
        "link.vhd.raw",
        "everything",
        "notes.txt",
        "c.vhdx.txt",
        "..",
    ] {
        let found = library.lookup(NodeId::ROOT, OsStr::new(name));
        assert!(
            matches!(found, Err(LibraryError::NotFound { .. })),
            "{name}: {found:?}"
        );
    }
}

#[test]
fn follows_changes_of_the_directory() {
    let root = sample();
    let library = open(&root);
    let before = lookup(&library, "a.vhd.raw");

    make_disk(&root.path().join("new.vhd"));
    assert_eq!(
        names(&library, NodeId::ROOT),
        ["a.vhd.raw", "new.vhd.raw", "sub"]
    );

    fs::rename(root.path().join("a.vhd"), root.path().join("z.vhd")).unwrap();
    assert_eq!(
        names(&library, NodeId::ROOT),
        ["new.vhd.raw", "sub", "z.vhd.raw"]
    );
    assert_eq!(
        lookup(&library, "z.vhd.raw").node,
        before.node,
        "the file is the same"
    );

    fs::remove_file(root.path().join("new.vhd")).unwrap();
    let gone = library.lookup(NodeId::ROOT, OsStr::new("new.vhd.raw"));
    assert!(matches!(gone, Err(LibraryError::NotFound { .. })));
}

// Under Wine a file's number is at once another's; NTFS counts how often it was used.
#[cfg(unix)]
#[test]
fn a_replaced_file_is_another_node() {
    let root = sample();
    let library = open(&root);
    let path = root.path().join("a.vhd");
    let before = lookup(&library, "a.vhd.raw");
    fs::remove_file(&path).unwrap();
    make_disk(&path);
    assert!(matches!(
        library.attributes(before.node),
        Err(LibraryError::Stale { .. })
    ));
    assert!(matches!(
        library.open_disk(before.node, false),
        Err(LibraryError::Stale { .. })
    ));
    assert_ne!(lookup(&library, "a.vhd.raw").node, before.node);
}

#[cfg(unix)]
#[test]
fn attributes_come_from_the_backing_file() {
    let root = sample();
    let library = open(&root);
    let path = root.path().join("a.vhd");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751)).unwrap();
    let host = fs::metadata(&path).unwrap();
    let shown = lookup(&library, "a.vhd.raw");
    assert_eq!(shown.size, SIZE);
    assert_eq!(shown.allocated, host.blocks() * 512);
    assert_eq!((shown.uid, shown.gid), (host.uid(), host.gid()));
    assert_eq!(shown.modified, host.modified().unwrap());
    assert_eq!(shown.mode, 0o640, "no executable and no set-id bits");

    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    assert_eq!(lookup(&library, "a.vhd.raw").mode, 0o444);
    let refused = library.open_disk(shown.node, true);
    assert!(
        matches!(refused, Err(LibraryError::ReadOnly { .. })),
        "{refused:?}"
    );
    assert!(
        library
            .open_disk(shown.node, false)
            .unwrap()
            .disk()
            .is_read_only()
    );
}

#[test]
fn a_read_only_library_has_nothing_to_write() {
    let root = sample();
    let options = LibraryOptions {
        read_only: true,
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    let disk = lookup(&library, "a.vhd.raw");
    assert!(!is_writable(&disk));
    assert!(matches!(
        library.open_disk(disk.node, true),
        Err(LibraryError::ReadOnly { .. })
    ));
    assert!(library.open_disk(disk.node, false).is_ok());
}

#[test]
fn what_is_no_disk_is_listed_without_permissions() {
    let root = sample();
    fs::write(root.path().join("broken.vhd"), vec![1; 4096]).unwrap();
    let library = open(&root);
    let shown = lookup(&library, "broken.vhd.raw");
    assert_eq!(shown.size, 0);
    #[cfg(unix)]
    assert_eq!(shown.mode, 0);
    assert!(!is_writable(&shown));
    let refused = library.open_disk(shown.node, false);
    assert!(
        matches!(refused, Err(LibraryError::Unopenable { .. })),
        "{refused:?}"
    );
    // Made good, it is looked at again.
    fs::remove_file(root.path().join("broken.vhd")).unwrap();
    // Under Wine the name stays while somebody looks at the file.
    eventually("it is gone", || {
        !root.path().join("broken.vhd").try_exists().unwrap_or(true)
    });
    make_disk(&root.path().join("broken.vhd"));
    assert_eq!(lookup(&library, "broken.vhd.raw").size, SIZE);
}

#[test]
fn handles_and_hard_links_share_one_disk() {
    let root = sample();
    fs::hard_link(root.path().join("a.vhd"), root.path().join("twin.vhd")).unwrap();
    let library = open(&root);
    let (one, two) = (
        lookup(&library, "a.vhd.raw"),
        lookup(&library, "twin.vhd.raw"),
    );
    assert_eq!(one.node, two.node);
    #[cfg(unix)]
    assert_eq!(one.links, 2);
    let writer = library.open_disk(one.node, true).unwrap();
    let reader = library.open_disk(two.node, false).unwrap();
    assert!(writer.is_writable() && !reader.is_writable());
    writer.disk().write_at(b"hello", 1000).unwrap();
    let mut buffer = [0; 5];
    reader.disk().read_at(&mut buffer, 1000).unwrap();
    assert_eq!(&buffer, b"hello");
    assert_eq!(library.status().len(), 1);
    assert_eq!(library.disk_status(one.node).unwrap().handles, 2);
}

// Windows refuses to delete what a writer has open: see below.
#[cfg(unix)]
#[test]
fn a_deleted_disk_works_on_for_its_handles() {
    let root = sample();
    let library = open(&root);
    let disk = lookup(&library, "a.vhd.raw");
    let handle = library.open_disk(disk.node, true).unwrap();
    fs::remove_file(root.path().join("a.vhd")).unwrap();
    handle.disk().write_at(b"still", 0).unwrap();
    let shown = library.attributes(disk.node).unwrap();
    assert_eq!((shown.size, shown.links), (SIZE, 0));
    drop(handle);
    assert_eq!(library.close(), 0);
}

#[test]
fn content_is_kept_until_somebody_else_writes() {
    let root = sample();
    let path = root.path().join("a.vhd");
    let options = LibraryOptions {
        linger: Duration::ZERO,
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    let node = lookup(&library, "a.vhd.raw").node;
    let reopen = || {
        eventually("an unused disk is closed", || library.status().is_empty());
        library.open_disk(node, true).unwrap()
    };
    let first = reopen();
    assert!(!first.content_is_kept());
    first.disk().write_at(b"ours", 4096).unwrap();
    assert!(library.open_disk(node, false).unwrap().content_is_kept());
    drop(first);
    drop(reopen());
    assert!(reopen().content_is_kept(), "closed and opened again");
    eventually("its lock is given back", || {
        HostFile::open(&path, &HostOptions::default()).is_ok()
    });
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(SystemTime::now())
        .unwrap();
    assert!(!reopen().content_is_kept(), "touched in between");
}

#[test]
fn unused_disks_make_room() {
    let root = tempfile::tempdir().unwrap();
    let options = LibraryOptions {
        max_open: NonZeroUsize::new(2).unwrap(),
        linger: Duration::from_secs(3600),
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    let open = |n: usize| {
        let name = format!("{n}.vhd");
        make_disk(&root.path().join(&name));
        library
            .open_disk(lookup(&library, &(name + ".raw")).node, true)
            .unwrap()
    };
    let kept = open(0);
    for n in 1..5 {
        drop(open(n));
    }
    let paths: Vec<_> = library
        .status()
        .into_iter()
        .map(|status| status.path)
        .collect();
    assert_eq!(paths, [PathBuf::from("4.vhd"), PathBuf::from("0.vhd")]);
    let more: Vec<_> = (5..9).map(open).collect();
    assert_eq!(library.status().len(), 5, "disks in use are never closed");
    kept.disk().write_at(b"x", 0).unwrap();
    drop(more);
}

#[test]
fn a_disk_in_use_elsewhere_is_refused_and_free_again_after_a_while() {
    let root = sample();
    let options = LibraryOptions {
        linger: Duration::ZERO,
        ..LibraryOptions::default()
    };
    let (ours, theirs) = (
        Library::open(root.path(), options.clone()).unwrap(),
        Library::open(root.path(), options).unwrap(),
    );
    let node = lookup(&ours, "a.vhd.raw").node;
    let handle = theirs
        .open_disk(lookup(&theirs, "a.vhd.raw").node, true)
        .unwrap();
    match ours.open_disk(node, true) {
        Err(LibraryError::Unopenable {
            kind: crate::error::ErrorKind::InUse,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(lookup(&ours, "a.vhd.raw").size, SIZE, "it is a sound disk");
    drop(handle);
    eventually("the lock is released", || {
        ours.open_disk(node, true).is_ok()
    });
}

#[test]
fn forgotten_nodes_are_gone_and_the_root_stays() {
    let root = sample();
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    assert_eq!(lookup(&library, "a.vhd.raw").node, node);
    library.forget(node, 1);
    assert!(library.attributes(node).is_ok());
    library.forget(node, 1);
    assert!(matches!(
        library.attributes(node),
        Err(LibraryError::Stale { .. })
    ));
    library.forget(NodeId::ROOT, 5);
    assert_eq!(
        library.attributes(NodeId::ROOT).unwrap().kind,
        NodeKind::Directory
    );
}

#[test]
fn a_closed_library_opens_nothing() {
    let root = sample();
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    let handle = library.open_disk(node, true).unwrap();
    assert_eq!(library.close(), 0);
    assert!(matches!(
        library.open_disk(node, false),
        Err(LibraryError::Closed)
    ));
    handle.disk().write_at(b"late", 0).unwrap();
    drop(handle);
    assert_eq!(library.close(), 0, "twice is fine");
}

#[test]
fn idle_work_visits_what_nobody_opened() {
    let root = sample();
    // Old enough not to be taken for one that is still being written.
    for name in ["a.vhd", "sub/b.VHD"] {
        let file = fs::File::options()
            .write(true)
            .open(root.path().join(name))
            .unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3600))
            .unwrap();
    }
    let policy = IdlePolicy {
        idle_after: Duration::ZERO,
        min_reclaim: 0,
        punch_holes: true,
        fs_aware: false,
        ..IdlePolicy::default()
    };
    let options = LibraryOptions {
        compact: Some(policy),
        quiet_time: Duration::ZERO,
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    // A guest gets its disk at any time.
    let node = lookup(&library, "a.vhd.raw").node;
    let handle = library.open_disk(node, true).unwrap();
    handle.disk().write_at(&[1; 4096], 0).unwrap();
    eventually("the disk settles", || {
        library
            .disk_status(node)
            .is_some_and(|status| status.state == DiskState::Compact)
    });
    drop(handle);
    eventually("all are closed again", || library.status().is_empty());
}

/// Whatever was waited for while it was only read: a guest that opens it for writing has it compacted.
#[test]
fn a_guest_does_not_wait_for_the_quiet_time_of_readers() {
    let root = sample();
    let policy = IdlePolicy {
        idle_after: Duration::from_millis(20),
        min_reclaim: 1,
        punch_holes: true,
        ..IdlePolicy::default()
    };
    let options = LibraryOptions {
        compact: Some(policy),
        quiet_time: Duration::from_secs(3600),
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    let node = lookup(&library, "a.vhd.raw").node;
    let reader = library.open_disk(node, false).unwrap();
    let state = || library.disk_status(node).map(|status| status.state);
    eventually("it waits", || state() == Some(DiskState::Waiting));
    let guest = library.open_disk(node, true).unwrap();
    guest.disk().write_at(&[1; 4096], 0).unwrap();
    eventually("it is compacted", || state() == Some(DiskState::Compact));
    drop((reader, guest));
}

#[test]
fn clocks_that_jump_do_not_matter() {
    let root = tempfile::tempdir().unwrap();
    // One of tomorrow, as of a clock that has been set back since, and one of long ago.
    let day = Duration::from_secs(24 * 3600);
    let times = [SystemTime::now() + day, SystemTime::UNIX_EPOCH + day];
    let names = ["tomorrow.vhd", "old.vhd", "written.vhd"];
    for name in names {
        make_disk(&root.path().join(name));
        let disk = Disk::open(
            &root.path().join(name),
            &crate::disk::OpenOptions::default(),
        )
        .unwrap();
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.write_at(&[0; 4096], 0).unwrap();
        disk.close().unwrap();
    }
    let stamp = |name: &str, time| {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(root.path().join(name));
        file.unwrap().set_modified(time).unwrap();
    };
    for (name, time) in names.iter().zip(times) {
        stamp(name, time);
    }
    let before = names.map(|name| fs::metadata(root.path().join(name)).unwrap().len());
    let policy = IdlePolicy {
        idle_after: Duration::from_secs(1),
        min_reclaim: 0,
        punch_holes: true,
        fs_aware: false,
        ..IdlePolicy::default()
    };
    let options = LibraryOptions {
        compact: Some(policy),
        quiet_time: Duration::ZERO,
        ..LibraryOptions::default()
    };
    let library = Library::open(root.path(), options).unwrap();
    let len = |n: usize| fs::metadata(root.path().join(names[n])).unwrap().len();
    let mut writes = 0;
    eventually("both are visited", || {
        // Somebody writes to the third all the time, whose clock says that it was long ago.
        writes += 1;
        stamp(names[2], times[1] + Duration::from_millis(writes));
        len(0) < before[0] && len(1) < before[1]
    });
    assert_eq!(len(2), before[2], "visited while it is written to");
    drop(library);
}

// Of the time that Wine takes nothing can be told.
#[cfg(unix)]
#[test]
fn lists_thousands_quickly() {
    let root = tempfile::tempdir().unwrap();
    make_disk(&root.path().join("0.vhd"));
    for n in 1..2000 {
        fs::copy(
            root.path().join("0.vhd"),
            root.path().join(format!("{n}.vhd")),
        )
        .unwrap();
    }
    let library = open(&root);
    for _ in 0..2 {
        let started = Instant::now();
        let directory = library.directory(NodeId::ROOT).unwrap();
        let entries = entries(&directory);
        for entry in &entries {
            assert_eq!(
                library.lookup_in(&directory, &entry.name).unwrap().size,
                SIZE
            );
        }
        let took = started.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
        println!("{} disks in {took:?}", entries.len());
    }
}
