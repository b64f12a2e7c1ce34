"""Commands of a VM's life: create, start, run, state, kill, delete (runc's flags, as in oci_life.py).

Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["command_create", "command_delete", "command_kill", "command_run", "command_start", "command_state",
           "runtime_of"]

import os

from hv.cli.oci import Context, parse
from hv.cli.oci_life import end_by_exception, one_name, signal_number
from hv.errors import ConfigError
from hv.sandbox.runtime import VmOptions, VmRuntime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# some are for what a VM does not have, and engines give them all the same
_CREATE: dict[str, tuple[str, Any]] = {
    "--bundle": ("bundle", "."), "-b": ("bundle", "."), "--console-socket": ("console_socket", ""),
    "--pid-file": ("pid_file", ""), "--no-pivot": ("no_pivot", False), "--no-new-keyring": ("no_new_keyring", False),
    "--preserve-fds": ("preserve_fds", 0)}
_RUN = _CREATE | {"--detach": ("detach", False), "-d": ("detach", False), "--no-subreaper": ("no_subreaper", False),
                  "--keep": ("keep", False)}
_CREATE_USAGE = """usage: pyhv-vm-runtime create [flags] ID

  --bundle DIR, -b     the bundle: config.json and a root file system [.]
  --console-socket S   a Unix socket that gets the terminal's descriptor
  --pid-file FILE      write the number of the VM's process there"""
_RUN_USAGE = _CREATE_USAGE.replace("create [flags]", "run [flags]") + """
  --detach, -d         do not wait for the end
  --keep               do not delete the VM at its end"""


def runtime_of(context: Context) -> VmRuntime:
    """The runtime with the state folder that the flags name."""
    runtime = VmRuntime(context.root)
    runtime.warn = context.warn
    return runtime


def _options(context: Context, values: dict[str, Any]) -> VmOptions:
    if values["preserve_fds"]:
        raise ConfigError("--preserve-fds: a VM's program has standard streams only", "leave it out")
    return VmOptions(console_socket=values["console_socket"], pid_file=values["pid_file"],
                     systemd_cgroup=context.systemd_cgroup)


def command_create(context: Context, arguments: list[str]) -> int:
    """create [flags] ID"""
    values, words = parse(arguments, _CREATE, usage=_CREATE_USAGE)
    end_by_exception()
    runtime_of(context).create_vm(one_name(words, "create"), values["bundle"], _options(context, values))
    return 0


def command_start(context: Context, arguments: list[str]) -> int:
    """start ID"""
    _, words = parse(arguments, {}, usage="usage: pyhv-vm-runtime start ID")
    runtime_of(context).start(one_name(words, "start"))
    return 0


def command_run(context: Context, arguments: list[str]) -> int:
    """run [flags] ID"""
    values, words = parse(arguments, _RUN, usage=_RUN_USAGE)
    runtime, name, options = runtime_of(context), one_name(words, "run"), _options(context, values)
    end_by_exception()
    if values["detach"]:
        runtime.create_vm(name, values["bundle"], options)
        try:
            runtime.start(name)
        except BaseException:
            runtime.delete(name, force=True)
            raise
        return 0
    if options.console_socket:
        raise ConfigError("--console-socket: the terminal is ours when the VM is in the foreground",
                          "leave it out, or --detach")
    from hv.sandbox.foreground import run

    return run(runtime, name, os.path.abspath(values["bundle"]), options, keep=values["keep"])


def command_state(context: Context, arguments: list[str]) -> int:
    """state ID"""
    from hv.plainjson import dumps

    _, words = parse(arguments, {}, usage="usage: pyhv-vm-runtime state ID")
    print(dumps(runtime_of(context).state(one_name(words, "state")), 2))
    return 0


def command_kill(context: Context, arguments: list[str]) -> int:
    """kill [--all] ID [SIGNAL]"""
    usage = "usage: pyhv-vm-runtime kill [--all] ID [SIGNAL]"
    values, words = parse(arguments, {"--all": ("all", False), "-a": ("all", False)}, usage=usage)
    if len(words) > 2:
        raise ConfigError(f"kill: too many arguments: {' '.join(words[2:])}", "`pyhv-vm-runtime kill --help`")
    number = signal_number(words[1] if len(words) > 1 else "TERM")
    runtime_of(context).kill(one_name(words[:1], "kill"), number, everyone=values["all"])
    return 0


def command_delete(context: Context, arguments: list[str]) -> int:
    """delete [--force] ID"""
    usage = "usage: pyhv-vm-runtime delete [--force] ID\n\n  --force, -f   end it first; no error if it is not there"
    values, words = parse(arguments, {"--force": ("force", False), "-f": ("force", False)}, usage=usage)
    runtime_of(context).delete(one_name(words, "delete"), force=values["force"])
    return 0
