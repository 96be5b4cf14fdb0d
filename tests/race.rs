//! Many guests on one disk while it is compacted: nothing is lost, nothing stands still.
//!
//! Each thread owns stripes of the disk that are smaller than a block, so that every block is
//! shared, and knows what they must hold. `VHDFS_SOAK=SECONDS` makes it longer.

#[path = "race/meet.rs"]
mod meet;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use vhdfs::check::{CheckOptions, check_storage};
use vhdfs::compact::{CompactOptions, IdlePolicy, IdleWork};
use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, DiskType, Format, HostParents, OpenOptions};
use vhdfs::format::parent::NewParent;
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Op, OpKind, SimStorage};
use vhdfs::units::{FileOffset, FileRange, u64_from, usize_from};

const BLOCK: u32 = 512 << 10;
const DISK: u64 = 96 << 20;
const STRIPE: u64 = 96 << 10;
const GUESTS: u64 = 6;
const PARTS: u64 = 4;

/// A small generator, so that a failure can be run again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

fn seconds() -> u64 {
    std::env::var("VHDFS_SOAK")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(4)
}

/// What the guests race on.
#[derive(Clone, Copy, Debug)]
struct Kind {
    format: Format,
    /// Over a parent that has data in half of its blocks.
    child: bool,
}

const VHD: Kind = Kind {
    format: Format::Vhd,
    child: false,
};

impl Kind {
    fn file(self, folder: &Path) -> PathBuf {
        let extension = self.format.to_string();
        let options = |kind| CreateOptions {
            block_size: Some(if self.format == Format::Vhd {
                BLOCK
            } else {
                1 << 20
            }),
            ..CreateOptions::new(self.format, kind, DISK)
        };
        let path = folder.join(format!("race.{extension}"));
        if !self.child {
            create(&path, &options(DiskType::Dynamic)).expect("created");
            return path;
        }
        let parent = folder.join(format!("parent.{extension}"));
        create(&parent, &options(DiskType::Dynamic)).expect("created");
        let disk = Disk::open(&parent, &OpenOptions::default()).expect("opened");
        for at in (0..DISK).step_by(2 << 20) {
            disk.write_at(&vec![0x77; 1 << 20], at).expect("written");
        }
        disk.close().expect("closed");
        let new_parent = NewParent {
            identity: disk.identity(),
            disk_len: DISK,
            sector_size: 512,
            mtime: SystemTime::now(),
            relative: format!(".\\parent.{extension}"),
            absolute: format!("C:\\parent.{extension}"),
        };
        drop(disk);
        let options = CreateOptions {
            parent: Some(new_parent),
            ..options(DiskType::Differencing)
        };
        create(&path, &options).expect("created");
        path
    }
}

fn options(punch_holes: bool) -> OpenOptions {
    OpenOptions {
        punch_holes,
        ..OpenOptions::default()
    }
}

/// One guest: random requests on its own stripes, each checked against `model`, which holds the
/// whole disk but is only used where this guest owns it.
fn guest(disk: &Disk, number: u64, model: &mut [u8], stop: &AtomicBool) {
    let mut random = Random(number + 1);
    let stripes = DISK / STRIPE / GUESTS;
    let clock = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        // All guests empty the same part of the disk for a while, and use the others.
        let part = stripes / PARTS;
        let empty = clock.elapsed().as_secs() % PARTS;
        let chosen = random.below(stripes);
        let emptying = chosen / part == empty;
        let stripe = (chosen * GUESTS + number) * STRIPE;
        let start = if emptying { 0 } else { random.below(STRIPE) };
        let len = if emptying {
            STRIPE
        } else {
            1 + random.below(STRIPE - start)
        };
        let (at, place) = (stripe + start, usize_from(stripe + start));
        let mine = &mut model[place..place + usize_from(len)];
        match if emptying { 5 } else { random.below(10) } {
            0..=3 => {
                let byte = u8::try_from(1 + random.below(255)).expect("a byte");
                mine.fill(byte);
                disk.write_at(mine, at).expect("written");
            }
            4 => {
                mine.fill(0);
                disk.write_at(mine, at).expect("written");
            }
            5..=6 => {
                mine.fill(0);
                disk.discard(at, len).expect("discarded");
            }
            7 => disk.flush().expect("flushed"),
            // Blocks that rest for a moment are those that can move.
            8 => std::thread::sleep(Duration::from_millis(random.below(20))),
            _ => {
                let mut found = vec![0; mine.len()];
                disk.read_at(&mut found, at).expect("read");
                assert!(
                    found == mine,
                    "guest {number} at {at}, {len} bytes: {}",
                    difference(&found, mine, at)
                );
            }
        }
    }
}

/// The runs of bytes that are not as `wanted`, with the disk offset, and the value of each.
fn difference(found: &[u8], wanted: &[u8], at: u64) -> String {
    let mut runs: Vec<(u64, u64, u8, u8)> = Vec::new();
    for (place, (found, wanted)) in (at..).zip(found.iter().zip(wanted)) {
        match runs.last_mut() {
            Some((start, len, a, b)) if *start + *len == place && (*a, *b) == (*found, *wanted) => {
                *len += 1;
            }
            _ if found != wanted => runs.push((place, 1, *found, *wanted)),
            _ => {}
        }
    }
    let told = runs.iter().map(|(start, len, found, wanted)| {
        format!("{len} bytes at {start} are {found:#04x}, not {wanted:#04x}")
    });
    told.collect::<Vec<_>>().join("; ")
}

/// Sometimes all of a large range goes, so that there are holes to fill and tails to cut.
fn compact(disk: &Arc<Disk>, stop: &AtomicBool) -> u64 {
    let policy = IdlePolicy {
        idle_after: Duration::ZERO,
        min_reclaim: 0,
        punch_holes: true,
        fs_aware: false,
        ..IdlePolicy::default()
    };
    let mut idle = IdleWork::new(Arc::clone(disk), policy);
    let mut moved = 0;
    for round in 0_u64.. {
        std::thread::sleep(Duration::from_millis(1));
        if stop.load(Ordering::Relaxed) {
            break;
        }
        idle.step();
        if round % 8 == 0 {
            let options = CompactOptions {
                punch_holes: round % 16 == 0,
                ..CompactOptions::default()
            };
            moved += disk
                .compact(&options)
                .wait()
                .expect("compacted")
                .blocks_moved;
        }
    }
    moved
}

fn race(disk: &Arc<Disk>) {
    let stop = AtomicBool::new(false);
    let ended = Arc::new(AtomicBool::new(false));
    let patience = Duration::from_secs(seconds() + 120);
    std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            let begun = Instant::now();
            while begun.elapsed() < patience {
                std::thread::sleep(Duration::from_millis(200));
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let deadlocks = parking_lot::deadlock::check_deadlock();
                for thread in deadlocks.iter().flatten() {
                    eprintln!("waits for another of these: {:?}", thread.backtrace());
                }
                if !deadlocks.is_empty() {
                    break;
                }
            }
            eprintln!("the race stands still");
            std::process::abort();
        }
    });
    let mut first = vec![0_u8; usize_from(DISK)];
    disk.read_at(&mut first, 0).expect("read");
    let mut models = vec![first; usize_from(GUESTS)];
    let moved = std::thread::scope(|scope| {
        for (number, model) in (0..).zip(&mut models) {
            let stop = &stop;
            scope.spawn(move || guest(disk, number, model, stop));
        }
        let compactor = scope.spawn(|| compact(disk, &stop));
        std::thread::sleep(Duration::from_secs(seconds()));
        stop.store(true, Ordering::Relaxed);
        compactor.join().expect("the compactor is well")
    });
    ended.store(true, Ordering::Relaxed);
    println!("{moved} blocks moved under {GUESTS} guests");
    compare(disk, &models);
}

/// All stripes against what their owners know.
fn compare(disk: &Disk, models: &[Vec<u8>]) {
    let mut found = vec![0; usize_from(STRIPE)];
    for stripe in 0..DISK / STRIPE / GUESTS * GUESTS {
        let at = stripe * STRIPE;
        disk.read_at(&mut found, at).expect("read");
        let place = usize_from(at);
        let wanted = &models[usize_from(stripe % GUESTS)][place..place + found.len()];
        assert!(found == wanted, "stripe {stripe}");
    }
}

/// On a simulated host, where the daemon dies in the end.
fn simulated(kind: Kind) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = kind.file(folder.path());
    let storage = Arc::new(SimStorage::from_file(&path).expect("loaded"));
    let parents = HostParents::beside(&path, &[]);
    let open = |storage: Arc<SimStorage>| {
        let options = options(false);
        Disk::open_storage_with(storage, &path, &options, &parents).expect("opened")
    };
    let disk = open(Arc::clone(&storage));
    race(&disk);
    let mut before = vec![0; usize_from(DISK)];
    disk.read_at(&mut before, 0).expect("read");
    // The daemon dies here: everything that was acknowledged is there.
    let killed = Arc::new(storage.kill());
    let mut after = vec![0; usize_from(DISK)];
    let disk = open(Arc::clone(&killed));
    disk.read_at(&mut after, 0).expect("read");
    assert!(before == after);
    disk.close().expect("closed");
    let report = check_storage(&*killed, &CheckOptions::default()).expect("checked");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn guests_and_compaction_on_a_simulated_host() {
    simulated(VHD);
}

#[test]
fn on_a_vhdx() {
    simulated(Kind {
        format: Format::Vhdx,
        child: false,
    });
}

#[test]
fn on_a_child() {
    simulated(Kind { child: true, ..VHD });
}

#[test]
fn on_a_child_vhdx() {
    simulated(Kind {
        format: Format::Vhdx,
        child: true,
    });
}

#[test]
fn guests_and_compaction_on_a_file() {
    for kind in [
        VHD,
        Kind {
            format: Format::Vhdx,
            child: true,
        },
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = kind.file(folder.path());
        let disk = Disk::open(&path, &options(true)).expect("opened");
        race(&disk);
        disk.close().expect("closed");
        drop(disk);
        let disk = Disk::open(&path, &OpenOptions::default()).expect("opened");
        let compact = || {
            let operation = disk.compact(&CompactOptions::default());
            operation.wait().expect("compacted")
        };
        let report = compact();
        let again = compact();
        assert_eq!(
            (again.blocks_dropped, again.blocks_moved),
            (0, 0),
            "{report:?}"
        );
    }
}
