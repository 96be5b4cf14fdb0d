//! `kill -9` of the daemon at any moment, again and again, while a guest writes and compaction runs: what was
//! acknowledged is there, and nothing needs to be repaired.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use super::mirror::Mirror;
use super::rig::{Rig, VHDFS, length, obstacle, report, run, say_skipped};
use super::{Maker, VHD_OF_OURS, VHDX_OF_OURS, judge};

const SIZE: &str = "64M";
/// Kills of each kind of disk, times `VHDFS_SOAK`.
const ROUNDS: u64 = 5;
/// Longer than this no daemon lives.
const LIFE: u64 = 300;
/// What a daemon says after a compaction.
const DONE: &str = ": compacted";

#[test]
fn kills_while_a_vhd_is_used() {
    killed_again_and_again("kills_while_a_vhd_is_used", VHD_OF_OURS, false);
}

#[test]
fn kills_while_a_vhdx_is_used() {
    killed_again_and_again("kills_while_a_vhdx_is_used", VHDX_OF_OURS, false);
}

#[test]
fn kills_while_a_child_vhd_is_used() {
    killed_again_and_again("kills_while_a_child_vhd_is_used", VHD_OF_OURS, true);
}

#[test]
fn kills_while_a_child_vhdx_is_used() {
    killed_again_and_again("kills_while_a_child_vhdx_is_used", VHDX_OF_OURS, true);
}

pub(crate) fn number_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("a number"))
}

fn killed_again_and_again(test: &str, maker: Maker, child: bool) {
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    let mut rig = Rig::new(maker.extension);
    // Whenever the guest holds its breath.
    rig.idle_after = "10ms";
    let disk = rig.disk("guest");
    let seed = number_of("VHDFS_SEED", 1);
    if child {
        make_child(&mut rig, maker, SIZE, seed + 77);
    } else {
        (maker.make)(SIZE, &disk);
    }
    rig.serve();
    let mut mirror = Mirror::new(&rig.raw("guest"), &rig.path("guest.raw"), seed);
    mirror.learn();
    let rounds = ROUNDS * number_of("VHDFS_SOAK", 1);
    let mut round = 0;
    // On a slow machine it takes longer until one daemon lives for a whole compaction.
    while round < rounds || round < 20 * rounds && !rig.log().contains(DONE) {
        round += 1;
        let life = Duration::from_millis(1 + mirror.next() % LIFE);
        mirror = work_until_killed(&mut rig, mirror, life);
        is_clean(&disk, round);
        rig.serve();
        mirror.reopen();
        mirror.verify();
    }
    let shortened = rig.log().matches(DONE).count();
    println!(
        "{test}: {round} kills, {} MiB changed, {shortened} compactions to the end, {} MiB long",
        mirror.changed() >> 20,
        length(&disk) >> 20
    );
    assert!(
        shortened > 0,
        "no compaction ran to its end:\n{}",
        rig.log()
    );
    let expected = mirror.expected_path().to_owned();
    drop(mirror);
    rig.unmount();
    if !child {
        judge(&rig, "guest", &expected);
    }
}

/// Makes the disk `guest` over a parent that has data, which is left served by nobody.
pub(crate) fn make_child(rig: &mut Rig, maker: Maker, size: &str, seed: u64) {
    let (base, disk) = (rig.disk("base"), rig.disk("guest"));
    (maker.make)(size, &base);
    rig.serve();
    let mut mirror = Mirror::new(&rig.raw("base"), &rig.path("base.raw"), seed);
    mirror.work(60).expect("the disk takes it");
    drop(mirror);
    rig.unmount();
    let words = ["create", "--type", "differencing", "--parent"].map(OsStr::new);
    run(
        VHDFS,
        words
            .into_iter()
            .chain([base.as_os_str(), disk.as_os_str()]),
    );
}

/// The guest writes in bursts and rests between them, until its disk is gone.
fn work_until_killed(rig: &mut Rig, mut mirror: Mirror, life: Duration) -> Mirror {
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            loop {
                let burst = 1 + usize::from(mirror.next().to_le_bytes()[0] % 8);
                if mirror.work(burst).is_err() {
                    return mirror;
                }
                std::thread::sleep(Duration::from_millis(mirror.next() % 60));
            }
        });
        std::thread::sleep(life);
        rig.crash();
        writer.join().expect("the writer only stops")
    })
}

/// What the daemon left is sound before anybody put anything right.
pub(crate) fn is_clean(disk: &Path, round: u64) {
    let found = report(&["check"], disk);
    assert_eq!(
        found["errors"],
        serde_json::json!([]),
        "round {round}: {found}"
    );
}
