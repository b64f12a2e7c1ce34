"""A machine's configuration as plain data, and back: what a snapshot keeps to make an equal machine.

    recipe_of(config)   {"memory": ..., "cpus": ..., "devices": [{"device": "disk", "path": ..., ...}, ...], ...}
    machine_recipe(m)   the same, with what was only decided when the machine was built
    config_from(recipe) the configuration; the recipe is not trusted
Plain data is str, int, bool, None, list, and dict with str keys. A device's configuration says by FIELDS what its
constructor takes, and by recipe() what it was given; paths are absolute. A kernel or initrd given as bytes is not kept,
only its size and checksum: a restored machine has in its memory what it needs of it. Other files and sockets are put
into a recipe by hv/machine/recipe_change.py. Driven by tests/unit/test_recipe.py.
"""

from __future__ import annotations

__all__ = ["check_fields", "checked", "class_of", "config_from", "machine_recipe", "recipe_of", "why_not_snapshot"]

import os

from hv.errors import ConfigError
from hv.machine.config import MachineConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from hv.machine.config import DeviceConfig
    from hv.machine.machine import Machine

    Recipe = dict[str, Any]
    Fields = tuple[tuple[str, str], ...]

# kind of a device -> its configuration's class
KINDS = {
    "disk": "hv.devices.virtio.blk_config:DiskConfig",
    "net": "hv.devices.virtio.net_config:NetConfig",
    "console": "hv.devices.virtio.console_config:ConsoleConfig",
    "rng": "hv.devices.virtio.rng:RngConfig",
    "balloon": "hv.devices.virtio.balloon:BalloonConfig",
    "vsock": "hv.devices.virtio.vsock_config:VsockConfig",
    "share": "hv.devices.virtio.fs_config:ShareConfig",
    "own": "hv.machine.own_device:OwnConfig",
}
FIELDS: Fields = (
    ("kernel", "source"), ("initrd", "source"), ("cmdline", "text?"), ("raw_cmdline", "flag"), ("memory", "number"),
    ("cpus", "number"), ("modules", "modules"), ("boot_protocol", "text?"), ("backing", "text"), ("huge", "text"),
    ("ksm", "flag"), ("prefault", "flag"), ("softkvm", "text"), ("debug_exit", "number?"), ("timeout", "text?"),
    ("acpi", "flag"), ("transport", "text"), ("devices", "devices"), ("dirty_ring", "number"),
)
DEVICES_MOST = 1024             # more than fit behind any transport (hv/machine/attach.py, MMIO_MOST)
_TEXT_MOST = 8 << 10            # characters: a command line has 2048 bytes, a path 4096
_SAID_MOST = 300                # characters of an error, which may repeat a text
_LIST_MOST = 1024
_HINT = "the recipe is damaged, or was made by hand"


def recipe_of(config: MachineConfig) -> Recipe:
    """All that it takes to make `config` again. ConfigError for a device that can't say what it is."""
    recipe: Recipe = {name: getattr(config, name) for name, _ in FIELDS}
    for name in ("kernel", "initrd"):
        recipe[name] = _source(recipe[name], name)
    recipe["modules"] = [[os.path.abspath(path), words] for path, words in config.modules]
    recipe["timeout"] = None if config.timeout is None else repr(float(config.timeout))
    recipe["devices"] = [_device_recipe(device, number) for number, device in enumerate(config.devices)]
    return recipe


def machine_recipe(machine: Machine) -> Recipe:
    """As recipe_of, with what the guest knows already and a new machine must not decide anew."""
    recipe = recipe_of(machine.config)
    recipe["transport"] = machine.transport
    recipe["softkvm"] = "off" if machine.softkvm is None else "on"
    for entry, device in zip(recipe["devices"], machine.devices.values(), strict=True):
        if entry["device"] == "net":
            entry["mac"] = getattr(device, "mac", b"").hex(":") or entry["mac"]     # derived from its cable's name
    return recipe


def config_from(recipe: object, *, allowed: Collection[str] = ()) -> MachineConfig:
    """The configuration that `recipe` describes. Untrusted: ConfigError names the field.

    Devices of the user's own are code that would run: only those whose place is in `allowed` are made.
    """
    values = checked(recipe)
    entries = values.pop("devices")
    for name in ("kernel", "initrd"):
        if isinstance(values.get(name), dict):
            values[name] = None
    values["modules"] = tuple((path, words) for path, words in values.get("modules", ()))
    if (text := values.get("timeout")) is not None:
        values["timeout"] = _seconds(text)
    devices = tuple(_device_from(entry, number, allowed) for number, entry in enumerate(entries))
    try:
        return MachineConfig(values.pop("kernel", None), **values, devices=devices)
    except ConfigError as error:
        raise ConfigError(f"recipe: {str(error)[:_SAID_MOST]}", error.hint) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"recipe: {str(error)[:_SAID_MOST]}", _HINT) from None


def why_not_snapshot(config: MachineConfig) -> str | None:
    """Why a machine of this configuration can't be kept in a snapshot; None where it can."""
    for number, device in enumerate(config.devices):
        kind = kind_of(device)
        what = f"device {number} ({kind or type(device).__name__})"
        if socket := getattr(device, "vhost_user", None):
            return f"{what} is served by another program, at {socket}, whose state stays there"
        if kind is None:
            return f"{what} can't be made again from data: give it as OwnConfig (hv/machine/own_device.py)"
    return None


def checked(recipe: object) -> Recipe:
    """A copy of `recipe` whose fields all have their form; `devices` is there. ConfigError names what is not so."""
    values = dict(check_fields(recipe, FIELDS, "recipe"))
    devices = []
    for number, entry in enumerate(values.get("devices", [])):
        where = f"recipe.devices[{number}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: is of type {type(entry).__name__}, not a device", _HINT)
        kind = entry.get("device")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ConfigError(f"{where}.device: {repr(kind)[:80]} is no device", f"known are {', '.join(KINDS)}")
        rest = {name: value for name, value in entry.items() if name != "device"}
        devices.append({"device": kind, **check_fields(rest, class_of(kind).FIELDS, where)})
    return {**values, "devices": devices}


def _device_from(entry: Recipe, number: int, allowed: Collection[str]) -> DeviceConfig:
    """The configuration of one device, whose fields are checked."""
    arguments = dict(entry)
    kind = arguments.pop("device")
    where = f"recipe.devices[{number}] ({kind})"
    if kind == "own" and not _is_allowed(arguments.get("place"), allowed):
        raise ConfigError(f"{where}: {arguments.get('place')} is a program that would run here",
                          "if you trust it, name it: --device PLACE, or `allowed` from Python")
    try:
        return class_of(kind)(**arguments)  # type: ignore[no-any-return]
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error)[:_SAID_MOST]}", error.hint) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {str(error)[:_SAID_MOST]}", _HINT) from None


def _is_allowed(place: object, allowed: Collection[str]) -> bool:
    if not allowed:
        return False
    from hv.machine.own_device import absolute

    return place in {absolute(known) for known in allowed}


def class_of(kind: str) -> Any:
    """The configuration class of a kind, loaded now."""
    module, _, name = KINDS[kind].partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


def kind_of(device: object) -> str | None:
    """The kind of a configuration; None where it is none of ours. Loads nothing."""
    place = f"{type(device).__module__}:{type(device).__qualname__}"
    return next((kind for kind, known in KINDS.items() if known == place), None)


def check_fields(values: object, fields: Fields, where: str) -> Recipe:
    """`values` where they are a dict of nothing but `fields`, each of its form. ConfigError names what is not so."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: is of type {type(values).__name__}, not a dict", _HINT)
    forms = dict(fields)
    for name, value in values.items():
        if name not in forms:
            raise ConfigError(f"{where}.{str(name)[:80]}: no such field", f"known are {', '.join(forms) or 'none'}")
        if not _fits(value, forms[name]):
            raise ConfigError(f"{where}.{name}: {repr(value)[:80]} is no {forms[name].rstrip('?')}", _HINT)
    return values


def _fits(value: object, form: str) -> bool:
    """Whether a value has the form that FIELDS names; `?` behind it allows None."""
    if value is None:
        return form.endswith("?") or form == "source"
    match form.rstrip("?"):
        case "text":
            return _is_text(value)
        case "flag":
            return isinstance(value, bool)
        case "number":
            return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
        case "texts":
            return isinstance(value, list) and len(value) <= _LIST_MOST and all(map(_is_text, value))
        case "options":
            return isinstance(value, dict) and len(value) <= _LIST_MOST and all(
                _is_text(name) and (option is True or _is_text(option)) for name, option in value.items())
        case "modules":
            return isinstance(value, list) and len(value) <= _LIST_MOST and all(
                isinstance(row, list) and len(row) == 2 and all(map(_is_text, row)) for row in value)
        case "source":
            return _is_text(value) or (isinstance(value, dict) and all(map(_is_text, value)) and all(
                isinstance(part, int) or _is_text(part) for part in value.values()))
        case _:
            return isinstance(value, list) and len(value) <= DEVICES_MOST


def _is_text(value: object) -> bool:
    """Text that may be a file's name: no NUL, and only characters that can be bytes again."""
    if not isinstance(value, str) or len(value) > _TEXT_MOST or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeError:
        return False
    return True


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ConfigError(f"recipe.timeout: {text[:80]!r} is no number of seconds", _HINT)
    return value


def _source(value: str | bytes | None, name: str) -> object:
    """A path, or of bytes what tells them from others."""
    if isinstance(value, bytes):
        from _blake2 import blake2b  # hashlib brings OpenSSL along, which takes 5 ms

        return {"name": name, "size": len(value), "blake2b": blake2b(value, digest_size=32).hexdigest()}
    if value is None or value.startswith("guest:"):
        return value
    return os.path.abspath(value)


def _device_recipe(device: DeviceConfig, number: int) -> Recipe:
    kind = kind_of(device)
    if kind is None:
        raise ConfigError(f"device {number} ({type(device).__name__}) can't be made again from data",
                          "give it as OwnConfig (hv/machine/own_device.py)")
    made: Any = device
    return {"device": kind, **made.recipe()}
