"""`pyhv bench container` runs through, keeps its samples, leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from framework.bundle import container
from framework.run import pyhv

from hv.bench import container as bench
from hv.errors import ConfigError

pytestmark = container


def nothing_left() -> bool:
    return (not list(Path("/sys/fs/cgroup").glob(f"*/pyhv-bench-{os.getpid()}*"))
            and "pyhv-bench" not in Path("/proc/self/mounts").read_text())


def test_start_up(tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    done = pyhv("bench", "container", "--rounds", "1", "--containers", "0", "--json", str(file))
    assert done.returncode == 0, done.stderr
    medians = {row["name"]: row["median"] for row in json.loads(file.read_text())["cases"]}
    assert medians["pyhv-runtime run"] > 0 and medians["hv.container, warm"] > 0
    assert nothing_left()


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SETTLE_MOST", 0.0)
    bundle = bench.make_bundle(tmp_path)
    bench.set_program(bundle, "/bin/sleep", "1000")
    peer = bench.Peer("pyhv-runtime", [bench.runtime()], tmp_path / "state")
    row = bench.at_rest(peer, bundle, 2)
    assert row["processes"] == 1 and 0 < row["pss_kb"] < 2000 and row["cgroup_kb"] > 0
    assert not list((tmp_path / "state").iterdir()) and nothing_left()


def test_not_as_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="root"):
        bench.bench_container(1, 0, None)
