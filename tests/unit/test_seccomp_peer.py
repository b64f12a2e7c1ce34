"""Random profiles, compiled by us and by libseccomp, both programs interpreted: one answer.

Ours is that of the first rule that holds. libseccomp 2.5.4 is asked for one rule of each call at a time, and its
answers are put together, for several rules of one call it gets wrong: it merges their comparisons into one tree, and
where two of them share some, it

    loses or inverts rules      `arg 0 < 0x7fffffff` and `arg 0 >= 0xffffffff00000000`, both for ERRNO: 0xffffffff, too
    never ends                  `arg 0 >= 1 << 32, arg 1 <= 7` for TRAP and `arg 1 != 0, arg 0 >= 1 << 32` for LOG: nor
                                does runc then
    has no order                of rules with different actions (seccomp_rule_add(3); its issue 148)

tests/root/test_seccomp.py asks the kernel about such profiles.
"""

from __future__ import annotations

import random
from datetime import timedelta

import pytest
from framework.seccomp import (
    I386,
    TOKENS,
    X32_BIT,
    X86_64,
    action_value,
    check_form,
    decode,
    interpret,
    libseccomp,
    peer_compile,
    seccomp_data,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hv.container.seccomp.compile import compile_profile
from hv.container.seccomp.profile import default_profile
from hv.container.seccomp.syscalls import read_table

PEER = libseccomp()
pytestmark = pytest.mark.skipif(PEER is None, reason="libseccomp.so.2 is not installed (apt-get install libseccomp2)")
TABLE = read_table()
COLUMNS = {"SCMP_ARCH_X86_64": 0, "SCMP_ARCH_X86": 1, "SCMP_ARCH_X32": 2, "SCMP_ARCH_AARCH64": 3}
# libseccomp 2.5 forgets to load the number before a tree whose first call is one of i386's multiplexed only
MULTIPLEXED_ONLY = {"accept", "send", "recv", "semop", "semtimedop"}
NAMES = sorted(name for name, row in TABLE.items() if row[0] != "-" and int(row[0]) < 450 and "-" not in row
               and name not in MULTIPLEXED_ONLY)
VALUES = st.sampled_from([0, 1, 2, 3, 5, 40, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000, 0x100000005,
                          0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFF00000000, (1 << 64) - 1])
NUMBERS = VALUES | st.integers(0, (1 << 64) - 1)
OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
# libseccomp refuses 4095, the highest that the kernel takes (src/system.c: sys_chk_seccomp_action)
ERRNOS = st.integers(0, 4094)
ACTIONS = ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "TRACE", "ALLOW", "LOG")


@st.composite
def rules(draw, names):
    action = "SCMP_ACT_" + draw(st.sampled_from(ACTIONS))
    rule = {"names": draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)), "action": action}
    if action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") and draw(st.booleans()):
        rule["errnoRet"] = draw(ERRNOS)
    if draw(st.integers(0, 2)):
        rule["args"] = draw(st.lists(conditions(), max_size=3))
    return rule


@st.composite
def conditions(draw):
    return {"index": draw(st.integers(0, 5) | st.integers(0, 1)), "op": "SCMP_CMP_" + draw(st.sampled_from(OPERATORS)),
            "value": draw(NUMBERS), "valueTwo": draw(NUMBERS)}


@st.composite
def profiles(draw):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=8, unique=True))
    default = draw(st.sampled_from(ACTIONS))
    profile = {"defaultAction": "SCMP_ACT_" + default,
               "architectures": draw(st.lists(st.sampled_from(sorted(COLUMNS)), unique=True)),
               "syscalls": draw(st.lists(rules(names), max_size=12))}
    if default in ("ERRNO", "TRACE") and draw(st.booleans()):
        profile["defaultErrnoRet"] = draw(ERRNOS)
    return profile


def holds(condition: dict, args: tuple[int, ...], wide: bool) -> bool:
    keep = (1 << 64) - 1 if wide else 0xFFFFFFFF
    argument, value = args[condition["index"]] & keep, condition["value"] & keep
    second = condition["valueTwo"] & keep
    return {"NE": argument != value, "LT": argument < value, "LE": argument <= value, "EQ": argument == value,
            "GE": argument >= value, "GT": argument > value,
            "MASKED_EQ": argument & value == second & value}[condition["op"].removeprefix("SCMP_CMP_")]


def chains(profile: dict, name: str) -> list[dict]:
    """What is asked for call `name`, in the order that counts: rules all of whose conditions must hold."""
    default = action_value(profile["defaultAction"], profile.get("defaultErrnoRet"))
    found = []
    for rule in profile["syscalls"]:
        if name in rule["names"] and action_value(rule["action"], rule.get("errnoRet")) != default:
            rows = rule.get("args") or []
            alone = len({row["index"] for row in rows}) < len(rows)
            found += [rule | {"names": [name], "args": part} for part in ([[row] for row in rows] if alone else [rows])]
    return sorted(found, key=lambda rule: bool(rule["args"]))


def model(profile: dict, name: str, args: tuple[int, ...], wide: bool) -> int:
    """What the specification's text says."""
    for rule in chains(profile, name):
        if all(holds(row, args, wide) for row in rule["args"]):
            return action_value(rule["action"], rule.get("errnoRet"))
    return action_value(profile["defaultAction"], profile.get("defaultErrnoRet"))


def one_by_one(profile: dict) -> list[dict]:
    """The first rule of each call, the second of each, and so on."""
    calls = [chains(profile, name) for name in sorted({name for rule in profile["syscalls"] for name in rule["names"]})]
    return [profile | {"syscalls": [rules[turn] for rules in calls if turn < len(rules)]}
            for turn in range(max(map(len, calls), default=0))]


def inputs(chance: random.Random, profile: dict) -> list[tuple[str, str, tuple[int, ...]]]:
    """Calls that the profile speaks of, with arguments near its values."""
    near = {0, 1 << 32, chance.getrandbits(64)}
    for rule in profile["syscalls"]:
        for row in rule.get("args") or []:
            for value in (row["value"], row["valueTwo"], row["value"] & row["valueTwo"]):
                near |= {(value + step) & ((1 << 64) - 1) for step in (-1, 0, 1)} | {value ^ 1 << 32, value >> 32}
    named = sorted({name for rule in profile["syscalls"] for name in rule["names"]} | {"getpid"})
    arches = sorted({"SCMP_ARCH_X86_64", *profile["architectures"]})
    values = sorted(near)
    return [(chance.choice(arches), chance.choice(named), tuple(chance.choices(values, k=6))) for _ in range(100)]


def narrow(arch: str) -> bool:
    return arch in ("SCMP_ARCH_X86", "SCMP_ARCH_X32")


def packet_of(arch: str, name: str, args: tuple[int, ...]) -> bytes:
    number = int(TABLE[name][COLUMNS[arch]]) | (X32_BIT if arch == "SCMP_ARCH_X32" else 0)
    return seccomp_data(number, TOKENS[arch], args)


@settings(max_examples=300, deadline=timedelta(seconds=10), suppress_health_check=list(HealthCheck), database=None)
@given(profiles(), st.integers(0, 1 << 32))
def test_same_answer_as_libseccomp_and_as_the_text_says(profile, seed):
    ours = decode(compile_profile(profile, cache=False))
    check_form(ours)
    parts = [decode(peer_compile(PEER, part, tree)) for part in one_by_one(profile) for tree in (False, True)]
    default = action_value(profile["defaultAction"], profile.get("defaultErrnoRet"))
    for arch, name, args in inputs(random.Random(seed), profile):
        packet = packet_of(arch, name, args)
        answer, _ = interpret(ours, packet)
        told = (arch, name, [hex(value) for value in args])
        assert answer == model(profile, name, args, not narrow(arch)), told
        answers = [interpret(part, packet)[0] for part in parts]
        for peers in (answers[::2], answers[1::2]):
            assert answer == next((other for other in peers if other != default), default), told


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(profiles(), st.lists(st.tuples(st.sampled_from([X86_64, I386, 0xC00000B7, 0x28, 0]),
                                      st.integers(0, 0xFFFFFFFF) | st.integers(0, 600)), min_size=50))
@example({"defaultAction": "SCMP_ACT_KILL", "architectures": ["SCMP_ARCH_X32"], "syscalls": []}, [(X86_64, 0xFFFFFFFF)])
def test_all_other_numbers_and_architectures(profile, calls):
    """Numbers that have no name: the default, or what a foreign architecture gets."""
    profile = profile | {"syscalls": [rule for rule in profile["syscalls"] if not rule.get("args")],
                         "defaultAction": profile["defaultAction"].replace("ERRNO", "LOG"), "defaultErrnoRet": None}
    ours, peer = (decode(program) for program in (compile_profile(profile, cache=False), peer_compile(PEER, profile)))
    for token, number in [*calls, (X86_64, 0xFFFFFFFF), (X86_64, X32_BIT - 1), (X86_64, X32_BIT), (I386, 0xFFFFFFFF)]:
        packet = seccomp_data(number, token, (1, 2, 3))
        assert interpret(ours, packet)[0] == interpret(peer, packet)[0], (hex(token), number)


MULTIPLEXED = ["socket", "bind", "connect", "listen", "accept4", "getsockname", "getpeername", "socketpair", "sendto",
               "recvfrom", "shutdown", "setsockopt", "getsockopt", "sendmsg", "recvmsg", "recvmmsg", "sendmmsg",
               "semget", "semctl", "msgsnd", "msgrcv", "msgget", "msgctl", "shmat", "shmdt", "shmget", "shmctl",
               "accept", "send", "recv", "semop", "semtimedop", "socketcall", "ipc"]


@pytest.mark.parametrize("args", [[], [{"index": 0, "op": "SCMP_CMP_EQ", "value": 16}],
                                  [{"index": 1, "op": "SCMP_CMP_GT", "value": 2}]], ids=["always", "first", "second"])
@pytest.mark.parametrize("name", MULTIPLEXED)
def test_calls_that_i386_makes_through_another(name, args):
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
               "syscalls": [{"names": [name], "action": "SCMP_ACT_ERRNO", "args": args},
                            # the number is loaded for it, see MULTIPLEXED_ONLY
                            {"names": ["chown32", "read"], "action": "SCMP_ACT_TRAP"}]}
    ours, peer = (decode(program) for program in (compile_profile(profile, cache=False), peer_compile(PEER, profile)))
    direct = TABLE.get(name, ["-"] * 4)[1].replace("-", "3")
    for number in (int(direct), 102, 117):
        for first in range(26):
            for second in (2, 3):
                packet = seccomp_data(number, I386, (first, second))
                assert interpret(ours, packet)[0] == interpret(peer, packet)[0], (number, first, second)


def test_a_filter_of_dockers_size_is_shorter_and_shallower_than_libseccomps():
    profile = default_profile(["CAP_SYS_CHROOT", "CAP_NET_RAW"])
    assert sum(len(rule["names"]) for rule in profile["syscalls"]) > 350
    programs = {"ours": decode(compile_profile(profile, cache=False)), "flat": decode(peer_compile(PEER, profile)),
                "tree": decode(peer_compile(PEER, profile, True))}
    numbers = {int(row[0]) for row in TABLE.values() if row[0] != "-" and int(row[0]) <= 450}
    depths = {name: [interpret(program, seccomp_data(number, X86_64))[1] for number in numbers]
              for name, program in programs.items()}
    for name, program in programs.items():
        print(f"{name}: {len(program)} instructions, path at most {max(depths[name])}, "
              f"mean {sum(depths[name]) / len(numbers):.1f}")
    assert len(programs["ours"]) < len(programs["tree"]) / 3
    assert max(depths["ours"]) < max(depths["tree"])
    assert sum(depths["ours"]) < sum(depths["tree"]) < sum(depths["flat"])
