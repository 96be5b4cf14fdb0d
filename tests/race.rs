//! Many guests on one disk while it is compacted: nothing is lost, nothing stands still.
//!
//! Each thread owns stripes of the disk that are smaller than a block, so that every block is
//! shared, and knows what they must hold. `VHDFS_SOAK=SECONDS` makes it longer.

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

/// Waits until `flag` is set, but not for ever.
fn wait_for(flag: &AtomicBool) {
    let started = Instant::now();
    while !flag.load(Ordering::SeqCst) && started.elapsed() < Duration::from_millis(500) {
        std::thread::yield_now();
    }
}

/// Has `other` done while `act` is about to ask for what `is_it` describes, for the first time.
fn interrupt(
    storage: &SimStorage,
    is_it: impl Fn(&Op) -> bool + Send + Sync + 'static,
    act: impl FnOnce() + Send,
    other: impl FnOnce(),
) {
    let [met, done] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = [&met, &done].map(Arc::clone);
    storage.on_op(move |_, op| {
        if is_it(op) && !seen[0].swap(true, Ordering::SeqCst) {
            wait_for(&seen[1]);
        }
    });
    std::thread::scope(|scope| {
        scope.spawn(act);
        wait_for(&met);
        other();
        done.store(true, Ordering::SeqCst);
    });
    assert!(met.load(Ordering::SeqCst), "they met");
    storage.clear_hook();
}

/// Compacts `disk`, and has `guest` at it when `storage` is first asked for what `is_it` describes, before
/// that is done: compaction goes on once the guest is done, or, where that waits for it, after a while.
fn meet(
    (storage, disk): (&SimStorage, &Arc<Disk>),
    is_it: impl Fn(&Op) -> bool + Send + Sync + 'static,
    guest: impl FnOnce() + Send,
) {
    let [met, done] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = [&met, &done].map(Arc::clone);
    storage.on_op(move |_, op| {
        if is_it(op) && !seen[0].swap(true, Ordering::SeqCst) {
            wait_for(&seen[1]);
        }
    });
    std::thread::scope(|scope| {
        let done = &done;
        let guest = scope.spawn(|| {
            wait_for(&met);
            guest();
            done.store(true, Ordering::SeqCst);
        });
        let options = CompactOptions {
            punch_holes: true,
            ..CompactOptions::default()
        };
        disk.compact(&options).wait().expect("compacted");
        guest.join().expect("no panic");
    });
    assert!(met.load(Ordering::SeqCst), "they met");
    storage.clear_hook();
}

/// A disk that has written 5 to its first block and 7 to its second; where in the file the first one's
/// bytes are. In the file, those from `zeros` on are zeros, which nobody knows.
fn with_zeros(zeros: u64) -> (Arc<SimStorage>, Arc<Disk>, FileRange) {
    let folder = tempfile::tempdir().expect("a folder");
    let storage = SimStorage::from_file(&VHD.file(folder.path())).expect("loaded");
    let storage = Arc::new(storage);
    let open = || {
        let disk = Disk::open_storage(storage.clone(), Path::new("raced"), &options(true));
        disk.expect("opened")
    };
    let disk = open();
    let block = usize_from(BLOCK.into());
    disk.write_at(&vec![5; block], 0).expect("written");
    disk.write_at(&vec![7; block], BLOCK.into())
        .expect("written");
    disk.close().expect("closed");
    drop(disk);
    let bytes = storage.to_bytes();
    let start = bytes.windows(4096).position(|bytes| bytes == [5; 4096]);
    let start = u64_from(start.expect("a block"));
    let data = FileRange::new(FileOffset::new(start), BLOCK.into());
    let part = FileRange::between(data.start.plus(zeros), data.end());
    let nothing = vec![0; usize_from(part.len)];
    storage.write_all_at(&nothing, part.start).expect("written");
    let disk = open();
    (storage, disk, data)
}

fn assert_reads(disk: &Disk, offset: u64, byte: u8) {
    let mut found = [0; 4096];
    disk.read_at(&mut found, offset).expect("read");
    assert!(found == [byte; 4096], "{found:?}");
}

#[test]
fn zeros_that_are_written_to_while_they_are_looked_for() {
    let (storage, disk, data) = with_zeros(0);
    // Looked at in two pieces.
    let hole = FileRange::new(data.start.plus(16 << 10), 16 << 10);
    storage.punch_hole(hole).expect("punched");
    let is_second = move |op: &Op| op.kind == OpKind::Read && op.range.start == hole.end();
    meet((&storage, &disk), is_second, || {
        disk.write_at(&[9; 4096], 0).expect("written");
    });
    assert_reads(&disk, 0, 9);
}

#[test]
fn a_block_that_is_written_to_while_it_is_dropped() {
    let (storage, disk, _) = with_zeros(0);
    let is_table = |op: &Op| op.kind == OpKind::Write && op.range.len == 4;
    meet((&storage, &disk), is_table, || {
        disk.write_at(&[9; 4096], 0).expect("written");
    });
    assert_reads(&disk, 0, 9);
}

/// Its slot becomes another block's.
#[test]
fn a_block_that_is_dropped_while_it_is_punched() {
    let (storage, disk, data) = with_zeros(u64::from(BLOCK) / 2);
    let is_inside = move |op: &Op| op.kind == OpKind::PunchHole && op.range.start > data.start;
    meet((&storage, &disk), is_inside, || {
        disk.discard(0, BLOCK.into()).expect("discarded");
        disk.flush().expect("flushed");
        let other = vec![9; usize_from(BLOCK.into())];
        disk.write_at(&other, 5 * u64::from(BLOCK))
            .expect("written");
    });
    assert_reads(&disk, 6 * u64::from(BLOCK) - 4096, 9);
}

#[test]
fn a_block_that_is_written_to_while_it_is_compared_with_its_parent() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = Kind { child: true, ..VHD }.file(folder.path());
    let storage = Arc::new(SimStorage::from_file(&path).expect("loaded"));
    let parents = HostParents::beside(&path, &[]);
    let disk = Disk::open_storage_with(storage.clone(), &path, &options(false), &parents);
    let disk = disk.expect("opened");
    // As in the parent.
    let block = vec![0x77; usize_from(BLOCK.into())];
    disk.write_at(&block, 0).expect("written");
    let is_second = |op: &Op| op.kind == OpKind::Read && op.range.len > 64 << 10;
    meet((&storage, &disk), is_second, || {
        disk.write_at(&[9; 4096], 0).expect("written");
    });
    assert_reads(&disk, 0, 9);
}

/// A read that has found a block's slot finds the block in it, though it was copied elsewhere and the
/// file could be cut.
#[test]
fn a_block_stays_while_it_is_read() {
    const MARK: u64 = 3333;
    for format in [Format::Vhd, Format::Vhdx] {
        let folder = tempfile::tempdir().expect("a folder");
        let kind = Kind { format, ..VHD };
        let storage = SimStorage::from_file(&kind.file(folder.path())).expect("loaded");
        let storage = Arc::new(storage);
        let disk = Disk::open_storage(storage.clone(), Path::new("raced"), &options(true));
        let disk = disk.expect("opened");
        for megabyte in 0..3 {
            disk.write_at(&[7; 1 << 20], megabyte << 20)
                .expect("written");
        }
        disk.discard(0, 1 << 20).expect("discarded");
        disk.flush().expect("flushed");
        let [copied, reading, done] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let seen = [&copied, &reading, &done].map(Arc::clone);
        storage.on_op(move |_, op| match op.kind {
            // A move between its copy and its commit: a guest comes to read.
            OpKind::CopyWithin if !seen[0].swap(true, Ordering::SeqCst) => wait_for(&seen[1]),
            // It knows where the block is, and takes its time.
            OpKind::Read if op.range.len == MARK => {
                seen[1].store(true, Ordering::SeqCst);
                wait_for(&seen[2]);
            }
            _ => {}
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let operation = disk.compact(&CompactOptions::default());
                let report = operation.wait().expect("compacted");
                assert!(report.blocks_moved > 0);
                done.store(true, Ordering::SeqCst);
            });
            wait_for(&copied);
            assert!(copied.load(Ordering::SeqCst), "a block moves");
            let mut found = vec![0; usize_from(MARK)];
            disk.read_at(&mut found, 5 << 19).expect("read");
            assert!(found == [7; 3333], "{format}");
        });
        storage.clear_hook();
    }
}

/// All of the first block but its first `len` bytes is zero, and that is known.
fn with_data(len: u64) -> (Arc<SimStorage>, Arc<Disk>, FileRange) {
    let (storage, disk, data) = with_zeros(u64::from(BLOCK));
    disk.discard(len, u64::from(BLOCK) - len)
        .expect("discarded");
    (storage, disk, data)
}

/// A discard that frees nothing new takes the block away if nothing in it counts as data.
fn drop_if_dead(disk: &Disk) {
    disk.discard(u64::from(BLOCK) / 2, 4096).expect("discarded");
}

/// A write that was under way before zeros were written to its place, and ends after them.
#[test]
fn data_that_outlasts_zeros_is_not_taken_for_zeros() {
    let (storage, disk, data) = with_data(4096);
    let is_data = move |op: &Op| op.kind == OpKind::Write && op.range.start == data.start;
    interrupt(
        &storage,
        is_data,
        || disk.write_at(&[9; 4096], 0).expect("written"),
        || disk.write_at(&[0; 4096], 0).expect("written"),
    );
    assert_reads(&disk, 0, 9);
    drop_if_dead(&disk);
    assert_reads(&disk, 0, 9);
}

/// A write that begins and ends between zeros and the note of them.
#[test]
fn data_that_comes_after_zeros_and_before_their_note() {
    let (storage, disk, data) = with_data(128 << 10);
    // Long zeros become a hole; then the rest is written.
    let mut zeros = vec![0; 68 << 10];
    zeros[(64 << 10)..].fill(1);
    let rest = data.start.plus(64 << 10);
    interrupt(
        &storage,
        move |op| op.kind == OpKind::Write && op.range.start == rest,
        || disk.write_at(&zeros, 0).expect("written"),
        || disk.write_at(&[9; 4096], 4096).expect("written"),
    );
    disk.discard(64 << 10, 64 << 10).expect("discarded");
    drop_if_dead(&disk);
    assert_reads(&disk, 4096, 9);
}

/// A reader of a block does not wait for zeros that are written to it, nor for a discard of a part of it.
#[test]
fn nobody_waits_for_zeros() {
    let (storage, disk, _) = with_data(256 << 10);
    let mut mixed = [1; 12 << 10];
    mixed[4096..8192].fill(0);
    let acts: [(&(dyn Fn() + Sync), OpKind); 2] = [
        (
            &|| disk.write_at(&mixed, 0).expect("written"),
            OpKind::Write,
        ),
        (
            &|| disk.discard(64 << 10, 64 << 10).expect("discarded"),
            OpKind::PunchHole,
        ),
    ];
    for (act, kind) in acts {
        let started = Instant::now();
        interrupt(
            &storage,
            move |op| op.kind == kind,
            act,
            || assert_reads(&disk, 128 << 10, 5),
        );
        assert!(started.elapsed() < Duration::from_millis(400), "{kind:?}");
    }
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
