"""What defines a network: name, subnet, gateway, the range that addresses come from, and the bridge that it is.

Driven by tests/unit/test_network_store.py.
"""

from __future__ import annotations

__all__ = ["DEFAULT", "Network", "check_name", "define"]

import os

from hv.errors import ConfigError, NetworkError
from hv.network.addresses import Subnet, number, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DEFAULT = "pyhv"                # the network of instances that ask for none
MODES = ("none", "host", "bridge", "default", "container")      # words that `--network` has for other things
MAC_PREFIX = b"\x02\x70"        # locally administered (IEEE 802, 8.2); the address follows, so that both stay together
_LONGEST = 64


class Network:
    """One network. Addresses are numbers."""

    __slots__ = ("bridge", "created", "dns", "gateway", "id", "internal", "labels", "name", "range", "subnet")

    def __init__(self, name: str, subnet: Subnet, gateway: int, given_out: Subnet, internal: bool, dns: bool,
                 labels: Mapping[str, str], bridge: str, identity: str, created: int) -> None:
        self.name, self.subnet, self.gateway, self.range = name, subnet, gateway, given_out
        self.internal, self.dns, self.labels = internal, dns, dict(labels)
        self.bridge, self.id, self.created = bridge, identity, created

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "id": self.id, "driver": "bridge", "subnet": str(self.subnet),
                "gateway": text(self.gateway), "ip_range": str(self.range), "internal": self.internal,
                "dns": self.dns, "labels": self.labels, "bridge": self.bridge, "created": self.created}

    @staticmethod
    def load(name: str, data: dict[str, Any]) -> Network:
        """What plain() gave. NetworkError names the field that is wrong."""
        field = ""
        try:
            field = "subnet"
            subnet = Subnet.parse("subnet", data[field])
            field = "gateway"
            gateway = number(data[field])
            if gateway not in subnet:
                raise ValueError
            field = "ip_range"
            given_out = Subnet.parse("ip_range", data[field], most=32)
            for field, kind in (("internal", bool), ("dns", bool), ("labels", dict), ("bridge", str), ("id", str),
                                ("created", int)):
                if not isinstance(data[field], kind):
                    raise ValueError
            field = "bridge"
            if not 0 < len(data["bridge"]) < 16 or "/" in data["bridge"]:
                raise ValueError
        except (KeyError, ValueError, AttributeError, ConfigError):
            raise NetworkError(f"network {name}: its definition is damaged: {field}",
                               f"`pyhv network rm {name}` removes it") from None
        return Network(name, subnet, gateway, given_out, data["internal"], data["dns"], data["labels"],
                       data["bridge"], data["id"], data["created"])

    def mac(self, address: int) -> bytes:
        """The MAC address that goes with an address, so that nobody's ARP table is ever wrong."""
        return MAC_PREFIX + address.to_bytes(4, "big")


def check_name(name: str) -> str:
    """`name` where a network may be called that."""
    sound = 0 < len(name) <= _LONGEST and name[0].isalnum() and all(
        character.isascii() and (character.isalnum() or character in "_.-") for character in name)
    if not sound:
        raise ConfigError(f"a network can't be called {name!r}",
                          f"a letter or digit, then up to {_LONGEST - 1} of them and of _ . -")
    if name in MODES:
        raise ConfigError(f"a network can't be called {name}: --network {name} means something else",
                          "use another name")
    return name


def define(name: str, subnet: Subnet, gateway: str, ip_range: str, internal: bool, dns: bool,
           labels: Mapping[str, str], bridge: str, now: int) -> Network:
    """A new one; ConfigError where gateway and range don't fit the subnet."""
    given_out = Subnet.parse("--ip-range", ip_range, most=32) if ip_range else subnet
    if given_out.first not in subnet or given_out.last not in subnet:
        raise ConfigError(f"--ip-range {given_out} is not within --subnet {subnet}", "take a part of the subnet")
    way = number(gateway) if gateway else subnet.first + 1
    if way not in subnet or way in (subnet.first, subnet.last):
        raise ConfigError(f"--gateway {gateway} is no address of {subnet}", f"for example {text(subnet.first + 1)}")
    return Network(name, subnet, way, given_out, internal, dns, labels, bridge, os.urandom(6).hex(), now)
