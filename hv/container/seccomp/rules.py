"""linux.seccomp of config.json, checked (runtime-spec 1.2, config-linux.md, Seccomp).

What the field's runtimes agree on beyond the specification, so that a profile means the same here:

- A name that no architecture of the table has is ignored: profiles name calls of all kernels and architectures.
- A rule whose action is the default's is skipped.
- Two conditions on one argument make alternatives of all conditions of that rule; else all must hold.
- SCMP_CMP_MASKED_EQ looks at the bits of the mask only, of `valueTwo` too.

Driven by tests/unit/test_seccomp_profile.py and tests/unit/test_seccomp_peer.py.
"""

from __future__ import annotations

__all__ = ["ACTIONS", "ALLOW", "ERRNO", "KILL_THREAD", "NOTIFY", "Condition", "Profile", "Rule"]

import errno

from hv.container.seccomp.syscalls import ARCHITECTURES, NATIVE, OTHER_ARCHITECTURES
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# include/uapi/linux/seccomp.h: SECCOMP_RET_*
KILL_THREAD, ERRNO, TRACE, NOTIFY, ALLOW = 0, 0x00050000, 0x7FF00000, 0x7FC00000, 0x7FFF0000
ACTIONS = {
    "SCMP_ACT_KILL": KILL_THREAD, "SCMP_ACT_KILL_THREAD": KILL_THREAD, "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000, "SCMP_ACT_ERRNO": ERRNO, "SCMP_ACT_TRACE": TRACE, "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_NOTIFY": NOTIFY,
}
# include/linux/err.h: MAX_ERRNO, what the kernel makes of any higher one; SECCOMP_RET_DATA
_DATA_MOST = {ERRNO: 4095, TRACE: 0xFFFF}
OPERATORS = frozenset("SCMP_CMP_" + name for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
# include/uapi/linux/seccomp.h: SECCOMP_FILTER_FLAG_*. NEW_LISTENER is no profile's to ask for.
FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
         "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32}
_SPEC_ALLOW, _WAIT_KILLABLE_RECV = 4, 32
_ARGUMENTS = 6
_WORD = (1 << 64) - 1

# (argument, operator, value, mask)
Condition = tuple[int, str, int, int]
# (names, action, alternatives: one must hold, none means always)
Rule = tuple[list[str], int, list[tuple[Condition, ...]]]


class Profile:
    """A profile, understood. ConfigError names the field that can't be."""

    def __init__(self, raw: dict[str, Any]) -> None:
        where = "linux.seccomp."
        self.default = _action(raw, "defaultAction", "defaultErrnoRet", where)
        self.architectures = _architectures(_get(raw, "architectures", list, where) or [])
        self.rules = [_rule(row, f"{where}syscalls[{index}]")
                      for index, row in enumerate(_get(raw, "syscalls", list, where) or [])]
        self.listener = NOTIFY in {self.default, *(action for _, action, _ in self.rules)}
        self.flags = _flags(_get(raw, "flags", list, where))
        if not self.listener:
            self.flags &= ~_WAIT_KILLABLE_RECV      # it is about notifications, and without any the kernel refuses it
        path, metadata = _get(raw, "listenerPath", str, where), _get(raw, "listenerMetadata", str, where)
        if metadata and not path:
            raise ConfigError("linux.seccomp.listenerMetadata is set, but listenerPath is not", "name the socket")
        if self.listener:
            self._check_listener(path)

    def _check_listener(self, path: str | None) -> None:
        if not path:
            raise ConfigError("linux.seccomp: SCMP_ACT_NOTIFY without listenerPath", "name the supervisor's socket")
        hint = "the descriptor is sent to the supervisor by it, under this filter already"
        if self.default == NOTIFY:
            raise ConfigError("linux.seccomp.defaultAction SCMP_ACT_NOTIFY", "sendmsg would wait for the supervisor, "
                              "to whom it sends the descriptor")
        for names, action, _ in self.rules:
            if action == NOTIFY and "sendmsg" in names:
                raise ConfigError("linux.seccomp.syscalls: SCMP_ACT_NOTIFY for sendmsg", hint)


def _rule(row: Any, where: str) -> Rule:
    if type(row) is not dict:
        raise ConfigError(f"{where}: {row!r:.60} is not an object")
    where += "."
    names = _get(row, "names", list, where)
    if not names:
        raise ConfigError(f"{where}names is missing or empty", "name a system call")
    for name in names:
        if type(name) is not str or not name:
            raise ConfigError(f"{where}names: {name!r:.60} is no name of a system call")
    action = _action(row, "action", "errnoRet", where)
    args = _get(row, "args", list, where)
    if not args:
        return names, action, []
    conditions = [_condition(arg, f"{where}args[{index}]") for index, arg in enumerate(args)]
    if len({condition[0] for condition in conditions}) < len(conditions):
        return names, action, [(condition,) for condition in conditions]
    return names, action, [tuple(conditions)]


def _condition(row: Any, where: str) -> Condition:
    if type(row) is not dict:
        raise ConfigError(f"{where}: {row!r:.60} is not an object")
    where += "."
    index, value, operator = _get(row, "index", int, where), _get(row, "value", int, where), _get(row, "op", str, where)
    second = _get(row, "valueTwo", int, where) or 0
    index, value = index or 0, value or 0       # required, but runc takes one that is missing for 0
    if index not in range(_ARGUMENTS):
        raise ConfigError(f"{where}index {index}", f"a system call has arguments 0 to {_ARGUMENTS - 1}")
    if not operator:
        raise ConfigError(f"{where}op is missing", "for example SCMP_CMP_EQ")
    if operator not in OPERATORS:
        raise ConfigError(f"{where}op {operator!r:.60}", f"one of {', '.join(sorted(OPERATORS))}")
    for name, number in (("value", value), ("valueTwo", second)):
        if not 0 <= number <= _WORD:
            raise ConfigError(f"{where}{name} {number!r:.60}", "an unsigned number of 64 bits")
    if operator == "SCMP_CMP_MASKED_EQ":
        return index, operator, second & value, value       # seccomp_rule_add(3): the mask comes first
    return index, operator, value, _WORD


def _action(row: dict[str, Any], name: str, number: str, where: str) -> int:
    word = _get(row, name, str, where)
    if not word:
        raise ConfigError(f"{where}{name} is missing", "for example SCMP_ACT_ERRNO")
    action = ACTIONS.get(word)
    if action is None:
        raise ConfigError(f"{where}{name} {word!r:.60}", f"one of {', '.join(sorted(ACTIONS))}")
    data = _get(row, number, int, where)
    if action in (ERRNO, TRACE):
        data = errno.EPERM if data is None else data
        if not 0 <= data <= _DATA_MOST[action]:
            raise ConfigError(f"{where}{number} {data!r:.60}", f"0 to {_DATA_MOST[action]}")
        return action | data
    if data is not None:
        raise ConfigError(f"{where}{number} with {word}", "only SCMP_ACT_ERRNO and SCMP_ACT_TRACE take it")
    return action


def _architectures(names: list[Any]) -> list[str]:
    """Those that the filter gets code for; the host's is always one."""
    if not NATIVE:
        raise ConfigError("linux.seccomp: this machine's architecture has no table of system calls")
    chosen = [NATIVE]
    for name in names:
        if type(name) is str and name in ARCHITECTURES:
            if name not in chosen:
                chosen.append(name)
        elif type(name) is not str or name not in OTHER_ARCHITECTURES:
            raise ConfigError(f"linux.seccomp.architectures: {name!r:.60} is not known", "for example SCMP_ARCH_X86_64")
    return chosen


def _flags(names: list[Any] | None) -> int:
    if names is None:
        return _SPEC_ALLOW      # as runc does: the mitigation costs speed, and programs can ask for it (prctl(2))
    bits = 0
    for name in names:
        if type(name) is not str or name not in FLAGS:
            raise ConfigError(f"linux.seccomp.flags: {name!r:.60} is not known", f"one of {', '.join(FLAGS)}")
        bits |= FLAGS[name]
    return bits


def _get(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if value is not None and type(value) is not kind:       # bool is no number here
        expected = {list: "an array", str: "a string", int: "a number"}[kind]
        raise ConfigError(f"{where}{name}: {value!r:.60} is not {expected}")
    return value
