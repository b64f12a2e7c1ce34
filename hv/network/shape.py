"""What the network room hands out: interfaces, published ports, and what an instance is told of its networks.

Driven by tests/unit/test_network_ports.py and tests/root/test_network.py.
"""

from __future__ import annotations

__all__ = ["ANYWHERE", "Attachment", "Interface", "Port"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANYWHERE = "0.0.0.0"            # published on every address of the host


class Interface:
    """One card of an instance: `name` (eth0) inside, the bridge's port `link` outside. Addresses are text; `gateway` is
    "" but for the card that has the default route. `aliases`: names besides the instance's own."""

    __slots__ = ("address", "aliases", "gateway", "internal", "link", "mac", "mtu", "name", "network", "prefix")

    def __init__(self, network: str, name: str, mac: str, address: str, prefix: int, gateway: str, mtu: int,
                 link: str, aliases: list[str], internal: bool) -> None:
        self.network, self.name, self.mac, self.address, self.prefix = network, name, mac, address, prefix
        self.gateway, self.mtu, self.link, self.aliases, self.internal = gateway, mtu, link, aliases, internal

    def plain(self) -> dict[str, Any]:
        """For JSON; Interface(**plain) is equal."""
        return {name: getattr(self, name) for name in self.__slots__}


class Port:
    """A published port: `protocol` (tcp, udp), the host's `address` and port `host`, the instance's port `inner`.

    `host` 0 has attach() choose one that is free.
    """

    __slots__ = ("address", "host", "inner", "protocol")

    def __init__(self, protocol: str, address: str, host: int, inner: int) -> None:
        self.protocol, self.address, self.host, self.inner = protocol, address, host, inner

    def plain(self) -> dict[str, Any]:
        """For JSON; Port(**plain) is equal."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        return f"{self.address}:{self.host}:{self.inner}/{self.protocol}"


class Attachment:
    """What attach() made: `interfaces`, `ports` with numbers for those that were left open, and the contents of the
    instance's /etc/resolv.conf and /etc/hosts ("" with network `host`: the host's own are used). `netns`: where its
    namespace is; with container:ID that is the other one's."""

    def __init__(self, interfaces: list[Interface], ports: list[Port], resolv_conf: str, hosts: str,
                 netns: str) -> None:
        self.interfaces, self.ports, self.netns = interfaces, ports, netns
        self.resolv_conf, self.hosts = resolv_conf, hosts
