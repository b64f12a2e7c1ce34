"""Mounts of type cgroup: what a container sees at /sys/fs/cgroup.

Version 2 is one mount of cgroup2. Version 1 (and hybrid) is a tmpfs with a folder for each hierarchy, and links for the
single names of controllers that share one, as on a host. With a cgroup namespace of its own the container's group is
the root of what it sees; without one, version 1 folders are bind mounts of the container's groups, and version 2 shows
all, as with the peers. Driven by tests/root/test_cgroups_mount.py.
"""

from __future__ import annotations

__all__ = ["attach"]

import errno
import os

from hv.container.cgroups.detect import own_paths
from hv.container.mounts import check_target, target_in
from hv.errors import HvError, KernelError
from hv.linux.mount import ATTR, clone_tree, move, new_filesystem, set_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.detect import Layout
    from hv.container.mounts import Options

_SAFE = ATTR["nosuid"] | ATTR["nodev"] | ATTR["noexec"]


def attach(paths: dict[str, str], layout: Layout, root_fd: int, mount: dict[str, Any], options: Options,
           label: str) -> None:
    """Make the mount(s) and put them onto mount["destination"] in the container's root."""
    target = target_in(root_fd, mount["destination"], True)
    try:
        check_target(target, mount["destination"], options.what)
        if not layout.v1:
            if not layout.v2:
                raise HvError(f"{options.what}: this host has no cgroups mounted", "leave the mount out")
            top = _version_2(paths, layout)
            set_attributes(top, options.set, options.clear)
            move(top, target)
        else:
            top = _version_1(paths, layout, target, options, label)
    finally:
        os.close(target)
    try:
        if options.recursive_set or options.recursive_clear:
            set_attributes(top, options.recursive_set, options.recursive_clear, recursive=True)
        for kind, recursive in options.propagation:
            set_attributes(top, 0, 0, recursive=recursive, propagation=kind)
    finally:
        os.close(top)


def _version_2(paths: dict[str, str], layout: Layout) -> int:
    try:
        return new_filesystem("cgroup2", "cgroup", [], _SAFE)
    except KernelError as error:
        if error.errno not in (errno.EPERM, errno.EBUSY, errno.EACCES):
            raise
    # a user namespace without a cgroup namespace may not mount it, but may show a part of what is mounted
    fd = clone_tree(-100, paths[""] if _namespaced("") and "" in paths else layout.v2, True)
    set_attributes(fd, _SAFE)
    return fd


def _namespaced(key: str) -> bool:
    """Whether this process, which is in the container's group, sees that as the root: a cgroup namespace (man 7)."""
    return own_paths().get(key, "/") == "/"


def _version_1(paths: dict[str, str], layout: Layout, target: int, options: Options, label: str) -> int:
    """The tmpfs and what belongs into it. Read-only comes last, when the folders have been made."""
    data = [word for word in options.data if word.startswith(("mode=", "size=", "nr_inodes=", "uid=", "gid="))]
    if label:
        data.append(f'context="{label}"')
    readonly = options.set & ATTR["rdonly"]
    top = new_filesystem("tmpfs", "tmpfs", data or ["mode=755"], options.set & ~ATTR["rdonly"] & ~ATTR["atime"])
    move(top, target)
    points: dict[str, list[str]] = {}
    for name, point in layout.v1.items():
        if name in paths:
            points.setdefault(point, []).append(name)
    for point, names in points.items():
        leaf = point.rpartition("/")[2]
        os.mkdir(leaf, 0o755, dir_fd=top)
        # the group as a bind mount: with a cgroup namespace it is the root of what is seen, as a mount made inside
        # would show it, which costs five times as much; without one it shows the container's group alone
        fd = clone_tree(-100, paths[names[0]], False)
        try:
            set_attributes(fd, _SAFE | readonly)
            place = os.open(leaf, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                move(fd, place)
            finally:
                os.close(place)
        finally:
            os.close(fd)
        for name in names:
            if name != leaf and len(names) > 1:
                os.symlink(leaf, name, dir_fd=top)
    if readonly:
        set_attributes(top, ATTR["rdonly"])
    return top

