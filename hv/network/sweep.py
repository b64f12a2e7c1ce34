"""Remove what belongs to no living instance: after a SIGKILL, a crash, files of /run that somebody deleted.

Driven by tests/root/test_network_sweep.py.
"""

from __future__ import annotations

__all__ = ["sweep"]

import os

from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink
from hv.network import dns_start, joints

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.network.bridges import Bridges
    from hv.network.members import Members
    from hv.network.store import Store


def sweep(store: Store, bridges: Bridges, alive: set[str], members: Members) -> list[str]:
    """IDs of instances that something was left of. With the lock held."""
    store.tidy()
    dead = [record for instance in store.instances() if instance not in alive
            and (record := store.record(instance)) is not None]
    swept = {record["id"] for record in dead}
    known = {*store.instances(), *alive} - swept
    with Netlink(ROUTE) as socket:
        owners = {link.name: _owner(link.alias, bridges.tag) for link in links.links(socket)}
        stray = [name for name, owner in owners.items() if owner and owner not in known]
        joints.cut(socket, stray)
        swept.update(owners[name] for name in stray)
        for record in dead:
            members.undo(socket, record, True)
        for network in store.networks():
            leases = members.leases(network.name)
            for address, instance in leases.all():
                if instance not in known:
                    leases.give_back(address)
                    swept.add(instance)
            leases.tidy()
            if leases.all():
                members.revive(network)
            elif not dns_start.is_running(store, network):      # which would take it down itself
                bridges.down(network)
        _ports(store, known, swept)
        if swept:
            bridges.renew(socket)
    return sorted(swept - {""})


def _owner(alias: str, tag: str) -> str:
    """The instance that an interface was made for; "" where it is none of ours."""
    words = alias.split(" ")
    return words[2] if len(words) == 4 and words[:2] == ["pyhv", tag] else ""


def _ports(store: Store, known: set[str], swept: set[str]) -> None:
    folder = store.run + "/ports"
    try:
        leaves = os.listdir(folder)
    except FileNotFoundError:
        return
    for leaf in leaves:
        with open(f"{folder}/{leaf}", errors="replace") as file:
            owner = file.read(200)
        if owner not in known:
            os.unlink(f"{folder}/{leaf}")
            swept.add(owner)
