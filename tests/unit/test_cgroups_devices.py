"""Device rules: version 1's list, and version 2's program, run here by an interpreter and compared with the rules."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.container.cgroups.devices import ANY, DEFAULT_RULES, DeviceList, parse_list, read_rules, write_v1
from hv.container.cgroups.devices_bpf import assemble
from hv.container.cgroups.folder import Folder
from hv.errors import ConfigError

DENY_ALL = {"allow": False, "access": "rwm"}
MKNOD, READ, WRITE = 1, 2, 4


def run(code: bytes, kind: str, major: int, minor: int, access: int) -> int:
    """Interpret the few instructions that a device program is made of; 0: refused."""
    context = {0: access << 16 | {"b": 1, "c": 2}[kind], 4: major, 8: minor}
    registers = dict.fromkeys(range(6), 0)
    steps = [struct.unpack("<BBhi", code[at:at + 8]) for at in range(0, len(code), 8)]
    at = 0
    while True:
        op, both, offset, value = steps[at]
        dst, src = both & 15, both >> 4
        at += 1
        if op == 0x61:
            registers[dst] = context[offset]
        elif op == 0x54:
            registers[dst] &= value & 0xFFFFFFFF
        elif op == 0x74:
            registers[dst] >>= value
        elif op == 0xB7:
            registers[dst] = value
        elif op == 0xBF:
            registers[dst] = registers[src]
        elif op == 0x55:
            at += offset if registers[dst] != value else 0
        elif op == 0x15:
            at += offset if registers[dst] == value else 0
        elif op == 0x95:
            return registers[0]
        else:
            raise AssertionError(f"instruction {op:#x}")


def allowed(rules, kind, major, minor, access) -> bool:
    """The meaning: for each bit of access the last rule that speaks of it decides."""
    for bit in (MKNOD, READ, WRITE):
        if access & bit:
            last = False
            for allow, of, first, second, bits in rules:
                if of == "a" or (of == kind and first in (ANY, major) and second in (ANY, minor) and bits & bit):
                    last = allow
            if not last:
                return False
    return True


rule = st.tuples(st.booleans(), st.sampled_from("aabbcccc"), st.sampled_from([ANY, 1, 5, 4095]),
                 st.sampled_from([ANY, 3, 1048575]), st.integers(1, 7))


@given(st.lists(rule, max_size=12), st.sampled_from("bc"), st.sampled_from([1, 5, 6, 4095]), st.sampled_from([3, 4,
    1048575]),
       st.integers(1, 7))
def test_the_program_decides_as_the_rules_do(rules, kind, major, minor, access):
    assert run(assemble(rules), kind, major, minor, access) == allowed(rules, kind, major, minor, access)


@given(st.lists(rule, max_size=8), st.sampled_from("bc"), st.sampled_from([1, 5, 6]), st.sampled_from([3, 4]),
       st.sampled_from([MKNOD, READ, WRITE]))
def test_the_list_decides_as_the_rules_do_or_refuses(rules, kind, major, minor, access):
    try:
        found = DeviceList(rules)
    except ConfigError:
        return
    hit = any(of == kind and first in (ANY, major) and second in (ANY, minor) and bits & access
              for (of, first, second), bits in found.exceptions.items())
    assert (hit != found.allow_all) == allowed(rules, kind, major, minor, access)


def test_default_devices_stay_usable_when_all_is_denied():
    rules = read_rules([DENY_ALL])
    code = assemble(rules)
    for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 4), (10, 200)):
        assert run(code, "c", major, minor, READ | WRITE) == 1
    assert run(code, "b", 8, 0, MKNOD) == 1
    assert run(code, "b", 8, 0, READ) == 0
    assert run(code, "c", 1, 1, READ) == 0      # /dev/mem
    assert run(code, "c", 5, 1, WRITE) == 0     # /dev/console


@pytest.mark.parametrize(("row", "expected"), [
    ({"allow": True}, [(True, "a", ANY, ANY, 7)]), ({"allow": False, "type": "a", "access": "mwr"}, [(False, "a", ANY,
        ANY, 7)]),
    ({"allow": True, "type": "u", "major": 1, "minor": 3, "access": "r"}, [(True, "c", 1, 3, READ)]),
    ({"allow": True, "type": "b", "major": -1, "minor": 3}, [(True, "b", ANY, 3, 7)]),
    ({"allow": True, "access": "r"}, [(True, "b", ANY, ANY, READ), (True, "c", ANY, ANY, READ)]),
])
def test_rows_become_rules(row, expected):
    assert read_rules([row]) == expected + list(DEFAULT_RULES)


@pytest.mark.parametrize("row", [{"type": "x"}, {"access": "rwx"}, {"type": "c", "major": -2}, {"type": "c",
    "minor": 1 << 20},
                                 {"allow": "yes"}, 5, {"major": "1"}])
def test_bad_rows_are_refused(row):
    with pytest.raises(ConfigError, match=r"linux\.resources\.devices\[0\]"):
        read_rules([row])


def test_a_hole_in_a_wider_rule_is_refused_for_version_1():
    with pytest.raises(ConfigError, match=r"deny c 1:3 w takes a part of the earlier c 1:\* rwm"):
        DeviceList(read_rules([DENY_ALL, {"allow": True, "type": "c", "major": 1},
                               {"allow": False, "type": "c", "major": 1, "minor": 3, "access": "w"}]))


class Group(Folder):
    """A group whose devices.list is given, and whose writes are noted."""

    def __init__(self, text: str) -> None:
        super().__init__("")
        self.text, self.writes = text, []

    def read(self, leaf):
        return self.text

    def write(self, leaf, value, field):
        self.writes.append((leaf.removeprefix("devices."), value))

    def write_lines(self, leaf, lines, field):
        for line in lines:
            self.write(leaf, line, field)


def test_a_new_group_is_denied_all_first():
    group = Group("a *:* rwm\n")
    write_v1(group, read_rules([DENY_ALL, {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "r"}]),
             fresh=True)
    assert group.writes[:2] == [("deny", "a"), ("allow", "b 8:0 r")]
    assert ("allow", "c 1:3 rwm") in group.writes and ("allow", "c *:* m") in group.writes
    assert len(group.writes) == 2 + len(DEFAULT_RULES)


def test_everything_allowed_but_one_device():
    group = Group("")
    write_v1(group, [(True, "a", ANY, ANY, 7), (False, "b", 8, 0, 6)], fresh=True)
    assert group.writes == [("allow", "a"), ("deny", "b 8:0 rw")]


def test_a_group_in_use_changes_only_what_differs():
    now = "c 1:3 rwm\nb 8:0 rw\nc *:* m\n"
    group = Group(now)
    write_v1(group, [(True, "c", 1, 3, 7), (True, "b", 8, 0, READ), (True, "c", 10, ANY, 7), (True, "c", ANY, ANY, 1)],
             fresh=False)
    assert group.writes == [("allow", "c 10:* rwm"), ("deny", "b 8:0 w")]
    assert parse_list(now).exceptions == {("c", 1, 3): 7, ("b", 8, 0): 6, ("c", ANY, ANY): 1}


def test_a_wider_rule_ends_the_earlier_ones_below_it():
    """For the list as for the program: the last rule that speaks of a device decides."""
    taken = DeviceList([(True, "c", 1, 3, READ | WRITE), (True, "b", 1, 3, READ), (False, "c", ANY, 3, READ)])
    assert taken.exceptions == {("c", 1, 3): WRITE, ("b", 1, 3): READ}
    given_back = DeviceList([(True, "a", ANY, ANY, 7), (False, "b", ANY, 3, MKNOD), (True, "b", ANY, ANY, MKNOD)])
    assert given_back.allow_all and not given_back.exceptions


def test_rules_that_cross_are_refused_for_version_1():
    with pytest.raises(ConfigError, match=r"deny c \*:3 r takes a part of the earlier c 1:\* r"):
        DeviceList([(True, "c", 1, ANY, READ), (False, "c", ANY, 3, READ)])
