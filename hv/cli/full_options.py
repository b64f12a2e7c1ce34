"""Click options from the tables that the fast paths parse (hv/cli/options.py)."""

from __future__ import annotations

__all__ = ["with_options"]

from collections.abc import Callable
from typing import Any

import click

from hv.cli.options import FLAG, FLOAT, INT, MANY, MAYBE, Option


class Number(click.ParamType):  # type: ignore[type-arg]
    """Decimal or 0x hexadecimal."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)


def with_options(options: tuple[Option, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Click options from the table that the fast path parses."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            extra: dict[str, Any] = {"help": option.help, "metavar": option.meta or None, "default": option.default}
            if option.kind == FLAG:
                extra |= {"is_flag": True, "metavar": None}
            elif option.kind == MAYBE:
                extra |= {"is_flag": False, "flag_value": option.implied}
            elif option.kind == MANY:
                extra |= {"multiple": True, "default": ()}
            elif option.kind in (INT, FLOAT):
                extra["type"] = Number() if option.kind == INT else float
            extra["show_default"] = option.kind != FLAG and option.default not in (None, "")
            function = click.option(option.name, option.key, **extra)(function)
        return function

    return decorate
