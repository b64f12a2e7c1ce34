"""What an instance has of networks: written down, made, and taken back. With the store's lock held.

What is taken for an instance is written down first (leases, then the record), made then, and taken back in the other
order: whenever a process is killed, undo() finds all of it.

Driven by tests/root/test_network*.py.
"""

from __future__ import annotations

__all__ = ["Members"]

import os

from hv.errors import ConfigError, NetworkError, StateError
from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink
from hv.network import dns_start, joints, pasta
from hv.network.addresses import number, text
from hv.network.leases import Leases
from hv.network.modes import INTERFACES_MOST
from hv.network.publish import give_back_ports, reserve_ports
from hv.network.shape import Attachment, Interface, Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from hv.network.bridges import Bridges
    from hv.network.definition import Network
    from hv.network.store import Record, Store


class Members:
    """Those of one Store."""

    def __init__(self, store: Store, bridges: Bridges) -> None:
        self._store, self._bridges = store, bridges

    def join(self, record: Record, networks: Sequence[Network], ip: str, mac: str, ports: Sequence[Port]) -> None:
        """All of a new record's, or nothing."""
        netns = joints.open_netns(record["netns"])
        try:
            with Netlink(ROUTE) as socket:
                try:
                    for network in networks:
                        self._take(record, network, ip if network is networks[0] else "", mac
                                   if network is networks[0] else "", record["aliases"])
                    self._store.save(record)
                    record["ports"] = [port.plain() for port in reserve_ports(self._store, ports, record["id"])]
                    if ports:
                        self._store.save(record)
                    self._build(socket, netns, record, networks)
                    self._bridges.publish(record)
                except BaseException:
                    self.undo(socket, record, False)
                    raise
        finally:
            os.close(netns)

    def join_pasta(self, record: Record, mac: str, ports: Sequence[Port]) -> None:
        """The same without root: one card, by pasta."""
        if record["vm"] and any(port.address.startswith("127.") for port in ports):
            # pasta leads what comes from there to the namespace's own loopback interface, where no guest listens
            raise ConfigError("-p 127.0.0.1 and --vm: without root a VM can't be reached from there",
                              "publish on another address of this host")
        card = pasta.interface(_mac(mac) if mac else "")
        record["endpoints"] = [card.plain()]
        self._store.save(record)
        try:
            record["ports"] = [port.plain() for port in reserve_ports(self._store, ports, record["id"])]
            self._store.save(record)
            pasta.start(self._pasta, record["id"], record["netns"], card.mac, ports=[
                Port(**port) for port in record["ports"]])
        except BaseException:
            self._undo_pasta(record)
            raise

    @property
    def _pasta(self) -> str:
        return self._store.run + "/pasta"

    def _undo_pasta(self, record: Record) -> None:
        pasta.stop(self._pasta, record["id"])
        give_back_ports(self._store, [Port(**port) for port in record["ports"]])
        self._store.drop(record["id"])

    def _take(self, record: Record, network: Network, ip: str, mac: str, aliases: Sequence[str]) -> dict[str, Any]:
        """An address, and all else of an interface, in the record."""
        used = {endpoint["name"] for endpoint in record["endpoints"]}
        if any(endpoint["network"] == network.name for endpoint in record["endpoints"]):
            raise NetworkError(f"{record['name']} is in network {network.name} already")
        name = next(f"eth{count}" for count in range(INTERFACES_MOST + 1) if f"eth{count}" not in used)
        address = self.leases(network.name).take(network, record["id"], ip)
        way = not network.internal and not any(endpoint["gateway"] for endpoint in record["endpoints"])
        try:
            endpoint = Interface(network.name, name, _mac(mac) if mac else network.mac(address).hex(":"),
                                 text(address), network.subnet.prefix, text(network.gateway) if way else "", 0,
                                 joints.link_name(address), list(aliases), network.internal).plain()
        except BaseException:
            self.leases(network.name).give_back(address)
            raise
        record["endpoints"].append(endpoint)
        return endpoint

    def _build(self, socket: Netlink, netns: int, record: Record, networks: Sequence[Network]) -> None:
        """The interfaces of the last endpoints of the record, which are on `networks`."""
        made = []
        endpoints = record["endpoints"][-len(networks):]
        for endpoint, network in zip(endpoints, networks, strict=True):
            bridge = self._bridges.up(socket, network)
            endpoint["mtu"] = bridge.mtu
            made.append((Interface(**endpoint), bridge.index))
        joints.build(socket, netns, record["netns"], made, f"pyhv {self._bridges.tag} {record['id']}",
                     bool(record["ports"]))
        for endpoint, network in zip(endpoints, networks, strict=True):
            self.leases(network.name).name(number(endpoint["address"]), self._names(record, endpoint))
            dns_start.ensure(self._store, network)
        self._store.save(record)

    def _names(self, record: Record, endpoint: dict[str, Any]) -> list[str]:
        return [name for name in (record["name"], record["id"][:12], *endpoint["aliases"]) if name]

    def attachment(self, record: Record) -> Attachment:
        """What the instance is told."""
        from hv.network.hosts import hosts_text, resolv_text, with_host_lines

        if record["mode"] == "host":
            return Attachment([], [], resolv_text("", record["dns"], record["search"])
                              if record["dns"] or record["search"] else "", with_host_lines(record["hosts"]), "")
        endpoints = [Interface(**endpoint) for endpoint in record["endpoints"]]
        served = way = ""
        for endpoint in endpoints:
            if record["mode"] == "pasta":
                served, way = "" if record["dns"] else pasta.RESOLVER, endpoint.gateway
                continue
            network = self._store.network(endpoint.network)
            served = served or (text(network.gateway) if network.dns else "")
            way = way or text(network.gateway)
        hosts = hosts_text(record["hostname"] or record["id"][:12],
                           [(endpoint.address, [record["name"]]) for endpoint in endpoints], record["hosts"], way)
        return Attachment(endpoints, [Port(**port) for port in record["ports"]],
                          resolv_text(served, record["dns"], record["search"])
                          if endpoints or record["dns"] or record["search"] else "", hosts, record["netns"])

    def undo(self, socket: Netlink, record: Record, netns_ends: bool) -> None:
        """Take back all that is in a record, and the record."""
        if record["mode"] == "pasta":
            self._undo_pasta(record)
            return
        if record["ports"]:
            self._bridges.unpublish(record)
            give_back_ports(self._store, [Port(**port) for port in record["ports"]])
        if not netns_ends:
            joints.cut(socket, [endpoint["link"] for endpoint in record["endpoints"]])
        for endpoint in record["endpoints"]:
            self._give_back(endpoint)
        self._store.drop(record["id"])

    def _give_back(self, endpoint: dict[str, Any]) -> None:
        self.leases(endpoint["network"]).give_back(number(endpoint["address"]))

    def of_other(self, other: str) -> Attachment:
        """For container:ID; without interfaces and names where the other one has none of ours."""
        found = self._store.record(other)
        if found is None:
            return Attachment([], [], "", "", "")
        if found["vm"]:
            raise ConfigError(f"--network container:{other}: that is a VM, whose network is in its own kernel",
                              "join both to one network instead")
        return self.attachment(found)

    def running(self, instance: str, what: str) -> Record:
        """The record of a container that can be `what`."""
        record = self._store.record(instance)
        if record is None:
            raise NetworkError(f"instance {instance[:12]} has no network: it does not run, or has the host's",
                               "start it first")
        if record["vm"]:
            raise StateError(f"{record['name']} is a VM: it can't be {what} while it runs",
                             "stop it, and start one with --network given several times")
        if record["mode"] != "bridge":
            raise NetworkError(f"{record['name']} was started with --network {record['mode']}",
                               "only what has a network with a bridge can have another one")
        return record

    def join_another(self, record: Record, network: Network, ip: str, aliases: Sequence[str]) -> Interface:
        """One more interface for one that runs."""
        netns = joints.open_netns(record["netns"])
        try:
            with Netlink(ROUTE) as socket:
                endpoint = self._take(record, network, ip, "", aliases)
                try:
                    self._store.save(record)
                    self._build(socket, netns, record, [network])
                except BaseException:
                    joints.cut(socket, [endpoint["link"]])
                    record["endpoints"].remove(endpoint)
                    self._store.save(record)
                    self._give_back(endpoint)
                    raise
        finally:
            os.close(netns)
        return Interface(**endpoint)

    def part(self, record: Record, endpoint: dict[str, Any]) -> None:
        """One interface less; ports and the default route go to another one."""
        self._bridges.unpublish(record)
        with Netlink(ROUTE) as socket:
            joints.cut(socket, [endpoint["link"]])
        record["endpoints"].remove(endpoint)
        self._give_back(endpoint)
        heir = next((other for other in record["endpoints"] if not other["internal"]), None)
        if endpoint["gateway"] and heir is not None:
            heir["gateway"] = text(self._store.network(heir["network"]).gateway)
        self._store.save(record)
        self._bridges.publish(record)
        if endpoint["gateway"] and heir is not None:
            fd = joints.open_netns(record["netns"])
            try:
                joints.move_default(fd, Interface(**heir))
            finally:
                os.close(fd)

    def rename(self, record: Record) -> None:
        """The record has another name now."""
        for endpoint in record["endpoints"]:
            self.leases(endpoint["network"]).name(number(endpoint["address"]), self._names(record, endpoint))
        self._store.save(record)

    def leases(self, network: str) -> Leases:
        """Of one network."""
        return Leases(self._store.on(network))

    def revive(self, network: Network) -> None:
        """A name server for a network with members, if its own was killed."""
        if self.leases(network.name).all():
            with Netlink(ROUTE) as socket:
                is_up = links.index_of(socket, network.bridge)      # not after the host has started anew
            if is_up:
                dns_start.ensure(self._store, network)


def _mac(given: str) -> str:
    parts = given.replace("-", ":").lower().split(":")
    if len(parts) != 6 or not all(len(part) == 2 and all(digit in "0123456789abcdef" for digit in part)
                                  for part in parts) or int(parts[0], 16) & 1 or not any(int(part, 16)
                                                                                         for part in parts):
        raise ConfigError(f"--mac-address {given} is no address of a card", "for example 52:54:00:12:34:56")
    return ":".join(parts)
