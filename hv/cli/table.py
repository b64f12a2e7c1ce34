"""Tables on the terminal, and what `--format` makes of rows: json, or a template as docker and podman take it.

A row is a dict; its keys are the names a template may use (`{{.ID}}`). Text comes from images and from other people:
control characters in it are shown, not sent. Of Go's templates there is `{{.Name}}`, `{{json .Name}}`, `{{json .}}`,
and `table` before them. Driven by tests/unit/test_cli_table.py.
"""

from __future__ import annotations

__all__ = ["age", "human", "print_found", "print_rows", "print_table", "render", "safe"]

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from hv.cli.say import say_error
from hv.errors import ConfigError, HvError

_WIDE = 100_000         # columns where nobody looks at a terminal: nothing is cut
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")        # powers of ten, as docker and podman count
_FIELD = re.compile(r"\{\{\s*(json\s+)?\.(\w*)\s*\}\}")


def print_rows(rows: list[dict[str, Any]], columns: dict[str, str], form: str = "", quiet: str = "") -> None:
    """Print `rows`: as the table of `columns` (heading: key), only the key `quiet`, or as `form` says."""
    if quiet:
        lines = [safe(str(row[quiet])) for row in rows]
        sys.stdout.write("".join(line + "\n" for line in dict.fromkeys(lines)))
    elif form == "json":
        from json import dumps

        sys.stdout.write(dumps(rows, indent=2, default=str) + "\n")
    elif form.startswith("table") and form[5:].strip():
        template = form[5:].strip().replace("\\t", "\t")
        names = [found[2] for found in _FIELD.finditer(template)]
        headings = {key: heading for heading, key in columns.items()}
        print_table([headings.get(name, name.upper()) for name in names],
                    [[safe(str(_value(row, name))) for name in names] for row in rows])
    elif form not in ("", "table"):
        sys.stdout.write("".join(render(form, row) + "\n" for row in rows))
    else:
        print_table(list(columns), [[safe(str(row[key])) for key in columns.values()] for row in rows])


def print_found(find: Callable[[str], dict[str, Any]], names: Iterable[str], form: str) -> int:
    """What `inspect` prints of `names`, as JSON or by the template `form`. One that is not there is named, and the
    exit code is 1 then.
    """
    rows, code = [], 0
    for name in names:
        try:
            rows.append(find(name))
        except HvError as error:
            say_error(error)
            code = 1
    if form in ("", "json"):
        from json import dumps

        print(dumps(rows, indent=4))
    else:
        for row in rows:
            print(render(form, row))
    return code


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """Columns, cut with an ellipsis where the terminal is too narrow; whole where the output is no terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise HvError(f"tables take the Python package {error.name}", f"`pip install {error.name}`; or --format json"
                      ) from None

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for heading in headings:
        table.add_column(Text(heading), no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(color_system=None, highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def render(template: str, row: dict[str, Any]) -> str:
    """A template filled in. ConfigError where it names what is not there, or asks for what we don't have."""
    text = _FIELD.sub(lambda found: _filled(row, found), template.replace("\\t", "\t").replace("\\n", "\n"))
    if "{{" in _FIELD.sub("", template):
        raise ConfigError(f"--format {template!r}: only {{{{.Name}}}} and {{{{json .Name}}}} are understood",
                          "use --format json, and jq for the rest")
    return text


def _filled(row: dict[str, Any], found: re.Match[str]) -> str:
    value = _value(row, found[2])
    if found[1]:
        from json import dumps

        return dumps(value, default=str)
    return safe(str(value))


def _value(row: dict[str, Any], name: str) -> Any:
    if not name:
        return row
    if name not in row:
        raise ConfigError(f"--format: there is no .{name}", f"there are {', '.join('.' + key for key in row)}")
    return row[name]


def safe(text: str) -> str:
    """`text` on one line, its control characters shown as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == " " else char.encode("unicode_escape").decode()
                   for char in text)


def human(size: float) -> str:
    """A size as people read it: 4.26MB."""
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.4g}{unit}"


def age(seconds: float) -> str:
    """How long ago, as docker says it: 3 weeks ago."""
    for unit, length, most in (("second", 1, 60), ("minute", 60, 60), ("hour", 3600, 48), ("day", 86400, 14),
                               ("week", 604800, 9), ("month", 2592000, 24)):
        count = max(int(seconds // length), 0)
        if count < most:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return f"{int(seconds // 31536000)} years ago"
