"""`exec`: run a program in a running container (runc's flags; man 8 runc-exec). Exit code: the program's, or 255.

Driven by tests/root/test_container_exec.py and tests/root/test_container_tty.py.
"""

from __future__ import annotations

__all__ = ["command_exec"]

import os

from hv.cli.oci import Context, parse
from hv.cli.oci_life import runtime_of
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.exec import ExecOptions
    from hv.container.runtime import Runtime

_FAILED = 255
_FLAGS: dict[str, tuple[str, Any]] = {
    "--console-socket": ("console_socket", ""), "--cwd": ("cwd", ""), "--env": ("env", []), "-e": ("env", []),
    "--tty": ("tty", False), "-t": ("tty", False), "--user": ("user", ""), "-u": ("user", ""),
    "--additional-gids": ("gids", []), "-g": ("gids", []), "--process": ("process", ""), "-p": ("process", ""),
    "--detach": ("detach", False), "-d": ("detach", False), "--pid-file": ("pid_file", ""),
    "--process-label": ("label", ""), "--apparmor": ("apparmor", ""), "--no-new-privs": ("no_new_privs", False),
    "--cap": ("caps", []), "-c": ("caps", []), "--preserve-fds": ("preserve_fds", 0), "--cgroup": ("cgroups", []),
    "--ignore-paused": ("ignore_paused", False)}
_USAGE = """usage: pyhv-runtime exec [flags] ID PROGRAM [arguments]
       pyhv-runtime exec [flags] --process FILE ID

  --process FILE, -p       what to run, as `process` of config.json has it; else it is as the container's own, with:
  --cwd DIR                its directory
  --env NAME=VALUE, -e     one more variable
  --user UID[:GID], -u     who it is
  --additional-gids N, -g  one more group
  --cap NAME, -c           one more capability
  --no-new-privs           it can't gain privileges
  --apparmor PROFILE       its AppArmor profile
  --process-label LABEL    its SELinux label
  --tty, -t                it has a terminal
  --console-socket S       a Unix socket that gets the terminal's descriptor
  --detach, -d             do not wait for its end
  --pid-file FILE          write its number there
  --preserve-fds N         it gets descriptors 3 to N+2 as well
  --cgroup [CTL:]/PATH     a group below the container's, which must be there
  --ignore-paused          in a paused container as well: it runs once that is resumed"""
_ID_MOST = (1 << 32) - 2


def command_exec(context: Context, arguments: list[str]) -> int:
    """exec [flags] ID PROGRAM [arguments]"""
    values, words = parse(arguments, _FLAGS, stop_early=True, usage=_USAGE)
    try:
        if not words:
            raise ConfigError("no container id", "`pyhv-runtime exec --help`")
        return _exec(context, values, words[0], words[1:])
    except HvError as error:
        failure = HvError(f"exec failed: {error}", error.hint)
        failure.exit_code = _FAILED
        raise failure from None


def _exec(context: Context, values: dict[str, Any], name: str, args: list[str]) -> int:
    from hv.cli.oci_life import listen_fds
    from hv.container.exec import ExecOptions, start_exec

    runtime = runtime_of(context)
    process = _from_file(values["process"]) if values["process"] else _from_flags(runtime, name, values, args)
    options = ExecOptions(console_socket=values["console_socket"], pid_file=values["pid_file"],
                          preserve_fds=values["preserve_fds"], listen_fds=listen_fds(),
                          ignore_paused=values["ignore_paused"], cgroups=tuple(values["cgroups"]))
    if values["detach"]:
        start_exec(runtime, name, process, options)
        return 0
    if options.console_socket:
        raise ConfigError("cannot use console socket if the runtime will not detach", "leave it out, or --detach")
    return _foreground(runtime, name, process, options)


def _foreground(runtime: Runtime, name: str, process: dict[str, Any], options: ExecOptions) -> int:
    from hv.container.exec import start_exec
    from hv.container.foreground import attend, terminal_size

    def begin(console: int) -> int:
        options.console = console
        size = terminal_size() if console >= 0 else None
        if size:
            process["consoleSize"] = {"height": size[0], "width": size[1]}
        return start_exec(runtime, name, process, options)

    return attend(begin, terminal=bool(process.get("terminal")))


def _from_file(path: str) -> dict[str, Any]:
    from hv.container.fields import check
    from hv.container.spec import CONFIG_MOST
    from hv.plainjson import loads

    try:
        with open(path, "rb", 0) as file:
            return dict(check(loads(file.read(CONFIG_MOST).decode()), dict, path))
    except OSError as error:
        raise ConfigError(f"--process {path}: {os.strerror(error.errno or 0)}") from None
    except ValueError as error:
        raise ConfigError(f"--process {path}: {error}") from None


def _from_flags(runtime: Runtime, name: str, values: dict[str, Any], args: list[str]) -> dict[str, Any]:
    """The container's own process, changed as the flags say."""
    from hv.container.spec import load_file
    from hv.container.state import Record

    record = Record(runtime.root, name).load()
    process = dict(load_file(record.config, record.data["bundle"]).raw["process"])
    if not args:
        raise ConfigError("process args cannot be empty", "name a program behind the container's id")
    process |= {"args": args, "terminal": values["tty"]}
    process["env"] = [*(process.get("env") or []), *values["env"]]
    if not values["tty"]:
        process.pop("consoleSize", None)
    for key, field in (("cwd", "cwd"), ("label", "selinuxLabel"), ("apparmor", "apparmorProfile")):
        if values[key]:
            process[field] = values[key]
    if values["no_new_privs"]:
        process["noNewPrivileges"] = True
    if values["user"] or values["gids"]:
        process["user"] = _user(dict(process.get("user") or {}), values["user"], values["gids"])
    if values["caps"]:
        sets = dict(process.get("capabilities") or {})
        for kind in ("bounding", "effective", "permitted"):
            sets[kind] = [*(sets.get(kind) or []), *values["caps"]]
        process["capabilities"] = sets
    return process


def _user(user: dict[str, Any], text: str, gids: list[str]) -> dict[str, Any]:
    if text:
        uid, colon, gid = text.partition(":")
        user["uid"] = _id(uid, "--user")
        if colon:
            user["gid"] = _id(gid, "--user")
    if gids:
        user["additionalGids"] = [*(user.get("additionalGids") or []), *(_id(gid, "--additional-gids") for gid in gids)]
    return user


def _id(text: str, flag: str) -> int:
    if not text.isdecimal() or int(text) > _ID_MOST:
        raise ConfigError(f"{flag} {text!r:.60}", "a number: names are the image's matter")
    return int(text)
