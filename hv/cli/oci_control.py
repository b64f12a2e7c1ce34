"""`pause`, `resume`, `update`, `events`: what changes or watches a running container (runc's flags and formats).

Driven by tests/root/test_container_commands.py and tests/unit/test_container_values.py.
"""

from __future__ import annotations

__all__ = ["command_events", "command_pause", "command_resume", "command_update", "duration", "resources_of", "size"]

from hv.cli.oci import Context, parse
from hv.cli.oci_life import one_name, runtime_of
from hv.container.state import STOPPED, Record
from hv.errors import ConfigError, StateError
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.runtime import Runtime

# flag -> (part of linux.resources, field, how its value is read)
_LIMITS = {
    "--blkio-weight": ("blockIO", "weight", "number"), "--cpu-period": ("cpu", "period", "number"),
    "--cpu-quota": ("cpu", "quota", "number"), "--cpu-burst": ("cpu", "burst", "number"),
    "--cpu-share": ("cpu", "shares", "number"), "--cpu-idle": ("cpu", "idle", "number"),
    "--cpu-rt-period": ("cpu", "realtimePeriod", "number"), "--cpu-rt-runtime": ("cpu", "realtimeRuntime", "number"),
    "--cpuset-cpus": ("cpu", "cpus", "text"), "--cpuset-mems": ("cpu", "mems", "text"),
    "--memory": ("memory", "limit", "size"), "--memory-reservation": ("memory", "reservation", "size"),
    "--memory-swap": ("memory", "swap", "size"), "--pids-limit": ("pids", "limit", "number")}
_REFUSED = ("--l3-cache-schema", "--mem-bw-schema")
_UPDATE_USAGE = """usage: pyhv-runtime update [flags] ID

  --resources FILE, -r   new limits, as linux.resources of config.json has them; - for standard input; or:
  --memory, --memory-reservation, --memory-swap SIZE     bytes, or with k, m, g, t; -1: no limit
  --cpu-share, --cpu-period, --cpu-quota, --cpu-burst, --cpu-idle, --cpu-rt-period, --cpu-rt-runtime N
  --cpuset-cpus, --cpuset-mems LIST                      for example 0-3,7
  --pids-limit N, --blkio-weight N

What is not named stays as it is."""
_EVENTS_USAGE = """usage: pyhv-runtime events [flags] ID

  --stats           print the figures of now, and end
  --interval TIME   how often to print them [5s]"""
_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_MOST = 1 << 63
_RESOURCES_MOST = 1 << 20       # bytes of a --resources file


def command_pause(context: Context, arguments: list[str]) -> int:
    """pause ID"""
    _, words = parse(arguments, {}, usage="usage: pyhv-runtime pause ID")
    runtime_of(context).pause(one_name(words, "pause"), True)
    return 0


def command_resume(context: Context, arguments: list[str]) -> int:
    """resume ID"""
    _, words = parse(arguments, {}, usage="usage: pyhv-runtime resume ID")
    runtime_of(context).pause(one_name(words, "resume"), False)
    return 0


def command_update(context: Context, arguments: list[str]) -> int:
    """update [--resources FILE | flags] ID"""
    known: dict[str, tuple[str, Any]] = {name: (name, "") for name in (*_LIMITS, *_REFUSED)}
    known |= {"--resources": ("resources", ""), "-r": ("resources", "")}
    values, words = parse(arguments, known, usage=_UPDATE_USAGE)
    name = one_name(words, "update")
    for flag in _REFUSED:
        if values[flag]:
            raise ConfigError(f"{flag}: cache and bandwidth control is not offered by this runtime")
    new = _read(values["resources"]) if values["resources"] else resources_of(values)
    runtime = runtime_of(context)
    record = Record(runtime.root, name)
    record.load()
    record.lock()
    try:
        if runtime.status(record.load()) == STOPPED:
            raise StateError("container not running", "`state` tells how it is")
        _update(runtime, record, new)
    finally:
        record.unlock()
    return 0


def _update(runtime: Runtime, record: Record, new: dict[str, Any]) -> None:
    from hv.container.spec import load_file
    from hv.container.update import update

    config = load_file(record.config, record.data["bundle"]).raw
    update(runtime.group(record), config, new)
    record.save_config(dumps(config).encode())


def resources_of(values: dict[str, str]) -> dict[str, Any]:
    """linux.resources by flags; those that are "" are not named."""
    new: dict[str, Any] = {}
    for flag, (part, field, kind) in _LIMITS.items():
        text = values.get(flag, "")
        if text:
            value = text if kind == "text" else size(text, flag) if kind == "size" else _number(text, flag)
            new.setdefault(part, {})[field] = value
    return new


def _read(path: str) -> dict[str, Any]:
    from hv.container.fields import check

    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            return dict(check(loads(file.read(_RESOURCES_MOST).decode()), dict, "--resources"))
    except OSError as error:
        raise ConfigError(f"--resources {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--resources {path}: {error}", "an object as linux.resources of config.json") from None


def _number(text: str, flag: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()) or abs(int(text)) >= _MOST:
        raise ConfigError(f"{flag} {text!r:.60}", "a number")
    return int(text)


def size(text: str, flag: str) -> int:
    """Bytes: a number with a unit (k, m, g, ..., in powers of 1024), or -1."""
    if text == "-1":
        return -1
    word = text.lower().removesuffix("ib") if text.lower().endswith("ib") else text.lower()
    if len(word) > 1 and word[-1] == "b" and word[-2] in _UNITS:
        word = word[:-1]
    unit = word[-1:] if word[-1:] in _UNITS else ""
    digits = word.removesuffix(unit).strip() if unit else word
    whole, dot, part = digits.partition(".")
    if not (whole.isascii() and whole.isdecimal()) or (dot and not part.isdecimal()):
        raise ConfigError(f"{flag} {text!r:.60}", "a number of bytes, or with a unit, as 512m")
    value = int(float(digits) * (1 << _UNITS[unit])) if dot else int(digits) << _UNITS[unit]
    if value >= _MOST:
        raise ConfigError(f"{flag} {text!r:.60}: too large", "-1 means no limit")
    return value


def command_events(context: Context, arguments: list[str]) -> int:
    """events [--stats] [--interval TIME] ID"""
    from hv.container.events import stats_line, watch

    known = {"--stats": ("stats", False), "--interval": ("interval", "5s")}
    values, words = parse(arguments, known, usage=_EVENTS_USAGE)
    name, interval = one_name(words, "events"), duration(values["interval"])
    runtime = runtime_of(context)
    record = Record(runtime.root, name).load()
    if runtime.status(record) == STOPPED:
        raise StateError(f"container with id {name} is not running", "`state` tells how it is")
    group = runtime.group(record)
    if values["stats"]:
        print(stats_line(group, name))
        return 0
    for line in watch(group, name, interval, lambda: bool(record.pid)):
        print(line, flush=True)
    return 0


def duration(text: str) -> float:
    """Seconds: numbers with units, one after the other, as in 1m30s or 500ms."""
    total, rest = 0.0, text
    while rest:
        digits = rest[:len(rest) - len(rest.lstrip("0123456789."))]
        rest = rest[len(digits):]
        unit = rest[:len(rest) - len(rest.lstrip("hmsuµn"))]
        rest = rest[len(unit):]
        try:
            total += float(digits) * _SECONDS[unit]
        except (KeyError, ValueError):
            raise ConfigError(f"--interval {text!r:.60}", "a number with a unit, as 5s or 500ms") from None
    if not 0.001 <= total < 1e9:
        raise ConfigError(f"--interval {text!r:.60}", "at least 1ms")
    return total
