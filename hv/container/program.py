"""`process` of config.json: which program, who it is and what it may (runtime-spec 1.2, config.md, Process).

`exec` reads a process of its own with it. Driven by tests/unit/test_container_spec.py.
"""

from __future__ import annotations

__all__ = ["Program"]

from hv.container.fields import check, choice, get, number, words
from hv.container.fields import rows as rows_of
from hv.errors import ConfigError
from hv.linux.creds import CAPABILITIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ID_MOST = (1 << 32) - 2        # -1 means "leave it"
# include/uapi/asm-generic/resource.h
_LIMITS = {f"RLIMIT_{name}": number for number, name in enumerate((
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING",
    "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"))}
_NO_LIMIT = (1 << 64) - 1       # RLIM_INFINITY
_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Program:
    """A process to be run in a container."""

    def __init__(self, raw: dict[str, Any], where: str = "process.") -> None:
        self.raw = raw
        self.args = words(raw, "args", where)
        if not self.args:
            raise ConfigError(f"{where}args is empty", "name a program")
        if not self.args[0]:
            raise ConfigError(f"{where}args[0] is empty", "name a program")
        self.environment = words(raw, "env", where)
        for word in self.environment:
            if "=" not in word[1:]:
                raise ConfigError(f"{where}env: {word!r:.60}", "NAME=value")
        self.cwd = get(raw, "cwd", str, "", where)
        if not self.cwd.startswith("/"):
            raise ConfigError(f"{where}cwd {self.cwd!r:.60}", "an absolute path")
        self._user(get(raw, "user", dict, {}, where), where + "user.")
        self.terminal = get(raw, "terminal", bool, False, where)
        size = get(raw, "consoleSize", dict, None, where)
        self.console_size = None if size is None else tuple(
            number(size, name, where + "consoleSize.", 0, 0xFFFF) for name in ("height", "width"))
        self.no_new_privileges = get(raw, "noNewPrivileges", bool, False, where)
        self.oom_score_adj = number(raw, "oomScoreAdj", where, -1000, 1000, None)
        self.apparmor = get(raw, "apparmorProfile", str, "", where)
        self.selinux = get(raw, "selinuxLabel", str, "", where)
        sets = get(raw, "capabilities", dict, {}, where)
        self.bounding, self.effective, self.permitted, self.inheritable, self.ambient = (
            _capabilities(words(sets, name, where + "capabilities."), f"{where}capabilities.{name}") for name in _SETS)
        self._check_capabilities(where)
        self.rlimits = _rlimits(raw, where)
        self._scheduling(raw, where)

    def _user(self, user: dict[str, Any], where: str) -> None:
        self.uid, self.gid = (number(user, name, where, 0, _ID_MOST) for name in ("uid", "gid"))
        self.umask = number(user, "umask", where, 0, 0o7777, None)
        self.groups = [check(gid, int, where + "additionalGids")
                       for gid in get(user, "additionalGids", list, [], where)]
        if any(not 0 <= gid <= _ID_MOST for gid in self.groups):
            raise ConfigError(f"{where}additionalGids: a number that is no group")

    def _check_capabilities(self, where: str) -> None:
        """What the kernel would answer with EPERM (man 2 capset), by name."""
        if self.effective & ~self.permitted:
            missing = CAPABILITIES[(self.effective & ~self.permitted).bit_length() - 1]
            raise ConfigError(f"{where}capabilities.effective: {missing} is not in permitted")

    def _scheduling(self, raw: dict[str, Any], where: str) -> None:
        """scheduler, ioPriority, execCPUAffinity: rarely there, so what knows them is loaded only then."""
        self.scheduler: tuple[int, ...] | None = None
        self.io_priority: tuple[int, int] | None = None
        self.cpus: tuple[set[int], set[int]] | None = None
        if raw.get("scheduler") is not None or raw.get("ioPriority") is not None:
            from hv.linux import sched

            row = get(raw, "scheduler", dict, None, where)
            if row is not None:
                place = where + "scheduler."
                policy = choice(row, "policy", place, sched.POLICIES)
                if policy is None:
                    raise ConfigError(f"{place}policy is missing", f"one of {', '.join(sched.POLICIES)}")
                flags = sum({choice({"flags": word}, "flags", place, sched.FLAGS)
                             for word in words(row, "flags", place)})
                self.scheduler = (policy, flags, number(row, "nice", place, -20, 19),
                                  number(row, "priority", place, 0, 99),
                                  *(number(row, name, place, 0, (1 << 63) - 1)
                                    for name in ("runtime", "deadline", "period")))
            row = get(raw, "ioPriority", dict, None, where)
            if row is not None:
                place = where + "ioPriority."
                kind = choice(row, "class", place, sched.IO_CLASSES)
                if kind is None:
                    raise ConfigError(f"{place}class is missing", f"one of {', '.join(sched.IO_CLASSES)}")
                self.io_priority = kind, number(row, "priority", place, 0, 7)
        row = get(raw, "execCPUAffinity", dict, None, where)
        if row is not None:
            place = where + "execCPUAffinity."
            initial, final = (_cpus(get(row, name, str, "", place), place + name) for name in ("initial", "final"))
            self.cpus = initial, final

    @property
    def path(self) -> str:
        """PATH of the program's environment, which is where it is looked for; the last one counts."""
        found = _DEFAULT_PATH
        for word in self.environment:
            if word.startswith("PATH="):
                found = word[5:]
        return found


def _capabilities(names: list[str], where: str) -> int:
    bits = 0
    for name in names:
        if name not in CAPABILITIES:
            raise ConfigError(f"{where}: {name!r:.60} is no capability", "for example CAP_KILL")
        bits |= 1 << CAPABILITIES.index(name)
    return bits


def _rlimits(raw: dict[str, Any], where: str) -> list[tuple[int, int, int, str]]:
    limits = []
    seen = set()
    for row, place in rows_of(raw, "rlimits", where):
        kind = choice(row, "type", place, _LIMITS)
        if kind is None:
            raise ConfigError(f"{place}type is missing", "for example RLIMIT_NOFILE")
        if kind in seen:
            raise ConfigError(f"{place}type {row['type']} stands there twice")      # config.md: MUST generate an error
        seen.add(kind)
        soft, hard = (_limit(number(row, name, place, -1, _NO_LIMIT)) for name in ("soft", "hard"))
        limits.append((kind, soft, hard, row["type"]))
    return limits


def _limit(value: int) -> int:
    return -1 if value in (-1, _NO_LIMIT) else value        # the resource module's RLIM_INFINITY


def _cpus(text: str, where: str) -> set[int]:
    """A list of processors: 0-3,7."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) > 8191:
            raise ConfigError(f"{where} {text!r:.60}", "a list of processors, as 0-3,7")
        found.update(range(int(first), int(last or first) + 1))
    return found
