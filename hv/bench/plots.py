"""Samples as a picture: a row for each figure, a dot for each sample, a line at the median. Plain SVG.

One kind of plot is drawn, on a logarithmic axis; a library for that would be larger than all of pyhv.
Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["plot"]

from math import ceil, floor, log10
from xml.sax.saxutils import escape

from hv.bench.harness import Series

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

WIDTH, RIGHT, TOP, ROW, BOTTOM = 900, 40, 50, 30, 40
_LETTER, _NAME_LEAST, _NAME_MOST = 7.4, 120, 440     # a letter's width, more than most fonts', and room for names
_DOTS_MOST = 400        # of a row: more are drawn as every n-th of the sorted samples
_COLOURS = {True: "#1f6feb", False: "#b35900"}      # a VM's, another's
_STYLE = ("text{font:13px sans-serif;fill:#333}.t{font-weight:bold;font-size:15px}line{stroke:#ddd}"
          ".m{stroke:#111;stroke-width:3}")


def plot(title: str, figures: Sequence[dict[str, Any]], note: str = "") -> str:
    """An SVG of figures of one unit (hv/bench/figures.py, Figure.data). Samples of 0 stand at the left end."""
    height = TOP + ROW * len(figures) + BOTTOM
    positive = [value for figure in figures for value in figure["samples"] if value > 0] or [1.0]
    low, high = _axis(min(positive), max(positive))
    longest = max((len(figure["name"]) for figure in figures), default=0)
    left = min(max(_NAME_LEAST, 24 + _LETTER * longest), _NAME_MOST)

    def x(value: float) -> float:
        share = (log10(max(value, low)) - log10(low)) / (log10(high) - log10(low))
        return left + share * (WIDTH - left - RIGHT)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
             f'viewBox="0 0 {WIDTH} {height}"><style>{_STYLE}</style><rect width="100%" height="100%" fill="white"/>',
             _text(12, 24, title, "start", "t"), _text(WIDTH - 12, 24, note, "end")]
    for value in _ticks(low, high):
        parts.append(f'<line x1="{x(value):.1f}" y1="{TOP - 10}" x2="{x(value):.1f}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x(value), height - BOTTOM + 18, f"{value:g}", "middle"))
    unit = figures[0]["unit"] if figures else ""
    parts.append(_text(WIDTH - 12, height - 4, unit, "end"))
    for number, figure in enumerate(figures):
        parts += _row(figure, TOP + ROW * number + ROW / 2, left - 12, x)
    return "\n".join([*parts, "</svg>", ""])


def _row(figure: dict[str, Any], y: float, name_end: float, x: Any) -> list[str]:
    samples = sorted(figure["samples"])
    step = max(1, len(samples) // _DOTS_MOST)
    colour = _COLOURS[bool(figure["vm"])]
    parts = [_text(name_end, y + 4, figure["name"], "end")]
    for number, value in enumerate(samples[::step]):
        shift = (number * 7 % 11 - 5) * 0.9         # apart from each other, and the same each time
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y + shift:.1f}" r="2.5" fill="{colour}" fill-opacity="0.45"/>')
    middle = x(Series(samples).median)
    parts.append(f'<line class="m" x1="{middle:.1f}" y1="{y - 10:.0f}" x2="{middle:.1f}" y2="{y + 10:.0f}"/>')
    return parts


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _axis(low: float, high: float) -> tuple[float, float]:
    """Ends at 1, 2 or 5 times a power of ten, around both."""
    ends = [step * 10.0 ** power for power in range(floor(log10(low)) - 1, ceil(log10(high)) + 2) for step in (1, 2, 5)]
    first = max(value for value in ends if value <= low)
    last = min(value for value in ends if value >= high and value > first)
    return first, last


def _ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    values = [step * 10.0 ** power for power in powers for step in steps]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]
