"""Figures of a container's groups in the shape of `runc events --stats`, for both versions.

What a kernel does not count is left out, as there. Version 2 figures are turned into version 1's units: microseconds to
nanoseconds, swap alone to memory and swap. Driven by tests/unit/test_cgroups_stats.py and tests/root/test_cgroups.py.
"""

from __future__ import annotations

__all__ = ["collect"]

import os

from hv.container.cgroups.folder import Folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NO_LIMIT = (1 << 64) - 1
_CPUSET_FLAGS = ("cpu_exclusive", "mem_hardwall", "mem_exclusive", "memory_migrate", "memory_spread_page",
                 "memory_spread_slab", "memory_pressure", "sched_load_balance", "sched_relax_domain_level")
# runc's names; the files are blkio.bfq.FILE or blkio.FILE
_BLKIO = (("ioServiceBytesRecursive", "io_service_bytes_recursive"), ("ioServicedRecursive", "io_serviced_recursive"),
          ("ioQueueRecursive", "io_queued_recursive"), ("ioServiceTimeRecursive", "io_service_time_recursive"),
          ("ioWaitTimeRecursive", "io_wait_time_recursive"), ("ioMergedRecursive", "io_merged_recursive"),
          ("ioTimeRecursive", "time_recursive"), ("sectorsRecursive", "sectors_recursive"))
# io.stat (version 2): key -> where it counts, and as what
_IO_STAT = {"rbytes": ("ioServiceBytesRecursive", "Read"), "wbytes": ("ioServiceBytesRecursive", "Write"),
            "dbytes": ("ioServiceBytesRecursive", "Discard"), "rios": ("ioServicedRecursive", "Read"),
            "wios": ("ioServicedRecursive", "Write"), "dios": ("ioServicedRecursive", "Discard")}


def collect(paths: dict[str, str]) -> dict[str, Any]:
    """The figures of the groups at `paths`."""
    two = Folder(paths[""]) if "" in paths else None

    def one(controller: str) -> Folder | None:
        return Folder(paths[controller]) if controller in paths else None

    data: dict[str, Any] = {"cpu": {"usage": {"total": 0, "kernel": 0, "user": 0}, "throttling": {}}, "cpuset": {},
                            "memory": {"usage": {"limit": 0, "failcnt": 0}, "swap": {"limit": 0, "failcnt": 0},
                                       "kernel": {"limit": 0, "failcnt": 0}, "kernelTCP": {"limit": 0, "failcnt": 0}},
                            "pids": {}, "blkio": {}, "hugetlb": {}, "intel_rdt": {}, "network_interfaces": None}
    if group := one("cpuacct"):
        data["cpu"]["usage"] = _cpuacct(group)
    if group := one("cpu"):
        data["cpu"]["throttling"] = _throttling(group.table("cpu.stat"), "throttled_time", 1)
    if two and "cpuacct" not in paths:
        data["cpu"] = _cpu_2(two)
    if group := one("cpuset") or two:
        data["cpuset"] = _cpuset(group)
    if group := one("memory"):
        data["memory"] = _memory(group)
    elif two and two.has("memory.current"):
        data["memory"] = _memory_2(two)
    if group := one("pids") or two:
        data["pids"] = _some(current=group.number("pids.current"), limit=group.number("pids.max"))
    if group := one("blkio"):
        data["blkio"] = _blkio(group)
    elif two:
        data["blkio"] = _io(two)
    if group := one("hugetlb") or two:
        data["hugetlb"] = _hugetlb(group, two="hugetlb" not in paths)
    return data


def _some(**figures: Any) -> dict[str, Any]:
    """Without those that are 0 or empty."""
    return {name: value for name, value in figures.items() if value}


def _cpuacct(group: Folder) -> dict[str, Any]:
    per, in_kernel, in_user = [], [], []
    for line in group.read("cpuacct.usage_all").split("\n")[1:]:
        numbers = line.split()
        if len(numbers) == 3:
            in_user.append(int(numbers[1]))
            in_kernel.append(int(numbers[2]))
    per = [int(word) for word in group.read("cpuacct.usage_percpu").split()]
    split = group.table("cpuacct.stat")
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return {"total": group.number("cpuacct.usage"),
            **_some(percpu=per, percpu_kernel=in_kernel, percpu_user=in_user),
            "kernel": split.get("system", 0) * tick, "user": split.get("user", 0) * tick}


def _throttling(table: dict[str, int], time: str, scale: int) -> dict[str, int]:
    return _some(periods=table.get("nr_periods", 0), throttledPeriods=table.get("nr_throttled", 0),
                 throttledTime=table.get(time, 0) * scale)


def _cpu_2(group: Folder) -> dict[str, Any]:
    table = group.table("cpu.stat")
    return {"usage": {"total": table.get("usage_usec", 0) * 1000, "kernel": table.get("system_usec", 0) * 1000,
                      "user": table.get("user_usec", 0) * 1000},
            "throttling": _throttling(table, "throttled_usec", 1000)}


def _numbers(text: str) -> list[int]:
    """0-2,5 as a list."""
    found: list[int] = []
    for word in text.strip().split(","):
        first, dash, last = word.partition("-")
        if first.isdecimal():
            found += range(int(first), int(last if dash else first) + 1)
    return found


def _cpuset(group: Folder) -> dict[str, Any]:
    cpus, mems = (_numbers(group.read(f"cpuset.{leaf}") or group.read(f"cpuset.{leaf}.effective"))
                  for leaf in ("cpus", "mems"))
    row: dict[str, Any] = _some(cpus=cpus, mems=mems)
    for name in _CPUSET_FLAGS:
        row[name] = group.number(f"cpuset.{name}")
    return row


def _memory(group: Folder) -> dict[str, Any]:
    raw = group.table("memory.stat")
    row: dict[str, Any] = _some(cache=raw.get("cache", 0))
    for name, prefix in (("usage", "memory."), ("swap", "memory.memsw."), ("kernel", "memory.kmem."),
                         ("kernelTCP", "memory.kmem.tcp.")):
        row[name] = {"limit": group.number(f"{prefix}limit_in_bytes"),
                     **_some(usage=group.number(f"{prefix}usage_in_bytes"),
                             max=group.number(f"{prefix}max_usage_in_bytes")),
                     "failcnt": group.number(f"{prefix}failcnt")}
    return row | {"raw": raw}


def _memory_2(group: Folder) -> dict[str, Any]:
    raw, events = group.table("memory.stat"), group.table("memory.events")
    usage, limit = group.number("memory.current"), group.number("memory.max", _NO_LIMIT)
    swap, swap_limit = group.number("memory.swap.current"), group.number("memory.swap.max", _NO_LIMIT)
    both = _NO_LIMIT if _NO_LIMIT in (limit, swap_limit) else limit + swap_limit
    return {**_some(cache=raw.get("file", 0)),
            "usage": {"limit": limit, **_some(usage=usage, max=group.number("memory.peak")),
                      "failcnt": events.get("max", 0)},
            "swap": {"limit": both, **_some(usage=usage + swap, max=group.number("memory.swap.peak")), "failcnt": 0},
            "kernel": {"limit": 0, "failcnt": 0}, "kernelTCP": {"limit": 0, "failcnt": 0}, "raw": raw}


def _entry(device: str, value: str, op: str = "") -> dict[str, Any]:
    major, _, minor = device.partition(":")
    return _some(major=int(major), minor=int(minor), op=op, value=int(value))


def _blkio(group: Folder) -> dict[str, Any]:
    prefix = "blkio.bfq." if group.read("blkio.bfq.io_serviced_recursive").count("\n") > 1 else "blkio."
    found: dict[str, Any] = {}
    for name, leaf in _BLKIO:
        text = group.read(f"{prefix}{leaf}")
        if not text and prefix == "blkio." and leaf in ("io_service_bytes_recursive", "io_serviced_recursive"):
            text = group.read(f"blkio.throttle.{leaf}")
        rows = []
        for line in text.split("\n"):
            words = line.split()
            if len(words) in (2, 3) and ":" in words[0]:
                rows.append(_entry(words[0], words[-1], words[1] if len(words) == 3 else ""))
        if rows:
            found[name] = rows
    return found


def _io(group: Folder) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in group.read("io.stat").split("\n"):
        device, *words = line.split() or [""]
        for word in words:
            key, _, value = word.partition("=")
            if key in _IO_STAT and value.isdecimal():
                name, op = _IO_STAT[key]
                found.setdefault(name, []).append(_entry(device, value, op))
    return found


def _hugetlb(group: Folder, *, two: bool) -> dict[str, Any]:
    found = {}
    usage, peak = ("current", "max") if two else ("usage_in_bytes", "max_usage_in_bytes")
    try:
        leaves = os.listdir(group.path)
    except OSError:
        return {}
    for leaf in leaves:
        words = leaf.split(".")
        if words[0] == "hugetlb" and len(words) == 3 and words[2] == usage:
            prefix = f"hugetlb.{words[1]}."
            failed = group.table(f"{prefix}events").get("max", 0) if two else group.number(f"{prefix}failcnt")
            most = 0 if two else group.number(prefix + peak)
            found[words[1]] = {**_some(usage=group.number(prefix + usage), max=most), "failcnt": failed}
    return found
