//! What moving costs beside active guests, against what it gives back. Pure: no clock, no disk.
//!
//! A plan says what its moves will give back; but a guest may take that at once, and make new holes for the next
//! plan. So it is counted what was moved for how much, and where that was too much, nothing is moved until the
//! guest rests, or until some time has passed.

use std::time::{Duration, Instant};

/// Bytes that are moved beside a guest for each byte that the file gets shorter by, at most. Moved blocks
/// come from the end of the file, so that one is what it takes where nothing is in the way; where it is more,
/// a block that stays holds the end, and most of it would be for nothing.
pub(crate) const DEAREST: u64 = 4;

/// Bytes that may be moved beyond that.
const CREDIT: u64 = 64 << 20;

/// After that, half of what was moved for nothing is forgotten.
const HALF_LIFE: Duration = Duration::from_secs(600);

/// The account of one disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ledger {
    /// Bytes that were moved and gave nothing back, as of `at`.
    debt: u64,
    at: Instant,
}

impl Ledger {
    /// Of a disk on which nothing was moved until `now`.
    pub(crate) fn new(now: Instant) -> Self {
        Self { debt: 0, at: now }
    }

    /// Takes in that until `now` so many bytes were `moved` beside a guest, and `given_back`.
    pub(crate) fn note(&mut self, now: Instant, moved: u64, given_back: u64) {
        let (debt, halves) = self.halved(now);
        self.at = match debt {
            0 => now,
            // What has passed of the present half-life counts.
            _ => self.at + HALF_LIFE.saturating_mul(halves),
        };
        let debt = debt.saturating_add(moved);
        self.debt = debt.saturating_sub(given_back.saturating_mul(DEAREST));
    }

    /// Whether more may be moved beside a guest.
    pub(crate) fn allows(&self, now: Instant) -> bool {
        self.halved(now).0 <= CREDIT
    }

    /// The debt at `now`, and how many half-lives that is after `at`.
    fn halved(&self, now: Instant) -> (u64, u32) {
        let halves = now.saturating_duration_since(self.at).as_secs() / HALF_LIFE.as_secs();
        let halves = u32::try_from(halves).unwrap_or(u32::MAX);
        (self.debt.checked_shr(halves).unwrap_or(0), halves)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_gives_back_enough_goes_on_for_ever() {
        let begun = Instant::now();
        let mut ledger = Ledger::new(begun);
        for second in 0..1000 {
            let now = begun + Duration::from_secs(second);
            ledger.note(now, 4 * MIB, MIB);
            assert!(ledger.allows(now));
        }
    }

    #[test]
    fn what_gives_back_nothing_is_bounded_however_long_it_takes() {
        let begun = Instant::now();
        let mut ledger = Ledger::new(begun);
        let mut moved = 0;
        for second in 0..24 * 3600 {
            let now = begun + Duration::from_secs(second);
            if ledger.allows(now) {
                ledger.note(now, 16 * MIB, 0);
                moved += 16 * MIB;
            }
        }
        // In a day: the credit, and half of it again in each of 144 half-lives.
        assert!((64 * MIB..145 * 64 * MIB).contains(&moved), "{moved}");
    }

    #[test]
    fn what_is_owed_is_forgotten_however_often_it_is_noted() {
        let begun = Instant::now();
        let mut ledger = Ledger::new(begun);
        ledger.note(begun, 128 * MIB, 0);
        let allowed = (1..3600).find(|second| {
            let now = begun + Duration::from_secs(*second);
            ledger.note(now, 0, 0);
            ledger.allows(now)
        });
        assert_eq!(allowed, Some(600));
        ledger.note(begun, 1024 * MIB, 0);
        ledger.note(begun, 0, 256 * MIB);
        assert!(ledger.allows(begun), "paid");
    }
}
