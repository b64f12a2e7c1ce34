"""An instance's networks, as hv/network makes them; `none` costs nothing of that room.

Driven by tests/root/test_instance_network.py.
"""

from __future__ import annotations

__all__ = ["join", "part", "uses_networks"]

from hv.errors import ConfigError, StateError
from hv.instance.settings import VM
from hv.places import rootless

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.instance.record import Instance
    from hv.network.shape import Attachment

_DEFAULT = ["pyhv"]             # hv/network/networks.py, DEFAULT


def _names(instance: Instance) -> list[str]:
    return instance.settings.networks or _DEFAULT


def uses_networks(instance: Instance) -> bool:
    """Whether anything of it is in hv/network's hands."""
    first = _names(instance)[0]
    return first not in ("none", "host") and not first.startswith("container:")


def join(instance: Instance, hostname: str) -> tuple[str, Attachment | None]:
    """The path of its network namespace ("": one of its own without anything; "host"), what its networks told."""
    settings = instance.settings
    first = _names(instance)[0]
    if first == "none" and not (settings.dns or settings.add_host):
        return "", None
    from hv.network.networks import Networks

    networks = Networks()
    common = {"name": instance.name, "hostname": hostname, "dns": settings.dns, "search": settings.dns_search,
              "hosts": settings.add_host, "vm": settings.kind == VM}
    if first == "none":
        return "", networks.attach(["none"], instance.id, **common)       # type: ignore[arg-type]
    if first == "host":
        return "host", networks.attach(["host"], instance.id, **common)   # type: ignore[arg-type]
    if first.startswith("container:"):
        other = _other(first.partition(":")[2])
        return f"/proc/{other.program()}/ns/net", networks.attach(
            [f"container:{other.id}"], instance.id, **common)             # type: ignore[arg-type]
    from hv.linux.netns import new_netns, new_netns_of_user

    # held until this process becomes the holder: the program is in it by then
    netns = new_netns_of_user() if rootless() else new_netns()
    ports = _ports(instance)
    attachment = networks.attach(_names(instance), instance.id, netns=netns.path, aliases=settings.aliases,
                                 ports=ports, ip=settings.ip, mac=settings.mac, **common)    # type: ignore[arg-type]
    return netns.path, attachment


def _ports(instance: Instance) -> list[object]:
    settings = instance.settings
    wanted = list(settings.publish)
    if settings.publish_all:
        wanted += list(instance.image.get("exposed_ports") or ())
    if not wanted:
        return []
    from hv.network.ports import parse_publish

    return list(parse_publish(wanted))


def _other(text: str) -> Instance:
    from hv.instance.records import find

    other = find(text)
    if other.kind == VM:
        raise ConfigError(f"--network container:{text}: it is a VM, whose network is inside it")
    if not other.running:
        raise StateError(f"--network container:{text}: it is not running")
    return other


def part(instance: Instance) -> None:
    """Give back what join() made; nothing to do is no error."""
    if uses_networks(instance):
        from hv.network.networks import Networks

        Networks().detach(instance.id, netns_ends=True)
