"""Who makes system calls: this process, at once (`Own`), or another one, in its own time (hv/container/far.py).

What prepares a container is written once, for either. A call gives a handle, which other calls take as an argument;
what comes of it is known once `value` has been asked for, so to ask seldom is to be fast.

    place = hands.open("/proc", os.O_PATH, may=(errno.ENOENT,))
    hands.do("fchdir", 81, place)
    if hands.value(place) < 0: ...

A call that fails, but for the errors that it may fail with, ends it all: KernelError, or what `failing` makes of it; at
once, or with the next value asked for. Driven by tests/unit/test_far.py.
"""

from __future__ import annotations

__all__ = ["ANY", "AT_EMPTY_PATH", "AT_FDCWD", "AT_SYMLINK_NOFOLLOW", "OWN", "Hands", "Own", "Status", "plain"]

import os
from stat import S_ISDIR

from hv.errors import HvError, KernelError
from hv.linux.syscall import buffer, try_syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from typing import Any

    Teller = Callable[[KernelError], Exception]

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_READ, _SYS_WRITE, _SYS_CLOSE, _SYS_CHDIR, _SYS_FCHDIR, _SYS_UMASK, _SYS_CHROOT = 0, 1, 3, 80, 81, 95, 161
_SYS_FSTATFS, _SYS_OPENAT, _SYS_MKDIRAT, _SYS_MKNODAT, _SYS_FCHOWNAT, _SYS_NEWFSTATAT = 138, 257, 258, 259, 260, 262
_SYS_UNLINKAT, _SYS_SYMLINKAT, _SYS_READLINKAT = 263, 266, 267
AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x1000      # include/uapi/linux/fcntl.h
_STAT_SIZE, _STATFS_SIZE = 144, 120     # struct stat, struct statfs
_READ_MOST, _PATH_MAX = 1 << 20, 4096
ANY = range(1, 4096)                    # include/linux/err.h, MAX_ERRNO


def _path(path: str) -> bytes:
    """As the kernel takes it, which would stop at a NUL byte; as os.open() does."""
    data = os.fsencode(path)
    if b"\0" in data:
        raise ValueError("embedded null byte")
    return data


class Hands:
    """System calls by name, built on what Own and Far make of do()."""

    def __init__(self) -> None:
        self.teller: Teller | None = None

    def do(self, name: str, number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0, *,
           hint: str = "", may: Container[int] = ()) -> Any:
        """Call `number` with numbers, handles, bytes, rooms or None. `may`: errors that are results, negative."""
        raise NotImplementedError

    def repeat(self, name: str, number: int, rows: list[tuple[int, int]]) -> None:
        """The same call with two numbers each; all must succeed."""
        for row in rows:
            self.do(name, number, *row)

    def value(self, handle: Any) -> int:
        """What a call gave; minus the error where it failed with one that it may fail with."""
        raise NotImplementedError

    def room(self, size: int) -> Any:
        """Memory for a call to write to."""
        raise NotImplementedError

    def read(self, room: Any, size: int) -> bytes:
        """The first `size` bytes of it."""
        raise NotImplementedError

    def failing(self, teller: Teller) -> _Failing:
        """For a with statement: the errors of calls made in it are told as `teller` makes them."""
        return _Failing(self, teller)

    def may(self, *errors: int) -> Any:
        """do() that allows for these errors."""
        return lambda *arguments, **more: self.do(*arguments, **more, may=errors)

    def open(self, path: str, flags: int, folder: Any = AT_FDCWD, mode: int = 0, may: Container[int] = ()) -> Any:
        """openat(2), closed by exec."""
        return self.do(f"open({path})", _SYS_OPENAT, folder, _path(path), flags | os.O_CLOEXEC, mode, may=may)

    def close(self, fd: Any) -> None:
        """close(2); what is not open stays so."""
        self.do("close", _SYS_CLOSE, fd, may=ANY)

    def settle(self) -> None:
        """Few descriptors are left: have done what close() has put off, and put off no more."""

    def put(self, path: str, text: str) -> None:
        """Write to a file of the kernel's."""
        data = text.encode()
        fd = self.open(path, os.O_WRONLY)
        self.do(f"write({path})", _SYS_WRITE, fd, data, len(data))
        self.close(fd)

    def start_of(self, path: str, most: int = _READ_MOST) -> Callable[[], bytes]:
        """Have a file's first `most` bytes read; called, it gives them, none where it can't be read."""
        fd = self.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, may=ANY)
        room = self.room(most)
        length = self.do("read", _SYS_READ, fd, room, most, may=ANY)
        self.close(fd)
        return lambda: self.read(room, max(self.value(length), 0))

    def change(self, folder: Any, may: Container[int] = ()) -> Any:
        """chdir(2) or fchdir(2)."""
        if isinstance(folder, str):
            return self.do(f"chdir({folder})", _SYS_CHDIR, _path(folder), may=may)
        return self.do("fchdir", _SYS_FCHDIR, folder, may=may)

    def chroot(self, path: str) -> None:
        """chroot(2)."""
        self.do(f"chroot({path})", _SYS_CHROOT, _path(path))

    def umask(self, mask: int) -> Any:
        """umask(2)."""
        return self.do("umask", _SYS_UMASK, mask)

    def mkdir(self, folder: Any, leaf: str, mode: int, may: Container[int] = ()) -> Any:
        """mkdirat(2)."""
        return self.do(f"mkdir({leaf})", _SYS_MKDIRAT, folder, _path(leaf), mode, may=may)

    def mknod(self, folder: Any, leaf: str, mode: int, device: int, may: Container[int] = ()) -> Any:
        """mknodat(2)."""
        return self.do(f"mknod({leaf})", _SYS_MKNODAT, folder, _path(leaf), mode, device, may=may)

    def symlink(self, target: str, folder: Any, leaf: str, may: Container[int] = ()) -> Any:
        """symlinkat(2)."""
        return self.do(f"symlink({leaf})", _SYS_SYMLINKAT, _path(target), folder, _path(leaf), may=may)

    def link(self, folder: Any, leaf: str) -> Callable[[], bytes]:
        """Have readlinkat(2) read a link; called, it gives the text, none where there is no link."""
        room = self.room(_PATH_MAX)
        length = self.do(f"readlink({leaf})", _SYS_READLINKAT, folder, _path(leaf), room, _PATH_MAX, may=ANY)
        return lambda: self.read(room, max(self.value(length), 0))

    def unlink(self, folder: Any, leaf: str, may: Container[int] = ()) -> Any:
        """unlinkat(2)."""
        return self.do(f"unlink({leaf})", _SYS_UNLINKAT, folder, _path(leaf), 0, may=may)

    def chown(self, folder: Any, leaf: str, uid: int, gid: int) -> None:
        """fchownat(2), of a link itself."""
        self.do(f"chown({leaf})", _SYS_FCHOWNAT, folder, _path(leaf), uid, gid, AT_SYMLINK_NOFOLLOW)

    def stat(self, folder: Any, path: str = "", flags: int = AT_EMPTY_PATH) -> Status:
        """newfstatat(2), of the descriptor itself or of `path`; and what kind of file system it is on."""
        return Status(self, folder, _path(path), flags)

    def kind(self, fd: Any) -> Callable[[], int]:
        """Have fstatfs(2) tell the file system of `fd`; called, it gives its magic number, 0 where there is none."""
        room = self.room(_STATFS_SIZE)
        self.do("fstatfs", _SYS_FSTATFS, fd, room, may=ANY)
        return lambda: int.from_bytes(self.read(room, 8), "little")


class Status:
    """struct stat, once it is asked for (arch/x86/include/uapi/asm/stat.h)."""

    def __init__(self, hands: Hands, folder: Any, path: bytes, flags: int) -> None:
        self._hands = hands
        self._room = hands.room(_STAT_SIZE)
        self._result = hands.do("stat", _SYS_NEWFSTATAT, folder, path, self._room, flags, may=ANY)

    @property
    def error(self) -> int:
        """Why there is none; else 0."""
        return -min(self._hands.value(self._result), 0)

    def _word(self, at: int, size: int) -> int:
        return int.from_bytes(self._hands.read(self._room, _STAT_SIZE)[at:at + size], "little")

    @property
    def mode(self) -> int:
        """st_mode; 0 where there is none."""
        return 0 if self.error else self._word(24, 4)

    @property
    def device(self) -> int:
        """st_rdev."""
        return self._word(40, 8)

    @property
    def identity(self) -> tuple[int, int]:
        """st_dev and st_ino."""
        return self._word(0, 8), self._word(8, 8)

    @property
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return S_ISDIR(self.mode)


def plain(text: str, hint: str = "") -> Teller:
    """A teller: `text`, and why."""
    return lambda error: HvError(f"{text}: {os.strerror(error.errno)}", hint)


class _Failing:
    """Sets the teller of errors for a while."""

    __slots__ = ("_before", "_hands", "_teller")

    def __init__(self, hands: Hands, teller: Teller) -> None:
        self._hands, self._teller = hands, teller

    def __enter__(self) -> None:
        self._before = self._hands.teller
        self._hands.teller = self._teller

    def __exit__(self, *error: object) -> None:
        self._hands.teller = self._before


class Own(Hands):
    """This process makes them, at once."""

    def do(self, name: str, number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0, *,
           hint: str = "", may: Container[int] = ()) -> Any:
        result = try_syscall(number, a, b, c, d, e, f)
        if result < 0 and -result not in may:
            error = KernelError(name, -result, hint)
            raise (self.teller(error) if self.teller else error) from None
        return result

    def value(self, handle: Any) -> int:
        return int(handle)

    def room(self, size: int) -> Any:
        return buffer(size)

    def read(self, room: Any, size: int) -> bytes:
        return bytes(room.raw[:size])


OWN = Own()         # for a single call, with errors as they come
