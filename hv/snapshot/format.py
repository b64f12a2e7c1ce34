"""A snapshot on disk: a folder of a few plain files.

    NAME/
        state.json      one header line, then JSON: registers, devices, configuration, what the host must have
        memory          guest RAM, its ranges one behind the other; a hole is zero pages
        memory.sums     a checksum of each MiB of `memory`
        disks/          what the guest wrote to overlays (hv/snapshot/disks.py)

    pyhv-snapshot 1 <blake2b of what follows, 64 hexadecimal digits>
    {"version": 1, "id": ..., "config": ..., "vcpus": [...], ...}

Bytes stand in the JSON as {"base64": "..."}. The folder is written under another name and renamed when everything is
on disk: a snapshot is there as a whole or not at all. Version 1 is the only one so far; a later pyhv opens the versions
in VERSIONS or says which pyhv wrote it. Nothing of a snapshot is trusted: who uses a field checks it.
Driven by tests/unit/test_snapshot_format.py.
"""

from __future__ import annotations

__all__ = [
    "MEMORY", "STATE_MOST", "SUMS", "VERSION", "Snapshot", "checksum", "decode", "encode", "is_name", "store_folder",
    "write_state",
]

import os
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

from hv.errors import ConfigError, SnapshotError
from hv.memory.layout import PAGE_SIZE
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAGIC = b"pyhv-snapshot"
VERSION, VERSIONS = 1, (1,)
STATE, MEMORY, SUMS, DISKS = "state.json", "memory", "memory.sums", "disks"
STATE_MOST = 64 << 20           # bytes of state.json: a machine of 64 processors with devices takes less than 2 MiB
_HEADER_MOST = 256
_NAME_MOST = 64
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class Snapshot:
    """An opened snapshot: `folder`, and `state`, whose checksum was right."""

    def __init__(self, folder: str, state: dict[str, Any] | None = None) -> None:
        """Read the state, unless it came by another way. SnapshotError where there is none, or a damaged one."""
        self.folder = folder
        self.state: dict[str, Any] = _read(folder) if state is None else state

    @property
    def memory_path(self) -> str:
        """Where guest RAM is."""
        return f"{self.folder}/{MEMORY}"

    def part(self, *path: str | int, kind: type = dict) -> Any:
        """The value at `path` of the state, of the type `kind`. SnapshotError names it where it is not so."""
        value: Any = self.state
        for step in path:
            try:
                value = value[step]
            except (LookupError, TypeError):
                raise SnapshotError(field(path), "is missing", "take the snapshot again") from None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise SnapshotError(field(path), f"is of type {type(value).__name__}, not {kind.__name__}",
                                "the file was made by something else, or by hand")
        return value

    def number(self, *path: str | int, low: int = 0, high: int) -> int:
        """The whole number at `path`, from `low` to `high`."""
        value: int = self.part(*path, kind=int)
        if not low <= value <= high:
            raise SnapshotError(field(path), f"{value} is outside {low} to {high}", "the state is damaged or hostile")
        return value


    def runs(self, name: str, size: int) -> list[tuple[int, int]]:
        """The runs of pages in the field `name`, [[first, end], ...], as bytes of `size` bytes of RAM."""
        runs = []
        last = 0
        for index, run in enumerate(self.part(name, kind=list)):
            if not isinstance(run, list) or len(run) != 2 or not all(type(number) is int for number in run) \
                    or not last <= run[0] < run[1] <= size // PAGE_SIZE:
                raise SnapshotError(f"{name}[{index}]", f"{run!r:.60} is no run of pages of {size} bytes, behind the "
                                    "last", "the state is damaged or hostile")
            last = run[1]
            runs.append((run[0] * PAGE_SIZE, run[1] * PAGE_SIZE))
        return runs


def field(path: tuple[str | int, ...]) -> str:
    """How messages name a field: vcpus[0].regs."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def checksum(data: bytes | memoryview) -> str:
    """blake2b of 256 bits, in hexadecimal."""
    return _hash(data).hex()


def write_state(folder: str, state: dict[str, Any]) -> None:
    """state.json of `state`, whose values are plain data and bytes; on disk when this returns."""
    body = encode(state)
    data = b"%s %d %s\n%s" % (MAGIC, VERSION, checksum(body).encode(), body)
    with open(f"{folder}/{STATE}", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def store_folder(name: str, store: str | None = None) -> str:
    """Where the snapshot `name` is or will be; a name with a slash is a path. ConfigError for what is neither."""
    if "/" in name:
        return os.path.abspath(name)
    if not is_name(name):
        raise ConfigError(f"{name!r} can't be the name of a snapshot",
                          f"up to {_NAME_MOST} letters, digits and . _ -, or a path with a slash")
    return f"{store or default_store()}/{name}"


def default_store() -> str:
    """Where snapshots are kept: root's under /var/lib, a user's under XDG_DATA_HOME."""
    if os.geteuid() == 0:
        return "/var/lib/pyhv/snapshots"
    home = os.environ.get("XDG_DATA_HOME") or f"{os.path.expanduser('~')}/.local/share"
    return f"{home}/pyhv/snapshots"


def is_name(name: str) -> bool:
    """Whether `name` may name a snapshot in a store."""
    return 0 < len(name) <= _NAME_MOST and _LETTERS.issuperset(name) and name[0] not in ".-"


def _read(folder: str) -> dict[str, Any]:
    try:
        with open(f"{folder}/{STATE}", "rb") as file:
            header = file.readline(_HEADER_MOST)
            body = file.read(STATE_MOST + 1)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise SnapshotError(STATE, f"there is no snapshot in {folder}",
                                "`pyhv snapshot ls` shows those there are") from None
        raise SnapshotError(STATE, f"{folder}: {os.strerror(error.errno or 0)}", "it can't be read") from None
    words = header.split()
    if len(words) != 3 or words[0] != MAGIC or not words[1].isdigit():
        raise SnapshotError(STATE, "does not begin as a snapshot of pyhv's does", f"is {folder} one?")
    if int(words[1]) not in VERSIONS:
        raise SnapshotError(STATE, f"is of version {int(words[1])}, this pyhv knows {VERSIONS}",
                            "use the pyhv that wrote it, or a newer one")
    if len(body) > STATE_MOST:
        raise SnapshotError(STATE, f"is larger than {STATE_MOST >> 20} MiB", "no snapshot is")
    if checksum(body).encode() != words[2]:
        raise SnapshotError(STATE, "its checksum is wrong", "it is damaged: take the snapshot again")
    state = decode(body, STATE)
    if state.get("version") != int(words[1]):
        raise SnapshotError("version", "does not match the header", "the state is damaged or hostile")
    return state


def encode(state: dict[str, Any]) -> bytes:
    """Plain data and bytes as JSON."""
    return dumps(_plain(state), indent=1).encode()


def decode(body: bytes, where: str) -> dict[str, Any]:
    """The way back. SnapshotError, with `where` as the field."""
    try:
        state = loads(body.decode(), _bytes)
    except (ValueError, UnicodeDecodeError) as error:
        raise SnapshotError(where, str(error), "the state is damaged or hostile") from None
    if not isinstance(state, dict):
        raise SnapshotError(where, "is no object", "the state is damaged or hostile")
    return state


def _bytes(value: dict[str, Any]) -> Any:
    if len(value) == 1 and isinstance(text := value.get("base64"), str):
        try:
            return a2b_base64(text, strict_mode=True)
        except (Base64Error, ValueError) as error:
            raise ValueError(f"base64: {error}") from None
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return {"base64": b2a_base64(value, newline=False).decode()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _hash(data: bytes | memoryview) -> bytes:
    from _blake2 import blake2b  # hashlib brings OpenSSL along, which takes 5 ms

    return blake2b(data, digest_size=32).digest()
