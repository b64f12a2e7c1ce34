"""The runtime's command line: `pyhv-runtime` and `pyhv oci`, with runc's global flags and order of arguments.

    pyhv-runtime [global flags] COMMAND [flags] [arguments]

Engines (podman, conmon, containerd, CRI-O) call it as they call runc. An error goes to standard error as one line, and
to --log as one record: with --log-format json an object with level, msg and time. Exit code 1 for every failure, as
there. Driven by tests/root/test_container_cli.py.
"""

from __future__ import annotations

__all__ = ["COMMANDS", "Context", "Ended", "main", "parse"]

import os

from hv.cli.say import say
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "pyhv-runtime"
# command -> (module, what it does); the module has a function command_NAME(context, arguments) -> exit code
COMMANDS = {
    "create": ("hv.cli.oci_life", "create a container"),
    "start": ("hv.cli.oci_life", "run the program of a created container"),
    "run": ("hv.cli.oci_life", "create and start a container, and wait for its end"),
    "state": ("hv.cli.oci_life", "print the state of a container"),
    "kill": ("hv.cli.oci_life", "send a signal (default: SIGTERM) to a container's first process"),
    "delete": ("hv.cli.oci_life", "remove a container that has ended"),
    "list": ("hv.cli.oci_list", "list the containers under --root"),
    "spec": ("hv.cli.oci_spec", "write a config.json to begin with"),
    "exec": ("hv.cli.oci_exec", "run a program in a running container"),
    "ps": ("hv.cli.oci_ps", "list a container's processes"),
    "pause": ("hv.cli.oci_control", "stop all processes of a container"),
    "resume": ("hv.cli.oci_control", "let them go on"),
    "update": ("hv.cli.oci_control", "change a running container's limits"),
    "events": ("hv.cli.oci_control", "print figures, and when memory runs out"),
    "features": ("hv.cli.oci_features", "print what this runtime can do"),
    "checkpoint": ("hv.cli.oci_criu", "write a running container to files, by CRIU"),
    "restore": ("hv.cli.oci_criu", "make a container again from such files"),
}
# name -> (key, default); a default of False: a switch
GLOBALS: dict[str, tuple[str, Any]] = {
    "--root": ("root", ""), "--log": ("log", ""), "--log-format": ("log_format", "text"), "--debug": ("debug", False),
    "--systemd-cgroup": ("systemd_cgroup", False), "--rootless": ("rootless", "auto"), "--criu": ("criu", "criu"),
    "--version": ("version", False), "-v": ("version", False), "--help": ("help", False), "-h": ("help", False),
}
_SIGINT = 2
_USAGE = """usage: pyhv-runtime [global flags] COMMAND [flags] [arguments]

An OCI runtime with runc's command line.

commands:
{commands}

global flags:
  --root DIR          where the state of containers is kept
  --log FILE          write log records there
  --log-format KIND   text (default) or json
  --debug             log more; on an internal error print a traceback
  --systemd-cgroup    have systemd make the cgroup: linux.cgroupsPath is slice:prefix:name
  --version, -v       print the versions
  --help, -h          print this; after a command: its flags"""


class Context:
    """The global flags, and where records go."""

    def __init__(self, flags: dict[str, Any], program: str = PROGRAM) -> None:
        self.program = program
        self.root = str(flags["root"])
        self.systemd_cgroup = bool(flags["systemd_cgroup"])
        self.debug = bool(flags["debug"])
        self.criu = str(flags["criu"])
        self._log, self._json = str(flags["log"]), flags["log_format"] == "json"
        if flags["log_format"] not in ("text", "json"):
            raise ConfigError(f"--log-format {flags['log_format']}", "text or json")

    def record(self, level: str, message: str) -> None:
        """A record in the log, if there is one."""
        if not self._log:
            return
        from hv.container.state import now
        from hv.plainjson import dumps

        time = now()
        if self._json:
            line = "{" + f'"level":"{level}","msg":{dumps(message)},"time":"{time}"' + "}\n"
        else:
            line = f'time="{time}" level={level} msg={dumps(message)}\n'
        try:
            fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)
        except OSError as error:
            say(f"{self.program}: --log {self._log}: {os.strerror(error.errno or 0)}")

    def warn(self, message: str) -> None:
        """Something went wrong that stops nothing."""
        self.record("warning", message)
        if not self._log:
            say(f"{self.program}: warning: {message}")


def main(arguments: list[str], program: str = PROGRAM, commands: dict[str, tuple[str, str]] | None = None) -> int:
    """Run the command line; the exit code. `commands` of another `program` with the same flags (vm_runtime.py)."""
    context = None
    try:
        flags, rest = parse(arguments, GLOBALS, stop_early=True)
        if flags["version"]:
            return _version(program)
        known = commands or COMMANDS
        if flags["help"] or not rest:
            width = max(map(len, known))
            rows = [f"  {name:{width}}  {what}" for name, (_, what) in known.items()]
            print(_USAGE.format(commands="\n".join(rows)).replace(PROGRAM, program, 1))
            return 0
        context = Context(flags, program)
        if rest[0] not in known:
            raise ConfigError(f"{rest[0]!r} is no command", f"`{program} --help` lists them")
        if context.debug:
            context.record("debug", "arguments: " + " ".join(rest))
        if commands is None and is_for_vm(context.root, rest):
            from hv.cli.vm_runtime import COMMANDS as known
        module = __import__(known[rest[0]][0], fromlist=["*"])
        code: int = getattr(module, f"command_{rest[0]}")(context, rest[1:])
        return code
    except _Done:
        return 0
    except HvError as error:
        text = f"{error}" + (f" - {error.hint}" if error.hint else "")
        if context:
            context.record("error", text)
        say(f"{program}: {text}")
        return error.exit_code if error.exit_code > ConfigError.exit_code else 1       # 255: exec's
    except KeyboardInterrupt as end:
        return 128 + getattr(end, "number", _SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:          # a bug: one line for the engine, all of it for whoever looks for it
        text = f"internal error: {type(error).__name__}: {error}"
        if context:
            context.record("error", text)
        say(f"{program}: {text}")
        if context and context.debug:
            raise
        return 1


def is_for_vm(root: str, words: list[str]) -> bool:
    """Whether a command line is about a VM: the bundle's annotation io.pyhv.vm says so, or the record of the id."""
    if words[0] in ("create", "run"):
        at = next((at for at, word in enumerate(words) if word.lstrip("-").partition("=")[0] in ("bundle", "b")
                   and word.startswith("-")), -1)
        _, equals, bundle = words[at].partition("=") if at > 0 else ("", "", "")
        if at > 0 and not equals:
            bundle = words[at + 1] if at + 1 < len(words) else ""
        try:
            with open(f"{bundle or '.'}/config.json", "rb", 0) as file:
                if b"io.pyhv.vm" not in file.read():
                    return False
        except OSError:
            return False        # the command says why
        from hv.sandbox.runtime import wants_vm

        return wants_vm(bundle or ".")
    if words[0] in ("features", "spec", "list"):
        return False
    from hv.container.state import default_root

    root = root or default_root()
    return any(os.path.exists(f"{root}/{word}/vm") for word in words[1:] if "/" not in word)


def _version(program: str) -> int:
    from hv import __version__
    from hv.container.state import OCI_VERSION

    print(f"{program} version {__version__}\nspec: {OCI_VERSION}")
    return 0


def parse(arguments: list[str], known: dict[str, tuple[str, Any]], *, stop_early: bool = False,
          usage: str = "") -> tuple[dict[str, Any], list[str]]:
    """(values by key, the other words). Flags may stand among the words, unless `stop_early`; -- ends them.

    A list as default: the flag may be given several times.
    """
    values: dict[str, Any] = {key: list(default) if isinstance(default, list) else default
                              for key, default in known.values()}
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            words.extend(rest)
            break
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            if stop_early:
                words.extend(rest)
                break
            continue
        name, equals, text = argument.partition("=")
        if not name.startswith("--") and len(name) > 2:
            name = "-" + name           # one dash does for long names as well
        if name not in known:
            if usage and name in ("--help", "-h"):
                print(usage)
                raise _Done
            raise ConfigError(f"unknown flag {argument}", "see --help")
        key, default = known[name]
        if default is False:
            if equals and text not in ("true", "false"):
                raise ConfigError(f"{name}={text}", "true or false")
            values[key] = text != "false"
            continue
        if not equals:
            following = next(rest, None)
            if following is None:
                raise ConfigError(f"{name} needs a value")
            text = following
        if isinstance(default, list):
            values[key].append(text)
        elif isinstance(default, int):
            if not text.isdecimal():
                raise ConfigError(f"{name} {text}", "a number")
            values[key] = int(text)
        else:
            values[key] = text
    return values, words


class Ended(KeyboardInterrupt):
    """A signal has ended this command; everything it was making is undone."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Done(Exception):
    """Everything has been said."""
