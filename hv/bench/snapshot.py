"""`pyhv bench snapshot`: restore, hand out, save, keep and move VMs, beside C, runc, crun and QEMU in the same rounds.

    snapshot_guest.py     the guests            snapshot_restore.py   restoring         snapshot_pool.py   pools
    snapshot_create.py    taking snapshots      snapshot_density.py   many idle VMs     snapshot_migrate.py

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["PARTS", "bench_snapshot"]

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from hv.bench.figures import lines
from hv.bench.harness import write_json
from hv.bench.report import write_docs, write_plots
from hv.bench.snapshot_create import create_groups
from hv.bench.snapshot_density import QUICK, Amounts, density_groups
from hv.bench.snapshot_guest import Guests
from hv.bench.snapshot_migrate import migrate_groups
from hv.bench.snapshot_pool import pool_groups
from hv.bench.snapshot_restore import restore_groups
from hv.errors import ConfigError
from hv.kvm.system import Kvm
from hv.softkvm.detect import is_software

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.bench.figures import Group

PARTS = ("restore", "pool", "create", "density", "migrate")
_HAND_OUTS = 200        # at least: p99 is to mean something


def bench_snapshot(rounds: int, quick: bool, only: str | None, file: str | None, plots: str | None, docs: str | None,
                   source: str | None) -> int:
    """Run the parts, print tables; samples to `file`, pictures to `plots`, the page to `docs`.

    `quick`: few and small, to see that it works. `source`: a `file` of before instead of measuring.
    """
    data = _loaded(source) if source else _measured(rounds, quick, _parts(only))
    print(data["host"] + (", software KVM" if data["software_kvm"] else ""))
    for group in data["groups"]:
        print("\n".join(lines(group)))
    if file is not None:
        write_json(file, data)
    if plots is not None:
        write_plots(data, plots)
    if docs is not None:
        write_docs(data, docs)
    return 0


def _parts(only: str | None) -> list[str]:
    if only is None:
        return list(PARTS)
    asked = only.split(",")
    for part in asked:
        if part not in PARTS:
            raise ConfigError(f"--only {only}: there is no part {part!r}", f"there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in asked]


def _measured(rounds: int, quick: bool, parts: list[str]) -> dict[str, Any]:
    with Kvm() as kvm:
        software = is_software(kvm)
    options = ["--quick"] * quick + ["--only " + ",".join(parts)] * (len(parts) < len(PARTS))
    data: dict[str, Any] = {
        "host": f"{os.cpu_count()} processors ({_processor()}), load {os.getloadavg()[0]:.2f} at the start, Linux "
                f"{os.uname().release}, Python {sys.version.split()[0]}",
        "date": time.strftime("%Y-%m-%d"), "software_kvm": software, "rounds": rounds,
        "command": " ".join(["pyhv bench snapshot", f"--rounds {rounds}", *options])}
    groups: list[Group] = []
    with tempfile.TemporaryDirectory(prefix="pyhv-bench-") as place:
        guests = Guests(Path(place))
        for part in parts:
            if part == "restore":
                groups += restore_groups(guests, rounds)
            elif part == "pool":
                groups += pool_groups(guests, rounds if quick else max(rounds, _HAND_OUTS))
            elif part == "create":
                groups += create_groups(guests, rounds)
            elif part == "density":
                groups += density_groups(guests, QUICK, 1) if quick else density_groups(guests, Amounts())
            else:
                groups += migrate_groups(guests, rounds)
    data["groups"] = [group.data() for group in groups]
    return data


def _loaded(path: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text())
        if not isinstance(data["groups"], list):
            raise TypeError
    except OSError as error:
        raise ConfigError(f"--from {path}: {error.strerror}", "a file that --json wrote") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--from {path}: is not what --json writes", "a file that --json wrote") from None
    return data


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
