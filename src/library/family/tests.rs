//! Tests of parents and children in a library.

use std::ffi::OsStr;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(unix)]
use std::time::SystemTime;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::super::DiskState;
use super::super::agent::Agent;
use super::super::{Attributes, DiskHandle, Library, LibraryError, LibraryOptions, NodeId};
use super::*;
use crate::compact::IdlePolicy;
use crate::disk::parents::builder::{make_child, make_disk};
use crate::error::ErrorKind;
use crate::storage::host::paths;

/// A directory with `base.vhd` and, below `sub`, its child `one.vhd` with the child `two.vhd`.
fn sample() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    make_disk(&at("base.vhd"));
    make_child(&at("sub/one.vhd"), &at("base.vhd"), r"..\base.vhd");
    make_child(&at("sub/two.vhd"), &at("sub/one.vhd"), r".\one.vhd");
    root
}

fn open(root: &TempDir) -> Library {
    open_with(root, LibraryOptions::default())
}

fn open_with(root: &TempDir, options: LibraryOptions) -> Library {
    Library::open(root.path(), options).unwrap()
}

fn find(library: &Library, name: &str) -> Attributes {
    let mut node = NodeId::ROOT;
    let mut names = name.split('/').peekable();
    loop {
        let name = names.next().unwrap();
        let shown = match names.peek() {
            Some(_) => name.to_owned(),
            None => format!("{name}.raw"),
        };
        let found = library.lookup(node, OsStr::new(&shown)).unwrap();
        if names.peek().is_none() {
            return found;
        }
        node = found.node;
    }
}

fn read(library: &Library, name: &str) -> DiskHandle {
    library.open_disk(find(library, name).node, false).unwrap()
}

fn write(library: &Library, name: &str) -> Result<DiskHandle, LibraryError> {
    library.open_disk(find(library, name).node, true)
}

fn writable(library: &Library, name: &str) -> bool {
    super::super::tests::is_writable(&find(library, name))
}

fn refused_for(library: &Library, name: &str) -> String {
    match write(library, name) {
        Err(LibraryError::ReadOnly { reason, .. }) => reason.replace('\\', "/"),
        other => panic!("{name}: {other:?}"),
    }
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_has_children_is_read_only() {
    let root = sample();
    let library = open(&root);
    assert!(
        refused_for(&library, "base.vhd")
            .contains("has children, which rely on its content: sub/one.vhd")
    );
    assert!(refused_for(&library, "sub/one.vhd").contains("sub/two.vhd"));
    assert!(!writable(&library, "base.vhd") && !writable(&library, "sub/one.vhd"));
    assert!(writable(&library, "sub/two.vhd"));
    let base = read(&library, "base.vhd");
    assert!(base.disk().is_read_only());

    let two = write(&library, "sub/two.vhd").unwrap();
    two.disk().write_at(b"two's own", 4096).unwrap();
    let status = library
        .disk_status(find(&library, "sub/two.vhd").node)
        .unwrap();
    assert_eq!(status.parent, Some(PathBuf::from("sub/one.vhd")));
    assert!(status.children.is_empty());
    let status = library
        .disk_status(find(&library, "base.vhd").node)
        .unwrap();
    assert_eq!(
        (status.parent, status.children),
        (None, vec![PathBuf::from("sub/one.vhd")])
    );
    let mut bytes = [1; 9];
    base.disk().read_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [0; 9]);
}

#[test]
fn children_that_come_and_go_are_noticed_before_each_opening_for_writing() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    make_disk(&at("base.vhd"));
    let library = open(&root);
    drop(write(&library, "base.vhd").unwrap());
    make_child(&at("new.vhd"), &at("base.vhd"), "base.vhd");
    assert!(refused_for(&library, "base.vhd").contains("new.vhd"));
    assert!(!writable(&library, "base.vhd"));
    // It lingers, open for writing, but gives way.
    assert!(library.status().iter().any(|disk| !disk.read_only));
    let child = read(&library, "new.vhd");
    drop(read(&library, "base.vhd"));
    let remove = || fs::remove_file(at("new.vhd"));
    if cfg!(windows) {
        // Which nobody can as long as it is open.
        assert!(remove().is_err());
        drop(child);
        eventually("closed", || remove().is_ok());
    } else {
        remove().unwrap();
        drop(child);
    }
    // As soon as the child that is gone is closed, and the parent's look at it with it.
    eventually("writable again", || write(&library, "base.vhd").is_ok());
    assert!(writable(&library, "base.vhd"));
}

#[test]
fn a_parent_that_is_written_and_a_child_exclude_each_other() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    make_disk(&at("base.vhd"));
    let library = open(&root);
    let writer = write(&library, "base.vhd").unwrap();
    make_child(&at("new.vhd"), &at("base.vhd"), "base.vhd");
    match library.open_disk(find(&library, "new.vhd").node, false) {
        Err(LibraryError::Unopenable {
            kind: ErrorKind::InUse,
            reason,
            ..
        }) => {
            assert!(reason.contains("base.vhd is open for writing"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    writer.disk().write_at(b"still works", 0).unwrap();
    drop(writer);
    let child = write(&library, "new.vhd").unwrap();
    let mut bytes = [0; 11];
    child.disk().read_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"still works");
    assert!(refused_for(&library, "base.vhd").contains("new.vhd"));
}

#[test]
fn parents_elsewhere_need_leave() {
    let root = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let base = elsewhere.path().join("base.vhd");
    make_disk(&base);
    let path = base.to_str().unwrap();
    make_child(&root.path().join("child.vhd"), &base, path);
    let library = open(&root);
    match library.open_disk(find(&library, "child.vhd").node, true) {
        Err(LibraryError::Unopenable {
            kind: ErrorKind::ParentMissing,
            reason,
            ..
        }) => {
            assert!(reason.contains("--parent-dir"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    // What is missing may come.
    fs::copy(&base, root.path().join("base.vhd")).unwrap();
    let child = read(&library, "child.vhd");
    let status = library
        .disk_status(find(&library, "child.vhd").node)
        .unwrap();
    assert_eq!(status.parent, Some(PathBuf::from("base.vhd")));
    drop(child);
    library.close();
    fs::remove_file(root.path().join("base.vhd")).unwrap();

    let options = LibraryOptions {
        parent_dirs: vec![elsewhere.path().to_owned()],
        ..LibraryOptions::default()
    };
    let library = open_with(&root, options);
    let _child = write(&library, "child.vhd").unwrap();
    let status = library
        .disk_status(find(&library, "child.vhd").node)
        .unwrap();
    assert_eq!(status.parent, Some(paths::canonical(&base).unwrap()));
    let options = LibraryOptions {
        parent_dirs: vec![PathBuf::from("/no/such/place")],
        ..LibraryOptions::default()
    };
    assert!(Library::open(root.path(), options).is_err());
}

// What background work gives back of a child are holes, which Wine does not have.
#[cfg(unix)]
#[test]
fn background_work_leaves_parents_alone() {
    let root = sample();
    let at = |name: &str| root.path().join(name);
    // Something to reclaim in each of them, were it not for the children.
    for name in ["base.vhd", "sub/two.vhd"] {
        let options = crate::disk::OpenOptions {
            punch_holes: false,
            ..Default::default()
        };
        let disk = crate::disk::Disk::open_with(
            &at(name),
            &options,
            &crate::disk::HostParents::beside(&at(name), &[root.path().to_owned()]),
        )
        .unwrap();
        disk.write_at(&vec![1; 4 << 20], 0).unwrap();
        disk.write_at(&vec![0; 3 << 20], 0).unwrap();
        drop(disk);
        let old = SystemTime::now() - Duration::from_secs(3600);
        let file = fs::File::options().write(true).open(at(name)).unwrap();
        file.set_modified(old).unwrap();
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
        linger: Duration::ZERO,
        ..LibraryOptions::default()
    };
    let before = fs::read(at("base.vhd")).unwrap();
    let modified = fs::metadata(at("base.vhd")).unwrap().modified().unwrap();
    let child = fs::metadata(at("sub/two.vhd")).unwrap().modified().unwrap();
    let library = open_with(&root, options);
    let base = read(&library, "base.vhd");
    eventually("the child is looked after", || {
        fs::metadata(at("sub/two.vhd")).unwrap().modified().unwrap() != child
    });
    eventually("and closed", || library.status().len() == 1);
    let status = library
        .disk_status(find(&library, "base.vhd").node)
        .unwrap();
    assert_eq!(status.state, DiskState::Open);
    drop(base);
    library.close();
    assert!(fs::read(at("base.vhd")).unwrap() == before);
    assert_eq!(
        fs::metadata(at("base.vhd")).unwrap().modified().unwrap(),
        modified
    );
}

/// A disk that gets a child while it is worked on: nothing is kept for the run that may not go on, and it is looked
/// again whether the child is gone.
#[test]
fn who_gets_a_child_is_left_alone_while_he_has_it() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    crate::create::create(
        &at("base.vhd"),
        &crate::create::CreateOptions::dynamic(64 << 20),
    )
    .unwrap();
    let disk = crate::disk::Disk::open(&at("base.vhd"), &Default::default()).unwrap();
    disk.write_at(&vec![1; 32 << 20], 0).unwrap();
    drop(disk);
    let policy = IdlePolicy {
        idle_after: Duration::from_secs(3600),
        min_reclaim: 0,
        ..IdlePolicy::default()
    };
    let options = LibraryOptions {
        compact: Some(policy),
        ..LibraryOptions::default()
    };
    let library = open_with(&root, options);
    let node = find(&library, "base.vhd").node;
    let handle = library.open_disk(node, true).unwrap();
    let state = || library.disk_status(node).unwrap().state;
    handle.disk().discard(0, 16 << 20).unwrap();
    let has_batch = || handle.disk().maintenance().has_moves();
    eventually("moves are under way", has_batch);
    assert_eq!(state(), DiskState::Compacting);
    make_child(&at("child.vhd"), &at("base.vhd"), r".\base.vhd");
    library.core.families.renew();
    eventually("it is left alone", || state() == DiskState::Open);
    assert!(!has_batch());
    let turn = *library.core.disks.all().pop().unwrap().turn.lock();
    assert!(turn.is_waiting());
}

/// Right before what is free goes it is looked once more, for a child that has come since the last survey.
#[test]
fn a_child_of_the_last_moment_is_seen() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    make_disk(&at("base.vhd"));
    let library = open(&root);
    let _base = read(&library, "base.vhd");
    let disk = library.core.disks.all().pop().unwrap();
    let policy = Some(IdlePolicy::default());
    let agent = Agent::new(library.core.clone(), policy, Duration::from_secs(1));
    let last_word = agent.last_word(&disk);
    assert!(last_word.may_go());
    make_child(&at("child.vhd"), &at("base.vhd"), r".\base.vhd");
    assert!(
        !agent.family().is_parent(&disk.identity),
        "not looked for yet"
    );
    assert!(!last_word.may_go());
}

#[test]
fn who_is_about_to_write_waits_until_the_deadline_or_the_end() {
    let root = sample();
    let library = open(&root);
    let core = &library.core;
    let bell = Arc::new(Bell::default());
    // Nobody looks.
    let families = Families::new(core.host.root().unwrap(), core.disks.clone(), bell.clone());
    let families = &families;
    std::thread::scope(|scope| {
        let waiting = [
            scope.spawn(|| families.renew_until(Instant::now())),
            scope.spawn(|| families.known()),
        ];
        std::thread::sleep(Duration::from_millis(20));
        assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
        let found = Survey {
            files: Vec::new(),
            family: Arc::default(),
        };
        families.state.lock().latest = Some(Arc::new(found));
        families.changed.notify_all();
        for waiting in waiting {
            assert!(waiting.join().unwrap().is_some());
        }
        assert!(families.state.lock().said_late);
        let waiting = scope.spawn(|| families.renew());
        bell.stop();
        families.end();
        assert!(waiting.join().unwrap().is_none());
    });
}

// Of the time that Wine takes nothing can be told.
#[cfg(unix)]
#[test]
fn thousands_of_children_are_told_apart_quickly() {
    const FILES: usize = 10_000;
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    make_disk(&at("base.vhd"));
    fs::copy(at("base.vhd"), at("copy.vhd")).unwrap();
    make_child(&at("child.vhd"), &at("base.vhd"), r".\base.vhd");
    for n in 0..FILES / 2 {
        fs::copy(at("child.vhd"), at(&format!("child{n}.vhd"))).unwrap();
        fs::copy(at("base.vhd"), at(&format!("plain{n}.vhd"))).unwrap();
    }
    let options = LibraryOptions::default();
    let begun = Instant::now();
    let library = open_with(&root, options);
    let core = &library.core;
    core.families.known().unwrap();
    let cold = begun.elapsed();
    let begun = Instant::now();
    let family = core.families.renew().unwrap();
    let warm = begun.elapsed();
    println!("{FILES} files: cold {cold:?}, warm {warm:?}");
    let children = |name: &str| {
        let stat = core
            .host
            .pin(Path::new(name))
            .and_then(|pin| pin.stat())
            .unwrap();
        family.children(&stat.identity()).len()
    };
    assert_eq!(children("base.vhd"), FILES / 2 + 1);
    assert_eq!((children("copy.vhd"), children("plain7.vhd")), (0, 0));
    assert!(cold < Duration::from_secs(10), "{cold:?}");
    assert!(warm < Duration::from_secs(1), "{warm:?}");
}

/// Panics while it is asked for the first surveys' sake.
struct Panicking(AtomicBool);

impl Asker for Panicking {
    fn is_over(&self) -> bool {
        assert!(!self.0.load(Ordering::Relaxed), "as the test wants it");
        false
    }

    fn open(&self, _: &Identity) -> Option<Lineage> {
        None
    }
}

#[test]
fn a_survey_that_panics_has_failed_and_the_next_has_not() {
    let root = sample();
    let library = open(&root);
    let core = &library.core;
    let asker = Arc::new(Panicking(true.into()));
    let families = &Families {
        tree: Tree::new(core.host.root().unwrap(), LIMITS, asker.clone()),
        bell: Arc::default(),
        state: Mutex::default(),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| families.run(&core.disks));
        let survey = || {
            let asked = families.ask();
            loop {
                match families.answer(asked) {
                    Some(survey) => return survey,
                    None => assert!(!looking.is_finished(), "nobody looks any more"),
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        assert_eq!(survey().family.unread, [Path::new("")]);
        asker.0.store(false, Ordering::Relaxed);
        let good = survey();
        assert!(good.family.unread.is_empty());
        assert_eq!(good.files.len(), 3);
        asker.0.store(true, Ordering::Relaxed);
        let failed = survey();
        // What was found before still counts.
        assert_eq!(failed.family.unread, [Path::new("")]);
        assert_eq!(failed.files.len(), 3);
        assert_eq!(survey().family.unread, [Path::new("")]);
        families.bell.stop();
        families.end();
    });
}

#[test]
fn what_could_not_be_looked_into_is_told_once_and_for_what_it_is() {
    let top = [PathBuf::new()];
    let sub = [PathBuf::from("sub"), PathBuf::from("z")];
    let closed = warning(&top, false, &[]).unwrap();
    assert!(closed.starts_with(". cannot be looked into"), "{closed}");
    let closed = warning(&sub, false, &top).unwrap();
    assert!(closed.contains("sub cannot be looked into"), "{closed}");
    let many = warning(&sub, true, &sub).unwrap();
    assert!(many.contains("more than 2000000 files"), "{many}");
    for (unread, cut_off, before) in [
        (&sub[..], false, &sub[..]),
        (&top, false, &top),
        (&sub, true, &top),
        (&[], false, &sub),
    ] {
        assert_eq!(warning(unread, cut_off, before), None);
    }
}
