//! How fast background work goes beside guests. Pure: no clock, no disk, no lock.
//!
//! Work is done in steps, and after a step that took `t` nothing is done for `t * (1 - share) / share`, so
//! that all steps together take `share` of the time: of the device, for which they mostly wait, and so of
//! one processor at most. There are two shares, both for all disks on one host device:
//!
//! | of a disk | largest share | bytes in a step |
//! | --- | --- | --- |
//! | that is idle | all, or [`BESIDE_OTHERS`] while guests of other disks on the device are active | [`IDLE_STEP`] |
//! | whose guest is active | [`IdlePolicy::busy_share`](super::IdlePolicy::busy_share) | what was done in [`BUSY_STEP`] lately |
//!
//! # Feedback
//! Requests of guests are timed, those that began while a step ran apart from those that did not: whether one
//! did does not depend on how long the request takes, so that the two differ by what the step costs it and
//! by nothing else. They are compared once it is clear whether they do; then, where the former take longer,
//! both shares are halved, down to a [`FLOOR`]th of the largest; where they do not, an eighth is added, as
//! congestion control does it. What is compared is the mean of octaves, not of times: on a disk that is busy, a
//! mean of times is what its few longest requests make it, and says nothing.
//!
//! # A full host
//! While the file system has less free than it should, the largest share of busy disks doubles every
//! [`URGENCY_STEP`], up to [`MOST_URGENT`].

use std::time::{Duration, Instant};

use crate::disk::Reading;
use crate::units::{GRANULE_SIZE, round_down};

/// Bytes that a step goes through at most where nobody waits for it.
pub(crate) const IDLE_STEP: u64 = 32 << 20;
/// How long a step is to take at most where a guest may have to wait for it.
pub(crate) const BUSY_STEP: Duration = Duration::from_millis(2);
/// Bounds of what is done in such a step, in bytes.
const BUSY_BYTES: (u64, u64) = (64 << 10, 1 << 20);

/// The largest share of work on idle disks while other guests use the device: without gaps it could not be
/// seen how fast they are without us.
const BESIDE_OTHERS: f64 = 0.8;
/// The smallest share, as a part of the largest.
const FLOOR: f64 = 16.0;
/// By how many octaves requests beside a step may take longer: by an eighth.
const TOLERANCE: f64 = 0.16;
/// A step that took very long says more of the host than of itself.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// When guests that ask for nothing no longer count.
const GUESTS_GONE: Duration = Duration::from_secs(2);
/// Requests beside a step that it takes to compare them, and with which it is clear enough in any case.
const ENOUGH: (u64, u64) = (16, 512);

/// How often the share grows while the host is about to be full.
pub(crate) const URGENCY_STEP: Duration = Duration::from_secs(30);
/// The largest share of busy disks then.
const MOST_URGENT: f64 = 0.5;

/// When a file system counts as about to be full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowSpace {
    /// With fewer free bytes.
    Bytes(u64),
    /// With fewer hundredths of it free, at most 100.
    Percent(u8),
}

/// The space of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What may still be taken.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

impl LowSpace {
    /// Whether `room` is less.
    pub fn is_below(self, room: Room) -> bool {
        match self {
            Self::Bytes(bytes) => room.free < bytes,
            // Divided first: no overflow.
            Self::Percent(percent) => room.free < room.total / 100 * u64::from(percent),
        }
    }
}

/// A share of the time that grows and shrinks.
#[derive(Clone, Copy, Debug)]
struct Share {
    most: f64,
    now: f64,
}

impl Share {
    fn new(most: f64) -> Self {
        Self { most, now: most }
    }

    fn set_most(&mut self, most: f64) {
        if most > self.most {
            // What is allowed more is used at once: guests that get slower take it back.
            self.now += most - self.most;
        }
        self.most = most;
        self.now = self.now.min(most);
    }

    fn halve(&mut self) {
        self.now = (self.now / 2.0).max(self.most / FLOOR);
    }

    fn grow(&mut self) {
        self.now = (self.now + self.most / 8.0).min(self.most);
    }

    /// How long to do nothing after a step that took `took`; `None` for ever.
    fn pause(self, took: Duration) -> Option<Duration> {
        let pause = (self.now > 0.0).then(|| took.mul_f64((1.0 - self.now).max(0.0) / self.now));
        pause.map(|pause| pause.min(LONGEST_PAUSE))
    }
}

/// What a step was done for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    /// A disk that is idle.
    Nobody,
    /// A disk whose guest is active.
    Guest,
}

/// The pace of all work on one host device.
#[derive(Debug)]
pub(crate) struct Pace {
    idle: Share,
    busy: Share,
    /// As the policy has it; what is allowed now may be more.
    busy_share: f64,
    /// What busy steps did lately, in bytes a millisecond.
    rate: Option<u64>,
    /// Requests since they were compared last.
    seen: Reading,
    /// When a guest was last seen to use the device.
    guests_seen: Option<Instant>,
    /// Since when the host is about to be full.
    urgent_since: Option<Instant>,
}

impl Pace {
    /// With `busy_share` hundredths for disks whose guests are active.
    pub(crate) fn new(busy_share: u8) -> Self {
        let busy_share = f64::from(busy_share.min(100)) / 100.0;
        Self {
            idle: Share::new(1.0),
            busy: Share::new(busy_share),
            busy_share,
            rate: None,
            seen: Reading::default(),
            guests_seen: None,
            urgent_since: None,
        }
    }

    /// Bytes that the next step may go through.
    pub(crate) fn budget(&self, beside: Beside) -> u64 {
        match (beside, self.rate) {
            (Beside::Nobody, _) => IDLE_STEP,
            (Beside::Guest, None) => BUSY_BYTES.0,
            (Beside::Guest, Some(rate)) => {
                let bytes = rate.saturating_mul(millis(BUSY_STEP));
                round_down(bytes.clamp(BUSY_BYTES.0, BUSY_BYTES.1), GRANULE_SIZE)
            }
        }
    }

    /// How long nothing is done after a step that took `took` and went through `bytes`; `None`: until the disk
    /// is idle.
    pub(crate) fn after(&mut self, beside: Beside, took: Duration, bytes: u64) -> Option<Duration> {
        if beside == Beside::Guest && bytes >= BUSY_BYTES.0 {
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
            let rate = bytes.saturating_mul(1000) / micros;
            self.rate = Some(self.rate.map_or(rate, |before| (before / 4 * 3) + rate / 4));
        }
        match beside {
            Beside::Nobody if self.guests_seen.is_none() => Some(Duration::ZERO),
            Beside::Nobody => self.idle.pause(took),
            Beside::Guest => self.busy.pause(took),
        }
    }

    /// Takes in requests to a disk on the device that were measured until `now`, and when a guest of any disk
    /// there asked for something last. A disk counts as idle after `idle_after`.
    pub(crate) fn observe(
        &mut self,
        now: Instant,
        reading: &Reading,
        last_request: Option<Instant>,
        idle_after: Duration,
    ) {
        let is_recent =
            |then: &Instant| now.saturating_duration_since(*then) < GUESTS_GONE.min(idle_after);
        self.guests_seen = last_request.filter(is_recent);
        self.idle.set_most(match self.guests_seen.is_some() {
            true => BESIDE_OTHERS,
            false => 1.0,
        });
        self.seen.add(reading);
        let Some(compared) = self.seen.compare() else {
            return;
        };
        let (apart, sure) = (compared.longer - TOLERANCE, 2.0 * compared.doubt);
        let is_clear = compared.count >= ENOUGH.1 || apart.abs() > sure;
        if compared.count < ENOUGH.0 || !is_clear {
            return;
        }
        self.seen = Reading::default();
        let is_slower = apart > 0.0;
        for share in [&mut self.idle, &mut self.busy] {
            match is_slower {
                true => share.halve(),
                false => share.grow(),
            }
        }
    }

    /// Takes in whether the host is about to be full. Whether it is so for the first time since it was not.
    pub(crate) fn look_at_room(&mut self, now: Instant, is_low: bool) -> bool {
        let begins = is_low && self.urgent_since.is_none();
        self.urgent_since = is_low.then(|| self.urgent_since.unwrap_or(now));
        self.set_urgency(
            self.urgent_since
                .map(|since| now.saturating_duration_since(since)),
        );
        begins
    }

    /// Whether the host is about to be full.
    pub(crate) fn is_urgent(&self) -> bool {
        self.urgent_since.is_some()
    }

    /// The share of the time that work on disks of active guests may take now.
    pub(crate) fn busy_share(&self) -> f64 {
        self.busy.now
    }

    fn set_urgency(&mut self, urgent_for: Option<Duration>) {
        let steps = urgent_for.map_or(0, |time| time.as_secs() / URGENCY_STEP.as_secs());
        let grown = (0..steps.min(8)).fold(self.busy_share, |share, _| share * 2.0);
        self.busy
            .set_most(grown.min(MOST_URGENT.max(self.busy_share)));
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Latency, Request};

    const STEP: Duration = Duration::from_millis(2);
    const IDLE_AFTER: Duration = Duration::from_secs(5);

    /// Reads, so many of so many microseconds alone and beside a step.
    fn reads(alone: (u64, u64), beside: (u64, u64)) -> Reading {
        let latency = |(count, micros)| Latency::of(count, Duration::from_micros(micros));
        Reading::of(Request::Read, latency(alone), latency(beside))
    }

    /// The share of the time that steps of 2 ms take in a second, as a simulated clock has it.
    fn share(pace: &mut Pace, beside: Beside) -> f64 {
        let (mut now, mut worked) = (Duration::ZERO, Duration::ZERO);
        while now < Duration::from_secs(10) {
            let Some(pause) = pace.after(beside, STEP, 1 << 20) else {
                return 0.0;
            };
            worked += STEP;
            now += STEP + pause;
        }
        worked.as_secs_f64() / now.as_secs_f64()
    }

    #[test]
    fn busy_disks_get_their_share_and_idle_ones_all() {
        let mut pace = Pace::new(5);
        assert!((share(&mut pace, Beside::Guest) - 0.05).abs() < 0.001);
        assert_eq!(
            pace.after(Beside::Nobody, STEP, 1 << 20),
            Some(Duration::ZERO)
        );
        let mut pace = Pace::new(20);
        assert!((share(&mut pace, Beside::Guest) - 0.2).abs() < 0.001);
        let mut silent = Pace::new(0);
        assert_eq!(silent.after(Beside::Guest, STEP, 1 << 20), None);
        let now = Instant::now();
        silent.look_at_room(now, true);
        silent.look_at_room(now + URGENCY_STEP * 9, true);
        assert_eq!(silent.after(Beside::Guest, STEP, 1 << 20), None, "0 is 0");
    }

    #[test]
    fn guests_that_get_slower_halve_the_share_and_others_let_it_grow() {
        let mut pace = Pace::new(8);
        let now = Instant::now();
        // Too few to say.
        pace.observe(
            now,
            &reads((1000, 100), (15, 10_000)),
            Some(now),
            IDLE_AFTER,
        );
        assert_eq!(pace.busy_share(), 0.08);
        pace.observe(now, &reads((0, 0), (1, 10_000)), Some(now), IDLE_AFTER);
        assert_eq!(pace.busy_share(), 0.04);
        assert!((share(&mut pace, Beside::Nobody) - BESIDE_OTHERS / 2.0).abs() < 0.01);
        for _ in 0..20 {
            pace.observe(now, &reads((100, 100), (16, 1000)), Some(now), IDLE_AFTER);
        }
        assert_eq!(pace.busy_share(), 0.08 / FLOOR, "never nothing");
        let mut rounds = 0;
        while pace.busy_share() < 0.08 {
            // As fast as the tolerance has it.
            pace.observe(now, &reads((100, 100), (16, 110)), Some(now), IDLE_AFTER);
            rounds += 1;
        }
        assert_eq!(rounds, 8);
        // What is not clear is waited for: a few that take very long, among many.
        for slow in [15, 15, 15] {
            pace.observe(now, &reads((100, 100), (slow, 100)), Some(now), IDLE_AFTER);
            pace.observe(now, &reads((0, 0), (1, 100_000)), Some(now), IDLE_AFTER);
            assert_eq!(pace.busy_share(), 0.08);
        }
        // Where there are no guests any more, there is nobody to spare.
        pace.observe(
            now + Duration::from_secs(1),
            &Reading::default(),
            Some(now),
            IDLE_AFTER,
        );
        assert_ne!(
            pace.after(Beside::Nobody, STEP, 1 << 20),
            Some(Duration::ZERO)
        );
        pace.observe(
            now + Duration::from_secs(3),
            &Reading::default(),
            Some(now),
            IDLE_AFTER,
        );
        assert_eq!(
            pace.after(Beside::Nobody, STEP, 1 << 20),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn a_step_beside_a_guest_takes_two_milliseconds() {
        let mut pace = Pace::new(5);
        assert_eq!(pace.budget(Beside::Guest), 64 << 10);
        // 100 MB/s.
        for _ in 0..40 {
            let bytes = pace.budget(Beside::Guest);
            let took = Duration::from_nanos(bytes * 10);
            assert!(took <= BUSY_STEP, "{bytes}");
            pace.after(Beside::Guest, took, bytes);
        }
        assert!(pace.budget(Beside::Guest) > 180_000);
        // A slow disk gets small steps, a fast one not all too large ones.
        pace.after(Beside::Guest, Duration::from_secs(1), 200_000);
        for _ in 0..40 {
            pace.after(Beside::Guest, Duration::from_secs(1), 64 << 10);
        }
        assert_eq!(pace.budget(Beside::Guest), 64 << 10);
        for _ in 0..40 {
            pace.after(Beside::Guest, Duration::from_nanos(1), 1 << 20);
        }
        assert_eq!(pace.budget(Beside::Guest), 1 << 20);
        assert_eq!(pace.budget(Beside::Nobody), IDLE_STEP);
    }

    #[test]
    fn a_host_that_runs_full_gets_more_and_more() {
        let mut pace = Pace::new(5);
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert!(!pace.look_at_room(at(100), false));
        assert!(pace.look_at_room(at(101), true), "said once");
        assert_eq!(pace.busy_share(), 0.05);
        let shares = [
            (131, 0.1),
            (161, 0.2),
            (191, 0.4),
            (221, 0.5),
            (100_000, 0.5),
        ];
        for (second, share) in shares {
            assert!(!pace.look_at_room(at(second), true));
            assert!(
                (pace.busy_share() - share).abs() < 1e-9,
                "{second}: {}",
                pace.busy_share()
            );
        }
        assert!(pace.is_urgent());
        assert!(!pace.look_at_room(at(100_001), false));
        assert_eq!(pace.busy_share(), 0.05);
        let room = Room {
            free: 10,
            total: 100,
        };
        assert!(!LowSpace::Percent(10).is_below(room) && LowSpace::Percent(11).is_below(room));
        assert!(!LowSpace::Bytes(10).is_below(room) && LowSpace::Bytes(11).is_below(room));
        assert!(!LowSpace::Percent(0).is_below(Room {
            free: 0,
            total: 100
        }));
    }
}
