"""cgroup version 1: what each controller's files are told (Documentation/admin-guide/cgroup-v1/).

One function a controller, all called as f(folder, fields) with the part of linux.resources that is theirs; limits are
set before the first process joins, and again by `update`. Where two files depend on each other the order is tried both
ways, since which one must come first depends on the values there. Driven by tests/unit/test_cgroups_v1.py and
tests/root/test_cgroups.py.
"""

from __future__ import annotations

__all__ = ["blkio", "cpu", "cpuset", "freeze", "frozen", "hugetlb", "inherit_cpuset", "memory", "named_limits",
           "net_cls", "net_prio", "pids", "rdma"]

import errno
import os
from time import sleep

from hv.container.cgroups.fields import Fields
from hv.container.cgroups.folder import Folder, refusal
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FREEZE_TRIES = 1000
_SIZE_UNITS = ("KB", "MB", "GB")


def cpu(group: Folder, fields: Fields) -> None:
    """linux.resources.cpu, but for the set of processors."""
    if shares := fields.amount("shares"):
        group.write("cpu.shares", shares, "cpu.shares")
        kept = group.number("cpu.shares", shares)
        if kept != shares:              # the kernel takes any number, and keeps one between 2 and 262144
            raise ConfigError(f"linux.resources.cpu.shares: {shares}, but the kernel keeps {kept}", "2 to 262144")
    if (idle := fields.number("idle")) is not None:
        group.write("cpu.idle", idle, "cpu.idle")
    period, quota, burst = fields.amount("period", 0), fields.amount("quota"), fields.number("burst", 0)
    steps: list[tuple[str, int, str]] = []
    if burst is not None:
        steps.append(("cpu.cfs_burst_us", burst, "cpu.burst"))
    if period:
        steps.append(("cpu.cfs_period_us", period, "cpu.period"))
    if quota:
        steps.append(("cpu.cfs_quota_us", max(quota, -1), "cpu.quota"))
    _in_some_order(group, steps)
    steps = []
    if period := fields.amount("realtimePeriod", 0):
        steps.append(("cpu.rt_period_us", period, "cpu.realtimePeriod"))
    if runtime := fields.amount("realtimeRuntime"):
        steps.append(("cpu.rt_runtime_us", runtime, "cpu.realtimeRuntime"))
    _in_some_order(group, steps)


def _in_some_order(group: Folder, steps: list[tuple[str, int, str]]) -> None:
    """Write all; one that does not fit (yet) is put off behind the others."""
    while steps:
        failed = []
        refused: tuple[OSError, tuple[str, int, str]] | None = None
        for step in steps:
            try:
                group.put(step[0], step[1])
            except OSError as error:
                refused = error, step
                failed.append(step)
                if error.errno != errno.EINVAL:
                    break
        if refused and (len(failed) == len(steps) or refused[0].errno != errno.EINVAL):
            raise refusal(refused[0], *refused[1])
        steps = failed


def inherit_cpuset(folder: str, top: str) -> None:
    """Give the group, and those above it up to `top`, its parent's cpus and mems where it has none: without, nobody may
    join (cpusets.rst, 1.4)."""
    chain = []
    while folder != top and len(folder) > len(top):
        chain.append(folder)
        folder = os.path.dirname(folder)
    above = Folder(folder)
    for path in reversed(chain):
        group = Folder(path)
        for leaf in ("cpuset.cpus", "cpuset.mems"):
            if not group.read(leaf).strip():
                group.write(leaf, above.read(leaf).strip(), leaf.replace("cpuset.", "cpu."))
        above = group


def cpuset(group: Folder, fields: Fields) -> None:
    """linux.resources.cpu.cpus and .mems."""
    for name in ("cpus", "mems"):
        if text := fields.text(name):
            group.write(f"cpuset.{name}", text, f"cpu.{name}")


def memory(group: Folder, fields: Fields) -> None:
    """linux.resources.memory."""
    limit, swap = fields.amount("limit", -1), fields.amount("swap", -1)
    if limit == -1 and not swap and group.has("memory.memsw.limit_in_bytes"):
        swap = -1                       # an unlimited group whose memory and swap were limited would stay limited
    if limit > 0 and fields.flag("checkBeforeUpdate"):
        usage = group.number("memory.usage_in_bytes")
        if usage > limit:
            raise ConfigError(f"linux.resources.memory.limit: {limit}, but {usage} bytes are in use",
                              "a higher limit, or checkBeforeUpdate false")
    if limit > 0 and swap > 0 and swap < limit:
        raise ConfigError(f"linux.resources.memory.swap: {swap} is less than memory.limit", "it counts memory and swap")
    steps = []
    if limit:
        steps.append(("memory.limit_in_bytes", limit, "memory.limit"))
    if swap:
        steps.append(("memory.memsw.limit_in_bytes", swap, "memory.swap"))
    try:
        _in_some_order(group, steps)
    except HvError as error:
        usage, peak = (group.number(f"memory.{leaf}") for leaf in ("usage_in_bytes", "max_usage_in_bytes"))
        raise type(error)(f"{error} (in use: {usage}, peak {peak} bytes)", error.hint) from None
    if reservation := fields.amount("reservation", -1):
        group.write("memory.soft_limit_in_bytes", reservation, "memory.reservation")
    if kernel := fields.amount("kernel", -1):
        _kernel_memory(group, kernel)
    if tcp := fields.amount("kernelTCP", -1):
        group.write("memory.kmem.tcp.limit_in_bytes", tcp, "memory.kernelTCP")
    if (swappiness := fields.number("swappiness")) is not None:
        if not 0 <= swappiness <= 100:
            raise ConfigError(f"linux.resources.memory.swappiness: {swappiness}", "0 to 100")
        group.write("memory.swappiness", swappiness, "memory.swappiness")
    if fields.table.get("disableOOMKiller") is not None:
        off = int(fields.flag("disableOOMKiller"))
        if off != group.table("memory.oom_control").get("oom_kill_disable", 0):
            group.write("memory.oom_control", off, "memory.disableOOMKiller")
    if fields.table.get("useHierarchy") is not None:
        use = int(fields.flag("useHierarchy"))
        if use != group.number("memory.use_hierarchy", 1):     # since Linux 5.11 there is no other
            group.write("memory.use_hierarchy", use, "memory.useHierarchy")


def _kernel_memory(group: Folder, limit: int) -> None:
    """Since Linux 5.16 the file takes any number and keeps none (kernel/cgroup: commit 58056f77502f)."""
    group.write("memory.kmem.limit_in_bytes", limit, "memory.kernel")
    page = os.sysconf("SC_PAGESIZE")
    if limit > 0 and abs(group.number("memory.kmem.limit_in_bytes") - limit) >= page:
        raise ConfigError("linux.resources.memory.kernel: this host's kernel has no limit on kernel memory alone",
                          "memory.limit counts kernel memory as well")


def pids(group: Folder, fields: Fields) -> None:
    """linux.resources.pids: -1 is no limit, 0 as if it were not set."""
    if limit := fields.amount("limit"):
        group.write("pids.max", limit if limit > 0 else "max", "pids.limit")


def blkio(group: Folder, fields: Fields) -> None:
    """linux.resources.blockIO; weights count where the I/O scheduler knows them (bfq, or CFQ of old)."""
    prefix = "blkio.bfq." if group.has("blkio.bfq.weight") and not group.has("blkio.weight") else "blkio."
    if weight := fields.amount("weight", 0):
        group.write(f"{prefix}weight", weight, "blockIO.weight")
    if leaf := fields.amount("leafWeight", 0):
        group.write("blkio.leaf_weight", leaf, "blockIO.leafWeight")
    for row in fields.rows("weightDevice"):
        if weight := row.amount("weight", 0):
            group.write(f"{prefix}weight_device", f"{device(row)} {weight}", row.name("weight"))
        if leaf := row.amount("leafWeight", 0):
            group.write("blkio.leaf_weight_device", f"{device(row)} {leaf}", row.name("leafWeight"))
    for name, leaf_name in (("throttleReadBpsDevice", "read_bps"), ("throttleWriteBpsDevice", "write_bps"),
                            ("throttleReadIOPSDevice", "read_iops"), ("throttleWriteIOPSDevice", "write_iops")):
        for row in fields.rows(name):
            group.write(f"blkio.throttle.{leaf_name}_device", f"{device(row)} {row.amount('rate', 0)}",
                        row.name("rate"))


def device(row: Fields) -> str:
    """major:minor of a blockIO entry."""
    return f"{row.amount('major', 0)}:{row.amount('minor', 0)}"


def hugetlb(group: Folder, fields: Fields) -> None:
    """linux.resources.hugepageLimits (an array, handed in under its own name)."""
    for size, limit, name in named_limits(fields):
        group.write(f"hugetlb.{size}.limit_in_bytes", limit, name)
        if group.has(f"hugetlb.{size}.rsvd.limit_in_bytes"):
            group.write(f"hugetlb.{size}.rsvd.limit_in_bytes", limit, name)


def named_limits(fields: Fields) -> list[tuple[str, int, str]]:
    """(page size as in file names, limit, field name) of each huge page limit."""
    found = []
    for row in fields.rows("hugepageLimits"):
        size = row.text("pageSize")
        if size[-2:] not in _SIZE_UNITS or not size[:-2].isdecimal():
            raise ConfigError(f"linux.resources.{row.name('pageSize')} {size!r}", "for example 2MB")
        found.append((size, row.amount("limit", 0), row.where))
    return found


def net_cls(group: Folder, fields: Fields) -> None:
    """linux.resources.network.classID."""
    if number := fields.amount("classID", 0):
        group.write("net_cls.classid", number, "network.classID")


def net_prio(group: Folder, fields: Fields) -> None:
    """linux.resources.network.priorities."""
    for row in fields.rows("priorities"):
        name = row.text("name")
        if not name or any(letter.isspace() for letter in name):
            raise ConfigError(f"linux.resources.{row.name('name')} {name!r}", "a network interface's name")
        group.write("net_prio.ifpriomap", f"{name} {row.amount('priority', 0)}", row.where)


def rdma(group: Folder, fields: Fields) -> None:
    """linux.resources.rdma: limits by device (the same files in version 2)."""
    for name, row in fields.table.items():
        limits = Fields(row, f"rdma.{name}")
        words: list[Any] = [name]
        for key, word in (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object")):
            if (value := limits.number(key, 0)) is not None:
                words.append(f"{word}={value}")
        group.write("rdma.max", " ".join(words), limits.where)


# freezer -----------------------------------------------------------------------------------------------


def freeze(group: Folder, on: bool) -> None:
    """Stop all processes, or let them go on. Those that fork meanwhile may need another try (freezer-subsystem.rst)."""
    word = "FROZEN" if on else "THAWED"
    try:
        for attempt in range(_FREEZE_TRIES):
            group.put("freezer.state", word)
            if group.read("freezer.state").strip() == word:
                return
            if attempt % 50 == 49:
                group.put("freezer.state", "THAWED")
            sleep(0.0001 if attempt < 10 else 0.002)
        group.put("freezer.state", "THAWED")
    except OSError as error:
        raise HvError(f"{group.path}/freezer.state: {os.strerror(error.errno or 0)}") from None
    raise HvError("the processes do not freeze", "they hang in the kernel, or fork faster than we can freeze")


def frozen(group: Folder) -> bool:
    """Whether the group was frozen through its own file or, what counts as well, is on its way there."""
    return group.read("freezer.state").strip() in ("FROZEN", "FREEZING")
