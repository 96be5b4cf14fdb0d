//! How long guests wait: the latency of a disk's requests, apart for those that ran beside a step of
//! background work and those that did not.
//!
//! Background work reads it ([`Meter::take`]) to find out what it costs. So it must cost nothing itself: a
//! request takes two looks at the clock and a few additions, in a cache line that few threads share.
//!
//! What disks of one host device do is felt by all of them: they share an [`Activity`].

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

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
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Steps that are under way, and above [`STEP`] those that ever began: two equal looks with none under
    /// way mean that there was none between.
    steps: AtomicUsize,
}

/// What a step that begins adds to the count of all.
const STEP: usize = 1 << 12;

impl Activity {
    /// Says that a step of background work runs, until the guard is dropped.
    pub(crate) fn working(&self) -> Working<'_> {
        self.steps.fetch_add(STEP + 1, Ordering::Relaxed);
        Working(self)
    }

    fn look(&self) -> usize {
        self.steps.load(Ordering::Relaxed)
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

/// The latency of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Latency {
    /// Requests.
    pub(crate) count: u64,
    /// The time that they took together.
    pub(crate) total: Duration,
    /// The time that the slowest took.
    pub(crate) slowest: Duration,
}

impl Latency {
    /// What a request takes, if there was one.
    pub(crate) fn mean(&self) -> Option<Duration> {
        let nanos = self.total.as_nanos().checked_div(self.count.into())?;
        Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
    }
}

/// The latency of each kind of [`Request`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Latencies([Latency; Request::ALL.len()]);

impl Latencies {
    /// Of requests of this kind.
    pub(crate) fn of(&self, request: Request) -> Latency {
        self.0[request.index()]
    }

    /// How many requests there were.
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|latency| latency.count).sum()
    }
}

/// What happened on a disk between two calls of [`Meter::take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Requests while no background work was at the device.
    pub(crate) alone: Latencies,
    /// Requests that met some.
    pub(crate) beside: Latencies,
    /// Bytes that guests read, wrote, or zeroed.
    pub(crate) bytes: u64,
    /// Slots that blocks got.
    pub(crate) allocated: u64,
}

impl Reading {
    /// How much longer requests took beside background work than they would have taken alone: 1 where it
    /// made no difference, 2 where they took twice as long. Like is compared with like, a read with reads.
    /// `None` where fewer than `least` requests can be compared.
    pub(crate) fn slowdown(&self, least: u64) -> Option<f64> {
        let (mut count, mut took, mut expected) = (0, Duration::ZERO, Duration::ZERO);
        for request in Request::ALL {
            let (alone, beside) = (self.alone.of(request), self.beside.of(request));
            let (Some(mean), Ok(times)) = (alone.mean(), u32::try_from(beside.count)) else {
                continue;
            };
            count += beside.count.min(alone.count);
            took += beside.total;
            expected += mean.saturating_mul(times);
        }
        (count >= least.max(1) && !expected.is_zero()).then(|| took.div_duration_f64(expected))
    }
}

/// Counters that many threads add to, each mostly on its own of several lines.
const LINES: usize = 16;

/// Of a [`Latency`].
#[derive(Debug, Default)]
struct Sums {
    count: AtomicU64,
    nanos: AtomicU64,
    slowest: AtomicU64,
}

impl Sums {
    fn take(&self) -> Latency {
        let taken = |number: &AtomicU64| number.swap(0, Ordering::Relaxed);
        Latency {
            count: taken(&self.count),
            total: Duration::from_nanos(taken(&self.nanos)),
            slowest: Duration::from_nanos(taken(&self.slowest)),
        }
    }
}

/// A few cache lines that belong to a few threads.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line {
    alone: [Sums; Request::ALL.len()],
    beside: [Sums; Request::ALL.len()],
    bytes: AtomicU64,
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

    /// Measures a request of `bytes` bytes, until the guard is dropped.
    pub(crate) fn begin(&self, request: Request, bytes: u64) -> Measured<'_> {
        Measured {
            meter: self,
            request,
            bytes,
            look: self.activity().look(),
            begun: Instant::now(),
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
                for (cell, sum) in cells.iter().zip(&mut sums.0) {
                    let taken = cell.take();
                    sum.count += taken.count;
                    sum.total += taken.total;
                    sum.slowest = sum.slowest.max(taken.slowest);
                }
            }
            reading.bytes += line.bytes.swap(0, Ordering::Relaxed);
            reading.allocated += line.allocated.swap(0, Ordering::Relaxed);
        }
        reading
    }

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
    bytes: u64,
    look: usize,
    begun: Instant,
}

impl Drop for Measured<'_> {
    fn drop(&mut self) {
        let took = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let look = self.meter.activity().look();
        let is_alone = look == self.look && look.is_multiple_of(STEP);
        let line = self.meter.line();
        let cells = if is_alone { &line.alone } else { &line.beside };
        let cell = &cells[self.request.index()];
        cell.count.fetch_add(1, Ordering::Relaxed);
        cell.nanos.fetch_add(took, Ordering::Relaxed);
        if cell.slowest.load(Ordering::Relaxed) < took {
            cell.slowest.fetch_max(took, Ordering::Relaxed);
        }
        line.bytes.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

const _: () = assert!(STEP.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_meets_background_work_is_told_apart() {
        let meter = Meter::default();
        let activity = Arc::new(Activity::default());
        assert!(meter.join(Arc::clone(&activity)));
        drop(meter.begin(Request::Read, 100));
        // Began before the request and ended in it; came and went in it; began in it.
        let step = activity.working();
        let request = meter.begin(Request::Write, 10);
        drop(step);
        drop(request);
        let request = meter.begin(Request::Write, 10);
        drop(activity.working());
        drop(request);
        let request = meter.begin(Request::Zero, 1);
        let step = activity.working();
        drop(request);
        drop(step);
        drop(meter.begin(Request::Flush, 0));
        meter.note_allocated();
        let reading = meter.take();
        let counts = |latencies: Latencies| Request::ALL.map(|kind| latencies.of(kind).count);
        assert_eq!(counts(reading.alone), [1, 0, 0, 1]);
        assert_eq!(counts(reading.beside), [0, 2, 1, 0]);
        assert_eq!((reading.bytes, reading.allocated), (121, 1));
        assert_eq!((reading.alone.count(), reading.beside.count()), (2, 3));
        assert_eq!(meter.take(), Reading::default());
    }

    #[test]
    fn like_is_compared_with_like() {
        let of = |read: (u64, u64), flush: (u64, u64)| {
            let latency = |(count, millis)| Latency {
                count,
                total: Duration::from_millis(millis),
                slowest: Duration::ZERO,
            };
            let mut all = Latencies::default();
            all.0[Request::Read.index()] = latency(read);
            all.0[Request::Flush.index()] = latency(flush);
            all
        };
        // More flushes, each as long as before, are no slowdown.
        let reading = Reading {
            alone: of((100, 100), (1, 50)),
            beside: of((100, 100), (100, 5000)),
            ..Reading::default()
        };
        assert_eq!(reading.slowdown(100), Some(1.0));
        assert_eq!(reading.slowdown(102), None, "one flush to compare with");
        let twice = Reading {
            beside: of((50, 100), (0, 0)),
            ..reading
        };
        assert_eq!(twice.slowdown(1), Some(2.0));
        assert_eq!(Reading::default().slowdown(0), None);
    }

    #[test]
    fn threads_add_up() {
        let meter = Meter::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| drop(meter.begin(Request::Read, 1))));
            }
        });
        let reading = meter.take();
        let read = reading.alone.of(Request::Read);
        assert_eq!((read.count, reading.bytes), (400, 400));
        assert!(read.slowest <= read.total);
        assert_eq!(read.mean(), Some(read.total / 400));
        assert!(Arc::strong_count(meter.activity()) == 1);
        assert!(!meter.join(Arc::default()), "too late");
    }
}
