"""Where networks are kept: definitions that outlive a boot, and what is running.

    ROOT/NAME.json                  one network (hv/network/definition.py)
    RUN/lock                        held by whoever changes anything
    RUN/instances/ID.json           what an instance has: the record that removal goes by
    RUN/on/NETWORK/leases/ADDRESS   whose address it is (hv/network/leases.py)
    RUN/on/NETWORK/names/NAME/ADDRESS       read by the network's name server (hv/network/dns.py)
    RUN/on/NETWORK/dns              held by that server, its process ID inside
    RUN/ports/PROTOCOL-PORT-ADDRESS         whose port of the host it is (hv/network/publish.py)

A file for each fact: what an instance costs does not grow with their number, and a name server need not be told.
Driven by tests/unit/test_network_store.py.
"""

from __future__ import annotations

__all__ = ["Store", "check_id"]

import os
from errno import EACCES, EDQUOT, ENOSPC
from fcntl import LOCK_EX, flock

from hv.errors import ConfigError, NetworkError
from hv.network.definition import Network
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Record = dict[str, Any]

_MOST = 1 << 20         # bytes of one of our files


class Store:
    """The two folders. `with store: ...` holds the lock."""

    def __init__(self, root: str, run: str) -> None:
        self.root, self.run = root, run
        self._lock = -1

    def __enter__(self) -> Store:
        try:
            os.makedirs(self.run, 0o700, exist_ok=True)
            fd = os.open(self.run + "/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._said(error) from None
        try:
            flock(fd, LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
        self._lock = fd
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self._lock)
        self._lock = -1
        if isinstance(error, OSError):
            raise self._said(error) from None

    def _said(self, error: OSError) -> NetworkError:
        hint = {ENOSPC: "free space", EDQUOT: "free space", EACCES: "networks need root"}.get(error.errno or 0, "")
        return NetworkError(f"networks: {error.filename or self.run}: {os.strerror(error.errno or 0)}", hint)

    # networks ----------------------------------------------------------------------------------------

    def networks(self) -> list[Network]:
        """All definitions, by name."""
        names = sorted(leaf[:-5] for leaf in _listed(self.root) if leaf.endswith(".json"))
        return [network for name in names if (network := self.find(name)) is not None]

    def find(self, name: str) -> Network | None:
        """The definition of that name."""
        data = self._read(f"{self.root}/{name}.json")
        return Network.load(name, data) if data is not None else None

    def network(self, name: str) -> Network:
        """By name, or by the beginning of its ID. NetworkError where there is none."""
        if "/" not in name and name and (found := self.find(name)) is not None:
            return found
        matching = [network for network in self.networks() if len(name) > 3 and network.id.startswith(name)]
        if len(matching) != 1:
            raise NetworkError(f"no network {name!r}" if not matching else f"{name} is the beginning of several IDs",
                               "`pyhv network ls` lists them, `pyhv network create NAME` makes one")
        return matching[0]

    def keep(self, network: Network) -> None:
        """Write a definition, for good."""
        os.makedirs(self.root, 0o700, exist_ok=True)
        self._write(f"{self.root}/{network.name}.json", dumps(network.plain(), 2) + "\n", lasting=True)

    def forget(self, network: Network) -> None:
        """Remove a definition."""
        _unlink(f"{self.root}/{network.name}.json")

    def on(self, network: str) -> str:
        """The folder of what is running on a network."""
        return f"{self.run}/on/{network}"

    def clear(self, network: Network) -> None:
        """Remove the folder of what was running on a network."""
        for folder in ("names", "leases", ""):
            path = f"{self.on(network.name)}/{folder}".rstrip("/")
            for leaf in _listed(path):
                try:
                    os.rmdir(f"{path}/{leaf}") if folder == "names" else os.unlink(f"{path}/{leaf}")
                except OSError:
                    pass        # a name that a crash left with an address in it goes with the next sweep
            try:
                os.rmdir(path)
            except OSError:
                pass

    # records -----------------------------------------------------------------------------------------

    def record(self, instance: str) -> Record | None:
        """What an instance has."""
        data = self._read(f"{self.run}/instances/{check_id(instance)}.json")
        if data is None:
            return None
        return data if _is_record(data) else {"id": instance, "name": "", "netns": "", "endpoints": [], "ports": []}

    def tidy(self) -> None:
        """Remove files that a crash left half written. With the lock held."""
        for folder in (self.root, self.run + "/instances"):
            for leaf in _listed(folder):
                if leaf.endswith(".json~"):
                    _unlink(f"{folder}/{leaf}")

    def instances(self) -> list[str]:
        """IDs of all that have one."""
        return sorted(leaf[:-5] for leaf in _listed(self.run + "/instances") if leaf.endswith(".json"))

    def records(self) -> list[Record]:
        """All of them."""
        return [record for instance in self.instances() if (record := self.record(instance)) is not None]

    def save(self, record: Record) -> None:
        """Write one."""
        path = f"{self.run}/instances/{record['id']}.json"
        try:
            self._write(path, dumps(record))
        except FileNotFoundError:
            os.makedirs(self.run + "/instances", 0o700, exist_ok=True)
            self._write(path, dumps(record))

    def drop(self, instance: str) -> None:
        """Remove one."""
        _unlink(f"{self.run}/instances/{instance}.json")

    # files -------------------------------------------------------------------------------------------

    def _read(self, path: str) -> Record | None:
        """The object in a file of ours; None where there is no file, {} where it holds none."""
        try:
            with open(path, "rb", 0) as file:
                value = loads(file.read(_MOST).decode())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self, path: str, text: str, lasting: bool = False) -> None:
        temporary = path + "~"      # one writer at a time: it has the lock
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                data = memoryview(text.encode())
                while data:
                    data = data[os.write(fd, data):]
                if lasting:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            _unlink(temporary)
            raise


def _is_record(data: Record) -> bool:
    return (all(isinstance(data.get(key), str) for key in ("id", "name", "netns"))
            and all(isinstance(data.get(key), list) for key in ("endpoints", "ports")))


def check_id(instance: str) -> str:
    """`instance` where it may be the name of a file."""
    if not instance or instance[0] == "." or len(instance) > 128 or not all(
            character.isascii() and (character.isalnum() or character in "_.-") for character in instance):
        raise ConfigError(f"{instance!r} is no ID of an instance", "letters, digits, - _ and . make one")
    return instance


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
