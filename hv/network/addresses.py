"""IPv4 addresses and subnets as numbers: ipaddress, without the import (with re: 3 ms), and its rules for text.

Driven by tests/unit/test_network_ipam.py, against ipaddress.
"""

from __future__ import annotations

__all__ = ["Subnet", "number", "text"]

from hv.errors import ConfigError

_HINT = "for example 10.89.0.0/24"


def number(address: str) -> int:
    """The number of `10.0.0.1`, -1 where it is no address."""
    parts = address.split(".")
    if len(parts) != 4:
        return -1
    value = 0
    for part in parts:
        # no leading zeros: some read them as octal (ipaddress refuses them, too)
        if not (part.isascii() and part.isdigit()) or len(part) > 3 or int(part) > 255:
            return -1
        if len(part) > 1 and part[0] == "0":
            return -1
        value = value << 8 | int(part)
    return value


def text(value: int) -> str:
    """`10.0.0.1` of its number."""
    return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"


class Subnet:
    """`first` address, `prefix` length, `last` address."""

    __slots__ = ("first", "last", "prefix")

    def __init__(self, first: int, prefix: int) -> None:
        self.first, self.prefix = first, prefix
        self.last = first | (1 << 32 - prefix) - 1

    @staticmethod
    def parse(what: str, given: str, least: int = 8, most: int = 30) -> Subnet:
        """Of `10.0.0.0/8`; ConfigError says `what` it was for."""
        address, slash, length = given.partition("/")
        first = number(address)
        if first < 0 or not slash or not (length.isascii() and length.isdigit()) or len(length) > 2:
            raise ConfigError(f"{what} {given!r} is no IPv4 subnet", _HINT)
        prefix = int(length)
        if not least <= prefix <= most:
            raise ConfigError(f"{what} {given}: a prefix of {prefix} bits is not {least} to {most}", _HINT)
        subnet = Subnet(first & -1 << 32 - prefix & 0xFFFFFFFF, prefix)
        if subnet.first != first:
            raise ConfigError(f"{what} {given} has bits set behind its prefix", f"do you mean {subnet}?")
        return subnet

    def __contains__(self, address: int) -> bool:
        return self.first <= address <= self.last

    def overlaps(self, other: Subnet) -> bool:
        """Whether they have an address in common."""
        return self.first <= other.last and other.first <= self.last

    def __str__(self) -> str:
        return f"{text(self.first)}/{self.prefix}"
