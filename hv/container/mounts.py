"""The mounts of config.json (runtime-spec, config.md, Mounts): options understood, targets made, mounts attached.

Every target is looked up with the rootfs as root (openat2, RESOLVE_IN_ROOT), and the mount is put onto the descriptor
found, so a symbolic link in the image, or one that is swapped in between, can't lead anywhere else (CVE-2021-30465).
Driven by tests/unit/test_container_mount_options.py and tests/root/test_container_mounts.py.
"""

from __future__ import annotations

__all__ = ["Mounter", "Options", "check_target", "option_names", "target_in"]

import errno
import os
from stat import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, S_IMODE, S_ISDIR, S_ISLNK

from hv.errors import ConfigError, HvError, KernelError
from hv.linux.mount import (
    ATTR,
    PROPAGATION,
    clone_tree,
    filesystem_kind,
    move,
    new_filesystem,
    open_in,
    set_attributes,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
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
_PROC_MAGIC = 0x9FA0                    # include/uapi/linux/magic.h, PROC_SUPER_MAGIC
_LINKS_MOST = 40        # as the kernel has it (include/linux/namei.h, MAXSYMLINKS)
_PROC_ALLOWED = ("/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime",
                 "/proc/loadavg", "/proc/slabinfo", "/proc/sys/kernel/ns_last_pid", "/proc/net/dev")   # lxcfs' files


_COPY_DEPTH = 200
_PROC = 0x9FA0                  # include/uapi/linux/magic.h


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


def option_names() -> list[str]:
    """The options understood here, those of a file system's own left out (features.md, Mount Options)."""
    ignored = ("nofail", "auto", "noauto", "user", "nouser", "_netdev")     # of fstab(5), which some engines pass on
    names = {*_FLAGS, *("r" + name for name in _FLAGS if name != "defaults"), *PROPAGATION,
             *("r" + name for name in PROPAGATION), *_SUPERBLOCK, *_IGNORED, "bind", "rbind", "tmpcopyup", "idmap",
             "ridmap"}
    return sorted(names.difference(ignored))


class Mounter:
    """Makes and attaches mounts below `root`, in order."""

    def __init__(self, root: int, *, cgroup: Callable[[dict[str, Any], Options], None], label: str = "",
                 opener: Callable[[str], int] | None = None, trees: dict[int, int] | None = None) -> None:
        self.root = root
        self._cgroup = cgroup           # attaches a mount of type cgroup
        self._label = label
        self._opener = opener           # opens a source that this process may not reach, or None
        self._trees = trees or {}       # sources that the runtime has made ready, by the mount's number
        self._later: list[int] = []     # mounts that are written to before they become read-only

    def attach_all(self, mounts: list[dict[str, Any]]) -> None:
        """Attach them; HvError names the one that fails."""
        for index, mount in enumerate(mounts):
            what = f"mounts[{index}] ({mount['destination']})"
            options = Options(mount["options"], what)
            try:
                self._attach(index, mount, options)
            except KernelError as error:
                raise HvError(f"{what}: {error}", error.hint) from None
            except OSError as error:
                raise HvError(f"{what}: {error.filename or ''}: {os.strerror(error.errno or 0)}") from None

    def finish(self) -> None:
        """Everything that had to be written is: read-only tmpfs become so."""
        for fd in self._later:
            set_attributes(fd, ATTR["rdonly"])
            os.close(fd)
        self._later = []

    def _attach(self, index: int, mount: dict[str, Any], options: Options) -> None:
        destination, kind = mount["destination"], mount.get("type") or ""
        if kind == "cgroup":
            self._cgroup(mount, options)
            return
        bind = options.bind or kind == "bind"
        _check_proc(destination, kind, bind, options.what)
        if bind:
            fd = self._trees[index] if index in self._trees else self._tree(mount["source"], options)
            is_dir = S_ISDIR(os.stat(fd).st_mode)
        else:
            is_dir = True
        if kind in ("proc", "sysfs"):
            self._check_place(destination, options.what)
        target = target_in(self.root, destination, is_dir)
        try:
            check_target(target, destination, options.what)
            if not bind:
                fd = self._new(mount, kind, options, target)
            set_now, later = options.set, False
            if kind == "tmpfs" and set_now & ATTR["rdonly"]:
                set_now, later = set_now & ~ATTR["rdonly"], True
            if set_now or options.clear:
                set_attributes(fd, set_now, options.clear)
            if options.recursive_set or options.recursive_clear:
                set_attributes(fd, options.recursive_set, options.recursive_clear, recursive=True)
            if options.copy_up and kind == "tmpfs":
                copy_up(target, fd)
            move(fd, target)
        finally:
            os.close(target)
        for kind_of, recursive in options.propagation:
            set_attributes(fd, 0, 0, recursive=recursive, propagation=kind_of)
        if later:
            self._later.append(fd)
        else:
            os.close(fd)

    def _check_place(self, destination: str, what: str) -> None:
        """No link: what is hidden below it is looked up by the same name later (CVE-2019-19921, CVE-2023-27561)."""
        try:
            status = os.stat(destination.lstrip("/"), dir_fd=self.root, follow_symlinks=False)
        except OSError:
            return
        if S_ISLNK(status.st_mode):
            raise HvError(f"{what}: a symbolic link in the image", "it must be a folder there")

    def _new(self, mount: dict[str, Any], kind: str, options: Options, target: int) -> int:
        data = options.data
        if kind == "tmpfs":
            if not any(word.startswith("mode=") for word in data):
                data = [f"mode={S_IMODE(os.stat(target).st_mode):o}", *data]    # as the image has it there
            if self._label:
                data = [*data, f'context="{self._label}"']
        return new_filesystem(kind, mount.get("source") or kind, data)

    def _tree(self, source: str, options: Options) -> int:
        try:
            return clone_tree(-100, source, options.tree)
        except KernelError as error:
            if error.errno != errno.EACCES or self._opener is None:
                raise
        place = self._opener(source)    # root of a user namespace has no rights on the way there; the runtime has
        try:
            return clone_tree(place, "", options.tree)
        finally:
            os.close(place)


def _check_proc(destination: str, kind: str, bind: bool, what: str) -> None:
    """Nothing may be mounted over parts of /proc, where programs look for facts (CVE-2019-16884)."""
    if destination == "/proc" and kind != "proc" and not bind:
        raise ConfigError(f"{what}: a mount of type {kind!r} on /proc", "only proc itself belongs there")
    if destination.startswith("/proc/") and destination not in _PROC_ALLOWED:
        raise ConfigError(f"{what}: a mount inside /proc", f"allowed are {', '.join(_PROC_ALLOWED)}")


def check_target(target: int, destination: str, what: str) -> None:
    """The same, where a link of the image leads into /proc: what is found there counts, not the name."""
    if filesystem_kind(target) == _PROC_MAGIC and destination != "/proc" and destination not in _PROC_ALLOWED:
        raise HvError(f"{what}: a link in the image leads into /proc", "mount it somewhere else")


def target_in(root_fd: int, path: str, is_dir: bool, links: int = _LINKS_MOST) -> int:
    """An O_PATH descriptor of `path` in the rootfs; made, with the folders on its way, where it is missing.

    A link that leads nowhere, as /etc/resolv.conf is in many images: what it names is made.
    """
    try:
        return open_in(root_fd, path, os.O_PATH)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
    parent, _, leaf = path.rpartition("/")
    above = target_in(root_fd, parent, True, links) if parent.strip("/") else os.open(".", os.O_PATH | os.O_CLOEXEC,
                                                                                     dir_fd=root_fd)
    try:
        if is_dir:
            os.mkdir(leaf, 0o755, dir_fd=above)
        else:
            os.close(os.open(leaf, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644,
                             dir_fd=above))
    except FileExistsError:     # a link, or somebody was faster: the look-up below decides
        try:
            # a link of proc's is no text: it leads to what a process has open
            link = "" if filesystem_kind(above) == _PROC else os.readlink(leaf, dir_fd=above)
        except OSError:
            link = ""
        if link and links:
            return target_in(root_fd, link if link.startswith("/") else f"{parent}/{link}", is_dir, links - 1)
    finally:
        os.close(above)
    return open_in(root_fd, path, os.O_PATH)


def copy_up(source: int, mounted: int) -> None:
    """tmpcopyup: what the image has at the target, into the tmpfs that will hide it, links as links."""
    there = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    here = os.open(f"/proc/self/fd/{mounted}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _copy_folder(there, here, _COPY_DEPTH)
    finally:
        os.close(there)
        os.close(here)


def _copy_folder(there: int, here: int, depth: int) -> None:
    if not depth:
        raise HvError("tmpcopyup: folders too deep", f"at most {_COPY_DEPTH}")
    for leaf in os.listdir(there):
        status = os.stat(leaf, dir_fd=there, follow_symlinks=False)
        kind = S_IFMT(status.st_mode)
        if kind == S_IFLNK:
            os.symlink(os.readlink(leaf, dir_fd=there), leaf, dir_fd=here)
        elif kind == S_IFDIR:
            os.mkdir(leaf, 0o700, dir_fd=here)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below, fresh = os.open(leaf, flags, dir_fd=there), os.open(leaf, flags, dir_fd=here)
            try:
                _copy_folder(below, fresh, depth - 1)
            finally:
                os.close(below)
                os.close(fresh)
        elif kind == S_IFREG:
            _copy_file(leaf, there, here)
        else:
            os.mknod(leaf, status.st_mode, status.st_rdev, dir_fd=here)
        os.chown(leaf, status.st_uid, status.st_gid, dir_fd=here, follow_symlinks=False)
        if kind != S_IFLNK:
            os.chmod(leaf, S_IMODE(status.st_mode), dir_fd=here)
        os.utime(leaf, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=here, follow_symlinks=False)


def _copy_file(leaf: str, there: int, here: int) -> None:
    source = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=there)
    try:
        fresh = os.open(leaf, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=here)
        try:
            while os.sendfile(fresh, source, None, 1 << 20):
                pass
        finally:
            os.close(fresh)
    finally:
        os.close(source)
