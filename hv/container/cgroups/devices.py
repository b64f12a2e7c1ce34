"""Which devices a container may use: linux.resources.devices, in order, and the default ones (config-linux.md).

Version 1 takes a list (Documentation/admin-guide/cgroup-v1/devices.rst): a default, and exceptions to it. A rule that
takes a part away from a wider one (allow c 1:*, then deny c 1:3) can't be said there and is refused by name; version 2
(hv/container/cgroups/devices_bpf.py) can. A rule without access means all of rwm. Driven by
tests/unit/test_cgroups_devices.py and tests/root/test_cgroups.py.
"""

from __future__ import annotations

__all__ = ["DEFAULT_RULES", "DeviceList", "Rule", "parse_list", "read_rules", "write_v1"]

from hv.container.cgroups.fields import Fields
from hv.container.cgroups.folder import Folder
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANY = -1
MKNOD, READ, WRITE = 1, 2, 4            # include/uapi/linux/bpf.h, BPF_DEVCG_ACC_*
FULL = READ | WRITE | MKNOD
_BITS = {"r": READ, "w": WRITE, "m": MKNOD}
_MINOR_MOST = (1 << 20) - 1             # include/linux/kdev_t.h
_MAJOR_MOST = (1 << 12) - 1

# one rule: (allow, type "a", "b" or "c", major, minor, access bits)
Rule = tuple[bool, str, int, int, int]

# config-linux.md, Default Devices, with what any container may do: make nodes, use its ptys; tun as the field has it
DEFAULT_RULES: tuple[Rule, ...] = (
    (True, "c", ANY, ANY, MKNOD), (True, "b", ANY, ANY, MKNOD), (True, "c", 1, 3, FULL), (True, "c", 1, 8, FULL),
    (True, "c", 1, 7, FULL), (True, "c", 5, 0, FULL), (True, "c", 1, 5, FULL), (True, "c", 1, 9, FULL),
    (True, "c", 136, ANY, FULL), (True, "c", 5, 2, FULL), (True, "c", 10, 200, FULL))


def read_rules(rows: list[Any]) -> list[Rule]:
    """linux.resources.devices, checked, and the default devices behind it."""
    rules: list[Rule] = []
    for index, row in enumerate(rows):
        fields = Fields(row, f"devices[{index}]")
        kind = fields.text("type") or "a"
        if kind not in ("a", "b", "c", "u"):
            raise ConfigError(f"linux.resources.devices[{index}].type {kind!r}", "a, b or c")
        major, minor = (_number(fields, "major", _MAJOR_MOST), _number(fields, "minor", _MINOR_MOST))
        access = 0
        for letter in fields.text("access") or "rwm":
            if letter not in _BITS:
                raise ConfigError(f"linux.resources.devices[{index}].access {fields.text('access')!r}",
                                  "letters of rwm")
            access |= _BITS[letter]
        allow = fields.flag("allow")
        if kind == "a" and (major, minor, access) != (ANY, ANY, FULL):
            # version 1 would take any rule of type a for all access to all devices
            rules += [(allow, "b", major, minor, access), (allow, "c", major, minor, access)]
        else:
            rules.append((allow, "c" if kind == "u" else kind, major, minor, access))
    return rules + list(DEFAULT_RULES)


def _number(fields: Fields, name: str, most: int) -> int:
    value = fields.number(name)
    if value is None or value == ANY:
        return ANY
    if not 0 <= value <= most:
        raise ConfigError(f"linux.resources.{fields.name(name)}: {value}", f"0 to {most}, or -1 for all")
    return value


class DeviceList:
    """What rules amount to: everything (or nothing) is allowed but the exceptions."""

    def __init__(self, rules: list[Rule] | None = None) -> None:
        self.allow_all = False
        self.exceptions: dict[tuple[str, int, int], int] = {}
        for rule in rules or []:
            self.apply(rule)

    def apply(self, rule: Rule) -> None:
        """Take one more rule. ConfigError where it would need an exception to an exception."""
        allow, kind, major, minor, access = rule
        if kind == "a":
            self.allow_all, self.exceptions = allow, {}
            return
        key = kind, major, minor
        if allow != self.allow_all:
            self.exceptions[key] = self.exceptions.get(key, 0) | access
            return
        for other, bits in list(self.exceptions.items()):
            if not bits & access or not _meet(other, key):
                continue
            if _covers(key, other):
                self.exceptions[other] = bits & ~access
                if not self.exceptions[other]:
                    del self.exceptions[other]
            else:
                raise ConfigError(
                    f"linux.resources.devices: {'allow' if allow else 'deny'} {_text(key, access)} takes a part of the "
                    f"earlier {_text(other, bits)}, which cgroup version 1 can't express",
                    "name what is allowed one by one")


def _covers(wide: tuple[str, int, int], narrow: tuple[str, int, int]) -> bool:
    return wide[0] == narrow[0] and wide[1] in (ANY, narrow[1]) and wide[2] in (ANY, narrow[2])


def _meet(one: tuple[str, int, int], two: tuple[str, int, int]) -> bool:
    """Whether there are devices that both speak of."""
    return one[0] == two[0] and all(ANY in (a, b) or a == b for a, b in ((one[1], two[1]), (one[2], two[2])))


def _text(key: tuple[str, int, int], access: int) -> str:
    kind, major, minor = key
    letters = "".join(letter for letter, bit in _BITS.items() if access & bit)
    return f"{kind} {'*' if major == ANY else major}:{'*' if minor == ANY else minor} {letters}"


def parse_list(text: str) -> DeviceList:
    """devices.list as the kernel prints it: what is allowed; "a *:* rwm" alone where exceptions are denied."""
    found = DeviceList()
    for line in text.splitlines():
        kind, numbers, letters = line.split()
        if kind == "a":
            found.allow_all = True
            continue
        major, _, minor = numbers.partition(":")
        found.exceptions[kind, ANY if major == "*" else int(major), ANY if minor == "*" else int(minor)] = sum(
            _BITS[letter] for letter in letters)
    return found


def write_v1(folder: Folder, rules: list[Rule], *, fresh: bool) -> None:
    """Make devices.list say what `rules` say; a group in use (not `fresh`) loses nothing meanwhile that it may keep."""
    want = DeviceList(rules)
    have = None if fresh else parse_list(folder.read("devices.list"))
    if have is None or have.allow_all or want.allow_all:
        folder.write("devices.allow" if want.allow_all else "devices.deny", "a", "devices")
        have = DeviceList()
    add, remove = ("devices.deny", "devices.allow") if want.allow_all else ("devices.allow", "devices.deny")
    folder.write_lines(add, [_text(key, missing) for key, bits in want.exceptions.items()
                             if (missing := bits & ~have.exceptions.get(key, 0))], "devices")
    folder.write_lines(remove, [_text(key, extra) for key, bits in have.exceptions.items()
                                if (extra := bits & ~want.exceptions.get(key, 0))], "devices")
