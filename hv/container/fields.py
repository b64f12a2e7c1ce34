"""Reading fields of a JSON value that somebody else wrote: each is what it should be, or a ConfigError names it.

Driven by tests/unit/test_container_spec.py.
"""

from __future__ import annotations

__all__ = ["check", "choice", "get", "number", "rows", "words"]

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_EXPECTED = {dict: "an object", list: "an array", str: "a string", int: "a number", bool: "true or false"}


def get(table: dict[str, Any], name: str, kind: type, default: Any, where: str = "") -> Any:
    """Field `name` of `table`, which must be of `kind`; `default` where it is missing or null."""
    value = table.get(name)
    return default if value is None else check(value, kind, where + name)


def check(value: Any, kind: type, where: str) -> Any:
    """`value`, which must be of `kind`; ConfigError names `where`."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {value!r:.60} is not {_EXPECTED[kind]}")
    if kind is str and "\0" in str(value):
        raise ConfigError(f"{where}: a NUL byte")
    return value


def number(table: dict[str, Any], name: str, where: str, low: int, high: int, default: Any = 0) -> Any:
    """A number from `low` to `high`."""
    value = get(table, name, int, None, where)
    if value is None:
        return default
    if not low <= value <= high:
        raise ConfigError(f"{where}{name}: {value} is not from {low} to {high}")
    return value


def words(table: dict[str, Any], name: str, where: str) -> list[str]:
    """An array of strings."""
    return [check(word, str, f"{where}{name}[{index}]") for index, word in enumerate(get(table, name, list, [], where))]


def rows(table: dict[str, Any], name: str, where: str) -> list[tuple[dict[str, Any], str]]:
    """An array of objects, each with the name that stands before its fields in an error."""
    found = []
    for index, row in enumerate(get(table, name, list, [], where)):
        place = f"{where}{name}[{index}]"
        found.append((check(row, dict, place), place + "."))
    return found


def choice(table: dict[str, Any], name: str, where: str, choices: Any, default: Any = None) -> Any:
    """What `choices` has under the string in the field."""
    word = get(table, name, str, None, where)
    if word is None:
        return default
    if word not in choices:
        raise ConfigError(f"{where}{name} {word!r:.60}", f"one of {', '.join(choices)}")
    return choices[word]
