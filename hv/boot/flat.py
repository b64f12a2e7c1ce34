"""Flat real-mode images: loaded and entered where a BIOS loads a boot sector."""

from __future__ import annotations

__all__ = ["load_flat"]

from hv.boot.entry import REAL16, EntryState
from hv.boot.image import FLAT_MAX
from hv.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from hv.memory.guest import GuestMemory

LOAD_ADDRESS = 0x7C00           # IBM PC BIOS, INT 19h
STACK = 0x7C00                  # grows down from the image


def load_flat(memory: GuestMemory, image: bytes | mmap, name: str) -> EntryState:
    """Copy the image to 0x7C00 and start there with CS 0. DL (drive number) is 0: there is none."""
    if len(image) > FLAT_MAX:
        raise ImageError(f"{name}: {len(image)} bytes are too large for a real-mode image",
                         f"at most {FLAT_MAX} bytes fit below the EBDA")
    memory.write(LOAD_ADDRESS, image)
    return EntryState(REAL16, LOAD_ADDRESS, rsp=STACK)
