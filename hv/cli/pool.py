"""`pyhv pool`: the server in this process, and its clients. Driven by tests/kvm/test_pool.py."""

from __future__ import annotations

__all__ = ["serve", "status", "stop", "take"]

import os
from signal import SIGHUP, SIGINT, SIGTERM, signal

from hv.cli.boot import VM_COMMANDS
from hv.cli.say import say
from hv.cli.vm_client import Vm
from hv.errors import StateError
from hv.machine.control import folder
from hv.machine.control_names import check_name, remove_dead
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.snapshot.pool_server import Door

PATIENCE = 60.0             # s that a take, or the end of a large pool, may last
USUAL = "default.pool"      # in the folder of control sockets; not a name that a VM can have there


def serve(snapshot: str, *, size: int, processes: bool, name: str | None, store: str | None,
          socket: str | None) -> int:
    """Keep `size` VMs ready until a signal or a client ends it."""
    from hv.snapshot.format import Snapshot, store_folder

    taken = Snapshot(store_folder(snapshot, store))
    prefix = check_name(name or os.path.basename(taken.folder))
    path = socket or f"{folder()}/{USUAL}"

    def begun(door: Door) -> None:
        for number in (SIGINT, SIGTERM, SIGHUP):
            signal(number, lambda caught, frame: door.stop())
        say(f"pyhv: {size} {'VM' if size == 1 else 'VMs'} kept ready at {path}; `pyhv pool take` hands one out")

    if processes:
        from hv.snapshot.pool_server import Door
        from hv.snapshot.zygote import Zygote

        zygote = Zygote(taken, size, VM_COMMANDS)
        try:
            door = Door(zygote.loop, path, zygote, prefix)
            try:
                begun(door)
                zygote.loop.run_until(lambda: door.stopping)
                zygote.end()
            finally:
                door.close()
        finally:
            zygote.close()
        return 0
    from hv.snapshot.pool import Pool
    from hv.snapshot.pool_server import serve_in_process

    with Pool(taken, size, name=prefix) as pool:
        serve_in_process(pool, path, VM_COMMANDS, begun)
    return 0


def take(socket: str | None) -> int:
    """Print the name of a VM that runs."""
    print(_ask(socket, "take")["name"])
    return 0


def status(socket: str | None, as_json: bool) -> int:
    """One line of figures."""
    found = _ask(socket, "status")
    if as_json:
        print(dumps({key: value for key, value in found.items() if key not in ("id", "ok")}))
        return 0
    kind = "a process each" if found["processes"] else f"process {found['pid']}"
    print(f"{found['snapshot']}: {found['ready']} of {found['size']} ready, {found['running']} running, "
          f"{found['taken']} taken so far, {kind}")
    if found["error"]:
        print(f"it can't be filled: {found['error']}")
    return 0


def stop(socket: str | None) -> int:
    """End it, and wait for that."""
    _ask(socket, "stop")
    return 0


def _ask(socket: str | None, command: str) -> dict[str, Any]:
    path = os.path.abspath(socket) if socket else f"{folder()}/{USUAL}"
    try:
        with Vm(path) as pool:
            return pool.ask(command, patience=PATIENCE)
    except StateError as error:
        if os.path.lexists(path) and not remove_dead(path):
            raise
        raise StateError(f"no pool is served at {path}", "`pyhv pool serve SNAPSHOT` starts one") from error
