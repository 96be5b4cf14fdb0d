//! The scenarios of `crash.rs` on every kind of disk: both formats, sectors of both sizes, fixed,
//! dynamic, over one parent and over three.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use support::life::Life;
use support::matrix::{Spec, kinds};
use support::scenarios::ALL;
use support::sweep::{Tally, sweep};
use support::{env_number, soak};

/// States that a scenario tries on one kind of disk if nothing else is said.
const STATES: u64 = 75;
/// Random lives of each kind, and states of one.
const LIVES: u64 = 6;
const STATES_OF_LIFE: u64 = 18;

fn all_scenarios(kind: usize) {
    let mut name = String::new();
    for (n, (scenario, run)) in (0..).zip(ALL) {
        let seed = env_number("VHDFS_SEED", 1) << 16 | n;
        let spec: Spec = kinds(128 << 10, seed)[kind];
        name = spec.name();
        let start = spec.start();
        let oracle = start.oracle();
        let block = start.block_size;
        let case = format!("{name}, {scenario}");
        let tally = sweep(&case, STATES * soak(), start.storage, oracle, |guest| {
            run(guest, block)
        });
        tally.print(&case);
    }
    let mut tally = Tally::default();
    for n in 0..LIVES * soak() {
        let seed = env_number("VHDFS_SEED", 1) << 32 | 0xace << 16 | n;
        let life = Life::on(kinds(128 << 10, seed)[kind]);
        let (storage, oracle) = life.start();
        let name = format!("{name}, random life {seed:#x}");
        tally.add(sweep(&name, STATES_OF_LIFE, storage, oracle, |guest| {
            life.live(guest)
        }));
    }
    tally.print(&format!("{name}, random lives"));
}

// One test each, for the test runner to spread.

#[test]
fn vhd_dynamic() {
    all_scenarios(0);
}

#[test]
fn vhd_over_one() {
    all_scenarios(1);
}

#[test]
fn vhd_over_three() {
    all_scenarios(2);
}

#[test]
fn vhdx_512_dynamic() {
    all_scenarios(3);
}

#[test]
fn vhdx_512_over_one() {
    all_scenarios(4);
}

#[test]
fn vhdx_512_over_three() {
    all_scenarios(5);
}

#[test]
fn vhdx_4096_dynamic() {
    all_scenarios(6);
}

#[test]
fn vhdx_4096_over_one() {
    all_scenarios(7);
}

#[test]
fn vhdx_4096_over_three() {
    all_scenarios(8);
}

#[test]
fn vhdx_fixed() {
    all_scenarios(9);
}
