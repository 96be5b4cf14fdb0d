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
    /// Steps that are under way.
    steps: AtomicUsize,
}

impl Activity {
    /// Says that a step of background work runs, until the guard is dropped.
    pub(crate) fn working(&self) -> Working<'_> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        Working(self)
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

/// The latency of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Latency {
    /// Requests.
    pub(crate) count: u64,
    /// The time that they took together.
    pub(crate) total: Duration,
}

impl Latency {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.total += other.total;
    }

    /// What a request takes, if there was one.
    pub(crate) fn mean(&self) -> Option<Duration> {
        let nanos = self.total.as_nanos().checked_div(self.count.into())?;
        Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
    }
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

/// The mean of requests beside background work, and what they would have taken alone. Like is compared with
/// like, a read with reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compared {
    pub(crate) alone: Duration,
    pub(crate) beside: Duration,
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

    /// What background work costs a request. `None` where fewer than `least` can be compared.
    pub(crate) fn compare(&self, least: u64) -> Option<Compared> {
        let (mut alone, mut beside) = (Latency::default(), Latency::default());
        for (own, other) in self.alone.iter().zip(&self.beside) {
            let (Some(mean), Ok(times)) = (own.mean(), u32::try_from(other.count)) else {
                continue;
            };
            alone.add(Latency {
                count: other.count.min(own.count),
                total: mean.saturating_mul(times),
            });
            beside.add(*other);
        }
        let count = (alone.count >= least).then_some(beside.count)?;
        let mean = |total| Latency { count, total }.mean();
        Some(Compared {
            alone: mean(alone.total)?,
            beside: mean(beside.total)?,
        })
    }
}

/// Counters that many threads add to, each mostly on its own of several lines.
const LINES: usize = 16;

/// Of a [`Latency`].
#[derive(Debug, Default)]
struct Sums {
    count: AtomicU64,
    nanos: AtomicU64,
}

impl Sums {
    fn take(&self) -> Latency {
        let taken = |number: &AtomicU64| number.swap(0, Ordering::Relaxed);
        Latency {
            count: taken(&self.count),
            total: Duration::from_nanos(taken(&self.nanos)),
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
        Measured {
            meter: self,
            request,
            is_beside: self.activity().is_busy(),
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
                for (cell, sum) in cells.iter().zip(sums) {
                    sum.add(cell.take());
                }
            }
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
    is_beside: bool,
    begun: Instant,
}

impl Drop for Measured<'_> {
    fn drop(&mut self) {
        let took = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let line = self.meter.line();
        let cells = match self.is_beside {
            true => &line.beside,
            false => &line.alone,
        };
        let cell = &cells[self.request.index()];
        cell.count.fetch_add(1, Ordering::Relaxed);
        cell.nanos.fetch_add(took, Ordering::Relaxed);
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
        let latency = |count, millis| Latency {
            count,
            total: Duration::from_millis(millis),
        };
        let mut reading = Reading::of(Request::Read, latency(100, 100), latency(100, 100));
        reading.add(&Reading::of(
            Request::Flush,
            latency(1, 50),
            latency(100, 5000),
        ));
        // More flushes, each as long as before, are no slowdown.
        let compared = reading.compare(101).unwrap();
        assert_eq!(compared.alone, compared.beside);
        assert_eq!(reading.compare(102), None, "one flush to compare with");
        let twice = Reading::of(Request::Read, latency(100, 100), latency(50, 100));
        let compared = twice.compare(1).unwrap();
        assert_eq!(compared.beside, compared.alone * 2);
        assert_eq!(Reading::default().compare(0), None);
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
        assert_eq!((read.count, read.mean()), (400, Some(read.total / 400)));
        assert!(Arc::strong_count(meter.activity()) == 1);
        assert!(!meter.join(Arc::default()), "too late");
    }
}
