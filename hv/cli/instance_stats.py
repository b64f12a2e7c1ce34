"""`pyhv stats` and `pyhv top`. Driven by tests/root/test_instance_list.py."""

from __future__ import annotations

__all__ = ["STATS_OPTIONS", "TOP_OPTIONS", "command_stats", "command_top"]

import os
from time import monotonic, sleep

from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError, HvError, StateError
from hv.instance.names import SHORT
from hv.instance.records import all_instances, find
from hv.instance.way import way_of
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.instance.record import Instance

STATS_OPTIONS = (Opt("no-stream", "", "once"), Opt("all", "", "those that do not run as well", "a"),
                 Opt("format", "json", "each as JSON"), Opt("no-trunc", "", "IDs in full"))
TOP_OPTIONS: tuple[Opt, ...] = ()
_TITLES = ("ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "PIDS", "BLOCK I/O")
_KEYS = ("ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "PIDs", "BlockIO")
_PAUSE = 1.0
_NO_LIMIT = 1 << 60


def command_stats(arguments: list[str]) -> int:
    """stats [--no-stream] [INSTANCE ...]"""
    given, words = parse_words(arguments, STATS_OPTIONS, "stats")
    if given.get("format") not in (None, "json"):
        raise ConfigError(f"stats --format {given['format']!r:.40}", "json is what there is")
    for word in words:
        find(word)
    before: dict[str, tuple[float, int]] = {}
    once = bool(given.get("no_stream"))
    _rows(words, given, before)
    sleep(0.2 if once else _PAUSE)          # a share of the processors needs two looks
    while True:
        rows = _rows(words, given, before)
        if given.get("format"):
            for row in rows:
                print(dumps(dict(zip(_KEYS, row, strict=True))))
        else:
            if not once and os.isatty(1):
                print("\033[H\033[2J", end="")      # ECMA-48: home, erase all
            table = [list(_TITLES), *rows]
            widths = [max(len(row[at]) for row in table) for at in range(len(_TITLES))]
            for line in table:
                print("   ".join(f"{word:{width}}" for word, width in zip(line, widths, strict=True)).rstrip(),
                      flush=True)
        if once or (words and not rows):
            return 0
        sleep(_PAUSE)


def _rows(words: list[str], given: dict[str, Any], before: dict[str, tuple[float, int]]) -> list[list[str]]:
    rows = []
    for instance in [find(word) for word in words] if words else all_instances():
        if not instance.running:
            if given.get("all") or words:
                rows.append([_id(instance, given), instance.name, "--", "-- / --", "--", "--", "--"])
            continue
        try:
            figures = way_of(instance).stats(instance)
        except HvError:
            continue                        # it has ended
        rows.append([_id(instance, given), instance.name, *_figures(instance.id, figures, before)])
    return rows


def _id(instance: Instance, given: dict[str, Any]) -> str:
    return instance.id if given.get("no_trunc") else instance.id[:SHORT]


def _figures(id: str, figures: dict[str, Any], before: dict[str, tuple[float, int]]) -> list[str]:
    used = int(figures.get("cpu", {}).get("usage", {}).get("total", 0))
    moment = monotonic()
    last = before.get(id)
    before[id] = moment, used
    share = 100 * (used - last[1]) / 1e9 / max(moment - last[0], 1e-6) if last else 0.0
    memory = figures.get("memory", {}).get("usage", {})
    usage, limit = int(memory.get("usage", 0)), int(memory.get("limit", 0))
    cache = int(figures.get("memory", {}).get("raw", {}).get("total_inactive_file", 0) or
                figures.get("memory", {}).get("raw", {}).get("inactive_file", 0))
    usage = max(usage - cache, 0)           # as docker counts: what can't be given back at once
    if not 0 < limit < _NO_LIMIT:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    read = written = 0
    for part in figures.get("blkio", {}).get("ioServiceBytesRecursive") or ():
        if part.get("op") == "Read":
            read += int(part.get("value", 0))
        elif part.get("op") == "Write":
            written += int(part.get("value", 0))
    return [f"{share:.2f}%", f"{_size(usage)} / {_size(limit)}", f"{100 * usage / limit:.2f}%",
            str(figures.get("pids", {}).get("current", 0)), f"{_size(read)} / {_size(written)}"]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g}{unit}"
        count /= 1024
    return f"{count:.4g}TiB"


def command_top(arguments: list[str]) -> int:
    """top INSTANCE"""
    _, words = parse_words(arguments, TOP_OPTIONS, "top", early=True)
    if not words:
        raise ConfigError("top: name an instance", "`pyhv ps` shows those that run")
    instance = find(words[0])
    if not instance.running:
        raise StateError(f"{instance.name} is not running", f"pyhv start {instance.name}")
    hertz = os.sysconf("SC_CLK_TCK")
    table = [["UID", "PID", "PPID", "TIME", "CMD"]]
    for found in way_of(instance).processes(instance):
        seconds = int(found.get("ticks", 0)) // hertz
        table.append([str(found.get("uid", "")), str(found.get("pid", "")), str(found.get("ppid", "")),
                      f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}",
                      "".join(letter if letter.isprintable() else "?" for letter in str(found.get("command", "")))])
    widths = [max(len(row[at]) for row in table) for at in range(5)]
    for row in table:
        print("   ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip())
    return 0
