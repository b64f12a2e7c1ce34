"""The calling thread acts on files as somebody else (man 2 setfsuid); other threads do not notice.

New files then belong to that user from their first moment, as the kernel itself decides it: quotas, directories with
the set-group-ID bit. Capabilities are kept meanwhile (man 7 capabilities, SECBIT_NO_SETUID_FIXUP), so that the host
does not check again, without knowing the other's groups, what has been checked. Driven by
tests/unit/test_linux_files.py.
"""

from __future__ import annotations

__all__ = ["ActingAs"]

import errno
from ctypes import c_int, c_uint, c_ulong

from hv.linux.libc import LIBC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

# include/uapi/linux/prctl.h, securebits.h
_PR_GET_SECUREBITS, _PR_SET_SECUREBITS = 27, 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_NOBODY = 0xFFFFFFFF            # no user's number: changes nothing, and tells the one in force

_setfsuid = LIBC["setfsuid"]
_setfsuid.argtypes = (c_uint,)
_setfsuid.restype = c_uint
_setfsgid = LIBC["setfsgid"]
_setfsgid.argtypes = (c_uint,)
_setfsgid.restype = c_uint
_prctl = LIBC["prctl"]
_prctl.argtypes = (c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_prctl.restype = c_int


class ActingAs:
    """`with ActingAs(uid, gid):`; OSError EPERM where this process may not."""

    __slots__ = ("_bits", "_gid", "_uid", "_wanted")

    def __init__(self, uid: int, gid: int) -> None:
        self._wanted = uid, gid

    def __enter__(self) -> None:
        uid, gid = self._wanted
        self._bits = _prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
        # Where this is refused the host checks permissions once more, which is only stricter.
        _prctl(_PR_SET_SECUREBITS, self._bits | _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
        self._gid = _setfsgid(gid)
        self._uid = _setfsuid(uid)
        if _setfsuid(_NOBODY) != uid or _setfsgid(_NOBODY) != gid:      # the only way to learn that it failed
            self.__exit__(None, None, None)
            raise OSError(errno.EPERM, f"acting as user {uid}, group {gid}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        _setfsuid(self._uid)
        _setfsgid(self._gid)
        _prctl(_PR_SET_SECUREBITS, self._bits, 0, 0, 0)
