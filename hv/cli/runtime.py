"""The first and the last thing that runs of `pyhv-runtime`. Driven by tests/root/test_container_cli.py."""

from __future__ import annotations

__all__ = ["start"]

import posix
import sys

# bundle -> (its commands, what they need for an engine's containers, even if this one did not need it)
_KINDS = {
    "create": (("run", "create"), ("hv.container.cgroups.devices", "hv.container.cgroups.mount", "hv.container.plan",
                                   "hv.container.foreground", "hv.container.seccomp.compile", "hv.container.stub")),
    "exec": (("exec",), ("hv.container.exec", "hv.container.foreground", "hv.container.seccomp.compile",
                         "hv.container.cgroups.manager")),
    "life": (("start", "state", "kill", "delete"), ("hv.container.cgroups.manager",)),
}


def start(arguments: list[str], kind: str = "") -> None:
    """Run the command line and end the process with its exit code. `kind`: of the bundle that there was not."""
    for fd in range(3):         # must be somebody's, or a file of ours would become the program's standard streams
        try:
            posix.fstat(fd)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)
    if sys.stdout is None or sys.stderr is None:
        sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")    # noqa: SIM115
    from hv.cli.oci import main

    code = main(arguments)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass                    # whoever read our output has gone
    if kind and code == 0 and set(_KINDS[kind][0]) & set(arguments):
        from hv.cli.bundle import place_of, save

        for name in _KINDS[kind][1]:
            __import__(name)
        save(place_of(kind))
    posix._exit(code)
