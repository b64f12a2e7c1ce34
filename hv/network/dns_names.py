"""What the name server of a network knows: read from files at each query, so nobody has to tell it of a change.

An instance sees the names of all its networks, whichever server it asks. Driven by tests/unit/test_network_dns.py.
"""

from __future__ import annotations

__all__ = ["Names"]

import os

from hv.network.addresses import number
from hv.network.hosts import host_resolver
from hv.plainjson import loads

_MOST = 1 << 20
_REVERSE = ".in-addr.arpa"
MOST_ANSWERS = 64


class Names:
    """`run` is the folder of what is running (hv/network/store.py), `network` the one that is served.

    `resolver`: where the host's own name servers stand.
    """

    def __init__(self, run: str, network: str, internal: bool, resolver: str = "/etc/resolv.conf") -> None:
        self.run, self.network, self.internal = run, network, internal
        self._resolver = resolver
        self._servers: list[str] = []
        self._stamp: tuple[int, int] | None = None

    def client(self, address: str) -> tuple[list[str], list[str]]:
        """(networks, name servers of its own) of the instance that asks; this network alone for others."""
        lease = self._read(f"{self.run}/on/{self.network}/leases/{address}")
        instance = lease.get("instance", "")
        if isinstance(instance, str) and instance and "/" not in instance:
            record = self._read(f"{self.run}/instances/{instance}.json")
            endpoints, own = record.get("endpoints"), record.get("dns")
            if isinstance(endpoints, list):
                networks = [str(endpoint.get("network")) for endpoint in endpoints if isinstance(endpoint, dict)]
                return networks, [str(server) for server in own] if isinstance(own, list) else []
        return [self.network], []

    def addresses(self, name: str, networks: list[str]) -> list[bytes] | None:
        """Of all instances that are called that in one of the networks; None where nobody is."""
        found: list[bytes] = []
        for network in networks:
            if not name or name[0] == ".":
                return None
            try:
                leaves = sorted(os.listdir(f"{self.run}/on/{network}/names/{name}"))
            except OSError:
                continue        # also a name that is too long for a file system
            found += [value.to_bytes(4, "big") for leaf in leaves if (value := number(leaf)) >= 0]
        return found[:MOST_ANSWERS] or None

    def is_reverse(self, name: str) -> int:
        """The address that a PTR question is about, -1 where it is none."""
        if not name.endswith(_REVERSE):
            return -1
        return number(".".join(reversed(name[:-len(_REVERSE)].split("."))))

    def name_of(self, address: str, networks: list[str]) -> str:
        """The first name of an address."""
        for network in networks:
            names = self._read(f"{self.run}/on/{network}/leases/{address}").get("names")
            if isinstance(names, list) and names:
                return str(names[0])
        return ""

    def has_members(self) -> bool:
        """Whether anybody is left to ask."""
        try:
            return bool(os.listdir(f"{self.run}/on/{self.network}/leases"))
        except FileNotFoundError:
            return False

    def servers(self) -> list[str]:
        """The host's, as they are now."""
        try:
            status = os.stat(self._resolver)
            stamp = (status.st_mtime_ns, status.st_ino)
        except OSError:
            return []
        if stamp != self._stamp:
            self._servers, self._stamp = host_resolver(self._resolver)[0], stamp
        return self._servers

    def _read(self, path: str) -> dict[str, object]:
        try:
            with open(path, "rb", 0) as file:
                value = loads(file.read(_MOST).decode())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}
