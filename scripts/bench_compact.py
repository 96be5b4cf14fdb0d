"""`vhdfs compact` on a half-dead disk, beside `qemu-img convert` and beside the bare I/O it cannot do without."""

import json
import os
import random
import struct
import time
from typing import NamedTuple

from bench_mount import vhdfs_binary
from bench_tools import (
    MIB, drop_caches, fail, figure, median, progress, ratio, read_data, run, sync_file, table, timed_run, device_traffic,
)  # fmt: skip

BLOCK = 2 * MIB
BITMAP = 512
SLOT = BITMAP + BLOCK


class Case(NamedTuple):
    """How the dead half is recorded in the file, and where it lies."""

    name: str
    bits: bool  # bits of dead sectors are set in their bitmap, as of sectors that were written
    hole: bool  # the host file has a hole there
    tail: bool  # dead blocks are the last ones of the file: nothing has to move
    vhdx: bool = False

    def format(self):
        """What QEMU calls the format, and the options for a dynamic disk of it."""
        if self.vhdx:
            return "vhdx", f"subformat=dynamic,block_size={BLOCK}"
        return "vpc", "subformat=dynamic,force_size=on"

    def slot(self):
        return BLOCK if self.vhdx else SLOT


CASES = [
    Case("known from bitmaps, at the end", bits=False, hole=False, tail=True),
    Case("known from bitmaps, scattered", bits=False, hole=False, tail=False),
    Case("known from host holes, scattered", bits=True, hole=True, tail=False),
    Case("zeros to be found, at the end", bits=True, hole=False, tail=True),
    Case("zeros to be found, scattered", bits=True, hole=False, tail=False),
    Case("VHDX, known from host holes, scattered", bits=True, hole=True, tail=False, vhdx=True),
    Case("VHDX, zeros to be found, at the end", bits=True, hole=False, tail=True, vhdx=True),
    Case("VHDX, zeros to be found, scattered", bits=True, hole=False, tail=False, vhdx=True),
]


class Outcome(NamedTuple):
    """One round of one case: seconds, and bytes where it says so."""

    compact: float
    convert: float
    bare: float
    moved_bytes: int
    written_bytes: int
    length_before: int
    length_after: int
    converted_length: int


def make_disk(path, blocks, case):
    """A dynamic disk as qemu-img lays it out, every block allocated, every second one dead."""
    driver, options = case.format()
    run("qemu-img", "create", "-q", "-f", driver, "-o", options, path, blocks * BLOCK)
    order = list(range(blocks))
    random.Random(1).shuffle(order)
    dead = set(range(blocks // 2, blocks)) if case.tail else set(order[: blocks // 2])
    with open(path, "r+b") as file:
        if case.vhdx:
            fill_vhdx(file, blocks, dead, case)
        else:
            fill_vhd(file, blocks, dead, case)
    sync_file(path)


def fill_vhd(file, blocks, dead, case):
    noise = bytearray(os.urandom(BLOCK))
    footer = file.read(512)
    file.seek(512 + 16)
    (bat_offset,) = struct.unpack(">Q", file.read(8))
    end = file.seek(0, os.SEEK_END) - 512
    file.seek(bat_offset)
    file.write(b"".join(struct.pack(">I", (end + index * SLOT) // 512) for index in range(blocks)))
    for index in range(blocks):
        live = index not in dead
        file.seek(end + index * SLOT)
        file.write((b"\xff" if live or case.bits else b"\0") * BITMAP)
        if live:
            struct.pack_into(">Q", noise, 0, index + 1)
            file.write(noise)
        elif not case.hole:
            file.write(bytes(BLOCK))
    file.seek(end + blocks * SLOT)
    file.write(footer)


def fill_vhdx(file, blocks, dead, case):
    """The log of a file that qemu-img made is empty, so that its block table may be written in place."""
    noise = bytearray(os.urandom(BLOCK))
    bat = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")
    file.seek(192 << 10)
    regions = file.read(64 << 10)
    (bat_offset,) = struct.unpack_from("<Q", regions, regions.index(bat) + 16)
    end = -(-file.seek(0, os.SEEK_END) // MIB) * MIB
    chunk = (1 << 23) * 512 // BLOCK
    for index in range(blocks):
        file.seek(bat_offset + (index + index // chunk) * 8)
        file.write(struct.pack("<Q", end + index * BLOCK | 6))
    for index in range(blocks):
        file.seek(end + index * BLOCK)
        if index not in dead:
            struct.pack_into(">Q", noise, 0, index + 1)
            file.write(noise)
        elif not case.hole:
            file.write(bytes(BLOCK))
    file.truncate(end + blocks * BLOCK)


def bare_write(path, length):
    """Seconds for writing `length` bytes and making them durable: the least that moving them costs."""
    noise = os.urandom(MIB)
    started = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for offset in range(0, length, MIB):
            file.write(noise[: min(MIB, length - offset)])
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return seconds


def timed_read(path):
    started = time.monotonic()
    read_data(path)
    return time.monotonic() - started


def measure(case, place, blocks, compare):
    driver, options = case.format()
    extension = "vhdx" if case.vhdx else "vhd"
    disk, copy, scratch = place / f"half-dead.{extension}", place / f"converted.{extension}", place / "scratch"
    make_disk(disk, blocks, case)

    drop_caches()
    read_seconds = timed_read(disk)

    drop_caches()
    started = time.monotonic()
    run("qemu-img", "convert", "-f", driver, "-O", driver, "-o", options, disk, copy)
    sync_file(copy)
    convert = time.monotonic() - started
    converted_length = copy.stat().st_size

    drop_caches()
    before = device_traffic(disk)
    compact, printed = timed_run(vhdfs_binary(), "compact", "--json", disk)
    os.sync()
    written = None if before is None else device_traffic(disk)[1] - before[1]
    report = json.loads(printed)
    report = report[0] if isinstance(report, list) else report
    if compare:
        run("qemu-img", "compare", "-f", driver, "-F", driver, disk, copy)

    moved = report["blocks_moved"] * case.slot()
    bare = read_seconds + bare_write(scratch, moved)
    for path in (disk, copy):
        path.unlink()
    return Outcome(
        compact=compact,
        convert=convert,
        bare=bare,
        moved_bytes=moved,
        written_bytes=written,
        length_before=report["length_before"],
        length_after=report["length_after"],
        converted_length=converted_length,
    )


def bench(place, size, rounds):
    """Returns the table as text."""
    if not drop_caches():
        fail("the offline part needs root: without it the caches cannot be emptied")
    outcomes = {case: [] for case in CASES}
    for number in range(1, rounds + 1):
        for case in CASES:
            progress(f"round {number} of {rounds}: compaction of a half-dead disk, {case.name}")
            outcomes[case].append(measure(case, place, size // BLOCK, compare=number == 1))
    progress("")
    return render(outcomes, size)


def render(outcomes, size):
    header = [
        f"compaction, {size / 1024 / MIB:.3g} GiB", "vhdfs, s", "convert, s", "bare I/O, s", "convert / vhdfs",
        "vhdfs / bare I/O", "moved, MiB", "written, MiB", "length before, MiB", "after", "converted",
    ]  # fmt: skip
    rows = []
    for case, rounds in outcomes.items():
        compact, convert, bare, moved, written, before, after, converted = zip(*rounds)
        # Whatever else writes to the device can only add to the count.
        least = None if None in written else min(written)
        mebibytes = [
            figure(value and value / MIB)
            for value in (median(moved), least, median(before), median(after), median(converted))
        ]
        rows.append([
            case.name, figure(median(compact)), figure(median(convert)), figure(median(bare)),
            figure(ratio(convert, compact)), figure(ratio(compact, bare)), *mebibytes,
        ])  # fmt: skip
    return table(header, rows)
