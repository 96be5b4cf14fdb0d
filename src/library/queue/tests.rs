//! Devices with tasks that stand for disks: what a turn does is told.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

const LIMITS: Limits = Limits {
    hung: Duration::from_millis(100),
    linger: Duration::from_millis(50),
};

/// What a task does in its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// One step after the other.
    Steps,
    /// Nothing once it had its turn.
    Settles,
    /// Does not come back before it is let go.
    Hangs,
    /// As that, and then there is nothing more to do.
    Ends,
    Panics,
    /// Has something that others may want, and nothing to do.
    Holds,
}

struct Task {
    does: Does,
    turns: AtomicUsize,
    panics: AtomicUsize,
    is_wanted: AtomicBool,
    /// How often it was asked whether it is wanted.
    asked: AtomicUsize,
}

/// What all tasks of a test meet at.
#[derive(Default)]
struct World {
    let_go: Mutex<bool>,
    changed: Condvar,
}

impl World {
    fn release(&self) {
        *self.let_go.lock() = true;
        self.changed.notify_all();
    }
}

fn turned(due: Option<Instant>, holds: bool) -> Option<Turned> {
    let after = After {
        due,
        worked: true,
        rest: Duration::ZERO,
        kind: Kind::Look,
        outlook: Outlook::default(),
    };
    Some(Turned { after, holds })
}

impl Work<Arc<Task>> for World {
    fn turn(&self, task: &Arc<Task>) -> Option<Turned> {
        task.turns.fetch_add(1, Ordering::SeqCst);
        match task.does {
            Does::Steps => {
                std::thread::sleep(Duration::from_micros(100));
                turned(Some(Instant::now()), false)
            }
            Does::Settles => turned(None, false),
            Does::Hangs | Does::Ends => {
                let mut let_go = self.let_go.lock();
                while !*let_go {
                    self.changed.wait(&mut let_go);
                }
                turned(None, false).filter(|_| task.does == Does::Hangs)
            }
            Does::Panics => std::panic::resume_unwind(Box::new("a fault")),
            Does::Holds => turned(None, !task.is_wanted.swap(false, Ordering::SeqCst)),
        }
    }

    fn panicked(&self, task: &Arc<Task>) -> Option<Turned> {
        task.panics.fetch_add(1, Ordering::SeqCst);
        turned(Some(Instant::now() + Duration::from_secs(60)), false)
    }

    fn is_wanted(&self, task: &Arc<Task>) -> bool {
        task.asked.fetch_add(1, Ordering::SeqCst);
        task.is_wanted.load(Ordering::SeqCst)
    }
}

type Shared = Arc<Queue<usize, Arc<Task>>>;

/// Devices, whose workers are hired as the agent does it.
struct Rig {
    world: Arc<World>,
    devices: Vec<Shared>,
    lost: Vec<Arc<Task>>,
}

impl Rig {
    fn new(devices: usize) -> Self {
        let bell = Arc::new(Bell::default());
        let queue = || Arc::new(Queue::new(Arc::clone(&bell), LIMITS));
        Self {
            world: Arc::default(),
            devices: std::iter::repeat_with(queue).take(devices).collect(),
            lost: Vec::new(),
        }
    }

    fn task(does: Does) -> Arc<Task> {
        Arc::new(Task {
            does,
            turns: AtomicUsize::new(0),
            panics: AtomicUsize::new(0),
            is_wanted: AtomicBool::new(false),
            asked: AtomicUsize::new(0),
        })
    }

    fn add(&self, device: usize, key: usize, does: Does) -> Arc<Task> {
        let task = Self::task(does);
        self.devices[device].add(key, Arc::clone(&task), Outlook::default(), false);
        task
    }

    fn staff(&mut self) {
        for device in &self.devices {
            let now = Instant::now();
            self.lost.extend(device.watch(now));
            if let Need::Worker(worker) = device.hire(now) {
                let (device, world) = (Arc::clone(device), Arc::clone(&self.world));
                std::thread::spawn(move || device.work(worker, &*world));
            }
        }
    }

    /// Waits, as the agent would, until that is so.
    fn until(&mut self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            self.staff();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn workers(&self) -> usize {
        self.devices.iter().map(|device| device.workers()).sum()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.world.release();
        for device in &self.devices {
            device.stop();
            let ends = device.wait_for_end(Instant::now() + Duration::from_secs(20));
            assert!(ends || std::thread::panicking());
        }
    }
}

fn turns(task: &Task) -> usize {
    task.turns.load(Ordering::SeqCst)
}

#[test]
fn a_device_that_hangs_keeps_no_other_waiting() {
    let mut rig = Rig::new(3);
    let hangs = rig.add(0, 0, Does::Hangs);
    let others: Vec<_> = (1..3)
        .map(|device| rig.add(device, 1, Does::Steps))
        .collect();
    rig.until("the others work", || {
        turns(&hangs) == 1 && others.iter().all(|task| turns(task) > 50)
    });
    // Who has something to tell to it does not wait either.
    let late = rig.add(0, 2, Does::Settles);
    rig.devices[0].wake(0);
    rig.devices[0].remove(&2);
    assert_eq!(turns(&late), 0);
}

#[test]
fn a_disk_that_hangs_does_not_keep_those_of_its_device_waiting() {
    let mut rig = Rig::new(1);
    let hangs = rig.add(0, 0, Does::Hangs);
    rig.until("it hangs", || turns(&hangs) == 1);
    let others: Vec<_> = (1..100).map(|key| rig.add(0, key, Does::Settles)).collect();
    let device = Arc::clone(&rig.devices[0]);
    assert!(!device.is_stuck());
    rig.until("the others have their turns", || {
        others.iter().all(|task| turns(task) == 1)
    });
    assert!(device.is_stuck());
    assert_eq!(rig.lost.len(), 1, "told once");
    // Many of them take no more threads than there are to be lost.
    for key in 200..220 {
        rig.add(0, key, Does::Hangs);
    }
    rig.until("its workers are lost", || device.workers() == MAX_STUCK + 1);
    for _ in 0..20 {
        rig.staff();
        std::thread::sleep(LIMITS.hung / 10);
    }
    assert_eq!(rig.workers(), MAX_STUCK + 1);
    // It answers again: all go on, and the threads go when there is nothing to do.
    rig.world.release();
    rig.until("it is over", || device.workers() == 0);
    assert!(!device.is_stuck());
    device.wake(0);
    rig.until("it has its turns", || turns(&hangs) == 2);
}

#[test]
fn a_panic_ends_one_turn_and_nothing_else() {
    let mut rig = Rig::new(1);
    let (bad, good) = (rig.add(0, 0, Does::Panics), rig.add(0, 1, Does::Steps));
    rig.until("the other goes on", || turns(&good) > 20 && turns(&bad) > 0);
    assert_eq!((turns(&bad), bad.panics.load(Ordering::SeqCst)), (1, 1));
}

#[test]
fn what_others_want_is_let_go_at_once_though_there_is_much_to_do() {
    let mut rig = Rig::new(1);
    let held = rig.add(0, 0, Does::Holds);
    rig.until("it is held", || turns(&held) == 1);
    let busy = rig.add(0, 1, Does::Steps);
    rig.until("there is work", || turns(&busy) > 5);
    held.is_wanted.store(true, Ordering::SeqCst);
    rig.until("it is let go", || turns(&held) == 2);
    rig.devices[0].remove(&1);
    // And where there is nothing else to do.
    rig.devices[0].wake(0);
    rig.until("it is held again", || turns(&held) == 3);
    held.is_wanted.store(true, Ordering::SeqCst);
    rig.until("it is let go again", || turns(&held) == 4);
}

#[test]
fn an_idle_device_costs_no_thread_and_is_woken() {
    let mut rig = Rig::new(1);
    let tasks: Vec<_> = (0..2000)
        .map(|key| rig.add(0, key, Does::Settles))
        .collect();
    rig.until("all settle", || tasks.iter().all(|task| turns(task) == 1));
    let device = Arc::clone(&rig.devices[0]);
    rig.until("nobody works", || device.workers() == 0);
    assert_eq!(device.hire(Instant::now()), Need::Nobody);
    device.wake(77);
    rig.until("it has a turn", || turns(&tasks[77]) == 2);
    assert!(tasks.iter().all(|task| turns(task) <= 2));
}

#[test]
fn what_is_held_is_looked_at_now_and_then() {
    let mut rig = Rig::new(1);
    let held = rig.add(0, 0, Does::Holds);
    rig.until("it is held", || turns(&held) == 1);
    std::thread::sleep(LIMITS.linger * 2);
    let asked = || held.asked.load(Ordering::SeqCst);
    let (begun, before) = (Instant::now(), asked());
    std::thread::sleep(LOOK * 4);
    let times = asked() - before;
    let most = begun.elapsed().as_millis() / LOOK.as_millis() + 2;
    assert!(
        times >= 1 && u128::try_from(times).unwrap() <= most,
        "{times}"
    );
}

#[test]
fn what_is_held_is_let_go_though_a_worker_is_lost() {
    let mut rig = Rig::new(1);
    let held = rig.add(0, 0, Does::Holds);
    rig.until("it is held", || turns(&held) == 1);
    let hangs = rig.add(0, 1, Does::Hangs);
    rig.until("it hangs", || turns(&hangs) == 1);
    let device = Arc::clone(&rig.devices[0]);
    rig.until("a worker is lost", || device.is_stuck());
    held.is_wanted.store(true, Ordering::SeqCst);
    rig.until("it is let go", || turns(&held) == 2);
}

#[test]
fn what_is_held_from_the_beginning_is_watched_before_its_first_turn() {
    let mut rig = Rig::new(1);
    let first = rig.add(0, 0, Does::Settles);
    let held = Rig::task(Does::Settles);
    held.is_wanted.store(true, Ordering::SeqCst);
    rig.devices[0].add(1, Arc::clone(&held), Outlook::default(), true);
    rig.until("they have their turns", || {
        turns(&held) == 1 && turns(&first) == 1
    });
    assert_eq!(held.asked.load(Ordering::SeqCst), 1, "only until its turn");
}

#[test]
fn what_hangs_is_not_begun_again_beside_itself() {
    let mut rig = Rig::new(1);
    let hangs = rig.add(0, 0, Does::Ends);
    let device = Arc::clone(&rig.devices[0]);
    rig.until("a worker is lost", || device.is_stuck());
    let again = Rig::task(Does::Settles);
    let ensure = || device.ensure(0, Arc::clone(&again), Outlook::default());
    ensure();
    let other = rig.add(0, 1, Does::Settles);
    rig.until("another has its turn", || turns(&other) == 1);
    assert_eq!((turns(&hangs), turns(&again)), (1, 0));
    rig.world.release();
    rig.until("it goes on", || turns(&hangs) == 2);
    device.remove(&1);
    rig.until("it is over", || device.is_empty());
    ensure();
    rig.until("it is begun anew", || turns(&again) == 1);
}
