"""`pyhv bench io --quick`: every group, every peer that is installed, and one line for each that is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from framework.run import needs_kvm, no_traceback, pyhv

from hv.bench.io_disk import DAEMON
from hv.bench.io_guest import QEMU
from hv.bench.io_share import DAEMON as SHARE_DAEMON

pytestmark = [needs_kvm]


def peers() -> dict[str, set[str]]:
    """Who should be in each group, by its first word."""
    qemu = {"QEMU microvm"} if shutil.which(QEMU) else set()
    disks = {"pyhv", "host, one thread of preads", *qemu, *(f"{name}, iothread" for name in qemu)}
    if shutil.which(DAEMON):
        disks |= {f"{name}, vhost-user" for name in ("pyhv", *qemu)}
    served = {"virtiofsd"} if any(map(shutil.which, SHARE_DAEMON)) and not os.geteuid() else set()
    found = {"Disk": disks, "Console": {"pyhv", *qemu}, "Shared folder": {"pyhv", "host, plain calls", *served},
             "vsock": {"pyhv", "host, a socket pair"}}
    if shutil.which("ip") and not os.geteuid():
        found["Network"] = {"pyhv", *qemu}
    return found


def leftovers() -> set[str]:
    return {name for name in os.listdir("/tmp") if name.startswith("pyhv-bench-")}


def test_all_groups_with_all_peers(tmp_path: Path) -> None:
    file = tmp_path / "io.json"
    before = leftovers()
    done = pyhv("bench", "io", "--rounds", "1", "--quick", "--json", str(file), timeout=100)
    no_traceback(done)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    for case in found["cases"]:
        assert case["n"] == 1 and case["median"] > 0, case
    groups: dict[str, dict[str, set[str]]] = {}
    for case in found["cases"]:
        groups.setdefault(case["group"].partition(":")[0], {}).setdefault(case["group"], set()).add(case["name"])
    for kind, expected in peers().items():
        for title, names in groups[kind].items():
            assert names == expected, title
            assert title.encode() in done.stdout
    assert {kind: len(rows) for kind, rows in groups.items() if kind != "Network"} == {
        "Disk": 3, "Console": 1, "Shared folder": 5, "vsock": 3}
    assert b"At rest: all devices" in done.stdout
    assert leftovers() <= before, "the folder stays behind"


def test_peers_that_are_missing_are_named_with_their_packages(tmp_path: Path) -> None:
    done = pyhv("bench", "io", "--rounds", "1", "--quick", timeout=100, env={**os.environ, "PATH": str(tmp_path)})
    no_traceback(done)
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode().splitlines()
    assert f"pyhv: no {QEMU} here, its figures are left out (Debian: apt-get install qemu-system-x86)" in said
    assert f"pyhv: no {DAEMON} here, its figures are left out (Debian: apt-get install qemu-system-common)" in said
    assert any("iproute2" in line for line in said)
    assert b"QEMU" not in done.stdout and b"Disk: sequential" in done.stdout and b"vsock: one stream" in done.stdout
