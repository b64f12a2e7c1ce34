"""`pyhv cp SOURCE TARGET`, one of which is INSTANCE:PATH. Driven by tests/root/test_instance_cp.py."""

from __future__ import annotations

__all__ = ["CP_OPTIONS", "command_cp"]

import os
import sys

from hv.cli.say import say
from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError
from hv.instance.copy import Side, copy
from hv.instance.record import Instance
from hv.instance.records import find

TYPE_CHECKING = False

CP_OPTIONS = (Opt("archive", "", "keep owners", "a"), Opt("follow-link", "", "follow a link that SOURCE is", "L"),
              Opt("quiet", "", "say nothing", "q"))


def command_cp(arguments: list[str]) -> int:
    """cp [options] SOURCE TARGET"""
    given, words = parse_words(arguments, CP_OPTIONS, "cp")
    if len(words) != 2:
        raise ConfigError("cp: a source and a target", "`pyhv cp INSTANCE:PATH FILE`, or the other way round")
    (from_name, from_path), (to_name, to_path) = (_split(word) for word in words)
    if bool(from_name) == bool(to_name):
        raise ConfigError("cp: one of the two is INSTANCE:PATH, the other is on the host",
                          "between two instances: pyhv cp A:PATH - | pyhv cp - B:PATH")
    follow, archive = bool(given.get("follow_link")), bool(given.get("archive"))
    instance = find(from_name or to_name)
    with _Root(instance, from_path if from_name else to_path) as side:
        if from_name:
            if to_path == "-":
                from hv.instance.copytar import to_tar

                to_tar(side, sys.stdout.buffer, follow=follow)
                return 0
            host = _host(to_path)
            try:
                copy(side, host, follow=follow, owner=None if archive else (os.geteuid(), os.getegid()), warn=_warn)
            finally:
                os.close(host.root)
            return 0
        if from_path == "-":
            from hv.instance.copytar import from_tar

            from_tar(sys.stdin.buffer, side, keep_owner=True)
            return 0
        host = _host(from_path)
        try:
            copy(host, side, follow=follow, owner=None if archive else (0, 0), warn=_warn)
        finally:
            os.close(host.root)
    return 0


def _warn(text: str) -> None:
    say(f"pyhv: {text}")


def _split(word: str) -> tuple[str, str]:
    """(instance, path); no instance: the host's. A path with a colon has a slash before it: ./a:b"""
    if word == "-" or word.startswith(("/", "./", "../")):
        return "", word
    name, colon, path = word.partition(":")
    if not colon or "/" in name or not name:
        return "", word
    if "\0" in path or not path:
        raise ConfigError(f"cp: {word!r:.80}: no path behind the colon", "INSTANCE:PATH")
    return name, path if path.startswith("/") else "/" + path


def _host(path: str) -> Side:
    # the end says what is meant: "/." the content, "/" a folder
    whole = os.path.join(os.getcwd(), path)
    return Side(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), whole, path)


class _Root:
    """An instance's root while it is looked at: its own where it runs, else one mounted aside, and nobody starts it."""

    def __init__(self, instance: Instance, path: str) -> None:
        self._instance, self._path, self._fd = instance, path, -1

    def __enter__(self) -> Side:
        from hv.instance.launch import layers_of
        from hv.instance.rootfs import aside
        from hv.instance.way import way_of

        instance = self._instance
        instance.lock()
        try:
            instance.load()
            path = self._path
            place, inner = _volume(instance, path)
            if place:
                self._fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                path = inner
            elif instance.running:
                self._fd = os.open(way_of(instance).root(instance), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                self._fd = aside(instance, layers_of(instance))
            if instance.running:
                instance.unlock()
        except BaseException:
            instance.unlock()
            raise
        return Side(self._fd, path, f"{instance.name}:{self._path}")

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._instance.unlock()


def _volume(instance: Instance, path: str) -> tuple[str, str]:
    """The volume or folder of the host that is mounted above `path`, and the path in it."""
    end = "/." if path.endswith("/.") else "/" if path.endswith("/") else ""
    plain = os.path.normpath(path)
    known = instance.about.get("volumes", {})
    rows = {row["target"]: row["source"] for row in instance.settings.mounts if row["kind"] == "bind"}
    if known:
        from hv.image.volumes import Volumes

        volumes = Volumes()
        rows |= {target: str(volumes.get(name).mountpoint) for target, name in known.items()}
    for target in sorted(rows, key=len, reverse=True):
        if plain == target or plain.startswith(target + "/"):
            if not os.path.isdir(rows[target]):
                return "", ""
            return rows[target], (plain[len(target):] or "/") + end
    return "", ""
