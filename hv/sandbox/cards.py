"""The network interfaces that a bundle's network namespace holds, each of which becomes a card of the guest.

The engine has made them, with addresses and routes, as for a container; the card's backend takes these over
(hv/devices/virtio/net_packet.py). Driven by tests/kvm/test_sandbox_network.py.
"""

from __future__ import annotations

__all__ = ["cards_of"]

import os

from hv.errors import ConfigError
from hv.linux.links import links
from hv.linux.netlink import ROUTE, Netlink
from hv.linux.netns import inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CARDS_MOST = 8
_MAC_SIZE = 17                  # of an Ethernet address as text; tunnels have another, or none
_LOOPBACK = 8                   # include/uapi/linux/if.h, IFF_LOOPBACK


def cards_of(path: str) -> list[dict[str, Any]]:
    """Arguments of NetConfig for each Ethernet interface in the namespace at `path`. ConfigError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"linux.namespaces: network {path}: {os.strerror(error.errno or 0)}") from None
    try:
        if _is_ours(fd):
            return []           # the host's own: its cards are not given away
        with inside(fd):
            socket = Netlink(ROUTE)
        try:
            found = sorted(links(socket), key=lambda link: link.index)
        finally:
            socket.close()
    finally:
        os.close(fd)
    cards = [link for link in found if not link.flags & _LOOPBACK and len(link.mac) == _MAC_SIZE]
    if len(cards) > CARDS_MOST:
        raise ConfigError(f"linux.namespaces: network {path}: {len(cards)} interfaces", f"at most {CARDS_MOST}")
    return [{"packet": link.name, "netns": path} for link in cards]


def _is_ours(fd: int) -> bool:
    theirs, ours = os.stat(fd), os.stat("/proc/thread-self/ns/net")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
