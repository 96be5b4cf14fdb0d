//! After the program `fsx`: several threads read, write, zero and discard at random, most of it small, on one disk whose
//! blocks they share, and compare each read, while compaction runs and the daemon is killed every now and then.
//!
//! `scripts/soak fsx` is the long form: a million operations and more on each kind of disk. What a thread does follows from
//! `VHDFS_SEED`.

use std::time::{Duration, Instant};

use super::kills::{is_clean, make_child, number_of};
use super::mirror::Mirror;
use super::rig::{Rig, length, obstacle, report, say_skipped};
use super::{Maker, VHD_OF_OURS, VHDX_OF_4096, VHDX_OF_OURS, judge};

const SIZE: &str = "32M";
const LENGTH: u64 = 32 << 20;
/// Operations on each kind of disk, times `VHDFS_SOAK`.
const OPERATIONS: u64 = 2000;
/// The daemon is killed in each so many-th spurt of work.
const KILL_EACH: u64 = 3;
/// A small share makes a move last, and many changes fall into it. What is compared byte by byte must not lose what a file
/// system calls free.
const OPTIONS: &[&str] = &["--busy-share", "10", "--fs-aware", "off"];
/// Where a part of the disk ends and the next one begins: in the middle of a block, of a sector, on a page, and anywhere.
const BORDERS: [u64; 3] = [(9 << 20) + 256, 15 << 20, (23 << 20) + 12_345];

#[derive(PartialEq)]
enum Kind {
    Plain,
    LargeSectors,
    Child,
}

#[test]
fn fsx_on_a_vhd() {
    exercised("fsx_on_a_vhd", VHD_OF_OURS, Kind::Plain);
}

#[test]
fn fsx_on_a_vhdx() {
    exercised("fsx_on_a_vhdx", VHDX_OF_OURS, Kind::Plain);
}

#[test]
fn fsx_on_a_vhdx_with_large_sectors() {
    exercised(
        "fsx_on_a_vhdx_with_large_sectors",
        VHDX_OF_4096,
        Kind::LargeSectors,
    );
}

#[test]
fn fsx_on_a_child_vhd() {
    exercised("fsx_on_a_child_vhd", VHD_OF_OURS, Kind::Child);
}

#[test]
fn fsx_on_a_child_vhdx() {
    exercised("fsx_on_a_child_vhdx", VHDX_OF_OURS, Kind::Child);
}

fn exercised(test: &str, maker: Maker, kind: Kind) {
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    let mut rig = Rig::new(maker.extension);
    rig.idle_after = "10ms";
    let disk = rig.disk("guest");
    let seed = number_of("VHDFS_SEED", 1).max(1);
    if kind == Kind::Child {
        make_child(&mut rig, maker, SIZE, seed + 77);
    } else {
        (maker.make)(SIZE, &disk);
    }
    rig.serve_with(OPTIONS);
    let (raw, twin) = (rig.raw("guest"), rig.path("guest.raw"));
    Mirror::new(&raw, &twin, seed).learn();
    let bounds = [&[0], &BORDERS[..], &[LENGTH]].concat();
    let mut mirrors: Vec<Mirror> = (bounds.windows(2).zip(seed..))
        .map(|(part, seed)| {
            let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Mirror::of_part(&raw, &twin, part[0]..part[1], seed)
        })
        .collect();
    let started = Instant::now();
    let wanted = OPERATIONS * number_of("VHDFS_SOAK", 1);
    let (mut kills, mut done) = (0, 0);
    for number in 1_u64.. {
        let kill = number.is_multiple_of(KILL_EACH);
        let life = Duration::from_millis(mirrors[0].next() % 300);
        spurt(&mut rig, &mut mirrors, kill.then_some(life));
        if kill {
            kills += 1;
            is_clean(&disk, kills);
            rig.serve_with(OPTIONS);
            mirrors.iter_mut().for_each(Mirror::reopen);
            mirrors.iter().for_each(Mirror::verify);
        }
        done = mirrors.iter().map(Mirror::done).sum();
        if done >= wanted {
            break;
        }
        // Idle disks are compacted at another pace than those in use.
        std::thread::sleep(Duration::from_millis(mirrors[0].next() % 40));
    }
    mirrors.iter().for_each(Mirror::verify);
    drop(mirrors);
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{test}: {done} operations in {seconds:.1} s, {kills} kills, {} compactions to the end, {} MiB long",
        rig.log().matches(": compacted").count(),
        length(&disk) >> 20
    );
    rig.unmount();
    is_clean(&disk, kills);
    if kind == Kind::Plain {
        judge(&rig, "guest", &twin);
        return;
    }
    // QEMU reads neither.
    report(&["compact", "--no-fs-aware"], &disk);
    is_clean(&disk, kills);
    rig.serve_with(OPTIONS);
    Mirror::of_part(&raw, &twin, 0..LENGTH, seed).verify();
}

/// Some hundred operations by each thread; or, where the daemon is to be killed after so long, until it is dead.
fn spurt(rig: &mut Rig, mirrors: &mut [Mirror], kill_after: Option<Duration>) {
    let pause =
        Duration::from_millis([0, 0, 1, 3][usize::from(mirrors[0].next().to_le_bytes()[0] % 4)]);
    std::thread::scope(|scope| {
        let works: Vec<_> = (mirrors.iter_mut())
            .map(|mirror| {
                scope.spawn(move || {
                    let count = 50 + usize::from(mirror.next().to_le_bytes()[0]);
                    match kill_after {
                        Some(_) => while mirror.exercise(count, pause).is_ok() {},
                        None => mirror.exercise(count, pause).expect("the disk takes it"),
                    }
                })
            })
            .collect();
        if let Some(life) = kill_after {
            std::thread::sleep(life);
            rig.crash();
        }
        let ends: Vec<_> = works.into_iter().map(|work| work.join()).collect();
        assert!(
            ends.iter().all(Result::is_ok),
            "the daemon said:\n{}",
            rig.log()
        );
    });
}
