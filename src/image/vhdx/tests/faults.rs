//! Hosts that fail, or are full.

use super::*;
use crate::storage::sim::{Choice, Fault};

#[test]
fn a_failed_header_or_entry_poisons() {
    for writes in 0..3 {
        let sim = Arc::new(empty(64, 512, false));
        let image = open_shared(&sim, OPTIONS);
        if writes == 2 {
            image.begin_change().unwrap();
            allocate(&*image, 1);
        }
        let slot = image.reserve().unwrap();
        sim.inject(Fault {
            after: writes % 2,
            ..Fault::next(OpKind::Write)
        });
        let result = image.commit(&[place(0, slot, None)]);
        assert!(result.is_err());
        // The first entry of a session is of no consequence.
        assert_eq!(image.check_writable().is_err(), writes > 0);
        if writes == 0 {
            assert_eq!(image.reserve_at(slot).map(|_| ()), Some(()), "given back");
            image.commit(&[place(0, slot, None)]).unwrap();
        }
    }
}

#[test]
fn a_full_host_refuses_a_change_before_it_is_made() {
    let sim = Arc::new(empty(200 * 512, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    let slots = [0; 3].map(|_| image.reserve().unwrap());
    image.commit(&[place(0, slots[0], None)]).unwrap();
    sim.set_capacity(Some(sim.allocated_bytes().unwrap()));
    // The same page of the table takes no more room, another one does.
    image.commit(&[place(1, slots[1], None)]).unwrap();
    let error = image.commit(&[place(512, slots[2], None)]).unwrap_err();
    assert!(matches!(error, DiskError::NoSpace(_)), "{error}");
    assert!(image.reserve_at(slots[2]).is_some(), "given back");
    image.settle().unwrap();
    assert_eq!(image.map().present_count(), 2);
    assert_eq!(
        entries::<2>(&sim, 0),
        [0, 1].map(|n: usize| slots[n].get() | 6)
    );
    let other = Arc::new(empty(64, 512, false));
    other.set_capacity(Some(other.allocated_bytes().unwrap()));
    let before = other.to_bytes();
    let image = open_shared(&other, OPTIONS);
    let error = image.begin_change().unwrap_err();
    assert!(matches!(error, DiskError::NoSpace(_)), "{error}");
    image.check_writable().unwrap();
    assert!(other.to_bytes() == before);
    // Nor does it take the little room that there is: here in the middle of the log, after a first part of it.
    let stored = other.allocated_bytes().unwrap();
    other.set_capacity(None);
    let (start, len) = (MIB, 4096);
    (other.write_all_at(&[0; 4096], at(start + 8 * len))).unwrap();
    let stored = stored + len;
    assert_eq!(other.allocated_bytes().unwrap(), stored);
    other.set_capacity(Some(stored + 10 * len));
    let error = image.begin_change().unwrap_err();
    assert!(matches!(error, DiskError::NoSpace(_)), "{error}");
    assert_eq!(other.allocated_bytes().unwrap(), stored);
}

#[test]
fn pages_stay_in_the_log_while_the_host_does_not_take_them() {
    let sim = Arc::new(empty(200 * 512, 512, false));
    let image = open_shared(&sim, OPTIONS);
    image.begin_change().unwrap();
    for number in 0..60 {
        allocate(&*image, number * 512);
    }
    sim.inject(Fault {
        forever: true,
        error: std::io::ErrorKind::StorageFull,
        ..Fault::next(OpKind::Write)
    });
    image.sync().unwrap();
    let error = image.settle().unwrap_err();
    assert!(matches!(error, DiskError::NoSpace(_)), "{error}");
    image.check_writable().unwrap();
    let crashed = sim.crash(&mut Choice::AllLost);
    let after = open(Arc::new(crashed), READ_ONLY).unwrap().image;
    assert_eq!(after.map().present_count(), 60);
    sim.clear_faults();
    image.settle().unwrap();
    let settled = open_shared(&sim, READ_ONLY);
    assert_eq!(settled.map().present_count(), 60);
}
