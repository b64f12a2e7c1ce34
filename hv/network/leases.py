"""Who has which address of a network, and which names lead to it. Files, written with the lock held.

An address is looked for from a place that the instance's ID gives: an instance that starts again gets the one it had,
if nobody took it, and a free one is found without a list of them. Driven by tests/unit/test_network_ipam.py.
"""

from __future__ import annotations

__all__ = ["Leases", "dns_name"]

import os
from zlib import crc32

from hv.errors import ConfigError, NetworkError
from hv.network.addresses import number, text
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from hv.network.definition import Network

_LEASE_MOST = 65536     # bytes of a lease


class Leases:
    """Those of one network; `folder` is what Store.on() gives."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def take(self, network: Network, instance: str, wanted: str = "") -> int:
        """An address for `instance`, the one it wants or a free one."""
        os.makedirs(self.folder + "/leases", 0o755, exist_ok=True)
        if wanted:
            address = _sound(network, wanted)
            if not self._create(address, instance):
                raise NetworkError(f"address {wanted} of network {network.name} belongs to "
                                   f"{self.holder(address)[0][:12] or 'another instance'}",
                                   f"`pyhv network inspect {network.name}` lists those in use")
            return address
        pool, subnet = network.range, network.subnet
        size = pool.last - pool.first + 1
        start = crc32(instance.encode()) % size
        for step in range(size):
            address = pool.first + (start + step) % size
            if address not in (subnet.first, subnet.last, network.gateway) and self._create(address, instance):
                return address
        raise NetworkError(f"network {network.name} has no free address in {pool}",
                           "`pyhv network create` makes another one; --subnet says how large")

    def _create(self, address: int, instance: str) -> bool:
        try:
            fd = os.open(self._lease(address), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(fd, dumps({"instance": instance, "names": []}).encode())
        except OSError:
            os.unlink(self._lease(address))         # the disk is full
            raise
        finally:
            os.close(fd)
        return True

    def _lease(self, address: int) -> str:
        return f"{self.folder}/leases/{text(address)}"

    def holder(self, address: int) -> tuple[str, list[str]]:
        """(instance, names) of an address; ("", []) where nobody has it, or where a crash left an empty lease."""
        try:
            with open(self._lease(address), "rb", 0) as file:
                lease = loads(file.read(_LEASE_MOST).decode())
            return str(lease["instance"]), [str(name) for name in lease["names"]]
        except (OSError, ValueError, KeyError, TypeError):
            return "", []

    def name(self, address: int, names: Iterable[str]) -> None:
        """`names` lead to the address from now on, and no others."""
        instance, before = self.holder(address)
        after = list(dict.fromkeys(dns_name(name) for name in names))
        with open(self._lease(address) + "~", "w") as file:
            file.write(dumps({"instance": instance, "names": list(dict.fromkeys([*before, *after]))}))
        os.rename(self._lease(address) + "~", self._lease(address))     # first, or what follows would not be found
        for name in after:
            os.makedirs(f"{self.folder}/names/{name}", 0o755, exist_ok=True)
            os.close(os.open(f"{self.folder}/names/{name}/{text(address)}",
                             os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        for name in before:
            if name not in after:
                self._unname(address, name)

    def _unname(self, address: int, name: str) -> None:
        try:
            os.unlink(f"{self.folder}/names/{name}/{text(address)}")
        except (FileNotFoundError, NotADirectoryError):
            pass
        try:
            os.rmdir(f"{self.folder}/names/{name}")
        except OSError:
            pass        # others are called that, too

    def give_back(self, address: int) -> None:
        """Nobody has it any more."""
        for name in self.holder(address)[1]:
            self._unname(address, name)
        try:
            os.unlink(self._lease(address))
        except FileNotFoundError:
            pass

    def tidy(self) -> None:
        """Remove names that lead to addresses which nobody has: a crash came between the two."""
        held = {text(address) for address, _ in self.all()}
        for name in _listed(self.folder + "/names"):
            for leaf in _listed(f"{self.folder}/names/{name}"):
                if leaf not in held and number(leaf) >= 0:
                    self._unname(number(leaf), name)
        for leaf in _listed(self.folder + "/leases"):
            if leaf.endswith("~"):
                os.unlink(f"{self.folder}/leases/{leaf}")

    def all(self) -> list[tuple[int, str]]:
        """(address, instance) of all leases."""
        leaves = _listed(self.folder + "/leases")
        return [(address, self.holder(address)[0]) for leaf in leaves if (address := number(leaf)) >= 0]


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sound(network: Network, wanted: str) -> int:
    address, subnet = number(wanted), network.subnet
    if address not in subnet or address in (subnet.first, subnet.last):
        raise ConfigError(f"--ip {wanted} is no address of network {network.name}, {subnet}",
                          f"for example {text(subnet.first + 10)}")
    if address == network.gateway:
        raise ConfigError(f"--ip {wanted} is the gateway of network {network.name}", "take another one")
    return address


def dns_name(name: str) -> str:
    """`name` as it is looked for: lower case, of labels that DNS and a file system take."""
    lower = name.lower()
    if len(lower) > 253 or not all(
            0 < len(label) < 64 and all(character.isascii() and (character.isalnum() or character in "_-")
                                        for character in label) for label in lower.split(".")):
        raise ConfigError(f"{name!r} can't be a name in a network",
                          "letters, digits, - and _, in parts of at most 63 with dots between them")
    return lower
