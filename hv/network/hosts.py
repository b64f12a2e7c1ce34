"""What an instance finds in /etc/resolv.conf and /etc/hosts (man 5 resolv.conf, man 5 hosts).

Driven by tests/unit/test_network_hosts.py.
"""

from __future__ import annotations

__all__ = ["host_resolver", "hosts_text", "resolv_text", "with_host_lines"]

from hv.errors import ConfigError
from hv.network.addresses import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACE, _BEHIND_STUB = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"
_MOST = 65536
_GATEWAY = "host-gateway"       # docker's word, in --add-host
_FIRST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def host_resolver(path: str = _PLACE) -> tuple[list[str], list[str], list[str]]:
    """(name servers with IPv4 addresses, search domains, options) of this host."""
    try:
        with open(path, errors="replace") as file:
            lines = [line.split() for line in file.read(_MOST).splitlines()]
    except OSError:
        return [], [], []
    servers: list[str] = []
    search: list[str] = []
    options: list[str] = []
    for line in lines:
        if line[:1] == ["nameserver"] and len(line) > 1 and number(line[1]) >= 0:
            servers.append(line[1])
        elif line[:1] in (["search"], ["domain"]):
            search = [domain for domain in line[1:] if domain != "."]
        elif line[:1] == ["options"]:
            options = line[1:]
    return servers, search, options


def resolv_text(gateway: str, dns: Sequence[str], search: Sequence[str]) -> str:
    """With our server at `gateway`; "": with `dns`, or what the host uses and an instance can reach."""
    servers, domains, _ = host_resolver()
    if gateway:
        servers = [gateway]
    elif dns:
        servers = list(dns)
    else:
        if any(server.startswith("127.") for server in servers):
            servers += host_resolver(_BEHIND_STUB)[0]
        servers = list(dict.fromkeys(server for server in servers if not server.startswith("127.")))
    lines = [f"search {' '.join(search or domains)}"] if search or domains else []
    lines += [f"nameserver {server}" for server in servers[:3]]        # MAXNS, resolv.h
    if gateway:
        lines.append("options ndots:0")      # names without a dot are asked for as they are
    return "".join(line + "\n" for line in lines)


def hosts_text(hostname: str, addresses: Sequence[tuple[str, Sequence[str]]], more: Sequence[str],
               gateway: str) -> str:
    """`addresses`: (address, names besides the hostname); `more`: lines HOST:IP of --add-host."""
    lines = []
    for address, names in addresses:
        told = dict.fromkeys([name for name in (hostname, *names) if name])
        if told:
            lines.append(f"{address}\t{' '.join(told)}\n")
    return _FIRST + "".join(lines) + _added(more, gateway)


def with_host_lines(more: Sequence[str]) -> str:
    """The host's own file and `more`, for who has the host's network; "" where there is nothing to add."""
    if not more:
        return ""
    try:
        with open("/etc/hosts", errors="replace") as file:
            own = file.read(_MOST)
    except OSError:
        own = _FIRST
    return own.rstrip("\n") + "\n" + _added(more, "127.0.0.1")


def _added(more: Sequence[str], gateway: str) -> str:
    """Lines of --add-host."""
    lines = []
    for entry in more:
        host, _, address = entry.partition(":")
        if address == _GATEWAY and gateway:
            address = gateway
        sound = host and all(character.isascii() and (character.isalnum() or character in "_.-") for character in host)
        if not sound or (number(address) < 0 and not _is_ipv6(address)):
            raise ConfigError(f"--add-host {entry} is not HOST:IP", "for example db:10.0.0.5, or db:host-gateway")
        lines.append(f"{address}\t{host}\n")
    return "".join(lines)


def _is_ipv6(address: str) -> bool:
    return ":" in address and all(character in "0123456789abcdefABCDEF:." for character in address)
