"""`pyhv snapshot` for containers: the same verbs, done by CRIU (hv/container/checkpoint.py, restore.py).

    NAME/container.json     the container's name, bundle and root of states; then the images, in NAME/images

Differences, tracking and disks are a VM's; they are refused by name. Driven by tests/root/test_snapshot_container.py.
"""

from __future__ import annotations

__all__ = ["CONTAINER", "create", "is_container", "restore"]

import os
from time import time

from hv.cli.say import say
from hv.errors import ConfigError, HvError, SnapshotError
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONTAINER, IMAGES = "container.json", "images"
PREFIX = "container:"
ROOT = "/run/pyhv"              # hv/cli/oci.py's --root
_FILE_MOST = 1 << 16


def is_container(folder: str) -> bool:
    """Whether the snapshot in `folder` is a container's."""
    return os.path.isfile(f"{folder}/{CONTAINER}")


def create(name: str, folder: str, options: dict[str, Any], root: str = ROOT) -> int:
    """Save the running container `name` to `folder`; it goes on unless `stop` says otherwise."""
    from hv.container.checkpoint import CriuOptions, checkpoint
    from hv.container.runtime import Runtime
    from hv.snapshot.save import make_fresh, sync_folder

    for option in ("diff", "track", "copy_disks"):
        if options.get(option):
            raise ConfigError(f"--{option.replace('_', '-')}: for VMs only", "leave it out for a container")
    runtime = Runtime(root)
    bundle = runtime.state(name)["bundle"]
    fresh = make_fresh(folder)
    try:
        criu = CriuOptions(f"{fresh}/{IMAGES}", tcp_established=True, file_locks=True)
        criu.leave_running = not options.get("stop")
        checkpoint(runtime, name, criu)
        with open(f"{fresh}/{CONTAINER}", "w") as file:
            file.write(dumps({"version": 1, "name": name, "bundle": bundle, "root": root, "created": time()}, 1))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(fresh)
        os.rename(fresh, folder)
    except OSError as error:
        _discard(fresh)
        raise HvError(f"writing {folder}: {os.strerror(error.errno or 0)}",
                      "make room, or name another place") from None
    except BaseException:
        _discard(fresh)
        raise
    say(f"pyhv: saved container {name} as {folder}")
    return 0


def restore(folder: str, name: str | None, root: str | None = None) -> int:
    """Go on with the container saved in `folder`, here in the foreground; its exit code."""
    from hv.container.checkpoint import CriuOptions
    from hv.container.foreground import run
    from hv.container.restore import restoring
    from hv.container.runtime import CreateOptions, Runtime
    from hv.container.spec import load_bundle

    saved = read(folder)
    spec = load_bundle(saved["bundle"])
    criu = CriuOptions(f"{folder}/{IMAGES}", tcp_established=True, file_locks=True)
    options = CreateOptions(spawn=restoring(spec, criu))
    return run(Runtime(root or saved["root"]), name or saved["name"], spec, options)


def read(folder: str) -> dict[str, Any]:
    """The container's file. SnapshotError where it is none."""
    try:
        with open(f"{folder}/{CONTAINER}") as file:
            saved = loads(file.read(_FILE_MOST))
    except (OSError, ValueError) as error:
        raise SnapshotError(CONTAINER, str(error), "the snapshot is damaged") from None
    if not isinstance(saved, dict) or saved.get("version") != 1 \
            or not all(isinstance(saved.get(key), str) for key in ("name", "bundle", "root")):
        raise SnapshotError(CONTAINER, "is not what pyhv writes", "the snapshot is damaged")
    return saved


def _discard(folder: str) -> None:
    from shutil import rmtree

    rmtree(folder, ignore_errors=True)
