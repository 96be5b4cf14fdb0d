"""Draws what a soak of guests has seen, as a picture without a program for pictures."""

from typing import NamedTuple, Optional

MIB = 1 << 20


class Sample(NamedTuple):
    """What was seen at one moment: seconds since the start, and bytes."""

    at: float
    length: int
    stored: int
    used: Optional[int]
    phase: str


LINES = [("length", "length of the file", "#1f6feb"), ("stored", "stored on the host", "#2da44e"), ("used", "used in the guest", "#9a6700")]
WIDTH, HEIGHT = 840, 260
LEFT, TOP, BOTTOM = 60, 34, 36


def step(largest, parts):
    """A round number of which `largest` has about so many."""
    size = 1
    while largest / size > parts:
        size *= 2 if str(size)[0] != "2" else 2.5
    return size


def panel(title, samples, resets, top):
    """One set of axes with its curves; a dashed line for each reset."""
    wide, high = WIDTH - LEFT - 20, HEIGHT - TOP - BOTTOM
    seconds = max(sample.at for sample in samples)
    most = max(max(sample.length, sample.stored, sample.used or 0) for sample in samples) / MIB * 1.05

    def x(at):
        return LEFT + at / seconds * wide

    def y(mebibytes):
        return top + TOP + high - mebibytes / most * high

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="bold">{title}</text>']
    for number in range(0, int(most) + 1, int(step(most, 6))):
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{y(number):.1f}" y2="{y(number):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(number) + 4:.1f}" text-anchor="end">{number}</text>')
    for number in range(0, int(seconds) + 1, int(step(seconds, 12))):
        parts.append(f'<text x="{x(number):.1f}" y="{top + HEIGHT - 20}" text-anchor="middle">{number} s</text>')
    for at in resets:
        parts.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{top + TOP}" y2="{top + TOP + high}" stroke="#cf222e" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x(at) + 4:.1f}" y="{top + TOP + 10}" fill="#cf222e">reset</text>')
    for field, _, colour in LINES:
        points = [(sample.at, getattr(sample, field)) for sample in samples if getattr(sample, field) is not None]
        line = " ".join(f"{x(at):.1f},{y(value / MIB):.1f}" for at, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return parts


def draw(curves):
    """`curves` has samples and the times of resets for each title."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT * len(curves) + 30}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, (samples, resets)) in enumerate(curves.items()):
        if samples:
            parts += panel(f"{title.upper()}, MiB", samples, resets, number * HEIGHT)
    for number, (_, name, colour) in enumerate(LINES):
        at = LEFT + number * 200
        below = HEIGHT * len(curves) + 12
        parts.append(f'<line x1="{at}" x2="{at + 24}" y1="{below}" y2="{below}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{at + 30}" y="{below + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])
