"""`pyhv image pull`, `image push`, `login`, `logout`: what click has parsed is done and shown here.

What is wanted by scripts goes to standard output (image IDs, a digest), progress to standard error: bars on a terminal,
else a line for each finished layer. Driven by tests/root/test_registry_cli.py.
"""

from __future__ import annotations

__all__ = ["login", "logout", "pull", "push"]

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hv.cli.say import say
from hv.errors import ConfigError
from hv.image.auth import Login, Logins
from hv.image.reference import Reference

if TYPE_CHECKING:
    from hv.image.media import Descriptor
    from hv.image.registry_reach import Access
    from hv.image.transfer import Report

_WORDS = {"there": "is there", "done": "done", "waits": "another pull fetches it", "again": "broke off, trying again"}


def pull(names: tuple[str, ...], platform: str, quiet: bool, **reach: Any) -> int:
    """Fetch images; their IDs on standard output."""
    from hv.image.pull import check_platform
    from hv.image.pull import pull as fetch
    from hv.image.store import Store

    check_platform(platform)
    references, access = [Reference.parse(name) for name in names], _access(reach)
    for reference in references:
        if not quiet:
            say(f"pulling {reference.familiar()}")
        with _shown(quiet) as report:
            image = fetch(Store(), reference, access, platform, report=report)
        print(image.id.removeprefix("sha256:"), flush=True)
    return 0


def push(name: str, destination: str, platform: str, quiet: bool, **reach: Any) -> int:
    """Send an image; the digest of its manifest on standard output."""
    from hv.image.pull import check_platform
    from hv.image.push import push as send
    from hv.image.store import Store

    check_platform(platform)
    target = Reference.parse((destination or name).removeprefix("docker://"))
    if not quiet:
        say(f"pushing {name} to {target.familiar()}")
    with _shown(quiet) as report:
        print(send(Store(), name, target, _access(reach), platform, report=report), flush=True)
    return 0


def login(registry: str, user: str, password: str, from_stdin: bool, **reach: Any) -> int:
    """Try a login, and keep it if it is good."""
    from hv.image.registry import check_login

    registry = _registry(registry)
    if from_stdin:
        if password:
            raise ConfigError("--password and --password-stdin exclude each other")
        password = sys.stdin.readline(64 << 10).rstrip("\r\n")
    user = user or _typed(f"user of {registry}: ", secret=False, option="--username")
    password = password or _typed(f"password of {user}: ", secret=True, option="--password-stdin")
    if ":" in user:
        raise ConfigError(f"--username {user[:80]!r}: a user's name has no colon")
    access = _access(reach)
    kept = Login(user, password)
    check_login(registry, access.with_login(kept))
    say(f"logged in to {registry} as {user}; kept in {Logins(access.authfile).save(registry, kept)}")
    return 0


def logout(registry: str, authfile: str) -> int:
    """Forget the logins for a registry."""
    registry = _registry(registry)
    if not Logins(authfile).remove(registry):
        say(f"pyhv: no login for {registry} is kept")
        return 1
    say(f"logged out of {registry}")
    return 0


def _registry(text: str) -> str:
    name = text.partition("://")[2] or text
    name = name.partition("/")[0]
    try:
        found = Reference.parse(f"{name}/x").registry
    except ConfigError:
        found = ""
    if name == "index.docker.io":
        return "docker.io"
    if found != name:
        raise ConfigError(f"registry {text[:200]!r}: is no HOST[:PORT] with a dot or a port in it",
                          "for example docker.io, quay.io, localhost:5000")
    return name


def _access(reach: dict[str, Any]) -> Access:
    from hv.image.registry_reach import Access

    creds, login = reach.get("creds") or "", None
    if creds:
        user, _, password = creds.partition(":")
        login = Login(user, password or _typed(f"password of {user}: ", secret=True, option="--creds USER:PASSWORD"))
    return Access(reach["tls_verify"], reach["cert_dir"], reach["authfile"], login)


def _typed(prompt: str, secret: bool, option: str) -> str:
    """What a person types; without a terminal there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ConfigError(f"no {prompt.partition(' ')[0]} given, and no terminal to ask on", f"give {option}")
    from getpass import getpass

    return getpass(prompt, sys.stderr) if secret else _asked(prompt)


def _asked(prompt: str) -> str:
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return sys.stdin.readline().strip()


@contextmanager
def _shown(quiet: bool) -> Iterator[Report]:
    """A report that a person sees."""
    if quiet:
        yield lambda what, blob, done: None
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _line


def _line(what: str, blob: Descriptor, done: int) -> None:
    if what != "bytes":
        say(f"{blob.digest[7:19]} {_size(blob.size)}: {_WORDS[what]}")


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


@contextmanager
def _bars() -> Iterator[Report]:
    from threading import Lock

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}
        lock = Lock()

        def report(what: str, blob: Descriptor, done: int) -> None:
            with lock:
                if blob.digest not in tasks:
                    tasks[blob.digest] = progress.add_task(blob.digest[7:19], total=blob.size or 1, note="")
            note = "" if what in ("bytes", "done") else _WORDS[what]
            progress.update(tasks[blob.digest], completed=done if blob.size else 1, note=note)

        yield report
