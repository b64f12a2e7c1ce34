"""linux.resources field by field, each checked where it is used. A missing or null field, or a number 0, is unset.

Driven by tests/unit/test_cgroups_v1.py.
"""

from __future__ import annotations

__all__ = ["Fields"]

from hv.container.fields import check, get
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1


class Fields:
    """One object of linux.resources; `where` is its name in errors, as in memory or blockIO.weightDevice[0]."""

    __slots__ = ("table", "where")

    def __init__(self, table: Any, where: str) -> None:
        self.table: dict[str, Any] = check(table, dict, f"linux.resources.{where}")
        self.where = where

    def name(self, field: str) -> str:
        """The full name of a field, for errors."""
        return f"{self.where}.{field}"

    def number(self, field: str, least: int = _LEAST) -> int | None:
        """A whole number; None where it is not set."""
        value: int | None = get(self.table, field, int, None, f"linux.resources.{self.where}.")
        if value is not None and not least <= value <= _MOST:
            raise ConfigError(f"linux.resources.{self.where}.{field}: {value} is out of range")
        return value

    def amount(self, field: str, least: int = _LEAST) -> int:
        """A number for which 0 means unset."""
        return self.number(field, least) or 0

    def text(self, field: str) -> str:
        """A string; "" where it is not set."""
        return str(get(self.table, field, str, "", f"linux.resources.{self.where}."))

    def flag(self, field: str) -> bool:
        """A boolean; False where it is not set."""
        return bool(get(self.table, field, bool, False, f"linux.resources.{self.where}."))

    def rows(self, field: str) -> Iterator[Fields]:
        """The objects of an array."""
        for index, row in enumerate(get(self.table, field, list, [], f"linux.resources.{self.where}.")):
            yield Fields(row, f"{self.where}.{field}[{index}]")

    def any(self, *names: str) -> bool:
        """Whether one of the fields asks for something."""
        return any(self.table.get(name) not in (None, 0, "", False, [], {}) for name in names)
