"""A subnet and a bridge's name that nobody has: no route or address of the host, no network of ours, podman's or CNI's.

Docker's networks have their bridges, and so their routes, as long as they exist. Driven by
tests/unit/test_network_ipam.py and tests/root/test_network.py.
"""

from __future__ import annotations

__all__ = ["check_free", "choose_subnet", "free_bridge"]

import os

from hv.errors import NetworkError
from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink
from hv.network.addresses import Subnet, number
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hv.network.definition import Network

# private addresses (RFC 1918) that none of these begins with: docker (172.17 and on, 192.168), podman (10.88, 10.89 and
# on), Kubernetes' services (10.96.0.0/12). A /16 for the default network, a /24 for each other one.
_LARGE, _SMALL = Subnet.parse("", "10.112.0.0/12"), Subnet.parse("", "10.144.0.0/12")
_FILES = ("/etc/containers/networks", "/var/lib/containers/storage/networks", "/etc/cni/net.d")
_MOST = 1 << 20         # bytes of such a file that are looked at


def choose_subnet(mine: Iterable[Network], large: bool) -> Subnet:
    """A free one."""
    taken = [other for other, _ in _taken(mine)]
    pool, prefix = (_LARGE, 16) if large else (_SMALL, 24)
    for first in range(pool.first, pool.last, 1 << 32 - prefix):
        subnet = Subnet(first, prefix)
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise NetworkError(f"no free subnet is left in {pool}", "give one: --subnet")


def check_free(subnet: Subnet, mine: Iterable[Network]) -> None:
    """NetworkError says what overlaps it."""
    for other, whose in _taken(mine):
        if subnet.overlaps(other):
            raise NetworkError(f"subnet {subnet} overlaps {other} of {whose}", "take another one, or leave it to pyhv")


def _taken(mine: Iterable[Network]) -> Iterator[tuple[Subnet, str]]:
    for network in mine:
        yield network.subnet, f"network {network.name}"
    with Netlink(ROUTE) as socket:
        for destination, prefix in links.routes(socket):
            yield Subnet(destination, prefix), "a route of the host"
        for _, address, prefix in links.addresses(socket):
            yield Subnet(address & -1 << 32 - prefix & 0xFFFFFFFF, prefix), "an interface of the host"
    for server in _nameservers():
        yield Subnet(server, 32), "a name server in /etc/resolv.conf"
    for folder in _FILES:
        try:
            leaves = sorted(os.listdir(folder))
        except OSError:
            continue
        for leaf in leaves:
            if leaf.endswith((".json", ".conflist", ".conf")):
                for subnet in _subnets_in(f"{folder}/{leaf}"):
                    yield subnet, f"{folder}/{leaf}"


def _nameservers() -> list[int]:
    try:
        with open("/etc/resolv.conf", errors="replace") as file:
            words = [line.split() for line in file.read(_MOST).splitlines()]
    except OSError:
        return []
    return [address for line in words if line[:1] == ["nameserver"] and len(line) > 1
            and (address := number(line[1])) >= 0]


def _subnets_in(path: str) -> list[Subnet]:
    """What is called "subnet" anywhere in a JSON file; one that can't be read says nothing."""
    try:
        with open(path, "rb", 0) as file:
            waiting: list[object] = [loads(file.read(_MOST).decode())]
    except (OSError, ValueError):
        return []
    found = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            address, _, prefix = str(value.get("subnet", "")).partition("/")
            first = number(address)
            if first >= 0 and prefix.isascii() and prefix.isdigit() and int(prefix) <= 32:
                found.append(Subnet(first & -1 << 32 - int(prefix) & 0xFFFFFFFF, int(prefix)))
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def free_bridge(mine: Iterable[Network]) -> str:
    """pyhv0, pyhv1, ...: the first name that neither an interface nor a network has."""
    with Netlink(ROUTE) as socket:
        taken = {link.name for link in links.links(socket)} | {network.bridge for network in mine}
    count = 0
    while f"pyhv{count}" in taken:
        count += 1
    return f"pyhv{count}"
