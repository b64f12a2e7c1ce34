"""The exceptions of pyhv, drawn once.

    HvError                something went wrong that a person can read in one line
    |-- KernelError        the host kernel refused a call (carries call, errno)
    |-- ConfigError        the user asked for something impossible (exit code 2)
    |-- ImageError         a kernel, initrd or module file, or a container image, is bad
    |   `-- ImageMissing   no image of that name is in the store
    |   `-- RegistryError    a registry refused, lied or went away (carries status, 0 where no answer came)
    |-- NetworkError       a network, an address or a port can't be had
    |-- SnapshotError      a snapshot is damaged, hostile, or does not fit this host (carries field)
    |-- GuestError         the guest named memory it does not have (carries gpa, length)
    `-- StateError         a call came at the wrong time (closed handle, stopped machine)

Each carries a `hint`: what to do next, one sentence, or "".
"""

from __future__ import annotations

__all__ = ["ConfigError", "GuestError", "HvError", "ImageError", "KernelError", "NetworkError", "SnapshotError",
           "StateError"]

import errno as _errno
import os


class HvError(Exception):
    """Base of every error pyhv raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class KernelError(HvError):
    """A system call or ioctl failed on the host; `call` names it, `errno` says why."""

    def __init__(self, call: str, errno: int, hint: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{call}: {name} ({os.strerror(errno)})", hint)
        self.call = call
        self.errno = errno


class ConfigError(HvError):
    """The configuration can't be met; nothing was started."""

    exit_code = 2


class ImageError(HvError):
    """A file that a guest was to boot from, or a container image, is damaged, foreign or too large."""


class ImageMissing(ImageError):
    """The store has no image of that name; it can be pulled or loaded."""


class NetworkError(HvError):
    """A network, an address, a name or a port can't be had."""


class RegistryError(ImageError):
    """A registry refused, lied or went away; `status` is its HTTP status, 0 where no answer came."""

    def __init__(self, message: str, status: int = 0, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = status


class SnapshotError(HvError):
    """A snapshot can't be used; `field` names what in it is wrong, "memory" its memory file."""

    def __init__(self, field: str, message: str, hint: str = "") -> None:
        super().__init__(f"snapshot: {field}: {message}", hint)
        self.field = field


class GuestError(HvError):
    """The guest (or a loader on its behalf) named guest-physical memory that is not RAM."""

    def __init__(self, message: str, gpa: int = 0, length: int = 0, hint: str = "") -> None:
        super().__init__(f"{message} (gpa={gpa:#x} length={length})", hint)
        self.gpa = gpa
        self.length = length


class StateError(HvError):
    """The object is not in a state that allows this call."""
