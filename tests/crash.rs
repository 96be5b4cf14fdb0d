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

use support::guest::Guest;
use support::image::{Image, Style, TABLE_AT};
use support::life::{BLOCK, Life, build, disk};
use support::scenarios;
use support::sweep::{Meanwhile, Tally, sweep, sweep_with};
use support::{env_number, soak};
use vhdfs::storage::sim::{Change, OpKind, SimStorage};

/// States that a scenario tries if nothing else is said, and those of a random life, of which there
/// may be more instead.
const STATES: u64 = 2500;
const STATES_OF_LIFE: u64 = STATES / 10;

fn states() -> u64 {
    STATES * soak()
}

fn run(name: &str, style: Style, blocks: &[u64], scenario: impl FnOnce(&mut Guest)) {
    let (storage, oracle) = disk(style, blocks);
    sweep(name, states(), storage, oracle, scenario).print(name);
}

#[test]
fn allocation_at_the_end() {
    run("allocation at the end", Style::Aligned, &[1], |guest| {
        scenarios::allocate_at_the_end(guest, BLOCK)
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
        |guest| scenarios::allocate_from_holes(guest, BLOCK),
    );
}

#[test]
fn overwriting() {
    run("overwriting", Style::Aligned, &[0, 3], |guest| {
        scenarios::overwrite(guest, BLOCK)
    });
}

#[test]
fn discarding() {
    run("discarding", Style::Gapped, &[4, 1, 2, 0], |guest| {
        scenarios::discard(guest, BLOCK)
    });
}

#[test]
fn writing_zeros() {
    run("writing zeros", Style::Aligned, &[0, 1, 2], |guest| {
        scenarios::write_zeros(guest, BLOCK)
    });
}

#[test]
fn dropping_blocks() {
    run("dropping blocks", Style::Packed, &[0, 1, 2, 3], |guest| {
        scenarios::drop_blocks(guest, BLOCK)
    });
}

#[test]
fn moving_a_block() {
    run("moving a block", Style::Aligned, &[5, 0, 7], |guest| {
        scenarios::move_a_block(guest, BLOCK)
    });
}

#[test]
fn chains_of_moves() {
    for style in [Style::Packed, Style::Gapped] {
        let name = format!("chain of moves, {style:?}");
        run(&name, style, &[7, 6, 5, 4, 3, 2], |guest| {
            scenarios::chain_of_moves(guest, BLOCK)
        });
    }
}

#[test]
fn idle_work_between_writes() {
    run(
        "idle work between writes",
        Style::Xen,
        &[3, 1, 2, 0, 6],
        |guest| scenarios::idle_between_writes(guest, BLOCK),
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
        let states = states() / 3;
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
    let tally = sweep_with(name, states(), storage, oracle, Some(meanwhile), |guest| {
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
        |guest| scenarios::shrink_and_close(guest, BLOCK),
    );
}

/// Blocks of which only some sectors are in the file, by their bitmaps.
#[test]
fn partly_written_blocks() {
    let mut image = Image::new(BLOCK, 8 * BLOCK, Style::Packed, &[3, 0, 1, 2]);
    image.exact = true;
    let (storage, oracle) = build(&image);
    let name = "partly written blocks";
    let tally = sweep(name, states(), storage, oracle, |guest| {
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

/// What was punched of them and is not durable reads as zeros, and must not be uncovered.
#[test]
fn partly_written_blocks_that_were_punched() {
    for punched in [1, 2, 3] {
        let mut image = Image::new(BLOCK, 8 * BLOCK, Style::Packed, &[3, 0, 1, 2]);
        image.exact = true;
        let (storage, oracle) = build(&image);
        let name = format!("partly written blocks, punched by {punched}");
        let tally = sweep(&name, states(), storage, oracle, |guest| {
            match punched {
                1 => guest.compact(),
                2 => {
                    let mut work = guest.idle_work();
                    guest.idle(&mut work, 3);
                }
                _ => guest.discard(BLOCK + BLOCK / 2, BLOCK / 4),
            }
            guest.write(BLOCK + BLOCK / 2 + 4096, 512);
            guest.reopen();
            guest.write(4096, 512);
            guest.flush();
        });
        tally.print(&name);
    }
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
        let tally = sweep(&name, states() / 20, storage, oracle, |guest| {
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
            let tally = sweep(&name, states() / 4, storage, oracle, |guest| {
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
    let (storage, oracle) = life.start();
    let name = format!("random life {seed:#x}");
    sweep(&name, STATES_OF_LIFE, storage, oracle, |guest| {
        life.live(guest)
    })
}

fn random_lives(part: u64) {
    let seed = env_number("VHDFS_SEED", 1);
    let mut tally = Tally::default();
    for n in 0..40 * soak() {
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
