"""The first and the last thing that runs of `pyhv-runtime`. Driven by tests/root/test_container_cli.py."""

from __future__ import annotations

__all__ = ["start"]

import posix
import sys

_USUAL = ("hv.container.cgroups.devices", "hv.container.cgroups.mount", "hv.container.foreground",
          "hv.container.seccomp.compile", "hv.container.stub")


def start(arguments: list[str], bundled: bool = False) -> None:
    """Run the command line and end the process with its exit code. `bundled`: the modules are loaded already."""
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
    if not bundled and code == 0 and {"run", "create"} & set(arguments):
        from hv.cli.bundle import RUNTIME_PATH, save

        for name in _USUAL:     # an engine's containers need these, even if this one did not
            __import__(name)
        save(RUNTIME_PATH)
    posix._exit(code)
