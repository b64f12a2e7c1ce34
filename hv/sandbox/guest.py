"""What a guest is told, before it becomes a template and after, and what it is asked while it runs.

    furnish      once, in the template: root file system, /proc, /sys, /dev and what is in it, the loopback
    introduce    each sandbox: random numbers, time, name, what else its bundle mounts, cards

To a guest whose ring 0 is emulated each round trip costs 10 ms and each mount as much, so everything that can be is in
the template, and the rest goes together. The template's root is a folder with nothing but the mount points; the file
server that a restored guest finds has the bundle's tree behind the same names (hv/devices/virtio/fs_state.py), and
tells what is there as the template's did with a timeout of 0: nothing of it is remembered. Driven by
tests/kvm/test_sandbox.py.
"""

from __future__ import annotations

__all__ = ["POINTS", "figures", "furnish", "home_of", "introduce", "listed", "vsock_of"]

import os
from time import monotonic, time_ns

from hv.errors import HvError
from hv.linux.mount import read_file_in
from hv.sandbox.agent import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    GuestAgent,
    words,
)
from hv.snapshot.agent import RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.program import Program
    from hv.container.spec import Spec
    from hv.devices.virtio.vsock import Vsock
    from hv.machine.machine import Machine
    from hv.sandbox.rootfs_tree import Tree

ENTROPY = 32                    # bytes: all that the kernel's pool holds (drivers/char/random.c, POOL_BITS)
PATIENCE = 60.0                 # s for all of it; mounting reads from the share
HOSTNAME_MOST = 64              # HOST_NAME_MAX
TAG = "root"                    # of the share
NEW_ROOT = "/newroot"
POINTS = ("dev", "proc", "sys")     # what is mounted in the template moves onto these
# mounts that the template has (guests/agent/init.c), as bundles have them: place -> kind, options that may differ
FURNITURE = {"/proc": "proc", "/sys": "sysfs", "/sys/fs/cgroup": "cgroup2", "/dev": "devtmpfs", "/dev/pts": "devpts",
             "/dev/shm": "tmpfs", "/dev/mqueue": "mqueue"}
SHM_SIZE = 64 << 20             # bytes; the engines' default
PLAIN = "/dev/.share"           # the share without what the guest mounts in it, for a moment
_PASSWD_MOST = 1 << 20
_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC
_HOSTNAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")


def introduce(machine: Machine, spec: Spec, tree: Tree, warn: Callable[[str], None]) -> None:
    """Give a restored guest its identity, root file system and network. HvError names what it could not do."""
    now = time_ns()
    needed: list[tuple[str, ...]] = [("entropy", os.urandom(ENTROPY).hex()),
                                     ("time", f"{now // 1_000_000_000}.{now % 1_000_000_000:09}")]
    if name := hostname_of(spec, warn):
        needed.append(("hostname", name))
    requests = [(request, False) for request in needed] + mounts(tree)
    requests += [(request, False) for request in (*cards(machine), *sysctls(spec))]
    agent = GuestAgent(machine)
    try:
        for (request, optional), error in zip(requests, try_all(agent, [row for row, _ in requests]), strict=True):
            if error is not None and not optional:
                raise HvError(f"the guest could not be set up: {' '.join(request)[:120]}: {error}")
    finally:
        agent.close()


def try_all(agent: GuestAgent, requests: list[tuple[str, ...]]) -> list[RefusedError | None]:
    """All requests at once; for each, what it failed with."""
    lines = [agent.request_line(*request) for request in requests]
    answers = agent._exchange(b"".join(lines), monotonic() + PATIENCE, len(lines), once=True).split("\n")
    found: list[RefusedError | None] = []
    for request, answer in zip(requests, answers, strict=True):
        try:
            agent.read_reply(request[0], answer)
            found.append(None)
        except RefusedError as error:
            found.append(error)
    return found


def hostname_of(spec: Spec, warn: Callable[[str], None]) -> str:
    """The name that the guest takes."""
    name: str = spec.hostname
    if name and not (_HOSTNAME.issuperset(name) and len(name) <= HOSTNAME_MOST):
        raise HvError(f"hostname {name!r:.80}", f"up to {HOSTNAME_MOST} letters, digits, - and .")
    if spec.domainname:
        warn("domainname is not set in a VM")
    return name


def furnish(agent: GuestAgent) -> None:
    """Make a guest that has just booted what a template is."""
    request = agent.mount_request
    agent.ask_all([request("virtiofs", TAG, NEW_ROOT), words("root", NEW_ROOT, *POINTS),
                   request("", "", "/sys", MS_REMOUNT | MS_BIND | MS_RDONLY | _SAFE),
                   request("tmpfs", "shm", "/dev/shm", MS_REMOUNT | _SAFE, f"mode=1777,size={SHM_SIZE}"),
                   ("address", "lo", "127.0.0.1/8")], PATIENCE)


def mounts(tree: Tree) -> list[tuple[tuple[str, ...], bool]]:
    """Requests for what the bundle mounts beyond the template; whether one may be refused."""
    request = GuestAgent.mount_request
    found = []
    for mount in tree.guest:
        if FURNITURE.get(mount.target) != mount.kind or mount.again:
            found.append((request(mount.kind, mount.source, mount.target, mount.flags, mount.data), mount.optional))
        elif mount.kind == "sysfs" and not mount.flags & MS_RDONLY:
            found.append((request("", "", mount.target, MS_REMOUNT | MS_BIND | _SAFE), False))
        elif mount.kind == "tmpfs" and mount.data not in ("", f"mode=1777,size={SHM_SIZE}", "mode=1777,size=65536k"):
            found.append((request("tmpfs", "shm", mount.target, MS_REMOUNT | mount.flags, mount.data), False))
    if tree.held:
        found.append((request("virtiofs", TAG, PLAIN), False))
        found += [(request("", PLAIN + path, path, MS_BIND | MS_REC), False) for path in tree.held]
        found.append((words("unmount", PLAIN), False))
    return found


def cards(machine: Machine) -> list[tuple[str, ...]]:
    """Requests that set up each card as its interface was."""
    found: list[tuple[str, ...]] = []
    for device in machine.devices.values():
        if device.KIND != "net":
            continue
        card: Any = device
        backend, mac = card.backend, card.mac.hex(":")
        if card.guest_mac != card.mac:
            found.append(("mac", card.guest_mac.hex(":"), mac))
            card.guest_mac = card.mac
        if getattr(backend, "mtu", 0):
            found.append(("mtu", mac, f"{backend.mtu}"))
        if getattr(backend, "address", ""):
            gateway = [backend.gateway] if backend.gateway else []
            found.append(("address", mac, f"{backend.address}/{backend.prefix}", *gateway))
    return found


def sysctls(spec: Spec) -> list[tuple[str, ...]]:
    """linux.sysctl, below the guest's /proc/sys."""
    return [words("write", f"/proc/sys/{path}", value) for _, path, value in spec.sysctl]


def vsock_of(machine: Machine) -> Vsock:
    """Its socket device, by which all is said."""
    device: Any = machine.devices["vsock0"]
    return device  # type: ignore[no-any-return]


def home_of(root: int, program: Program) -> str:
    """The user's directory as the image's /etc/passwd has it, where the environment does not say."""
    if any(word.startswith("HOME=") and len(word) > 5 for word in program.environment):
        return "/"
    number = str(program.uid).encode()
    for line in read_file_in(root, "/etc/passwd", _PASSWD_MOST).split(b"\n"):
        fields = line.split(b":")
        if len(fields) >= 6 and fields[2] == number:
            return fields[5].decode("utf-8", "surrogateescape") or "/"
    return "/"


def figures(machine: Machine) -> dict[str, Any]:
    """The guest's own figures, in the form of hv/container/cgroups/stats.py, and what the host gave it."""
    agent = GuestAgent(machine)
    try:
        found = agent.stats()
    finally:
        agent.close()
    used = found.memory_total - found.memory_available
    user, system = (int(seconds * 1e9) for seconds in (found.cpu_user, found.cpu_system))
    return {"cpu": {"usage": {"total": user + system, "user": user, "kernel": system}},
            "memory": {"usage": {"usage": used, "limit": found.memory_total}, "raw": {}},
            "pids": {"current": found.processes},
            "vm": {"memory": machine.config.memory, "cpus": machine.config.cpus, "uptime": found.uptime}}


def listed(machine: Machine) -> list[dict[str, Any]]:
    """The guest's processes."""
    agent = GuestAgent(machine)
    try:
        found = agent.processes()
    finally:
        agent.close()
    return [{"pid": row.pid, "ppid": row.ppid, "uid": row.uid, "state": row.state, "rss": row.rss, "cpu": row.cpu,
             "started": row.started, "command": row.command or [row.name]} for row in found]
