"""An instance's root: the image's layers below, its own folder above, in a mount namespace that is this process's.

Nothing of it is seen on the host, and all of it goes with the last process of that namespace, SIGKILL included.
Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["aside", "assemble", "make_folder", "mount_rows"]

import os
from errno import ENOENT

from hv.errors import ConfigError, HvError, KernelError
from hv.linux.mount import PROPAGATION, open_in, set_propagation
from hv.linux.ns import CLONE_NEWNS, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from hv.instance.record import Instance


def assemble(instance: Instance, layers: Sequence[str]) -> tuple[str, int]:
    """Mount it; its path, and a descriptor. This process leaves the host's mount namespace for good."""
    from hv.image.overlay import make_upper, mount_overlay

    unshare(CLONE_NEWNS)
    # what the host unmounts goes here too, or its disks would stay busy; nothing goes back
    set_propagation("/", PROPAGATION["slave"], recursive=True)
    target = f"{instance.run}/root"
    try:
        os.makedirs(target, 0o755, exist_ok=True)
        make_upper(layers, f"{instance.folder}/upper", f"{instance.folder}/work")
    except OSError as error:
        raise HvError(f"{error.filename}: {os.strerror(error.errno or 0)}") from None
    mount_overlay(layers, f"{instance.folder}/upper", f"{instance.folder}/work", target)
    return target, os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def aside(instance: Instance, layers: Sequence[str]) -> int:
    """The same for a look at one that does not run (`cp`): a descriptor of its root, mounted nowhere."""
    from hv.image.overlay import make, make_upper

    make_upper(layers, f"{instance.folder}/upper", f"{instance.folder}/work")
    return make(layers, f"{instance.folder}/upper", f"{instance.folder}/work")


def make_folder(root: int, path: str) -> None:
    """Make the folder at `path` below the root, and those above it, where they are missing: later it may be read-only,
    or a guest's. What can't be made is told when the program is started."""
    here = "/"
    for part in os.path.normpath(path).split("/"):
        if not part:
            continue
        above, here = here, f"{here.rstrip('/')}/{part}"
        try:
            os.close(open_in(root, here, os.O_PATH | os.O_DIRECTORY))
        except KernelError as error:
            if error.errno != ENOENT:
                return
            try:
                folder = open_in(root, above, os.O_PATH | os.O_DIRECTORY)
            except KernelError:
                return
            try:
                os.mkdir(part, 0o755, dir_fd=folder)
            except OSError:
                return              # a link that leads to nothing, say
            finally:
                os.close(folder)


def mount_rows(instance: Instance, root: int) -> list[dict[str, Any]]:
    """config.json's mounts for -v, --mount, --tmpfs and the image's VOLUMEs; volumes are made and filled."""
    settings = instance.settings
    rows = []
    named = [dict(row) for row in settings.mounts]
    taken = {row["target"] for row in named}
    for target in instance.image.get("volumes") or ():
        target = os.path.normpath("/" + target.lstrip("/"))
        if target not in taken and target != "/":
            named.append({"kind": "volume", "source": "", "target": target, "readonly": False, "options": []})
    for row in named:
        kind, target, options = row["kind"], row["target"], list(row["options"])
        if kind == "tmpfs":
            rows.append({"destination": target, "type": "tmpfs", "source": "tmpfs",
                         "options": ["nosuid", "nodev", *([] if options else ["noexec"]), *options,
                                     *(["ro"] if row["readonly"] else [])]})
            continue
        source = row["source"] if kind == "bind" else _volume(instance, row, root)
        if not os.path.lexists(source):
            raise ConfigError(f"-v {source}: there is no such file or folder", "make it first, or name a volume")
        if not any(word.lstrip("r") in ("private", "slave", "shared") for word in options):
            options.append("rprivate")
        rows.append({"destination": target, "type": "bind", "source": source,
                     "options": ["rbind", *options, *(["ro"] if row["readonly"] else [])]})
    rows.sort(key=lambda row: str(row["destination"]).count("/"))      # what lies below another comes later
    return rows


def _volume(instance: Instance, row: dict[str, Any], root: int) -> str:
    from hv.image.volumes import Volumes

    volumes, target = Volumes(), row["target"]
    anonymous = not row["source"]
    known = instance.about.setdefault("volumes", {})
    name = row["source"] or known.get(target) or volumes.create(anonymous=True).name
    volume = volumes.use(name, instance.id, anonymous=anonymous)
    if known.get(target) != name:
        known[target] = name
        instance.save()             # the next start finds the same one
    if not row.get("nocopy"):
        volumes.fill(name, root, target)
    return str(volume.mountpoint)
