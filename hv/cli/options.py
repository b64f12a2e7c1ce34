"""Command options as plain data, with a parser that needs no imports.

One table serves two readers: `parse` below handles well-formed command lines in microseconds, and
cli/full.py makes click commands of the same table for help, completion and error messages. What
`parse` does not understand it refuses (None), and click then says why.
"""

from __future__ import annotations

__all__ = ["FLAG", "INT", "MANY", "TEXT", "Option", "parse"]

FLAG = "flag"
TEXT = "text"
INT = "int"         # decimal or 0x...
FLOAT = "float"
MANY = "many"       # text, may be given several times
MAYBE = "maybe"     # text with `=`, or nothing: takes `implied` then
__all__ += ["FLOAT", "MAYBE"]


class Option:
    """`--name`: how it is parsed, what it is worth when absent, and its help line."""

    __slots__ = ("default", "help", "implied", "key", "kind", "meta", "name")

    def __init__(self, name: str, kind: str, default: object, meta: str, help: str, implied: str = "") -> None:
        self.name = name
        self.key = name.lstrip("-").replace("-", "_")
        self.kind = kind
        self.default = default
        self.meta = meta
        self.help = help
        self.implied = implied


def parse(arguments: list[str], options: tuple[Option, ...], most: int) -> tuple[dict[str, object], list[str]] | None:
    """(values by key, positional words), or None where click has to explain what is wrong or print help."""
    known = {option.name: option for option in options}
    values: dict[str, object] = {o.key: [] if o.kind == MANY else o.default for o in options}
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            words.extend(rest)
            break
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        name, equals, text = argument.partition("=")
        option = known.get(name)
        if option is None:
            return None
        if option.kind == FLAG:
            if equals:
                return None
            values[option.key] = True
            continue
        if option.kind == MAYBE:
            values[option.key] = text if equals else option.implied
            continue
        if not equals:
            following = next(rest, None)
            if following is None:
                return None
            text = following
        try:
            if option.kind == INT:
                values[option.key] = int(text, 0)
            elif option.kind == FLOAT:
                values[option.key] = float(text)
            elif option.kind == MANY:
                values[option.key].append(text)     # type: ignore[attr-defined]
            else:
                values[option.key] = text
        except ValueError:
            return None
    return (values, words) if len(words) <= most else None
