"""`pyhv bench snapshot --quick`: every part, every peer that is installed; pictures and page come from its samples."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from framework.linux import kernel
from framework.run import needs_kvm, no_traceback, pyhv

from hv.bench.figures import Aim, Figure, Group, Run, lines, measure, row
from hv.bench.plots import plot
from hv.bench.report import write_docs

pytestmark = [needs_kvm]

ROOT = not os.geteuid()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one run wrote."""
    kernel("micro")
    place = tmp_path_factory.mktemp("bench")
    before = leftovers()
    done = pyhv("bench", "snapshot", "--rounds", "1", "--quick", "--json", str(place / "data.json"),
                "--write-docs", str(place), timeout=250)
    no_traceback(done)
    assert done.returncode == 0, done.stderr
    (place / "said").write_bytes(done.stdout)
    assert leftovers() <= before
    return place


def leftovers() -> set[str]:
    found = {name for name in os.listdir("/tmp") if name.startswith("pyhv-bench-")}
    return found | {str(path) for path in Path("/sys/fs/cgroup").glob("*/pyhv-bench-*")}


def test_every_part_has_figures_of_all_who_are_here(measured: Path) -> None:
    data = json.loads((measured / "data.json").read_text())
    assert {group["part"] for group in data["groups"]} == {"restore", "pool", "create", "density", "migrate"}
    names = {figure["name"] for group in data["groups"] for figure in group["figures"]}
    expected = {"pyhv: first instruction", "pyhv: first answer at the console", "pyhv: first answer over vsock",
                "C program: first instruction", "pyhv snapshot restore, Linux: to its end", "hv.Pool: take()",
                "20 MiB changed, tracked: guest paused", "4 Linux clones, one process", "changes 20 MiB/s"}
    if shutil.which("qemu-system-x86_64"):
        expected |= {"QEMU microvm -incoming, tiny guest: first answer", "1 QEMU microvm, tiny guest"}
    expected |= {f"{name} run, busybox true" for name in ("runc", "crun") if ROOT and shutil.which(name)}
    assert expected <= names
    for group in data["groups"]:
        for figure in group["figures"]:
            assert figure["samples"] and all(value >= 0 for value in figure["samples"]), figure
    changed = next(group for group in data["groups"] if group["title"] == "Taking a snapshot: on disk")
    for figure in changed["figures"][1:]:
        assert 20 <= figure["samples"][0] < 24, "not what the guest changed"


def test_the_page_says_where_when_how_often_and_which_kvm(measured: Path) -> None:
    page, data = (measured / "performance.md").read_text(), json.loads((measured / "data.json").read_text())
    for words in (data["command"], data["date"], os.uname().release, "| KVM | n | median | p95 |"):
        assert words in page
    rows = [line for line in page.splitlines() if line.startswith("| hv.Pool: take()")]
    assert rows and all(f"| {'software' if data['software_kvm'] else 'hardware'} |" in line for line in rows)
    for group in data["groups"]:
        assert f"## {group['title']}" in page
    for picture in (measured / "performance").iterdir():
        assert f"](performance/{picture.name})" in page
        ElementTree.parse(picture)


def test_the_same_page_comes_from_kept_samples(measured: Path, tmp_path: Path) -> None:
    done = pyhv("bench", "snapshot", "--from", str(measured / "data.json"), "--write-docs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (measured / "said").read_bytes()
    assert (tmp_path / "performance.md").read_bytes() == (measured / "performance.md").read_bytes()


@pytest.mark.parametrize(("words", "said"), [
    (("--only", "restore,nothing"), b"no part 'nothing'"),
    (("--from", "/nowhere.json"), b"--from /nowhere.json: No such file"),
    (("--from", "/dev/null"), b"is not what --json writes"),
])
def test_what_can_not_be(words: tuple[str, ...], said: bytes) -> None:
    done = pyhv("bench", "snapshot", *words)
    no_traceback(done)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count(b"\n") == 1


def a_group(**samples: list[float]) -> dict[str, Any]:
    figures = []
    for name, values in samples.items():
        figure = Figure(name, "ms", Aim(2), Aim(2.5, "ratio"), vm=name != "c")
        figure.samples = values
        figures.append(figure)
    return Group("x", "A & B", "", figures, figures[-1]).data()


def test_ratios_are_of_pairs() -> None:
    group = a_group(ours=[2.0, 30.0, 6.0], c=[1.0, 10.0, 6.0])
    made = row(group["figures"][0], group["figures"][1])
    assert made["ratio"] == 2.0 and made["median"] == 6.0
    assert made["aims"] == [("median ≤ 2", False), ("ratio ≤ 2.5", True)]
    assert "[median ≤ 2: MISSED]  [ratio ≤ 2.5: met]" in lines(group)[2]


def test_every_run_is_sampled_once_per_round() -> None:
    one, two, three = (Figure(name, "ms") for name in "abc")
    order: list[str] = []
    measure([Run(lambda: order.append("x") or (1, 2), one, two), Run(lambda: order.append("y") or [3], three)], 4)
    assert [len(figure.samples) for figure in (one, two, three)] == [4, 4, 4]
    assert [sorted(order[at:at + 2]) for at in range(0, 10, 2)] == [["x", "y"]] * 5


def test_a_plot_has_a_dot_for_each_sample_in_its_place() -> None:
    group = a_group(ours=[0.0, 1.0, 10.0, 100.0], c=[1.0])
    svg = ElementTree.fromstring(plot(group["title"], group["figures"], "software KVM"))
    dots = [float(dot.get("cx", 0)) for dot in svg.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(dots) == 5 and dots[0] == dots[1] == dots[4] and abs((dots[2] - dots[1]) - (dots[3] - dots[2])) < 0.2
    assert {"A & B", "software KVM", "ours"} <= {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    from hv.errors import ConfigError

    data = {"command": "", "date": "", "host": "", "software_kvm": False, "groups": []}
    with pytest.raises(ConfigError, match="--write-docs"):
        write_docs(data, str(tmp_path / "none"))
