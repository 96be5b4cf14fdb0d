//! How long guests wait: the latency of a disk's requests, apart for those that began beside a step of
//! background work and those that did not. Whether one began beside a step does not depend on how long it
//! takes; whether it overlapped one would, and slow requests would seem to be slow because of the step.
//!
//! Background work reads it ([`Meter::take`]) to find out what it costs. So it must cost nothing itself: a
//! request takes two looks at the clock and a few additions, in a cache line that few threads share.
//!
//! What disks of one host device do is felt by all of them: they share an [`Activity`].

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::units::low_u32;

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read,
    Write,
    /// Zeroing and discarding.
    Zero,
    Flush,
}

impl Request {
    const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Zero, Self::Flush];

    fn index(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Zero => 2,
            Self::Flush => 3,
        }
    }
}

/// Whether background work is at a host device. Shared by the disks on it.
#[derive(Debug)]
pub(crate) struct Activity {
    /// Steps that are under way.
    steps: AtomicUsize,
    begun: Instant,
    /// When a guest asked for something last, in milliseconds from `begun`, and one more; 0: never.
    last_request: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            steps: AtomicUsize::new(0),
            begun: Instant::now(),
            last_request: AtomicU64::new(0),
        }
    }
}

impl Activity {
    /// Says that a step of background work runs, until the guard is dropped.
    pub(crate) fn working(&self) -> Working<'_> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        Working(self)
    }

    /// When a guest asked for something last.
    pub(crate) fn last_request(&self) -> Option<Instant> {
        let millis = self.last_request.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.begun + Duration::from_millis(millis))
    }

    fn note_request(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.begun).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX).saturating_add(1);
        // The line is shared by all threads: it is not taken for writing when nothing changes.
        if self.last_request.load(Ordering::Relaxed) != millis {
            self.last_request.store(millis, Ordering::Relaxed);
        }
    }

    fn is_busy(&self) -> bool {
        self.steps.load(Ordering::Relaxed) > 0
    }
}

/// A step of background work.
#[derive(Debug)]
pub(crate) struct Working<'a>(&'a Activity);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.steps.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Requests that take less are as good as each other.
const SHORT: u64 = 50_000;

/// How long a request of so many nanoseconds takes, in 256ths of an octave above [`SHORT`].
fn octaves(nanos: u64) -> u64 {
    let nanos = nanos.clamp(SHORT, 1 << 40);
    let above = |nanos: u64| {
        let whole = u64::from(nanos.ilog2());
        // Straight between two powers of two.
        whole * 256 + ((nanos << 8) >> whole) - 256
    };
    above(nanos) - above(SHORT)
}

/// The latency of one kind of request. In octaves: of times, the few longest would decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Latency {
    /// Requests.
    pub(crate) count: u64,
    /// What they took together, in 256ths of an octave.
    sum: u64,
    /// The sum of the squares of what each took.
    squares: u64,
}

impl Latency {
    /// Of `count` requests that took the same time.
    #[cfg(test)]
    pub(crate) fn of(count: u64, each: std::time::Duration) -> Self {
        let octaves = octaves(u64::try_from(each.as_nanos()).unwrap());
        Self {
            count,
            sum: count * octaves,
            squares: count * octaves * octaves,
        }
    }

    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// The mean, and its variance, in octaves; `None` of too few requests to tell.
    fn mean(&self) -> Option<(f64, f64)> {
        if self.count < 4 {
            return None;
        }
        let count = float(self.count);
        let mean = float(self.sum) / count / 256.0;
        let squares = float(self.squares) / count / 65_536.0;
        Some((mean, (squares - mean * mean).max(0.0) / count))
    }
}

fn float(number: u64) -> f64 {
    let half = |number: u64| f64::from(low_u32(number));
    half(number >> 32) * 4_294_967_296.0 + half(number & 0xffff_ffff)
}

/// The latency of each kind of [`Request`].
type Latencies = [Latency; Request::ALL.len()];

/// What happened on a disk between two calls of [`Meter::take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Requests that began while no background work was at the device.
    alone: Latencies,
    /// Requests that began beside some.
    beside: Latencies,
    /// Slots that blocks got.
    pub(crate) allocated: u64,
}

/// How much longer requests take that begin beside background work. Like is compared with like, a read with
/// reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Compared {
    /// Requests beside background work.
    pub(crate) count: u64,
    /// By how many octaves they are longer.
    pub(crate) longer: f64,
    /// The standard error of that.
    pub(crate) doubt: f64,
}

impl Reading {
    /// Of one kind of request alone.
    #[cfg(test)]
    pub(crate) fn of(request: Request, alone: Latency, beside: Latency) -> Self {
        let mut reading = Self::default();
        reading.alone[request.index()] = alone;
        reading.beside[request.index()] = beside;
        reading
    }

    /// How many requests there were.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        let all = self.alone.iter().chain(&self.beside);
        all.map(|latency| latency.count).sum()
    }

    /// Takes in another one.
    pub(crate) fn add(&mut self, other: &Self) {
        let halves = [
            (&mut self.alone, &other.alone),
            (&mut self.beside, &other.beside),
        ];
        for (sums, others) in halves {
            for (sum, other) in sums.iter_mut().zip(others) {
                sum.add(*other);
            }
        }
        self.allocated += other.allocated;
    }

    /// What background work costs a request. `None` where there are too few to compare.
    pub(crate) fn compare(&self) -> Option<Compared> {
        let (mut count, mut longer, mut variance) = (0, 0.0, 0.0);
        for (alone, beside) in self.alone.iter().zip(&self.beside) {
            let (Some(own), Some(other)) = (alone.mean(), beside.mean()) else {
                continue;
            };
            let weight = float(beside.count);
            count += beside.count;
            longer += weight * (other.0 - own.0);
            variance += weight * weight * (other.1 + own.1);
        }
        let all = float(count);
        (count > 0).then(|| Compared {
            count,
            longer: longer / all,
            doubt: variance.sqrt() / all,
        })
    }
}

/// Counters that many threads add to, each mostly on its own of several lines.
const LINES: usize = 16;

/// Of a [`Latency`].
#[derive(Debug, Default)]
struct Sums {
    count: AtomicU64,
    sum: AtomicU64,
    squares: AtomicU64,
}

impl Sums {
    fn take(&self) -> Latency {
        let taken = |number: &AtomicU64| number.swap(0, Ordering::Relaxed);
        Latency {
            count: taken(&self.count),
            sum: taken(&self.sum),
            squares: taken(&self.squares),
        }
    }
}

/// A few cache lines that belong to a few threads.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line {
    alone: [Sums; Request::ALL.len()],
    beside: [Sums; Request::ALL.len()],
    allocated: AtomicU64,
}

/// Measures the requests of one disk.
#[derive(Debug)]
pub(crate) struct Meter {
    activity: OnceLock<Arc<Activity>>,
    lines: Box<[Line]>,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            activity: OnceLock::new(),
            lines: (0..LINES).map(|_| Line::default()).collect(),
        }
    }
}

impl Meter {
    /// Has the disk feel what is done on its host device. A disk that nobody told has an activity of its
    /// own from the first request, or look, on; says whether it was in time.
    pub(crate) fn join(&self, activity: Arc<Activity>) -> bool {
        self.activity.set(activity).is_ok()
    }

    /// The background work that the disk feels.
    pub(crate) fn activity(&self) -> &Arc<Activity> {
        self.activity.get_or_init(Arc::default)
    }

    /// Measures a request, until the guard is dropped.
    pub(crate) fn begin(&self, request: Request) -> Measured<'_> {
        let begun = Instant::now();
        self.activity().note_request(begun);
        Measured {
            meter: self,
            request,
            is_beside: self.activity().is_busy(),
            begun,
        }
    }

    /// Counts a slot that a block got.
    pub(crate) fn note_allocated(&self) {
        self.line().allocated.fetch_add(1, Ordering::Relaxed);
    }

    /// What was measured since the last call.
    pub(crate) fn take(&self) -> Reading {
        let mut reading = Reading::default();
        for line in &self.lines {
            let halves = [
                (&line.alone, &mut reading.alone),
                (&line.beside, &mut reading.beside),
            ];
            for (cells, sums) in halves {
                for (cell, sum) in cells.iter().zip(sums) {
                    sum.add(cell.take());
                }
            }
            reading.allocated += line.allocated.swap(0, Ordering::Relaxed);
        }
        reading
    }

    #[cfg_attr(
        windows,
        allow(
            clippy::missing_const_for_thread_local,
            reason = "it is const, which this lint does not see for Windows"
        )
    )]
    fn line(&self) -> &Line {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static LINE: Cell<Option<usize>> = const { Cell::new(None) };
        }
        let line = LINE.get().unwrap_or_else(|| {
            let next = THREADS.fetch_add(1, Ordering::Relaxed) % LINES;
            LINE.set(Some(next));
            next
        });
        &self.lines[line]
    }
}

/// A request that is being measured.
#[derive(Debug)]
pub(crate) struct Measured<'a> {
    meter: &'a Meter,
    request: Request,
    is_beside: bool,
    begun: Instant,
}

impl Drop for Measured<'_> {
    fn drop(&mut self) {
        let nanos = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let took = octaves(nanos);
        let line = self.meter.line();
        let cells = match self.is_beside {
            true => &line.beside,
            false => &line.alone,
        };
        let cell = &cells[self.request.index()];
        cell.count.fetch_add(1, Ordering::Relaxed);
        cell.sum.fetch_add(took, Ordering::Relaxed);
        cell.squares.fetch_add(took * took, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_beside_background_work_is_told_apart() {
        let meter = Meter::default();
        let activity = Arc::new(Activity::default());
        assert!(meter.join(Arc::clone(&activity)));
        drop(meter.begin(Request::Read));
        let step = activity.working();
        let request = meter.begin(Request::Write);
        drop(step);
        drop(request);
        // One that comes while a request is under way does not count: a slow request would meet more of them.
        let request = meter.begin(Request::Write);
        drop(activity.working());
        drop(request);
        drop(meter.begin(Request::Flush));
        meter.note_allocated();
        let reading = meter.take();
        let counts = |latencies: Latencies| latencies.map(|latency| latency.count);
        assert_eq!(counts(reading.alone), [1, 1, 0, 1]);
        assert_eq!(counts(reading.beside), [0, 1, 0, 0]);
        assert_eq!((reading.count(), reading.allocated), (4, 1));
        assert_eq!(meter.take(), Reading::default());
    }

    #[test]
    fn like_is_compared_with_like() {
        let latency = |count, millis| Latency::of(count, Duration::from_millis(millis));
        let mut reading = Reading::of(Request::Read, latency(100, 1), latency(100, 1));
        reading.add(&Reading::of(
            Request::Flush,
            latency(4, 50),
            latency(100, 50),
        ));
        // More flushes, each as long as before, are no slowdown.
        let compared = reading.compare().unwrap();
        assert_eq!((compared.count, compared.longer), (200, 0.0));
        let twice = Reading::of(Request::Read, latency(100, 1), latency(50, 2));
        let compared = twice.compare().unwrap();
        assert!((compared.longer - 1.0).abs() < 0.02, "{compared:?}");
        assert!(compared.doubt < 0.001, "{compared:?}");
        // A few long ones say little.
        let mut some = Reading::of(Request::Read, latency(100, 1), latency(19, 1));
        some.add(&Reading::of(Request::Read, latency(0, 0), latency(1, 1000)));
        let compared = some.compare().unwrap();
        assert!(compared.longer < 2.0 * compared.doubt + 0.1, "{compared:?}");
        assert_eq!(Reading::default().compare(), None);
    }

    #[test]
    fn disks_of_one_device_are_active_together() {
        let activity = Arc::new(Activity::default());
        let meters = [Meter::default(), Meter::default()];
        assert!(meters.iter().all(|meter| meter.join(Arc::clone(&activity))));
        assert_eq!(activity.last_request(), None);
        let before = Instant::now();
        drop(meters[0].begin(Request::Read));
        let last = meters[1].activity().last_request().unwrap();
        assert!(last + Duration::from_millis(2) > before && last <= Instant::now());
        // A step is no request.
        drop(activity.working());
        assert_eq!(activity.last_request(), Some(last));
    }

    #[test]
    fn octaves_are_what_they_are() {
        assert_eq!([0, 1, 50_000].map(octaves), [0; 3]);
        assert_eq!(octaves(50_000 << 3), 3 * 256);
        assert!((380..=430).contains(&octaves(50_000 * 3)), "1.58 of them");
        assert_eq!(octaves(u64::MAX), octaves(1 << 40));
        assert_eq!(float((1 << 40) + 3), 1_099_511_627_779.0);
    }

    #[test]
    fn threads_add_up() {
        let meter = Meter::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| drop(meter.begin(Request::Read))));
            }
        });
        let reading = meter.take();
        let read = reading.alone[Request::Read.index()];
        assert_eq!(read.count, 400);
        assert!(Arc::strong_count(meter.activity()) == 1);
        assert!(!meter.join(Arc::default()), "too late");
    }
}
