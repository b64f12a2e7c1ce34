"""Flat real-mode images: loaded and entered where a BIOS loads a boot sector."""

from __future__ import annotations

__all__ = ["check_size", "load_flat"]

from hv.boot.entry import REAL16, EntryState
from hv.boot.image import FLAT_MAX
from hv.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.memory.guest import GuestMemory

LOAD_ADDRESS = 0x7C00           # IBM PC BIOS, INT 19h
STACK = 0x7C00                  # grows down from the image


def check_size(image: bytes | mmap, name: str) -> None:
    """ImageError where the image does not fit into conventional memory."""
    if len(image) > FLAT_MAX:
        raise ImageError(f"{name}: {len(image)} bytes are too large for a real-mode image",
                         f"at most {FLAT_MAX} bytes fit below the EBDA")


def load_flat(memory: GuestMemory, image: bytes | mmap, name: str, reserved: list[tuple[int, int]]) -> EntryState:
    """Copy the image to 0x7C00 and start there with CS 0. DL (drive number) is 0: there is none."""
    end = LOAD_ADDRESS + len(image)
    for gpa, size in reserved:
        if gpa + size > LOAD_ADDRESS and gpa < end:
            raise ImageError(f"{name}: {len(image)} bytes at {LOAD_ADDRESS:#x} overlap reserved memory at {gpa:#x}",
                             f"at most {max(0, gpa - LOAD_ADDRESS)} bytes fit below it")
    memory.write(LOAD_ADDRESS, image)
    return EntryState(REAL16, LOAD_ADDRESS, rsp=STACK)
