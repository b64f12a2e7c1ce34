"""--format: docker's templates, as far as they are names: {{.ID}} {{.State.Status}} {{json .Config}}; \\t, \\n.

Left out on purpose: Go's functions, ranges and conditions; they are refused by name. Driven by
tests/unit/test_cli_words.py.
"""

from __future__ import annotations

__all__ = ["fill"]

from hv.errors import ConfigError
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def fill(template: str, data: dict[str, Any]) -> str:
    """`template` with what `data` has."""
    if template.startswith("table "):
        template = template[6:]
    first, *rest = template.replace("\\t", "\t").replace("\\n", "\n").split("{{")
    out = first
    for part in rest:
        words, end, text = part.partition("}}")
        if not end:
            raise ConfigError(f"--format {template!r:.60}: no }}}} behind {{{{")
        out += _value(words.split(), data, template) + text
    return out


def _value(words: list[str], data: dict[str, Any], template: str) -> str:
    as_json = words[:1] == ["json"]
    path = words[1:] if as_json else words
    if len(path) != 1 or not path[0].startswith("."):
        raise ConfigError(f"--format {template!r:.60}: {' '.join(words)!r:.40} is not known",
                          "names are: {{.ID}}, {{.State.Status}}, {{json .Config}}")
    value: Any = data
    for name in path[0].split(".")[1:]:
        if not name:
            continue
        if not isinstance(value, dict) or name not in value:
            raise ConfigError(f"--format: there is no {path[0]}",
                              f"there are: {', '.join(value)[:200]}" if isinstance(value, dict) else "")
        value = value[name]
    if as_json or isinstance(value, (dict, list)):
        return dumps(value)
    return {True: "true", False: "false", None: "<nil>"}.get(value, str(value)) if not isinstance(value, (str, int)) \
        or isinstance(value, bool) else str(value)
