//! Gates, apart from their file, which is run under a model checker, too (`tests/models`).

use std::ops::Range;
use std::sync::Arc;

use crate::disk::gate::{Gates, Watch};
use crate::units::BlockIndex;

const BLOCK: BlockIndex = BlockIndex::new(3);

fn touched(watch: &Watch) -> Vec<Range<u64>> {
    watch.conclude(|touched| touched.iter().cloned().collect())
}

#[test]
fn a_watch_is_marked_where_it_was_touched() {
    let gates = Arc::new(Gates::new(2000));
    let whole = gates.watch(BLOCK);
    let part = gates.watch_part(BLOCK, 4096..40960);
    let other = gates.watch(BlockIndex::new(3 + 16));
    assert!(gates.change_in_place(BLOCK, 100..200, None).end());
    assert_eq!(touched(&part), []);
    assert!(whole.is_touched());
    drop(gates.change_in_place(BLOCK, 5000..8193, None));
    drop(gates.change_in_place(BLOCK, 30000..90000, None));
    assert_eq!(touched(&part), [4096..12288, 28672..40960]);
    drop(gates.change(BLOCK));
    assert_eq!(touched(&part), [4096..40960]);
    assert!(!other.is_touched());
    // Nobody marks what he watches himself.
    let own = gates.watch_part(BLOCK, 0..4096);
    drop(gates.change_in_place(BLOCK, 0..4096, Some(&own)));
    assert!(!own.is_touched());
}

#[test]
fn a_change_learns_whom_it_met() {
    let gates = Arc::new(Gates::new(1));
    let block = BlockIndex::new(0);
    let begin = || gates.change_in_place(block, 0..10, None);
    assert!(!begin().end());
    // Came and went, began in it, was there.
    let change = begin();
    drop(gates.watch(block));
    assert!(change.end());
    let change = begin();
    let watch = gates.watch(block);
    assert!(!watch.is_touched());
    assert!(change.end());
    assert!(watch.is_touched());
    assert!(begin().end());
    drop(watch);
    assert!(!begin().end());
    let own = gates.watch_part(block, 0..10);
    assert!(!gates.change_in_place(block, 0..10, Some(&own)).end());
}

#[test]
fn blocks_warm_up_and_cool_down() {
    let gates = Arc::new(Gates::new(2000));
    assert_eq!(gates.heat(BlockIndex::new(1999)), 0);
    for _ in 0..300 {
        drop(gates.change_in_place(BLOCK, 0..10, None));
    }
    assert_eq!(gates.heat(BLOCK), 255);
    gates.cool();
    assert_eq!(gates.heat(BLOCK), 127);
    (0..7).for_each(|_| gates.cool());
    assert_eq!((gates.heat(BLOCK), gates.heat(BlockIndex::new(4))), (0, 0));
}
