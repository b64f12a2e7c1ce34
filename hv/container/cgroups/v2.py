"""cgroup version 2: what each controller's files are told (Documentation/admin-guide/cgroup-v2.rst).

linux.resources was written for version 1, so values are converted as the field does: shares to cpu.weight (linear from
2..262144 to 1..10000, as runc to 1.3 and crun to 1.22 do; newer ones use a curve), memory and swap together to swap
alone, blkio weights to io.weight. What version 2 has no file for (real-time, swappiness, kernelTCP, disableOOMKiller,
network classes) is refused by name. Driven by tests/unit/test_cgroups_v2.py, on the host's version 2 hierarchy by
tests/root/test_cgroups_unified.py, and with all controllers by tests/kvm/test_cgroups_in_a_guest.py.
"""

from __future__ import annotations

__all__ = ["cpu", "cpuset", "enable", "freeze", "frozen", "held_back", "hugetlb", "io", "memory", "pids", "unified",
           "weight_of"]

import errno
import os
from time import monotonic, sleep

from hv.container.cgroups.fields import Fields
from hv.container.cgroups.folder import Folder
from hv.container.cgroups.v1 import device, named_limits
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PERIOD = 100000                        # microseconds: the kernel's own default of cpu.max
_FREEZE_SECONDS = 10.0
# of these, a config.json would move foreign processes, or undo what the runtime does
_NOT_UNIFIED = ("cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.type", "cgroup.freeze",
                "cgroup.subtree_control")


def enable(group: str, top: str, wanted: set[str] | None = None) -> set[str]:
    """Let `group` have the controllers `wanted` (None: all there are); the controllers that it has then.

    Each group from the root down must pass them on (cgroup-v2.rst, Top-down Constraint); one with processes of its own
    can't (No Internal Process Constraint), nor can one that is not ours: then the group goes without. Where the kernel
    would let such a group pass on cpu, cpuset or pids it makes it a threaded one, below which no other container could
    be (Threads), so we don't ask.
    """
    have = set(Folder(group).read("cgroup.controllers").split())
    if wanted is not None and wanted <= have:
        return have
    path = top
    for name in ["", *group[len(top):].strip("/").split("/")[:-1]]:
        path = f"{path}/{name}" if name else path
        folder = Folder(path)
        there = set(folder.read("cgroup.controllers").split())
        missing = (there if wanted is None else there & wanted) - set(folder.read("cgroup.subtree_control").split())
        if missing and not _in_use(folder):
            _pass_on(folder, sorted(missing))
    return set(Folder(group).read("cgroup.controllers").split())


def held_back(group: str, top: str, controller: str) -> str:
    """The group above `group` that has `controller` and does not pass it on; "" where there is none."""
    path = group
    while path != top and path.startswith(top):
        path = path.rpartition("/")[0]
        if controller in Folder(path).read("cgroup.controllers").split():
            return path
    return ""


def _in_use(folder: Folder) -> bool:
    """Whether it has processes of its own and is not the hierarchy's root, which alone has no cgroup.type."""
    return folder.has("cgroup.type") and bool(folder.read("cgroup.procs"))


def _pass_on(folder: Folder, names: list[str]) -> None:
    try:
        folder.put("cgroup.subtree_control", " ".join(f"+{name}" for name in names))
    except OSError:
        for name in names:              # one that can't be had (cpu, while there are real-time processes) spoils all
            try:
                folder.put("cgroup.subtree_control", f"+{name}")
            except OSError:
                pass


def _refuse(fields: Fields, *names: str) -> None:
    for name in names:
        if fields.any(name):
            raise ConfigError(f"linux.resources.{fields.name(name)}: cgroup version 2 has nothing like it",
                              "leave the field out")


def weight_of(shares: int) -> int:
    """cpu.weight for version 1 shares; what is outside 2..262144 counts as the nearest of these."""
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


def cpu(group: Folder, fields: Fields) -> None:
    """linux.resources.cpu, but for the set of processors."""
    _refuse(fields, "realtimeRuntime", "realtimePeriod")
    if (idle := fields.number("idle")) is not None:
        group.write("cpu.idle", idle, "cpu.idle")
    if (shares := fields.amount("shares", 0)) and not idle:     # an idle group has no weight
        group.write("cpu.weight", weight_of(shares), "cpu.shares")
    quota, period, burst = fields.amount("quota"), fields.amount("period", 0), fields.number("burst", 0)
    if not quota and period:
        quota = _number(group.read("cpu.max").split(" ")[0])    # an update may name the period alone
    early = burst is not None and burst < group.number("cpu.max.burst")   # the burst may never be above the quota
    if burst is not None and early:
        group.write("cpu.max.burst", burst, "cpu.burst")
    if quota or period:
        group.write("cpu.max", f"{quota if quota > 0 else 'max'} {period or _PERIOD}", "cpu.quota")
    if burst is not None and not early:
        group.write("cpu.max.burst", burst, "cpu.burst")


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def cpuset(group: Folder, fields: Fields) -> None:
    """linux.resources.cpu.cpus and .mems."""
    for name in ("cpus", "mems"):
        if text := fields.text(name):
            group.write(f"cpuset.{name}", text, f"cpu.{name}")


def memory(group: Folder, fields: Fields) -> None:
    """linux.resources.memory. `swap` there counts memory as well, memory.swap.max does not."""
    _refuse(fields, "kernel", "kernelTCP", "disableOOMKiller")
    if fields.number("swappiness") is not None:
        raise ConfigError("linux.resources.memory.swappiness: cgroup version 2 has nothing like it",
                          "leave the field out")
    if fields.table.get("useHierarchy") is not None and not fields.flag("useHierarchy"):
        raise ConfigError("linux.resources.memory.useHierarchy: cgroup version 2 always accounts by hierarchy",
                          "leave the field out")
    limit, swap = fields.amount("limit", -1), fields.amount("swap", -1)
    if limit > 0 and fields.flag("checkBeforeUpdate"):
        usage = group.number("memory.current")
        if usage > limit:
            raise ConfigError(f"linux.resources.memory.limit: {limit}, but {usage} bytes are in use",
                              "a higher limit, or checkBeforeUpdate false")
    if swap == -1 or (limit == -1 and not swap):
        _swap(group, "max")
    elif swap:
        if limit <= 0:
            raise ConfigError("linux.resources.memory.swap: needs memory.limit as well", "it counts memory and swap")
        if swap < limit:
            raise ConfigError(f"linux.resources.memory.swap: {swap} is less than memory.limit",
                              "it counts memory and swap")
        _swap(group, swap - limit)
    if limit:
        group.write("memory.max", limit if limit > 0 else "max", "memory.limit")
    if reservation := fields.amount("reservation", -1):
        group.write("memory.low", reservation if reservation > 0 else "max", "memory.reservation")


def _swap(group: Folder, value: int | str) -> None:
    if value in ("max", 0) and not group.has("memory.swap.max"):
        return                          # a kernel that knows no swap limits nothing and swaps nothing
    group.write("memory.swap.max", value, "memory.swap")


def pids(group: Folder, fields: Fields) -> None:
    """linux.resources.pids: -1 is no limit, 0 as if it were not set."""
    if limit := fields.amount("limit"):
        group.write("pids.max", limit if limit > 0 else "max", "pids.limit")


def io(group: Folder, fields: Fields) -> None:
    """linux.resources.blockIO: weights to bfq where it rules, else to io.weight; throttles to io.max."""
    _refuse(fields, "leafWeight")
    bfq = group.has("io.bfq.weight")

    def scaled(weight: int) -> int:
        if not 10 <= weight <= 1000:
            raise ConfigError(f"linux.resources.blockIO.weight: {weight}", "10 to 1000")
        return weight if bfq else 1 + (weight - 10) * 9999 // 990

    leaf = "io.bfq.weight" if bfq else "io.weight"
    if weight := fields.amount("weight", 0):
        group.write(leaf, scaled(weight) if bfq else f"default {scaled(weight)}", "blockIO.weight")
    for row in fields.rows("weightDevice"):
        _refuse(row, "leafWeight")
        if weight := row.amount("weight", 0):
            group.write(leaf, f"{device(row)} {scaled(weight)}", row.name("weight"))
    for name, key in (("throttleReadBpsDevice", "rbps"), ("throttleWriteBpsDevice", "wbps"),
                      ("throttleReadIOPSDevice", "riops"), ("throttleWriteIOPSDevice", "wiops")):
        for row in fields.rows(name):
            rate = row.amount("rate", 0)
            group.write("io.max", f"{device(row)} {key}={rate or 'max'}", row.name("rate"))


def hugetlb(group: Folder, fields: Fields) -> None:
    """linux.resources.hugepageLimits."""
    for size, limit, name in named_limits(fields):
        group.write(f"hugetlb.{size}.max", limit, name)
        if group.has(f"hugetlb.{size}.rsvd.max"):
            group.write(f"hugetlb.{size}.rsvd.max", limit, name)


def unified(group: Folder, table: dict[str, Any], has: set[str]) -> None:
    """linux.resources.unified: files and what is written to them, line by line."""
    for leaf, value in table.items():
        where = f"linux.resources.unified[{leaf!r}]"
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {value!r:.60} is not a string")
        if "/" in leaf or "\0" in leaf or "." not in leaf.strip(".") or leaf in _NOT_UNIFIED:
            raise ConfigError(f"{where}: not a limit's file", "for example memory.high")
        controller = leaf.partition(".")[0]
        if controller != "cgroup" and controller not in has:
            raise ConfigError(f"{where}: this host's cgroup version 2 has no controller {controller} here",
                              f"it has {', '.join(sorted(has)) or 'none'}")
        for line in value.split("\n") if "\n" in value else [value]:
            if line.strip() or not value:
                group.write(leaf, line, f"unified[{leaf!r}]")


# freezer -----------------------------------------------------------------------------------------------


def freeze(group: Folder, on: bool) -> None:
    """Stop all processes, or let them go on; waits until it is so."""
    try:
        group.put("cgroup.freeze", int(on))
        end, pause = monotonic() + _FREEZE_SECONDS, 0.0002
        while group.table("cgroup.events").get("frozen", int(on)) != int(on):
            if monotonic() > end:
                group.put("cgroup.freeze", 0)
                raise HvError("the processes do not freeze", "they hang in the kernel")
            sleep(pause)
            pause = min(2 * pause, 0.02)
    except OSError as error:
        why = "this kernel has no cgroup.freeze (Linux 5.2)" if error.errno == errno.ENOENT else os.strerror(
            error.errno or 0)
        raise HvError(f"{group.path}/cgroup.freeze: {why}") from None


def frozen(group: Folder) -> bool:
    """Whether the group was told to freeze."""
    return group.read("cgroup.freeze").strip() == "1"
