"""The container's root: the bundle's rootfs as a mount of its own, devices in /dev, pivot_root, what is hidden in it.

Driven by tests/root/test_container_rootfs.py.
"""

from __future__ import annotations

__all__ = ["DEFAULT_DEVICES", "hide", "make_devices", "open_root", "switch"]

import errno
import os
import stat

from hv.container.mounts import target_in
from hv.errors import ConfigError, HvError, KernelError
from hv.linux.mount import (
    ATTR,
    PROPAGATION,
    clone_tree,
    move,
    new_filesystem,
    open_in,
    pivot_root,
    set_attributes,
    set_propagation,
    umount,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# runtime-spec, config-linux.md, Default Devices
DEFAULT_DEVICES = (("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8),
                   ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0))
_LINKS = (("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"), ("/dev/stdout", "/proc/self/fd/1"),
          ("/dev/stderr", "/proc/self/fd/2"), ("/dev/ptmx", "pts/ptmx"))
_KINDS = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def open_root(path: str, propagation: str) -> int:
    """Make `path` a mount of its own in this mount namespace; a descriptor of it.

    Nothing that is mounted from here on reaches the host, whatever its mounts share.
    """
    kind = (propagation or "rslave").removeprefix("r") if (propagation or "r")[0] == "r" else propagation
    if kind not in PROPAGATION:
        raise ConfigError(f"linux.rootfsPropagation {propagation!r}", "shared, slave, private or unbindable, perhaps r-")
    # pivot_root wants no shared mount on its way, so the host's are cut off in any case (man 2 pivot_root)
    set_propagation("/", PROPAGATION["slave" if kind in ("shared", "slave") else "private"], recursive=True)
    tree = clone_tree(-100, path, True)
    try:
        set_attributes(tree, 0, 0, recursive=True, propagation=PROPAGATION["private"])
        place = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            move(tree, place)
        finally:
            os.close(place)
    except BaseException:
        os.close(tree)
        raise
    return tree


def make_devices(devices: list[dict[str, Any]], root_fd: int, *, bind: bool) -> None:
    """Default devices, those of the configuration, and the usual links. `bind`: no mknod in a user namespace."""
    rows = [{"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666}
            for path, major, minor in DEFAULT_DEVICES]
    known = {row["path"]: row for row in rows}
    for device in devices:
        known[device["path"]] = device
    mask = os.umask(0)
    try:
        for device in known.values():
            _make_device(device, root_fd, bind)
        for path, target in _LINKS:
            folder, _, leaf = path.rpartition("/")
            above = target_in(root_fd, folder, True)
            try:
                if path == "/dev/ptmx":
                    _unlink(leaf, above)
                os.symlink(target, leaf, dir_fd=above)
            except FileExistsError:
                pass
            finally:
                os.close(above)
    finally:
        os.umask(mask)


def _unlink(leaf: str, folder: int) -> None:
    try:
        os.unlink(leaf, dir_fd=folder)
    except OSError:
        pass


def _make_device(device: dict[str, Any], root_fd: int, bind: bool) -> None:
    path = device["path"]
    if bind:
        target = target_in(root_fd, path, False)
        try:
            fd = clone_tree(-100, path, False)
            move(fd, target)
            os.close(fd)
        finally:
            os.close(target)
        return
    folder, _, leaf = path.rpartition("/")
    above = target_in(root_fd, folder, True)
    try:
        mode = _KINDS[device["type"]] | int(device.get("fileMode", 0o666)) & 0o7777
        number = os.makedev(device.get("major", 0), device.get("minor", 0))
        try:
            os.mknod(leaf, mode, number, dir_fd=above)
        except FileExistsError:
            found = os.stat(leaf, dir_fd=above, follow_symlinks=False)
            if stat.S_IFMT(found.st_mode) != stat.S_IFMT(mode) or found.st_rdev != number:
                raise HvError(f"device {path}: something else is there in the image") from None
        os.chown(leaf, device.get("uid", 0), device.get("gid", 0), dir_fd=above, follow_symlinks=False)
    finally:
        os.close(above)


def switch(root_fd: int, *, pivot: bool) -> None:
    """Make `root_fd` the root, and let go of the old one."""
    if pivot:
        os.chdir(root_fd)
        pivot_root(".", ".")        # the old root lies on top of the new one now (man 2 pivot_root)
        set_propagation(".", PROPAGATION["slave"], recursive=True)
        umount(".")
    else:
        os.chdir(root_fd)
        move(root_fd, os.open("/", os.O_PATH | os.O_CLOEXEC))
        os.chroot(".")
    os.chdir("/")


def hide(masked: list[str], readonly: list[str], *, root_readonly: bool) -> None:
    """In the new root: masked paths are empty, read-only paths and perhaps the root itself can't be written."""
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        for path in readonly:
            target = _find(root, path)
            if target >= 0:
                fd = clone_tree(target, "", True)
                set_attributes(fd, ATTR["rdonly"], recursive=True)
                move(fd, target)
                os.close(fd)
                os.close(target)
        for path in masked:
            target = _find(root, path)
            if target >= 0:
                if stat.S_ISDIR(os.fstat(target).st_mode):
                    fd = new_filesystem("tmpfs", "tmpfs", ["size=0k", "nr_inodes=2"], ATTR["rdonly"])
                else:
                    fd = clone_tree(root, "dev/null", False)
                move(fd, target)
                os.close(fd)
                os.close(target)
        if root_readonly:
            set_attributes(root, ATTR["rdonly"])
    finally:
        os.close(root)


def _find(root: int, path: str) -> int:
    try:
        return open_in(root, path, os.O_PATH)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return -1
        raise
