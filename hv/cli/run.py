"""`pyhv run`, `create`, `start`, `restart`, `attach`: an instance begins.

Exit codes of run, start -a and attach: the program's, 128 + n by signal n; 125 where pyhv fails, 126 and 127 where the
program can't be run or is not there. Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["command_attach", "command_create", "command_restart", "command_run", "command_start"]

import os

from hv.cli.run_options import CREATE_OPTIONS, RUN_OPTIONS
from hv.cli.say import say
from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError, HvError
from hv.image.store import Store
from hv.instance import life
from hv.instance.attach import Attached, parse_keys
from hv.instance.finish import remove
from hv.instance.launch import FAILED
from hv.instance.settings import Settings
from hv.phases import mark

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

    from hv.image.image import Image
    from hv.instance.record import Instance

_ENDINGS = (125, 126, 127)
_DETACH = (Opt("detach-keys", "KEYS", "that leave it running [ctrl-p,ctrl-q]"),
           Opt("sig-proxy", "", "pass signals on to it [true; --sig-proxy=false]"))
START_OPTIONS = (Opt("attach", "", "be attached to it, with its exit code", "a"),
                 Opt("interactive", "", "attach our standard input as well", "i"), *_DETACH)
ATTACH_OPTIONS = (Opt("no-stdin", "", "do not attach our standard input"), *_DETACH)
RESTART_OPTIONS = (Opt("time", "SECONDS", "until it is killed [its --stop-timeout]", "t"),
                   Opt("timeout", "SECONDS", key="time"), Opt("signal", "SIGNAL", "what asks it to end", "s"))


def command_run(arguments: list[str], maker: tuple[int, socket] | None = None) -> int:
    """run [options] IMAGE [COMMAND ...]"""
    mark("command")
    try:
        return _run(arguments, maker)
    except HvError as error:
        if error.exit_code not in _ENDINGS:
            error.exit_code = FAILED
        raise


def _run(arguments: list[str], maker: tuple[int, socket] | None) -> int:
    given, words = parse_words(arguments, RUN_OPTIONS, "run", early=True)
    keys = parse_keys(given.get("detach_keys"))
    instance, layers = _make(given, words, "run")
    detach = instance.settings.detach
    attached = launch = None
    try:
        launch = life.start(instance, layers, gate=not detach, maker=maker)
        if detach:
            instance.unlock()
            from hv.instance.keeper_client import connect

            connect().close()               # there is one by the time that it is needed
            launch.finish()
            print(instance.id)
            return 0
        attached = Attached(instance, stdin=instance.settings.interactive, keys=keys, expect=True,
                            proxy=given.get("sig_proxy", not instance.settings.tty))
        launch.go()
        instance.unlock()
        launch.finish()
        code = attached.run()
    except (HvError, KeyboardInterrupt) as error:
        if attached is not None:
            attached.close()
        instance.unlock()
        if launch is not None and isinstance(error, KeyboardInterrupt):
            launch.cancel()
        _drop(instance)
        raise
    finally:
        instance.unlock()
    return 0 if code is None else code


def _drop(instance: Instance) -> None:
    """One that could not be started goes again with --rm; else it is there to be looked at, as docker has it."""
    if not instance.settings.rm:
        return
    try:
        instance.unlock()
        with instance:
            if not instance.running:
                remove(instance, volumes=True)
    except HvError:
        pass


def _make(given: dict[str, Any], words: list[str], command: str) -> tuple[Instance, list[str]]:
    if not words:
        raise ConfigError(f"{command}: no image", f"`pyhv {command} [options] IMAGE [COMMAND ...]`")
    settings = Settings.of(given, words[1:])
    if settings.interactive and not settings.detach:
        settings.data["stdin_once"] = True
    store = Store()
    image = life.find_image(store, words[0], given.get("pull") or "missing",
                            lambda store, text: _fetch(store, text, bool(given.get("quiet"))))
    cid = _open_cid(given.get("cidfile"))
    try:
        if settings.data.get("networks") or settings.publish:
            pass                            # hv/network refuses by name when it is joined
        instance, layers = life.create(settings, image, store, given.get("name") or "")
    except BaseException:
        if cid >= 0:
            os.close(cid)
            os.unlink(given["cidfile"])
        raise
    if cid >= 0:
        os.write(cid, instance.id.encode())
        os.close(cid)
    if settings.tty:
        try:
            columns, rows = os.get_terminal_size(1)
            instance.save_state(console=[rows, columns])
        except OSError:
            pass
    return instance, layers


def _open_cid(path: str | None) -> int:
    if not path:
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise ConfigError(f"--cidfile {path} exists", "remove it, or name another") from None
    except OSError as error:
        raise ConfigError(f"--cidfile {path}: {os.strerror(error.errno or 0)}") from None


def _fetch(store: Store, text: str, quiet: bool) -> Image:
    """Pull the image, with bars where somebody looks."""
    from hv.cli.run_pull import fetch

    return fetch(store, text, quiet)


def command_create(arguments: list[str]) -> int:
    """create [options] IMAGE [COMMAND ...]"""
    given, words = parse_words(arguments, CREATE_OPTIONS, "create", early=True)
    instance, _ = _make(given, words, "create")
    instance.unlock()
    print(instance.id)
    return 0


def command_start(arguments: list[str]) -> int:
    """start [-ai] INSTANCE ..."""
    from hv.instance.records import find

    given, words = parse_words(arguments, START_OPTIONS, "start")
    attach = given.get("attach") or given.get("interactive")
    if not words or (attach and len(words) > 1):
        raise ConfigError("start: name an instance" if not words else "start -a takes one instance",
                          "`pyhv ps -a` shows those there are")
    failed = 0
    for word in words:
        try:
            if attach:
                return _start_attached(find(word), given)
            instance = find(word)
            with instance:
                instance.load()
                if not instance.running:        # docker: nothing to do is no error
                    launch = life.start(instance)
                    instance.unlock()
                    launch.finish()
            print(word)
        except HvError as error:
            failed = _tell(error)
    return failed


def _start_attached(instance: Instance, given: dict[str, Any]) -> int:
    keys = parse_keys(given.get("detach_keys"))
    with instance:
        instance.load()
        launch = life.start(instance, gate=True)
        attached = Attached(instance, stdin=bool(given.get("interactive")) and instance.settings.interactive, keys=keys,
                            expect=True, proxy=given.get("sig_proxy", not instance.settings.tty))
    try:
        launch.go()
        launch.finish()
        code = attached.run()
    except HvError:
        attached.close()
        raise
    return 0 if code is None else code


def command_restart(arguments: list[str]) -> int:
    """restart INSTANCE ..."""
    from hv.instance.records import find
    from hv.instance.values import duration, signal_number

    given, words = parse_words(arguments, RESTART_OPTIONS, "restart")
    if not words:
        raise ConfigError("restart: name an instance", "`pyhv ps -a` shows those there are")
    seconds = duration(given["time"], "-t") if given.get("time") else None
    signal = signal_number(given["signal"], "-s") if given.get("signal") else 0
    failed = 0
    for word in words:
        try:
            instance = find(word)
            life.stop(instance, seconds, signal)
            with instance:
                instance.load()
                launch = life.start(instance)
                instance.unlock()
                launch.finish()
            print(word)
        except HvError as error:
            failed = _tell(error)
    return failed


def command_attach(arguments: list[str]) -> int:
    """attach INSTANCE"""
    from hv.instance.records import find

    given, words = parse_words(arguments, ATTACH_OPTIONS, "attach")
    if len(words) != 1:
        raise ConfigError("attach: name one instance", "`pyhv ps` shows those that run")
    instance = find(words[0])
    stdin = instance.settings.interactive and not given.get("no_stdin")
    attached = Attached(instance, stdin=stdin, keys=parse_keys(given.get("detach_keys")),
                        proxy=given.get("sig_proxy", not instance.settings.tty))
    code = attached.run()
    return 0 if code is None else code


def _tell(error: HvError) -> int:
    say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
    return 1
