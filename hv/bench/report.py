"""docs/performance.md and its plots, from what `pyhv bench snapshot` measured.

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["write_docs", "write_plots"]

from pathlib import Path

from hv.bench.figures import COLUMNS, row
from hv.bench.plots import plot
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PLOTS = "performance"
_HEAD = """# How fast, how small: snapshots, pools, migration

Written by `{command}`, on {date}, not by hand. {host}.

Each round runs all programs of its table once, in a new order; ratios are medians of the rounds' pairs. A dot in a plot
is a sample, the bar the median; orange is not a VM's. Programs that are not installed are left out. Other figures:
[containers](containers.md#what-it-costs), `pyhv bench boot`, `pyhv bench io`.

{kvm}
"""
_SOFTWARE = """\
**This is a software KVM.** The host offers no hardware virtualisation: KVM interprets the guest's kernel at one to two
million instructions a second ([software-kvm.md](software-kvm.md)). Each figure of a VM is marked so; those that wait
for an answer of Linux are mostly its kernel being interpreted."""
_HARDWARE = "KVM runs guests in hardware here."


def write_docs(data: dict[str, Any], folder: str) -> None:
    """FOLDER/performance.md and FOLDER/performance/*.svg. ConfigError where they can't be written."""
    text = [_HEAD.format(command=data["command"], date=data["date"], host=data["host"],
                         kvm=_SOFTWARE if data["software_kvm"] else _HARDWARE)]
    for group in data["groups"]:
        if group["figures"]:
            text += ["", *_section(group, data["software_kvm"])]
    try:
        Path(folder, "performance.md").write_text("\n".join(text) + "\n")
    except OSError as error:
        raise ConfigError(f"--write-docs {folder}: {error.strerror}", "name pyhv's folder docs") from None
    write_plots(data, str(Path(folder, PLOTS)))


def write_plots(data: dict[str, Any], folder: str) -> None:
    """An SVG for each table."""
    note = "software KVM" if data["software_kvm"] else ""
    try:
        Path(folder).mkdir(exist_ok=True)
        for group in data["groups"]:
            if group["figures"]:
                picture = plot(group["title"], group["figures"], note if _has_vm(group) else "")
                Path(folder, _file(group)).write_text(picture)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error.strerror}", "name a folder that can be written") from None


def _section(group: dict[str, Any], software: bool) -> list[str]:
    base = next((figure for figure in group["figures"] if figure["name"] == group["base"]), None)
    unit = group["figures"][0]["unit"]
    aims = any(figure["aims"] for figure in group["figures"])
    heads = ["KVM", "n", *COLUMNS, *(["of " + base["name"]] if base else []), *(["aim"] if aims else [])]
    lines = [f"## {group['title']}", "", group["text"], "",
             f"| {unit} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for figure in group["figures"]:
        made = row(figure, base)
        cells = ["software" if figure["vm"] and software else "hardware" if figure["vm"] else "", str(made["n"])]
        cells += [_number(made[name]) for name in COLUMNS]
        if base:
            cells.append("" if made["ratio"] is None else f"{made['ratio']:.2f}")
        if aims:
            cells.append("; ".join(f"{aim}: {'met' if met else 'missed'}" for aim, met in made["aims"]))
        lines.append(f"| {figure['name']} | " + " | ".join(cells) + " |")
    return [*lines, "", f"![{group['title']}]({PLOTS}/{_file(group)})"]


def _has_vm(group: dict[str, Any]) -> bool:
    return any(figure["vm"] for figure in group["figures"])


def _file(group: dict[str, Any]) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in group["title"].lower()).split()
    return "-".join(words) + ".svg"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"
