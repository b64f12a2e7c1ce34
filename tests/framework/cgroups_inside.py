"""What tests/kvm/test_cgroups_in_a_guest.py does in the guest, where cgroup version 2 is all there is.

Each function looks at the kernel's own files, and returns what it saw. Single steps: framework/guest_containers.py.
"""

from __future__ import annotations

__all__ = ["below_a_busy_group", "command", "cost_model", "create", "delegated", "device_program", "end", "execute",
           "freezing", "groups", "hierarchies", "huge_pages", "kernel_log", "kill_all", "on_another_processor",
           "out_of_memory", "read", "read_disk", "remove", "spinning", "stats", "update", "wait_for"]

import os
import time

from framework.guest_containers import (
    ROOTFS,
    RUNTIME,
    STATE,
    TOP,
    create,
    end,
    errno_of,
    execute,
    forked,
    groups,
    read,
    record_of,
    remove,
    stats,
    status,
    until,
    update,
    wait_for,
)

from hv.container.runtime import Runtime
from hv.errors import StateError
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PR_SET_DUMPABLE = 4         # include/uapi/linux/prctl.h


def hierarchies() -> dict[str, Any]:
    """What is mounted, and what the root's children get."""
    from hv.container.cgroups.detect import detect

    layout = detect()
    return {"v1": layout.v1, "v2": layout.v2} | read("", ["cgroup.controllers", "cgroup.subtree_control"])


def spinning(name: str, seconds: float) -> dict[str, Any]:
    """What share of a processor a process in the container's group gets, and how often it was held up."""
    def work() -> float:
        began, used = time.monotonic(), time.process_time()
        while time.monotonic() - began < seconds:
            for _ in range(10000):
                pass
        return (time.process_time() - used) / (time.monotonic() - began)

    before = RUNTIME.stats(name)["cpu"]["throttling"].get("throttledPeriods", 0)
    share = forked(f"{TOP}/pyhv-{name}", work)
    after = RUNTIME.stats(name)["cpu"]["throttling"]
    return {"share": share, "held up": after.get("throttledPeriods", 0) - before, "throttling": after}


def out_of_memory(name: str, script: str, resources: dict[str, Any]) -> dict[str, Any]:
    """What `events` prints about a container that eats more than it may, and how it ended."""
    from hv.container.events import watch

    refused = create(name, script, resources, start=False)
    assert not refused, refused
    lines, state = [], {"started": False}

    def alive() -> bool:
        if not state["started"]:
            state["started"] = True
            RUNTIME.start(name)
        return status(name) != "stopped"

    for line in watch(RUNTIME.group(record_of(name)), name, 60, alive):
        lines.append(line)
    events = read(f"pyhv-{name}", ["memory.events"])["memory.events"]
    code = RUNTIME.wait(name, 10)
    return {"lines": lines, "code": code, "events": dict(row.split() for row in events.splitlines()), "left": end(name)}


def freezing(name: str) -> dict[str, Any]:
    """How far a process that counts gets while its container is paused, and after it was resumed."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        with open(f"{TOP}/pyhv-{name}/cgroup.procs", "w") as file:
            file.write("0")
        while True:
            os.write(into, b".")
            time.sleep(0.02)
    os.close(into)

    def came() -> int:
        os.set_blocking(out, False)
        try:
            return len(os.read(out, 1 << 16))
        except BlockingIOError:
            return 0

    try:
        until(came, "it counts")
        RUNTIME.pause(name, True)
        seen: dict[str, Any] = {"paused": status(name)} | read(f"pyhv-{name}", ["cgroup.freeze", "cgroup.events"])
        came()
        time.sleep(0.5)
        seen["ran"] = came()
        try:
            RUNTIME.pause(name, True)
        except StateError as error:
            seen["again"] = str(error)
        RUNTIME.pause(name, False)
        seen |= {"resumed": status(name), "events": read(f"pyhv-{name}", ["cgroup.events"])["cgroup.events"]}
        until(came, "it counts on")
        return seen
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(out)


def kill_all(name: str, signal: int = 9, paused: bool = False) -> dict[str, Any]:
    """Kill everything in the container; who was there before, and is there after its end."""
    group = RUNTIME.group(record_of(name))
    if paused:
        RUNTIME.pause(name, True)
    before = len(group.pids())
    RUNTIME.kill(name, signal, everyone=True)
    until(lambda: not group.pids(), "all have ended")
    code = RUNTIME.wait(name, 10)
    return {"before": before, "status": status(name), "code": code}


def device_program(rules: list[list[Any]]) -> dict[str, Any]:
    """What a process may do in a group with these device rules alone."""
    import errno
    from stat import S_IFCHR

    from hv.container.cgroups.devices_bpf import attach

    path = f"{TOP}/devices"
    os.mkdir(path)
    try:
        attach(path, [tuple(rule) for rule in rules])       # type: ignore[misc]
        tries: dict[str, Callable[[], Any]] = {
            "make null": lambda: os.mknod("/run/null", S_IFCHR | 0o666, os.makedev(1, 3)),
            "make zero": lambda: os.mknod("/run/zero", S_IFCHR | 0o666, os.makedev(1, 5)),
            "read zero": lambda: os.close(os.open("/dev/zero", os.O_RDONLY)),
            "write zero": lambda: os.close(os.open("/dev/zero", os.O_WRONLY)),
            "read null": lambda: os.close(os.open("/dev/null", os.O_RDONLY))}
        return forked(path, lambda: {name: errno_of(attempt, errno.errorcode) for name, attempt in tries.items()})
    finally:
        for leaf in ("null", "zero"):
            if os.path.lexists(f"/run/{leaf}"):
                os.unlink(f"/run/{leaf}")
        os.rmdir(path)


def kernel_log(name: str) -> dict[str, str]:
    """How a process in the container's group may open /dev/kmsg, whose number is 1:11."""
    import errno

    def attempt(flags: int) -> None:
        os.close(os.open("/dev/kmsg", flags))

    def work() -> dict[str, str]:
        return {word: errno_of(attempt, errno.errorcode, flags)
                for word, flags in (("read", os.O_RDONLY), ("write", os.O_WRONLY))}

    return forked(f"{TOP}/pyhv-{name}", work)      # type: ignore[no-any-return]


def huge_pages(name: str, sizes: list[int]) -> dict[str, str]:
    """Whether a process in the container's group can have so many bytes of huge pages."""
    import errno
    import mmap

    def attempt(size: int) -> None:
        mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x40000).close()    # MAP_HUGETLB

    def work() -> dict[str, str]:
        return {str(size): errno_of(attempt, errno.errorcode, size) for size in sizes}

    return forked(f"{TOP}/pyhv-{name}", work)      # type: ignore[no-any-return]


def read_disk(name: str, size: int) -> dict[str, Any]:
    """How long a process in the container's group takes to read from the disk, past the cache."""
    import mmap

    def work() -> float:
        fd = os.open("/dev/vda", os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 1 << 16)
        began, got = time.monotonic(), 0
        while got < size:
            got += os.readv(fd, [buffer])
        return time.monotonic() - began

    numbers = os.stat("/dev/vda").st_rdev
    return {"seconds": forked(f"{TOP}/pyhv-{name}", work), "blkio": RUNTIME.stats(name)["blkio"],
            "device": [os.major(numbers), os.minor(numbers)]}


def below_a_busy_group(path: str, resources: dict[str, Any]) -> dict[str, Any]:
    """Containers, without and with limits, whose group lies below one with a process of its own."""
    above = os.path.dirname(f"{TOP}{path}")
    os.makedirs(above)
    pid = os.fork()
    if not pid:
        time.sleep(1000)
        os._exit(0)
    try:
        with open(f"{above}/cgroup.procs", "w") as file:
            file.write(str(pid))
        seen: dict[str, Any] = {"without": create("poor", path=path)}
        if not seen["without"]:
            seen["left"] = end("poor")
        seen["with"] = create("busy", resources=resources, path=path)
        seen["groups"] = [group for group in groups() if "box" not in group.split("-")]
        return seen | read(os.path.dirname(path), ["cgroup.type", "cgroup.subtree_control"])
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.rmdir(above)


def cost_model(device: str) -> None:
    """Let the kernel weigh what groups want of this disk (cgroup-v2.rst, io.cost.qos)."""
    with open(f"{TOP}/io.cost.qos", "w") as file:
        file.write(f"{device} enable=1")


def command(words: list[str], checkout: str) -> dict[str, Any]:
    """The runtime's own command, on the containers of this process; exit code and output."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(into, 1)
        os.dup2(into, 2)
        python = os.readlink("/proc/self/exe")
        os.execv(python, [python, "-ISE", f"{checkout}/bin/pyhv-runtime", "--root", STATE, *words])
    os.close(into)
    with open(out, "rb") as stream:
        text = stream.read()
    _, code = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(code), "output": text.decode()}


def delegated(name: str, user: int, resources: dict[str, Any]) -> dict[str, Any]:
    """A container made by `user`, to whom root has given the group /user; what its files say."""
    from hv.linux.creds import prctl

    path = f"{TOP}/user"
    os.makedirs(f"{path}/session")
    with open(f"{TOP}/cgroup.subtree_control", "w") as file:
        file.write("+pids +memory")
    for place in (path, f"{path}/cgroup.procs", f"{path}/cgroup.subtree_control", f"{path}/session",
                  f"{path}/session/cgroup.procs"):
        os.chown(place, user, user)     # cgroup-v2.rst, Delegation, Model of Delegation
    os.makedirs(f"/run/{user}", exist_ok=True)
    os.chown(f"/run/{user}", user, user)

    def work() -> dict[str, Any]:
        os.setgid(user)
        os.setuid(user)
        prctl(PR_SET_DUMPABLE, 1)       # as a program that this user has started; else /proc/self is root's
        return _as_user(name, f"/run/{user}", resources)

    try:
        return forked(f"{path}/session", work) | {"left": os.listdir(f"/run/{user}/state")}
    finally:
        for place in (f"{path}/session", path):
            os.rmdir(place)


def _as_user(name: str, place: str, resources: dict[str, Any]) -> dict[str, Any]:
    from hv.cli.oci_spec import _rootless, default_config

    config = default_config()
    _rootless(config)
    config["process"] |= {"args": ["sleep", "1000"], "terminal": False}
    config["root"] = {"path": ROOTFS, "readonly": True}
    config["linux"] |= {"resources": resources}
    os.mkdir(f"{place}/bundle")
    with open(f"{place}/bundle/config.json", "w") as file:
        file.write(dumps(config))
    runtime = Runtime(f"{place}/state")
    runtime.create(name, f"{place}/bundle", start=True)
    try:
        seen: dict[str, Any] = read(f"user/pyhv-{name}", ["pids.max", "memory.max", "cgroup.procs"])
        runtime.pause(name, True)
        seen["paused"] = runtime.state(name)["status"]
        return seen
    finally:
        pid = int(runtime.state(name)["pid"])
        runtime.delete(name, force=True)
        os.waitpid(pid, 0)


def on_another_processor(name: str) -> dict[str, Any]:
    """The container is moved to the second processor, which runs meanwhile only: the guest is slow with two."""
    def turn(on: int) -> None:
        with open("/sys/devices/system/cpu/cpu1/online", "w") as file:
            file.write(str(on))

    def where() -> list[str]:
        with open(f"/proc/{record_of(name).pid}/status") as file:
            allowed = next(line.split()[1] for line in file if line.startswith("Cpus_allowed_list"))
        return [allowed, *read(f"pyhv-{name}", ["cpuset.cpus", "cpuset.cpus.effective"]).values()]

    seen: dict[str, Any] = {"before": where()}
    turn(1)
    try:
        seen["refused"] = update(name, {"cpu": {"cpus": "1"}})
        seen["moved"] = where()
        seen["figures"] = RUNTIME.stats(name)["cpuset"]["cpus"]
        update(name, {"cpu": {"cpus": "0"}})
        seen["back"] = where()
    finally:
        turn(0)
    return seen
