"""Other files, taps and sockets in a recipe, for a machine that is made from one a second time.

    with_changes    what the user names: another image for disk 1, another tap for card 0
    for_clone       what can't be had twice, for a machine that runs beside the one it was copied from:

    vsock, port     SOCKET or FILE becomes SOCKET.N; where that is too long for a socket, there is no host side
    net             a new tap whose name nobody chose is made again, a `user` network without its forwards; of a named
                    tap, one with an address, and a pair, the cable is unplugged: the guest sees the link go down
    disk, share     as they are: hv/snapshot/disks.py gives each clone an overlay, and a folder may have many users

The guest knows its MAC address, its disks' sizes, the names of its ports, and how many devices there are: these stay.
Driven by tests/unit/test_recipe.py.
"""

from __future__ import annotations

__all__ = ["for_clone", "with_changes"]

import os

from hv.errors import ConfigError
from hv.machine.recipe import checked, class_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Recipe = dict[str, Any]
    Changes = dict[int, dict[str, Any]] | None

# device -> the arguments of its configuration that may be others
CHANGEABLE = {
    "disk": ("path", "overlay", "direct", "iops", "bps"),
    "net": ("kind", "tap", "pair", "address", "forward", "rate"),
    "vsock": ("socket", "cid"),
    "share": ("directory",),
}
CABLE = ("kind", "tap", "pair", "vhost_user", "address", "forward")     # replaced together: they name one thing
SOCKET_MOST = 107 - len("_4294967294")      # hv/devices/virtio/vsock_unix.py: sun_path, and the port behind it
NOWHERE = "file=/dev/null"


def with_changes(recipe: Recipe, *, disks: Changes = None, nets: Changes = None, shares: Changes = None,
                 vsock: dict[str, Any] | None = None, ports: dict[str, str] | None = None) -> Recipe:
    """A recipe with other arguments for devices, each by its number among its kind, a port by its name.

    `disks={1: {"path": "other.img"}}`, `nets={0: {"tap": "tap7"}}`, `ports={"agent": "socket=a.sock"}`. ConfigError
    where there is no such device, or it can't be changed so. `recipe` is not trusted.
    """
    changed = checked(recipe)
    asked: list[tuple[str, Changes]] = [("disk", disks), ("net", nets), ("share", shares),
                                        ("vsock", None if vsock is None else {0: vsock})]
    for kind, changes in asked:
        for number, values in (changes or {}).items():
            entries = [entry for entry in changed["devices"] if entry["device"] == kind]
            if not 0 <= number < len(entries):
                raise ConfigError(f"--{kind}: the machine has no {kind} {number}",
                                  f"it has {len(entries)}, counted from 0" if entries else "it can't get one now")
            _change(kind, entries[number], values)
    for name, place in (ports or {}).items():
        _change_port(changed["devices"], name, place)
    return changed


def _change(kind: str, entry: Recipe, values: dict[str, Any]) -> None:
    """Put `values` into `entry`, as its class understands them."""
    allowed = CHANGEABLE[kind]
    for name in values:
        if name not in allowed:
            raise ConfigError(f"--{kind}: {name.replace('_', '-')} can't be another than the guest knows",
                              f"what may change: {', '.join(allowed)}")
    arguments = {name: value for name, value in entry.items() if name != "device"}
    if kind == "net" and not values.keys().isdisjoint(CABLE):
        arguments |= dict.fromkeys(CABLE)
    try:
        made = class_of(kind)(**arguments | values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--{kind}: {error}", "see docs/snapshots.md") from None
    entry.update(made.recipe())


def _change_port(entries: list[Recipe], name: str, place: str) -> None:
    for entry in entries:
        if entry["device"] != "console":
            continue
        ports = list(entry.get("ports", ()))
        for number, text in enumerate(ports):
            if text.partition(",")[0] == name:
                ports[number] = f"{name},{place}"
                entry.update(class_of("console")(entry.get("guest", True), tuple(ports)).recipe())
                return
    raise ConfigError(f"--port: the machine has no port {name}", "a port's name stays, its socket or file may change")


def for_clone(recipe: Recipe, number: int) -> Recipe:
    """The recipe of clone `number`, which may run beside the machine that the recipe was made of, and other clones.

    `recipe` is not trusted: ConfigError.
    """
    clone = checked(recipe)
    for entry in clone["devices"]:
        kind = entry["device"]
        if kind == "vsock" and entry.get("socket"):
            entry["socket"] = _own_path(entry["socket"], number)
        elif kind == "console":
            entry["ports"] = [_own_port(text, number) for text in entry.get("ports", ())]
        elif kind == "net":
            if entry.get("tap") or entry.get("address") or entry.get("pair"):
                entry.update({**dict.fromkeys(CABLE), "kind": "none"})
            entry["forward"] = None
    return clone


def _own_port(text: str, number: int) -> str:
    name, _, place = text.partition(",")
    kind, _, path = place.partition("=")
    if path == "/dev/null":
        return text
    own = _own_path(path, number) if kind == "socket" else f"{path}.{number}"
    return f"{name},{kind}={own}" if own else f"{name},{NOWHERE}"


def _own_path(path: str, number: int) -> str | None:
    """The socket of a clone; None where its path would be too long."""
    own = f"{path}.{number}"
    return own if len(os.fsencode(own)) <= SOCKET_MOST else None
