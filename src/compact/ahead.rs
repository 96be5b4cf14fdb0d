//! How much free space stays at the end of a file that is in use, so that it does not grow and get cut by
//! turns. Pure: no clock, no disk.
//!
//! A file grows ahead of its guest, by a quarter, because growing takes syncs. As long as the guest has allocated
//! anything within the last [`HORIZON`], it will need that soon: less kept would be grown again with the next
//! block, and cut again. Once it has allocated nothing for that long, or the disk is closed, the file is cut to
//! what its format needs.

use std::time::{Duration, Instant};

/// How far back it counts what the guest allocated, in times that a disk must be idle, and at most.
const HORIZON: (u32, Duration) = (6, Duration::from_secs(600));

/// Also where disks count as idle at all times.
const SHORTEST: Duration = Duration::from_secs(1);

/// Bounds of what a file grows by at a time, in bytes, as its image has them.
const GROWTH: (u64, u64) = (16 << 20, 1 << 30);

/// What a guest allocated lately.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    /// When the present half of the horizon began.
    since: Instant,
    /// Bytes of slots, in this half and in the one before.
    now: u64,
    before: u64,
}

impl Ahead {
    /// Of a guest that has allocated nothing until `now`.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            since: now,
            now: 0,
            before: 0,
        }
    }

    /// How long what was allocated counts.
    fn horizon(idle_after: Duration) -> Duration {
        idle_after
            .saturating_mul(HORIZON.0)
            .clamp(SHORTEST, HORIZON.1)
    }

    /// Takes in that the guest was given slots of `bytes` bytes until `now`.
    pub(crate) fn note(&mut self, now: Instant, bytes: u64, idle_after: Duration) {
        let half = Self::horizon(idle_after) / 2;
        let passed = now.saturating_duration_since(self.since);
        if passed >= half {
            self.before = if passed < half * 2 { self.now } else { 0 };
            (self.now, self.since) = (0, now);
        }
        self.now = self.now.saturating_add(bytes);
    }

    /// Bytes that stay free at the end of a file that would have `len` bytes without: what it grows by at a time,
    /// or nothing.
    pub(crate) fn spare(&self, len: u64) -> u64 {
        match self.now.saturating_add(self.before) {
            0 => 0,
            _ => (len / 4).clamp(GROWTH.0, GROWTH.1),
        }
    }

    /// After what time less of it, or nothing, may stay; `None` where nothing does.
    pub(crate) fn expires(&self, now: Instant, idle_after: Duration) -> Option<Duration> {
        let half = Self::horizon(idle_after) / 2;
        let ends = match (self.now, self.before) {
            (0, 0) => return None,
            (0, _) => self.since + half,
            _ => self.since + half * 2,
        };
        Some(ends.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE_AFTER: Duration = Duration::from_secs(5);
    const MIB: u64 = 1 << 20;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn what_was_allocated_lately_stays_for_half_a_minute() {
        let begun = Instant::now();
        let at = |second| begun + seconds(second);
        let mut ahead = Ahead::new(begun);
        assert_eq!(ahead.expires(at(0), IDLE_AFTER), None);
        ahead.note(at(100), 8 * MIB, IDLE_AFTER);
        ahead.note(at(101), 8 * MIB, IDLE_AFTER);
        assert_eq!(ahead.spare(1000 * MIB), 250 * MIB, "what it grows by");
        assert_eq!(ahead.spare(20 * MIB), 16 * MIB);
        assert_eq!(ahead.expires(at(102), IDLE_AFTER), Some(seconds(28)));
        ahead.note(at(115), 0, IDLE_AFTER);
        assert_eq!(ahead.spare(1000 * MIB), 250 * MIB);
        assert_eq!(ahead.expires(at(116), IDLE_AFTER), Some(seconds(14)));
        ahead.note(at(130), 0, IDLE_AFTER);
        assert_eq!(
            (ahead.spare(1000 * MIB), ahead.expires(at(130), IDLE_AFTER)),
            (0, None)
        );
    }

    #[test]
    fn a_guest_that_goes_on_keeps_what_it_needs() {
        let begun = Instant::now();
        let at = |second| begun + seconds(second);
        let mut ahead = Ahead::new(begun);
        for second in 0..300 {
            ahead.note(at(second), MIB, IDLE_AFTER);
            assert_eq!(ahead.spare(u64::MAX), 1 << 30, "{second}");
        }
        // Nobody looked for long.
        ahead.note(at(1000), 0, IDLE_AFTER);
        assert_eq!(ahead.spare(u64::MAX), 0);
    }
}
