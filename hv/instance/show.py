"""What `pyhv ps` says of an instance, and whether a filter has it. Driven by tests/root/test_instance_list.py."""

from __future__ import annotations

__all__ = ["COLUMNS", "matches", "published", "row_of", "status_text"]

from hv.errors import HvError
from hv.instance.names import SHORT
from hv.instance.networking import uses_networks
from hv.instance.record import CREATED, EXITED, PAUSED, RESTARTING, RUNNING
from hv.instance.times import ago, lasted, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.instance.record import Instance
    from hv.network.shape import Port

COLUMNS = (("ID", "ID"), ("Image", "IMAGE"), ("Command", "COMMAND"), ("RunningFor", "CREATED"), ("Status", "STATUS"),
           ("Ports", "PORTS"), ("Kind", "KIND"), ("Names", "NAMES"))
_COMMAND_MOST = 20


def status_text(instance: Instance) -> str:
    """Up 3 minutes (Paused), Exited (1) 2 hours ago, ..."""
    from time import time

    status, state = instance.status(), instance.state
    try:
        length = lasted(max(time() - seconds(str(state.get("started", ""))), 0))
    except ValueError:
        length = ""
    if status in (RUNNING, PAUSED):
        return f"Up {length}" + (" (Paused)" if status == PAUSED else "")
    if status == CREATED:
        return "Created"
    code = "unknown" if state.get("unknown") or state.get("status") != EXITED else str(instance.exit_code)
    if status == RESTARTING:
        return f"Restarting ({state.get('exit_code')}) {ago(str(state.get('finished', '')))}"
    return f"Exited ({code}) {ago(str(state.get('finished', '')))}".rstrip()


def row_of(instance: Instance, *, full: bool = False) -> dict[str, str]:
    """One line of `ps`."""
    from hv.instance.bundle import command_of

    settings = instance.settings
    try:
        command = " ".join(command_of(settings, instance.image))
    except HvError:
        command = ""
    if not full and len(command) > _COMMAND_MOST:
        command = command[:_COMMAND_MOST - 1] + "…"
    image = str(instance.image.get("name") or instance.image.get("id", ""))
    return {"ID": instance.id if full else instance.id[:SHORT], "Image": familiar(image), "Command": f'"{command}"',
            "CreatedAt": str(instance.about.get("created", "")),
            "RunningFor": ago(str(instance.about.get("created", ""))), "Status": status_text(instance),
            "State": instance.status(), "Kind": settings.kind, "Names": instance.name,
            "Ports": ", ".join(f"{port.address}:{port.host}->{port.inner}/{port.protocol}"
                               for port in published(instance)),
            "Labels": ",".join(f"{name}={value}" for name, value in labels_of(instance).items())}


def familiar(name: str) -> str:
    """An image's name as people write it."""
    return name.removeprefix("docker.io/").removeprefix("library/").removesuffix(":latest")


def labels_of(instance: Instance) -> dict[str, str]:
    """The image's and its own."""
    return dict(instance.image.get("labels") or {}) | instance.settings.labels


def published(instance: Instance) -> list[Port]:
    """Its ports on the host, while it runs."""
    settings = instance.settings
    if not (settings.publish or settings.publish_all) or not instance.running or not uses_networks(instance):
        return []
    from hv.network.networks import Networks

    return list(Networks().published(instance.id))


def matches(instance: Instance, filters: list[tuple[str, str]]) -> bool:
    """Whether it is among those that are looked for: of one kind of filter any must hold, of several kinds each."""
    kinds: dict[str, list[bool]] = {}
    for key, value in filters:
        kinds.setdefault(key, []).append(_matches(instance, key, value))
    return all(all(found) if key == "label" else any(found) for key, found in kinds.items())


def _matches(instance: Instance, key: str, value: str) -> bool:
    settings = instance.settings
    if key == "name":
        return value in instance.name
    if key == "id":
        return instance.id.startswith(value)
    if key == "status":
        return instance.status() == value
    if key == "kind":
        return settings.kind == value
    if key == "exited":
        return instance.status() == EXITED and str(instance.exit_code) == value
    if key == "ancestor":
        image = instance.image
        return value in (image.get("id"), image.get("name"), familiar(str(image.get("name", "")))) \
            or str(image.get("id", "")).removeprefix("sha256:").startswith(value) \
            or familiar(str(image.get("name", ""))).partition(":")[0] == value
    if key == "network":
        return value in (settings.networks or ["pyhv"])
    if key == "volume":
        return any(value in (row.get("source"), row.get("target")) for row in settings.mounts)
    name, equals, wanted = value.partition("=")
    labels = labels_of(instance)
    return name in labels and (not equals or labels[name] == wanted)


__all__ += ["familiar", "labels_of"]
