"""Bring a network up: its bridge, its part of the rules; and down. With the store's lock held.

A network is up from its first member until a little after the last has left, when its name server ends and takes it
down (hv/network/dns_start.py); without a name server until `pyhv network rm`. The bridge's alias says whose it is:
another program's bridge of that name is never touched, ours gets another name then.

Driven by tests/root/test_network.py.
"""

from __future__ import annotations

__all__ = ["Bridges"]

import os
from zlib import crc32

from hv.errors import NetworkError
from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink
from hv.linux.nftables import table_exists
from hv.network import nft
from hv.network.addresses import number
from hv.network.shape import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.linux.links import Link
    from hv.network.definition import Network
    from hv.network.store import Record, Store

USUAL_RUN = "/run/pyhv/networks"
MTU = 1500                  # or less, where the way to the world takes less
_FORWARD = "/proc/sys/net/ipv4/ip_forward"
_TAKES_ROUTERS = "/proc/sys/net/ipv6/conf/{}/accept_ra"
_LOOPBACK_ROUTED = "/proc/sys/net/ipv4/conf/{}/route_localnet"


class Bridges:
    """Those of one Store. `table` is the name of our nftables table: each place where networks run has its own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tag = f"{crc32(store.run.encode()):08x}"
        self.table = "pyhv" if store.run == USUAL_RUN else f"pyhv-{self.tag}"

    def up(self, socket: Netlink, network: Network) -> Link:
        """The bridge; made, with everything that belongs to it, where it is not there."""
        found = links.link(socket, network.bridge)
        new = found is None or not self._is_ours(found, network)
        if new:
            if found is not None:
                from hv.network.choose import free_bridge

                network.bridge = free_bridge(self.store.networks())
                self.store.keep(network)
            self._make(socket, network)
            found = links.link(socket, network.bridge)
        if found is None:
            raise NetworkError(f"network {network.name}: bridge {network.bridge} has gone at once")
        if not table_exists(self.table):
            self._write_rules(socket)
        elif new:
            self._apply(nft.network_elements(self.table, network))
        return found

    def _is_ours(self, link: Link, network: Network) -> bool:
        return link.kind == "bridge" and link.alias == f"pyhv {network.id}"

    def _make(self, socket: Netlink, network: Network) -> None:
        name = network.bridge
        new = links.bridge(name, network.mac(network.gateway), min([MTU, *links.default_mtus(socket)]))
        socket.send((new, links.quieten(name=name, alias=f"pyhv {network.id}")),
                    f"network {network.name}: bridge {name}", "bridges need root, and Linux with CONFIG_BRIDGE")
        try:
            index = links.index_of(socket, name)
            if os.path.exists(_TAKES_ROUTERS.format(name)):     # else a member that says it is a router is this host's
                _set(_TAKES_ROUTERS.format(name), network, b"0")
            socket.send((links.add_address(index, network.gateway, network.subnet.prefix),
                         links.set_flags(links.UP, index)), f"network {network.name}: bridge {name}")
            _set(_LOOPBACK_ROUTED.format(name), network)
            if not network.internal:
                _set(_FORWARD, network)
        except BaseException:
            socket.send((links.delete(name=name),), f"bridge {name}")
            raise

    def _write_rules(self, socket: Netlink) -> None:
        """The whole table, for all that is up: it is the first time, or somebody flushed all rules."""
        commands = nft.rules(self.table)
        for network in self.store.networks():
            found = links.link(socket, network.bridge)
            if found is not None and self._is_ours(found, network):
                commands += nft.network_elements(self.table, network)
        for record in self.store.records():
            commands += self._ports(record, "add")
        self._apply(commands)

    def _apply(self, commands: list[str]) -> None:
        if complaint := nft.apply(commands):
            raise NetworkError(f"nftables: {complaint}", "it takes Linux with nf_tables, NAT and fib (docs/network.md)")

    # published ports ---------------------------------------------------------------------------------

    def publish(self, record: Record) -> None:
        """Lead the ports of an instance to it."""
        if commands := self._ports(record, "add"):
            self._apply(commands)

    def unpublish(self, record: Record) -> None:
        """No longer. What has gone already is fine."""
        commands = self._ports(record, "delete")
        if commands and nft.apply(commands):
            for command in commands:
                nft.apply([command])

    def _ports(self, record: Record, verb: str) -> list[str]:
        target = port_target(record)
        if not target:
            return []
        return nft.port_elements(self.table, [Port(**port) for port in record["ports"]], target, record["id"], verb)

    # the end -----------------------------------------------------------------------------------------

    def down(self, network: Network) -> None:
        """No bridge, no rules; no table where this was the last one. Fine where it is not up."""
        with Netlink(ROUTE) as socket:
            found = links.link(socket, network.bridge)
            if found is not None and self._is_ours(found, network):
                socket.send((links.delete(found.index),), f"bridge {network.bridge}")
            others = [other for other in self.store.networks() if other.name != network.name
                      and (link := links.link(socket, other.bridge)) is not None and self._is_ours(link, other)]
        if table_exists(self.table):
            if others:
                nft.apply(nft.network_elements(self.table, network, "delete"))
            else:
                nft.apply(nft.remove(self.table))

    def renew(self, socket: Netlink) -> None:
        """The table as the records say, where there is one."""
        if table_exists(self.table):
            self._write_rules(socket)


def port_target(record: Record) -> int:
    """The address that published ports lead to: that on the first network that is not internal, or 0."""
    return next((number(endpoint["address"]) for endpoint in record["endpoints"] if not endpoint["internal"]), 0)


def _set(path: str, network: Network, value: bytes = b"1") -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.read(fd, 8).strip() != value:
                os.pwrite(fd, value, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise NetworkError(f"network {network.name}: {path}: {error.strerror}",
                           f"/proc/sys must be writable, or this set to {value.decode()} before") from None
