"""What stands behind a network device: something that takes frames and gives frames.

A frame here always has the 12 bytes of struct virtio_net_hdr in front, and comes as a list of views of guest RAM, so
that a backend which is a descriptor of the kernel's moves it without a copy in Python. Driven by
tests/unit/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["Backend", "Unplugged", "scatter"]

from hv.devices.virtio import net_ids as net

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import Io


class Backend:
    """The other end of the cable. All methods but close() are called with the device's lock held."""

    features = 0            # offloads that may be offered to the driver (net_ids)
    identity = ""           # what the MAC address is derived from: no other running device has the same
    fd = -1                 # readable when receive() has something, writable when send() may go on; -1: none now
    carrier = True          # whether the cable ends anywhere

    def attach(self, io: Io, mac: bytes, change: Callable[[Callable[[], None]], None]) -> None:
        """Before the guest starts. What happens outside of these methods and changes `fd` or `carrier` is done by
        `change(function)`, which takes the lock, calls `function()`, and has the device look again."""

    def negotiated(self, features: int) -> None:
        """What the driver took; 0 after a reset."""

    def send(self, parts: list[memoryview]) -> bool:
        """Send one frame. False: not now, again when `fd` is writable. OSError: it is lost."""
        raise NotImplementedError

    def receive(self, views: list[memoryview]) -> int:
        """The next frame into `views`, which have room for the longest: its length. BlockingIOError: none now."""
        raise NotImplementedError

    def link(self, up: bool) -> None:
        """The device's side of the cable was plugged or pulled."""

    def close(self) -> None:
        """Give everything back."""


class Unplugged(Backend):
    """A cable that ends nowhere: the link is down. Every offload is offered, so that it can stand in for any other."""

    features = (net.F_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN | net.F_HOST_UFO | net.F_GUEST_CSUM
                | net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_ECN | net.F_GUEST_UFO)
    identity = "none"
    carrier = False

    def send(self, parts: list[memoryview]) -> bool:
        """It is lost."""
        return True

    def receive(self, views: list[memoryview]) -> int:
        """Nothing ever comes."""
        raise BlockingIOError


def scatter(data: bytes | bytearray | memoryview, views: list[memoryview]) -> None:
    """Copy `data` over `views`, which have room for it."""
    size = len(data)
    if views and size <= len(views[0]):
        views[0][:size] = data
        return
    source, done = memoryview(data), 0
    for view in views:
        part = source[done:done + len(view)]
        view[:len(part)] = part
        done += len(part)
        if done >= size:
            return
