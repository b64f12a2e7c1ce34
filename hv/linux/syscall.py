"""syscall(2) without the ctypes package, whose import costs 3 ms: a third of what starting a container may take.

`_ctypes` is the C half of ctypes. Arguments are numbers, bytes, buffers of `buffer()` or None, all passed as machine
words. The GIL is released meanwhile, as in ctypes. x86-64 only, as all of pyhv.

Driven by tests/unit/test_linux_calls.py.
"""

from __future__ import annotations

__all__ = ["buffer", "call_at", "syscall", "try_syscall"]

from _ctypes import CFuncPtr, _SimpleCData, dlopen, dlsym, get_errno

from hv.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any


class _Word(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "P"            # a pointer: takes numbers, bytes, buffers and None


class _Long(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Char(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(CFuncPtr):
    _flags_ = 0x1 | 0x8     # FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO (Modules/_ctypes/ctypes.h)
    _restype_ = _Long


class _Code(CFuncPtr):
    _flags_ = 0x1
    _restype_ = _Long


_syscall: Any = _Function(dlsym(dlopen(None, 0), "syscall"))  # type: ignore[arg-type]
_syscall.argtypes = (_Word,) * 7


def buffer(size: int, start: bytes = b"") -> Any:
    """Memory that the kernel may write to; `.raw` reads it."""
    array: Any = (_Char * size)()
    if start:
        array.raw = start.ljust(size, b"\0")
    return array


def syscall(name: str, number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0, *,
            hint: str = "", may: Container[int] = ()) -> int:
    """The call's result; KernelError, which says `name`, where it fails. `may`: errors that are results, negative."""
    result: int = _syscall(number, a, b, c, d, e, f)
    if result < 0:
        error = get_errno()
        if error in may:
            return -error
        raise KernelError(name, error, hint)
    return result


def try_syscall(number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0) -> int:
    """The call's result, or minus its errno."""
    result: int = _syscall(number, a, b, c, d, e, f)
    return result if result >= 0 else -get_errno()


def call_at(address: int, argument: int) -> int:
    """Call machine code with one word; the word that it gives. The GIL is released meanwhile."""
    code: Any = _Code(address)
    code.argtypes = (_Word,)
    return int(code(argument))
