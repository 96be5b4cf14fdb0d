//! Power cuts under the program: a guest writes, flushes and discards through the mount, the daemon
//! compacts meanwhile, and the host loses its power at any operation. What is left is judged by two
//! readers, and the next life begins on it.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::Random;

use crate::common::{exit_code, has, stderr};
use crate::guest::{Guest, open};
use crate::host::orders::{Kept, Order};
use crate::rig::{Kind, Rig, VHD, VHD_CHILD, VHDX, VHDX_CHILD};
use crate::support::env_number;
use crate::support::oracle::{After, Oracle};
use crate::support::second::Chain;

const DISK: &str = "disk";
const PARENT: &str = "parent";
const SIZE: &str = "24M";
const LEN: u64 = 24 << 20;
/// How long a guest works at most before the power is cut.
const LIFE: Duration = Duration::from_millis(250);
/// How long the disk then has for a compaction.
const REST: Duration = Duration::from_millis(300);
const ROUNDS: u64 = 4;

#[test]
fn power_cuts_under_a_vhd() {
    lives(VHD, 1);
}

#[test]
fn power_cuts_under_a_vhdx() {
    lives(VHDX, 2);
}

#[test]
fn power_cuts_under_a_child_vhd() {
    lives(VHD_CHILD, 3);
}

#[test]
fn power_cuts_under_a_child_vhdx() {
    lives(VHDX_CHILD, 4);
}

/// What the tests above would say of a host, or of a vhdfs, that does not sync.
#[test]
fn a_host_that_does_not_sync_is_found_out() {
    for kind in [VHD, VHDX] {
        let Some(mut trial) = Trial::new(kind, 5) else {
            return;
        };
        trial.rig.order(&Order::Lie);
        let mut found = Ok(());
        for _ in 0..5 {
            trial.live(Moment::Working);
            trial.rig.order(&Order::Restart(Kept::Nothing));
            found = trial.judge(After::PowerCut);
            if found.is_err() {
                break;
            }
        }
        println!("{kind:?}: {found:?}");
        assert!(found.is_err());
    }
}

/// One disk, its guest and its host.
struct Trial {
    kind: Kind,
    rig: Rig,
    guest: Guest,
    random: Random,
    /// What the disk held at first.
    start: Oracle,
    parent: Option<Vec<u8>>,
    cuts: Cuts,
}

/// When the power is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// While the disk is being opened.
    Opening,
    /// While its guest uses it.
    Working,
    /// While the disk is compacted because its guest rests.
    Resting,
}

/// How often the power was cut, and when.
#[derive(Debug, Default)]
struct Cuts {
    opening: u64,
    working: u64,
    resting: u64,
    /// When all was done.
    after: u64,
    /// In `vhdfs compact`.
    compacting: u64,
}

fn lives(kind: Kind, part: u64) {
    let seed = env_number("VHDFS_SEED", 1) << 8 | part;
    let Some(mut trial) = Trial::new(kind, seed) else {
        return;
    };
    let rounds = ROUNDS * env_number("VHDFS_SOAK", 1);
    for round in 0..rounds {
        if let Err(error) = trial.round() {
            panic!("{kind:?}, seed {seed:#x}, round {round}: {error}");
        }
    }
    trial.end();
    let deeds = &trial.guest.deeds;
    println!(
        "{kind:?}: {rounds} rounds, power cut while {:?}; {deeds:?}",
        trial.cuts
    );
    assert!(deeds.flushes.load(Ordering::Relaxed) > 0);
}

impl Trial {
    fn new(kind: Kind, seed: u64) -> Option<Self> {
        let mut rig = Rig::new()?;
        let name = kind.file(DISK);
        let mut parent = None;
        let mut oracle = Oracle::new(LEN);
        if kind.has_parent {
            rig.create(kind, PARENT, SIZE);
            fill_parent(&mut rig, kind);
            rig.create_child(kind, DISK, PARENT);
            let file = kind.file(PARENT);
            parent = Some(fs::read(rig.behind(&file)).unwrap());
            let options = OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            };
            let disk = Disk::open_storage(rig.image(&file), Path::new(&file), &options).unwrap();
            oracle = Oracle::over(LEN, Some(disk));
        } else {
            rig.create(kind, DISK, SIZE);
        }
        // What `vhdfs create` has made is durable, its name too.
        rig.order(&Order::Restart(Kept::Nothing));
        rig.assert_clean(&name);
        Some(Self {
            kind,
            rig,
            guest: Guest::new(LEN, oracle.clone()),
            start: oracle,
            random: Random::new(seed),
            parent,
            cuts: Cuts::default(),
        })
    }

    /// A life, and what is left of it.
    fn round(&mut self) -> Result<(), String> {
        // A child that has been used for long shows nothing of its parent any more.
        if self.kind.has_parent && self.random.below(2) == 0 {
            fs::remove_file(self.rig.behind(&self.kind.file(DISK))).unwrap();
            self.rig.create_child(self.kind, DISK, PARENT);
            self.guest.begin_anew(self.start.clone());
        }
        let microseconds = self.random.below(3) * self.random.below(200);
        self.rig.order(&Order::Slow { microseconds });
        let moment = match self.random.below(8) {
            0 => Moment::Opening,
            1..4 => Moment::Working,
            _ => Moment::Resting,
        };
        self.live(moment);
        let after = self.restart();
        self.judge(after)
            .map_err(|error| format!("{after:?}: {error}"))?;
        if self.random.below(3) == 0 {
            self.compact()?;
        }
        Ok(())
    }

    /// Mounts, works, loses power at `moment`, or before.
    fn live(&mut self, moment: Moment) {
        if moment == Moment::Opening {
            self.cut_within(8);
        }
        self.rig.serve(&[]);
        match open(&self.rig.raw(&self.kind.file(DISK))) {
            Ok(disk) => self.use_disk(&disk, moment),
            Err(_) => self.cuts.opening += 1,
        }
        self.rig.order(&Order::Cut);
        self.rig.kill();
    }

    fn use_disk(&mut self, disk: &File, moment: Moment) {
        if moment == Moment::Working {
            // Early ones as often as late ones.
            let limit = 16 << self.random.below(6);
            self.cut_within(limit);
        }
        let seed = self.random.next();
        let stop = AtomicBool::new(false);
        let begun = Instant::now();
        let errors = std::thread::scope(|scope| {
            let work = scope.spawn(|| self.guest.work(disk, seed, &stop));
            while !work.is_finished() && begun.elapsed() < LIFE {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::Relaxed);
            work.join().unwrap()
        });
        if !errors.is_empty() {
            self.cuts.working += 1;
            return;
        }
        // Nobody asks for anything any more: what is in use is moved to where this was.
        let start = self.random.below(LEN / 2);
        let hole = FallocateFlags::PUNCH_HOLE;
        if self.guest.change_zeros(disk, start, LEN / 6, hole).is_err() {
            self.cuts.working += 1;
            return;
        }
        self.cut_within(64);
        let begun = Instant::now();
        while !self.rig.order(&Order::Report).is_off {
            if begun.elapsed() > REST {
                self.cuts.after += 1;
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.cuts.resting += 1;
    }

    /// Has the power cut before one of the next changes, or of the next syncs.
    fn cut_within(&mut self, changes: u64) {
        let order = match self.random.below(2) {
            0 => Order::CutAfter(self.random.below(changes)),
            _ => Order::CutAtSync(self.random.below(changes.div_ceil(8))),
        };
        self.rig.order(&order);
    }

    /// The host after a power cut, and what that is for the guest.
    fn restart(&mut self) -> After {
        let seed = self.random.next();
        let (kept, after) = match self.random.below(8) {
            0 => (Kept::Nothing, After::PowerCut),
            // As if only the program had died.
            1 => (Kept::All, After::Kill),
            2 | 3 => (Kept::Some { seed, atomic: 4096 }, After::PowerCut),
            _ => (Kept::Some { seed, atomic: 512 }, After::PowerCut),
        };
        self.rig.order(&Order::Restart(kept));
        after
    }

    /// What was left is clean, and reads as it must to the second reader and, mounted, to the guest.
    fn judge(&mut self, after: After) -> Result<(), String> {
        let name = self.kind.file(DISK);
        self.rig.assert_clean(&name);
        let mut files: Vec<Arc<dyn Storage>> = vec![self.rig.image(&name)];
        if self.kind.has_parent {
            files.push(self.rig.image(&self.kind.file(PARENT)));
        }
        let chain = Chain::open(files)?;
        chain.check()?;
        let second = |buf: &mut [u8], offset: u64| chain.read_at(buf, offset);
        let result = self.guest.check(&second, after);
        result.map_err(|error| format!("the second reader: {error}"))?;
        self.guest.settle(&second);

        self.rig.serve(&["--no-compact"]);
        let disk = open(&self.rig.raw(&name)).map_err(|error| error.to_string())?;
        self.guest.check_disk(&disk, after)?;
        drop(disk);
        if self.random.below(2) == 0 {
            self.rig.unmount();
        } else {
            self.rig.kill();
        }
        Ok(())
    }

    /// Compacts the file offline, with a power cut in the middle of it perhaps, and then to the end.
    fn compact(&mut self) -> Result<(), String> {
        let name = self.kind.file(DISK);
        self.cut_within(60);
        let output = self.rig.compact(&name);
        let answer = self.rig.order(&Order::Report);
        assert_eq!(
            answer.is_off,
            exit_code(&output) != 0,
            "{}",
            stderr(&output)
        );
        self.cuts.compacting += u64::from(answer.is_off);
        // What was not cut off is durable.
        let after = self.restart();
        self.judge(after)?;
        let output = self.rig.compact(&name);
        assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
        self.rig.assert_clean(&name);
        let image = crate::support::second::read_checked(&*self.rig.image(&name))?;
        image.check_closed()?;
        image.check_compact()
    }

    /// The last word: everything in order, QEMU agrees.
    fn end(&mut self) {
        let name = self.kind.file(DISK);
        self.compact().unwrap();
        self.judge(After::Kill).unwrap();
        self.rig.serve(&[]);
        let content = fs::read(self.rig.raw(&name)).unwrap();
        self.rig.unmount();
        self.rig.assert_clean(&name);
        if let Some(parent) = &self.parent {
            let now = fs::read(self.rig.behind(&self.kind.file(PARENT))).unwrap();
            assert!(now == *parent, "the parent has changed");
            // QEMU opens a child without its parent, if at all.
            return;
        }
        if !has("qemu-img") {
            return;
        }
        let expected = self.rig.path("expected");
        fs::write(&expected, content).unwrap();
        let format = self.kind.qemu_format();
        let qemu = |words: &[&str], paths: &[&Path]| {
            let output = Command::new("qemu-img").args(words).args(paths).output();
            let output = output.unwrap();
            assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        };
        let file = self.rig.behind(&name);
        qemu(&["compare", "-f", format, "-F", "raw"], &[&file, &expected]);
        // QEMU's VHD driver has no check.
        if format == "vhdx" {
            qemu(&["check", "-q", "-f", format], &[&file]);
        }
    }
}

/// Gives the parent a content.
fn fill_parent(rig: &mut Rig, kind: Kind) {
    rig.serve(&["--no-compact"]);
    let disk = open(&rig.raw(&kind.file(PARENT))).unwrap();
    let guest = Guest::new(LEN, Oracle::new(LEN));
    let bytes: Vec<u8> = (1..=250).cycle().take(300 << 10).collect();
    for part in 0..LEN >> 20 {
        // Every third block is none.
        if part % 3 != 2 {
            guest.write_bytes(&disk, part << 20, &bytes).unwrap();
        }
    }
    guest.flush(&disk).unwrap();
    drop(disk);
    rig.unmount();
}
