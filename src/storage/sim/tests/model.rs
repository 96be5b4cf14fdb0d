//! Crash states against the simplest implementation of the fault model.

use proptest::prelude::*;

use super::crashed;
use crate::storage::Storage;
use crate::storage::sim::{Change, Choice, Keep, Random, SimStorage};
use crate::storage::tests::{Call, MAX, call};
use crate::units::{SECTOR_SIZE, round_down, round_up, u64_from, usize_from};

/// What the journal should hold, kept the simplest way: whole files and lists of bytes.
#[derive(Clone, Debug)]
enum Noted {
    Length(u64),
    /// Place, bytes, whether it extends the file.
    Content(u64, Vec<u8>, bool),
}

/// Runs `call` on both, and notes what a power cut could lose of it.
fn note(call: &Call, bytes: &mut Vec<u8>, notes: &mut Vec<Noted>) {
    let before = u64_from(bytes.len());
    if !call.run_on(bytes) {
        return;
    }
    let after = u64_from(bytes.len());
    let (start, end, extends) = match *call {
        Call::Sync => return notes.clear(),
        Call::SetLen(len) => return notes.push(Noted::Length(len)),
        Call::Write(start, ref new) => (start, start + u64_from(new.len()), true),
        Call::Copy(_, len, to) => (to, to + len, true),
        Call::Punch(start, len) => (start, (start + len).min(before), false),
        Call::Zero(start, len) => (start, start + len, false),
    };
    if start < end {
        let start = round_down(start, SECTOR_SIZE);
        let end = round_up(end, SECTOR_SIZE).min(after);
        let new = bytes[usize_from(start)..usize_from(end)].to_vec();
        notes.push(Noted::Content(start, new, extends));
    }
}

/// The durable bytes with the units for which `kept` holds.
fn replay(durable: &[u8], notes: &[Noted], mut kept: impl FnMut() -> bool) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    for noted in notes {
        match noted {
            Noted::Length(len) => {
                if kept() {
                    bytes.resize(usize_from(*len), 0);
                }
            }
            Noted::Content(start, new, extends) => {
                for (n, sector) in new.chunks(512).enumerate() {
                    let start = usize_from(*start) + n * 512;
                    if !kept() {
                        continue;
                    }
                    if *extends && bytes.len() < start + sector.len() {
                        bytes.resize(start + sector.len(), 0);
                    }
                    for (n, byte) in sector.iter().enumerate() {
                        if let Some(place) = bytes.get_mut(start + n) {
                            *place = *byte;
                        }
                    }
                }
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn crashes_as_the_simplest_model(
        calls in proptest::collection::vec(call(), 1..20),
        seeds in proptest::collection::vec(any::<u64>(), 4),
    ) {
        let sim = SimStorage::new();
        let (mut bytes, mut durable, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for call in &calls {
            note(call, &mut bytes, &mut notes);
            if matches!(call, Call::Sync) {
                durable.clone_from(&bytes);
            }
            drop(call.run(&sim));
            sim.state.lock().volatile.assert_valid();
            for &seed in &seeds {
                let mut random = Random::new(seed);
                let expected = replay(&durable, &notes, || random.below(2) == 1);
                let mut random = Random::new(seed);
                let mut choice = |change: &Change| {
                    Keep::Units((0..change.units).map(|_| random.below(2) == 1).collect())
                };
                let crashed = sim.crash(&mut choice);
                crashed.state.lock().durable.assert_valid();
                prop_assert!(crashed.to_bytes() == expected, "after {call:?}");
            }
            prop_assert!(crashed(&sim, Choice::AllKept) == bytes);
            prop_assert!(crashed(&sim, Choice::AllLost) == durable);
        }
        sim.sync().unwrap();
        let durable = sim.crash(&mut Choice::AllLost);
        prop_assert!(durable.to_bytes() == bytes);
        prop_assert_eq!(durable.allocated_bytes().unwrap(), sim.allocated_bytes().unwrap());
        prop_assert!(bytes.len() <= usize_from(2 * MAX));
    }

    /// The named choices are made of whole changes, and `Units` numbers them all.
    #[test]
    fn choices_agree(calls in proptest::collection::vec(call(), 1..8), seed in any::<u64>()) {
        let sim = SimStorage::new();
        for call in &calls {
            drop(call.run(&sim));
        }
        let changes = sim.unsynced();
        let mut next = 0;
        for (index, change) in changes.iter().enumerate() {
            prop_assert_eq!((change.index, change.first_unit), (index, next));
            prop_assert!(change.units > 0);
            next += change.units;
        }
        for choice in sim.choices(6, 8, seed) {
            let state = crashed(&sim, choice);
            let whole = match choice {
                Choice::AllLost => 0,
                Choice::AllKept => u64::MAX,
                Choice::AllBut(index) => !(1 << index),
                Choice::Only(index) => 1 << index,
                Choice::Before(index) => (1 << index) - 1,
                _ => continue,
            };
            prop_assert!(state == crashed(&sim, Choice::Changes(whole)), "{choice:?}");
        }
    }
}
