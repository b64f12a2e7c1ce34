"""Values of options as people write them: sizes, times, limits, mounts. ConfigError names the option.

Driven by tests/unit/test_instance_values.py.
"""

from __future__ import annotations

__all__ = ["cpus", "duration", "env_lines", "mount", "number", "pair", "signal_number", "size", "tmpfs", "ulimit",
           "volume"]

import os

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE_MOST = 1 << 62
_TIMES = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
# include/uapi/asm-generic/resource.h
_ULIMITS = ("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss",
            "rtprio", "rttime", "sigpending", "stack")
_FILE_MOST = 1 << 20
# arch/x86/include/uapi/asm/signal.h, in the order of their numbers
_SIGNALS = ("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
            "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
            "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS")
_SIGRTMIN, _SIGNAL_MOST = 34, 64


def number(text: str, option: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20) or not low <= int(text) <= high:
        raise ConfigError(f"{option} {text!r:.40}", f"a whole number from {low} to {high}")
    return int(text)


def size(text: str, option: str, low: int = 0) -> int:
    """Bytes: 512m, 1.5g, 4096."""
    word = text.strip().lower().removesuffix("ib") if text.lower().endswith("ib") else text.strip().lower()
    if word.endswith("b") and word[-2:-1] in "kmgt" and len(word) > 1:
        word = word[:-1]
    digits, unit = (word, "") if word[-1:].isdecimal() else (word[:-1], word[-1:])
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if unit not in _UNITS or not 0 <= value < _SIZE_MOST or not digits.replace(".", "", 1).isdecimal():
        raise ConfigError(f"{option} {text!r:.40}", "a size: 64m, 1.5g, ...")
    found = int(value * (1 << _UNITS[unit]))
    if not low <= found <= _SIZE_MOST:
        raise ConfigError(f"{option} {text}: at least {low} bytes")
    return found


def cpus(text: str, option: str = "--cpus") -> float:
    """A number of processors: 0.5, 2."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0.01 <= value <= 8192:
        raise ConfigError(f"{option} {text!r:.40}", "a number of processors, 0.01 or more: 0.5, 2")
    return value


def duration(text: str, option: str) -> float:
    """Seconds: 10, 1.5, 200ms, 5m."""
    word = text.strip()
    unit = next((name for name in ("ms", "s", "m", "h") if word.endswith(name)), "")
    try:
        value = float(word[:len(word) - len(unit)]) * (_TIMES[unit] if unit else 1.0)
    except ValueError:
        value = -1
    if not 0 <= value < 1e9:
        raise ConfigError(f"{option} {text!r:.40}", "a time: 10, 1.5s, 5m")
    return value


def pair(text: str, option: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with an empty value."""
    name, _, value = text.partition("=")
    if not name or "\0" in text:
        raise ConfigError(f"{option} {text!r:.60}", "NAME=VALUE")
    return name, value


def env_lines(path: str) -> list[str]:
    """--env-file: NAME=VALUE a line; NAME alone is taken from our own environment; # begins a remark."""
    try:
        with open(path, "rb", 0) as file:
            text = file.read(_FILE_MOST + 1)
    except OSError as error:
        raise ConfigError(f"--env-file {path}: {os.strerror(error.errno or 0)}") from None
    if len(text) > _FILE_MOST or b"\0" in text:
        raise ConfigError(f"--env-file {path}: more than {_FILE_MOST >> 20} MiB, or no text")
    lines = text.decode("utf-8", "surrogateescape").splitlines()
    return [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def signal_number(text: str, option: str) -> int:
    """A signal by number or name, with or without SIG."""
    if text.isascii() and text.isdecimal() and 0 < int(text) <= _SIGNAL_MOST:
        return int(text)
    name = text.upper().removeprefix("SIG")
    if name in _SIGNALS:
        return _SIGNALS.index(name) + 1
    base, sign, offset = name.partition("+") if "+" in name else name.partition("-")
    if base in ("RTMIN", "RTMAX") and (not sign or offset.isdecimal()):
        found = (_SIGRTMIN if base == "RTMIN" else _SIGNAL_MOST) + (int(offset or 0) if sign != "-" else -int(offset))
        if _SIGRTMIN <= found <= _SIGNAL_MOST:
            return found
    raise ConfigError(f"{option} {text!r:.40} is no signal", "for example TERM, SIGKILL or 9")


def ulimit(text: str) -> dict[str, Any]:
    """--ulimit NAME=SOFT[:HARD], as process.rlimits of config.json has it."""
    name, equals, rest = text.partition("=")
    soft, colon, hard = rest.partition(":")
    if not equals or name not in _ULIMITS:
        raise ConfigError(f"--ulimit {text!r:.60}", "NAME=SOFT[:HARD], for example nofile=1024:4096")
    values = [-1 if word in ("-1", "unlimited") else number(word, f"--ulimit {name}", 0, 1 << 62)
              for word in (soft, hard if colon else soft)]
    if values[1] != -1 and not 0 <= values[0] <= values[1]:
        raise ConfigError(f"--ulimit {text}: the soft limit is above the hard one")
    return {"type": f"RLIMIT_{name.upper()}", "soft": values[0], "hard": values[1]}


def volume(text: str) -> dict[str, Any]:
    """-v [SOURCE:]TARGET[:OPTIONS]: a path is bound, a name is a volume, nothing is a volume without a name."""
    parts = text.split(":")
    if len(parts) == 1:
        source, target, options = "", parts[0], ""
    elif len(parts) == 2:
        source, target, options = parts[0], parts[1], ""
    elif len(parts) == 3:
        source, target, options = parts
    else:
        raise ConfigError(f"-v {text!r:.80}", "[SOURCE:]TARGET[:OPTIONS]")
    if len(parts) > 1 and not source:
        raise ConfigError(f"-v {text!r:.80}: no source before the colon", "[SOURCE:]TARGET[:OPTIONS]")
    row: dict[str, Any] = {"target": _target(target, f"-v {text}"), "readonly": False, "options": []}
    for word in options.split(",") if options else ():
        if word == "ro":
            row["readonly"] = True
        elif word in ("rprivate", "private", "rslave", "slave", "rshared", "shared"):
            row["options"].append(word)
        elif word == "nocopy":
            row["nocopy"] = True
        elif word in ("z", "Z"):
            raise ConfigError(f"-v {text}: {word}: SELinux labels of volumes are not offered", "leave it out")
        elif word != "rw":
            raise ConfigError(f"-v {text}: option {word!r:.40}", "ro, rw, nocopy, or a propagation such as rslave")
    if source.startswith(("/", "./", "../", "~")) or source in (".", ".."):
        return row | {"kind": "bind", "source": os.path.abspath(os.path.expanduser(source))}
    if "/" in source:
        raise ConfigError(f"-v {text}: {source!r:.60} is neither a volume's name nor an absolute path",
                          f"for a folder: -v ./{source}:{target}")
    return row | {"kind": "volume", "source": source}


def mount(text: str) -> dict[str, Any]:
    """--mount type=bind|volume|tmpfs,source=,target=,readonly, ..."""
    row: dict[str, Any] = {"kind": "volume", "source": "", "readonly": False, "options": []}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if name == "type" and value in ("bind", "volume", "tmpfs"):
            row["kind"] = value
        elif name in ("source", "src") and equals:
            row["source"] = value
        elif name in ("target", "dst", "destination") and equals:
            row["target"] = _target(value, "--mount target")
        elif name in ("readonly", "ro"):
            row["readonly"] = _truth(value if equals else "true", word)
        elif name == "bind-propagation" and equals:
            row["options"].append(value)
        elif name == "volume-nocopy":
            row["nocopy"] = _truth(value if equals else "true", word)
        elif name == "tmpfs-size" and equals:
            row["options"].append(f"size={size(value, '--mount tmpfs-size')}")
        elif name == "tmpfs-mode" and value and not value.strip("01234567"):
            row["options"].append(f"mode={value}")
        else:
            raise ConfigError(f"--mount {text!r:.100}: {word!r:.40}",
                              "type=bind|volume|tmpfs, source=, target=, readonly, bind-propagation=, volume-nocopy, "
                              "tmpfs-size=, tmpfs-mode=")
    if "target" not in row:
        raise ConfigError(f"--mount {text!r:.100}: no target=")
    if row["kind"] == "bind" and not row["source"].startswith("/"):
        raise ConfigError(f"--mount {text!r:.100}: source= must be an absolute path")
    if row["kind"] == "tmpfs" and row["source"]:
        raise ConfigError(f"--mount {text!r:.100}: a tmpfs has no source")
    return row


def tmpfs(text: str) -> dict[str, Any]:
    """--tmpfs TARGET[:OPTIONS], options as mount(8) has them."""
    target, _, options = text.partition(":")
    return {"kind": "tmpfs", "source": "", "target": _target(target, "--tmpfs"), "readonly": False,
            "options": [word for word in options.split(",") if word]}


def _target(path: str, option: str) -> str:
    if not path.startswith("/") or "\0" in path or os.path.normpath(path) == "/":
        raise ConfigError(f"{option}: {path!r:.60} is no place in the instance", "an absolute path below /")
    return os.path.normpath(path)


def _truth(text: str, word: str) -> bool:
    if text not in ("true", "false", "1", "0"):
        raise ConfigError(f"{word}: true or false")
    return text in ("true", "1")
