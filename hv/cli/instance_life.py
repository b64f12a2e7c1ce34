"""`pyhv stop`, `kill`, `wait`, `pause`, `unpause`, `rm`, `rename`. Driven by tests/root/test_instance.py."""

from __future__ import annotations

__all__ = ["command_kill", "command_pause", "command_rename", "command_rm", "command_stop", "command_unpause",
           "command_wait"]

from hv.cli.say import say
from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError, HvError, StateError
from hv.instance import life
from hv.instance.records import all_instances, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.instance.record import Instance

_ALL = Opt("all", "", "all that run", "a")
STOP_OPTIONS = (Opt("time", "SECONDS", "until it is killed [its --stop-timeout]", "t"),
                Opt("timeout", "SECONDS", key="time"), Opt("signal", "SIGNAL", "what asks it to end", "s"), _ALL)
KILL_OPTIONS = (Opt("signal", "SIGNAL", "[KILL]", "s"), _ALL)
WAIT_OPTIONS: tuple[Opt, ...] = ()
PAUSE_OPTIONS = UNPAUSE_OPTIONS = (_ALL,)
RM_OPTIONS = (Opt("force", "", "kill it first; no error if it is not there", "f"),
              Opt("volumes", "", "its volumes without a name as well", "v"), Opt("all", "", "all that there are", "a"))
RENAME_OPTIONS: tuple[Opt, ...] = ()


def _each(words: list[str], given: dict[str, Any], verb: str, act: Callable[[Instance], object], *,
          missing_ok: bool = False, everything: bool = False) -> int:
    """Do it to each; the exit code. One that fails stops none of the others."""
    if given.get("all"):
        if words:
            raise ConfigError(f"{verb}: --all and names exclude each other")
        chosen = [instance for instance in all_instances(damaged=missing_ok) if everything or instance.running]
    elif not words:
        raise ConfigError(f"{verb}: name an instance", "`pyhv ps -a` shows those there are")
    else:
        chosen = []
    failed = 0
    for what in chosen or words:
        try:
            try:
                instance = find(what, damaged=missing_ok) if isinstance(what, str) else what
            except StateError:
                if missing_ok:
                    continue
                raise
            said = act(instance)
            print(said or (what if isinstance(what, str) else instance.name or instance.id))
        except HvError as error:
            say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
            failed = 1
    return failed


def command_stop(arguments: list[str]) -> int:
    """stop [options] INSTANCE ..."""
    from hv.instance.values import duration, signal_number

    given, words = parse_words(arguments, STOP_OPTIONS, "stop")
    seconds = duration(given["time"], "-t") if given.get("time") else None
    signal = signal_number(given["signal"], "-s") if given.get("signal") else 0
    return _each(words, given, "stop", lambda instance: life.stop(instance, seconds, signal))


def command_kill(arguments: list[str]) -> int:
    """kill [-s SIGNAL] INSTANCE ..."""
    from hv.instance.values import signal_number

    given, words = parse_words(arguments, KILL_OPTIONS, "kill")
    signal = signal_number(given.get("signal") or "KILL", "-s")
    return _each(words, given, "kill", lambda instance: _kill(instance, signal))


def _kill(instance: Instance, signal: int) -> None:
    if signal == 9:
        instance.stopping(True)         # docker: one that was killed by hand is not restarted
    life.kill(instance, signal)


def command_wait(arguments: list[str]) -> int:
    """wait INSTANCE ..."""
    given, words = parse_words(arguments, WAIT_OPTIONS, "wait")
    return _each(words, given, "wait", lambda instance: str(life.wait_for(instance)))


def command_pause(arguments: list[str]) -> int:
    """pause INSTANCE ..."""
    given, words = parse_words(arguments, PAUSE_OPTIONS, "pause")
    return _each(words, given, "pause", lambda instance: life.pause(instance, True))


def command_unpause(arguments: list[str]) -> int:
    """unpause INSTANCE ..."""
    given, words = parse_words(arguments, UNPAUSE_OPTIONS, "unpause")
    return _each(words, given, "unpause", lambda instance: life.pause(instance, False))


def command_rm(arguments: list[str]) -> int:
    """rm [-f] [-v] INSTANCE ..."""
    given, words = parse_words(arguments, RM_OPTIONS, "rm")
    force, volumes = bool(given.get("force")), bool(given.get("volumes"))
    return _each(words, given, "rm", lambda instance: life.remove_instance(instance, force=force, volumes=volumes),
                 missing_ok=force, everything=True)


def command_rename(arguments: list[str]) -> int:
    """rename INSTANCE NAME"""
    from hv.instance.networking import uses_networks
    from hv.instance.records import rename

    _, words = parse_words(arguments, RENAME_OPTIONS, "rename")
    if len(words) != 2:
        raise ConfigError("rename: an instance and its new name", "`pyhv rename INSTANCE NAME`")
    instance = find(words[0])
    with instance:
        instance.load()
        rename(instance, words[1])
        if uses_networks(instance) and instance.running:
            from hv.network.networks import Networks

            Networks().rename(instance.id, words[1])
    return 0
