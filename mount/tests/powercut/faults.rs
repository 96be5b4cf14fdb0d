//! One disk's host fails, is full or slow. Its guest gets the right error and loses nothing that was
//! acknowledged, the log tells it once, disks beside it and elsewhere go on, and it recovers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::common::{errno, eventually, exit_code, stderr};
use crate::guest::{Guest, open};
use crate::host::orders::{Failure, Kept, Operation, Order};
use crate::rig::{Kind, Rig, VHD, VHDX, create};
use crate::support::oracle::{After, Oracle};

const LEN: u64 = 24 << 20;
const MIB: u64 = 1 << 20;

/// A disk whose host fails, and two that must not notice.
struct Trial {
    kind: Kind,
    rig: Rig,
    guest: Guest,
    neighbours: Vec<(Guest, File)>,
    turn: u64,
}

/// The failing disk's file.
const DISK: &str = "disk";

impl Trial {
    fn new(kind: Kind, options: &[&str]) -> Option<Self> {
        let mut rig = Rig::new()?;
        rig.create(kind, DISK, "24M");
        rig.create(kind, "neighbour", "24M");
        create(kind, &rig.beside(&kind.file("elsewhere")), "24M");
        rig.serve(options);
        let shown = [
            rig.raw(&kind.file("neighbour")),
            rig.shown(&kind.file("elsewhere")),
        ];
        let guest = || Guest::in_sectors(LEN, Oracle::new(LEN));
        let neighbours = shown.map(|path| (guest(), open(&path).unwrap()));
        Some(Self {
            kind,
            rig,
            guest: guest(),
            neighbours: neighbours.into(),
            turn: 0,
        })
    }

    fn open(&self) -> io::Result<File> {
        open(&self.rig.raw(&self.kind.file(DISK)))
    }

    /// Opens it, once it takes changes: the kernel tells of a closed file when it likes.
    fn reopen(&self) -> File {
        let mut found = None;
        eventually("it takes changes again", || {
            let disk = self.open().unwrap();
            let works = self.write(&disk, 0).is_ok();
            found = works.then_some(disk);
            works
        });
        found.unwrap()
    }

    fn fail(&mut self, on: Operation, forever: bool, full: bool) {
        let failure = Failure {
            on: Some(on),
            after: 0,
            forever,
            full,
        };
        let file = self.kind.file(DISK);
        self.rig.order(&Order::Fail { file, failure });
    }

    /// Writes the megabyte of that number.
    fn write(&self, disk: &File, number: u64) -> io::Result<()> {
        self.guest.write_bytes(disk, number * MIB, &content(number))
    }

    /// The neighbours work, and so does the daemon.
    fn assert_others_work(&mut self) {
        self.turn += 1;
        for (guest, disk) in &self.neighbours {
            let place = self.turn % 20 * MIB;
            guest.write_bytes(disk, place, &content(self.turn)).unwrap();
            guest.flush(disk).unwrap();
            let hole = FallocateFlags::PUNCH_HOLE;
            guest.change_zeros(disk, place, MIB / 2, hole).unwrap();
            guest.check_disk(disk, After::Kill).unwrap();
        }
        self.rig.assert_alive();
    }

    /// What the log says of the failing disk, without what is no trouble.
    fn complaints(&self) -> Vec<String> {
        let (log, file) = (self.rig.log(), self.kind.file(DISK));
        let lines = log.lines().filter(|line| line.contains(&file));
        let lines = lines.filter(|line| !line.contains("vhdfs: info:"));
        lines.map(str::to_owned).collect()
    }

    /// The disk is in order again: with this daemon, after a power cut, and for `vhdfs check`.
    fn end(mut self) {
        self.rig.order(&Order::Recover);
        let disk = self.reopen();
        self.write(&disk, 1).unwrap();
        self.write(&disk, 20).unwrap();
        self.guest.flush(&disk).unwrap();
        self.guest.check_disk(&disk, After::Kill).unwrap();
        drop(disk);
        self.assert_others_work();
        self.rig.order(&Order::Cut);
        self.neighbours.clear();
        self.rig.kill();
        self.rig.order(&Order::Restart(Kept::Nothing));
        let name = self.kind.file(DISK);
        self.rig.assert_clean(&name);
        self.rig.serve(&[]);
        let disk = self.open().unwrap();
        self.guest.check_disk(&disk, After::PowerCut).unwrap();
        drop(disk);
        self.rig.unmount();
        self.rig.assert_clean(&name);
    }
}

fn content(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    crate::support::image::pattern(number, 1, &mut bytes);
    bytes
}

fn is<T: std::fmt::Debug>(result: io::Result<T>, expected: Errno) {
    assert_eq!(errno(result), expected.raw_os_error());
}

/// Data that the host does not take: EIO as often as it happens, and otherwise nothing.
#[test]
fn data_that_cannot_be_written_or_read() {
    for kind in [VHD, VHDX] {
        let Some(mut trial) = Trial::new(kind, &["--no-compact"]) else {
            return;
        };
        let disk = trial.open().unwrap();
        for number in 0..4 {
            trial.write(&disk, number).unwrap();
        }
        trial.guest.flush(&disk).unwrap();
        trial.fail(Operation::Write, true, false);
        for _ in 0..100 {
            is(trial.write(&disk, 2), Errno::IO);
        }
        trial.assert_others_work();
        trial.rig.order(&Order::Recover);
        trial.write(&disk, 2).unwrap();

        trial.fail(Operation::Read, true, false);
        let mut byte = [0];
        // Not what the kernel has cached.
        let fresh = |place: u64| {
            let disk = trial.open().unwrap();
            rustix::fs::fadvise(&disk, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            (disk, place)
        };
        let (reader, place) = fresh(3 * MIB);
        is(reader.read_exact_at(&mut byte, place), Errno::IO);
        trial.rig.order(&Order::Recover);
        reader.read_exact_at(&mut byte, place).unwrap();
        drop(reader);
        trial.guest.flush(&disk).unwrap();
        trial.guest.check_disk(&disk, After::Kill).unwrap();
        let complaints = trial.complaints();
        assert!((1..=3).contains(&complaints.len()), "{complaints:#?}");
        drop(disk);
        trial.end();
    }
}

/// After a failed sync nothing is known: the disk takes no more changes, until it is opened again.
#[test]
fn a_sync_that_fails() {
    for kind in [VHD, VHDX] {
        let Some(mut trial) = Trial::new(kind, &["--no-compact"]) else {
            return;
        };
        let disk = trial.open().unwrap();
        trial.write(&disk, 0).unwrap();
        trial.guest.flush(&disk).unwrap();
        trial.write(&disk, 1).unwrap();
        trial.fail(Operation::Sync, false, false);
        is(trial.guest.flush(&disk), Errno::IO);
        for _ in 0..100 {
            is(trial.write(&disk, 0), Errno::IO);
            is(trial.guest.flush(&disk), Errno::IO);
        }
        trial.assert_others_work();
        trial.guest.check_disk(&disk, After::Kill).unwrap();
        drop(disk);
        let complaints = trial.complaints();
        assert!((1..=2).contains(&complaints.len()), "{complaints:#?}");
        assert!(complaints[0].contains("sync"), "{complaints:#?}");
        // Without waiting: somebody starts his machine again.
        let disk = trial.reopen();
        trial.guest.flush(&disk).unwrap();
        drop(disk);
        trial.end();
    }
}

/// What a failed sync has lost, the kernel still shows. Nothing is built on that.
#[test]
fn a_sync_that_fails_behind_the_kernels_back() {
    for kind in [VHD, VHDX] {
        let Some(mut trial) = Trial::new(kind, &["--no-compact"]) else {
            return;
        };
        trial.rig.order(&Order::Cache);
        let disk = trial.open().unwrap();
        trial.write(&disk, 0).unwrap();
        trial.guest.flush(&disk).unwrap();
        // All of the file is cached, its block table too.
        std::fs::read(trial.rig.behind(&kind.file(DISK))).unwrap();
        // Two blocks that have no place yet.
        trial.write(&disk, 2).unwrap();
        trial.write(&disk, 5).unwrap();
        trial.fail(Operation::Sync, false, false);
        is(trial.guest.flush(&disk), Errno::IO);
        // The host forgets, and the kernel does not know.
        trial.rig.order(&Order::Restart(Kept::Nothing));
        drop(disk);
        let disk = trial.reopen();
        trial.guest.check_disk(&disk, After::PowerCut).unwrap();
        trial.guest.settle_disk(&disk);
        trial.write(&disk, 5).unwrap();
        trial.guest.flush(&disk).unwrap();
        drop(disk);
        trial.end();
    }
}

/// A full host: ENOSPC for what needs room, all else goes on, and with room so does that.
#[test]
fn a_host_without_room() {
    for kind in [VHD, VHDX] {
        let options = ["--no-compact", "--punch-holes", "off"];
        for options in [&options[..1], &options[..]] {
            let Some(mut trial) = Trial::new(kind, options) else {
                return;
            };
            trial.rig.order(&Order::Limit {
                file: kind.file(DISK),
                bytes: Some(9 << 20),
            });
            let disk = trial.open().unwrap();
            let mut filled = 0;
            while trial.write(&disk, filled).is_ok() {
                filled += 1;
            }
            assert!((4..9).contains(&filled), "{filled}");
            for _ in 0..20 {
                is(trial.write(&disk, filled + 2), Errno::NOSPC);
            }
            // What needs no room.
            trial.write(&disk, 1).unwrap();
            trial.guest.flush(&disk).unwrap();
            trial.guest.check_disk(&disk, After::Kill).unwrap();
            trial.assert_others_work();
            let complaints = trial.complaints();
            assert!((1..=2).contains(&complaints.len()), "{complaints:#?}");
            // What was discarded is room.
            let hole = FallocateFlags::PUNCH_HOLE;
            trial.guest.change_zeros(&disk, 0, 3 * MIB, hole).unwrap();
            trial.write(&disk, filled + 2).unwrap();
            trial.guest.flush(&disk).unwrap();
            trial.guest.check_disk(&disk, After::Kill).unwrap();
            drop(disk);
            trial.end();
        }
    }
}

/// First no room, then worse: each is told.
#[test]
fn every_kind_of_failure_is_told() {
    let Some(mut trial) = Trial::new(VHD, &["--no-compact"]) else {
        return;
    };
    let disk = trial.open().unwrap();
    trial.write(&disk, 0).unwrap();
    trial.fail(Operation::Write, true, true);
    for number in 5..9 {
        is(trial.write(&disk, number), Errno::NOSPC);
    }
    trial.rig.order(&Order::Recover);
    trial.write(&disk, 0).unwrap();
    trial.fail(Operation::Sync, false, false);
    is(trial.guest.flush(&disk), Errno::IO);
    for _ in 0..100 {
        is(trial.write(&disk, 0), Errno::IO);
    }
    drop(disk);
    let complaints = trial.complaints();
    let tells = |what: &str| complaints.iter().any(|line| line.contains(what));
    assert!(tells("no space left") && tells("sync"), "{complaints:#?}");
    assert!(complaints.len() <= 4, "{complaints:#?}");
    trial.end();
}

/// A compaction on a host without a byte left makes room, or says that it cannot; the guest goes on.
#[test]
fn compaction_on_a_host_without_room() {
    for kind in [VHD, VHDX] {
        let Some(mut trial) = Trial::new(kind, &[]) else {
            return;
        };
        let disk = trial.open().unwrap();
        for number in 0..12 {
            trial.write(&disk, number).unwrap();
        }
        trial.guest.flush(&disk).unwrap();
        let path = trial.rig.behind(&kind.file(DISK));
        let len = || path.metadata().unwrap().len();
        let full = len();
        let file = kind.file(DISK);
        trial.rig.order(&Order::Limit {
            file: file.clone(),
            bytes: Some(0),
        });
        let hole = FallocateFlags::PUNCH_HOLE;
        // Every second block, so that others have to be moved.
        for number in [1, 3, 5, 7, 9] {
            (trial.guest)
                .change_zeros(&disk, number * MIB, MIB, hole)
                .unwrap();
        }
        eventually("the file is shorter", || len() + 4 * MIB < full);
        trial.write(&disk, 0).unwrap();
        trial.guest.flush(&disk).unwrap();
        trial.guest.check_disk(&disk, After::Kill).unwrap();
        trial.assert_others_work();
        drop(disk);
        trial.neighbours.clear();
        trial.rig.unmount();
        let output = trial.rig.compact(&file);
        assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
        trial.rig.assert_clean(&file);
        trial.rig.order(&Order::Restart(Kept::Nothing));
        trial.rig.assert_clean(&file);
        trial.rig.serve(&[]);
        let disk = trial.open().unwrap();
        trial.guest.check_disk(&disk, After::PowerCut).unwrap();
        drop(disk);
        trial.rig.unmount();
    }
}

/// One in so many operations fails, whichever it is, and the host is slow. What was acknowledged is there,
/// whatever happened.
#[test]
fn a_host_that_fails_now_and_then() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    let mut errors = 0;
    for (kind, seed) in [(VHD, 1), (VHDX, 2)] {
        let Some(mut trial) = Trial::new(kind, &[]) else {
            return;
        };
        let on = vec![
            Operation::Read,
            Operation::Write,
            Operation::SetLen,
            Operation::PunchHole,
            Operation::Copy,
        ];
        trial.rig.order(&Order::FailSometimes {
            file: kind.file(DISK),
            on,
            one_in: 40,
            seed,
        });
        trial.rig.order(&Order::Slow { microseconds: 100 });
        for turn in 0..8 {
            // It may fail to open, too.
            let Ok(disk) = trial.open() else { continue };
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let work = scope.spawn(|| trial.guest.work(&disk, seed << 8 | turn, &stop));
                std::thread::sleep(Duration::from_millis(80));
                stop.store(true, Ordering::Relaxed);
                errors += work.join().unwrap().len();
            });
        }
        trial.assert_others_work();
        let complaints = trial.complaints();
        assert!(complaints.len() < 60, "{complaints:#?}");
        trial.end();
    }
    println!("{errors} errors reached the guests");
    assert!(errors > 2);
}
