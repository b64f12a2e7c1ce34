"""The host's half of a bundle's file system: what a container's first process would mount, as one private tree.

    tree = assemble(spec, warn)     # in a mount namespace of our own, from here on
    tree.path                       # what is shared with the guest; tree.guest: what the guest has to mount itself

Root file system and bind mounts are mounted here, by the code that does it for containers, targets looked up the same
way. proc, sysfs, tmpfs, devpts and the like belong to the guest's kernel: here only the folder they go onto is made.
What is bound to a place below one of these is mounted here too, and bound on top by the guest: `held`. A tmpfs on /dev
becomes the guest's devtmpfs, and what is bound to /dev/shm a tmpfs of that size, for shared memory needs one kernel.
Masked and read-only paths of the guest's /proc and /sys are left: they guard the kernel, which is the guest's own.

Driven by tests/kvm/test_sandbox.py and tests/root/test_sandbox_tree.py.
"""

from __future__ import annotations

__all__ = ["GuestMount", "Tree", "assemble"]

import os
import stat

from hv.container.mounts import Mounter, Options, Target, target_in
from hv.container.rootfs import DEFAULT_DEVICES, hide, open_root
from hv.errors import ConfigError, HvError
from hv.linux.hands import OWN
from hv.linux.mount import ATTR, open_in, set_attributes
from hv.linux.ns import CLONE_NEWNS, unshare
from hv.sandbox.guest import POINTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.spec import Spec

# file systems that are the guest kernel's; whether it may lack it, so that the mount is left out there
GUEST_KINDS = {"proc": False, "sysfs": False, "tmpfs": False, "ramfs": False, "devpts": False, "devtmpfs": False,
               "mqueue": True, "cgroup": True, "cgroup2": True, "debugfs": True, "tracefs": True, "securityfs": True,
               "hugetlbfs": True, "bpf": True, "configfs": True, "fusectl": True}
# include/uapi/linux/mount.h
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "nosymfollow": 256,
          "noatime": 1 << 10, "nodiratime": 1 << 11, "relatime": 1 << 21, "strictatime": 1 << 24, "lazytime": 1 << 25}
_CLEARED = {"rw": 1, "suid": 2, "dev": 4, "exec": 8, "async": 16, "atime": 1 << 10, "diratime": 1 << 11}
_DEVICES = frozenset(path for path, _, _ in DEFAULT_DEVICES) | {"/dev/console", "/dev/ptmx"}
_SHM = "/dev/shm"
_SHM_SIZE = 64 << 20


class GuestMount:
    """mount(2) in the guest. `optional`: a kernel without that kind does without. `again`: there is one at `target`."""

    __slots__ = ("again", "data", "flags", "kind", "optional", "source", "target")

    def __init__(self, kind: str, source: str, target: str, flags: int = 0, data: str = "",
                 optional: bool = False) -> None:
        self.kind, self.source, self.target = kind, source, target
        self.flags, self.data, self.optional, self.again = flags, data, optional, False


class Tree:
    """`path` is the root, `fd` a descriptor of it; `guest` the guest's mounts in order; `held` the paths in the tree
    that they hide and that belong on top of them."""

    def __init__(self, path: str, fd: int) -> None:
        self.path, self.fd = path, fd
        self.guest: list[GuestMount] = []
        self.held: list[str] = []

    def hidden(self, path: str) -> bool:
        """Whether the guest has mounted something over `path`, or above it. Each has /dev, /proc and /sys."""
        return path.split("/")[1] in POINTS or any(
            path == mount.target or path.startswith(mount.target + "/") for mount in self.guest)

    def close(self) -> None:
        """Close the descriptor; the mounts go with the process."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def assemble(spec: Spec, warn: Callable[[str], None]) -> Tree:
    """Mount everything. This process has one thread, and a mount namespace of its own afterwards."""
    refuse(spec)
    for kind in ("createContainer", "startContainer"):
        if kind in spec.hooks:
            warn(f"hooks.{kind}: not run, for a VM has no namespaces of the host to run them in")
    unshare(CLONE_NEWNS)
    root = open_root(OWN, spec.rootfs, "", None)
    tree = Tree(os.readlink(f"/proc/self/fd/{root}"), root)
    try:
        for name in POINTS:
            OWN.close(target_in(OWN, root, f"/{name}", True))
        mounter = _Mounter(tree, warn)
        mounter.attach_all(spec.mounts)
        cwd = os.path.normpath(spec.program.cwd)
        if not tree.hidden(cwd):
            OWN.close(target_in(OWN, root, cwd, True))      # as for a container: made where it is missing
        mounter.finish()
        masked, readonly = ([path for path in paths if not tree.hidden(os.path.normpath(path))]
                            for paths in (spec.masked_paths, spec.readonly_paths))
        hide(OWN, masked, readonly, root)
        if spec.root_readonly:
            set_attributes(root, ATTR["rdonly"])
    except BaseException:
        tree.close()
        raise
    return tree


def refuse(spec: Spec) -> None:
    """What no VM can do for a bundle. ConfigError names it."""
    if spec.in_user_namespace:
        raise ConfigError("linux.namespaces: user: a VM's users are its own already", "leave it out")
    if not spec.has_mount_namespace:
        raise ConfigError("linux.namespaces: a VM needs a new mount namespace")
    for device in spec.devices:
        if device["path"] not in _DEVICES and device["type"] != "p":
            raise ConfigError(f"linux.devices: {device['path']}: a device of the host is none of a VM's",
                              "leave it out; --privileged asks for all of them")
    if spec.personality:
        raise ConfigError("linux.personality: not in a VM", "leave it out")
    for index, mount in enumerate(spec.mounts):
        if mount["uidMappings"] or mount["gidMappings"] or {"idmap", "ridmap"} & set(mount["options"]):
            raise ConfigError(f"mounts[{index}] ({mount['destination']}): idmapped mounts are not shared with a VM")


class _Mounter(Mounter):
    """Attaches what is the host's, and notes what is the guest's."""

    def __init__(self, tree: Tree, warn: Callable[[str], None]) -> None:
        super().__init__(OWN, tree.fd, cgroup=lambda mount, options: None)
        self._made, self._warn = tree, warn

    def _attach(self, index: int, mount: dict[str, Any], options: Options) -> None:
        kind, destination = mount.get("type") or "", mount["destination"]
        bind = options.bind or kind == "bind"
        if bind:
            if destination in _DEVICES:
                return              # the guest has its own
            if destination == _SHM:
                self._shared_memory(mount, options)
                return
            self._check_source(mount, options)
        elif kind in GUEST_KINDS and not (options.copy_up and self._has_entries(destination)):
            self._for_guest(mount, kind, options)
            return
        super()._attach(index, mount, options)
        # links of the image followed, or where it was asked for: one of them the guest's mounts may hide
        target = self._found(open_in(self._made.fd, destination, os.O_PATH))
        for path in (target, destination):
            if self._made.hidden(path):
                self._made.held.append(target)
                break

    def _check_source(self, mount: dict[str, Any], options: Options) -> None:
        mode = os.stat(mount["source"]).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ConfigError(f"{options.what}: {mount['source']} is a device of the host, which is none of a VM's")
        if stat.S_ISSOCK(mode):
            self._warn(f"{options.what}: {mount['source']} is a socket: nobody listens at it inside the VM")

    def _shared_memory(self, mount: dict[str, Any], options: Options) -> None:
        try:
            room = os.statvfs(mount["source"])
            size = room.f_blocks * room.f_frsize
        except OSError:
            size = _SHM_SIZE
        flags = _flags(mount["options"]) | _FLAGS["nosuid"] | _FLAGS["nodev"]
        self._note(GuestMount("tmpfs", "shm", self._place(_SHM), flags, f"mode=1777,size={size}"))

    def _for_guest(self, mount: dict[str, Any], kind: str, options: Options) -> None:
        flags, data = _flags(mount["options"]), list(options.data)
        target = self._place(mount["destination"])
        if target == "/dev" and kind in ("tmpfs", "devtmpfs"):
            kind, data = "devtmpfs", []
            flags &= ~_FLAGS["nodev"]
        elif kind == "tmpfs" and not any(word.startswith("mode=") for word in data):
            data.insert(0, f"mode={self._mode(target):o}")
        elif kind.startswith("cgroup"):
            kind, data = "cgroup2", []
        self._note(GuestMount(kind, mount.get("source") or kind, target, flags, ",".join(data), GUEST_KINDS[kind]))

    def _note(self, mount: GuestMount) -> None:
        held = self._made.held
        for path in [path for path in held if path == mount.target or path.startswith(mount.target + "/")]:
            held.remove(path)       # config.md, Mounts: a later mount covers it
        mount.again = any(other.target == mount.target for other in self._made.guest)
        self._made.guest.append(mount)

    def _place(self, destination: str) -> str:
        """Where the guest finds the folder `destination`: its path without links. It is made where it is missing."""
        if self._made.hidden(destination):
            return destination
        target = Target(OWN, self._made.fd, destination, folder=True)
        target.make(lambda: True)
        return self._found(target.fd)

    def _found(self, fd: int) -> str:
        """The path of `fd` below the root; closes it."""
        try:
            return os.readlink(f"/proc/self/fd/{fd}")[len(self._made.path.rstrip("/")):] or "/"
        finally:
            os.close(fd)

    def _mode(self, path: str) -> int:
        """Of the image's folder, which the mount hides (tmpfs takes it over, as runc does)."""
        if self._made.hidden(path):
            return 0o755
        fd = open_in(self._made.fd, path, os.O_PATH)
        try:
            return stat.S_IMODE(os.stat(fd).st_mode)
        finally:
            os.close(fd)

    def _has_entries(self, path: str) -> bool:
        """Whether there is something to be copied into a tmpfs (tmpcopyup)."""
        try:
            fd = open_in(self._made.fd, path, os.O_RDONLY | os.O_DIRECTORY)
        except HvError:
            return False
        try:
            return bool(os.listdir(fd))
        finally:
            os.close(fd)


def _flags(options: list[str]) -> int:
    flags = 0
    for word in options:
        flags = (flags | _FLAGS.get(word, 0)) & ~_CLEARED.get(word, 0)
    return flags
