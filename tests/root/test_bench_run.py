"""`pyhv bench run` runs through, keeps its samples, leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

from framework.bundle import container
from framework.engines import needs
from framework.run import pyhv

pytestmark = container


def run(part: str, file: Path) -> dict[str, dict[str, list[float]]]:
    """Figures by table and name."""
    done = pyhv("bench", "run", "--rounds", "1", "--quick", "--only", part, "--json", str(file), timeout=280)
    assert done.returncode == 0, done.stderr
    assert b"skopeo is not" not in done.stderr
    assert "pyhv-runs" not in Path("/proc/self/mounts").read_text()
    return {group["title"]: {figure["name"]: figure["samples"] for figure in group["figures"]}
            for group in json.loads(file.read_text())["groups"]}


@needs("runc", "podman")
def test_starting(tmp_path: Path) -> None:
    found = run("start", tmp_path / "samples.json")
    alone = found["busybox true, whole process, no network"]
    assert {"pyhv run --container, no network", "runc run, the same files"} <= set(alone)
    assert all(len(samples) == 1 and samples[0] > 0 for figures in found.values() for samples in figures.values())


@needs("skopeo", "docker-registry", "podman")
def test_images(tmp_path: Path) -> None:
    found = run("images", tmp_path / "samples.json")
    assert len(found) == 3
    assert all(len(samples) == 1 and samples[0] > 0 for figures in found.values() for samples in figures.values())


def test_parts_that_are_not_there() -> None:
    done = pyhv("bench", "run", "--only", "start,nothing")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"'nothing'" in done.stderr


