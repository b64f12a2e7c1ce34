"""struct kvm_msrs (asm/kvm.h), as bytes: a ctypes structure would be another class for each length."""

from __future__ import annotations

__all__ = ["msr_values", "msrs"]

from ctypes import c_char
from struct import pack, unpack_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array

_HEADER, _ENTRY = 8, 16         # nmsrs and padding; index, reserved, data


def msrs(pairs: list[tuple[int, int]]) -> Array[c_char]:
    """A struct kvm_msrs of (index, value)."""
    flat = [number for pair in pairs for number in pair]
    return (c_char * (_HEADER + _ENTRY * len(pairs))).from_buffer_copy(pack(f"<{1 + len(flat)}Q", len(pairs), *flat))


def msr_values(table: Array[c_char], count: int) -> list[tuple[int, int]]:
    """The first `count` (index, value) of a struct kvm_msrs."""
    flat = unpack_from(f"<{2 * count}Q", table, _HEADER)
    return list(zip(flat[::2], flat[1::2], strict=True))
