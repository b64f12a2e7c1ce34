"""Networks: make, list, remove; join instances to them and part them again. The face of this room.

    networks = Networks()
    with new_netns() as netns:                      # hv/linux/netns.py: a namespace held by a descriptor, no mount
        attached = networks.attach(["pyhv"], id, name="web", netns=netns.path, ports=parse_publish(["8080:80"]))
        ...
    networks.detach(id)                             # idempotent; after a crash too

The files are hv/network/store.py, what is done for an instance hv/network/members.py, for a network bridges.py.

Driven by tests/unit/test_network*.py and tests/root/test_network*.py.
"""

from __future__ import annotations

__all__ = ["DEFAULT", "Networks"]

import os
from time import time

from hv.errors import ConfigError, NetworkError
from hv.linux.netlink import ROUTE, Netlink
from hv.network import dns_start
from hv.network.addresses import Subnet, text
from hv.network.bridges import Bridges
from hv.network.definition import DEFAULT, check_name, define
from hv.network.members import Members
from hv.network.modes import check_mode
from hv.network.publish import check_ports
from hv.network.shape import Attachment, Interface, Port
from hv.network.store import Store, check_id
from hv.places import data_root, rootless, run_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from hv.network.definition import Network
    from hv.network.store import Record


class Networks:
    """All networks under `root` (default data_root()/networks), with what is running under `run` (run_root()/networks).

    Every method takes the lock that it needs; any number of processes may call at once.
    """

    def __init__(self, root: str = "", run: str = "") -> None:
        self._store = Store(root or data_root() + "/networks", run or run_root() + "/networks")
        self._bridges = Bridges(self._store)
        self._members = Members(self._store, self._bridges)

    # networks ----------------------------------------------------------------------------------------

    def create(self, name: str, *, subnet: str = "", gateway: str = "", ip_range: str = "", internal: bool = False,
               driver: str = "bridge", labels: Mapping[str, str] | None = None, dns: bool = True) -> dict[str, Any]:
        """Make a network; what inspect() gives. It comes up with its first member. ConfigError, NetworkError."""
        if driver != "bridge":
            raise ConfigError(f"--driver {driver}: there is no such kind of network", "bridge is the only one")
        if not subnet and (gateway or ip_range):
            raise ConfigError("--gateway and --ip-range go with --subnet", "give --subnet, too")
        check_name(name)
        if rootless():
            _need_root()
        with self._store:
            if self._store.find(name) is not None:
                raise NetworkError(f"there is a network {name} already", "use another name")
            self._define(name, subnet, gateway, ip_range, internal, dns, labels or {})
        return self.inspect(name)

    def _define(self, name: str, subnet: str, gateway: str, ip_range: str, internal: bool, dns: bool,
                labels: Mapping[str, str]) -> Network:
        from hv.network.choose import check_free, choose_subnet, free_bridge

        mine = self._store.networks()
        if subnet:
            chosen = Subnet.parse("--subnet", subnet)
            check_free(chosen, mine)
        else:
            chosen = choose_subnet(mine, large=name == DEFAULT)
        network = define(name, chosen, gateway, ip_range, internal, dns, labels, free_bridge(mine), int(time()))
        self._store.keep(network)
        return network

    def _get(self, name: str) -> Network:
        """The network of that name or ID; the default one is made when it is first asked for. With the lock held."""
        if name == DEFAULT and self._store.find(name) is None:
            return self._define(name, "", "", "", False, True, {})
        return self._store.network(name)

    def rm(self, name: str) -> None:
        """Remove a network that has no member."""
        with self._store:
            if "/" not in name and os.path.exists(f"{self._store.root}/{name}.json"):
                try:
                    network = self._store.network(name)
                except NetworkError:
                    os.unlink(f"{self._store.root}/{name}.json")    # damaged
                    return
            else:
                network = self._store.network(name)
            self._remove(network)

    def _remove(self, network: Network) -> None:
        if members := self._members.leases(network.name).all():
            who = ", ".join(sorted({self._name(instance) for _, instance in members})[:3])
            raise NetworkError(f"network {network.name} has {len(members)} members: {who}"
                               + (", ..." if len(members) > 3 else ""), "stop them, or `pyhv network disconnect`")
        dns_start.stop(self._store, network)
        self._bridges.down(network)
        self._store.forget(network)
        self._store.clear(network)

    def _name(self, instance: str) -> str:
        record = self._store.record(instance) if instance else None
        return str(record["name"] if record else "") or instance[:12] or "?"

    def ls(self) -> list[dict[str, Any]]:
        """All networks: name, id, driver, subnet, internal, members (number)."""
        return [{**network.plain(), "members": len(self._members.leases(network.name).all())}
                for network in self._store.networks()]

    def inspect(self, name: str) -> dict[str, Any]:
        """One network, and its members with their addresses."""
        with self._store:
            network = self._get(name)
            members = {}
            for address, instance in self._members.leases(network.name).all():
                record = self._store.record(instance) if instance else None
                mine = [endpoint for endpoint in (record["endpoints"] if record else [])
                        if endpoint["network"] == network.name]
                members[instance] = {"name": record["name"] if record else "", "address": text(address),
                                     "mac": mine[0]["mac"] if mine else "",
                                     "interface": mine[0]["name"] if mine else ""}
            self._members.revive(network)
            return {**network.plain(), "members": members}

    def prune(self) -> list[str]:
        """Remove all networks without a member, but for the default one; their names."""
        gone = []
        with self._store:
            for network in self._store.networks():
                if network.name != DEFAULT and not self._members.leases(network.name).all():
                    self._remove(network)
                    gone.append(network.name)
        return gone

    # instances ---------------------------------------------------------------------------------------

    def check(self, networks: Sequence[str], *, vm: bool = False, ports: Sequence[Port] = (), ip: str = "") -> None:
        """Whether attach() could do that, before anything is started: names, kinds that a VM can't have, ports in use.
        ConfigError (exit code 2), NetworkError."""
        mode = check_mode(networks, vm, ports, ip)
        if mode == "bridge":
            _need_root()
            found = [self._store.network(name) for name in networks
                     if name != DEFAULT or self._store.find(name) is not None]
            if ports and found and all(network.internal for network in found):
                raise ConfigError(f"-p: network {found[0].name} is internal: nothing of it can be published",
                                  "publish on a network that is not, or leave -p out")
            check_ports(self._store, ports)

    def attach(self, networks: Sequence[str], instance: str, *, name: str, netns: str = "", hostname: str = "",
               aliases: Sequence[str] = (), ports: Sequence[Port] = (), vm: bool = False, ip: str = "", mac: str = "",
               dns: Sequence[str] = (), search: Sequence[str] = (), hosts: Sequence[str] = ()) -> Attachment:
        """Join `instance` (its ID) to `networks`, with eth0, eth1, ... in the namespace at `netns`, and publish ports.

        `networks` may also be ["none"], ["host"] (not with vm) or ["container:ID"]; then `netns` may be "" and no
        interface is made. `vm`: of a VM; its network card has eth0 for its own (hv/devices/virtio/net_packet.py), and
        there is no connect() while it runs. `ip` and `mac` are those on the first network. `dns`, `search`: name
        servers and domains other than the host's. `hosts`: more lines for /etc/hosts, as HOST:IP. All or nothing: what
        was made is removed again if a step fails. An instance that has something already loses it first.
        """
        mode = check_mode(networks, vm, ports, ip)
        record: Record = {"id": check_id(instance), "name": name, "hostname": hostname, "netns": netns, "vm": vm,
                          "mode": mode, "dns": list(dns), "search": list(search), "hosts": list(hosts),
                          "aliases": list(aliases), "endpoints": [], "ports": []}
        if mode == "container":
            return self._members.of_other(networks[0].partition(":")[2])
        with self._store:
            self._detach(instance, False)
            if mode == "pasta":
                self._members.join_pasta(record, mac, ports)
            if mode == "bridge":
                _need_root()
                self._members.join(record, [self._get(name) for name in networks], ip, mac, ports)
            return self._members.attachment(record)

    def detach(self, instance: str, *, netns_ends: bool = False) -> None:
        """Remove all that attach() and connect() made for `instance`; nothing to do is no error.

        `netns_ends`: its namespace is about to end, and takes the interfaces along by the kernel's own worker: saves
        the 10 to 40 ms that removing one takes.
        """
        if self._store.record(instance) is None:
            return
        with self._store:
            self._detach(instance, netns_ends)

    def _detach(self, instance: str, netns_ends: bool) -> None:
        record = self._store.record(instance)
        if record is not None:
            with Netlink(ROUTE) as socket:
                self._members.undo(socket, record, netns_ends)

    # of one that runs --------------------------------------------------------------------------------

    def connect(self, network: str, instance: str, *, aliases: Sequence[str] = (), ip: str = "",
                netns: str = "") -> Interface:
        """Join a running container to one more network. `netns`: where its namespace is now, if not where attach()
        was told."""
        with self._store:
            record = self._members.running(instance, "connected to a network")
            if netns:
                record["netns"] = netns
            return self._members.join_another(record, self._get(network), ip, aliases)

    def disconnect(self, network: str, instance: str, *, force: bool = False) -> None:
        """Part it from one network. `force`: it need not be a member."""
        with self._store:
            if force and self._store.record(instance) is None:
                return
            record = self._members.running(instance, "parted from a network")
            parted = self._get(network)
            mine = [endpoint for endpoint in record["endpoints"] if endpoint["network"] == parted.name]
            if not mine:
                if force:
                    return
                raise NetworkError(f"{record['name']} is not in network {parted.name}",
                                   f"`pyhv network inspect {parted.name}` lists who is")
            self._members.part(record, mine[0])

    def rename(self, instance: str, name: str) -> None:
        """Its name in its networks."""
        with self._store:
            record = self._store.record(instance)
            if record is None:
                return
            record["name"] = name
            self._members.rename(record)

    def members(self, instance: str) -> list[Interface]:
        """The interfaces of `instance`."""
        record = self._store.record(instance)
        return [Interface(**endpoint) for endpoint in record["endpoints"]] if record else []

    def published(self, instance: str) -> list[Port]:
        """The ports of `instance`."""
        record = self._store.record(instance)
        return [Port(**port) for port in record["ports"]] if record else []

    def sweep(self, alive: Iterable[str] | Callable[[], Iterable[str]]) -> list[str]:
        """Remove what belongs to no instance of `alive` (IDs): those that it belonged to. For after a crash.

        Better a function: it is called when nobody can attach any more, so an instance that is known before it attaches
        is never swept.
        """
        from hv.network.sweep import sweep

        with self._store:
            return sweep(self._store, self._bridges, set(alive() if callable(alive) else alive), self._members)


def _need_root() -> None:
    if os.geteuid() or rootless():
        raise NetworkError("networks with a bridge need root", "--network pasta, none or host does not")
