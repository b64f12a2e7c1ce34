"""What systemd is told of linux.resources, so that what it writes to a unit's files, now or at a daemon-reload, is what
we write there (runc, docs/systemd.md; man 5 systemd.resource-control).

Limits without a property (throttles, huge pages, network, real-time, ...) are in the files alone, which systemd leaves
as they are. Device rules are properties in version 1 only: there systemd writes the same list as we do. In version 2
each has a program of its own, and all must agree, so ours is enough. Driven by tests/unit/test_cgroups_systemd.py and
tests/root/test_cgroups_systemd.py.
"""

from __future__ import annotations

__all__ = ["annotated", "properties"]

from hv.container.cgroups.devices import ANY, MKNOD, READ, WRITE, DeviceList, read_rules
from hv.container.cgroups.fields import Fields
from hv.container.cgroups.gvariant import parse
from hv.container.cgroups.v2 import weight_of
from hv.container.fields import get
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.bus import Property

_INFINITY = (1 << 64) - 1               # for systemd: no limit
_SECOND = 1_000_000
_PERCENT = _SECOND // 100               # systemd keeps a quota in whole percents of a processor
_PERIOD = 100_000                       # microseconds: the kernel's default
_CPUS_MOST = 8192                       # include/linux/threads.h, of the largest configuration
_HAS_PERIOD, _HAS_CPUSET, _HAS_IDLE = 242, 244, 252     # systemd's NEWS: the version that a property came with
_ANNOTATION = "org.systemd.property."
# what makes it the container's unit: another value would take in foreign processes, or not hold ours
_OURS = ("PIDs", "Slice", "Delegate", "DefaultDependencies", "DevicePolicy", "DeviceAllow")


def properties(resources: dict[str, Any], *, v2: bool, version: int, update: bool = False) -> list[Property]:
    """Those for `resources`; of systemd's `version`, where the controllers are in cgroup version 1 or 2."""
    found: list[Property] = []
    cpu, memory = Fields(resources.get("cpu") or {}, "cpu"), Fields(resources.get("memory") or {}, "memory")
    _cpu(found, cpu, v2, version)
    if v2:
        _memory(found, memory)
    elif limit := memory.amount("limit", -1):
        found.append(("MemoryLimit", _limit(limit)))
    if version >= _HAS_CPUSET:
        for field, name in (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes")):
            if text := cpu.text(field):
                found.append((name, ("ay", bits(text, f"linux.resources.cpu.{field}"))))
    if limit := Fields(resources.get("pids") or {}, "pids").amount("limit"):
        found.append(("TasksMax", _limit(limit)))
    if weight := Fields(resources.get("blockIO") or {}, "blockIO").amount("weight", 0):
        if not 10 <= weight <= 1000:
            raise ConfigError(f"linux.resources.blockIO.weight: {weight}", "10 to 1000")
        found.append(("IOWeight", ("t", 1 + (weight - 10) * 9999 // 990)) if v2 else ("BlockIOWeight", ("t", weight)))
    if v2 and resources.get("unified"):
        _unified(found, Fields(resources["unified"], "unified").table, version)
    if not v2 and (not update or resources.get("devices")):
        found += _devices(get(resources, "devices", list, [], "linux.resources."))
    return found


def _limit(number: int) -> tuple[str, int]:
    return "t", number if number > 0 else _INFINITY


def _cpu(found: list[Property], fields: Fields, v2: bool, version: int) -> None:
    shares, idle = fields.amount("shares", 0), fields.number("idle")
    if v2 and idle and version >= _HAS_IDLE:
        found.append(("CPUWeight", ("t", 0)))           # man 5 systemd.resource-control: as "idle"
    elif v2 and shares and not idle:
        found.append(("CPUWeight", ("t", weight_of(shares))))
    elif shares and not v2:
        found.append(("CPUShares", ("t", shares)))
    _quota(found, fields.amount("quota"), fields.amount("period", 0), version)


def _quota(found: list[Property], quota: int, period: int, version: int) -> None:
    if period and version >= _HAS_PERIOD:
        found.append(("CPUQuotaPeriodUSec", ("t", period)))
    if quota > 0:
        exact = quota * _SECOND // (period or _PERIOD)
        found.append(("CPUQuotaPerSecUSec", ("t", -(-exact // _PERCENT) * _PERCENT)))       # never less than asked for
    elif quota:
        found.append(("CPUQuotaPerSecUSec", ("t", _INFINITY)))


def _memory(found: list[Property], fields: Fields) -> None:
    limit, swap = fields.amount("limit", -1), fields.amount("swap", -1)
    if limit:
        found.append(("MemoryMax", _limit(limit)))
    if swap == -1 or (limit == -1 and not swap):
        found.append(("MemorySwapMax", ("t", _INFINITY)))
    elif swap >= limit > 0:             # what else can't be is refused where the files are written
        found.append(("MemorySwapMax", ("t", swap - limit)))
    if reservation := fields.amount("reservation", -1):
        found.append(("MemoryLow", _limit(reservation)))


def _unified(found: list[Property], table: dict[str, Any], version: int) -> None:
    """Files of version 2 that systemd has a property for; what is not as it should be is refused with the files."""
    for leaf, name in (("memory.min", "MemoryMin"), ("memory.low", "MemoryLow"), ("memory.high", "MemoryHigh"),
                       ("memory.max", "MemoryMax"), ("memory.swap.max", "MemorySwapMax"), ("pids.max", "TasksMax"),
                       ("cpu.weight", "CPUWeight")):
        word = str(table.get(leaf, "")).strip()
        if word.isdecimal() or (word == "max" and leaf != "cpu.weight"):
            found.append((name, ("t", _INFINITY if word == "max" else min(int(word), _INFINITY))))
    quota, _, period = str(table.get("cpu.max", "")).strip().partition(" ")
    if (quota.isdecimal() or quota == "max") and (period.isdecimal() or not period):
        _quota(found, -1 if quota == "max" else int(quota), int(period or 0), version)
    if version >= _HAS_CPUSET:
        for leaf, name in (("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")):
            if text := str(table.get(leaf, "")).strip():
                found.append((name, ("ay", bits(text, f"linux.resources.unified[{leaf!r}]"))))


def bits(text: str, where: str) -> bytes:
    """A list as 0-3,7 as a mask, the lowest first."""
    mask = 0
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not part.strip():
            continue
        if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) >= _CPUS_MOST:
            raise ConfigError(f"{where} {text!r:.60}", "a list of numbers and ranges, as 0-3,7")
        for number in range(int(low), int(high or low) + 1):
            mask |= 1 << number
    return mask.to_bytes((mask.bit_length() + 7) // 8 or 1, "little")


def _devices(rows: list[Any]) -> list[Property]:
    """Everything, or nothing but a list. Exceptions to everything are in the kernel's list alone."""
    wanted = DeviceList(read_rules(rows))
    if wanted.allow_all:
        return [("DevicePolicy", ("s", "auto")), ("DeviceAllow", ("a(ss)", []))]
    allowed = []
    for (kind, major, minor), access in wanted.exceptions.items():
        letters = "".join(letter for letter, bit in (("r", READ), ("w", WRITE), ("m", MKNOD)) if access & bit)
        group = "block" if kind == "b" else "char"
        if minor == ANY:
            allowed.append((f"{group}-{'*' if major == ANY else major}", letters))
        elif major != ANY:              # all majors with one minor: nothing that systemd could say
            allowed.append((f"/dev/{group}/{major}:{minor}", letters))
    # an empty list first: an assignment adds to what is there
    return [("DevicePolicy", ("s", "strict")), ("DeviceAllow", ("a(ss)", [])), ("DeviceAllow", ("a(ss)", allowed))]


def annotated(annotations: dict[str, str]) -> list[Property]:
    """Properties by annotation, org.systemd.property.NAME; of a name in ...Sec it is ...USec that systemd knows."""
    found: list[Property] = []
    for key, text in annotations.items():
        if not key.startswith(_ANNOTATION):
            continue
        name, where = key[len(_ANNOTATION):], f"annotation {key:.80}"
        if not (name.isascii() and name.isalpha() and len(name) > 2):
            raise ConfigError(where, "a property's name: letters only")
        if name in _OURS:
            raise ConfigError(f"{where}: the runtime sets it", "leave the annotation out")
        signature, value = parse(text, where)
        if name.endswith("Sec") and not name.endswith("USec"):
            if signature not in ("n", "q", "i", "u", "x", "t", "d") or not 0 <= value * _SECOND <= _INFINITY:
                raise ConfigError(f"{where}: {text!r:.60}", "a number of seconds")
            name, signature, value = f"{name[:-3]}USec", "t", int(value * _SECOND)
        found.append((name, (signature, bytes(value) if signature == "ay" else value)))
    return found
