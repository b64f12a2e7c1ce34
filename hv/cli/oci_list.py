"""`list`: the containers under --root, as a table or as JSON (man 8 runc-list).

Driven by tests/root/test_container_cli.py.
"""

from __future__ import annotations

__all__ = ["command_list"]

from hv.cli.oci import Context, parse
from hv.cli.oci_life import runtime_of
from hv.errors import ConfigError
from hv.plainjson import dumps

_COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
_USAGE = """usage: pyhv-runtime list [flags]

  --format KIND, -f   table (default) or json
  --quiet, -q         only the ids"""


def command_list(context: Context, arguments: list[str]) -> int:
    """list [--quiet] [--format table|json]"""
    known = {"--format": ("format", "table"), "-f": ("format", "table"), "--quiet": ("quiet", False),
             "-q": ("quiet", False)}
    values, words = parse(arguments, known, usage=_USAGE)
    if words:
        raise ConfigError(f"list: {words[0]!r}: it takes no arguments")
    runtime = runtime_of(context)
    records = runtime.list()
    if values["quiet"]:
        for record in records:
            print(record.name)
        return 0
    if values["format"] not in ("table", "json"):
        raise ConfigError(f"--format {values['format']}", "table or json")
    rows = [runtime.describe(record) | {"owner": _owner(int(record.data.get("owner", 0)))} for record in records]
    if values["format"] == "json":
        print(dumps(rows) if rows else "null")
        return 0
    table = [_COLUMNS, *((str(row["id"]), str(row["pid"]), str(row["status"]), str(row["bundle"]), str(row["created"]),
                          str(row["owner"])) for row in rows)]
    widths = [max(12, *(len(line[index]) + 3 for line in table)) for index in range(len(_COLUMNS) - 1)]
    for line in table:
        print("".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)))
    return 0


def _owner(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
