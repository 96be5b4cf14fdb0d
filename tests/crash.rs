//! Power cuts and deaths of the process at every moment of all that changes a file.
//!
//! Each scenario runs once on the simulated host. Before each of its changing operations the state of
//! the host is kept; then, for each of those, the states that a power cut there could leave are built
//! (all, where few changes are outstanding; else the extremes, each single change lost or kept alone,
//! and random subsets with torn sectors), opened, and compared with what the guest may expect.
//! `VHDFS_SOAK=n` tries n times as many, `VHDFS_SEED=n` others.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::time::Duration;

use support::env_number;
use support::guest::Guest;
use support::image::{Image, Style, TABLE_AT};
use support::life::{BLOCK, Life, build, disk};
use support::sweep::{Meanwhile, Tally, sweep, sweep_with};
use vhdfs::storage::sim::{Change, OpKind, SimStorage};

const KIB: u64 = 1 << 10;

/// States that a scenario tries if nothing else is said.
const STATES: u64 = 2500;

fn run(name: &str, style: Style, blocks: &[u64], scenario: impl FnOnce(&mut Guest)) {
    let (storage, oracle) = disk(style, blocks);
    sweep(name, STATES, storage, oracle, scenario).print(name);
}

#[test]
fn allocation_at_the_end() {
    run("allocation at the end", Style::Aligned, &[1], |guest| {
        guest.write(0, 4 * KIB);
        guest.write(3 * BLOCK + 100, 1000);
        guest.flush();
        guest.write(3 * BLOCK + 4096, BLOCK / 8);
        guest.write(5 * BLOCK - 512, 1024);
        guest.write(0, 512);
        guest.flush();
        guest.write(7 * BLOCK, BLOCK);
    });
}

#[test]
fn growth_of_foreign_layouts() {
    for style in [Style::Packed, Style::Xen] {
        run(&format!("growth, {style:?}"), style, &[2, 0], |guest| {
            for block in [4, 5, 6] {
                guest.write(block * BLOCK + 3 * 512, 2000);
                guest.flush();
            }
            guest.write(4 * BLOCK, BLOCK);
            guest.flush();
        });
    }
}

#[test]
fn allocation_from_recycled_holes() {
    run(
        "allocation from recycled holes",
        Style::Packed,
        &[0, 1, 2, 3, 4],
        |guest| {
            guest.discard(BLOCK, 2 * BLOCK);
            guest.flush();
            guest.write(6 * BLOCK + 512, 3 * 512);
            guest.write(7 * BLOCK, 8 * KIB);
            guest.flush();
            // Freed and needed again with no flush between.
            guest.discard(0, BLOCK);
            guest.write(2 * BLOCK, 1024);
            guest.write(BLOCK + BLOCK / 2, 1024);
            guest.flush();
        },
    );
}

#[test]
fn overwriting() {
    run("overwriting", Style::Aligned, &[0, 3], |guest| {
        guest.write(0, 4 * KIB);
        guest.write(1000, 1000);
        guest.flush();
        guest.write(300, 20);
        guest.write(3 * BLOCK, BLOCK / 8);
        guest.write(3 * BLOCK + 512, 512);
        guest.flush();
        guest.write(BLOCK - 700, 1400);
        guest.write(3 * BLOCK + BLOCK / 2, BLOCK / 2);
    });
}

#[test]
fn discarding() {
    run("discarding", Style::Gapped, &[4, 1, 2, 0], |guest| {
        guest.discard(BLOCK, BLOCK);
        guest.discard(100, 5000);
        guest.flush();
        guest.write(100, 200);
        guest.discard(4 * BLOCK + 4096, BLOCK / 4);
        guest.write(4 * BLOCK + 8192, 512);
        guest.flush();
        guest.discard(2 * BLOCK + 512, BLOCK - 512);
        guest.discard(2 * BLOCK, 512);
        guest.write(BLOCK + 512, 512);
        guest.discard(0, 8 * BLOCK);
        guest.flush();
    });
}

#[test]
fn writing_zeros() {
    run("writing zeros", Style::Aligned, &[0, 1, 2], |guest| {
        guest.write_zero_bytes(0, BLOCK);
        guest.write_zeroes(BLOCK, 3 * KIB);
        guest.flush();
        guest.write_zeroes(BLOCK, BLOCK);
        guest.write_zero_bytes(6 * BLOCK, BLOCK / 8);
        guest.write(4 * KIB, 4 * KIB);
        guest.flush();
        guest.write_zero_bytes(2 * BLOCK, BLOCK / 2);
        guest.write(2 * BLOCK, 512);
    });
}

#[test]
fn dropping_blocks() {
    run("dropping blocks", Style::Packed, &[0, 1, 2, 3], |guest| {
        guest.write_zero_bytes(3 * BLOCK, BLOCK);
        guest.write_zero_bytes(0, BLOCK);
        guest.flush();
        guest.compact();
        guest.write(3 * BLOCK, 512);
        guest.write(0, 512);
        guest.flush();
    });
}

#[test]
fn moving_a_block() {
    run("moving a block", Style::Aligned, &[5, 0, 7], |guest| {
        guest.discard(0, BLOCK);
        guest.write(7 * BLOCK + (BLOCK / 2 + 4096), 512);
        guest.compact();
        guest.write(7 * BLOCK, 1024);
        guest.write(0, 1024);
        guest.flush();
    });
}

#[test]
fn chains_of_moves() {
    for style in [Style::Packed, Style::Gapped] {
        run(
            &format!("chain of moves, {style:?}"),
            style,
            &[7, 6, 5, 4, 3, 2],
            |guest| {
                guest.discard(7 * BLOCK, BLOCK);
                guest.discard(5 * BLOCK, BLOCK);
                guest.compact();
                guest.discard(6 * BLOCK, BLOCK);
                guest.write(2 * BLOCK, 512);
                guest.compact();
                guest.write(0, 512);
                guest.flush();
            },
        );
    }
}

#[test]
fn idle_work_between_writes() {
    run(
        "idle work between writes",
        Style::Xen,
        &[3, 1, 2, 0, 6],
        |guest| {
            let mut work = guest.idle_work();
            guest.discard(3 * BLOCK, BLOCK);
            guest.write_zero_bytes(BLOCK, BLOCK);
            for round in 0..40 {
                guest.idle(&mut work, 1);
                if round % 5 == 0 {
                    guest.write((round % 8) * BLOCK + round * 512, 700);
                }
                if round % 11 == 0 {
                    guest.discard((round % 7) * BLOCK, BLOCK);
                }
                if round % 7 == 0 {
                    guest.flush();
                }
            }
            guest.flush();
        },
    );
}

#[test]
fn writing_while_blocks_move() {
    run(
        "writing while blocks move",
        Style::Packed,
        &[0, 1, 2, 3, 4, 5],
        |guest| {
            guest.discard(0, 2 * BLOCK);
            let done = std::sync::atomic::AtomicBool::new(false);
            let guest = &*guest;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for round in 0.. {
                        guest.write((2 + round % 4) * BLOCK + round % 700 * 512, 1024);
                        if round % 3 == 0 {
                            guest.flush();
                        }
                        if round > 20 && done.load(std::sync::atomic::Ordering::Relaxed)
                            || round > 60
                        {
                            break;
                        }
                    }
                });
                guest.compact();
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            });
        },
    );
}

/// New blocks are asked for while a table that no longer names the old slots is being synced.
#[test]
fn allocating_while_blocks_move() {
    for freed in 0..3 {
        let (storage, oracle) = disk(Style::Aligned, &[0, 1, 2, 3, 4]);
        let name = "allocating while blocks move";
        let (go, gone) = std::sync::mpsc::sync_channel(1);
        let meanwhile: Meanwhile = Box::new(move |storage| {
            let in_table = |change: &Change| change.range.start.get() == TABLE_AT;
            if storage.unsynced().iter().any(in_table) {
                // Full where the guest is already at it.
                let _ = go.try_send(());
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let states = STATES / 3;
        let tally = sweep_with(name, states, storage, oracle, Some(meanwhile), |guest| {
            guest.discard(freed * BLOCK, BLOCK);
            guest.flush();
            while gone.try_recv().is_ok() {}
            let guest = &*guest;
            std::thread::scope(|scope| {
                scope.spawn(|| guest.compact());
                for block in [5, 6] {
                    // Without a signal there was no move, which is fine too.
                    let _ = gone.recv_timeout(Duration::from_millis(300));
                    guest.write(block * BLOCK + 512, 1024);
                }
            });
            guest.flush();
        });
        tally.print(name);
    }
}

/// The guest writes to a block between its copy and its new table entry.
#[test]
fn writing_to_a_block_that_was_just_copied() {
    let (storage, oracle) = disk(Style::Aligned, &[0, 1, 2, 3]);
    let name = "writing to a block that was just copied";
    let (go, gone) = std::sync::mpsc::sync_channel(1);
    let meanwhile: Meanwhile = Box::new(move |storage| {
        let copied = |change: &Change| change.kind == OpKind::CopyWithin;
        if storage.unsynced().iter().any(copied) {
            let _ = go.try_send(());
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let tally = sweep_with(name, STATES, storage, oracle, Some(meanwhile), |guest| {
        for block in 1..4 {
            guest.write(block * BLOCK, 512);
        }
        guest.discard(0, BLOCK);
        guest.flush();
        let guest = &*guest;
        for round in 1..4 {
            std::thread::scope(|scope| {
                scope.spawn(|| guest.compact());
                if gone.recv_timeout(Duration::from_millis(300)).is_ok() {
                    for block in 1..4 {
                        guest.write(block * BLOCK + round * 1024, 512);
                    }
                }
            });
            guest.flush();
        }
    });
    tally.print(name);
}

#[test]
fn shrinking_and_closing() {
    run(
        "shrinking and closing",
        Style::Aligned,
        &[0, 1, 2, 3],
        |guest| {
            guest.write(5 * BLOCK, 512);
            guest.discard(2 * BLOCK, 6 * BLOCK);
            guest.reopen();
            guest.write(7 * BLOCK, 512);
            guest.reopen();
            guest.discard(0, 8 * BLOCK);
            guest.close();
        },
    );
}

/// Blocks of which only some sectors are in the file, by their bitmaps.
#[test]
fn partly_written_blocks() {
    let mut image = Image::new(BLOCK, 8 * BLOCK, Style::Packed, &[3, 0, 1, 2]);
    image.exact = true;
    let (storage, oracle) = build(&image);
    let name = "partly written blocks";
    let tally = sweep(name, STATES, storage, oracle, |guest| {
        guest.write(BLOCK / 2 + 512, 512);
        guest.discard(3 * BLOCK, BLOCK);
        guest.discard(BLOCK + 512, 1024);
        guest.flush();
        guest.write(BLOCK - 100, 200);
        guest.compact();
        guest.write_zeroes(2 * BLOCK, BLOCK / 2);
        guest.write(2 * BLOCK + BLOCK / 2, 512);
        guest.flush();
    });
    tally.print(name);
}

/// A sector bitmap of two sectors, which tear.
#[test]
fn large_blocks() {
    let block_size = 4 << 20;
    for exact in [false, true] {
        let mut image = Image::new(block_size, 3 * block_size, Style::Aligned, &[1]);
        image.exact = exact;
        let (storage, oracle) = build(&image);
        let name = format!("large blocks, exact bitmaps: {exact}");
        let tally = sweep(&name, STATES / 20, storage, oracle, |guest| {
            guest.write(block_size / 2, 1024);
            guest.write(block_size - 512, 1024);
            guest.flush();
            guest.write(2 * block_size - 512, 1024);
            guest.discard(block_size, block_size);
            guest.flush();
        });
        tally.print(&name);
    }
}

/// Files that a cut left in the middle of growing and shrinking, cut again while they are opened.
#[test]
fn repairing_while_opening() {
    use vhdfs::storage::Storage as _;
    use vhdfs::units::FileOffset;
    type Damage = (&'static str, fn(&SimStorage));
    let damages: [Damage; 4] = [
        ("longer without a footer", |file| {
            file.set_len(file.len().unwrap() + 3 * BLOCK).unwrap()
        }),
        ("footer lost", |file| {
            file.set_len(file.len().unwrap() - 512).unwrap()
        }),
        ("footer overwritten", |file| {
            let end = file.len().unwrap();
            file.write_all_at(&[0x5a; 512], FileOffset::new(end - 512))
                .unwrap();
        }),
        ("leaked tail with a footer", |file| {
            let end = file.len().unwrap();
            let mut footer = [0; 512];
            file.read_exact_at(&mut footer, FileOffset::new(0)).unwrap();
            file.write_all_at(&[0x11; 4096], FileOffset::new(end))
                .unwrap();
            file.write_all_at(&footer, FileOffset::new(end + 2 * BLOCK - 512))
                .unwrap();
        }),
    ];
    for (name, damage) in damages {
        for style in [Style::Packed, Style::Aligned] {
            let (storage, oracle) = disk(style, &[1, 0, 3]);
            damage(&storage);
            storage.sync().unwrap();
            let name = format!("{name}, {style:?}");
            let tally = sweep(&name, STATES / 4, storage, oracle, |guest| {
                guest.write(0, 512);
                guest.write(6 * BLOCK, 512);
                guest.flush();
            });
            tally.print(&name);
        }
    }
}

/// Anything after anything else, on any layout.
fn random_life(seed: u64) -> Tally {
    let life = Life::new(seed);
    let (storage, oracle) = build(&life.image);
    let name = format!("random life {seed:#x}");
    sweep(&name, STATES / 10, storage, oracle, |guest| {
        life.live(guest)
    })
}

fn random_lives(part: u64) {
    let seed = env_number("VHDFS_SEED", 1);
    let mut tally = Tally::default();
    for n in 0..40 * env_number("VHDFS_SOAK", 1) {
        tally.add(random_life(seed << 32 | part << 16 | n));
    }
    tally.print(&format!("random lives, part {part}"));
}

// In parts, for the test runner to spread.

#[test]
fn random_lives_0() {
    random_lives(0);
}

#[test]
fn random_lives_1() {
    random_lives(1);
}
