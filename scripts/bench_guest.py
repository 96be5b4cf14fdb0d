"""`vhdfs compact` of a disk half of whose files were deleted without a trim, beside what else gets such a disk small."""

import json
import os
import random
import shutil
import time
from contextlib import contextmanager
from typing import NamedTuple

from bench_mount import vhdfs_binary
from bench_tools import (
    MIB, device_traffic, drop_caches, fail, figure, median, progress, ratio, run, sync_file, table,
)  # fmt: skip


class Guest(NamedTuple):
    """A file system: how it is made, mounted and checked."""

    name: str
    make: list
    mount: list
    check: list


GUESTS = [
    Guest("ext4", ["mkfs.ext4", "-q", "-F"], ["mount", "-o", "loop"], ["e2fsck", "-fn"]),
    Guest("XFS", ["mkfs.xfs", "-q", "-f"], ["mount", "-o", "loop"], ["xfs_repair", "-n", "-f"]),
    Guest("btrfs", ["mkfs.btrfs", "-q", "-f"], ["mount", "-o", "loop"], ["btrfs", "check", "--readonly"]),
    Guest("NTFS", ["mkntfs", "-q", "-Q", "-F"], ["ntfs-3g"], ["ntfsfix", "-n"]),
]


class Outcome(NamedTuple):
    """One way to get one disk small: seconds, and bytes."""

    seconds: float
    read: int
    written: int
    extra: int
    length: int


@contextmanager
def mounted(guest, image, folder):
    folder.mkdir(exist_ok=True)
    run(*guest.mount, image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)
        if guest.mount[0] == "ntfs-3g":
            # It goes on for a moment after the unmount.
            time.sleep(1)


def make_disk(guest, place, size):
    """A VHDX with files in two fifths of it, of which every second one was deleted, and its raw length."""
    raw, disk = place / "guest.raw", place / "guest.vhdx"
    with open(raw, "wb") as file:
        file.truncate(size)
    run(*guest.make, raw)
    noise = os.urandom(8 * MIB)
    sizes = random.Random(1)
    with mounted(guest, raw, place / "files") as folder:
        written, names = 0, []
        while written < size * 2 // 5:
            length = sizes.choice([16 << 10, 256 << 10, MIB, 8 * MIB, 64 * MIB])
            name = folder / f"file{len(names)}"
            with open(name, "wb", buffering=0) as file:
                for at in range(0, length, len(noise)):
                    file.write(noise[: min(len(noise), length - at)])
            names.append(name)
            written += length
        run("sync", "-f", folder)
        for name in names[::2]:
            name.unlink()
    run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", "subformat=dynamic,block_size=2M", raw, disk)
    raw.unlink()
    sync_file(disk)
    return disk


def timed(path, work):
    """Seconds that `work` takes with cold caches, and bytes that the device read and wrote."""
    drop_caches()
    before = device_traffic(path)
    started = time.monotonic()
    work()
    seconds = time.monotonic() - started
    os.sync()
    if before is None:
        return seconds, None, None
    after = device_traffic(path)
    return seconds, after[0] - before[0], after[1] - before[1]


def stored(*paths):
    return sum(path.stat().st_blocks * 512 for path in paths)


def by_vhdfs(guest, disk, place):
    copy = place / "compacted.vhdx"
    shutil.copyfile(disk, copy)
    sync_file(copy)
    before, report = stored(copy), []
    seconds, read, written = timed(copy, lambda: report.append(json.loads(run(vhdfs_binary(), "compact", "--json", copy))))
    part = report[0]["partitions"][0]
    if part["skipped"]:
        fail(f"{guest.name} was skipped: {part['skipped']}")
    run(vhdfs_binary(), "check", copy)
    outcome = Outcome(seconds, read, written, max(0, stored(copy) - before), copy.stat().st_size)
    after = place / "after.raw"
    run("qemu-img", "convert", "-O", "raw", copy, after)
    run(*guest.check, after)
    for path in (copy, after):
        path.unlink()
    return outcome


def by_convert(guest, disk, place, prepare):
    """To a raw copy, `prepare` that, and back to a VHDX."""
    raw, new = place / "peer.raw", place / "peer.vhdx"

    def work():
        run("qemu-img", "convert", "-O", "raw", disk, raw)
        prepare(guest, raw, place)
        run("qemu-img", "convert", "-O", "vhdx", "-o", "subformat=dynamic,block_size=2M", raw, new)
        sync_file(new)

    seconds, read, written = timed(disk, work)
    outcome = Outcome(seconds, read, written, stored(raw, new), new.stat().st_size)
    for path in (raw, new):
        path.unlink()
    return outcome


def trim(guest, raw, place):
    with mounted(guest, raw, place / "files") as folder:
        run("fstrim", folder)


def zero(guest, raw, place):
    if guest.name == "ext4" and shutil.which("zerofree"):
        run("zerofree", raw)
        return
    with mounted(guest, raw, place / "files") as folder:
        zeros = bytes(8 * MIB)
        try:
            with open(folder / "zeros", "wb", buffering=0) as file:
                while file.write(zeros) == len(zeros):
                    pass
        except OSError:
            pass
        run("sync", "-f", folder)
        (folder / "zeros").unlink()


def by_sparsify(disk, place):
    """Where libguestfs is installed, which needs a kernel and an emulator of its own."""
    new = place / "peer.vhdx"
    seconds, read, written = timed(disk, lambda: run("virt-sparsify", "--quiet", "--convert", "vhdx", disk, new))
    outcome = Outcome(seconds, read, written, stored(new), new.stat().st_size)
    new.unlink()
    return outcome


def bench(place, size, rounds):
    """Returns the table as text."""
    if not drop_caches():
        fail("the part with guest file systems needs root, for mounts and for empty caches")
    rows = []
    for guest in GUESTS:
        progress(f"a {size // MIB} MiB disk with {guest.name}")
        disk = make_disk(guest, place, size)
        ways = {
            "fstrim + convert": lambda: by_convert(guest, disk, place, trim),
            "zeroing + convert": lambda: by_convert(guest, disk, place, zero),
        }
        if shutil.which("virt-sparsify"):
            ways["virt-sparsify"] = lambda: by_sparsify(disk, place)
        if guest.name == "NTFS":
            # ntfs-3g trims only block devices.
            del ways["fstrim + convert"]
        ours, peers = [], {name: [] for name in ways}
        for number in range(1, rounds + 1):
            progress(f"round {number} of {rounds}: {guest.name}")
            ours.append(by_vhdfs(guest, disk, place))
            for name, way in ways.items():
                peers[name].append(way())
        before = disk.stat().st_size
        rows.append(row(guest.name, "vhdfs compact", ours, before, None))
        rows.extend(row(guest.name, name, found, before, ours) for name, found in peers.items())
        disk.unlink()
    progress("")
    header = [
        f"half its files deleted, {size / 1024 / MIB:.3g} GiB", "how", "s", "s / vhdfs", "read, MiB", "written, MiB",
        "extra space, MiB", "length before, MiB", "after",
    ]  # fmt: skip
    return table(header, rows)


def row(name, how, outcomes, before, ours):
    seconds, read, written, extra, length = zip(*outcomes)
    # Whatever else the machine does can only add to them.
    read, written = (None if None in each else min(each) for each in (read, written))
    slower = ratio(seconds, [outcome.seconds for outcome in ours]) if ours else None
    sizes = [figure(value if value is None else value / MIB) for value in (read, written, median(extra), before, median(length))]
    return [name, how, figure(median(seconds)), figure(slower), *sizes]
