"""The mounts of config.json (runtime-spec, config.md, Mounts): options understood, targets made, mounts attached.

Every target is looked up with the rootfs as root (openat2, RESOLVE_IN_ROOT), and the mount is put onto the descriptor
found, so a symbolic link in the image, or one that is swapped in between, can't lead anywhere else (CVE-2021-30465).
Driven by tests/unit/test_container_mount_options.py and tests/root/test_container_mounts.py.
"""

from __future__ import annotations

__all__ = ["Mounter", "Options", "Target", "option_names", "target_in"]

import errno
import os
from stat import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, S_IMODE, S_ISLNK

from hv.errors import ConfigError, HvError, KernelError
from hv.linux.hands import ANY, AT_FDCWD, AT_SYMLINK_NOFOLLOW
from hv.linux.mount import (
    ATTR,
    PROPAGATION,
    clone_tree,
    move,
    new_filesystem,
    open_in,
    set_attributes,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.linux.hands import Hands

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

    def __init__(self, hands: Hands, root: Any, *, cgroup: Callable[[dict[str, Any], Options], None], label: str = "",
                 opener: Callable[[str], Any] | None = None, trees: dict[int, int] | None = None) -> None:
        self.hands = hands
        self.root = root
        self._cgroup = cgroup           # attaches a mount of type cgroup
        self._label = label
        self._opener = opener           # opens a source that this process may not reach, or None
        self._trees = trees or {}       # sources that the runtime has made ready, by the mount's number
        self._later: list[Any] = []     # mounts that are written to before they become read-only

    def attach_all(self, mounts: list[dict[str, Any]]) -> None:
        """Attach them; HvError names the one that fails."""
        for index, mount in enumerate(mounts):
            what = f"mounts[{index}] ({mount['destination']})"
            options = Options(mount["options"], what)
            try:
                with self.hands.failing(_told(what)):
                    self._attach(index, mount, options)
            except OSError as error:
                raise HvError(f"{what}: {error.filename or ''}: {os.strerror(error.errno or 0)}") from None

    def finish(self) -> None:
        """Everything that had to be written is: read-only tmpfs become so."""
        for fd in self._later:
            set_attributes(fd, ATTR["rdonly"], do=self.hands.do)
            self.hands.close(fd)
        self._later = []

    def _attach(self, index: int, mount: dict[str, Any], options: Options) -> None:
        destination, kind, hands = mount["destination"], mount.get("type") or "", self.hands
        if kind == "cgroup":
            self._cgroup(mount, options)
            return
        bind = options.bind or kind == "bind"
        _check_proc(destination, kind, bind, options.what)
        is_dir: Callable[[], bool] = _yes
        if bind:
            fd = self._trees[index] if index in self._trees else self._tree(mount["source"], options)
            source = hands.stat(fd)
            is_dir = lambda: source.is_dir      # noqa: E731 (asked for only where the target is missing)
        # no link: what is hidden below it is looked up by the same name later (CVE-2019-19921, CVE-2023-27561)
        place = None
        if kind in ("proc", "sysfs"):
            place = hands.stat(self.root, destination.lstrip("/"), AT_SYMLINK_NOFOLLOW)
        target = Target(hands, self.root, destination, folder=not bind, with_mode=kind == "tmpfs")
        if place and S_ISLNK(place.mode):
            raise HvError(f"{options.what}: a symbolic link in the image", "it must be a folder there")
        target.make(is_dir)
        target.check(options.what)
        if not bind:
            fd = self._new(mount, kind, options, target)
        set_now, later = options.set, False
        if kind == "tmpfs" and set_now & ATTR["rdonly"]:
            set_now, later = set_now & ~ATTR["rdonly"], True
        if set_now or options.clear:
            set_attributes(fd, set_now, options.clear, do=hands.do)
        if options.recursive_set or options.recursive_clear:
            set_attributes(fd, options.recursive_set, options.recursive_clear, recursive=True, do=hands.do)
        if options.copy_up and kind == "tmpfs":
            copy_up(target.fd, fd)
        move(fd, target.fd, hands.do)
        hands.close(target.fd)
        for kind_of, recursive in options.propagation:
            set_attributes(fd, 0, 0, recursive=recursive, propagation=kind_of, do=hands.do)
        if later:
            self._later.append(fd)
        else:
            hands.close(fd)

    def _new(self, mount: dict[str, Any], kind: str, options: Options, target: Target) -> Any:
        data = options.data
        if kind == "tmpfs":
            if not any(word.startswith("mode=") for word in data):
                data = [f"mode={S_IMODE(target.mode):o}", *data]    # as the image has it there
            if self._label:
                data = [*data, f'context="{self._label}"']
        return new_filesystem(kind, mount.get("source") or kind, data, do=self.hands.do)

    def _tree(self, source: str, options: Options) -> Any:
        if self._opener is None:
            return clone_tree(AT_FDCWD, source, options.tree, self.hands.do)
        tree = clone_tree(AT_FDCWD, source, options.tree, self.hands.may(errno.EACCES))
        if self.hands.value(tree) >= 0:
            return tree
        place = self._opener(source)    # root of a user namespace has no rights on the way there; the runtime has
        tree = clone_tree(place, "", options.tree, self.hands.do)
        self.hands.close(place)
        return tree


def _yes() -> bool:
    return True


def _told(what: str) -> Callable[[KernelError], HvError]:
    return lambda error: HvError(f"{what}: {error}", error.hint)


def _check_proc(destination: str, kind: str, bind: bool, what: str) -> None:
    """Nothing may be mounted over parts of /proc, where programs look for facts (CVE-2019-16884)."""
    if destination == "/proc" and kind != "proc" and not bind:
        raise ConfigError(f"{what}: a mount of type {kind!r} on /proc", "only proc itself belongs there")
    if destination.startswith("/proc/") and destination not in _PROC_ALLOWED:
        raise ConfigError(f"{what}: a mount inside /proc", f"allowed are {', '.join(_PROC_ALLOWED)}")


class Target:
    """What a mount goes onto: `path` in the rootfs, once make() has found or made it, is the descriptor `fd`."""

    def __init__(self, hands: Hands, root: Any, path: str, *, folder: bool = False, with_mode: bool = False) -> None:
        """`folder`: one will be made if it is missing, and the one above is there; in one go, for that is the rule.
        `with_mode`: its mode will be asked for."""
        self._hands, self._root, self._path, self._with_mode = hands, root, path, with_mode
        parent, _, leaf = path.rpartition("/")
        if folder and leaf:
            above = open_in(root, parent, os.O_PATH, do=hands.do, may=(errno.ENOENT,)) if parent else root
            hands.mkdir(above, leaf, 0o755, may=ANY)        # what comes of it is seen by the look-up
            if parent:
                hands.close(above)
        self._look(open_in(root, path, os.O_PATH, do=hands.do, may=(errno.ENOENT,)))

    def _look(self, fd: Any) -> None:
        self.fd = fd
        self._kind = self._hands.kind(fd)
        self._status = self._hands.stat(fd) if self._with_mode else None

    def make(self, is_dir: Callable[[], bool]) -> None:
        """Where it is missing it is made, with the folders on its way."""
        if self._hands.value(self.fd) < 0:
            self._look(_make(self._hands, self._root, self._path, is_dir(), _LINKS_MOST))

    def check(self, what: str) -> None:
        """No part of /proc (CVE-2019-16884), even where a link of the image leads there: what is found counts."""
        if self._kind() == _PROC_MAGIC and self._path != "/proc" and self._path not in _PROC_ALLOWED:
            raise HvError(f"{what}: a link in the image leads into /proc", "mount it somewhere else")

    @property
    def mode(self) -> int:
        """st_mode of what is there."""
        return self._status.mode if self._status else 0


def target_in(hands: Hands, root: Any, path: str, is_dir: bool, links: int = _LINKS_MOST) -> Any:
    """An O_PATH descriptor of `path` in the rootfs; made, with the folders on its way, where it is missing.

    A link that leads nowhere, as /etc/resolv.conf is in many images: what it names is made.
    """
    fd = open_in(root, path, os.O_PATH, do=hands.do, may=(errno.ENOENT,))
    return fd if hands.value(fd) >= 0 else _make(hands, root, path, is_dir, links)


def _make(hands: Hands, root: Any, path: str, is_dir: bool, links: int) -> Any:
    parent, _, leaf = path.rpartition("/")
    above = target_in(hands, root, parent, True, links) if parent.strip("/") else hands.open(".", os.O_PATH, root)
    if is_dir:
        made = hands.mkdir(above, leaf, 0o755, may=(errno.EEXIST,))
    else:
        # not by open: a file that is open for writing keeps the root from being made read-only
        made = hands.mknod(above, leaf, S_IFREG | 0o644, 0, may=(errno.EEXIST,))
    fd = open_in(root, path, os.O_PATH, do=hands.do, may=(errno.ENOENT,))
    link = hands.link(above, leaf)
    kind = hands.kind(above)
    hands.close(above)
    if hands.value(made) < 0:       # a link, or somebody was faster
        # a link of proc's is no text: it leads to what a process has open
        to = "" if kind() == _PROC_MAGIC else os.fsdecode(link())
        if to and links:
            hands.close(fd)
            return target_in(hands, root, to if to.startswith("/") else f"{parent}/{to}", is_dir, links - 1)
    if hands.value(fd) < 0:
        return open_in(root, path, os.O_PATH, do=hands.do)      # once more, for the error
    return fd


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
