"""Figures with their samples: taken in interleaved rounds, as plain data, as lines for people.

    Figure      a name, a unit, samples; an aim where there is one; whether it is a VM's
    Run         takes one sample of each of its figures at once
    Group       figures that stand side by side; ratios are to `base`, medians of the pairs of each round

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["Aim", "Figure", "Group", "Run", "lines", "measure", "row"]

import random

from hv.bench.harness import Series

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
COLUMNS = ("median", "p95", "p99", "min", "max")


class Aim:
    """`which` (median, p99, ratio) is to be at most `most`."""

    def __init__(self, most: float, which: str = "median") -> None:
        self.most, self.which = most, which

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {"which": self.which, "most": self.most}


class Figure:
    """`vm`: a virtual machine is measured, which a software KVM makes slower."""

    def __init__(self, name: str, unit: str, *aims: Aim, vm: bool = True) -> None:
        self.name, self.unit, self.aims, self.vm = name, unit, aims, vm
        self.samples: list[float] = []

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "unit": self.unit, "vm": self.vm, "aims": [aim.data() for aim in self.aims],
                "samples": self.samples}


class Run:
    """`sample()` makes one sample for each of `figures`."""

    def __init__(self, sample: Callable[[], Sequence[float]], *figures: Figure) -> None:
        self.sample, self.figures = sample, figures


class Group:
    """What belongs together under `title`; `text` says what was measured and how."""

    def __init__(self, part: str, title: str, text: str, figures: Sequence[Figure], base: Figure | None = None) -> None:
        self.part, self.title, self.text = part, title, text
        self.figures, self.base = list(figures), base

    def data(self) -> dict[str, Any]:
        """For JSON; figures without samples are left out."""
        kept = [figure for figure in self.figures if figure.samples]
        return {"part": self.part, "title": self.title, "text": self.text,
                "base": self.base.name if self.base in kept and self.base else None,
                "figures": [figure.data() for figure in kept]}


def measure(runs: Sequence[Run], rounds: int, warm_up: int = 1) -> None:
    """Each run once per round, in a new order each round; the first `warm_up` rounds are thrown away."""
    order = list(runs)
    dice = random.Random(1)
    for number in range(-warm_up, rounds):
        dice.shuffle(order)
        for run in order:
            values = run.sample()
            if number >= 0:
                for figure, value in zip(run.figures, values, strict=True):
                    figure.samples.append(value)


def row(figure: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """n, COLUMNS, `ratio` (None without a base), `aims` as [(text, whether it is met)], of a figure's data."""
    series = Series(figure["samples"])
    found: dict[str, Any] = {"n": len(series.samples), "min": min(series.samples), "max": max(series.samples)}
    found |= {name: series.quantile(share) for name, share in QUANTILES.items()}
    found["ratio"] = None
    if base is not None and base is not figure:
        pairs = zip(figure["samples"], base["samples"], strict=False)
        found["ratio"] = Series([mine / other for mine, other in pairs if other]).median
    found["aims"] = [(f"{aim['which']} ≤ {aim['most']:g}", found[aim["which"]] <= aim["most"])
                     for aim in figure["aims"] if found[aim["which"]] is not None]
    return found


def lines(group: dict[str, Any]) -> list[str]:
    """A group's data as a table for a terminal."""
    figures = group["figures"]
    if not figures:
        return []
    base = next((figure for figure in figures if figure["name"] == group["base"]), None)
    width = max(len(figure["name"]) for figure in figures)
    head = f"  {'':<{width}} {'n':>5}" + "".join(f"{name:>10}" for name in COLUMNS)
    text = [group["title"], head + ("   of " + base["name"] if base else "")]
    for figure in figures:
        made = row(figure, base)
        text.append(f"  {figure['name']:<{width}} {made['n']:>5}"
                    + "".join(f"{made[name]:>10.2f}" for name in COLUMNS) + f" {figure['unit']:<4}"
                    + (f" {made['ratio']:.2f}" if made["ratio"] is not None else "")
                    + "".join(f"  [{aim}: {'met' if met else 'MISSED'}]" for aim, met in made["aims"]))
    return text
