"""The mounts of config.json (runtime-spec, config.md, Mounts): options understood, targets made, mounts attached.

Every target is looked up with the rootfs as root (openat2, RESOLVE_IN_ROOT), and the mount is put onto the descriptor
found, so a symbolic link in the image, or one that is swapped in between, can't lead anywhere else (CVE-2021-30465).
Driven by tests/unit/test_container_mounts.py and tests/root/test_container_mounts.py.
"""

from __future__ import annotations

__all__ = ["Options", "attach_all", "target_in"]

import errno
import os
from stat import S_ISDIR

from hv.errors import ConfigError, HvError, KernelError
from hv.linux.mount import ATTR, PROPAGATION, clone_tree, move, new_filesystem, open_in, set_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# option -> (attributes set, attributes cleared)
_FLAGS = {
    "ro": (ATTR["rdonly"], 0), "rw": (0, ATTR["rdonly"]), "nosuid": (ATTR["nosuid"], 0), "suid": (0, ATTR["nosuid"]),
    "nodev": (ATTR["nodev"], 0), "dev": (0, ATTR["nodev"]), "noexec": (ATTR["noexec"], 0), "exec": (0, ATTR["noexec"]),
    "noatime": (ATTR["noatime"], 0), "atime": (0, ATTR["noatime"]), "strictatime": (ATTR["strictatime"], 0),
    "nostrictatime": (0, ATTR["strictatime"]), "relatime": (0, ATTR["atime"]), "norelatime": (0, 0),
    "nodiratime": (ATTR["nodiratime"], 0), "diratime": (0, ATTR["nodiratime"]),
    "nosymfollow": (ATTR["nosymfollow"], 0), "symfollow": (0, ATTR["nosymfollow"]), "defaults": (0, 0),
}
# of the file system itself, not of the mount (man 2 fsconfig takes them by these names)
_SUPERBLOCK = ("sync", "async", "dirsync", "lazytime", "mand", "silent")
_IGNORED = ("nolazytime", "nomand", "loud", "iversion", "noiversion", "nofail", "auto", "noauto", "user", "nouser",
            "_netdev")
_PROC_ALLOWED = ("/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime",
                 "/proc/loadavg", "/proc/slabinfo", "/proc/sys/kernel/ns_last_pid", "/proc/net/dev")   # lxcfs' files


class Options:
    """The options of one mount, sorted."""

    __slots__ = ("bind", "clear", "copy_up", "data", "idmap", "propagation", "recursive_clear", "recursive_set", "set",
                 "tree", "what")

    def __init__(self, words: list[str], what: str) -> None:
        self.what = what
        self.set = self.clear = self.recursive_set = self.recursive_clear = 0
        self.bind = self.tree = self.copy_up = False
        self.propagation: list[tuple[int, bool]] = []
        self.idmap = ""
        self.data: list[str] = []
        for word in words:
            self._take(word)

    def _take(self, word: str) -> None:
        if word in _FLAGS:
            on, off = _FLAGS[word]
            self.set, self.clear = self.set & ~off | on, self.clear & ~on | off
        elif word[:1] == "r" and word[1:] in _FLAGS:            # rro, rnosuid, ...: for the mounts below as well
            on, off = _FLAGS[word[1:]]
            self.recursive_set = self.recursive_set & ~off | on
            self.recursive_clear = self.recursive_clear & ~on | off
        elif word in ("bind", "rbind"):
            self.bind, self.tree = True, word == "rbind"
        elif word.removeprefix("r") in PROPAGATION:
            self.propagation.append((PROPAGATION[word.removeprefix("r")], word.startswith("r")))
        elif word == "tmpcopyup":
            self.copy_up = True
        elif word in ("idmap", "ridmap"):
            self.idmap = word
        elif word == "remount":
            raise ConfigError(f"{self.what}: option remount", "give the options to the mount itself")
        elif word not in _IGNORED:
            self.data.append(word)


def attach_all(mounts: list[dict[str, Any]], root_fd: int, cgroup_mount: Any, label: str = "") -> None:
    """Make and attach `mounts` in order below `root_fd`. `cgroup_mount(root_fd, mount, options)` does type cgroup."""
    for index, mount in enumerate(mounts):
        what = f"mounts[{index}] ({mount['destination']})"
        options = Options(mount.get("options") or [], what)
        try:
            _attach(mount, options, root_fd, cgroup_mount, label)
        except KernelError as error:
            raise HvError(f"{what}: {error}", error.hint) from None
        except OSError as error:
            raise HvError(f"{what}: {error.filename or ''}: {os.strerror(error.errno or 0)}") from None


def _attach(mount: dict[str, Any], options: Options, root_fd: int, cgroup_mount: Any, label: str) -> None:
    destination, kind = mount["destination"], mount.get("type") or ""
    if kind == "cgroup":
        cgroup_mount(root_fd, mount, options)
        return
    _check_proc(destination, kind, options)
    if options.bind or kind == "bind":
        fd = clone_tree(-100, mount["source"], options.tree)
        is_dir = S_ISDIR(os.stat(fd).st_mode)
    else:
        data = options.data
        if kind == "tmpfs" and label:
            data = [*data, f'context="{label}"']
        fd = new_filesystem(kind, mount.get("source") or kind, data, 0)
        is_dir = True
    try:
        if options.set or options.clear:
            set_attributes(fd, options.set, options.clear)
        if options.recursive_set or options.recursive_clear:
            set_attributes(fd, options.recursive_set, options.recursive_clear, recursive=True)
        target = target_in(root_fd, destination, is_dir)
        try:
            if options.copy_up and kind == "tmpfs":
                copy_up(target, fd)
            move(fd, target)
        finally:
            os.close(target)
        for kind_of, recursive in options.propagation:
            set_attributes(fd, 0, 0, recursive=recursive, propagation=kind_of)
    finally:
        os.close(fd)


def _check_proc(destination: str, kind: str, options: Options) -> None:
    """Nothing may be mounted over parts of /proc, where programs look for facts (CVE-2019-16884)."""
    path = os.path.normpath(destination)
    if path == "/proc" and kind != "proc" and not options.bind:
        raise ConfigError(f"{options.what}: a mount of type {kind!r} on /proc", "only proc itself belongs there")
    if path.startswith("/proc/") and path not in _PROC_ALLOWED:
        raise ConfigError(f"{options.what}: a mount inside /proc", f"allowed are {', '.join(_PROC_ALLOWED)}")


def target_in(root_fd: int, path: str, is_dir: bool) -> int:
    """An O_PATH descriptor of `path` in the rootfs; made, with the folders on its way, where it is missing."""
    try:
        return open_in(root_fd, path, os.O_PATH)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
    parent, _, leaf = os.path.normpath(path).rpartition("/")
    above = target_in(root_fd, parent, True) if parent.strip("/") else os.open(".", os.O_PATH | os.O_CLOEXEC,
                                                                              dir_fd=root_fd)
    try:
        if is_dir:
            os.mkdir(leaf, 0o755, dir_fd=above)
        else:
            os.close(os.open(leaf, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644,
                             dir_fd=above))
    except FileExistsError:
        pass        # a dangling link, or somebody was faster: the look-up below decides
    finally:
        os.close(above)
    return open_in(root_fd, path, os.O_PATH)


def copy_up(source: int, mounted: int) -> None:
    """tmpcopyup: what the image has at the target, into the tmpfs that will hide it."""
    import shutil

    shutil.copytree(f"/proc/self/fd/{source}", f"/proc/self/fd/{mounted}", symlinks=True, dirs_exist_ok=True)
