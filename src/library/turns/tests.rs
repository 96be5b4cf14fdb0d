//! A device under a simulated clock: nothing here sleeps.

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn outlook(gain: u64, work: u64) -> Outlook {
    Outlook { gain, work }
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A device on which a step takes as long as it moves bytes at `SPEED`, and its disks.
struct Sim {
    turns: Turns<usize>,
    begun: Instant,
    now: Instant,
    left: Vec<Outlook>,
    /// When each had turns.
    had: Vec<Vec<Instant>>,
    /// When each was done.
    done: Vec<Option<Instant>>,
}

/// Bytes of a step, which takes 2 ms.
const STEP: u64 = 256 * KIB;
const STEP_TAKES: Duration = Duration::from_millis(2);
/// When a guest counts as idle.
const IDLE_AFTER: Duration = Duration::from_secs(10);

impl Sim {
    fn new(disks: impl IntoIterator<Item = Outlook>) -> Self {
        let begun = Instant::now();
        let mut sim = Self {
            turns: Turns::new(),
            begun,
            now: begun,
            left: Vec::new(),
            had: Vec::new(),
            done: Vec::new(),
        };
        disks.into_iter().for_each(|disk| sim.add(disk));
        sim
    }

    fn add(&mut self, outlook: Outlook) {
        let key = self.left.len();
        self.left.push(outlook);
        self.had.push(Vec::new());
        self.done.push(None);
        self.turns.add(key, outlook, self.now);
    }

    /// The next turn, if there is one at once: of whom.
    fn turn(&mut self, guest_is_active: bool, rest: Duration) -> Option<usize> {
        let Choice::Turn(key) = self.turns.take(self.now) else {
            return None;
        };
        self.step(key, guest_is_active, rest);
        Some(key)
    }

    fn step(&mut self, key: usize, guest_is_active: bool, rest: Duration) {
        self.had[key].push(self.now);
        self.now += STEP_TAKES;
        let left = &mut self.left[key];
        left.work = left.work.saturating_sub(STEP);
        let is_done = left.work == 0;
        if is_done {
            self.done[key] = Some(self.now);
        }
        let after = After {
            due: (!is_done).then(|| self.now + rest),
            worked: true,
            rest,
            kind: match guest_is_active {
                true => Kind::Busy(self.now + IDLE_AFTER),
                false => Kind::Idle,
            },
            outlook: *left,
        };
        self.turns.end(key, STEP_TAKES, after, self.now);
    }

    fn run(&mut self, until: Duration) {
        while self.now < self.begun + until && self.turn(false, Duration::ZERO).is_some() {}
    }

    fn done_after(&self, key: usize) -> Duration {
        self.done[key].expect("it is done") - self.begun
    }
}

#[test]
fn more_for_less_comes_first() {
    let patient = |gain, work| patience(outlook(gain, work));
    assert!(patient(GIB, GIB) < patient(MIB, GIB), "more gain");
    assert!(patient(MIB, 8 * MIB) < patient(MIB, GIB), "less work");
    assert_eq!(patient(GIB, 0), Duration::ZERO);
    assert!(patient(0, u64::MAX) <= PATIENCE && patient(u64::MAX, u64::MAX) <= PATIENCE);

    let mut sim = Sim::new([
        outlook(MIB, 4 * GIB),
        outlook(8 * MIB, 8 * MIB),
        outlook(4 * GIB, 4 * GIB),
    ]);
    let first = sim.turn(false, Duration::ZERO);
    assert_eq!(first, Some(1));
    sim.run(Duration::from_secs(1000));
    assert!(sim.done_after(1) < sim.done_after(2) && sim.done_after(2) < sim.done_after(0));
}

#[test]
fn what_was_begun_is_finished_before_more_is_begun() {
    let mut sim = Sim::new((0..100).map(|_| outlook(8 * MIB, 8 * MIB)));
    sim.run(Duration::from_secs(1000));
    let mut done: Vec<_> = (0..100).map(|key| sim.done_after(key)).collect();
    done.sort();
    // 32 steps each; by turns all would be done at the end.
    assert_eq!(done[0], STEP_TAKES * 32);
    assert_eq!(done[49], STEP_TAKES * 32 * 50);
}

#[test]
fn ten_thousand_small_disks_and_a_fat_one_all_get_on() {
    const SMALL: usize = 10_000;
    // The fat one is there first, and in the middle of its work.
    let mut sim = Sim::new([outlook(GIB, 1 << 40)]);
    sim.run(Duration::from_secs(5));
    for _ in 0..SMALL {
        sim.add(outlook(MIB, 2 * MIB));
    }
    let came = sim.now;
    sim.run(Duration::from_secs(1000));
    // All that they take is 8 steps each.
    let alone = STEP_TAKES * 8 * 10_000;
    let last = (1..=SMALL)
        .map(|key| sim.done[key].expect("done") - came)
        .max();
    let last = last.expect("some");
    assert!(last < alone + alone / 20, "{last:?} rather than {alone:?}");
    // The fat one goes on when they are done, and among others that come one after the other.
    let pauses = sim.had[0].windows(2).map(|two| two[1] - two[0]);
    let longest = pauses.max().expect("turns");
    assert!(longest <= alone + PATIENCE + SLICE, "{longest:?}");
    let (before, begun) = (sim.had[0].len(), sim.now);
    while sim.now < begun + PATIENCE * 4 {
        let key = sim.turn(false, Duration::ZERO).expect("somebody");
        if key > 0 || sim.turns.next(sim.now).is_none() {
            sim.add(outlook(MIB, 2 * MIB));
        }
    }
    assert!(sim.had[0].len() > before, "it starves");
}

#[test]
fn nobody_starves_beside_disks_that_always_have_more_to_do() {
    const RESTLESS: usize = 50;
    let mut sim = Sim::new((0..RESTLESS).map(|_| outlook(GIB, MIB)));
    sim.add(outlook(0, 1 << 40));
    while sim.now < sim.begun + Duration::from_secs(600) {
        let key = sim.turn(false, Duration::ZERO).expect("somebody");
        // There is always more to be had of those.
        if key < RESTLESS {
            sim.left[key] = outlook(GIB, MIB);
            sim.turns.wake(key, sim.now);
        }
    }
    let bound = PATIENCE + SLICE * 51;
    for (key, had) in sim.had.iter().enumerate() {
        let pauses = had.windows(2).map(|two| two[1] - two[0]);
        let longest = pauses.max().expect("turns");
        assert!(longest < bound, "{key}: {longest:?}");
    }
}

#[test]
fn all_busy_disks_of_a_device_share_what_one_may_take() {
    // 5 %: 2 ms of work, 38 ms of rest.
    let rest = millis(38);
    let mut sim = Sim::new((0..20).map(|_| outlook(GIB, GIB)));
    let (mut steps, mut looks) = (0, 0);
    while sim.now < sim.begun + Duration::from_secs(60) {
        // As a turn does it whose guest is still active.
        let is_early = sim.turns.rest(Kind::Busy(sim.now), sim.now);
        match (sim.turns.take(sim.now), is_early) {
            (Choice::Turn(key), Some(wait)) => {
                let after = After {
                    due: Some(sim.now + wait),
                    worked: false,
                    rest: Duration::ZERO,
                    kind: Kind::Busy(sim.now + IDLE_AFTER),
                    outlook: outlook(GIB, GIB),
                };
                looks += 1;
                sim.turns.end(key, Duration::ZERO, after, sim.now);
            }
            (Choice::Turn(key), None) => {
                steps += 1;
                sim.step(key, true, rest);
            }
            _ => sim.now += millis(1),
        }
    }
    // Each time when a guest may have become idle, and the first ones, before anything is known of guests.
    assert!(looks < 20 * 8, "{looks}");
    let took = STEP_TAKES * steps;
    assert!(took <= Duration::from_secs(3) + millis(100), "{took:?}");
    assert!(took >= millis(2800), "{took:?}");
}

#[test]
fn disks_at_rest_do_not_wait_for_busy_ones() {
    let mut sim = Sim::new([outlook(GIB, GIB)]);
    assert_eq!(sim.turn(true, Duration::from_secs(5)), Some(0));
    assert_eq!(
        sim.turns.next(sim.now),
        Some(sim.now + Duration::from_secs(5))
    );
    sim.add(outlook(GIB, GIB));
    for _ in 0..100 {
        assert_eq!(sim.turn(false, Duration::ZERO), Some(1));
    }
    sim.turns.remove(&1);
    assert_eq!(sim.turn(true, Duration::ZERO), None);
    sim.now += Duration::from_secs(5);
    assert_eq!(sim.turn(true, Duration::ZERO), Some(0));
}

#[test]
fn a_disk_whose_guest_may_be_idle_does_not_wait_for_the_rest_of_others() {
    let mut sim = Sim::new([outlook(GIB, GIB), outlook(GIB, GIB)]);
    let long = Duration::from_secs(100);
    assert_eq!(sim.turn(true, long), Some(0));
    assert_eq!(sim.turns.rest(Kind::Busy(sim.now), sim.now), Some(long));
    assert_eq!(sim.turn(true, Duration::ZERO), Some(1));
    // It would go on at once.
    let idle = sim.now + IDLE_AFTER;
    assert_eq!(sim.turns.take(sim.now), Choice::At(idle));
    assert_eq!(sim.turns.next(sim.now), Some(idle));
    assert_eq!(sim.turns.take(idle), Choice::Turn(1));
}

#[test]
fn who_sleeps_is_woken_and_who_is_woken_in_its_turn_has_another() {
    let mut sim = Sim::new([outlook(0, 1)]);
    let (mut turns, now) = (sim.turns, &mut sim.now);
    let over = After {
        due: None,
        worked: false,
        rest: Duration::ZERO,
        kind: Kind::Look,
        outlook: Outlook::default(),
    };
    assert_eq!(turns.take(*now), Choice::Turn(0));
    assert_eq!(turns.take(*now), Choice::Never, "it has one");
    turns.end(0, Duration::ZERO, over, *now);
    assert_eq!((turns.take(*now), turns.next(*now)), (Choice::Never, None));
    assert!(turns.wake(0, *now) && !turns.wake(0, *now));
    assert_eq!(turns.take(*now), Choice::Turn(0));
    assert!(turns.wake(0, *now));
    turns.end(0, Duration::ZERO, over, *now);
    assert_eq!(turns.take(*now), Choice::Turn(0));
    let later = After {
        due: Some(*now + millis(5)),
        ..over
    };
    turns.end(0, Duration::ZERO, later, *now);
    assert_eq!(turns.take(*now), Choice::At(*now + millis(5)));
    *now += millis(5);
    assert_eq!(turns.take(*now), Choice::Turn(0));
    turns.remove(&0);
    turns.end(0, Duration::ZERO, later, *now);
    assert_eq!(turns.take(*now + millis(50)), Choice::Never, "it is gone");
    assert!(!turns.wake(0, *now));
}

#[test]
fn what_is_no_step_does_not_wait_for_a_rest() {
    let mut sim = Sim::new([outlook(GIB, GIB), outlook(GIB, GIB)]);
    let rest = Duration::from_secs(5);
    // The other one has not been looked at yet; what is known to go on with a step rests.
    assert_eq!(sim.turn(false, rest), Some(0));
    assert_eq!(sim.turn(false, rest), Some(1));
    let over = sim.now + rest;
    assert_eq!(sim.turns.rest(Kind::Idle, sim.now), Some(rest));
    sim.now = over - millis(1);
    assert_eq!(sim.turns.take(sim.now), Choice::At(over));
    // Ready, and then woken: it may be to be closed.
    assert!(sim.turns.wake(0, sim.now) && !sim.turns.wake(0, sim.now));
    assert_eq!(sim.turns.take(sim.now), Choice::Turn(0));
    assert_eq!(sim.turns.take(sim.now), Choice::At(over));
}
