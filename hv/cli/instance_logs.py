"""`pyhv logs`: what an instance has written, and with -f what it goes on to write, across rotation of its log.

Driven by tests/root/test_instance_logs.py.
"""

from __future__ import annotations

__all__ = ["LOGS_OPTIONS", "command_logs"]

import os
from time import sleep

from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError, HvError
from hv.instance.logfile import LogReader, log_path
from hv.instance.records import find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.instance.record import Instance

LOGS_OPTIONS = (
    Opt("follow", "", "go on until it ends", "f"),
    Opt("tail", "LINES", "the last lines alone [all]", "n"),
    Opt("since", "TIME", "what is not older: 2026-01-31T10:00:00Z, 10m"),
    Opt("until", "TIME", "what is older"),
    Opt("timestamps", "", "with the time of each line", "t"),
)
_PAUSE = 0.05                   # seconds between two looks


class _Printer:
    """Writes records to our standard output and error output."""

    def __init__(self, stamps: bool, since: float | None, until: float | None) -> None:
        self._stamps, self._since, self._until = stamps, since, until
        self._middle = {"stdout": False, "stderr": False}

    def show(self, stream: str, data: bytes, time: str) -> None:
        """One record."""
        if self._since is not None or self._until is not None:
            from hv.instance.times import seconds

            moment = seconds(time)
            if self._since is not None and moment < self._since:
                return
            if self._until is not None and moment >= self._until:
                return
        if self._stamps and not self._middle.get(stream):
            data = time.encode() + b" " + data
        self._middle[stream] = not data.endswith(b"\n")
        fd = 2 if stream == "stderr" else 1
        while data:
            data = data[os.write(fd, data):]


def command_logs(arguments: list[str]) -> int:
    """logs [options] INSTANCE"""
    from hv.instance.times import since
    from hv.instance.values import number

    given, words = parse_words(arguments, LOGS_OPTIONS, "logs")
    if len(words) != 1:
        raise ConfigError("logs: name one instance", "`pyhv ps -a` shows those there are")
    tail = given.get("tail") or "all"
    lines = -1 if tail == "all" else number(tail, "--tail", -1, 1 << 40)
    instance = find(words[0])
    printer = _Printer(bool(given.get("timestamps")),
                       since(given["since"], "--since") if given.get("since") else None,
                       since(given["until"], "--until") if given.get("until") else None)
    reader = LogReader(log_path(instance.folder))
    try:
        for record in reader.all(lines):
            printer.show(*record)
        if given.get("follow"):
            _follow(instance, reader, printer)
    finally:
        reader.close()
    return 0


def _follow(instance: Instance, reader: LogReader, printer: _Printer) -> None:
    from hv.instance import keeper_client

    if instance.kept():
        keeper_client.ensure()          # or nobody would write
    while True:
        over = not instance.kept() and instance.state.get("status") != "restarting"
        for record in reader.more():
            printer.show(*record)
        if over:
            return
        sleep(_PAUSE)
        try:
            instance.refresh()
        except HvError:
            return                      # removed
