"""linux.seccomp, field by field: what it means, and what is refused by which name."""

from __future__ import annotations

import pytest
from framework.seccomp import AARCH64, ACTIONS, I386, X32_BIT, X86_64, decode, interpret, seccomp_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hv.container.seccomp.compile import compile_profile
from hv.container.seccomp.syscalls import OTHER_ARCHITECTURES
from hv.errors import ConfigError

ALLOW, KILL = "SCMP_ACT_ALLOW", "SCMP_ACT_KILL"
READ, GETPID = 0, 39


def rule(names, action=ALLOW, **more):
    return {"names": names if isinstance(names, list) else [names], "action": action, **more}


def arg(index=0, value=0, op="SCMP_CMP_EQ", **more):
    return {"index": index, "value": value, "op": op, **more}


def answer(profile: dict, nr: int, *args: int, arch: int = X86_64) -> int:
    return interpret(decode(compile_profile(profile, cache=False)), seccomp_data(nr, arch, args))[0]


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_action(action):
    profile = {"defaultAction": "SCMP_ACT_TRAP" if action == ALLOW else ALLOW, "listenerPath": "/s",
               "syscalls": [rule("read", action)]}
    program = compile_profile(profile, cache=False)
    assert answer(profile, READ) == ACTIONS[action] | (1 if action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") else 0)
    assert answer(profile, GETPID) == ACTIONS[profile["defaultAction"]]
    assert program.listener == (action == "SCMP_ACT_NOTIFY")


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"SCMP_ACT_NOTIFY"}))
def test_every_default(action):
    data = 1 if action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") else 0
    assert answer({"defaultAction": action}, READ) == ACTIONS[action] | data
    if data:
        assert answer({"defaultAction": action, "defaultErrnoRet": 95}, READ) == ACTIONS[action] | 95
        assert answer({"defaultAction": ALLOW, "syscalls": [rule("read", action, errnoRet=0)]}, READ) == ACTIONS[action]


BAD = [
    ({}, "defaultAction is missing"),
    ({"defaultAction": "SCMP_ACT_MAYBE"}, r"defaultAction 'SCMP_ACT_MAYBE'"),
    ({"defaultAction": 5}, "defaultAction: 5 is not a string"),
    ({"defaultAction": ALLOW, "defaultErrnoRet": 1}, "defaultErrnoRet with SCMP_ACT_ALLOW"),
    ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70000}, "defaultErrnoRet 70000"),
    ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096}, "defaultErrnoRet 4096"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", "SCMP_ACT_ERRNO", errnoRet=4096)]}, "errnoRet 4096"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", "SCMP_ACT_TRACE", errnoRet=65536)]}, "errnoRet 65536"),
    ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": -1}, "defaultErrnoRet -1"),
    ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": True}, "defaultErrnoRet: True is not a number"),
    ({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/s"}, "defaultAction SCMP_ACT_NOTIFY"),
    ({"defaultAction": ALLOW, "architectures": ["SCMP_ARCH_Z80"]}, "architectures: 'SCMP_ARCH_Z80' is not known"),
    ({"defaultAction": ALLOW, "architectures": [None]}, "architectures: None is not known"),
    ({"defaultAction": ALLOW, "architectures": {}}, "architectures: {} is not an array"),
    ({"defaultAction": ALLOW, "flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}, "flags: 'SECCOMP_FILTER_FLAG_NEW"),
    ({"defaultAction": ALLOW, "flags": [[]]}, r"flags: \[\] is not known"),
    ({"defaultAction": ALLOW, "listenerMetadata": "x"}, "listenerMetadata is set, but listenerPath is not"),
    ({"defaultAction": ALLOW, "syscalls": [5]}, r"syscalls\[0\]: 5 is not an object"),
    ({"defaultAction": ALLOW, "syscalls": [rule([])]}, r"syscalls\[0\].names is missing or empty"),
    ({"defaultAction": ALLOW, "syscalls": [{"action": KILL}]}, r"syscalls\[0\].names is missing or empty"),
    ({"defaultAction": ALLOW, "syscalls": [rule([7])]}, r"syscalls\[0\].names: 7 is no name"),
    ({"defaultAction": ALLOW, "syscalls": [{"names": ["read"]}]}, r"syscalls\[0\].action is missing"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", "ALLOW")]}, r"syscalls\[0\].action 'ALLOW'"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, errnoRet=1)]}, r"syscalls\[0\].errnoRet with SCMP_ACT"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", "SCMP_ACT_NOTIFY")]}, "SCMP_ACT_NOTIFY without listenerPath"),
    ({"defaultAction": ALLOW, "listenerPath": "/s", "syscalls": [rule("sendmsg", "SCMP_ACT_NOTIFY")]}, "for sendmsg"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[arg(6)])]}, r"\[0\].args\[0\].index 6"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[arg(-1)])]}, r"args\[0\].index -1"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[arg(), arg(1, 1 << 64)])]}, r"args\[1\].value 184"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[arg(valueTwo=-1)])]}, r"args\[0\].valueTwo -1"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[arg(0, 1.0)])]}, r"args\[0\].value: 1.0 is not"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[arg(op="SCMP_CMP_IN")])]}, r"op 'SCMP_CMP_IN'"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=[{"index": 0, "value": 1}])]}, r"op is missing"),
    ({"defaultAction": ALLOW, "syscalls": [rule("read", KILL, args=["x"])]}, r"args\[0\]: 'x' is not an object"),
]


@pytest.mark.parametrize(("profile", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_refused(profile, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compile_profile(profile, cache=False)
    assert str(caught.value).startswith("linux.seccomp")


ODD = (st.none() | st.booleans() | st.integers(-5, 1 << 65) | st.text(max_size=5) | st.floats()
       | st.sampled_from([[], {}, [None], [[]], {"names": 5}, *sorted(ACTIONS), "SCMP_CMP_EQ", "read"]))
ARG = st.dictionaries(st.sampled_from(["index", "value", "valueTwo", "op"]), ODD, max_size=4)
RULE = st.fixed_dictionaries({"names": st.just(["read"]) | ODD, "action": st.just(KILL) | ODD}, optional={
    "args": st.lists(ARG | ODD, max_size=2), "errnoRet": ODD, "x": ODD})
FIELDS = dict.fromkeys(("defaultAction", "defaultErrnoRet", "listenerPath", "listenerMetadata", "unknown"), ODD)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({}, optional=FIELDS | {
    "architectures": ODD | st.lists(ODD, max_size=2), "flags": ODD | st.lists(ODD, max_size=2),
    "syscalls": ODD | st.lists(RULE | ODD, max_size=3)}))
def test_any_json_compiles_or_is_refused(profile):
    try:
        compile_profile({"defaultAction": ALLOW} | profile, cache=False)
    except ConfigError:
        pass


def test_flags():
    def flags(**more):
        return compile_profile({"defaultAction": ALLOW, "listenerPath": "/s", **more}, cache=False).flags

    notify = [rule("read", "SCMP_ACT_NOTIFY")]
    names = ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]
    assert flags() == 4                                 # SPEC_ALLOW where nothing is said
    assert flags(flags=[]) == 0
    assert flags(flags=names, syscalls=notify) == 1 | 2 | 32
    assert flags(flags=names) == 1 | 2                  # without notifications there is none to wait for


def test_unknown_names_are_ignored_and_foreign_architectures_change_nothing():
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule(["no_such_call", "read"])]}
    assert answer(profile, READ) == ACTIONS[ALLOW]
    more = profile | {"architectures": sorted(OTHER_ARCHITECTURES)}
    assert compile_profile(more, cache=False) == compile_profile(profile, cache=False)


def test_the_highest_numbers_are_handed_on():
    """An error of 4095 is one for the kernel; libseccomp 2.5.4 refuses it (`<` in sys_chk_seccomp_action)."""
    for action, number in (("SCMP_ACT_ERRNO", 4095), ("SCMP_ACT_TRACE", 65535)):
        profile = {"defaultAction": ALLOW, "syscalls": [rule("read", action, errnoRet=number)]}
        assert answer(profile, READ) == ACTIONS[action] | number


def test_kill_is_kill_thread_and_not_kill_process():
    """libseccomp's names: a rule of KILL repeats a default of KILL_THREAD, one of KILL_PROCESS does not."""
    for default in ("SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD"):
        for same in ("SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD"):
            profile = {"defaultAction": default, "syscalls": [rule("read", same),
                                                              rule("read", "SCMP_ACT_KILL_PROCESS", args=[arg(0, 5)])]}
            assert [answer(profile, READ, value) for value in (5, 6)] == [0x80000000, 0]
    profile = {"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [rule("read", KILL)]}
    assert answer(profile, READ) == 0


def test_a_rule_with_the_defaults_action_is_skipped():
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule("read", "SCMP_ACT_ERRNO", errnoRet=1),
                                                               rule("read", args=[arg(0, 5)])]}
    assert answer(profile, READ, 5) == ACTIONS[ALLOW]
    assert answer(profile, READ, 6) == ACTIONS["SCMP_ACT_ERRNO"] | 1


def test_architectures():
    rules = {"syscalls": [rule(["getpid"])]}
    plain = {"defaultAction": "SCMP_ACT_KILL_PROCESS", **rules}
    every = plain | {"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"]}
    for profile, others in ((plain, 0), (every, ACTIONS[ALLOW])):
        assert answer(profile, 39) == ACTIONS[ALLOW]
        assert answer(profile, 20, arch=I386) == others
        assert answer(profile, 39 | X32_BIT) == others
        assert answer(profile, 172, arch=AARCH64) == others
        assert answer(profile, 39, arch=0xC0000016) == 0            # s390x: kills the thread
        assert answer(profile, 0xFFFFFFFF) == 0x80000000            # skipped by a tracer: the default


@pytest.mark.parametrize("default", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_ALLOW", "SCMP_ACT_LOG"])
def test_calls_newer_than_the_table_do_not_exist(default):
    profile = {"defaultAction": default, "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}
    usual = ACTIONS[default] | (default == "SCMP_ACT_ERRNO")
    newer = ACTIONS[default] | 38 if default == "SCMP_ACT_ERRNO" else usual
    for number, arch in ((470, X86_64), (470, I386), (547 | X32_BIT, X86_64), (0xFFFFFFFF, X86_64)):
        assert answer(profile, number, arch=arch) == usual
    for number, arch in ((600, X86_64), (600, I386), (600 | X32_BIT, X86_64), (X32_BIT - 1, X86_64)):
        assert answer(profile, number, arch=arch) == newer


def test_the_first_of_overlapping_rules_wins_but_one_without_conditions_beats_all():
    low, high = (rule("read", "SCMP_ACT_ERRNO", errnoRet=number, args=[arg(0, 5, op)])
                 for number, op in ((10, "SCMP_CMP_LE"), (20, "SCMP_CMP_GE")))
    for rules, middle in (([low, high], 10), ([high, low], 20)):
        profile = {"defaultAction": ALLOW, "syscalls": rules}
        assert [answer(profile, READ, value) & 0xFFFF for value in (4, 5, 6)] == [10, middle, 20]
        profile["syscalls"] = [*rules, rule("read", "SCMP_ACT_ERRNO", errnoRet=30), rule("read", KILL)]
        assert answer(profile, READ, 5) & 0xFFFF == 30


def test_a_version_in_ipcs_call_hides_nothing():
    """ipc(2) takes the lower half of its first argument only."""
    profile = {"defaultAction": ALLOW, "architectures": ["SCMP_ARCH_X86"], "syscalls": [rule("shmat", KILL)]}
    assert answer(profile, 117, 21, arch=I386) == answer(profile, 117, 0x10015, arch=I386) == 0
    assert answer(profile, 117, 22, arch=I386) == ACTIONS[ALLOW]


def test_a_profile_that_makes_too_long_a_filter_is_refused():
    rules = [rule("read", KILL, args=[arg(number % 6, number << 32)]) for number in range(3000)]
    with pytest.raises(ConfigError, match=r"a filter of \d+ instructions"):
        compile_profile({"defaultAction": ALLOW, "syscalls": rules}, cache=False)
