"""Command lines as docker's are: long and short options, short ones together (-it), words behind them.

One table serves the parser and --help. An option that is wrong raises ConfigError with what to do next, so nothing else
has to explain it. Driven by tests/unit/test_cli_words.py.
"""

from __future__ import annotations

__all__ = ["HelpAsked", "Opt", "help_text", "parse_words"]

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_WIDTH = 30


class Opt:
    """`name`: the long one, `short` a letter or "". `meta`: what its value is called, "" for a switch. `many`: it may
    be given several times. `help` "": another name for what `key` says."""

    __slots__ = ("help", "key", "many", "meta", "name", "short")

    def __init__(self, name: str, meta: str = "", help: str = "", short: str = "", *, many: bool = False,
                 key: str = "") -> None:
        self.name, self.meta, self.help, self.short, self.many = name, meta, help, short, many
        self.key = key or name.replace("-", "_")


class HelpAsked(Exception):
    """--help stood among the options."""


def parse_words(arguments: list[str], table: tuple[Opt, ...], command: str, *, early: bool = False) \
        -> tuple[dict[str, Any], list[str]]:
    """(values by key, the other words). `early`: what follows the first word is not ours (run IMAGE COMMAND ...)."""
    long = {f"--{option.name}": option for option in table}
    short = {option.short: option for option in table if option.short}
    values: dict[str, Any] = {option.key: [] for option in table if option.many}
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            words.extend(rest)
            break
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            if early:
                words.extend(rest)
                break
            continue
        if argument.startswith("--"):
            name, equals, text = argument.partition("=")
            if name == "--help":
                raise HelpAsked
            option = long.get(name) or _unknown(name, long, command)
            if not option.meta:
                if equals and text not in ("true", "false"):
                    raise ConfigError(f"{command}: {name}={text!r:.40}", "true or false")
                values[option.key] = text != "false"
                continue
            _put(values, option, text if equals else _next(rest, name, option, command))
            continue
        letters = argument[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter == "h" and letter not in short:
                raise HelpAsked
            option = short.get(letter) or _unknown(f"-{letter}", long, command)
            if not option.meta:
                values[option.key] = True
                continue
            text = letters.removeprefix("=") or _next(rest, f"-{letter}", option, command)
            _put(values, option, text)
            break
    return values, words


def _next(rest: Any, name: str, option: Opt, command: str) -> str:
    found = next(rest, None)
    if found is None:
        raise ConfigError(f"{command}: {name} needs {option.meta}", f"`pyhv {command} --help`")
    return str(found)


def _put(values: dict[str, Any], option: Opt, text: str) -> None:
    if "\0" in text:
        raise ConfigError(f"--{option.name}: a NUL byte")
    if option.many:
        values[option.key].append(text)
    else:
        values[option.key] = text


def _unknown(name: str, long: dict[str, Opt], command: str) -> Opt:
    near = sorted(known for known in long if known.startswith(name) or (len(name) > 5 and name[2:] in known))
    raise ConfigError(f"{command}: no option {name!r:.40}", f"did you mean {near[0]}?" if near
                      else f"`pyhv {command} --help`")


def help_text(usage: str, what: str, table: tuple[Opt, ...]) -> str:
    """What --help prints."""
    rows = [f"Usage: pyhv {usage}", "", *(f"  {line}" for line in what.splitlines()), "", "Options:"]
    for option in table:
        if not option.help:
            continue
        left = f"  {'-' + option.short + ', ' if option.short else '    '}--{option.name}"
        left += f" {option.meta}" if option.meta else ""
        if len(left) > _WIDTH:
            rows.append(left)
            left = ""
        rows.append(f"{left:<{_WIDTH}}  {option.help}")
    return "\n".join(rows)
