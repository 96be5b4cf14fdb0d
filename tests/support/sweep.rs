//! Runs a scenario once and looks at every state that a power cut, or the death of the process, at
//! any moment of it could leave.

use std::sync::Arc;

use parking_lot::Mutex;
use vhdfs::disk::Disk;
use vhdfs::error::CompactError;
use vhdfs::storage::sim::{Choice, Op, OpKind, Random, SimStorage};

use super::guest::{Guest, check_closed, compact, open_over};
use super::image::pattern;
use super::oracle::{After, Oracle};
use super::second;
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

/// Runs `scenario` on what `storage` holds and tries about `states` states.
pub(crate) fn sweep(
    name: &str,
    states: u64,
    storage: SimStorage,
    oracle: Oracle,
    scenario: impl FnOnce(&mut Guest),
) -> Tally {
    sweep_with(name, states, storage, oracle, None, scenario)
}

/// What happens while a sync of the file is under way.
pub(crate) type Meanwhile = Box<dyn Fn(&SimStorage) + Send + Sync>;

/// As [`sweep`]. While a sync is under way, `meanwhile` is called, to let other threads go on; what
/// they do then is not covered by that sync, and power may be cut before it has done anything.
pub(crate) fn sweep_with(
    name: &str,
    states: u64,
    storage: SimStorage,
    oracle: Oracle,
    meanwhile: Option<Meanwhile>,
    scenario: impl FnOnce(&mut Guest),
) -> Tally {
    let cuts: Arc<Mutex<Vec<Cut>>> = Arc::default();
    let kept = cuts.clone();
    let mut guest = Guest::new(storage, oracle, move |oracle, storage, op| {
        if op.kind.changes() {
            record(oracle, &kept, storage, Some(*op));
        }
        if let (OpKind::Sync, Some(meanwhile)) = (op.kind, &meanwhile) {
            meanwhile(storage);
            record(oracle, &kept, storage, Some(*op));
        }
    });
    scenario(&mut guest);
    record(guest.oracle(), &cuts, guest.storage(), None);
    guest.storage().clear_hook();
    drop(guest);
    let cuts = std::mem::take(&mut *cuts.lock());
    judge(name, states, &cuts)
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

/// States that are tried at a cut, at least.
const LEAST: u64 = 12;

fn judge(name: &str, states: u64, cuts: &[Cut]) -> Tally {
    let mut tally = Tally {
        cuts: len_of(cuts),
        ..Tally::default()
    };
    // Few states go to some of the cuts, rather than too few to each.
    let looked_at = (states / LEAST).clamp(1, tally.cuts);
    let mean = states / looked_at;
    let mut seeds = Random::new(env_number("VHDFS_SEED", 1));
    for cut in cuts {
        if seeds.below(tally.cuts) >= looked_at {
            continue;
        }
        let fail = |what: &str, error: &str| {
            panic!(
                "{name}, cut {} before {:?}, {what}: {error}\noutstanding: {:#?}",
                cut.number,
                cut.before,
                cut.storage.unsynced()
            )
        };
        let durable = Durable::of(&cut.storage);
        if let Err(error) = survive(
            cut.storage.fork(),
            &durable,
            cut,
            After::Kill,
            true,
            &mut tally,
        ) {
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
            if let Err(error) = survive(state, &durable, cut, After::PowerCut, thorough, &mut tally)
            {
                fail(&format!("{choice:?}"), &error);
            }
        }
    }
    tally
}

/// What is known of the end of a file before power is cut.
struct Durable {
    trailing_footer: bool,
    /// The lengths to which outstanding changes extend the file.
    growing_to: Vec<u64>,
}

impl Durable {
    fn of(storage: &SimStorage) -> Self {
        let durable = storage.crash(&mut Choice::AllLost);
        let image = second::read_checked(&durable).expect("what is durable is sound");
        let mut len = image.file_len();
        let mut growing_to = Vec::new();
        for change in storage.unsynced() {
            let end = change.range.end().get();
            match change.kind {
                OpKind::SetLen | OpKind::Write | OpKind::CopyWithin if end > len => {
                    growing_to.push(end);
                    len = end;
                }
                OpKind::SetLen => len = end,
                _ => {}
            }
        }
        Self {
            trailing_footer: has_footer(&image),
            growing_to,
        }
    }
}

/// Whether it ends with its footer; a VHDX, which has none, always does.
fn has_footer(image: &second::Image) -> bool {
    match image {
        second::Image::Vhd(image) => image.trailing.is_some(),
        second::Image::Vhdx(_) => true,
    }
}

/// The first two, the extremes, and of the rest any, `most` together; of less than three, any.
fn thin(mut choices: Vec<Choice>, most: u64, random: &mut Random) -> Vec<Choice> {
    let extremes = if most < 3 { 0 } else { 2 };
    while len_of(&choices) > most.max(1) {
        let left = len_of(&choices) - extremes;
        choices.swap_remove(size(extremes + random.below(left)));
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
    let disk = open_over(&storage, cut.oracle.parent())?;
    disk.close().map_err(|error| format!("closing: {error}"))?;
    drop(disk);
    storage.clear_hook();
    let mut random = Random::new(seed);
    let moments = std::mem::take(&mut *moments.lock());
    let count = len_of(&moments);
    for (n, (moment, op)) in moments.iter().enumerate() {
        // About as many as were asked for, three at least, wherever they fall.
        let few = random.below(count) < most.max(3);
        if !few {
            continue;
        }
        let durable = Durable::of(moment);
        let choices = moment.choices(4, 4, random.next());
        for mut choice in thin(choices, most.max(3) / count, &mut random) {
            tally.states += 1;
            let state = moment.crash(&mut choice);
            survive(state, &durable, cut, After::PowerCut, false, tally).map_err(|error| {
                let outstanding = moment.unsynced();
                format!("at {n}, before {op:?}, {choice:?}: {error}\n{outstanding:#?}")
            })?;
        }
    }
    Ok(())
}

/// The file opens, and everything in it is what it may be.
///
/// Its end has a footer, unless the file was just growing: shrinking never takes it away.
fn survive(
    state: SimStorage,
    durable: &Durable,
    cut: &Cut,
    after: After,
    thorough: bool,
    tally: &mut Tally,
) -> Result<(), String> {
    let storage = Arc::new(state);
    let found = second::read_checked(&*storage).map_err(|error| format!("as found: {error}"))?;
    if after == After::PowerCut && !has_footer(&found) {
        tally.without_trailing += 1;
        if durable.trailing_footer && !durable.growing_to.contains(&found.file_len()) {
            return Err("no footer at the end, though the file was not growing".into());
        }
    }
    if thorough {
        // Another implementation reads the same, before we have put anything right.
        let parent = cut.oracle.parent();
        let below = |buf: &mut [u8], at: u64| cut.oracle.base(at, buf);
        let below: second::Parent = parent.is_some().then_some(&below);
        let read = |buf: &mut [u8], at: u64| found.read_at(&*storage, below, buf, at);
        cut.oracle
            .check_reads(&read, after)
            .map_err(|error| format!("as found by the second reader: {error}"))?;
    }
    let disk = open_over(&storage, cut.oracle.parent())?;
    cut.oracle
        .check(&disk, after, thorough)
        .map_err(|error| format!("reopened: {error}"))?;
    if thorough {
        tally.continued += 1;
        carry_on(&storage, disk, cut.oracle.clone())?;
    } else {
        disk.close().map_err(|error| format!("closing: {error}"))?;
        drop(disk);
        check_closed(&storage).map_err(|error| format!("closed: {error}"))?;
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
    let is_fixed = match compact(&disk) {
        Err(CompactError::Fixed) => true,
        other => other
            .map(|()| false)
            .map_err(|error| format!("compacting: {error}"))?,
    };
    let check = |disk: &Disk| oracle.check(disk, After::Kill, true);
    check(&disk).map_err(|error| format!("compacted: {error}"))?;
    disk.close().map_err(io)?;
    drop(disk);
    let image = check_closed(storage).map_err(|error| format!("compacted and closed: {error}"))?;
    if !is_fixed {
        image
            .check_compact()
            .map_err(|error| format!("compacted: {error}"))?;
    }
    let disk = open_over(storage, oracle.parent())?;
    check(&disk).map_err(|error| format!("compacted and reopened: {error}"))
}
