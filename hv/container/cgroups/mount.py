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

from hv.container.cgroups.detect import parse_own
from hv.container.mounts import Target
from hv.errors import HvError
from hv.linux.hands import AT_FDCWD
from hv.linux.mount import ATTR, clone_tree, move, new_filesystem, set_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.detect import Layout
    from hv.container.mounts import Options
    from hv.linux.hands import Hands

_SAFE = ATTR["nosuid"] | ATTR["nodev"] | ATTR["noexec"]


def attach(paths: dict[str, str], layout: Layout, hands: Hands, root: Any, mount: dict[str, Any], options: Options,
           label: str) -> None:
    """Make the mount(s) and put them onto mount["destination"] in the container's root."""
    target = Target(hands, root, mount["destination"], folder=True)
    target.make(lambda: True)
    target.check(options.what)
    if not layout.v1:
        if not layout.v2:
            raise HvError(f"{options.what}: this host has no cgroups mounted", "leave the mount out")
        top = _version_2(paths, layout, hands)
        set_attributes(top, options.set, options.clear, do=hands.do)
        move(top, target.fd, hands.do)
    else:
        top = _version_1(paths, layout, hands, target.fd, options, label)
    hands.close(target.fd)
    if options.recursive_set or options.recursive_clear:
        set_attributes(top, options.recursive_set, options.recursive_clear, recursive=True, do=hands.do)
    for kind, recursive in options.propagation:
        set_attributes(top, 0, 0, recursive=recursive, propagation=kind, do=hands.do)
    hands.close(top)


def _version_2(paths: dict[str, str], layout: Layout, hands: Hands) -> Any:
    refusals = (errno.EPERM, errno.EBUSY, errno.EACCES)
    # a file system that may not be made fails at one step or the other, and those after it with EBADF
    fd = new_filesystem("cgroup2", "cgroup", [], _SAFE, do=hands.may(*refusals, errno.EBADF))
    own = hands.start_of("/proc/self/cgroup")
    if hands.value(fd) >= 0:
        return fd
    # a user namespace without a cgroup namespace may not mount it, but may show a part of what is mounted
    seen_as_root = parse_own(own()).get("", "/") == "/"         # a cgroup namespace (man 7)
    fd = clone_tree(AT_FDCWD, paths[""] if seen_as_root and "" in paths else layout.v2, True, hands.do)
    set_attributes(fd, _SAFE, do=hands.do)
    return fd


def _version_1(paths: dict[str, str], layout: Layout, hands: Hands, target: Any, options: Options, label: str) -> Any:
    """The tmpfs and what belongs into it. Read-only comes last, when the folders have been made."""
    data = [word for word in options.data if word.startswith(("mode=", "size=", "nr_inodes=", "uid=", "gid="))]
    if label:
        data.append(f'context="{label}"')
    readonly, do = options.set & ATTR["rdonly"], hands.do
    top = new_filesystem("tmpfs", "tmpfs", data or ["mode=755"], options.set & ~ATTR["rdonly"] & ~ATTR["atime"], do)
    move(top, target, do)
    points: dict[str, list[str]] = {}
    for name, point in layout.v1.items():
        if name in paths:
            points.setdefault(point, []).append(name)
    for point, names in points.items():
        leaf = point.rpartition("/")[2]
        hands.mkdir(top, leaf, 0o755)
        # the group as a bind mount: with a cgroup namespace it is the root of what is seen, as a mount made inside
        # would show it, which costs five times as much; without one it shows the container's group alone
        fd = clone_tree(AT_FDCWD, paths[names[0]], False, do)
        set_attributes(fd, _SAFE | readonly, do=do)
        place = hands.open(leaf, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, top)
        move(fd, place, do)
        hands.close(place)
        hands.close(fd)
        for name in names:
            if name != leaf and len(names) > 1:
                hands.symlink(leaf, top, name)
    if readonly:
        set_attributes(top, ATTR["rdonly"], do=do)
    return top
