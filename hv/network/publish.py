"""Ports of the host: which are free, and whose they are.

A published port is led away by the kernel before any socket sees it. So a port where a program of the host listens is
refused, and one of ours that leads to an instance is, too. While an instance runs nothing listens on its ports: a
program that begins to then succeeds, and hears nothing (docs/network.md).

Driven by tests/unit/test_network_ports.py and tests/root/test_network_ports.py.
"""

from __future__ import annotations

__all__ = ["check_ports", "give_back_ports", "reserve_ports"]

import errno
import os
from _socket import AF_INET, SO_REUSEADDR, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, socket

from hv.errors import ConfigError, NetworkError
from hv.network.shape import ANYWHERE, Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from hv.network.store import Store

_KINDS = {"tcp": SOCK_STREAM, "udp": SOCK_DGRAM}
_TRIES = 100            # for a free port that no instance has


def check_ports(store: Store, ports: Iterable[Port], mine: str = "") -> None:
    """NetworkError where one can't be had; those of instance `mine` count as free."""
    taken = _taken(store)
    for port in ports:
        if port.host:
            _check(port, taken, mine)


def reserve_ports(store: Store, ports: Iterable[Port], instance: str) -> list[Port]:
    """All of them, for `instance`; with a number for those that have none. With the lock held."""
    taken, found = _taken(store), []
    try:
        for port in ports:
            if port.host:
                _check(port, taken, "")
                chosen = port
            else:
                chosen = _choose(port, taken)
            path = _path(store, chosen)
            os.makedirs(store.run + "/ports", 0o700, exist_ok=True)
            with open(path, "w") as file:
                file.write(instance)
            found.append(chosen)
            taken.setdefault((chosen.protocol, chosen.host), {})[chosen.address] = path
    except BaseException:
        give_back_ports(store, found)
        raise
    return found


def give_back_ports(store: Store, ports: Iterable[Port]) -> None:
    """They are nobody's. With the lock held."""
    for port in ports:
        try:
            os.unlink(_path(store, port))
        except FileNotFoundError:
            pass


def _path(store: Store, port: Port) -> str:
    return f"{store.run}/ports/{port.protocol}-{port.host}-{port.address}"


def _taken(store: Store) -> dict[tuple[str, int], dict[str, str]]:
    """(protocol, port) -> {address: path of the reservation}."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    try:
        leaves = os.listdir(store.run + "/ports")
    except FileNotFoundError:
        return {}
    for leaf in leaves:
        protocol, _, rest = leaf.partition("-")
        number, _, address = rest.partition("-")
        if number.isdigit():
            found.setdefault((protocol, int(number)), {})[address] = f"{store.run}/ports/{leaf}"
    return found


def _check(port: Port, taken: dict[tuple[str, int], dict[str, str]], mine: str) -> None:
    name = f"port {port.host}/{port.protocol} of the host"
    for address, path in taken.get((port.protocol, port.host), {}).items():
        if address == port.address or ANYWHERE in (address, port.address):
            holder = _holder(path)
            if holder != mine or not mine:
                raise NetworkError(f"-p {port}: {name} is published by instance {holder[:12] or 'another'}",
                                   "take another one, or leave it out to get a free one")
    number, _ = _bind(port)
    if number == errno.EADDRINUSE:
        raise NetworkError(f"-p {port}: {name} is in use by a program", "`ss -lntup` tells which; or take another one")
    if number == errno.EADDRNOTAVAIL:
        raise ConfigError(f"-p {port}: {port.address} is no address of this host", "`ip -br address` lists them")
    if number:
        raise NetworkError(f"-p {port}: {name}: {os.strerror(number)}", "ports below 1024 need root "
                           "(net.ipv4.ip_unprivileged_port_start)" if number == errno.EACCES else "")


def _holder(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(200)
    except OSError:
        return ""


def _bind(port: Port) -> tuple[int, int]:
    """(error, number of the port): whether a program could have it now."""
    trial = socket(AF_INET, _KINDS[port.protocol] | SOCK_CLOEXEC)
    try:
        if port.protocol == "tcp":
            trial.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)       # connections that have just ended are no hindrance
        trial.bind((port.address, port.host))
        return 0, int(trial.getsockname()[1])
    except OSError as error:
        return error.errno or errno.EIO, 0
    finally:
        trial.close()


def _choose(port: Port, taken: dict[tuple[str, int], dict[str, str]]) -> Port:
    for _ in range(_TRIES):
        number, free = _bind(port)
        if number == errno.EADDRNOTAVAIL:
            raise ConfigError(f"-p {port}: {port.address} is no address of this host", "`ip -br address` lists them")
        if not number and (port.protocol, free) not in taken:
            return Port(port.protocol, port.address, free, port.inner)
    raise NetworkError(f"-p {port}: no free port of the host found", "name one")
