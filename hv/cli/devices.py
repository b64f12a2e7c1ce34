"""The device options of `pyhv boot`: from text to configurations. Loaded only where one is given.

Every option's text is `first,flag,key=value,...`; the first word may be missing where the device needs none. Each word
becomes an argument of the configuration's class: numbers and sizes stay text, the class knows its units.
"""

from __future__ import annotations

__all__ = ["DEVICE_OPTIONS", "configurations"]

from hv.errors import ConfigError
from hv.machine.recipe import KINDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.config import DeviceConfig

# option -> the class whose parse(words) or constructor takes its words; in the order in which the guest finds them
DEVICE_OPTIONS = {name: place for name, place in KINDS.items() if name != "own"}


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
    if values["device"]:
        from hv.machine.own_device import OwnConfig
    for text in values["device"]:
        name, _, rest = str(text).partition(",")
        words, options = split(rest)
        found.append(OwnConfig(name, words, options))
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
    """A configuration of pyhv's own devices."""
    module_name, _, class_name = place.rpartition(":")
    kind = getattr(__import__(module_name, fromlist=[class_name]), class_name)
    try:
        return kind(*words, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        from hv.machine.own_device import wrong_words

        raise wrong_words(option, kind, error) from None
