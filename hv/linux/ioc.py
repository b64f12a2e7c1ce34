"""How Linux encodes ioctl requests (include/uapi/asm-generic/ioctl.h): direction, size, type, number."""

from __future__ import annotations

__all__ = ["io", "ior", "iow", "iowr"]

_SIZE_SHIFT = 16
_TYPE_SHIFT = 8
_WRITE = 1 << 30
_READ = 2 << 30


def io(kind: int, number: int) -> int:
    """_IO: no argument, or an integer."""
    return kind << _TYPE_SHIFT | number


def iow(kind: int, number: int, size: int) -> int:
    """_IOW: user space writes `size` bytes to the kernel."""
    return _WRITE | size << _SIZE_SHIFT | kind << _TYPE_SHIFT | number


def ior(kind: int, number: int, size: int) -> int:
    """_IOR: user space reads `size` bytes from the kernel."""
    return _READ | size << _SIZE_SHIFT | kind << _TYPE_SHIFT | number


def iowr(kind: int, number: int, size: int) -> int:
    """_IOWR: both ways."""
    return _READ | _WRITE | size << _SIZE_SHIFT | kind << _TYPE_SHIFT | number
