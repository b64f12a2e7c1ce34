"""Clones that are not each other: what makes machines of one snapshot distinct, on the host and for their guests.

    distinct     before a clone is built: its configuration has another MAC address for each card, another CID, sockets
                 of its own
    introduce    once it runs: its guest is told of these, and given random numbers, time, a name, an address

The kernel of a guest with ACPI reseeds by itself (hv/snapshot/vmgenid.py); the rest takes the guest's agent.
What differs, and what can't: docs/clones.md. Driven by tests/unit/test_clone.py and tests/kvm/test_clones.py.
"""

from __future__ import annotations

__all__ = ["Introduced", "clone_cid", "clone_mac", "distinct", "introduce"]

import os
from time import time_ns

from hv.errors import ConfigError
from hv.machine.recipe_change import for_clone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine
    from hv.snapshot.agent import Agent

    Recipe = dict[str, Any]

CLONES_MOST = 1 << 20           # numbers of clones
HOSTNAME_MOST = 64              # HOST_NAME_MAX
UNNAMED = "(none)"              # include/linux/uts.h, UTS_NODENAME: nobody has given it one
ENTROPY = 64                    # bytes; the kernel's pool takes 32 (drivers/char/random.c, POOL_BITS)
PATIENCE = 10.0                 # seconds, for all of it


def distinct(recipe: Recipe, index: int, of: str = "") -> Recipe:
    """The recipe of clone `index`, which differs from the original and from every other clone of it on this host.

    `of` names what it is a clone of, as a snapshot's id does: clones of snapshots of one machine differ then, too.
    `recipe` is not trusted: ConfigError.
    """
    if not 0 <= index < CLONES_MOST:
        raise ConfigError(f"clone {index}: their numbers go from 0 to {CLONES_MOST - 1}")
    clone = for_clone(recipe, index)
    cards = 0
    for entry in clone["devices"]:
        if entry["device"] == "net":
            entry["mac"] = clone_mac(of, index, cards, entry.get("mac") or "").hex(":")
            cards += 1
        elif entry["device"] == "vsock":
            entry["cid"] = clone_cid(entry.get("cid", 0), index)
    return clone


def clone_mac(of: str, index: int, card: int, original: str) -> bytes:
    """A locally administered address (IEEE 802, 8.2), with the host in it: clones on two hosts may share a network."""
    from _blake2 import blake2b

    try:
        with open("/etc/machine-id", "rb") as file:
            host = file.read(64).strip()
    except OSError:
        host = b""
    parts = b"pyhv clone", host, of.encode(), str(index).encode(), str(card).encode(), original.lower().encode()
    return b"\x02" + blake2b(b"\0".join(parts), digest_size=5).digest()


def clone_cid(original: int, index: int) -> int:
    """The CIDs that follow the original's, around the end of those there are."""
    from hv.devices.virtio.vsock_packet import CID_LEAST, CID_MOST

    return CID_LEAST + (original - CID_LEAST + 1 + index) % (CID_MOST - CID_LEAST + 1)


class Introduced:
    """What a guest was told: whether it has an `agent`, commands that were `done`, that `failed` with the reason."""

    __slots__ = ("agent", "done", "failed")

    def __init__(self) -> None:
        self.agent = True
        self.done: list[str] = []
        self.failed: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Introduced(agent={self.agent}, done={self.done}, failed={self.failed})"


def introduce(machine: Machine, index: int, *, hostname: str | None = None, address: str | None = None,
              gateway: str | None = None, clock: bool = True, timeout: float = PATIENCE) -> Introduced:
    """Tell the guest of a running clone who it is. Not from the machine's I/O thread; takes some round trips.

    Random numbers first, then the time (with `clock`), its `hostname` (None: the one it has with -INDEX behind it; "":
    as it is), the new address of each card, and for the first card `address`, A.B.C.D/P, with `gateway`. ConfigError
    where these are none. A guest without an agent is no error: the answer says so.
    """
    from hv.snapshot.agent import Agent, NoAgentError  # most clones have none

    check_address(address, gateway)
    told = Introduced()
    try:
        with Agent(machine) as agent:
            _tell(machine, agent, told, index, hostname, address, gateway, clock, timeout)
    except NoAgentError as error:
        told.agent = bool(told.done)
        told.failed["agent"] = str(error)
    return told


def _tell(machine: Machine, agent: Agent, told: Introduced, index: int, hostname: str | None, address: str | None,
          gateway: str | None, clock: bool, timeout: float) -> None:
    from time import monotonic

    from hv.snapshot.agent import RefusedError

    end = monotonic() + timeout

    def ask(*words: str) -> str | None:
        try:
            answer = agent.ask(*words, timeout=max(0.01, end - monotonic()))
        except RefusedError as error:
            told.failed[words[0]] = str(error)
            return None
        if words[0] not in told.done:
            told.done.append(words[0])
        return answer

    ask("entropy", os.urandom(ENTROPY).hex())
    if clock:
        now = time_ns()
        ask("time", f"{now // 1_000_000_000}.{now % 1_000_000_000:09}")
    if hostname is None:
        suffix = f"-{index}"
        name = ask("hostname")
        if name == UNNAMED:
            name = "guest"
        hostname = f"{name[:HOSTNAME_MOST - len(suffix)]}{suffix}" if name else ""
    if hostname:
        ask("hostname", hostname)
    cards = _cards(machine)
    for card in cards:
        if card.mac != card.guest_mac and ask("mac", card.guest_mac.hex(":"), card.mac.hex(":")) is not None:
            card.guest_mac = card.mac
    if address is not None:
        if cards:
            ask("address", cards[0].guest_mac.hex(":"), address, *([gateway] if gateway else []))
        else:
            told.failed["address"] = "the machine has no network card"


def check_address(address: str | None, gateway: str | None) -> None:
    """ConfigError for what is no IPv4 address."""
    from hv.devices.virtio.net_config import parse_address

    if address is None and gateway is not None:
        raise ConfigError(f"gateway {gateway} without an address", "give both")
    for text in (address, f"{gateway}/32" if gateway else None):
        if text is not None:
            parse_address(text)


def _cards(machine: Machine) -> list[Any]:
    """The machine's network cards, in their order."""
    from hv.devices.virtio.net import Net

    return [device for device in machine.devices.values() if isinstance(device, Net)]
