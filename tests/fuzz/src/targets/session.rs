//! What a writable session may not do to a file, whatever is in it: damage what could be read before.
//!
//! A read-only open reads all that it can. Then the file is opened for writing and written to,
//! discarded, compacted, killed or cut off from power, as the input says. After it every byte that
//! was not written to reads as before, what was written reads as written, and the checker finds no
//! more than before. A file that is not opened for writing is not touched.
//!
//! ```text
//! u8   bit 0: repair first; bit 1: without punching holes
//! then operations (24 at most), each of 8 bytes:
//! u8 kind, u8 length, u32 where, u16 variant
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rangemap::RangeSet;
use vhdfs::check::{CheckOptions, CheckReport, check_storage};
use vhdfs::compact::CompactOptions;
use vhdfs::disk::{Disk, ExtentKind, OpenOptions};
use vhdfs::error::{DiskError, OpenError};
use vhdfs::image::{identify, probe};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Choice, SimStorage};
use vhdfs::units::{low_u8, u64_from, usize_from};

use super::input::Input;

/// What is read and remembered at a time.
const PIECE: u64 = 64 << 10;
/// Of a disk that holds more, the rest is not looked at.
const MAX_PIECES: usize = 256;
/// Operations of the host in one session: more is a loop without an end.
const MAX_OPS: u64 = 400_000;
const MAX_STEPS: usize = 24;

/// A file to open, and its parents, the oldest first.
pub(super) struct Case {
    pub(super) file: SimStorage,
    pub(super) parents: Vec<SimStorage>,
    pub(super) name: &'static str,
}

/// What has to be on the disk.
#[derive(Default)]
struct Content {
    /// By disk offset; what is missing, and not unknown, is all zeros.
    pieces: BTreeMap<u64, Vec<u8>>,
    /// What nobody can tell: it could not be read, or may or may not have been written.
    unknown: RangeSet<u64>,
    /// Written since the last flush.
    unflushed: RangeSet<u64>,
    disk_len: u64,
}

/// A session with its parents and the budget of host operations.
struct Session {
    parents: Vec<SimStorage>,
    name: &'static Path,
    punch_holes: bool,
    ops: Arc<AtomicU64>,
}

/// Opens the file read-only, then for writing, and sees that nothing was lost.
pub(super) fn session(case: Case, input: &mut Input<'_>) {
    let flags = input.byte();
    let session = Session {
        parents: case.parents,
        name: Path::new(case.name),
        punch_holes: flags & 2 == 0,
        ops: Arc::default(),
    };
    let mut file = session.watched(case.file);
    let (readable, report) = session.look(&file);
    if flags & 1 == 1 {
        session.repair(&file, &readable, &report);
    }
    let before = file.counters();
    let disk = match session.open(&file, false) {
        Ok(disk) => disk,
        Err(error) => {
            let after = file.counters();
            let touched = [
                after.writes - before.writes,
                after.set_lens - before.set_lens,
                after.punches + after.zeroings - before.punches - before.zeroings,
                after.copies - before.copies,
            ];
            assert_eq!(touched, [0; 4], "refused, yet written to: {error}");
            return;
        }
    };
    let mut content =
        readable.unwrap_or_else(|error| panic!("opens for writing, not for reading: {error}"));
    let disk = session.live(disk, &mut file, &mut content, input);
    let closed = disk.close();
    drop(disk);
    session.verify(&file, &content, "closed");
    let after = check(&file);
    assert!(
        after.errors.len() <= report.errors.len(),
        "found before: {:?}; after a session (closed: {closed:?}): {:?}",
        report.errors,
        after.errors
    );
}

impl Session {
    /// `file` with its operations counted, and what it was asked for so far forgotten.
    fn watched(&self, file: SimStorage) -> Arc<SimStorage> {
        let file = file.fork();
        let ops = Arc::clone(&self.ops);
        file.on_op(move |_, _| {
            let so_far = ops.fetch_add(1, Ordering::Relaxed);
            assert!(
                so_far < MAX_OPS,
                "more than {MAX_OPS} operations of the host"
            );
        });
        Arc::new(file)
    }

    fn open(&self, file: &Arc<SimStorage>, read_only: bool) -> Result<Arc<Disk>, OpenError> {
        let mut parent = None;
        let mut name = self.parents.len();
        for file in &self.parents {
            let options = OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            };
            let path = format!("parent{name}");
            name -= 1;
            parent = Some(Disk::open_over(
                self.watched(file.fork()),
                Path::new(&path),
                &options,
                parent,
            )?);
        }
        let options = OpenOptions {
            read_only,
            punch_holes: self.punch_holes,
            ..OpenOptions::default()
        };
        let file: Arc<dyn Storage> = Arc::<SimStorage>::clone(file);
        Disk::open_over(file, self.name, &options, parent)
    }

    /// All that a look tells, without a change of the file.
    fn look(&self, file: &Arc<SimStorage>) -> (Result<Content, OpenError>, CheckReport) {
        let _ = identify(&**file, self.name).map_err(|error| error.to_string());
        let _ = probe(&**file, self.name).map_err(|error| error.to_string());
        let report = check(file);
        let disk = self.open(file, true);
        if let Err(error) = &disk {
            let _ = error.to_string();
        }
        let content = disk.map(|disk| {
            let _ = (disk.info().expect("told"), disk.regions());
            Content::of(&disk)
        });
        let counters = file.counters();
        let changes = counters.writes + counters.set_lens + counters.punches + counters.zeroings;
        assert_eq!(changes + counters.copies, 0, "changed by a look");
        (content, report)
    }

    /// Repairs what is safe, and sees that it was.
    fn repair(
        &self,
        file: &Arc<SimStorage>,
        readable: &Result<Content, OpenError>,
        report: &CheckReport,
    ) {
        let told = CheckOptions {
            repair: true,
            dry_run: true,
            ..CheckOptions::default()
        };
        let told = check_storage(&**file, &told).expect("the host reads");
        let done = CheckOptions {
            repair: true,
            ..CheckOptions::default()
        };
        let done = check_storage(&**file, &done).expect("the host writes");
        assert_eq!(told.repaired, done.repaired, "what a dry run tells is done");
        if let Ok(content) = readable {
            self.verify(file, content, "repaired");
        }
        let after = check(file);
        assert!(
            after.errors.len() <= report.errors.len(),
            "found before: {:?}; after a repair: {:?}",
            report.errors,
            after.errors
        );
    }

    /// Does what the input says.
    fn live(
        &self,
        mut disk: Arc<Disk>,
        file: &mut Arc<SimStorage>,
        content: &mut Content,
        input: &mut Input<'_>,
    ) -> Arc<Disk> {
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            let (kind, len, at) = (input.byte(), input.byte(), input.u32());
            let variant = input.u16();
            let range = range_of(disk.len(), at, len);
            match kind % 10 {
                0..=2 => {
                    let tag = low_u8(u64::from(variant)) | 1;
                    let data = vec![tag; usize_from(range.end - range.start)];
                    content.write(&range, Some(tag), disk.write_at(&data, range.start));
                }
                3 | 4 => {
                    let len = range.end - range.start;
                    let done = match kind % 10 {
                        3 => disk.write_zeroes(range.start, len),
                        _ => disk.discard(range.start, len),
                    };
                    content.write(&range, None, done);
                }
                5 if disk.flush().is_ok() => content.unflushed.clear(),
                6 => {
                    let options = CompactOptions {
                        dry_run: variant & 8 != 0,
                        scan: variant & 1 == 0,
                        punch_holes: variant & 2 != 0,
                        drop_identical: variant & 4 == 0,
                        ..CompactOptions::default()
                    };
                    // What it refuses or cannot do changes nothing either.
                    let _ = disk
                        .compact(&options)
                        .wait()
                        .map_err(|error| error.to_string());
                }
                7 | 8 => {
                    let next = match kind % 10 {
                        7 => file.kill(),
                        _ => content.cut_power(file, variant),
                    };
                    drop(disk);
                    *file = self.watched(next);
                    self.verify(file, content, "cut off");
                    let opened = self.open(file, false);
                    disk = opened.unwrap_or_else(|error| panic!("cut off, then: {error}"));
                }
                _ => drop(disk.close()),
            }
        }
        disk
    }

    /// That the file, opened read-only, has `content`.
    fn verify(&self, file: &Arc<SimStorage>, content: &Content, when: &str) {
        let disk = self.open(file, true);
        let disk = disk.unwrap_or_else(|error| panic!("{when}, no longer readable: {error}"));
        assert_eq!(disk.len(), content.disk_len, "{when}");
        let (mut buf, zeros) = (Vec::new(), vec![0; usize_from(PIECE)]);
        let mut pieces = data_pieces(&disk);
        pieces.extend(content.pieces.keys());
        for at in pieces {
            let end = (at + PIECE).min(disk.len());
            let expected = content.pieces.get(&at).unwrap_or(&zeros);
            for part in content.unknown.gaps(&(at..end)) {
                buf.resize(usize_from(part.end - part.start), 0);
                if let Err(error) = disk.read_at(&mut buf, part.start) {
                    panic!("{when}, {part:?} could be read before: {error}");
                }
                let own = usize_from(part.start - at)..usize_from(part.end - at);
                let expected = &expected[own];
                // The whole first: a fuzzer makes loops slow.
                if buf != *expected {
                    let pairs = buf.iter().zip(expected);
                    let same = pairs
                        .take_while(|(found, expected)| found == expected)
                        .count();
                    let (found, expected) = (buf[same], expected[same]);
                    let at = part.start + u64_from(same);
                    panic!("{when}, byte {at} is {found:#x}, not {expected:#x}");
                }
            }
        }
    }
}

impl Content {
    /// What can be read of `disk`.
    fn of(disk: &Disk) -> Self {
        let mut content = Self {
            disk_len: disk.len(),
            ..Self::default()
        };
        let data = data_pieces(disk);
        if let Some(last) = data.last().filter(|_| data.len() >= MAX_PIECES) {
            content.unknown.insert(*last..u64::MAX);
        }
        for at in data {
            let mut bytes = vec![0; usize_from(PIECE.min(disk.len() - at))];
            let range = at..at + u64_from(bytes.len());
            match disk.read_at(&mut bytes, at) {
                Ok(()) => {
                    bytes.resize(usize_from(PIECE), 0);
                    content.pieces.insert(at, bytes);
                }
                Err(error) => {
                    let _ = error.to_string();
                    content.unknown.insert(range);
                }
            }
        }
        content
    }

    /// Notes that `range` became `tag`, or zeros, or may have.
    fn write(&mut self, range: &Range<u64>, tag: Option<u8>, done: Result<(), DiskError>) {
        if range.is_empty() {
            return;
        }
        if done.is_err() {
            return self.unknown.insert(range.clone());
        }
        self.unknown.remove(range.clone());
        self.unflushed.insert(range.clone());
        let mut at = range.start / PIECE * PIECE;
        while at < range.end {
            let piece = self
                .pieces
                .entry(at)
                .or_insert_with(|| vec![0; usize_from(PIECE)]);
            let (from, to) = (range.start.max(at), range.end.min(at + PIECE));
            piece[usize_from(from - at)..usize_from(to - at)].fill(tag.unwrap_or(0));
            at += PIECE;
        }
    }

    /// The file after a power cut: what was written since the last flush may be there or not.
    fn cut_power(&mut self, file: &SimStorage, variant: u16) -> SimStorage {
        let mut choice = match variant % 4 {
            0 => Choice::AllLost,
            1 => Choice::AllKept,
            _ => Choice::Seeded {
                seed: variant.into(),
                atomic: 512,
            },
        };
        let next = file.crash(&mut choice);
        for range in std::mem::take(&mut self.unflushed) {
            self.unknown.insert(range);
        }
        next
    }
}

/// The pieces of `disk` that are not known to be zeros; not all of very many.
fn data_pieces(disk: &Disk) -> BTreeSet<u64> {
    let mut pieces = BTreeSet::new();
    for extent in disk
        .extents(0)
        .filter(|extent| extent.kind == ExtentKind::Data)
    {
        let mut at = extent.offset / PIECE * PIECE;
        while at < extent.offset + extent.len {
            if pieces.len() >= MAX_PIECES {
                return pieces;
            }
            pieces.insert(at);
            at += PIECE;
        }
    }
    pieces
}

/// A range of a disk of `disk_len` bytes: near its start, near a boundary, or anywhere.
fn range_of(disk_len: u64, at: u32, len: u8) -> Range<u64> {
    let units = [1, 512, 4096, PIECE];
    let unit = units[usize::from(len >> 6)];
    let at = u64::from(at);
    let start = match at & 3 {
        0 => at >> 2,
        1 => (at >> 2) * 4096,
        2 => (at >> 2 & 63) * PIECE,
        _ => disk_len.saturating_sub(at >> 2 & 0xf_ffff),
    } % disk_len;
    start..(start + (u64::from(len & 63) + 1) * unit).min(disk_len)
}

fn check(file: &Arc<SimStorage>) -> CheckReport {
    let options = CheckOptions::default();
    check_storage(&**file, &options).expect("the host reads")
}
