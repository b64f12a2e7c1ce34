"""Commands of a user who is not root: those of images, instances, networks and volumes enter the user's own namespace.

Driven by tests/root/test_instance_rootless.py.
"""

from __future__ import annotations

__all__ = ["start_as_user"]

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

_OTHERS = ("image", "volume", "network")
_HELP = frozenset(("--help", "-h"))


def start_as_user(arguments: list[str], maker: tuple[int, socket] | None) -> None:
    """Enter it, where the command needs it; a `maker` that waits is outside, and ends."""
    if maker is not None:
        if not maker[0]:
            os._exit(0)
        maker[1].close()
        os.waitpid(maker[0], 0)
    from hv.cli.verbs import VERBS

    verb = arguments[0] if arguments else ""
    if not (verb in VERBS or (verb in _OTHERS and arguments[1:])) or not _HELP.isdisjoint(arguments[1:3]):
        return
    from hv.cli.main import report
    from hv.errors import HvError
    from hv.instance.anchor import enter
    from hv.places import ROOTLESS, data_root, run_root

    user, places = os.geteuid(), {"PYHV_DATA": data_root(), "PYHV_RUN": run_root()}
    try:
        enter()
    except HvError as error:
        error.exit_code = 125 if verb in ("run", "exec") else error.exit_code
        os._exit(report(error))
    os.environ.update(places)
    os.environ[ROOTLESS] = str(user)
