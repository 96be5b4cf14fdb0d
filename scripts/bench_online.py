"""Compaction of a half-dead disk under a guest that never rests: how soon is the file short, and what does the guest feel?"""

import json
import os
import random
import re
import shutil
import subprocess
import time
from math import ceil, log
from statistics import stdev
from typing import NamedTuple

from bench_mount import Vhdfs, target_directory, vhdfs_binary
from bench_tools import MIB, ROOT, fail, figure, median, progress, ratio, run, sync_file, table

BLOCK = 2 * MIB
# The file counts as short when it is this close to where a silent guest's ends.
CLOSE = 4 * MIB


class Load(NamedTuple):
    """What the guest does, and how mount/examples/load.rs calls it."""

    name: str
    what: str


SILENT = Load("silent", "0")
LOADS = [
    SILENT,
    *(Load(f"{rate} a second", str(rate)) for rate in (2, 20, 200, 2000)),
    Load("stream, 50 MiB/s", "stream"),
    Load("full speed", "full"),
]
DISKS = {"vhd": "VHD", "vhdx": "VHDX", "child": "child, VHDX"}


class Outcome(NamedTuple):
    """One pass with one load: seconds until the file was short, if it was in time, and how long the pass was; bytes given
    back and moved; what the load says."""

    seconds: float | None
    window: float
    given: int
    moved: int | None
    load: dict


class Mounted(Vhdfs):
    """With options of its own, and a log that can be read."""

    def __init__(self, place, options):
        super().__init__(place)
        self.options = options

    def start(self, image):
        self.mount_point = self.place / "vhdfs"
        self.mount_point.mkdir(exist_ok=True)
        self.log = self.place / "vhdfs.log"
        self.log.write_text("")
        command = [vhdfs_binary(), "mount", "--foreground", "--log-file", self.log, *self.options, image.parent, self.mount_point]
        self.spawn(*command, ready=lambda: os.path.ismount(self.mount_point))
        return self.mount_point / (image.name + ".raw")

    def stop(self):
        super().stop()
        self.process.wait(timeout=60)


def make_disk(place, kind, size):
    """A disk all of which is noise, written through a mount."""
    folder = place / f"online-{kind}"
    folder.mkdir()
    image = folder / {"vhd": "disk.vhd", "vhdx": "disk.vhdx", "child": "child.vhdx"}[kind]
    if kind == "child":
        parent = make_disk(place, "vhdx", size) if not (place / "online-vhdx").exists() else place / "online-vhdx/disk.vhdx"
        shutil.copy(parent, folder / "disk.vhdx")
        run(vhdfs_binary(), "create", "--parent", folder / "disk.vhdx", image)
    else:
        run(vhdfs_binary(), "create", "--size", size, "--block-size", BLOCK, image)
    server = Mounted(place, ["--no-compact"])
    with open(server.start(image), "r+b", buffering=0) as disk:
        for _ in range(size // MIB):
            disk.write(os.urandom(MIB))
        os.fsync(disk.fileno())
    server.stop()
    return image


def make_ranges(path, size):
    """Says which half of the disk is dead: three of eight blocks in whole, and half of two of eight, in pieces."""
    chance = random.Random(1)
    blocks = list(range(size // BLOCK))
    chance.shuffle(blocks)
    whole, parts = set(blocks[: len(blocks) * 3 // 8]), set(blocks[len(blocks) * 3 // 8 : len(blocks) * 5 // 8])
    lines = []
    for block in range(size // BLOCK):
        start = block * BLOCK
        if block in whole:
            lines.append(("dead", start, BLOCK))
        elif block in parts:
            quarter = BLOCK // 4
            kinds = ["dead", "dead", "live", "live"]
            chance.shuffle(kinds)
            lines += [(kind, start + number * quarter, quarter) for number, kind in enumerate(kinds)]
        else:
            lines.append(("live", start, BLOCK))
    path.write_text("".join(f"{kind} {start} {length}\n" for kind, start, length in lines))


class Bench:
    def __init__(self, place, options):
        self.place, self.options = place, options
        self.ranges = place / "ranges"
        make_ranges(self.ranges, options.online_size)
        self.images = {kind: make_disk(place, kind, options.online_size) for kind in options.disks}
        # How long the file of each kind of disk is when a silent guest's was compacted.
        self.targets = {}

    def measure(self, kind, load, compact, window):
        """The guest discards what is dead and goes on with its load: with `compact` until the file is short, and for
        `window` seconds at least."""
        template = self.images[kind]
        image = self.place / "online" / template.name
        image.parent.mkdir(exist_ok=True)
        run("cp", template, image)
        if kind == "child":
            run("cp", "--preserve", "--no-clobber", template.parent / "disk.vhdx", image.parent)
        sync_file(image)
        server = Mounted(self.place, self.options.mount if compact else ["--no-compact"])
        served = server.start(image)
        binary = target_directory() / "release/examples/load"
        command = [binary, served, self.ranges, load.what, 10 * self.options.online_seconds]
        try:
            guest = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if guest.stdout.readline() != "ready\n":
                fail(f"the load does not start: {guest.wait()}")
            before, started = image.stat().st_size, time.monotonic()
            if not compact:
                seconds = time.sleep(window)
            elif load == SILENT:
                seconds = self.wait_until_still(kind, image)
            else:
                seconds = self.wait_until_short(kind, image, window)
            window, after = time.monotonic() - started, image.stat().st_size
            moved = moved_bytes(server) if compact else None
            printed, _ = guest.communicate()
            if guest.returncode != 0:
                fail(f"the load ended with {guest.returncode}:\n{server.log.read_text()}")
        finally:
            server.stop()
            shutil.rmtree(image.parent)
        return Outcome(seconds, window, before - after, moved, json.loads(printed))

    def wait_until_still(self, kind, image):
        """Seconds until the file is as short as it gets, which is then what others are held to."""
        started = changed = time.monotonic()
        first = length = image.stat().st_size
        while time.monotonic() < (changed + 4 if length < first else started + self.options.online_seconds):
            if image.stat().st_size != length:
                length, changed = image.stat().st_size, time.monotonic()
            time.sleep(0.01)
        if length == first:
            fail(f"a silent disk ({DISKS[kind]}) was not compacted")
        self.targets[kind] = length
        return changed - started

    def wait_until_short(self, kind, image, window):
        """Seconds until the file is as short as a silent guest's; None if that takes too long."""
        started, seconds = time.monotonic(), None
        while (passed := time.monotonic() - started) < (self.options.online_seconds if seconds is None else window):
            if seconds is None and image.stat().st_size <= self.targets[kind] + CLOSE:
                seconds = passed
            time.sleep(0.01)
        return seconds


def moved_bytes(server):
    """By the runs that came to their end; None if none did."""
    found = re.findall(r"bytes read, (\d+) moved", server.log.read_text())
    return sum(int(number) for number in found) if found else None


def bench(place, options):
    """Returns the table as text."""
    run("cargo", "build", "--release", "--quiet", "-p", "vhdfs-mount", "--example", "load", cwd=ROOT)
    progress("the disks are being filled")
    bench = Bench(place, options)
    loads = [load for load in LOADS if load == SILENT or re.search(options.rows, load.name)]
    pairs = {(kind, load): [] for kind in options.disks for load in loads}
    for number in range(1, options.rounds + 1):
        for (kind, load), found in pairs.items():
            progress(f"round {number} of {options.rounds}: {DISKS[kind]}, {load.name}")
            least = 0 if load == SILENT else options.online_least
            # Who comes second finds another host: they take turns.
            window = found[-1][0].window if found and load != SILENT and number % 2 == 0 else None
            others = bench.measure(kind, load, False, window) if window else None
            ours = bench.measure(kind, load, True, least)
            if load != SILENT and others is None:
                others = bench.measure(kind, load, False, ours.window)
            found.append((ours, others))
    progress("")
    return render(pairs, options)


def felt(found, field, least):
    """What the guest feels: the median beside compaction, that divided by the one without, and by how much the rounds'
    ratios spread. A quantile of fewer than `least` operations says nothing."""
    def value(outcome):
        if field == "rate":
            return outcome.load["operations"] / outcome.load["seconds"]
        return outcome.load[field] if outcome.load["operations"] >= least else None

    ours, others = [value(a) for a, _ in found], [value(b) for _, b in found]
    pairs = [log(a / b) for a, b in zip(ours, others) if a and b]
    return median(ours), ratio(ours, others), stdev(pairs) if len(pairs) > 1 else None


def rounds_for(spread):
    """How many rounds it takes until the median of their ratios is known to 5 %, with 19 chances of 20."""
    return "-" if spread is None else str(max(1, ceil((1.96 * 1.25 * spread / log(1.05)) ** 2)))


def render(pairs, options):
    header = [
        f"online, {options.online_size / 1024 / MIB:.3g} GiB", "short after, s", "x silent", "given back, MiB", "moved, MiB",
        "operations/s", "/ without", "p50, ms", "/ without", "p99, ms", "/ without", "p99.9, ms", "/ without",
        "rounds for 5 %: rate", "p99",
    ]  # fmt: skip
    rows = []
    for (kind, load), found in pairs.items():
        ours = [a for a, _ in found]
        late = sum(outcome.seconds is None for outcome in ours) * 2 > len(ours)
        silent = [a.seconds for a, _ in pairs[kind, SILENT]]
        took = [outcome.seconds for outcome in ours]
        cells = [
            f"{DISKS[kind]}, {load.name}",
            f"> {options.online_seconds:g}" if late else figure(median(took)),
            "-" if late else figure(ratio(took, silent)),
            figure(median(outcome.given / MIB for outcome in ours)),
            figure(median(outcome.moved and outcome.moved / MIB for outcome in ours)),
        ]
        if load == SILENT:
            rows.append(cells + ["-"] * (len(header) - len(cells)))
            continue
        rate, p50, p99, p999 = (
            felt(found, *field) for field in (("rate", 0), ("p50", 10), ("p99", 100), ("p99.9", 1000))
        )  # fmt: skip
        cells += [figure(rate[0]), figure(rate[1])]
        for quantile, quotient, _ in (p50, p99, p999):
            cells += [figure(quantile and quantile / 1000), figure(quotient)]
        rows.append(cells + [rounds_for(rate[2]), rounds_for(p99[2])])
    return table(header, rows)
