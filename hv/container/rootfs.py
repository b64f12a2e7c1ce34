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
from hv.errors import HvError
from hv.linux.hands import ANY, AT_FDCWD, AT_SYMLINK_NOFOLLOW, plain
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

    from hv.linux.hands import Hands, Status

# runtime-spec, config-linux.md, Default Devices
DEFAULT_DEVICES = (("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8),
                   ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0))
# config-linux.md, Default Filesystems and runtime-linux.md, Dev symbolic links
_LINKS = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
          ("stderr", "/proc/self/fd/2"), ("core", "/proc/kcore"), ("ptmx", "pts/ptmx"))
_KINDS = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def open_root(hands: Hands, path: str, propagation: str, opener: Callable[[str], Any] | None) -> Any:
    """Make `path` a mount of its own in this mount namespace; a descriptor of it.

    Nothing that is mounted from here on below it reaches the host, whatever its mounts share.
    """
    kind, do = propagation.removeprefix("r") or "slave", hands.do
    if kind != "shared":
        # what is mounted on the host may come in, nothing goes out
        set_propagation("/", PROPAGATION["slave" if kind == "slave" else "private"], recursive=True, do=do)
    with hands.failing(plain(f"root.path {path}")):
        place = hands.open(path, os.O_PATH | os.O_DIRECTORY, may=(errno.EACCES,) if opener else ())
        if opener and hands.value(place) < 0:
            place = opener(path)
    tree = clone_tree(place, "", True, do)
    if kind == "shared":        # else it is private, or a slave of the host's, as we are
        set_attributes(tree, 0, 0, recursive=True, propagation=PROPAGATION["private"], do=do)
        _cut_off(hands.value(place))    # hands are our own: far.py leaves this case out
    move(tree, place, do)
    hands.close(place)
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


def make_devices(hands: Hands, devices: list[dict[str, Any]], root: Any, *, bind: bool,
                 mounted: bool) -> None:
    """Default devices, those of the configuration, and the usual links. `bind`: no mknod in a user namespace.
    `mounted`: /dev is there, being one of the mounts."""
    known: dict[str, dict[str, Any]] = {
        path: {"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0}
        for path, major, minor in DEFAULT_DEVICES}
    for device in devices:
        known[device["path"]] = device
    mask = hands.umask(0)
    with hands.failing(plain("/dev", "the rootfs can't be written: mount a tmpfs on /dev")):
        dev = open_in(root, "/dev", os.O_PATH, do=hands.do) if mounted else target_in(hands, root, "/dev", True)
        made = []
        for path, device in known.items():
            with hands.failing(plain(f"device {path}")):
                if bind:
                    _bind_device(hands, device, root)
                else:
                    made.append(_make_device(hands, device, root, dev))
        links = [(leaf, target, hands.symlink(target, dev, leaf, may=(errno.EEXIST,))) for leaf, target in _LINKS
                 if leaf != "core" or os.path.exists(target)]
        for device, above, result in made:
            with hands.failing(plain(f"device {device['path']}")):
                _check_device(hands, device, above, result)
            if above is not dev:
                hands.close(above)
        for leaf, target, result in links:
            if leaf == "ptmx" and hands.value(result) < 0:      # the image's would be the host's ptys
                hands.unlink(dev, leaf, may=ANY)
                hands.symlink(target, dev, leaf, may=ANY)
    hands.close(dev)
    hands.umask(mask)


def _bind_device(hands: Hands, device: dict[str, Any], root: Any) -> None:
    target = target_in(hands, root, device["path"], False)
    fd = clone_tree(AT_FDCWD, device["path"], False, hands.do)
    move(fd, target, hands.do)
    hands.close(fd)
    hands.close(target)


def _make_device(hands: Hands, device: dict[str, Any], root: Any, dev: Any) -> tuple[dict[str, Any], Any, Any]:
    """The device, the folder that it is in, the result."""
    folder, _, leaf = device["path"].rpartition("/")
    above = dev if folder == "/dev" else target_in(hands, root, folder, True) if folder else hands.open(
        ".", os.O_PATH, root)
    return device, above, hands.mknod(above, leaf, _KINDS[device["type"]] | device["fileMode"],
                                      os.makedev(device["major"], device["minor"]), may=(errno.EEXIST,))


def _check_device(hands: Hands, device: dict[str, Any], above: Any, result: Any) -> None:
    leaf = device["path"].rpartition("/")[2]
    if hands.value(result) < 0:
        found = hands.stat(above, leaf, AT_SYMLINK_NOFOLLOW)
        if (stat.S_IFMT(found.mode) != _KINDS[device["type"]]
                or found.device != os.makedev(device["major"], device["minor"])):
            raise HvError(f"device {device['path']}: something else is there in the image")
    if device["uid"] or device["gid"]:
        hands.chown(above, leaf, device["uid"], device["gid"])


def hide(hands: Hands, masked: list[str], readonly: list[str], root: Any) -> None:
    """Masked paths are empty, read-only paths can't be written; those that are not there are left out."""
    do = hands.do
    for target in [open_in(root, path, os.O_PATH, do=hands.do, may=_NOT_THERE) for path in readonly]:
        if hands.value(target) >= 0:
            fd = clone_tree(target, "", True, do)
            set_attributes(fd, ATTR["rdonly"], recursive=True, do=do)
            _cover(hands, fd, target)
    own = open_in(root, "/dev/null", os.O_PATH, do=do, may=ANY)
    device = hands.stat(own)
    found = [(target, hands.stat(target))
             for target in [open_in(root, path, os.O_PATH, do=hands.do, may=_NOT_THERE) for path in masked]]
    null: Any = None
    empty: Any = None
    for target, status in found:
        if hands.value(target) < 0:
            continue
        if status.is_dir:
            if empty is None:
                empty = new_filesystem("tmpfs", "tmpfs", [], ATTR["rdonly"], do)
                move(empty, target, do)
                hands.close(target)
            else:
                _cover(hands, clone_tree(empty, "", False, do), target)     # one and the same for all
        else:
            if null is None:
                null = own if _is_null(device) else _null_device(hands)
            _cover(hands, clone_tree(null, "", False, do), target)
    for fd in (own, null, empty):
        if fd is not None:
            hands.close(fd)


def _is_null(status: Status) -> bool:
    return stat.S_ISCHR(status.mode) and status.device == os.makedev(1, 3)


def _null_device(hands: Hands) -> Any:
    """The host's null device, where the container's is something else."""
    fd = hands.open("/dev/null", os.O_PATH, may=ANY)
    if not _is_null(hands.stat(fd)):
        raise HvError("linux.maskedPaths: there is no /dev/null to cover files with")
    return fd


def _cover(hands: Hands, fd: Any, target: Any) -> None:
    move(fd, target, hands.do)
    hands.close(fd)
    hands.close(target)


def switch(hands: Hands, root: Any, propagation: str, *, pivot: bool, readonly: bool) -> None:
    """Make `root` the root, and let go of the old one."""
    do = hands.do
    old = hands.open("/", os.O_PATH)
    hands.change(root)
    if pivot:
        pivot_root(".", ".", do)        # the old root lies on top of the new one now (man 2 pivot_root)
        hands.change(old)               # or "." were still the new one
        # what is unmounted in a moment must not be unmounted on the host
        set_propagation(".", PROPAGATION["slave"], recursive=True, do=do)
        umount(".", do=do)
    else:
        from hv.container.oldroot import take_apart

        move(root, old, do)
        take_apart(hands.value(root))       # hands are our own: far.py leaves this case out
        hands.chroot(".")
    hands.close(old)
    hands.change("/")
    if propagation:         # of the root alone: the mounts in it have what their options say
        set_propagation("/", PROPAGATION[propagation.removeprefix("r")], recursive=False, do=do)
    if readonly:
        set_attributes(root, ATTR["rdonly"], do=do)
