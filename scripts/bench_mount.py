"""fio through each way to serve a disk: rows of one table, one column per server."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from typing import NamedTuple

from bench_tools import MIB, ROOT, fail, figure, median, progress, ratio, read_data, run, sync_file, table


class Row(NamedTuple):
    """One fio job. `depth` is how many requests are in flight; `empty` starts on a disk without a block."""

    kind: str
    block: str
    depth: int
    direct: bool
    sync: bool = False
    empty: bool = False

    def name(self):
        what = {
            "randread": "random read", "randwrite": "random write", "read": "sequential read", "write": "sequential write",
        }[self.kind]
        size = {"4k": "4 KiB", "1m": "1 MiB"}[self.block]
        ways = "direct" if self.direct else "buffered"
        extra = (", each fdatasync'ed" if self.sync else "") + (", into an empty disk" if self.empty else "")
        flight = f", {self.depth} in flight" if self.block == "4k" else ""
        return f"{what} {size}{flight}, {ways}{extra}"

    def unit(self):
        return "IOPS" if self.block == "4k" else "MiB/s"

    def writes(self):
        return self.kind.endswith("write")


ROWS = [
    *(Row(kind, "4k", depth, direct) for direct in (False, True) for kind in ("randread", "randwrite") for depth in (1, 64)),
    *(Row(kind, "1m", 1, direct) for direct in (False, True) for kind in ("read", "write")),
    Row("randwrite", "4k", 1, False, sync=True),
    Row("randwrite", "4k", 1, False, empty=True),
]


class Server:
    """A way to serve a disk: started anew for each measurement, so that nothing is in FUSE's cache."""

    title = ""
    image = "raw"

    def __init__(self, place):
        self.place = place

    def start(self, image):
        """Serves `image`; returns the path of the raw file."""
        raise NotImplementedError

    def stop(self):
        """Returns once nothing has the image open."""

    def spawn(self, *command, ready):
        """Starts a program and waits until `ready()`; fails with what it printed if it ends before."""
        log = self.place / "server.log"
        with open(log, "w") as output:
            # In a session of its own, as a daemon has: busy CPUs are shared out by session first.
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=output, stderr=output, start_new_session=True
            )  # fmt: skip
        deadline = time.monotonic() + 10
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                fail(f"{self.title} did not start:\n{log.read_text()}")
            time.sleep(0.01)


class Host(Server):
    title = "host file"

    def start(self, image):
        return image


class Yardstick(Server):
    title = "yardstick"

    def start(self, image):
        self.mount_point = self.place / "yardstick"
        self.mount_point.mkdir(exist_ok=True)
        binary = target_directory() / "release/examples/yardstick"
        self.spawn(binary, image, self.mount_point, ready=lambda: os.path.ismount(self.mount_point))
        return self.mount_point / "disk.raw"

    def stop(self):
        run("fusermount3", "-u", self.mount_point)
        self.process.wait(timeout=60)


class Vhdfs(Server):
    title = "vhdfs"
    image = "vhd"

    def start(self, image):
        self.mount_point = self.place / "vhdfs"
        self.mount_point.mkdir(exist_ok=True)
        run(vhdfs_binary(), "mount", image.parent, self.mount_point)
        return self.mount_point / (image.name + ".raw")

    def stop(self):
        run(vhdfs_binary(), "unmount", self.mount_point)


class VhdfsVhdx(Vhdfs):
    title = "vhdfs, VHDX"
    image = "vhdx"


class VhdfsChild(Vhdfs):
    """A child without a block of its own, made anew for each figure: reads come from the parent, writes are first ones."""

    title = "vhdfs, child"
    image = "child"

    def start(self, image):
        image.unlink(missing_ok=True)
        run(vhdfs_binary(), "create", "--type", "differencing", "--parent", image.parent / "disk.vhdx", image)
        return super().start(image)


class QemuExport(Server):
    driver = ""

    def start(self, image):
        self.mount_point = self.place / "qemu.raw"
        self.mount_point.touch()
        size = self.mount_point.stat().st_size
        self.spawn(
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap",
            "--blockdev", f"driver={self.driver},node-name=disk,file=file,discard=unmap",
            "--export", f"type=fuse,id=export,node-name=disk,mountpoint={self.mount_point},writable=on",
            ready=lambda: self.mount_point.stat().st_size != size,
        )  # fmt: skip
        return self.mount_point

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=60)


class QemuVhd(QemuExport):
    title = "QEMU, VHD"
    image = "vhd"
    driver = "vpc"


class QemuVhdx(QemuExport):
    title = "QEMU, VHDX"
    image = "vhdx"
    driver = "vhdx"


class QemuRaw(QemuExport):
    title = "QEMU, raw"
    driver = "raw"


COLUMNS = {
    "host": Host, "yardstick": Yardstick, "vhdfs": Vhdfs, "qemu-vhd": QemuVhd, "qemu-raw": QemuRaw,
    "vhdx": VhdfsVhdx, "child": VhdfsChild, "qemu-vhdx": QemuVhdx,
}  # fmt: skip
# Ratios that are printed where both are measured.
COMPARISONS = [
    ("vhdfs", "yardstick"), ("vhdfs", "qemu-vhd"), ("vhdx", "yardstick"), ("vhdx", "qemu-vhdx"), ("child", "yardstick"),
]  # fmt: skip


def target_directory():
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def vhdfs_binary():
    return target_directory() / "release/vhdfs"


def make_images(place, size):
    """One raw file full of noise and the same as a dynamic VHD and VHDX, in directories of their own."""
    images = {"raw": place / "raw/disk.raw", "vhd": place / "vhd/disk.vhd", "vhdx": place / "vhdx/disk.vhdx"}
    for image in images.values():
        image.parent.mkdir()
    with open(images["raw"], "wb") as raw:
        for _ in range(size // MIB):
            raw.write(os.urandom(MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", images["raw"], images["vhd"])
    run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", f"subformat=dynamic,block_size={2 * MIB}", images["raw"], images["vhdx"])
    # A disk with children is read-only: theirs is one of its own.
    images["child"] = place / "child/child.vhdx"
    images["child"].parent.mkdir()
    shutil.copy(images["vhdx"], images["child"].parent / "disk.vhdx")
    return images


def make_empty(place, size, kind):
    image = place / f"empty-{kind}/disk.{kind}" if kind != "child" else place / "empty-child/child.vhdx"
    image.parent.mkdir(exist_ok=True)
    image.unlink(missing_ok=True)
    if kind == "raw":
        run("truncate", "-s", size, image)
    elif kind == "vhdx":
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", f"subformat=dynamic,block_size={2 * MIB}", image, size)
    elif kind == "child":
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", f"subformat=dynamic,block_size={2 * MIB}", image.parent / "disk.vhdx", size)
    else:
        run("qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", image, size)
    return image


def asynchronous_engine():
    """How 64 direct requests are kept in flight by one thread."""
    switch = pathlib.Path("/proc/sys/kernel/io_uring_disabled")
    allowed = not switch.exists() or switch.read_text().strip() == "0"
    return "io_uring" if allowed else "libaio"


def fio(row, path, size, seconds):
    """One pass over the file at most, no longer than `seconds`; returns IOPS or MiB/s."""
    arguments = [
        "fio", "--name=bench", f"--filename={path}", f"--rw={row.kind}", f"--bs={row.block}", f"--direct={int(row.direct)}",
        f"--runtime={seconds}", "--invalidate=0", "--group_reporting", "--output-format=json", "--randrepeat=0",
        f"--fdatasync={int(row.sync)}", "--allow_file_create=0",
    ]  # fmt: skip
    if row.depth == 1:
        arguments += ["--ioengine=psync", f"--size={size}"]
    elif row.direct:
        arguments += [f"--ioengine={asynchronous_engine()}", f"--iodepth={row.depth}", f"--size={size}"]
    else:
        # The kernel does buffered I/O of one thread one after the other: one thread per request, each its part.
        part = size // row.depth
        arguments += ["--ioengine=psync", "--thread", f"--numjobs={row.depth}", f"--size={part}", f"--offset_increment={part}"]
    job = json.loads(run(*arguments))["jobs"][0]["write" if row.writes() else "read"]
    return job["iops"] if row.unit() == "IOPS" else job["bw_bytes"] / MIB


def measure(row, server, images, place, size, seconds):
    image = make_empty(place, size, server.image) if row.empty else images[server.image]
    for file in image.parent.iterdir():
        read_data(file)
    path = server.start(image)
    try:
        return fio(row, path, size, seconds)
    finally:
        server.stop()
        sync_file(image)


def bench(place, tables, rows, size, seconds, rounds):
    """Returns the tables as text, one for each list of columns."""
    if any("yardstick" in columns for columns in tables):
        run("cargo", "build", "--release", "--quiet", "-p", "vhdfs-mount", "--example", "yardstick", cwd=ROOT)
    chosen = [row for row in ROWS if re.search(rows, row.name())]
    images = make_images(place, size)
    texts = []
    for columns in tables:
        results = {row: {column: [] for column in columns} for row in chosen}
        for number in range(1, rounds + 1):
            for row in chosen:
                for column in columns:
                    progress(f"round {number} of {rounds}: {row.name()}: {COLUMNS[column].title}")
                    server = COLUMNS[column](place)
                    results[row][column].append(measure(row, server, images, place, size, seconds))
        progress("")
        texts.append(render(results, columns))
    return "\n\n".join(texts)


def render(results, columns):
    comparisons = [(a, b) for a, b in COMPARISONS if a in columns and b in columns]
    header = ["through the mount", "unit"]
    header += [COLUMNS[column].title for column in columns]
    header += [f"{COLUMNS[a].title} / {COLUMNS[b].title}" for a, b in comparisons]
    lines = []
    for row, found in results.items():
        line = [row.name(), row.unit()]
        line += [figure(median(found[column])) for column in columns]
        line += [figure(ratio(found[a], found[b])) for a, b in comparisons]
        lines.append(line)
    return table(header, lines)
