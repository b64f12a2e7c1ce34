"""The interfaces of an instance: veth pairs, one end in its namespace, the other a port of the bridge.

Driven by tests/root/test_network.py.
"""

from __future__ import annotations

__all__ = ["build", "cut", "link_name", "move_default", "open_netns"]

import errno
import os

from hv.errors import ConfigError, KernelError, NetworkError
from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink, Refused
from hv.linux.netns import inside
from hv.network.addresses import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from hv.network.shape import Interface

_OWN = "/proc/thread-self/ns/net"
_HINT = "it must be a network namespace that a process holds, for example /proc/PID/ns/net"


def link_name(address: int) -> str:
    """The host's end of a pair: no two instances of a host have one address."""
    return f"pv{address:08x}"


def open_netns(path: str) -> int:
    """A descriptor of the namespace at `path`."""
    if not path:
        raise ConfigError("no network namespace given", _HINT)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NetworkError(f"network namespace {path}: {error.strerror}", _HINT) from None
    if os.path.samestat(os.fstat(fd), os.stat(_OWN)):
        os.close(fd)
        raise NetworkError(f"network namespace {path} is the host's own", "--network host is for that")
    return fd


def build(socket: Netlink, netns: int, path: str, made: Sequence[tuple[Interface, int]], note: str,
          published: bool) -> None:
    """A pair for each (interface, index of its bridge), ready for traffic. `note` stands in the outer ends' alias."""
    for interface, bridge in made:
        _pair(socket, netns, interface, bridge, f"{note} {interface.network}", published)
    try:
        with inside(netns):
            within = Netlink(ROUTE)
    except KernelError as error:
        raise NetworkError(f"network namespace {path}: {error}", _HINT) from None
    with within:
        for interface, _ in made:
            index = links.index_of(within, interface.name)
            messages = [links.quieten(index), links.set_flags(links.UP, index),
                        links.add_address(index, number(interface.address), interface.prefix)]
            if interface.gateway:
                messages.append(links.add_default(number(interface.gateway), index))
            within.send(messages, f"{interface.name} in {path}")


def _pair(socket: Netlink, netns: int, interface: Interface, bridge: int, alias: str, published: bool) -> None:
    name = interface.link
    messages = [links.veth(name, bridge, interface.mtu, interface.name, bytes.fromhex(interface.mac.replace(":", "")),
                           netns),
                links.quieten(name=name, alias=alias), links.set_flags(links.UP, name=name)]
    if published:
        messages.append(links.hairpin(name))
    what = f"network {interface.network}: veth pair {name}, {interface.name}"
    try:
        socket.send(messages[:1], what)
    except Refused as error:
        if error.errno == errno.EXFULL:
            raise NetworkError(f"network {interface.network} is full: a bridge has at most 1023 members",
                               "`pyhv network create` makes another one") from None        # net/bridge, BR_MAX_PORTS
        left = links.link(socket, name)
        if error.errno != errno.EEXIST or left is None or not left.alias.startswith("pyhv "):
            raise NetworkError(str(error), f"is there an interface {interface.name} already?") from None
        socket.send((links.delete(left.index), messages[0]), what)      # of an instance that has ended
    socket.send(messages[1:], what)


def cut(socket: Netlink, names: Sequence[str]) -> None:
    """Remove pairs by their outer ends."""
    if names:
        socket.send(links.delete_all(names), "removing interfaces")


def move_default(netns: int, interface: Interface) -> None:
    """The default route goes over `interface` now, if there is none."""
    with inside(netns):
        within = Netlink(ROUTE)
    with within:
        index = links.index_of(within, interface.name)
        if index:
            within.send((links.add_default(number(interface.gateway), index),), "default route")
