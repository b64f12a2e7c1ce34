"""Which cgroup hierarchies this host has, where they are mounted, and where we are in them (man 7 cgroups).

A host has version 1 hierarchies (one or more controllers each, or a name), the version 2 hierarchy, or both at once
(hybrid). All comes from the mount table: /proc/cgroups tells of controllers that may be mounted nowhere. Driven by
tests/unit/test_cgroups_detect.py and tests/root/test_cgroups.py.
"""

from __future__ import annotations

__all__ = ["Layout", "clean", "detect", "own_paths", "parse_mounts", "parse_own"]

import os

# kernel/cgroup: include/linux/cgroup_subsys.h. Other words among the options of a version 1 mount are flags.
_CONTROLLERS = frozenset((b"cpuset", b"cpu", b"cpuacct", b"blkio", b"memory", b"devices", b"freezer", b"net_cls",
                          b"perf_event", b"net_prio", b"hugetlb", b"pids", b"rdma", b"misc", b"dmem"))


_READ_MOST = 1 << 16


class Layout:
    """Mount points: `v1` by controller (or name=NAME), `v2` or "". `roots`: which group is seen there, if not /."""

    __slots__ = ("roots", "v1", "v2")

    def __init__(self, v1: dict[str, str], v2: str, roots: dict[str, str] | None = None) -> None:
        self.v1, self.v2, self.roots = v1, v2, roots or {}

    def mounts(self) -> dict[str, str]:
        """All mount points, that of version 2 under the name ""."""
        return self.v1 | {"": self.v2} if self.v2 else self.v1


def detect() -> Layout:
    """The hierarchies as this process sees them."""
    table, parts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC), []
    try:
        while part := os.read(table, _READ_MOST):
            parts.append(part)
    finally:
        os.close(table)
    return parse_mounts(b"".join(parts))


def parse_mounts(table: bytes) -> Layout:
    """Find the cgroup mounts in a /proc/PID/mountinfo (man 5 proc_pid_mountinfo); the first of a hierarchy counts."""
    v1: dict[str, str] = {}
    roots: dict[str, str] = {}
    v2 = ""
    for line in table.split(b"\n"):
        if b" - cgroup" not in line:
            continue
        place, _, rest = line.partition(b" - ")
        kind, _, options = rest.split(b" ", 2)
        root, point = place.split(b" ", 5)[3:5]
        if kind == b"cgroup2":
            if not v2:
                v2, roots[""] = _unescape(point), _unescape(root)
        elif kind == b"cgroup":
            for word in options.split(b","):
                if word in _CONTROLLERS or word.startswith(b"name="):
                    name = os.fsdecode(word)
                    if name not in v1:
                        v1[name], roots[name] = _unescape(point), _unescape(root)
    return Layout(v1, v2, roots)


def _unescape(path: bytes) -> str:
    if b"\\" in path:
        for octal, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
            path = path.replace(octal, byte)
    return os.fsdecode(path)


def own_paths(pid: int | str = "self") -> dict[str, str]:
    """Where process `pid` is in each hierarchy (/proc/PID/cgroup); comounted controllers are listed one by one."""
    with open(f"/proc/{pid}/cgroup", "rb", 0) as file:
        return parse_own(file.read())


def parse_own(table: bytes) -> dict[str, str]:
    """The same from that file's text."""
    paths: dict[str, str] = {}
    for line in table.split(b"\n"):
        if line:
            _, names, path = line.split(b":", 2)
            for name in names.split(b","):
                paths[os.fsdecode(name)] = os.fsdecode(path)
    return paths


def clean(path: str) -> str:
    """`path` as an absolute one without . and .., which can't lead above the hierarchy's root."""
    return "/" + os.path.normpath("/" + path).lstrip("/")
