"""Containers in a guest, step by step, for framework/guest_python.py: the real runtime as a library.

Their groups are version 2's. Each function returns what it saw, in what JSON can say.
"""

from __future__ import annotations

import os
import time

from hv.container.runtime import Runtime
from hv.container.state import Record
from hv.errors import HvError
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TOP = "/sys/fs/cgroup"
STATE, BUNDLES, ROOTFS = "/run/state", "/run/bundles", "/box"
RUNTIME = Runtime(STATE)
SLEEP = "exec sleep 1000"
_PATIENCE = 60.0        # seconds; a busy host slows the guest down


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until condition() is true; what it gave."""
    end = time.monotonic() + _PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"it did not come: {what}"
        time.sleep(0.02)
    return found


def read(group: str, leaves: list[str]) -> dict[str, str]:
    """Control files of the group at `group` (below the hierarchy's root)."""
    found = {}
    for leaf in leaves:
        with open(f"{TOP}/{group}/{leaf}") as file:
            found[leaf] = file.read().strip()
    return found


def groups() -> list[str]:
    """All groups but the root, and what else is left of containers."""
    left = [folder[len(TOP):] for folder, _, _ in os.walk(TOP) if folder != TOP]
    left += os.listdir(STATE) if os.path.isdir(STATE) else []
    with open("/proc/self/mounts") as file:
        return left + [line for line in file.read().splitlines() if ROOTFS in line]


def remove(groups: list[str]) -> None:
    """Remove empty groups."""
    for group in groups:
        os.rmdir(f"{TOP}/{group}")


def create(name: str, script: str = SLEEP, resources: dict[str, Any] | None = None, path: str = "",
           capabilities: list[str] | None = None, cgroup_options: list[str] | None = None, start: bool = True,
           output: bool = False) -> str:
    """Make and start a container; "" or why it can't be. `output`: what it prints goes to a file."""
    from hv.cli.oci_spec import default_config

    config = default_config()
    config["process"] |= {"args": ["sh", "-c", script], "terminal": False}
    for kind in config["process"]["capabilities"]:
        config["process"]["capabilities"][kind] += capabilities or []
    config["root"] = {"path": ROOTFS, "readonly": False}
    config["linux"]["resources"] |= resources or {}
    if path:
        config["linux"]["cgroupsPath"] = path
    if cgroup_options:
        next(row for row in config["mounts"] if row["type"] == "cgroup")["options"] = list(cgroup_options)
    bundle = f"{BUNDLES}/{name}"
    os.makedirs(bundle, exist_ok=True)
    with open(f"{bundle}/config.json", "w") as file:
        file.write(dumps(config))
    fd = os.open(f"{bundle}/output" if output else os.devnull, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in kept:
            os.dup2(fd, number)
        RUNTIME.create(name, bundle)
        if start:
            RUNTIME.start(name)
    except HvError as error:
        return str(error)
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(fd)
    return ""


def printed(name: str) -> str:
    """What the container has printed so far."""
    with open(f"{BUNDLES}/{name}/output") as file:
        return file.read()


def wait_for(name: str, text: str) -> None:
    """Until the container has printed this."""
    until(lambda: text in printed(name), f"{text} of {name}, which printed {printed(name)!r}")


def record_of(name: str) -> Record:
    return Record(STATE, name).load()


def end(name: str) -> list[str]:
    """Delete the container, whatever it does; what is left of it then."""
    pid = record_of(name).pid
    RUNTIME.delete(name, force=True)
    if pid:
        os.waitpid(pid, 0)
    return [left for left in groups() if name in left]


def status(name: str) -> str:
    """created, running, paused, stopped."""
    return str(RUNTIME.state(name)["status"])


def stats(name: str) -> dict[str, Any]:
    """As `events --stats` prints them."""
    return RUNTIME.stats(name)


def update(name: str, resources: dict[str, Any]) -> str:
    """New limits, saved; "" or why they can't be."""
    from hv.container.update import update as change

    record = record_of(name)
    with open(record.config) as file:
        config = loads(file.read())
    try:
        change(RUNTIME.group(record), config, resources)
    except HvError as error:
        return str(error)
    record.save_config(dumps(config).encode())
    return ""


def execute(name: str, script: str) -> dict[str, Any]:
    """A program in the running container; its exit code, output and group."""
    path = f"{BUNDLES}/{name}/exec"
    fd, kept = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), os.dup(1)
    try:
        os.dup2(fd, 1)
        pid = RUNTIME.exec(name, {"args": ["sh", "-c", script], "cwd": "/"})
    except HvError as error:
        return {"refused": str(error)}
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(fd)
    _, code = os.waitpid(pid, 0)
    with open(path) as file:
        return {"code": os.waitstatus_to_exitcode(code), "output": file.read()}


def errno_of(attempt: Callable[..., Any], names: dict[int, str], *arguments: Any) -> str:
    try:
        attempt(*arguments)
    except OSError as error:
        return names[error.errno or 0]
    return "ok"


def forked(group: str, work: Callable[[], Any]) -> Any:
    """work() in a process that is in `group`; what it returned, through JSON."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with open(f"{group}/cgroup.procs", "w") as file:
                file.write("0")
            row = {"value": work()}
        except BaseException as error:
            import traceback

            row = {"error": f"{error}\n{traceback.format_exc()}"}
        os.write(into, dumps(row).encode())
        os._exit(0)
    os.close(into)
    with open(out, "rb") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    row = loads(text.decode())
    assert "error" not in row, row["error"]
    return row["value"]
