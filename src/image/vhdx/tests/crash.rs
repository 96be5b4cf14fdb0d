//! Power cuts at every kind of moment: what an image commits appears in order and as a whole.

use parking_lot::Mutex;

use super::*;
use crate::format::vhdx::PAGE;
use crate::storage::sim::{Choice, Op, Random};

/// Sectors of 4096 bytes in a block of 1 MiB.
const SECTORS: u64 = 256;

/// What is known of a block. `bits`: the sectors in its slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    slot: u64,
    is_zero: bool,
    bits: [u64; 4],
}

const ALL: [u64; 4] = [u64::MAX; 4];

fn bits_of(sectors: &Range<u64>) -> [u64; 4] {
    let mut bits = [0; 4];
    for sector in sectors.clone() {
        bits[usize_from(sector / 64)] |= 1 << (sector % 64);
    }
    bits
}

fn states(image: &dyn Image) -> Vec<State> {
    let map = image.map();
    map.blocks()
        .map(|block| match map.get(block) {
            BlockState::NotPresent => State::default(),
            BlockState::Zero => State {
                is_zero: true,
                ..State::default()
            },
            BlockState::Present { slot, whole } => State {
                slot: slot.get(),
                is_zero: false,
                bits: if whole {
                    ALL
                } else {
                    let bitmap = image.sector_bitmap(block).unwrap();
                    let bytes = bitmap.bytes().as_chunks::<8>().0;
                    std::array::from_fn(|n| u64::from_le_bytes(bytes[n]))
                },
            },
        })
        .collect()
}

/// The states that a power cut now may leave: that of the last sync, and those since.
#[derive(Debug, Default)]
struct History {
    states: Vec<Vec<State>>,
    /// Whether blocks have a parent behind them.
    child: bool,
    checked: u64,
    kept: [u64; 2],
}

impl History {
    /// That the file in `sim` is one of them, read-only and writable.
    fn check(&mut self, sim: SimStorage, choice: Choice) {
        self.checked += 1;
        let sim = Arc::new(sim);
        let before = sim.counters();
        let view = match open(Arc::<SimStorage>::clone(&sim), READ_ONLY) {
            Ok(opened) => opened.image,
            Err(error) => panic!("{choice:?}: {error}"),
        };
        let found = states(&*view);
        let Some(position) = self.states.iter().position(|state| *state == found) else {
            let last = self.states.last().unwrap();
            let differ = (0..found.len()).find(|n| found[*n] != last[*n]).unwrap();
            panic!(
                "{choice:?}: none of {} states; block {differ} is {:?}, was {:?}",
                self.states.len(),
                found[differ],
                self.states
                    .iter()
                    .map(|state| state[differ])
                    .collect::<Vec<_>>()
            );
        };
        self.kept[usize::from(position > 0)] += 1;
        self.check_data(&*view, &found, choice);
        assert_eq!(sim.counters().writes, before.writes);
        let image = open(Arc::<SimStorage>::clone(&sim), OPTIONS).unwrap().image;
        assert_eq!(states(&*image), found, "{choice:?}: replayed");
        self.check_data(&*image, &found, choice);
        assert_eq!(sim.unsynced_len(), 0);
        let current = replay::read_header(&*sim).unwrap().header;
        assert!(current.log_guid.is_nil());
    }

    /// That no block shows another's data.
    fn check_data(&self, image: &dyn Image, states: &[State], choice: Choice) {
        for (number, state) in (0_u64..).zip(states) {
            if state.slot == 0 {
                continue;
            }
            for sector in [0, 1, 70, 128, 200, 255] {
                let is_here = state.bits[usize_from(sector / 64)] >> (sector % 64) & 1 == 1;
                let mut mark = [0; 8];
                let place = at(state.slot + sector * PAGE);
                image.storage().read_exact_at(&mut mark, place).unwrap();
                let mark = u64::from_le_bytes(mark);
                // A part of a block was durable before it was committed.
                let must = self.child && state.bits != ALL;
                assert!(
                    !is_here || mark == number + 1 || mark == 0 && !must,
                    "{choice:?}: sector {sector} of block {number} shows {mark}"
                );
            }
        }
    }
}

/// Changes an image at random, and has every state that a power cut could leave looked at, sometimes.
struct Actor {
    sim: Arc<SimStorage>,
    image: Box<dyn Image>,
    now: Vec<State>,
    history: Arc<Mutex<History>>,
    random: Random,
    child: bool,
}

impl Actor {
    /// Of every `rarity` changes of the file, about one is looked at.
    fn new(blocks: u64, child: bool, seed: u64, rarity: u64) -> Self {
        let sim = Arc::new(empty(blocks, 4096, child));
        let image = open_shared(&sim, OPTIONS);
        let now = states(&*image);
        let history = Arc::new(Mutex::new(History {
            states: vec![now.clone()],
            child,
            ..History::default()
        }));
        let seen = Arc::clone(&history);
        let dice = Mutex::new(Random::new(seed ^ 0xdead));
        sim.on_op(move |sim: &SimStorage, op: &Op| {
            let mut dice = dice.lock();
            if !op.kind.changes() || dice.below(rarity) != 0 {
                return;
            }
            let all = sim.choices(4, 6, dice.next());
            for choice in [
                Choice::AllLost,
                Choice::AllKept,
                all[usize_from(dice.below(u64::try_from(all.len()).unwrap()))],
                all[all.len() - 1 - usize_from(dice.below(6)).min(all.len() - 1)],
            ] {
                let mut choice = choice;
                let crashed = sim.crash(&mut choice);
                seen.lock().check(crashed, choice);
            }
        });
        Self {
            sim,
            image,
            now,
            history,
            random: Random::new(seed),
            child,
        }
    }

    /// Commits `edit`, after which `number` is `state`.
    fn commit(&mut self, edit: MapEdit, state: State) {
        let number = edit.block().index();
        self.now[number] = state;
        self.history.lock().states.push(self.now.clone());
        self.image.commit(&[edit]).unwrap();
    }

    fn sync(&mut self) {
        let covered = self.history.lock().states.len() - 1;
        self.image.sync().unwrap();
        self.history.lock().states.drain(..covered);
    }

    fn write_marks(&self, number: u32, slot: u64, sectors: Range<u64>) {
        for sector in sectors {
            let mark = (u64::from(number) + 1).to_le_bytes();
            self.sim
                .write_all_at(&mark, at(slot + sector * PAGE))
                .unwrap();
        }
        self.image.note_payload();
    }

    fn sectors(&mut self) -> Range<u64> {
        let start = self.random.below(SECTORS);
        let end = start + 1 + self.random.below(SECTORS - start);
        start..end
    }

    fn change(&mut self, number: u32) {
        let state = self.now[usize_from_u32(number)];
        match self.random.below(8) {
            _ if state.slot == 0 => self.place(number, state),
            0..3 => {
                let reads = if self.random.below(2) == 0 {
                    Reads::Zeros
                } else {
                    Reads::Parent
                };
                let state = State {
                    is_zero: self.child && reads == Reads::Zeros,
                    ..State::default()
                };
                let block = block(number);
                self.commit(MapEdit::Drop { block, reads }, state);
            }
            3..6 if state.bits != ALL => {
                let sectors = self.sectors();
                self.write_marks(number, state.slot, sectors.clone());
                self.sync();
                let more = bits_of(&sectors);
                let bits = std::array::from_fn(|n| state.bits[n] | more[n]);
                let block = block(number);
                let edit = MapEdit::Write { block, sectors };
                self.commit(edit, State { bits, ..state });
            }
            _ => self.relocate(number, state),
        }
    }

    fn place(&mut self, number: u32, state: State) {
        let slot = self.image.reserve().unwrap();
        let sectors =
            (self.child && !state.is_zero && self.random.below(3) > 0).then(|| self.sectors());
        match &sectors {
            Some(sectors) => {
                self.write_marks(number, slot.get(), sectors.clone());
                self.sync();
            }
            None => self.write_marks(number, slot.get(), 0..2),
        }
        let bits = sectors.as_ref().map_or(ALL, bits_of);
        let state = State {
            slot: slot.get(),
            is_zero: false,
            bits,
        };
        self.commit(place(number, slot, sectors), state);
    }

    fn relocate(&mut self, number: u32, state: State) {
        let runs = self.image.free_runs();
        let Some(run) = runs.first() else { return };
        if self.image.reserve_at(run.start).is_none() {
            return;
        }
        self.sim
            .copy_within(FileRange::new(at(state.slot), MIB), run.start)
            .unwrap();
        self.image.note_payload();
        self.sync();
        let state = State {
            slot: run.start.get(),
            ..state
        };
        let edit = MapEdit::Move {
            block: block(number),
            to: run.start,
        };
        self.commit(edit, state);
        self.sync();
    }

    /// One step of what a disk and its compaction do; `flushes` of 100 are flushes.
    fn step(&mut self, flushes: u64) {
        match self.random.below(100) {
            n if n < flushes => self.sync(),
            99 => {
                self.sync();
                self.image.cut(Cut::ALL).unwrap();
            }
            98 => {
                self.sync();
                while self.image.punch_free(u64::MAX).unwrap() {}
            }
            97 => self.move_bitmap(),
            96 if self.random.below(4) == 0 => {
                self.sync();
                self.image.cut(Cut::ALL).unwrap();
                self.image.settle().unwrap();
                if self.random.below(2) == 0 {
                    self.image = open_shared(&self.sim, OPTIONS);
                }
            }
            95 => self.image.begin_change().unwrap(),
            _ => {
                let blocks = u64::try_from(self.now.len()).unwrap();
                let number = self.random.below(blocks);
                self.change(u32::try_from(number).unwrap());
            }
        }
    }

    fn move_bitmap(&mut self) {
        let movable = self.image.frame(&|_| false).movable;
        let free = self.image.free_runs();
        if let (Some(from), Some(to)) = (movable.last(), free.first()) {
            self.sync();
            assert!(self.image.move_metadata(*from, to.start).unwrap());
        }
    }

    fn finish(mut self) -> Arc<SimStorage> {
        self.sync();
        self.image.cut(Cut::ALL).unwrap();
        self.image.settle().unwrap();
        assert_eq!(states(&*self.image), self.now);
        self.sim.clear_hook();
        let history = self.history.lock();
        println!(
            "{} power cuts: {} to the last sync, {} to a later state",
            history.checked, history.kept[0], history.kept[1]
        );
        assert!(history.checked > 40 && history.kept.iter().all(|kept| *kept > 5));
        let reopened = open_shared(&self.sim, READ_ONLY);
        assert_eq!(states(&*reopened), self.now);
        Arc::clone(&self.sim)
    }
}

#[test]
fn a_disk_that_flushes_survives_power_cuts() {
    for (seed, child) in [(1, false), (2, true), (3, true)] {
        let mut actor = Actor::new(24, child, seed, 60);
        for _ in 0..400 {
            actor.step(25);
        }
        actor.finish();
    }
}

#[test]
fn the_log_wraps_again_and_again() {
    // 1100 blocks are in three pages of the table.
    for (seed, child, flushes) in [(11, false, 0), (12, true, 3)] {
        let mut actor = Actor::new(1100, child, seed, 400);
        for _ in 0..4000 {
            actor.step(flushes);
        }
        actor.finish();
    }
}

#[test]
fn a_ring_that_wraps_without_a_sync_keeps_what_is_durable() {
    let mut actor = Actor::new(1100, false, 21, 150);
    for _ in 0..60 {
        // All is retired, so that the next entries bring a new tail.
        for _ in 0..3 {
            actor.sync();
            actor.image.note_payload();
        }
        for _ in 0..20 + actor.random.below(160) {
            let number = u32::try_from(actor.random.below(1100)).unwrap();
            let state = actor.now[usize_from_u32(number)];
            if state.slot == 0 {
                actor.place(number, state);
            } else {
                let (block, reads) = (block(number), Reads::Zeros);
                actor.commit(MapEdit::Drop { block, reads }, State::default());
            }
        }
    }
    actor.finish();
}

/// Cuts power after each change that `act` makes to a copy of `sim`, and has every outcome looked at.
fn sweep(
    sim: &SimStorage,
    act: impl Fn(&Arc<SimStorage>) -> bool,
    mut check: impl FnMut(SimStorage, Choice),
) {
    for cut in 0.. {
        let sim = Arc::new(sim.fork());
        sim.cut_after(cut);
        let is_done = act(&sim);
        for choice in sim.choices(8, 8, cut) {
            let mut choice = choice;
            check(sim.crash(&mut choice), choice);
        }
        if is_done && !sim.is_cut() {
            println!("{cut} changes");
            break;
        }
    }
}

/// A file whose log has entries, and the states that it may be taken for.
fn dirty(child: bool) -> (SimStorage, History) {
    let mut actor = Actor::new(24, child, 5, u64::MAX);
    actor.sim.clear_hook();
    actor.image.begin_change().unwrap();
    for _ in 0..60 {
        let number = u32::try_from(actor.random.below(24)).unwrap();
        actor.change(number);
    }
    actor.sync();
    for number in 0..4 {
        actor.change(number);
    }
    let history = std::mem::take(&mut *actor.history.lock());
    (actor.sim.kill(), history)
}

#[test]
fn replay_can_be_cut_anywhere() {
    for child in [false, true] {
        let (sim, mut history) = dirty(child);
        let guid = headers(&sim)[0].data_write_guid;
        // Whatever of the last entries survived the first cut: replay starts from there.
        for first in sim.choices(0, 3, 9) {
            let mut first = first;
            let sim = sim.crash(&mut first);
            history.check(sim.fork(), first);
            let found = states(&*open(Arc::new(sim.fork()), READ_ONLY).unwrap().image);
            let mut one = History {
                states: vec![found],
                child,
                ..History::default()
            };
            let replayed =
                |sim: &Arc<SimStorage>| open(Arc::<SimStorage>::clone(sim), OPTIONS).is_ok();
            if matches!(first, Choice::AllKept | Choice::AllLost) {
                sweep(&sim, replayed, |sim, choice| {
                    assert!(headers_of_survivor(&sim).contains(&guid));
                    one.check(sim, choice);
                });
            }
        }
    }
}

/// The `DataWriteGuid`s of the headers that are valid.
fn headers_of_survivor(sim: &SimStorage) -> Vec<Uuid> {
    (0..2)
        .filter_map(|slot| {
            let mut bytes = [0; 4096];
            sim.read_exact_at(&mut bytes, CurrentHeader::offset_of(slot))
                .unwrap();
            Some(Header::parse(&bytes).ok()?.data_write_guid)
        })
        .collect()
}

#[test]
fn sessions_and_closing_can_be_cut_anywhere() {
    for child in [false, true] {
        let (sim, _) = dirty(child);
        let sim = Arc::new(sim);
        let image = open_shared(&sim, OPTIONS);
        let mut history = History {
            states: vec![states(&*image)],
            child,
            ..History::default()
        };
        let mut later = history.states[0].clone();
        let mut slots: Vec<u64> = later.iter().map(|state| state.slot).collect();
        slots.retain(|slot| *slot != 0);
        slots.sort_unstable();
        let dropped: Vec<MapEdit> = (0_u32..)
            .zip(&mut later)
            .filter(|(_, state)| state.slot > slots[3])
            .map(|(number, state)| {
                *state = State {
                    is_zero: child,
                    ..State::default()
                };
                MapEdit::Drop {
                    block: block(number),
                    reads: Reads::Zeros,
                }
            })
            .collect();
        assert!(dropped.len() > 3);
        drop(image);
        history.states.push(later.clone());
        // What the log still has when the headers stop to name it.
        let kept = (0_u32..).zip(&mut later).find(|(_, state)| state.slot != 0);
        let (number, state) = kept.unwrap();
        *state = State {
            is_zero: child,
            ..State::default()
        };
        let one_more = [MapEdit::Drop {
            block: block(number),
            reads: Reads::Zeros,
        }];
        history.states.push(later);
        let close = |sim: &Arc<SimStorage>| {
            let work = || -> Result<(), DiskError> {
                let image = match open(Arc::<SimStorage>::clone(sim), OPTIONS) {
                    Ok(opened) => opened.image,
                    Err(_) => return Err(DiskError::ReadOnly),
                };
                image.begin_change()?;
                image.commit(&dropped)?;
                image.sync()?;
                image.cut(Cut::ALL)?;
                image.commit(&one_more)?;
                image.settle()
            };
            work().is_ok()
        };
        let mut lengths = std::collections::BTreeSet::new();
        sweep(&sim, close, |sim, choice| {
            lengths.insert(sim.len().unwrap());
            history.check(sim, choice);
        });
        assert!(lengths.len() > 1, "it was cut: {lengths:?}");
        assert!(history.kept.iter().all(|kept| *kept > 5));
    }
}

/// A header is written while the other one is good, durable, and the current one if this one is lost.
#[test]
fn one_good_header_is_durable_at_any_time() {
    let (sim, _) = dirty(false);
    let sim = Arc::new(sim);
    let written = Arc::new(Mutex::new([0; 2]));
    let seen = Arc::clone(&written);
    sim.on_op(move |sim: &SimStorage, op: &Op| {
        let is_at = |slot: &usize| op.range.start == CurrentHeader::offset_of(*slot);
        let Some(slot) = [0, 1].into_iter().find(is_at) else {
            return;
        };
        if op.kind == OpKind::Write {
            seen.lock()[slot] += 1;
            let outstanding = sim.unsynced();
            let other = CurrentHeader::offset_of(1 - slot);
            assert!(outstanding.iter().all(|one| one.range.start != other));
            let durable = replay::read_header(&sim.crash(&mut Choice::AllLost)).unwrap();
            assert_ne!(durable.slot, slot);
        }
    });
    // Replaying, a session, and its end.
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let (block, _) = image.map().present().next().unwrap();
    let reads = Reads::Zeros;
    image.commit(&[MapEdit::Drop { block, reads }]).unwrap();
    image.settle().unwrap();
    sim.clear_hook();
    assert_eq!(*written.lock(), [4; 2]);
}
