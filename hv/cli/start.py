"""The first and the last thing that runs: from the launcher to the command and out."""

from __future__ import annotations

__all__ = ["start"]

import gc
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket


def start(arguments: list[str], bundled: bool = False, maker: tuple[int, socket] | None = None) -> None:
    """Run the command line and end the process with its exit code. `bundled`: the boot path is loaded already.

    `maker`: a process that waits to make an instance, and a socket to it; 0: this is that process.
    """
    _open_standard_streams()
    gc.disable()    # until the machine is built: 20 collections that would find nothing
    if posix.geteuid():
        from hv.cli.userns import start_as_user

        start_as_user(arguments, maker)
        maker = None
    if maker is not None and not maker[0]:
        from hv.instance.ready import ready

        ready(maker[1])
    from hv.cli.main import main

    code = main(arguments, maker)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass        # whoever read our output has gone
    if not bundled and (arguments[:1] == ["boot"] or arguments[:2] == ["snapshot", "restore"]):
        from hv.cli.bundle import RESTORE_PATH, save

        if arguments[0] == "boot":
            save()
        else:
            save(RESTORE_PATH, rare=())
    elif not bundled and code == 0 and arguments and arguments[0] in ("run", "exec", "ps"):
        from hv.cli.verbs import save_bundle

        save_bundle(arguments[0])
    # Everything is closed; taking the interpreter apart object by object would cost another 2 ms.
    posix._exit(code)


def _open_standard_streams() -> None:
    """Descriptors 0 to 2 must be somebody's, or /dev/kvm would get one and the console be written to it."""
    for fd in range(3):
        try:
            posix.fstat(fd)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)       # the lowest free number, which is `fd`
    if sys.stdout is None or sys.stderr is None:
        sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")    # noqa: SIM115
