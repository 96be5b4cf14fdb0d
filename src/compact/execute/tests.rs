use std::path::Path;

use super::*;
use crate::create::{CreateOptions, create};
use crate::disk::OpenOptions;
use crate::format::Format;
use crate::storage::sim::{OpKind, SimStorage};
use crate::units::usize_from;

const BLOCK: u64 = 1 << 20;
const BLOCKS: u64 = 12;
const SMALL: Budget = Budget {
    bytes: 256 << 10,
    beside_guest: true,
};

fn open(storage: &Arc<SimStorage>, punch_holes: bool) -> Arc<Disk> {
    let options = OpenOptions {
        punch_holes,
        ..OpenOptions::default()
    };
    let storage: Arc<SimStorage> = Arc::clone(storage);
    Disk::open_storage(storage, Path::new("compacted"), &options).unwrap()
}

/// A disk whose blocks all hold their numbers, counted from 1, opened anew.
fn full(format: Format, punch_holes: bool) -> (Arc<SimStorage>, Arc<Disk>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let options = CreateOptions {
        block_size: Some(1 << 20),
        ..CreateOptions::new(format, DiskType::Dynamic, BLOCKS * BLOCK)
    };
    create(&path, &options).unwrap();
    let disk = Disk::open(&path, &OpenOptions::default()).unwrap();
    (0..BLOCKS).for_each(|n| disk.write_at(&content(n), n * BLOCK).unwrap());
    disk.close().unwrap();
    drop(disk);
    let storage = Arc::new(SimStorage::from_file(&path).unwrap());
    let disk = open(&storage, punch_holes);
    (storage, disk)
}

fn content(n: u64) -> Vec<u8> {
    vec![u8::try_from(n + 1).unwrap(); usize_from(BLOCK)]
}

fn compactor(disk: &Arc<Disk>) -> Compactor {
    let options = CompactOptions {
        punch_holes: true,
        ..CompactOptions::default()
    };
    Compactor::new(Arc::clone(disk), options).unwrap()
}

/// Runs to the end beside a guest, who does something before each step.
fn run(mut compactor: Compactor, mut guest: impl FnMut(u64)) -> CompactReport {
    for step in 0.. {
        assert!(step < 10_000, "it goes on for ever: {compactor:?}");
        guest(step);
        if compactor.step(SMALL, &|| true).unwrap() == Step::Done {
            break;
        }
    }
    compactor.into_report().unwrap()
}

/// What the first sector of each block was made to hold, and how much of that is durable.
struct Guest {
    disk: Arc<Disk>,
    written: Vec<Vec<u8>>,
    durable: Vec<usize>,
}

impl Guest {
    const GONE: std::ops::Range<u64> = 1..7;

    fn new(disk: &Arc<Disk>) -> Self {
        let written = (0..BLOCKS).map(|n| vec![content(n)[0]]).collect();
        Self {
            disk: Arc::clone(disk),
            written,
            durable: vec![0; usize_from(BLOCKS)],
        }
    }

    /// Writes to one of `blocks`, and now and then flushes; fails where the power does.
    fn act(&mut self, step: u64, blocks: &[u64]) {
        let n = blocks[usize_from(step / 3) % blocks.len()];
        let value = u8::try_from(step % 200 + 50).unwrap();
        // Known before: a write that fails may have been done.
        self.written[usize_from(n)].push(value);
        let sector = [value; 512];
        if self.disk.write_at(&sector, n * BLOCK).is_ok()
            && step % 4 == 3
            && self.disk.flush().is_ok()
        {
            self.note_durable();
        }
    }

    fn note_durable(&mut self) {
        let last = |versions: &Vec<u8>| versions.len() - 1;
        self.durable = self.written.iter().map(last).collect();
    }

    /// Whether `disk` has what a guest may rely on, after a power cut.
    fn check(&self, disk: &Disk, gone: bool) {
        let mut found = vec![0; usize_from(BLOCK)];
        for n in 0..BLOCKS {
            disk.read_at(&mut found, n * BLOCK).unwrap();
            if gone && Self::GONE.contains(&n) {
                assert!(found.iter().all(|byte| *byte == 0), "block {n} is not gone");
                continue;
            }
            let at = usize_from(n);
            let (sector, rest) = found.split_at(512);
            let versions = &self.written[at][self.durable[at]..];
            assert!(
                versions.contains(&sector[0]),
                "block {n} has {}, not {versions:?}",
                sector[0]
            );
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "block {n} is torn"
            );
            assert!(rest == &content(n)[512..], "block {n}");
        }
    }
}

/// A guest that writes before each step puts nothing off: in the end the file is as short as it can be.
#[test]
fn a_run_goes_on_beside_a_guest_that_writes() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = full(format, true);
        let mut guest = Guest::new(&disk);
        disk.discard(BLOCK, 6 * BLOCK).unwrap();
        storage.take_log();
        let report = run(compactor(&disk), |step| guest.act(step, &[0, 11]));
        assert!(
            report.blocks_moved > 3 && report.given_up == 0,
            "{format}: {report:?}"
        );
        let log = storage.take_log();
        let copied = log.iter().filter(|op| op.kind == OpKind::CopyWithin);
        assert!({ copied }.all(|op| op.range.len <= SMALL.bytes), "{format}");
        let least = 6 * disk.geometry().slot.len;
        assert!(
            disk.file_len() < least + (5 << 19) + (2 << 20),
            "{format}: {}",
            disk.file_len()
        );
        guest.check(&disk, true);
        disk.flush().unwrap();
        guest.note_durable();
        guest.check(&open(&Arc::new(storage.fork().kill()), true), true);
    }
}

/// The power may fail at any moment of it.
#[test]
fn a_run_beside_a_guest_can_be_cut_anywhere() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (start, disk) = full(format, true);
        disk.discard(BLOCK, 6 * BLOCK).unwrap();
        disk.flush().unwrap();
        for changes in (0..).step_by(3) {
            let storage = Arc::new(start.fork());
            let disk = open(&storage, true);
            let mut guest = Guest::new(&disk);
            storage.cut_after(changes);
            let mut compactor = compactor(&disk);
            let mut step = 0;
            let ended = loop {
                guest.act(step, &[0, 11, 10, 7, 9, 8]);
                step += 1;
                match compactor.step(SMALL, &|| true) {
                    Ok(Step::More) => {}
                    other => break other,
                }
            };
            let is_over = ended.is_ok() && !storage.is_cut();
            for mut choice in storage.choices(2, 3, changes) {
                let left = Arc::new(storage.crash(&mut choice));
                guest.check(&open(&left, true), true);
            }
            if is_over {
                break;
            }
        }
    }
}

/// A run costs what is new since the last one, and takes over what that did not come to.
#[test]
fn a_run_of_news_looks_at_what_is_new() {
    let (storage, disk) = full(Format::Vhdx, false);
    let read = || {
        let report = run(compactor(&disk).of_news(), |_| {});
        report.bytes_read
    };
    assert_eq!(read(), BLOCKS * BLOCK, "nobody has looked at anything");
    assert_eq!(read(), 0);
    // Half a granule: what is there now has to be looked at.
    disk.write_zeroes(3 * BLOCK + 2048, 4096).unwrap();
    let mut stopped = compactor(&disk).of_news();
    while stopped.phase() != Phase::Scan {
        stopped.step(SMALL, &|| true).unwrap();
    }
    drop(stopped);
    storage.take_log();
    assert_eq!(read(), 8192);
    assert_eq!(read(), 0);
    // A block that is dead goes, and the last one comes in its place.
    disk.write_at(&vec![0; usize_from(BLOCK)], 5 * BLOCK)
        .unwrap();
    let report = run(compactor(&disk).of_news(), |_| {});
    assert_eq!((report.blocks_dropped, report.blocks_moved), (1, 1));
    // Somebody else's run takes nothing from it.
    disk.write_zeroes(4 * BLOCK + 2048, 4096).unwrap();
    run(compactor(&disk), |_| {});
    assert_eq!(
        disk.maintenance().take_news().map(|news| news.len()),
        Some(1)
    );
}

/// What it costs to go on after one block of many has changed: all looked at anew, and what is new.
/// `cargo test --release --all-features --lib continuing_costs -- --ignored --nocapture`
#[test]
#[ignore = "prints figures"]
fn continuing_costs() {
    const MANY: u64 = 200_000;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let options = CreateOptions {
        block_size: Some(1 << 20),
        ..CreateOptions::new(Format::Vhdx, DiskType::Dynamic, MANY * BLOCK)
    };
    create(&path, &options).unwrap();
    let disk = open(&Arc::new(SimStorage::from_file(&path).unwrap()), false);
    for n in 0..MANY {
        disk.write_at(&[7; 512], n * BLOCK).unwrap();
    }
    run(compactor(&disk).of_news(), |_| {});
    let time = |name: &str, compactor: Compactor| {
        let begun = Instant::now();
        let report = run(compactor, |_| {});
        println!(
            "{name}: {:?}, {} moved",
            begun.elapsed(),
            report.blocks_moved
        );
    };
    for round in 1..4 {
        disk.discard(round * BLOCK, BLOCK).unwrap();
        time("of news, a block gone", compactor(&disk).of_news());
        disk.discard((round + 10) * BLOCK, BLOCK).unwrap();
        time("anew, a block gone", compactor(&disk));
        disk.write_zeroes((round + 20) * BLOCK, 4096).unwrap();
        time("of news, a part zeroed", compactor(&disk).of_news());
    }
}
