"""The table `inet pyhv`: what goes into, out of and between networks, said to nft(8) in its own language.

A network is elements of sets, a published port is an element of a map: made and removed by itself, whatever else is
there, and as fast with 1000 of them. Not libnftables' JSON: that of Debian 12 (1.0.6) silently takes a map whose values
are of two parts for a set of nothing. All values are numbers, addresses and names that were checked.

Driven by tests/unit/test_network_nft.py and tests/root/test_network*.py.
"""

from __future__ import annotations

__all__ = ["apply", "network_elements", "port_elements", "remove", "rules"]

import os
from _signal import SIGPIPE

from hv.errors import NetworkError
from hv.network.addresses import text
from hv.network.shape import ANYWHERE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from hv.network.definition import Network
    from hv.network.shape import Port

_PLACES = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft")
_OUTPUT_MOST = 65536
# Bridges route loopback addresses (route_localnet), so that what this host sends to 127.0.0.1 can be led to an
# instance; `raw` keeps instances from using that. What comes from outside to a loopback address is not led away: the
# kernel looks only behind `published` whether such a packet may come. `forward` lets through what is known, what stays
# within one network (where the host has bridges' frames pass here: br_netfilter), and published ports; nothing else
# gets into a network, nothing out of an internal one, and nothing out under a foreign address. An internal one may ask
# our name server, and nothing else of this host.
_RULES = """
add table inet {table}
delete table inet {table}
table inet {table} {{
    set bridges {{ type ifname; }}
    set internal {{ type ifname; }}
    set same {{ type ifname . ifname; }}
    set subnets {{ type ipv4_addr; flags interval; }}
    map ports {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
    map ports_at {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}

    chain raw {{
        type filter hook prerouting priority raw; policy accept;
        iifname @bridges ip daddr 127.0.0.0/8 drop
        iifname @bridges ip saddr 127.0.0.0/8 drop
    }}
    chain published {{
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 127.0.0.0/8 accept
        fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @ports_at
        fib daddr type local dnat ip to meta l4proto . th dport map @ports
    }}
    chain published_here {{
        type nat hook output priority -100; policy accept;
        fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @ports_at
        fib daddr type local dnat ip to meta l4proto . th dport map @ports
    }}
    chain leave {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr @subnets oifname != @bridges masquerade
        ct status dnat ip saddr @subnets oifname @bridges masquerade
        ct status dnat ip saddr 127.0.0.0/8 oifname @bridges masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        ct state established,related accept
        iifname . oifname @same accept
        iifname @bridges meta nfproto ipv6 drop
        iifname @internal drop
        oifname @internal drop
        iifname @bridges ip saddr != @subnets drop
        ct status dnat accept
        oifname @bridges drop
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        ct state established,related accept
        iifname @internal meta l4proto {{ tcp, udp }} th dport 53 accept
        iifname @internal drop
    }}
}}
"""


def rules(table: str) -> list[str]:
    """The table, its sets and chains, anew."""
    return [_RULES.format(table=table)]


def remove(table: str) -> list[str]:
    """No table; one that is not there is no error."""
    return [f"add table inet {table}", f"delete table inet {table}"]


def network_elements(table: str, network: Network, verb: str = "add") -> list[str]:
    """Add or delete a network's."""
    bridge = f'"{network.bridge}"'
    held = {"bridges": bridge, "same": f"{bridge} . {bridge}"}
    if network.internal:
        held["internal"] = bridge
    else:
        held["subnets"] = str(network.subnet)
    return [f"{verb} element inet {table} {name} {{ {value} }}" for name, value in held.items()]


def port_elements(table: str, ports: Iterable[Port], address: int, instance: str, verb: str = "add") -> list[str]:
    """Add or delete those that lead to `address`; each says whose it is."""
    said = []
    for port in ports:
        name, key = "ports", f"{port.protocol} . {port.host}"
        if port.address != ANYWHERE:
            name, key = "ports_at", f"{port.address} . {key}"
        note = f' comment "{instance[:64]}"' if verb == "add" else ""
        value = f"{text(address)} . {port.inner}"
        said.append(f"{verb} element inet {table} {name} {{ {key}{note} : {value} }}")
    return said


def apply(commands: list[str]) -> str:
    """Have nft do all of it or nothing: "" or what it complains of. NetworkError where there is no nft."""
    program = next((place for place in _PLACES if os.access(place, os.X_OK)), "")
    if not program:
        raise NetworkError("there is no program nft on this host", "install nftables, or use --network none or host")
    given = _filled(("\n".join(commands) + "\n").encode())
    try:
        said = os.memfd_create("said", os.MFD_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, given, 0), (os.POSIX_SPAWN_DUP2, said, 1), (os.POSIX_SPAWN_DUP2, said, 2)]
            child = os.posix_spawn(program, [program, "-f", "-"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                                   file_actions=actions, setsigmask=[], setsigdef=[SIGPIPE])
            try:
                _, status = os.waitpid(child, 0)
            except ChildProcessError:
                status = 0          # who called us has its children waited for elsewhere: what nft says must do
            words = os.pread(said, _OUTPUT_MOST, 0).decode(errors="replace").strip().splitlines()
            return words[0] if words else f"nft ended with status {status:#x}" if status else ""
        finally:
            os.close(said)
    finally:
        os.close(given)


def _filled(data: bytes) -> int:
    fd = os.memfd_create("rules", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
