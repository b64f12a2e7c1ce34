"""Interfaces, addresses and routes of a network namespace (man 7 rtnetlink; include/uapi/linux/if_link.h, rtnetlink.h).

Functions that end in nothing make messages, for `Netlink.send`: several go in one call. Those that ask take the socket.
IPv4; interfaces are told by index. Left out on purpose: IPv6, multipath routes, anything wireless.

Driven by tests/root/test_network_netlink.py, against iproute2.
"""

from __future__ import annotations

__all__ = ["NOARP", "UP", "Link", "add_address", "add_default", "addresses", "bridge", "default_mtus", "delete",
           "delete_all", "gateways", "hairpin", "index_of", "link", "links", "quieten", "routes", "set_flags", "veth"]

import errno
from struct import Struct

from hv.linux.netlink import CREATE, EXCL, Message, attribute, attributes, nested, text, word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from hv.linux.netlink import Netlink

# include/uapi/linux/rtnetlink.h
_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE = 20, 22, 24, 26
_MAIN, _BOOT, _UNIVERSE, _UNICAST = 254, 3, 0, 1        # RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_INET = 2
# include/uapi/linux/if_link.h, IFLA_...
_ADDRESS, _IFNAME, _MTU, _MASTER, _LINKINFO, _IFALIAS, _AF_SPEC, _GROUP, _NS_FD = 1, 3, 4, 10, 18, 20, 26, 27, 28
_DOOMED = 0x70796876                                    # a group of those that are about to be deleted: "pyhv"
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA, _VETH_PEER, _BRPORT_MODE = 1, 2, 4, 5, 1, 4
_INET6, _INET6_ADDR_GEN_MODE, _GEN_NONE = 10, 8, b"\1"  # AF_INET6, IFLA_INET6_..., IN6_ADDR_GEN_MODE_NONE
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4      # include/uapi/linux/if_addr.h
UP, NOARP = 1, 0x80                                     # include/uapi/linux/if.h, IFF_...
_IFINFO, _IFADDR, _RTMSG = Struct("=BxHiII"), Struct("=BBBBI"), Struct("=BBBBBBBBI")    # struct ifinfomsg, ...
_UINT = Struct("=I")
# no link-local address, and so nothing said by IPv6
_QUIET = nested(_AF_SPEC, nested(_INET6, attribute(_INET6_ADDR_GEN_MODE, _GEN_NONE)))


class Link:
    """An interface as it is."""

    __slots__ = ("alias", "flags", "index", "kind", "mac", "master", "mtu", "name")

    def __init__(self, body: bytes) -> None:
        _, _, self.index, self.flags, _ = _IFINFO.unpack_from(body)
        found = attributes(body, _IFINFO.size)
        self.name, self.alias = _text(found.get(_IFNAME, b"")), _text(found.get(_IFALIAS, b""))
        self.mac = found.get(_ADDRESS, b"").hex(":")
        self.mtu, self.master = _number(found.get(_MTU, b"")), _number(found.get(_MASTER, b""))
        self.kind = _text(attributes(found.get(_LINKINFO, b"")).get(_INFO_KIND, b""))


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _number(data: bytes) -> int:
    return int(_UINT.unpack(data)[0]) if len(data) == 4 else 0


def _info(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return _IFINFO.pack(0, 0, index, flags, change)


def bridge(name: str, mac: bytes, mtu: int = 0) -> Message:
    """A new bridge, down."""
    return Message(_NEWLINK, CREATE | EXCL, _info() + text(_IFNAME, name) + attribute(_ADDRESS, mac)
                   + (word(_MTU, mtu) if mtu else b"") + nested(_LINKINFO, text(_INFO_KIND, "bridge")))


def veth(name: str, master: int, mtu: int, peer: str, peer_mac: bytes, netns: int) -> Message:
    """A new pair, down: `name` here, a port of the bridge `master`; `peer` in the namespace of descriptor `netns`."""
    other = _info() + text(_IFNAME, peer) + attribute(_ADDRESS, peer_mac) + word(_MTU, mtu) + word(_NS_FD, netns)
    return Message(_NEWLINK, CREATE | EXCL, _info() + text(_IFNAME, name) + word(_MTU, mtu)
                   + (word(_MASTER, master) if master else b"")
                   + nested(_LINKINFO, text(_INFO_KIND, "veth"), nested(_INFO_DATA, attribute(_VETH_PEER, other))))


def quieten(index: int = 0, name: str = "", alias: str = "") -> Message:
    """Before it is brought up: no IPv6 on it. Not for one that is made by the same message. `alias`: a note for people
    and for us, told by `ip link`."""
    return Message(_SETLINK, 0, _info(index) + (text(_IFNAME, name) if name else b"")
                   + (text(_IFALIAS, alias) if alias else b"") + _QUIET)


def hairpin(name: str) -> Message:
    """This bridge port may get back what it sent: for who asks for its own published port under br_netfilter."""
    return Message(_NEWLINK, 0, _info() + text(_IFNAME, name)
                   + nested(_LINKINFO, text(_INFO_SLAVE_KIND, "bridge"),
                            nested(_INFO_SLAVE_DATA, attribute(_BRPORT_MODE, b"\1"))))


def set_flags(flags: int, index: int = 0, name: str = "", clear: int = 0) -> Message:
    """Set flags (UP, ...), and clear others."""
    return Message(_SETLINK, 0, _info(index, flags, flags | clear) + (text(_IFNAME, name) if name else b""))


def delete(index: int = 0, name: str = "") -> Message:
    """Delete it; no error where it is gone. Takes the kernel 20 to 40 ms."""
    return Message(_DELLINK, 0, _info(index) + (text(_IFNAME, name) if name else b""), may=(errno.ENODEV,))


def delete_all(names: Sequence[str]) -> list[Message]:
    """Delete several, as a group: they take no longer than one. Those that are gone are fine."""
    if len(names) < 2:
        return [delete(name=name) for name in names]
    return [*(Message(_SETLINK, 0, _info() + text(_IFNAME, name) + word(_GROUP, _DOOMED), may=(errno.ENODEV,))
              for name in names), Message(_DELLINK, 0, _info() + word(_GROUP, _DOOMED), may=(errno.ENODEV,))]


def add_address(index: int, address: int, prefix: int) -> Message:
    """Give it an IPv4 address; fine if it has it."""
    local = address.to_bytes(4, "big")
    last = (address | (1 << 32 - prefix) - 1).to_bytes(4, "big")
    return Message(_NEWADDR, CREATE | EXCL, _IFADDR.pack(_INET, prefix, 0, 0, index) + attribute(_IFA_LOCAL, local)
                   + attribute(_IFA_ADDRESS, local) + attribute(_IFA_BROADCAST, last), may=(errno.EEXIST,))


def add_default(gateway: int, index: int) -> Message:
    """The route to everywhere; fine if there is one."""
    return Message(_NEWROUTE, CREATE | EXCL, _RTMSG.pack(_INET, 0, 0, 0, _MAIN, _BOOT, _UNIVERSE, _UNICAST, 0)
                   + attribute(_RTA_GATEWAY, gateway.to_bytes(4, "big")) + word(_RTA_OIF, index), may=(errno.EEXIST,))


def links(socket: Netlink) -> list[Link]:
    """All interfaces."""
    return [Link(body) for kind, body in socket.dump(_GETLINK, _info(), "list of interfaces") if kind == _NEWLINK]


def link(socket: Netlink, name: str) -> Link | None:
    """The interface of that name."""
    body = socket.get(_GETLINK, _info() + text(_IFNAME, name), f"interface {name}", may=(errno.ENODEV,))
    return Link(body) if body is not None else None


def index_of(socket: Netlink, name: str) -> int:
    """Its index, 0 where there is none."""
    found = link(socket, name)
    return found.index if found else 0


def addresses(socket: Netlink, index: int = 0) -> list[tuple[int, int, int]]:
    """(index, address, prefix) of all IPv4 addresses, or those of one interface."""
    found = []
    for kind, body in socket.dump(_GETADDR, _IFADDR.pack(_INET, 0, 0, 0, index), "list of addresses", strict=True):
        _, prefix, _, _, owner = _IFADDR.unpack_from(body)
        inside = attributes(body, _IFADDR.size)
        local = inside.get(_IFA_LOCAL, inside.get(_IFA_ADDRESS, b""))
        if kind == _NEWADDR and len(local) == 4 and index in (0, owner):
            found.append((owner, int.from_bytes(local, "big"), prefix))
    return found


def _routes(socket: Netlink) -> list[tuple[int, int, int, int, int]]:
    """(destination, prefix, gateway, interface, type), of all tables."""
    found = []
    asked = _RTMSG.pack(_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    for kind, body in socket.dump(_GETROUTE, asked, "list of routes"):
        _, prefix, _, _, _, _, _, sort, _ = _RTMSG.unpack_from(body)
        inside = attributes(body, _RTMSG.size)
        if kind == _NEWROUTE:
            found.append((int.from_bytes(inside.get(_RTA_DST, b""), "big"), prefix,
                          int.from_bytes(inside.get(_RTA_GATEWAY, b""), "big"), _number(inside.get(_RTA_OIF, b"")),
                          sort))
    return found


def routes(socket: Netlink) -> list[tuple[int, int]]:
    """(destination, prefix) of all routes but the default ones."""
    return [(destination, prefix) for destination, prefix, _, _, _ in _routes(socket) if prefix]


def gateways(socket: Netlink, index: int) -> list[int]:
    """The gateways of default routes over one interface."""
    return [gateway for _, prefix, gateway, owner, sort in _routes(socket)
            if not prefix and owner == index and gateway and sort == _UNICAST]


def default_mtus(socket: Netlink) -> list[int]:
    """The MTU of each interface with a default route."""
    owners = {owner for _, prefix, _, owner, sort in _routes(socket) if not prefix and sort == _UNICAST and owner}
    return [found.mtu for found in links(socket) if found.index in owners] if owners else []
