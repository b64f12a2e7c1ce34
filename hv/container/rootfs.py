"""The container's root: the bundle's rootfs as a mount of its own, devices in /dev, what is hidden, pivot_root.

All is done before the root changes, on descriptors below it; a masked file is covered by what has been seen to be the
null device, whatever the image had at that name (CVE-2025-31133). Driven by tests/root/test_container_rootfs.py.
"""

from __future__ import annotations

__all__ = ["DEFAULT_DEVICES", "has_own_dev", "hide", "make_devices", "open_root", "switch"]

import errno
import os
import stat

from hv.container.mounts import target_in
from hv.errors import HvError, KernelError
from hv.linux.mount import (
    ATTR,
    PROPAGATION,
    clone_tree,
    mount_id,
    move,
    new_filesystem,
    open_in,
    pivot_root,
    set_attributes,
    set_propagation,
    umount,
    unescape,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# runtime-spec, config-linux.md, Default Devices
DEFAULT_DEVICES = (("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8),
                   ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0))
# config-linux.md, Default Filesystems and runtime-linux.md, Dev symbolic links
_LINKS = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
          ("stderr", "/proc/self/fd/2"), ("core", "/proc/kcore"), ("ptmx", "pts/ptmx"))
_KINDS = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_PATH = os.O_PATH | os.O_CLOEXEC


def open_root(path: str, propagation: str, opener: Callable[[str], int] | None) -> int:
    """Make `path` a mount of its own in this mount namespace; a descriptor of it.

    Nothing that is mounted from here on below it reaches the host, whatever its mounts share.
    """
    kind = propagation.removeprefix("r") or "slave"
    if kind != "shared":
        # what is mounted on the host may come in, nothing goes out
        set_propagation("/", PROPAGATION["slave" if kind == "slave" else "private"], recursive=True)
    try:
        place = os.open(path, _PATH | os.O_DIRECTORY)
    except PermissionError:
        if opener is None:
            raise HvError(f"root.path {path}: {os.strerror(errno.EACCES)}") from None
        place = opener(path)
    try:
        tree = clone_tree(place, "", True)
        try:
            if kind == "shared":        # else it is private, or a slave of the host's, as we are
                set_attributes(tree, 0, 0, recursive=True, propagation=PROPAGATION["private"])
                _cut_off(place)
            move(tree, place)
        except BaseException:
            os.close(tree)
            raise
    finally:
        os.close(place)
    return tree


def _cut_off(place: int) -> None:
    """Make the mount that `place` lies on private: a mount on a shared one would appear on the host too."""
    number = mount_id(place)
    with open("/proc/self/mountinfo", "rb", 0) as table:
        for line in table.read().splitlines():
            words = line.split()
            if int(words[0]) == number:
                set_propagation(unescape(words[4]), PROPAGATION["private"], recursive=False)


def has_own_dev(mounts: list[dict[str, Any]]) -> bool:
    """Whether /dev is the container's own: with the host's bound there, nothing may be made in it."""
    return not any(mount["destination"] == "/dev" and ("bind" in mount["options"] or "rbind" in mount["options"]
                                                       or mount.get("type") == "bind") for mount in mounts)


def make_devices(devices: list[dict[str, Any]], root: int, *, bind: bool) -> None:
    """Default devices, those of the configuration, and the usual links. `bind`: no mknod in a user namespace."""
    known: dict[str, dict[str, Any]] = {
        path: {"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0}
        for path, major, minor in DEFAULT_DEVICES}
    for device in devices:
        known[device["path"]] = device
    mask = os.umask(0)
    dev = target_in(root, "/dev", True)
    try:
        for path, device in known.items():
            try:
                if bind:
                    _bind_device(device, root)
                else:
                    _make_device(device, root, dev)
            except KernelError as error:
                raise HvError(f"device {path}: {error}") from None
            except OSError as error:
                raise HvError(f"device {path}: {os.strerror(error.errno or 0)}") from None
        for leaf, target in _LINKS:
            if leaf == "core" and not os.path.exists(target):
                continue
            try:
                os.symlink(target, leaf, dir_fd=dev)
            except FileExistsError:
                if leaf == "ptmx":      # the image's would be the host's ptys
                    _replace_link(leaf, target, dev)
    except OSError as error:
        raise HvError(f"/dev: {os.strerror(error.errno or 0)}",
                      "the rootfs can't be written: mount a tmpfs on /dev") from None
    finally:
        os.close(dev)
        os.umask(mask)


def _replace_link(leaf: str, target: str, folder: int) -> None:
    try:
        os.unlink(leaf, dir_fd=folder)
        os.symlink(target, leaf, dir_fd=folder)
    except OSError:
        pass


def _bind_device(device: dict[str, Any], root: int) -> None:
    target = target_in(root, device["path"], False)
    try:
        fd = clone_tree(-100, device["path"], False)
        try:
            move(fd, target)
        finally:
            os.close(fd)
    finally:
        os.close(target)


def _make_device(device: dict[str, Any], root: int, dev: int) -> None:
    folder, _, leaf = device["path"].rpartition("/")
    above = dev if folder == "/dev" else target_in(root, folder, True) if folder else os.dup(root)
    try:
        mode = _KINDS[device["type"]] | device["fileMode"]
        number = os.makedev(device["major"], device["minor"])
        try:
            os.mknod(leaf, mode, number, dir_fd=above)
        except FileExistsError:
            found = os.stat(leaf, dir_fd=above, follow_symlinks=False)
            if stat.S_IFMT(found.st_mode) != stat.S_IFMT(mode) or found.st_rdev != number:
                raise HvError(f"device {device['path']}: something else is there in the image") from None
        if device["uid"] or device["gid"]:
            os.chown(leaf, device["uid"], device["gid"], dir_fd=above, follow_symlinks=False)
    finally:
        if above != dev:
            os.close(above)


def hide(masked: list[str], readonly: list[str], root: int) -> None:
    """Masked paths are empty, read-only paths can't be written; those that are not there are left out."""
    for path in readonly:
        target = _find(root, path)
        if target >= 0:
            fd = clone_tree(target, "", True)
            set_attributes(fd, ATTR["rdonly"], recursive=True)
            _cover(fd, target)
    null = empty = -1
    for path in masked:
        target = _find(root, path)
        if target < 0:
            continue
        if stat.S_ISDIR(os.fstat(target).st_mode):
            if empty < 0:
                empty = new_filesystem("tmpfs", "tmpfs", [], ATTR["rdonly"])
                fd = empty
            else:
                fd = clone_tree(empty, "", False)       # one and the same for all
            move(fd, target)
            if fd != empty:
                os.close(fd)
            os.close(target)
        else:
            if null < 0:
                null = _null_device(root)
            _cover(clone_tree(null, "", False), target)
    for fd in (null, empty):
        if fd >= 0:
            os.close(fd)


def _null_device(root: int) -> int:
    """The null device to cover files with: the container's, if it is one, else the host's."""
    for place in (root, -1):
        try:
            fd = open_in(root, "/dev/null", os.O_PATH) if place >= 0 else os.open("/dev/null", _PATH)
        except (KernelError, OSError):
            continue
        found = os.fstat(fd)
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3):
            return fd
        os.close(fd)
    raise HvError("linux.maskedPaths: there is no /dev/null to cover files with")


def _cover(fd: int, target: int) -> None:
    try:
        move(fd, target)
    finally:
        os.close(fd)
        os.close(target)


def _find(root: int, path: str) -> int:
    try:
        return open_in(root, path, os.O_PATH)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return -1
        raise


def switch(root: int, propagation: str, *, pivot: bool, readonly: bool) -> None:
    """Make `root` the root, and let go of the old one."""
    old = os.open("/", _PATH)
    os.chdir(root)
    if pivot:
        pivot_root(".", ".")        # the old root lies on top of the new one now (man 2 pivot_root)
        os.fchdir(old)              # or "." were still the new one
        # what is unmounted in a moment must not be unmounted on the host
        set_propagation(".", PROPAGATION["slave"], recursive=True)
        umount(".")
    else:
        from hv.container.oldroot import take_apart

        move(root, old)
        take_apart(root)
        os.chroot(".")
    os.close(old)
    os.chdir("/")
    if propagation:         # of the root alone: the mounts in it have what their options say
        set_propagation("/", PROPAGATION[propagation.removeprefix("r")], recursive=False)
    if readonly:
        set_attributes(root, ATTR["rdonly"])
