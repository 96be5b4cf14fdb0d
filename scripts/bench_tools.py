"""What all parts of scripts/bench, and scripts/soak_guests.py, share: running things, caches, medians, tables."""

import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 1 << 20


def fail(message):
    sys.exit(f"{pathlib.Path(sys.argv[0]).stem}: {message}")


def run(*command, **options):
    """Runs a command to its end and returns what it prints; shows its messages if it fails."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if result.returncode != 0:
        fail(f"{' '.join(str(word) for word in command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def timed_run(*command):
    """Runs a command; returns the seconds it took and what it printed."""
    started = time.monotonic()
    printed = run(*command)
    return time.monotonic() - started, printed


def device_traffic(path):
    """Bytes that the block device under `path` has read and written since it started; None where there is no such one."""
    number = os.stat(path).st_dev
    statistics_file = pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    if not statistics_file.exists():
        return None
    counts = statistics_file.read_text().split()
    return int(counts[2]) * 512, int(counts[6]) * 512


def sync_file(path):
    """Makes a file durable, so that its write-back does not disturb the next measurement."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_data(path):
    """Reads a file from start to end, skipping its holes; returns the bytes read. Also warms its cache."""
    buffer = bytearray(MIB)
    total = 0
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        position = 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), end)
            os.lseek(file.fileno(), start, os.SEEK_SET)
            left = position - start
            while left > 0:
                left -= file.readinto(memoryview(buffer)[: min(left, MIB)])
            total += position - start
    return total


def drop_caches():
    """Empties the page cache if we may (root); returns whether it did."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    except PermissionError:
        return False
    return True


def median(values):
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def ratio(over, under):
    """Median of the rounds' own ratios: what one round and its neighbours share (a busy host) cancels out."""
    pairs = [a / b for a, b in zip(over, under) if a is not None and b]
    return statistics.median(pairs) if pairs else None


def figure(value):
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value / 1000:.1f}k" if value < 100_000 else f"{value / 1000:.0f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def table(header, rows):
    """A Markdown table whose source is aligned too: first column left, the others right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        first, *others = (text.ljust(width) if i == 0 else text.rjust(width)
                          for i, (text, width) in enumerate(zip(row, widths)))
        return "| " + " | ".join([first, *others]) + " |"

    rule = "| " + "-" * widths[0] + " | " + " | ".join("-" * (w - 1) + ":" for w in widths[1:]) + " |"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
