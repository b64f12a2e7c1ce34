"""`-p`: what a person asks to publish, as docker reads it: [IP:][HOST[-LAST]:]INNER[-LAST][/tcp|udp].

Left out on purpose: IPv6 and SCTP. Driven by tests/unit/test_network_ports.py.
"""

from __future__ import annotations

__all__ = ["MOST", "parse_publish"]

from hv.errors import ConfigError
from hv.network.addresses import number
from hv.network.shape import ANYWHERE, Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MOST = 1024         # published ports of one instance
_HINT = "for example -p 8080:80, -p 127.0.0.1:8080:80, -p 5353:53/udp, -p 8000-8009:80-89, -p 80"


def parse_publish(texts: Iterable[str]) -> list[Port]:
    """All of them, ranges spread out. ConfigError names the one that is wrong."""
    found: list[Port] = []
    for text in texts:
        found += _one(text)
        if len(found) > MOST:
            raise ConfigError(f"-p {text}: that makes more than {MOST} ports", "publish fewer, or use --network host")
    taken: dict[tuple[str, int], set[str]] = {}
    for port in found:
        others = taken.setdefault((port.protocol, port.host), set()) if port.host else set()
        if port.address in others or ANYWHERE in others or (others and port.address == ANYWHERE):
            raise ConfigError(f"-p: port {port.host}/{port.protocol} of the host is published twice",
                              "each port of the host leads to one place")
        others.add(port.address)
    return found


def _one(text: str) -> list[Port]:
    place, slash, protocol = text.partition("/")
    protocol = protocol.lower()
    if slash and protocol not in ("tcp", "udp"):
        raise ConfigError(f"-p {text}: protocol {protocol!r} is neither tcp nor udp", _HINT)
    if place.startswith("["):
        raise ConfigError(f"-p {text}: IPv6 addresses can't be published on", _HINT)
    *before, inner_text = place.split(":")
    if len(before) > 2:
        raise ConfigError(f"-p {text}: too many colons", _HINT)
    address = before[0] if len(before) == 2 and before[0] else ANYWHERE
    if number(address) < 0:
        raise ConfigError(f"-p {text}: {address} is no IPv4 address", _HINT)
    inner = _range(text, inner_text, 1)
    host_text = before[-1] if before else ""
    host = _range(text, host_text, 0) if host_text else range(1)
    if len(host) == len(inner) and host[0]:
        pairs = list(zip(host, inner, strict=True))
    elif len(host) == 1 and not host[0]:
        pairs = [(0, port) for port in inner]
    else:
        raise ConfigError(f"-p {text}: the two ranges are of different lengths", _HINT)
    return [Port(protocol or "tcp", address, *pair) for pair in pairs]


def _range(text: str, part: str, least: int) -> range:
    first, dash, last = part.partition("-")
    numbers = [int(word) if word.isascii() and word.isdigit() and len(word) < 6 else -1
               for word in ((first, last) if dash else (first,))]
    if not all(least <= value < 65536 for value in numbers) or numbers[-1] < numbers[0] or (dash and not numbers[0]):
        raise ConfigError(f"-p {text}: {part or 'nothing'} is no port from 1 to 65535, and no range of them", _HINT)
    return range(numbers[0], numbers[-1] + 1)
