//! Hosts that do not answer: a step of background work that does not end stands for them.

use std::sync::atomic::Ordering;

use super::*;
use crate::compact::{LowSpace, Room};
use crate::library::agent::Agent;
use crate::library::queue::Limits;
use crate::storage::host::pin::{Identity, Stat};

const LIMITS: Limits = Limits {
    hung: Duration::from_millis(100),
    linger: Duration::from_millis(100),
};

/// Two devices, by the numbers of files.
fn two_devices(file: &Identity) -> u64 {
    u64::from(file.inode() % 2 == 1)
}

/// A library that compacts what is idle at once, and closes nothing by itself.
fn open_with(root: &TempDir, max_open: usize, device: fn(&Identity) -> u64) -> Library {
    let policy = IdlePolicy {
        idle_after: Duration::ZERO,
        min_reclaim: 0,
        punch_holes: true,
        fs_aware: false,
        ..IdlePolicy::default()
    };
    let options = LibraryOptions {
        compact: Some(policy),
        max_open: NonZeroUsize::new(max_open).unwrap(),
        linger: Duration::from_secs(3600),
        ..LibraryOptions::default()
    };
    Library::open_with(root.path(), options, LIMITS, device).unwrap()
}

fn state(library: &Library, node: NodeId) -> Option<DiskState> {
    library.disk_status(node).map(|status| status.state)
}

/// Whether another program gets the file.
fn is_free(path: &Path) -> bool {
    HostFile::open(path, &HostOptions::default()).is_ok()
}

fn use_it(library: &Library, node: NodeId) {
    let handle = library.open_disk(node, true).unwrap();
    handle.disk().write_at(&[1; 4 << 20], 0).unwrap();
    handle.disk().discard(0, 4 << 20).unwrap();
}

#[test]
fn a_disk_that_does_not_answer_keeps_nobody_else_waiting() {
    let root = tempfile::tempdir().unwrap();
    for name in ["hangs.vhd", "a.vhd", "b.vhd"] {
        make_disk(&root.path().join(name));
    }
    let library = open_with(&root, 2, Identity::device);
    let [hangs, a, b] =
        ["hangs", "a", "b"].map(|name| lookup(&library, &format!("{name}.vhd.raw")).node);
    let handle = library.open_disk(hangs, true).unwrap();
    eventually("it settles", || {
        state(&library, hangs) == Some(DiskState::Compact)
    });
    let disk = library.core.disks.all().pop().unwrap();
    let step = disk.hold_work();
    handle.disk().write_at(&[1; 4096], 0).unwrap();
    drop(handle);
    eventually("its worker is lost", || disk.device.queue.is_stuck());
    // Nor is it waited for to make room for others, which are compacted.
    for node in [a, b, a] {
        use_it(&library, node);
        eventually("others are compacted", || {
            state(&library, node) == Some(DiskState::Compact)
        });
    }
    let open: Vec<_> = library.status().into_iter().map(|disk| disk.path).collect();
    assert!(open.contains(&PathBuf::from("hangs.vhd")), "{open:?}");
    let room = library.disk_status(a).unwrap().room.unwrap();
    assert!(0 < room.free && room.free <= room.total, "{room:?}");

    assert_eq!(library.close_within(Duration::from_millis(300)), 1);
    assert!(
        ["a.vhd", "b.vhd"]
            .iter()
            .all(|name| is_free(&root.path().join(name)))
    );
    assert!(!is_free(&root.path().join("hangs.vhd")));
    drop(step);
    drop(disk);
    eventually("it is closed once the host answers", || {
        is_free(&root.path().join("hangs.vhd"))
    });
}

#[test]
fn who_opens_a_disk_does_not_wait_for_another_device() {
    let root = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..16).map(|n| format!("{n}.vhd")).collect();
    names
        .iter()
        .for_each(|name| make_disk(&root.path().join(name)));
    let library = open_with(&root, 1, two_devices);
    let number = |name: &&String| {
        let stat = library
            .core
            .host
            .pin(Path::new(name))
            .unwrap()
            .stat()
            .unwrap();
        two_devices(&stat.identity())
    };
    let here = names.iter().find(|name| number(name) == 0).unwrap();
    let there = names.iter().find(|name| number(name) == 1).unwrap();
    let [near, far] = [here, there].map(|name| lookup(&library, &format!("{name}.raw")).node);
    use_it(&library, far);
    eventually("it settles", || {
        state(&library, far) == Some(DiskState::Compact)
    });
    let disk = library.core.disks.all().pop().unwrap();
    let step = disk.hold_work();
    // It is to make room, and does so when it can.
    use_it(&library, near);
    eventually("the other device works", || {
        state(&library, near) == Some(DiskState::Compact)
    });
    let far = root.path().join(there);
    assert!(!is_free(&far));
    drop(step);
    eventually("it has gone", || is_free(&far));
    assert!(library.disk_status(near).is_some());
    drop(disk);
    assert_eq!(library.close(), 0);
}

#[test]
fn a_disk_that_settled_is_woken_by_its_guest() {
    let root = sample();
    let library = open_with(&root, 8, Identity::device);
    let node = lookup(&library, "a.vhd.raw").node;
    let handle = library.open_disk(node, true).unwrap();
    let len = || fs::metadata(root.path().join("a.vhd")).unwrap().len();
    for _ in 0..3 {
        eventually("it settles", || {
            state(&library, node) == Some(DiskState::Compact)
        });
        let short = len();
        handle.disk().write_at(&[1; 2 << 20], 0).unwrap();
        eventually("it settles", || {
            state(&library, node) == Some(DiskState::Compact)
        });
        assert!(len() > short);
        handle.disk().discard(0, 2 << 20).unwrap();
        eventually("it is short again", || len() == short);
    }
}

#[test]
fn others_are_let_in_between_steps() {
    let root = sample();
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    let _handle = library.open_disk(node, false).unwrap();
    let disk = library.core.disks.all().pop().unwrap();
    let step = disk.hold_work();
    std::thread::scope(|scope| {
        let letting = scope.spawn(|| disk.let_in());
        std::thread::sleep(Duration::from_millis(30));
        assert!(
            !letting.is_finished(),
            "who closes the disk does not know of it"
        );
        drop(step);
    });
}

#[test]
fn a_disk_is_tried_again_however_often_it_failed() {
    let root = sample();
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    let _handle = library.open_disk(node, false).unwrap();
    let disk = library.core.disks.all().pop().unwrap();
    let policy = Some(IdlePolicy::default());
    let agent = Agent::new(library.core.clone(), policy, Duration::from_secs(1));
    for _ in 0..10 {
        let turned = agent.disk_failed(&disk).unwrap();
        assert!(turned.after.due.is_some());
    }
}

#[test]
fn what_was_too_little_is_looked_at_again_where_space_gets_low() {
    let root = sample();
    let library = open(&root);
    let sub = lookup(&library, "sub").node;
    let nodes = [
        lookup(&library, "a.vhd.raw").node,
        library.lookup(sub, OsStr::new("b.VHD.raw")).unwrap().node,
    ];
    let _handles = nodes.map(|node| library.open_disk(node, false).unwrap());
    let disks = library.core.disks.all();
    disks[0].too_little.store(1, Ordering::Relaxed);
    let policy = IdlePolicy {
        low_space: LowSpace::Bytes(100),
        ..IdlePolicy::default()
    };
    let agent = Agent::new(library.core.clone(), Some(policy), Duration::from_secs(1));
    let woken = |free| {
        let room = Room { free, total: 1000 };
        agent.note_room(&disks[1].device, Path::new("b.VHD"), room);
        [&disks[0], &disks[1]].map(|disk| disk.is_to_look_again())
    };
    // And two that nobody has open.
    let stats = ["c", "d"].map(|name| {
        let path = root.path().join(name);
        make_disk(&path);
        Stat::at(&path).unwrap()
    });
    agent.finish(&stats[0], true);
    agent.finish(&stats[1], false);
    let finished = || {
        stats
            .each_ref()
            .map(|stat| agent.visits.lock().is_finished(stat))
    };
    assert_eq!(woken(100), [false, false]);
    assert_eq!(finished(), [true, true]);
    assert_eq!(woken(99), [true, false]);
    assert_eq!(finished(), [false, true]);
    assert_eq!(woken(99), [false, false], "once");
}

#[test]
fn low_space_is_told_once_also_where_nothing_is_open() {
    let root = sample();
    let library = open(&root);
    let stat = Stat::at(&root.path().join("a.vhd")).unwrap();
    let policy = IdlePolicy {
        low_space: LowSpace::Bytes(100),
        ..IdlePolicy::default()
    };
    let agent = Agent::new(library.core.clone(), Some(policy), Duration::from_secs(1));
    let began = [1, 1, 1000, 1].map(|free| {
        // What a search does for a device, and what its worker does.
        agent.finish(&stat, true);
        let device = library.core.devices.of(&stat.identity());
        let room = Room { free, total: 1000 };
        agent.note_room(&device, Path::new("a.vhd"), room);
        drop(device);
        library.core.devices.forget_unused();
        !agent.visits.lock().is_finished(&stat)
    });
    // Once there is room again it is worth a visit as well: some had no room to be moved.
    assert_eq!(began, [true, false, true, true]);
}
