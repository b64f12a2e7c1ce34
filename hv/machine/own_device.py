"""A device of the user's own: `--device FILE.py:Class` or `package.module:Class`, with words for its constructor.

The class is a VirtioDevice, or a configuration whose create() makes one (docs/adding-a-virtio-device.md). Loading it
runs the user's code, so a snapshot may name one only where the user named it too (hv/machine/recipe.py, `allowed`).
Driven by tests/unit/test_virtio_example.py and tests/unit/test_recipe.py.
"""

from __future__ import annotations

__all__ = ["OwnConfig", "absolute", "wrong_words"]

import os

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.devices.virtio.device import VirtioDevice

_HINT = "see docs/adding-a-virtio-device.md"


class OwnConfig:
    """The class at `place`, made with `words` and `options`; `option` is what messages call it."""

    FIELDS = (("place", "text"), ("words", "texts"), ("options", "options"))

    def __init__(self, place: str, words: tuple[str, ...] | list[str] = (), options: dict[str, object] | None = None,
                 *, option: str = "--device") -> None:
        self.place = absolute(place)
        self.words = tuple(words)
        self.options = dict(options or {})
        self._option = option
        self._kind = _find(option, place)
        # A device is made by create(), a configuration now: what is wrong with its words is told before the boot.
        self._made = _call(option, self._kind, self.words, self.options) if hasattr(self._kind, "create") else None
        self.vhost_user = getattr(self._made, "vhost_user", None)

    def create(self) -> VirtioDevice:
        """The device. ConfigError where it can't be."""
        from hv.devices.virtio.device import VirtioDevice

        if self._made is not None:
            device = self._made.create()
        else:
            device = _call(self._option, self._kind, self.words, self.options)
        if not isinstance(device, VirtioDevice):
            raise ConfigError(f"{self._option}: {self._kind.__name__} is neither a VirtioDevice nor has it a create() "
                              "that makes one", _HINT)
        return device

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        return {"place": self.place, "words": list(self.words), "options": dict(self.options)}


def absolute(place: str) -> str:
    """`place` with the file's whole path; a module keeps its name."""
    name, colon, kind = place.rpartition(":")
    return f"{os.path.abspath(name)}:{kind}" if colon and name.endswith(".py") else place


def _find(option: str, place: str) -> Any:
    """What stands at `place`. ConfigError."""
    module_name, colon, class_name = place.rpartition(":")
    if not colon:
        raise ConfigError(f"{option} {place}: not of the form FILE.py:Class or package.module:Class", _HINT)
    if module_name.endswith(".py"):
        return _load(option, module_name, class_name)
    try:
        return getattr(__import__(module_name, fromlist=[class_name]), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{option} {place}: {error}",
                          "a module must be installed beside pyhv; a file may be anywhere: FILE.py:Class") from None


def _load(option: str, path: str, name: str) -> Any:
    """Class `name` of the file at `path`. The modules beside it can be imported by it."""
    import importlib.util
    import sys
    from pathlib import Path

    file = Path(path).absolute()
    if str(file.parent) not in sys.path:
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
        raise ConfigError(f"{option} {path}: there is no class {name} in it", _HINT)
    return getattr(module, name)


def _call(option: str, kind: Any, words: tuple[str, ...], options: dict[str, object]) -> Any:
    try:
        return kind(*words, **options)
    except (TypeError, ValueError) as error:
        raise wrong_words(option, kind, error) from None


def wrong_words(option: str, kind: Any, error: Exception) -> ConfigError:
    """What to tell the user when the class `kind` did not like its arguments."""
    text = str(error).replace(f"{kind.__name__}.__init__()", "the device")
    return ConfigError(f"{option}: {text}", "`pyhv boot --help` shows what it takes")
