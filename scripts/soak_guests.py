#!/usr/bin/env python3
"""A real guest on disks that vhdfs serves: does it keep its data, and does the file shrink while it runs?

A small Debian (scripts/guest-image makes it, once) runs under QEMU on a VHD and on a VHDX from `vhdfs mount`, with
`discard=unmap`. It installs and removes packages, builds a program, writes and deletes files, has a database that
syncs each second, and trims by its own fstrim.timer. Three times for each disk: twice it is reset without warning (QEMU
is killed), after which a copy of the disk as it is then must pass fsck, hold every page and file that the guest had
called durable, and the guest must come up on the disk itself; at last it ends in good order.

Each second the length of the file, what the host stores of it and what the guest's file system uses are noted: a table
of the curve is printed, and --svg draws it. The file must have become shorter while the guest was running. KVM is used
where a guest boots with it, else QEMU's own translation.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

sys.dont_write_bytecode = True

from bench_mount import target_directory, vhdfs_binary
from bench_tools import MIB, ROOT, figure, run, table
from curve import Sample, draw

PLACE = target_directory() / "guest"
# At least this much has to go in one piece while a guest is running.
SHRINK = 64 * MIB
PAGE = 4096
# Seconds until a guest is at work at the latest, and what a round of its work may take.
BOOT = 600
ROUND = 900
FORMATS = {
    "vhd": ["-O", "vpc", "-o", "subformat=dynamic,force_size=on"],
    "vhdx": ["-O", "vhdx", "-o", "subformat=dynamic,block_size=2M"],
}


class Failure(Exception):
    """What the guest or its disk did not do as it should."""


class Machine(NamedTuple):
    """How a guest is run here."""

    emulator: str
    accelerator: str

    def command(self, arguments):
        return [
            self.emulator, "-accel", self.accelerator, "-m", "512", "-display", "none", "-nodefaults", "-no-reboot",
            "-kernel", str(PLACE / "vmlinuz"), "-initrd", str(PLACE / "initrd.img"), *arguments,
        ]  # fmt: skip


def find_machine():
    """The emulator, and the fastest way in which a kernel says a word within some seconds."""
    emulator = shutil.which("qemu-system-x86_64") or str(PLACE / "qemu/run")
    for accelerator in ("kvm", "tcg"):
        machine = Machine(emulator, accelerator)
        command = machine.command(["-serial", "stdio", "-append", "console=ttyS0 panic=-1"])
        try:
            printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=15).stdout
        except subprocess.TimeoutExpired as expired:
            printed = expired.stdout or b""
        if b"Linux version" in printed:
            return machine
    return None


class Promises:
    """What the guest has called durable, from what it reports."""

    def __init__(self):
        self.pages = {}
        self.generation = 0
        self.files = {}
        self.used = None
        self.phase = ""
        self.done = False
        self.trimmed = 0
        self.failure = None
        self.alive = self.verified = False

    def take(self, line):
        word, _, rest = line.partition(" ")
        if word == "used":
            self.used = int(rest)
        elif word == "database" and rest.startswith("verified"):
            self.verified = True
        elif word == "database":
            generation, *pages = (int(number) for number in rest.split())
            self.generation = generation
            self.pages.update((page, generation) for page in pages)
        elif word == "kept":
            checksum, name = rest.split()
            self.files[name] = checksum
        elif word == "dropped":
            self.files.pop(rest, None)
        elif word == "phase":
            self.phase = rest
            # All that it found on its disk was right.
            self.alive |= rest == "install" and self.verified
        elif word == "booted":
            self.verified = False
        elif word == "done":
            self.done = True
        elif word == "failed" or word == "fsck:" and re.search("UNEXPECTED|yes", rest):
            self.failure = line
        elif trimmed := re.search(r"\((\d+) bytes\) trimmed", line):
            self.trimmed += int(trimmed.group(1))

    def hold(self, folder):
        """Fails where the guest's file system, mounted there, does not hold what was promised."""
        with open(folder / "srv/database", "rb") as file:
            number = 0
            while page := file.read(PAGE):
                generation = int.from_bytes(page[4:8], "big")
                least = self.pages.get(number, 0)
                # A page is one request, and a reset no power cut: it is old or new.
                if page != (number.to_bytes(4, "big") + page[4:8]) * (PAGE // 8):
                    raise Failure(f"page {number} of the database is damaged")
                if not least <= generation <= self.generation + 1:
                    raise Failure(f"page {number} of the database is of generation {generation}, {least} was durable")
                number += 1
        if self.pages and number <= max(self.pages):
            raise Failure(f"the database ends after {number} pages")
        for name, checksum in self.files.items():
            found = run("sha256sum", folder / "srv/kept" / name).split()[0]
            if found != checksum:
                raise Failure(f"{name} has checksum {found}, {checksum} was durable")
        return number, len(self.files)


class Soak:
    """One disk, the daemon that serves it, and the guest's lives on it."""

    def __init__(self, extension, machine, place, options):
        self.extension, self.machine, self.place, self.options = extension, machine, place, options
        self.disk = place / f"disks/guest.{extension}"
        self.mount_point = place / "mnt"
        self.raw = self.mount_point / f"guest.{extension}.raw"
        self.promises = Promises()
        self.samples = []
        self.resets = []
        self.emulator = self.daemon = None
        self.read_to = 0

    def run(self):
        for folder in ("disks", "mnt", "files"):
            (self.place / folder).mkdir()
        (self.place / "report").touch()
        run("qemu-img", "convert", "-f", "raw", *FORMATS[self.extension], PLACE / "guest.raw", self.disk)
        self.serve()
        self.started = time.monotonic()
        try:
            for life in range(3):
                self.live(last=life == 2)
                self.judge_copy(clean=life == 2)
            self.end()
        finally:
            self.clear()

    def serve(self):
        command = [vhdfs_binary(), "mount", "--foreground", "--log-file", self.place / "log", *self.options.mount]
        with open(self.place / "daemon", "w") as output:
            self.daemon = subprocess.Popen(
                [str(word) for word in [*command, self.place / "disks", self.mount_point]],
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 10
        while not os.path.ismount(self.mount_point):
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"the daemon did not start: {(self.place / 'daemon').read_text()}")
            time.sleep(0.02)

    def live(self, last):
        """The guest runs for its share of the time, and is killed; the last time it ends by itself."""
        seconds = self.options.minutes * 60 / 3
        kernel = "root=/dev/vda rw console=ttyS0 quiet fsck.mode=force fsck.repair=preen panic=-1"
        command = self.machine.command([
            "-append", kernel + (f" soak.seconds={int(seconds)}" if last else ""),
            "-drive", f"file={self.raw},format=raw,if=virtio,cache=none,discard=unmap",
            "-chardev", f"file,id=console,path={self.place}/console,append=on", "-serial", "chardev:console",
            "-chardev", f"file,id=report,path={self.place}/report,append=on", "-serial", "chardev:report",
        ])  # fmt: skip
        self.promises.alive, started = False, time.monotonic()
        self.emulator = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        # It counts from when the guest is at work; a slow machine takes its time until then, and for a round to end.
        ends = started + BOOT
        while self.emulator.poll() is None and time.monotonic() < ends:
            time.sleep(1)
            self.sample()
            if self.promises.alive and ends == started + BOOT:
                ends = time.monotonic() + seconds + (ROUND if last else 0)
        if not last:
            self.emulator.kill()
            self.resets.append(time.monotonic() - self.started)
        elif self.emulator.poll() is None:
            raise Failure(f"the guest does not end; its phase is {self.promises.phase}")
        self.emulator.wait()
        self.sample()
        if last and not self.promises.done:
            raise Failure(f"the guest ended by itself in phase {self.promises.phase}, see its console")
        if not self.promises.alive:
            raise Failure(f"the guest was not at work within {BOOT} s, see its console")

    def sample(self):
        with open(self.place / "report", "rb") as report:
            report.seek(self.read_to)
            lines = report.read()
        # The last line may not be whole yet.
        lines = lines[: lines.rfind(b"\n") + 1]
        self.read_to += len(lines)
        for line in lines.decode(errors="replace").splitlines():
            self.promises.take(line)
        if self.promises.failure:
            raise Failure(f"the guest says: {self.promises.failure}")
        found = self.disk.stat()
        self.samples.append(Sample(
            time.monotonic() - self.started, found.st_size, found.st_blocks * 512, self.promises.used, self.promises.phase,
        ))  # fmt: skip

    def judge_copy(self, clean):
        """A copy of what the guest's disk is now: its file system checks, and holds what was promised."""
        copy = self.place / "copy.raw"
        run("cp", "--sparse=always", self.raw, copy)
        if not clean:
            # The journal is replayed; whatever else there were to repair is a fault.
            code = subprocess.run(["fsck.ext4", "-fp", copy], capture_output=True, text=True)
            if code.returncode > 1:
                raise Failure(f"fsck after the reset:\n{code.stdout}{code.stderr}")
        code = subprocess.run(["fsck.ext4", "-fn", copy], capture_output=True, text=True)
        if code.returncode != 0:
            raise Failure(f"fsck:\n{code.stdout}{code.stderr}")
        run("mount", "-o", "loop,ro", copy, self.place / "files")
        try:
            pages, files = self.promises.hold(self.place / "files")
        finally:
            run("umount", self.place / "files")
        end = "ended" if clean else "was reset"
        print(f"  {self.at()}: {end}; fsck clean, {pages} pages and {files} files as promised", flush=True)

    def at(self):
        return f"{time.monotonic() - self.started:.0f} s"

    def end(self):
        """The daemon goes; others read the same from the file."""
        status = json.loads(os.getxattr(self.raw, "user.vhdfs.status"))
        run(vhdfs_binary(), "unmount", self.mount_point)
        if self.daemon.wait(timeout=60) != 0:
            raise Failure(f"the daemon ended with {self.daemon.returncode}: {(self.place / 'log').read_text()}")
        run(vhdfs_binary(), "check", self.disk)
        driver = {"vhd": "vpc"}.get(self.extension, self.extension)
        run("qemu-img", "compare", "-f", driver, "-F", "raw", self.disk, self.place / "copy.raw")
        print(f"  trimmed {self.promises.trimmed / MIB:.0f} MiB; status at the end: {json.dumps(status)}", flush=True)

    def shrunk(self):
        """Bytes by which the file got shorter while guests were running: in all, and the most without growing."""
        total = most = current = 0
        for before, after in zip(self.samples, self.samples[1:]):
            fell = before.length - after.length
            current = max(0, current + fell) if fell >= 0 else 0
            total += max(0, fell)
            most = max(most, current)
        return total, most

    def clear(self):
        if self.emulator and self.emulator.poll() is None:
            self.emulator.kill()
            self.emulator.wait()
        if self.daemon and self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()
        subprocess.run(["umount", "--lazy", self.mount_point], stderr=subprocess.DEVNULL)

    def rows(self, every):
        """Of a table: one line each so many seconds."""
        due, lines = 0, []
        for sample in self.samples:
            if sample.at >= due:
                sizes = [figure(value and value / MIB) for value in (sample.length, sample.stored, sample.used)]
                lines.append([f"{sample.at:.0f}", *sizes, sample.phase])
                due = sample.at + every
        return lines


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="that the guest runs on each disk (default 6)")
    parser.add_argument("--formats", default="vhd,vhdx", help="on which disks (default: vhd,vhdx)")
    parser.add_argument("--svg", type=pathlib.Path, help="draw the curves into this file")
    parser.add_argument("--every", type=float, default=10, help="seconds between lines of the table (default 10)")
    parser.add_argument("--dir", type=pathlib.Path, help="where the disks are made (default: the system's temporary place)")
    parser.add_argument("--mount", type=str.split, default=[], metavar="OPTIONS", help="more options for vhdfs mount")
    options = parser.parse_args()
    options.formats = options.formats.split(",")
    if unknown := set(options.formats) - set(FORMATS):
        parser.error(f"no such format: {', '.join(unknown)} (there are {', '.join(FORMATS)})")
    return options


def skip(reason):
    print(f"skipped: {reason}", file=sys.stderr)
    sys.exit(0)


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if os.geteuid() != 0:
        skip("needs root, for mounts and to make the guest")
    if not os.access("/dev/fuse", os.W_OK):
        skip("needs /dev/fuse")
    if subprocess.run([ROOT / "scripts/setup", "guests"]).returncode != 0:
        skip("no guest can be made here, see above")
    run("cargo", "build", "--release", "--quiet", "-p", "vhdfs-mount", "--bin", "vhdfs", cwd=ROOT)
    machine = find_machine()
    if machine is None:
        skip("no guest boots here, neither with KVM nor without")
    print(f"a guest of {options.minutes:g} minutes each on {' and '.join(options.formats)}, with {machine.accelerator.upper()}", flush=True)
    curves, failed = {}, False
    for extension in options.formats:
        place = pathlib.Path(tempfile.mkdtemp(prefix="vhdfs-guest.", dir=options.dir))
        soak = Soak(extension, machine, place, options)
        print(f"\n{extension}", flush=True)
        try:
            soak.run()
            total, most = soak.shrunk()
            print(f"  the file got shorter by {total / MIB:.0f} MiB in all while the guest ran, {most / MIB:.0f} MiB at most without growing between")
            if most < SHRINK:
                raise Failure(f"the file did not get shorter by {SHRINK // MIB} MiB while the guest ran")
            shutil.rmtree(place)
        except (Failure, SystemExit, OSError) as failure:
            failed = True
            print(f"  FAILED: {failure}\n  all of it is in {place}", file=sys.stderr, flush=True)
        print(table([f"{extension}, s", "file, MiB", "on the host, MiB", "used in the guest, MiB", "the guest"], soak.rows(options.every)), flush=True)
        curves[extension] = (soak.samples, soak.resets)
    if options.svg:
        options.svg.write_text(draw(curves))
    sys.exit(failed)


if __name__ == "__main__":
    main()
