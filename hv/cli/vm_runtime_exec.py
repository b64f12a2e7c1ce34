"""`exec` in a VM: run a program in a running guest (flags of oci_exec.py). Exit code: the program's, or 255.

Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["command_exec"]

from hv.cli.oci import Context, parse
from hv.cli.oci_exec import _FAILED, _FLAGS, _USAGE, _from_file, _from_flags
from hv.cli.vm_runtime_life import runtime_of
from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NOT_HERE = {"label": "--process-label", "apparmor": "--apparmor", "preserve_fds": "--preserve-fds",
             "cgroups": "--cgroup"}


def command_exec(context: Context, arguments: list[str]) -> int:
    """exec [flags] ID PROGRAM [arguments]"""
    values, words = parse(arguments, _FLAGS, stop_early=True, usage=_USAGE.replace("pyhv-runtime", "pyhv-vm-runtime"))
    try:
        if not words:
            raise ConfigError("no container id", "`pyhv-vm-runtime exec --help`")
        return _exec(context, values, words[0], words[1:])
    except HvError as error:
        failure = HvError(f"exec failed: {error}", error.hint)
        failure.exit_code = _FAILED
        raise failure from None


def _exec(context: Context, values: dict[str, Any], name: str, args: list[str]) -> int:
    from hv.sandbox.proxy import detached, foreground

    for key, flag in _NOT_HERE.items():
        if values[key]:
            raise ConfigError(f"{flag}: not in a VM", "leave it out")
    runtime = runtime_of(context)
    process = _from_file(values["process"]) if values["process"] else _from_flags(runtime, name, values, args)
    if bool(values["console_socket"]) and not process.get("terminal"):
        raise ConfigError("--console-socket: the process has no terminal", "leave one out, or --tty")
    client = runtime.client(name)
    if values["detach"]:
        detached(client, process, values["console_socket"], values["pid_file"])
        return 0
    if values["console_socket"]:
        raise ConfigError("cannot use console socket if the runtime will not detach", "leave it out, or --detach")
    return foreground(client, process, values["pid_file"])
