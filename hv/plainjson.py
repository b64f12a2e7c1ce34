"""JSON without the json package, whose import (with re) costs 4 ms of a start that takes 16 in all.

The parser and the string encoder are CPython's own accelerator, which json uses as well. Driven by
tests/unit/test_container_spec.py.
"""

from __future__ import annotations

__all__ = ["dumps", "loads"]

from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SPACE = " \t\n\r"


class _Context:
    """What the scanner asks of a json.JSONDecoder."""

    strict = True
    object_hook: Callable[[dict[str, Any]], Any] | None = None
    object_pairs_hook = None
    parse_float, parse_int = float, int
    parse_constant = float      # NaN and Infinity: no field takes a float that is not a number
    memo: dict[str, str] = {}   # noqa: RUF012 (the scanner's own)


def loads(text: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value that `text` holds; ValueError where it is no JSON. `hook` may replace each object."""
    start = len(text) - len(text.lstrip(_SPACE))
    context = _Context()
    context.object_hook = hook
    try:
        value, end = make_scanner(context)(text, start)  # type: ignore[arg-type]
    except StopIteration as stop:
        raise ValueError(f"no JSON value at character {stop.value}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except SystemError:             # CPython 3.11's scanner at a text that ends behind {
        raise ValueError("it ends too early") from None
    if text[end:].strip(_SPACE):
        raise ValueError(f"something follows the JSON value at character {end}")
    return value


def dumps(value: Any, indent: int | None = None, _level: int = 0) -> str:
    """`value` (None, bool, int, float, str, list, tuple, dict) as JSON."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return str(encode_basestring_ascii(value))
    if isinstance(value, (int, float)):
        return repr(value)
    inner, outer, comma = ("", "", ", ")
    if indent is not None and value:
        inner = "\n" + " " * indent * (_level + 1)
        outer, comma = "\n" + " " * indent * _level, "," + inner
    if isinstance(value, dict):
        rows = [f"{encode_basestring_ascii(str(key))}: {dumps(item, indent, _level + 1)}"
                for key, item in value.items()]
        return "{" + inner + comma.join(rows) + outer + "}"
    return "[" + inner + comma.join(dumps(item, indent, _level + 1) for item in value) + outer + "]"
