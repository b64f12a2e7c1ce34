"""`pyhv volume create|ls|inspect|rm|prune`, printed as docker and podman print it.

Driven by tests/unit/test_cli_volume.py.
"""

from __future__ import annotations

__all__ = ["create", "inspect", "list_volumes", "prune", "remove"]

import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from hv.cli.say import say_error
from hv.cli.table import print_found, print_rows
from hv.errors import ConfigError, HvError
from hv.image.volumes import Volume, Volumes


def create(name: str, driver: str, labels: Iterable[str], options: Iterable[str]) -> int:
    """Make a volume and print its name."""
    pairs = [text.partition("=") for text in labels]
    if any(not key for key, _, _ in pairs):
        raise ConfigError("--label: begins with =", "KEY or KEY=VALUE")
    made = Volumes().create(name, {key: value for key, _, value in pairs}, driver,
                            {text.partition("=")[0]: text for text in options}, anonymous=not name)
    print(made.name)
    return 0


def list_volumes(filters: Iterable[str], form: str, quiet: bool) -> int:
    """Print the table of volumes."""
    volumes = Volumes()
    tests = [_test(text, volumes) for text in filters]
    rows = [_row(volume) for volume in volumes.ls() if all(test(volume) for test in tests)]
    print_rows(rows, {"DRIVER": "Driver", "VOLUME NAME": "Name"}, form, "Name" if quiet else "")
    return 0


def inspect(names: Iterable[str], form: str) -> int:
    """Print what volumes are."""
    volumes = Volumes()
    return print_found(lambda name: _row(volumes.get(name)), names, form)


def remove(names: Iterable[str], force: bool) -> int:
    """Remove volumes; all that can be."""
    volumes, code = Volumes(), 0
    for name in names:
        try:
            volumes.remove(name, force=force)
            print(name)
        except HvError as error:
            say_error(error)
            code = 1
    return code


def prune(everything: bool, force: bool, filters: Iterable[str]) -> int:
    """Remove what no instance uses; asks on a terminal unless forced."""
    volumes = Volumes()
    tests = [_test(text, volumes, ("label",)) for text in filters]
    if not force and sys.stdin.isatty():
        what = "every volume" if everything else "every volume without a name of its own"
        sys.stderr.write(f"This removes {what} that no instance uses, with what is in it. Go on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    code = 0
    for volume in volumes.unused(everything=everything):
        if not all(test(volume) for test in tests):
            continue
        try:
            volumes.remove(volume.name, force=True)
            print(volume.name)
        except HvError as error:        # used since, say
            say_error(error)
            code = 1
    return code


def _row(volume: Volume) -> dict[str, Any]:
    """docker volume inspect's fields, and podman's Anonymous."""
    created = datetime.fromtimestamp(volume.created, UTC).isoformat(timespec="seconds")
    return {"Name": volume.name, "Driver": volume.driver, "Mountpoint": volume.mountpoint, "CreatedAt": created,
            "Labels": volume.labels, "Scope": "local", "Options": {}, "Anonymous": volume.anonymous}


def _test(text: str, volumes: Volumes, allowed: tuple[str, ...] = ("name", "label", "dangling", "driver"),
          ) -> Callable[[Volume], bool]:
    key, equals, value = text.partition("=")
    negated = key.endswith("!")
    key = key.removesuffix("!")
    if key not in allowed or not equals or (negated and key != "label"):
        raise ConfigError(f"--filter {text!r}: not understood", f"there are {', '.join(allowed)}, with =VALUE")
    if key == "name":
        return lambda volume: value in volume.name
    if key == "driver":
        return lambda volume: volume.driver == value
    if key == "label":
        label, has_value, content = value.partition("=")
        return lambda volume: negated != (label in volume.labels and (
            not has_value or volume.labels[label] == content))
    if value not in ("true", "false", "1", "0"):
        raise ConfigError(f"--filter {text!r}: is neither true nor false")
    wanted = value in ("true", "1")
    return lambda volume: (not volumes.users(volume.name)) == wanted
