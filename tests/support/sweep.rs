//! Runs a scenario once and looks at every state that a power cut, or the death of the process, at
//! any moment of it could leave.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vhdfs::check::{CheckOptions, check_storage};
use vhdfs::compact::{CompactOptions, IdlePolicy, IdleWork, Next};
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Choice, Op, OpKind, Random, SimStorage};

use super::image::{View, pattern};
use super::oracle::{After, Oracle};
use super::{env_number, len_of, size};

/// The file and what it may read as, right before an operation.
#[derive(Debug)]
struct Cut {
    number: usize,
    storage: SimStorage,
    oracle: Oracle,
    /// What was to come; `None` at the end.
    before: Option<Op>,
}

/// A disk in use, watched.
pub(crate) struct Guest {
    storage: Arc<SimStorage>,
    disk: Option<Arc<Disk>>,
    oracle: Arc<Mutex<Oracle>>,
    cuts: Arc<Mutex<Vec<Cut>>>,
    /// Tells contents apart.
    writes: AtomicU64,
}

pub(crate) fn open(storage: &Arc<SimStorage>) -> Result<Arc<Disk>, String> {
    let storage: Arc<dyn Storage> = storage.clone();
    let disk = Disk::open_storage(storage, Path::new("simulated.vhd"), &OpenOptions::default());
    disk.map_err(|error| format!("does not open: {error}"))
}

/// The crate's own checker and ours find nothing.
pub(crate) fn check_file(storage: &Arc<SimStorage>) -> Result<View, String> {
    let view = View::read(&**storage)?;
    let report = check_storage(&**storage, &CheckOptions::default());
    let report = report.map_err(|error| format!("cannot be checked: {error}"))?;
    if !report.is_clean() {
        return Err(format!("the check finds {:?}", report.errors));
    }
    Ok(view)
}

/// Compacts all that can be, with a scan.
pub(crate) fn compact(disk: &Arc<Disk>) -> Result<(), String> {
    let options = CompactOptions {
        scan: true,
        ..CompactOptions::default()
    };
    let report = disk.compact(&options).wait();
    report
        .map(drop)
        .map_err(|error| format!("compaction: {error}"))
}

impl Guest {
    /// Opens what `storage` holds, which `oracle` knows. Watched from before the open on.
    pub(crate) fn new(storage: SimStorage, oracle: Oracle) -> Self {
        let guest = Self {
            storage: Arc::new(storage),
            disk: None,
            oracle: Arc::new(Mutex::new(oracle)),
            cuts: Arc::default(),
            writes: AtomicU64::new(1 << 16),
        };
        let (oracle, cuts) = (guest.oracle.clone(), guest.cuts.clone());
        guest.storage.on_op(move |storage, op| {
            if op.kind.changes() {
                record(&oracle, &cuts, storage, Some(*op));
            }
        });
        Self {
            disk: Some(open(&guest.storage).unwrap()),
            ..guest
        }
    }

    pub(crate) fn disk(&self) -> &Arc<Disk> {
        self.disk.as_ref().expect("it is open")
    }

    pub(crate) fn write(&self, offset: u64, count: u64) {
        let mut data = vec![0; size(count)];
        let tag = self.writes.fetch_add(1, Ordering::Relaxed);
        pattern(tag, offset / 512, &mut data);
        self.write_bytes(offset, &data);
    }

    /// An ordinary write of zeros.
    pub(crate) fn write_zero_bytes(&self, offset: u64, count: u64) {
        self.write_bytes(offset, &vec![0; size(count)]);
    }

    fn write_bytes(&self, offset: u64, data: &[u8]) {
        let pending = self.oracle.lock().begin(offset, data);
        self.disk().write_at(data, offset).unwrap();
        self.oracle.lock().acknowledge(pending);
    }

    pub(crate) fn write_zeroes(&self, offset: u64, count: u64) {
        let pending = self.oracle.lock().begin(offset, &vec![0; size(count)]);
        self.disk().write_zeroes(offset, count).unwrap();
        self.oracle.lock().acknowledge(pending);
    }

    pub(crate) fn discard(&self, offset: u64, count: u64) {
        let pending = self.oracle.lock().begin(offset, &vec![0; size(count)]);
        self.disk().discard(offset, count).unwrap();
        self.oracle.lock().acknowledge(pending);
    }

    pub(crate) fn flush(&self) {
        let pending = self.oracle.lock().begin_flush();
        self.disk().flush().unwrap();
        self.oracle.lock().acknowledge_flush(pending);
    }

    pub(crate) fn compact(&self) {
        compact(self.disk()).unwrap();
    }

    /// At most `steps` steps of idle work; true once it has nothing more to do.
    pub(crate) fn idle(&self, work: &mut IdleWork, steps: u32) -> bool {
        for _ in 0..steps {
            match work.step() {
                Next::Again => {}
                Next::Wait(_) => std::thread::yield_now(),
                Next::Done => return true,
                Next::Failed(error) => panic!("idle work: {error}"),
            }
        }
        false
    }

    /// Idle work on the disk that begins at once, however little there is to gain.
    pub(crate) fn idle_work(&self) -> IdleWork {
        let idle_after = std::time::Duration::ZERO;
        let policy = IdlePolicy {
            idle_after,
            min_reclaim: 1,
            punch_holes: true,
        };
        IdleWork::new(self.disk().clone(), policy)
    }

    /// Closes cleanly, which flushes, and opens again.
    pub(crate) fn reopen(&mut self) {
        self.close();
        self.disk = Some(open(&self.storage).unwrap());
    }

    pub(crate) fn close(&mut self) {
        let disk = self.disk.take().expect("it is open");
        let pending = self.oracle.lock().begin_flush();
        disk.close().unwrap();
        self.oracle.lock().acknowledge_flush(pending);
        drop(disk);
        check_file(&self.storage).unwrap();
    }

    /// The cuts so far, and one at the end.
    fn finish(mut self) -> Vec<Cut> {
        record(&self.oracle, &self.cuts, &self.storage, None);
        self.storage.clear_hook();
        self.disk = None;
        std::mem::take(&mut *self.cuts.lock())
    }
}

/// The oracle stays locked meanwhile, so that what a guest thread is told and what is kept agree.
fn record(
    oracle: &Mutex<Oracle>,
    cuts: &Mutex<Vec<Cut>>,
    storage: &SimStorage,
    before: Option<Op>,
) {
    let oracle = oracle.lock();
    let (storage, oracle_then) = (storage.fork(), oracle.clone());
    let mut cuts = cuts.lock();
    let number = cuts.len();
    cuts.push(Cut {
        number,
        storage,
        oracle: oracle_then,
        before,
    });
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Moments of the cut.
    pub(crate) cuts: u64,
    /// States after a power cut.
    pub(crate) states: u64,
    /// Those whose only footer was the copy at the start.
    pub(crate) without_trailing: u64,
    /// States that were compacted, written to and checked again.
    pub(crate) continued: u64,
}

/// Runs `scenario` on what `storage` holds and tries about `states` states, [`VHDFS_SOAK`] times as
/// many where that is set.
///
/// [`VHDFS_SOAK`]: env_number
pub(crate) fn sweep(
    name: &str,
    states: u64,
    storage: SimStorage,
    oracle: Oracle,
    scenario: impl FnOnce(&mut Guest),
) -> Tally {
    let mut guest = Guest::new(storage, oracle);
    scenario(&mut guest);
    let cuts = guest.finish();
    let tally = judge(name, states, &cuts);
    tally
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.cuts += other.cuts;
        self.states += other.states;
        self.without_trailing += other.without_trailing;
        self.continued += other.continued;
    }

    pub(crate) fn print(&self, name: &str) {
        println!(
            "{name}: {} states of {} cuts, {} without a trailing footer, {} compacted afterwards",
            self.states, self.cuts, self.without_trailing, self.continued
        );
    }
}

fn judge(name: &str, states: u64, cuts: &[Cut]) -> Tally {
    let states = states * env_number("VHDFS_SOAK", 1);
    let mut tally = Tally {
        cuts: len_of(cuts),
        ..Tally::default()
    };
    let mean = states / tally.cuts.max(1);
    let mut seeds = Random::new(env_number("VHDFS_SEED", 1));
    for cut in cuts {
        let fail = |what: &str, error: &str| {
            panic!(
                "{name}, cut {} before {:?}, {what}: {error}\noutstanding: {:#?}",
                cut.number,
                cut.before,
                cut.storage.unsynced()
            )
        };
        if let Err(error) = survive(cut.storage.fork(), cut, After::Kill, true, &mut tally) {
            fail("process killed", &error);
        }
        if let Err(error) = cut_while_reopening(cut, mean / 4, seeds.next(), &mut tally) {
            fail(
                "process killed, then power cut while the file was open again",
                &error,
            );
        }
        let choices = cut.storage.choices(7, mean / 2, seeds.next());
        for (n, mut choice) in thin(choices, mean * 2, &mut seeds).into_iter().enumerate() {
            let state = cut.storage.crash(&mut choice);
            let thorough = (n + cut.number) % 8 == 0;
            tally.states += 1;
            if let Err(error) = survive(state, cut, After::PowerCut, thorough, &mut tally) {
                fail(&format!("{choice:?}"), &error);
            }
        }
    }
    tally
}

/// The first two, the extremes, and of the rest any, `most` together.
fn thin(mut choices: Vec<Choice>, most: u64, random: &mut Random) -> Vec<Choice> {
    while len_of(&choices) > most.max(8) {
        choices.swap_remove(2 + size(random.below(len_of(&choices) - 2)));
    }
    choices
}

/// After the death of the process the file is opened and closed by the next one, with what the first
/// left unsynced still so; meanwhile the power is cut.
fn cut_while_reopening(cut: &Cut, most: u64, seed: u64, tally: &mut Tally) -> Result<(), String> {
    let storage = Arc::new(cut.storage.fork());
    let moments: Arc<Mutex<Vec<(SimStorage, Op)>>> = Arc::default();
    let kept = moments.clone();
    storage.on_op(move |storage, op| {
        if op.kind.changes() {
            kept.lock().push((storage.fork(), *op));
        }
    });
    let disk = open(&storage)?;
    disk.close().map_err(|error| format!("closing: {error}"))?;
    drop(disk);
    storage.clear_hook();
    let mut random = Random::new(seed);
    for (n, (moment, op)) in std::mem::take(&mut *moments.lock()).iter().enumerate() {
        let choices = moment.choices(4, 4, random.next());
        for mut choice in thin(choices, most, &mut random) {
            tally.states += 1;
            let state = moment.crash(&mut choice);
            survive(state, cut, After::PowerCut, false, tally).map_err(|error| {
                let outstanding = moment.unsynced();
                format!("at {n}, before {op:?}, {choice:?}: {error}\n{outstanding:#?}")
            })?;
        }
    }
    Ok(())
}

/// The file opens, and everything in it is what it may be.
fn survive(
    state: SimStorage,
    cut: &Cut,
    after: After,
    thorough: bool,
    tally: &mut Tally,
) -> Result<(), String> {
    let storage = Arc::new(state);
    let view = View::read(&*storage).map_err(|error| format!("as found: {error}"))?;
    if after == After::PowerCut && !view.trailing_footer {
        tally.without_trailing += 1;
    }
    let disk = open(&storage)?;
    cut.oracle
        .check(&disk, after, thorough)
        .map_err(|error| format!("reopened: {error}"))?;
    if thorough {
        tally.continued += 1;
        carry_on(&storage, disk, cut.oracle.clone())?;
    } else {
        disk.close().map_err(|error| format!("closing: {error}"))?;
        let view = check_file(&storage).map_err(|error| format!("closed: {error}"))?;
        if !view.trailing_footer {
            return Err("closed: no footer at the end".into());
        }
    }
    Ok(())
}

/// Life goes on: the guest writes, the rest is compacted, and all is still there.
fn carry_on(storage: &Arc<SimStorage>, disk: Arc<Disk>, mut oracle: Oracle) -> Result<(), String> {
    oracle.settle(&disk);
    let io = |error: vhdfs::error::DiskError| format!("carrying on: {error}");
    for block in [disk.len() / 3, disk.len() - 5000, 700] {
        let offset = block / 512 * 512 + 100;
        let mut data = [0; 3000];
        pattern(offset, 77, &mut data);
        let pending = oracle.begin(offset, &data);
        disk.write_at(&data, offset).map_err(io)?;
        oracle.acknowledge(pending);
    }
    disk.flush().map_err(io)?;
    compact(&disk)?;
    let check = |disk: &Disk| oracle.check(disk, After::Kill, true);
    check(&disk).map_err(|error| format!("compacted: {error}"))?;
    disk.close().map_err(io)?;
    drop(disk);
    let view = check_file(storage).map_err(|error| format!("compacted and closed: {error}"))?;
    view.check_compact()
        .map_err(|error| format!("compacted: {error}"))?;
    let disk = open(storage)?;
    check(&disk).map_err(|error| format!("compacted and reopened: {error}"))
}

/// The operations that `storage` was asked for since the last call, of one kind.
pub(crate) fn count(storage: &SimStorage, kind: OpKind) -> usize {
    storage
        .take_log()
        .iter()
        .filter(|op| op.kind == kind)
        .count()
}
