"""Commands of a container's life: create, start, run, state, kill, delete (runc's flags; man 8 runc).

Driven by tests/root/test_container_cli.py and tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["command_create", "command_delete", "command_kill", "command_run", "command_start", "command_state",
           "end_by_exception", "listen_fds", "one_name", "runtime_of", "signal_number"]

import os
from _signal import SIG_DFL, SIG_IGN, SIGHUP, SIGINT, SIGTERM, default_int_handler, getsignal
from _signal import signal as set_signal

from hv.cli.oci import Context, Ended, parse
from hv.container.runtime import CreateOptions, Runtime
from hv.errors import ConfigError, HvError
from hv.linux.signals import block_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CREATE: dict[str, tuple[str, Any]] = {
    "--bundle": ("bundle", "."), "-b": ("bundle", "."), "--console-socket": ("console_socket", ""),
    "--pid-file": ("pid_file", ""), "--no-pivot": ("no_pivot", False), "--no-new-keyring": ("no_new_keyring", False),
    "--preserve-fds": ("preserve_fds", 0), "--init": ("init", False)}
_RUN = _CREATE | {"--detach": ("detach", False), "-d": ("detach", False), "--no-subreaper": ("no_subreaper", False),
                  "--keep": ("keep", False)}
_CREATE_USAGE = """usage: pyhv-runtime create [flags] ID

  --bundle DIR, -b     the bundle: config.json and a root file system [.]
  --console-socket S   a Unix socket that gets the terminal's descriptor
  --pid-file FILE      write the first process's number there
  --preserve-fds N     the program gets descriptors 3 to N+2 as well
  --no-pivot           move the root and chroot, where the rootfs is on a ramdisk
  --no-new-keyring     keep the session keyring
  --init               a first process that reaps what others leave, with the program as its child"""
_RUN_USAGE = _CREATE_USAGE.replace("create [flags]", "run [flags]") + """
  --detach, -d         do not wait for the end
  --keep               do not delete the container at its end
  --no-subreaper       leave orphans of the container to init"""
# arch/x86/include/uapi/asm/signal.h
_SIGNALS = ("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
            "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
            "WINCH", "IO", "PWR", "SYS")
_SIGNAL_ALIASES = {"IOT": 6, "POLL": 29, "CLD": 17}
_SIGRTMIN, _SIGNAL_MOST = 34, 64
_ENDING = (SIGHUP, SIGINT, SIGTERM)


def runtime_of(context: Context) -> Runtime:
    """The runtime with the state folder that the flags name."""
    runtime = Runtime(context.root)
    runtime.warn = context.warn
    return runtime


def one_name(words: list[str], command: str) -> str:
    """The container's id, which is all there may be."""
    if len(words) != 1:
        raise ConfigError(f"{command}: {'no container id' if not words else 'more than one container id'}",
                          f"`pyhv-runtime {command} --help`")
    return words[0]


def listen_fds() -> int:
    """How many descriptors from 3 on are the program's by socket activation (man 3 sd_listen_fds)."""
    count = os.environ.get("LISTEN_FDS", "")
    ours = os.environ.get("LISTEN_PID", str(os.getpid())) == str(os.getpid())
    return int(count) if count.isdecimal() and ours else 0


def _options(context: Context, values: dict[str, Any]) -> CreateOptions:
    return CreateOptions(console_socket=values["console_socket"], pid_file=values["pid_file"],
                         preserve_fds=values["preserve_fds"], listen_fds=listen_fds(), pivot=not values["no_pivot"],
                         new_keyring=not values["no_new_keyring"], systemd_cgroup=context.systemd_cgroup,
                         reaper=values["init"])


def end_by_exception() -> None:
    """What would end us in the middle of making something undoes it instead."""
    for number in _ENDING:
        if getsignal(number) in (SIG_DFL, default_int_handler):
            set_signal(number, _end)


def _end(number: int, frame: object) -> None:
    for ending in _ENDING:
        set_signal(ending, SIG_IGN)     # a second one would end the undoing
    raise Ended(number)


def command_create(context: Context, arguments: list[str]) -> int:
    """create [flags] ID"""
    values, words = parse(arguments, _CREATE, usage=_CREATE_USAGE)
    end_by_exception()
    options = _options(context, values)
    options.on_ready = block_all        # from here on it comes to its end
    runtime_of(context).create(one_name(words, "create"), values["bundle"], options)
    return 0


def command_start(context: Context, arguments: list[str]) -> int:
    """start ID"""
    _, words = parse(arguments, {}, usage="usage: pyhv-runtime start ID")
    runtime_of(context).start(one_name(words, "start"))
    return 0


def command_run(context: Context, arguments: list[str]) -> int:
    """run [flags] ID"""
    values, words = parse(arguments, _RUN, usage=_RUN_USAGE)
    runtime, name, options = runtime_of(context), one_name(words, "run"), _options(context, values)
    end_by_exception()
    if values["detach"]:
        runtime.create(name, values["bundle"], options, start=True)
        return 0
    if options.console_socket:
        raise ConfigError("--console-socket: the terminal is ours when the container is in the foreground",
                          "leave it out, or --detach")
    from hv.container.foreground import run
    from hv.container.spec import load_bundle

    spec = load_bundle(os.path.abspath(values["bundle"]))
    return run(runtime, name, spec, options, subreaper=not values["no_subreaper"], keep=values["keep"])


def command_state(context: Context, arguments: list[str]) -> int:
    """state ID"""
    from hv.plainjson import dumps

    _, words = parse(arguments, {}, usage="usage: pyhv-runtime state ID")
    print(dumps(runtime_of(context).state(one_name(words, "state")), 2))
    return 0


def command_kill(context: Context, arguments: list[str]) -> int:
    """kill [--all] ID [SIGNAL]"""
    usage = "usage: pyhv-runtime kill [--all] ID [SIGNAL]\n\n  --all, -a   signal every process of the container"
    values, words = parse(arguments, {"--all": ("all", False), "-a": ("all", False)}, usage=usage)
    if len(words) > 2:
        raise ConfigError(f"kill: too many arguments: {' '.join(words[2:])}", "`pyhv-runtime kill --help`")
    number = signal_number(words[1] if len(words) > 1 else "TERM")
    runtime_of(context).kill(one_name(words[:1], "kill"), number, everyone=values["all"])
    return 0


def command_delete(context: Context, arguments: list[str]) -> int:
    """delete [--force] ID"""
    usage = "usage: pyhv-runtime delete [--force] ID\n\n  --force, -f   end it first; no error if it is not there"
    values, words = parse(arguments, {"--force": ("force", False), "-f": ("force", False)}, usage=usage)
    runtime_of(context).delete(one_name(words, "delete"), force=values["force"])
    return 0


def signal_number(text: str) -> int:
    """A signal by number or name, with or without SIG, in any case."""
    if text.isdecimal() and 0 < int(text) <= _SIGNAL_MOST:
        return int(text)
    name = text.upper().removeprefix("SIG")
    if name in _SIGNALS:
        return _SIGNALS.index(name) + 1
    if name in _SIGNAL_ALIASES:
        return _SIGNAL_ALIASES[name]
    base, sign, offset = name.partition("+") if "+" in name else name.partition("-")
    if base in ("RTMIN", "RTMAX") and (not sign or offset.isdecimal()):
        number = (_SIGRTMIN if base == "RTMIN" else _SIGNAL_MOST) + (int(offset or 0) if sign != "-" else -int(offset))
        if _SIGRTMIN <= number <= _SIGNAL_MOST:
            return number
    raise HvError(f"unknown signal {text!r}", "for example TERM, SIGKILL or 9")
