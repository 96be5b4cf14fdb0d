//! What guests and compaction do to a disk of eight blocks of `block` bytes, whatever its format.

use super::guest::Guest;

const KIB: u64 = 1 << 10;

/// A scenario and its name.
pub(crate) type Scenario = (&'static str, fn(&mut Guest, u64));

/// All of them.
pub(crate) const ALL: [Scenario; 13] = [
    ("allocation at the end", allocate_at_the_end),
    ("allocation from recycled holes", allocate_from_holes),
    ("overwriting", overwrite),
    ("discarding", discard),
    ("writing zeros", write_zeros),
    ("dropping blocks", drop_blocks),
    ("moving a block", move_a_block),
    ("chain of moves", chain_of_moves),
    ("idle work between writes", idle_between_writes),
    ("shrinking and closing", shrink_and_close),
    ("punching inside of blocks", punch_inside_blocks),
    ("dying and going on", die_and_go_on),
    ("more changes than the log holds", fill_the_log),
];

pub(crate) fn allocate_at_the_end(guest: &mut Guest, block: u64) {
    guest.write(0, 4 * KIB);
    guest.write(3 * block + 100, 1000);
    guest.flush();
    guest.write(3 * block + 4096, block / 8);
    guest.write(5 * block - 512, 1024);
    guest.write(0, 512);
    guest.flush();
    guest.write(7 * block, block);
}

pub(crate) fn allocate_from_holes(guest: &mut Guest, block: u64) {
    guest.discard(block, 2 * block);
    guest.flush();
    guest.write(6 * block + 512, 3 * 512);
    guest.write(7 * block, 8 * KIB);
    guest.flush();
    // Freed and needed again with no flush between.
    guest.discard(0, block);
    guest.write(2 * block, 1024);
    guest.write(block + block / 2, 1024);
    guest.flush();
}

pub(crate) fn overwrite(guest: &mut Guest, block: u64) {
    guest.write(0, 4 * KIB);
    guest.write(1000, 1000);
    guest.flush();
    guest.write(300, 20);
    guest.write(3 * block, block / 8);
    guest.write(3 * block + 512, 512);
    guest.flush();
    guest.write(block - 700, 1400);
    guest.write(3 * block + block / 2, block / 2);
}

pub(crate) fn discard(guest: &mut Guest, block: u64) {
    guest.discard(block, block);
    guest.discard(100, 5000);
    guest.flush();
    guest.write(100, 200);
    guest.discard(4 * block + 4096, block / 4);
    guest.write(4 * block + 8192, 512);
    guest.flush();
    guest.discard(2 * block + 512, block - 512);
    guest.discard(2 * block, 512);
    guest.write(block + 512, 512);
    guest.discard(0, 8 * block);
    guest.flush();
}

pub(crate) fn write_zeros(guest: &mut Guest, block: u64) {
    guest.write_zero_bytes(0, block);
    guest.write_zeroes(block, 3 * KIB);
    guest.flush();
    guest.write_zeroes(block, block);
    guest.write_zero_bytes(6 * block, block / 8);
    guest.write(4 * KIB, 4 * KIB);
    guest.flush();
    guest.write_zero_bytes(2 * block, block / 2);
    guest.write(2 * block, 512);
}

pub(crate) fn drop_blocks(guest: &mut Guest, block: u64) {
    guest.write_zero_bytes(3 * block, block);
    guest.write_zero_bytes(0, block);
    guest.flush();
    guest.compact();
    guest.write(3 * block, 512);
    guest.write(0, 512);
    guest.flush();
}

pub(crate) fn move_a_block(guest: &mut Guest, block: u64) {
    guest.discard(0, block);
    guest.write(7 * block + (block / 2 + 4096), 512);
    guest.compact();
    guest.write(7 * block, 1024);
    guest.write(0, 1024);
    guest.flush();
}

pub(crate) fn chain_of_moves(guest: &mut Guest, block: u64) {
    guest.discard(7 * block, block);
    guest.discard(5 * block, block);
    guest.compact();
    guest.discard(6 * block, block);
    guest.write(2 * block, 512);
    guest.compact();
    guest.write(0, 512);
    guest.flush();
}

pub(crate) fn idle_between_writes(guest: &mut Guest, block: u64) {
    let mut work = guest.idle_work();
    guest.discard(3 * block, block);
    guest.write_zero_bytes(block, block);
    for round in 0..40 {
        guest.idle(&mut work, 1);
        if round % 5 == 0 {
            guest.write((round % 8) * block + round * 512, 700);
        }
        if round % 11 == 0 {
            guest.discard((round % 7) * block, block);
        }
        if round % 7 == 0 {
            guest.flush();
        }
    }
    guest.flush();
}

pub(crate) fn shrink_and_close(guest: &mut Guest, block: u64) {
    guest.write(5 * block, 512);
    guest.discard(2 * block, 6 * block);
    guest.reopen();
    guest.write(7 * block, 512);
    guest.reopen();
    guest.discard(0, 8 * block);
    guest.close();
}

/// Idle work gives back the granules that hold nothing, which the guest then writes to again.
pub(crate) fn punch_inside_blocks(guest: &mut Guest, block: u64) {
    for round in 0..3 {
        for number in [0, 2, 5] {
            let at = number * block + round * 8 * KIB;
            guest.write(at, 24 * KIB);
            guest.discard(at + 4 * KIB, 8 * KIB);
            guest.write_zero_bytes(at + 16 * KIB, 4 * KIB + 512);
        }
        if round != 1 {
            guest.flush();
        }
        let mut work = guest.idle_work();
        guest.idle(&mut work, 12);
        guest.write(round * 8 * KIB + 5 * KIB, 700);
        guest.write(5 * block + round * 8 * KIB + 17 * KIB, 512);
        guest.flush();
    }
}

/// Each process leaves changes in its log, or in the air, for the next to find; each change of owner
/// is one of the headers.
pub(crate) fn die_and_go_on(guest: &mut Guest, block: u64) {
    for round in 0..4 {
        guest.discard((1 + round) * block, block);
        guest.write((6 - round) * block + 512, 3 * KIB);
        if round % 2 == 0 {
            guest.flush();
        }
        guest.write(round * block + 9 * KIB, KIB);
        guest.die();
        guest.write(round * block, 512);
        if round == 2 {
            guest.compact();
        }
    }
    guest.reopen();
    guest.write(7 * block, 512);
    guest.flush();
}

/// The smallest log of a VHDX holds about 128 changes of its table.
pub(crate) fn fill_the_log(guest: &mut Guest, block: u64) {
    for round in 0..75 {
        let at = round % 8 * block;
        guest.discard(at, block);
        guest.write(at + 512, 512);
        if round % 9 == 8 {
            guest.flush();
        }
    }
    guest.flush();
}
