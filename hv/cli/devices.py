"""The device options of `pyhv boot`: from text to configurations. Loaded only where one is given.

Every option's text is `first,flag,key=value,...`; the first word may be missing where the device needs none. Each word
becomes an argument of the configuration's class: numbers and sizes stay text, the class knows its units.
"""

from __future__ import annotations

__all__ = ["DEVICE_OPTIONS", "configurations"]

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.devices.virtio.device import VirtioDevice
    from hv.machine.config import DeviceConfig

_OWN = "see docs/adding-a-virtio-device.md"

# option -> the class whose parse(words) or constructor takes its words; in the order in which the guest finds them
DEVICE_OPTIONS = {
    "disk": "hv.devices.virtio.blk_config:DiskConfig",
    "net": "hv.devices.virtio.net_config:NetConfig",
    "console": "hv.devices.virtio.console_config:ConsoleConfig",
    "rng": "hv.devices.virtio.rng:RngConfig",
    "balloon": "hv.devices.virtio.balloon:BalloonConfig",
    "vsock": "hv.devices.virtio.vsock_config:VsockConfig",
    "share": "hv.devices.virtio.fs_config:ShareConfig",
}


def configurations(values: dict[str, Any]) -> tuple[DeviceConfig, ...]:
    """What all device options together ask for. ConfigError names the option."""
    found: list[DeviceConfig] = []
    for key, place in DEVICE_OPTIONS.items():
        given = values[key]
        texts = given if isinstance(given, list) else [] if given in (None, False) else [given]
        if key == "console":
            # Two devices: with further ports on it, Linux may have the console too late for init (docs/console.md).
            if given not in ("serial", "virtio"):
                raise ConfigError(f"--console {given}: no such console", "serial or virtio")
            if given == "virtio":
                found.append(_make("--console", place, (), {"guest": True}))
            if values["port"]:
                found.append(_make("--port", place, (), {"guest": False, "ports": tuple(values["port"])}))
            continue
        for text in texts:
            words, options = split("" if text is True else str(text))
            found.append(_make(f"--{key}", place, words, options))
    for text in values["device"]:
        name, _, rest = str(text).partition(",")
        words, options = split(rest)
        found.append(_make("--device", name, words, options))
    return tuple(found)


def split(text: str) -> tuple[tuple[str, ...], dict[str, object]]:
    """(words before the first option, options) of `word,flag,key=value`; dashes in names become underscores.

    A first word without `=` is positional; later ones are flags, True. A comma in a value is written twice.
    """
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")] if text else []
    words: list[str] = []
    options: dict[str, object] = {}
    for number, part in enumerate(parts):
        name, equals, value = part.partition("=")
        key = name.replace("-", "_")
        if not equals and number == 0:
            words.append(part)
        elif not key.isidentifier() or key in options:
            raise ConfigError(f"{text!r}: {part!r} is no option, or stands there twice", "write name or name=value")
        else:
            options[key] = value if equals else True
    return tuple(words), options


def _make(option: str, place: str, words: tuple[str, ...], options: dict[str, object]) -> DeviceConfig:
    module_name, colon, class_name = place.rpartition(":")
    if not colon:
        raise ConfigError(f"{option} {place}: not of the form FILE.py:Class or package.module:Class", _OWN)
    if module_name.endswith(".py"):
        kind = _load(option, module_name, class_name)
    else:
        try:
            kind = getattr(__import__(module_name, fromlist=[class_name]), class_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{option} {place}: {error}",
                              "a module must be installed beside pyhv; a file may be anywhere: FILE.py:Class") from None
    if not hasattr(kind, "create"):     # a device without a configuration class: its constructor takes the words
        return _Plain(option, kind, words, options)
    return _call(option, kind, words, options)  # type: ignore[no-any-return]


class _Plain:
    """The configuration of a device class that is its own."""

    def __init__(self, *what: Any) -> None:
        self._what = what

    def create(self) -> VirtioDevice:
        """The device."""
        from hv.devices.virtio.device import VirtioDevice

        option, kind, words, options = self._what
        device = _call(option, kind, words, options)
        if not isinstance(device, VirtioDevice):
            raise ConfigError(f"{option}: {kind.__name__} is neither a VirtioDevice nor has it a create()", _OWN)
        return device


def _load(option: str, path: str, name: str) -> Any:
    """Class `name` of the file at `path`. The modules beside it can be imported by it."""
    import importlib.util
    import sys
    from pathlib import Path

    file = Path(path).absolute()
    sys.path.append(str(file.parent))       # pyhv runs isolated: no PYTHONPATH, no working directory
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None     # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{option} {path}: {type(error).__name__}: {error}", "add --debug to see where") from error
    if not hasattr(module, name):
        raise ConfigError(f"{option} {path}: there is no class {name} in it", _OWN)
    return getattr(module, name)


def _call(option: str, kind: Any, words: tuple[str, ...], options: dict[str, object]) -> Any:
    try:
        return kind(*words, **options)
    except TypeError as error:
        raise ConfigError(f"{option}: {str(error).replace(f'{kind.__name__}.__init__()', 'the device')}",
                          "`pyhv boot --help` shows what it takes") from None
    except ValueError as error:
        raise ConfigError(f"{option}: {error}", "`pyhv boot --help` shows what it takes") from None
