"""Many containers from parallel callers: none lost, nothing left, neither by commands nor by threads of one program."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle

from hv.container.runtime import Runtime

pytestmark = container

CALLERS = 8
CONTAINERS = 200
BY_LIBRARY = 40


def side_by_side(names: list[str], work: Callable[[str], None]) -> None:
    """`work` for every name, from CALLERS threads; what went wrong is said."""
    failures: list[str] = []
    rest = iter(names)
    lock = threading.Lock()

    def caller() -> None:
        while True:
            with lock:
                name = next(rest, None)
            if name is None or failures:
                return
            try:
                work(name)
            except Exception as error:
                failures.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]


def mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


def in_cgroups(prefix: str) -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/pyhv-{prefix}*")]


def test_two_hundred_by_commands(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()
    names = [f"{bundle.name}-{number}" for number in range(CONTAINERS)]
    before = mounts()

    def command(*words: str) -> Callable[[str], None]:
        def work(name: str) -> None:
            errors = bundle.folder / f"errors-{name}"       # a file: containers would hold a pipe open
            with errors.open("w") as file:
                done = bundle.call(*words, name, capture_output=False, stdout=subprocess.DEVNULL, stderr=file)
            assert done.returncode == 0, errors.read_text()

        return work

    def listed() -> dict[str, dict[str, object]]:
        text = bundle.call("list", "--format", "json").stdout
        return {row["id"]: row for row in json.loads(text) or []}       # null for none, as runc says it

    side_by_side(names, command("create"))
    rows = listed()
    assert set(rows) == set(names)
    assert {row["status"] for row in rows.values()} == {"created"}
    assert len({row["pid"] for row in rows.values()}) == CONTAINERS
    side_by_side(names, command("start"))
    rows = listed()
    assert {row["status"] for row in rows.values()} == {"running"}
    for row in rows.values():
        pid = row["pid"]
        assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001000\x00"
        assert f"/pyhv-{row['id']}\n" in Path(f"/proc/{pid}/cgroup").read_text()
    side_by_side(names, lambda name: bundle.call("kill", name, "KILL").check_returncode())
    end = time.monotonic() + 20
    while (left := {name for name, row in listed().items() if row["status"] != "stopped"}) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
    side_by_side(names, command("delete"))
    assert not listed()
    assert not in_cgroups(bundle.name)
    assert not any(Path(f"/proc/{row['pid']}/cmdline").exists() and
                   b"sleep" in Path(f"/proc/{row['pid']}/cmdline").read_bytes() for row in rows.values())
    assert mounts() == before


def at_once(made: Bundle, *words: str) -> list[int]:
    """The exit codes of the same command from all callers."""
    codes: list[int] = []
    silent: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    threads = [threading.Thread(target=lambda: codes.append(made.call(*words, **silent).returncode))
               for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(codes)


def test_one_name_from_all_callers(bundle: Bundle) -> None:
    """Exactly one gets it; what it made is whole."""
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()
    for _ in range(5):
        assert at_once(bundle, "create", bundle.name) == [0] + [1] * (CALLERS - 1)
        assert bundle.status() == "created"
        assert at_once(bundle, "delete", "--force", bundle.name) == [0] * CALLERS
        bundle.gone()


def test_create_and_delete_race(bundle: Bundle) -> None:
    """`delete --force` at any moment of a create: afterwards there is a container, or nothing at all."""
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()
    silent: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for turn in range(12):
        creator = threading.Thread(target=lambda: bundle.call("create", bundle.name, **silent))
        creator.start()
        time.sleep(0.005 * turn)
        assert bundle.call("delete", "--force", bundle.name).returncode == 0
        creator.join()
        if bundle.status() != "gone":
            assert bundle.status() == "created"
            assert bundle.call("delete", "--force", bundle.name).returncode == 0
        bundle.gone()


def test_from_threads_of_one_program(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["sh", "-c", "exit 7"]
    bundle.write()
    runtime = Runtime(str(bundle.state))
    descriptors = set(os.listdir("/proc/self/fd"))
    codes: list[int] = []

    def work(name: str) -> None:
        record = runtime.create(name, str(bundle.folder), start=True)
        _, status = os.waitpid(int(record.data["pid"]), 0)
        codes.append(os.waitstatus_to_exitcode(status))
        runtime.delete(name)

    side_by_side([f"{bundle.name}-{number}" for number in range(BY_LIBRARY)], work)
    assert codes == [7] * BY_LIBRARY
    runtime.close()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert not in_cgroups(bundle.name)
    assert runtime.list() == []
