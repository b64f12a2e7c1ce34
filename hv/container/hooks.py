"""Hooks: programs of the engine's that run at points of a container's life (runtime-spec 1.2, config.md, POSIX-platform
Hooks): prestart, createRuntime (runtime's namespaces), createContainer, startContainer (the container's), poststart,
poststop (runtime's). Each gets the state as JSON on standard input, and ends within its timeout or is killed. One that
fails is an error, and nothing of the container stays; of poststart and poststop it is a warning (runtime.md, Lifecycle:
version 1.3 made an error of poststart's).

Driven by tests/root/test_container_hooks.py.
"""

from __future__ import annotations

__all__ = ["run_hooks"]

import os
from _functools import partial  # type: ignore[import-not-found]     # functools itself would bring ten modules
from _signal import SIGKILL, valid_signals
from time import monotonic, sleep

from hv.errors import HvError
from hv.linux.signals import Held, new_process
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Row = tuple[str, list[str], list[str], int]     # path, arguments, environment, timeout

_SAID_MOST = 2000               # bytes of a failed hook's output in the error
_UNTOUCHABLE = (9, 19, 32, 33)  # SIGKILL, SIGSTOP, and two of the C library's own


def run_hooks(rows: list[Row], kind: str, state: dict[str, Any], warn: Callable[[str], None] | None = None) -> None:
    """Run the hooks of `kind` one after the other. HvError by the first that fails; with `warn` they go on."""
    for index, row in enumerate(rows):
        try:
            _run_hook(row, f"hooks.{kind}[{index}] {row[0]}", state)
        except HvError as error:
            if warn is None:
                raise
            warn(str(error))


def _run_hook(row: Row, what: str, state: dict[str, Any]) -> None:
    path, args, env, timeout = row
    environment = dict(word.partition("=")[::2] for word in env)
    given = os.memfd_create("state", os.MFD_CLOEXEC)
    said = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        os.write(given, dumps(state).encode())
        os.lseek(given, 0, os.SEEK_SET)
        code = _run(path, args or [path], environment, timeout, given, said)
        if code:
            os.lseek(said, 0, os.SEEK_SET)
            text = os.read(said, _SAID_MOST).decode(errors="replace").strip()
            why = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
            raise HvError(f"{what}: {why}" + (f": {text}" if text else ""))
    except OSError as error:
        raise HvError(f"{what}: {os.strerror(error.errno or 0)}") from None
    except _Late:
        raise HvError(f"{what}: did not end within {timeout} s") from None
    finally:
        os.close(given)
        os.close(said)


def _run(path: str, args: list[str], env: dict[str, str], timeout: int, given: int, said: int) -> int:
    """The hook's exit code, or minus the signal that ended it."""
    files = ((os.POSIX_SPAWN_DUP2, given, 0), (os.POSIX_SPAWN_DUP2, said, 1), (os.POSIX_SPAWN_DUP2, said, 2))
    made: list[int] = []
    try:
        # a group of its own: what it starts is ended with it
        new_process(partial(os.posix_spawn, path, args, env, file_actions=files, setpgroup=0, setsigmask=(),
                            setsigdef=[number for number in valid_signals() if number not in _UNTOUCHABLE]), made)
        return _wait(made, timeout)
    except BaseException:
        for pid in made:
            os.killpg(pid, SIGKILL)     # not waited for yet, so it is still the one
            os.waitpid(pid, 0)
        raise


def _wait(made: list[int], timeout: int) -> int:
    """The status of the process in `made`, which is empty once that has been waited for."""
    end, pause = monotonic() + timeout, 0.001
    while True:
        if not timeout:
            os.waitid(os.P_PID, made[0], os.WEXITED | os.WNOWAIT)       # the long wait, after which it is a zombie yet
        with Held():
            done, status = os.waitpid(made[0], os.WNOHANG)
            if done:
                made.clear()
        if done:
            return os.waitstatus_to_exitcode(status)
        if monotonic() > end:
            raise _Late
        sleep(pause)
        pause = min(2 * pause, 0.05)


class _Late(Exception):
    """A hook's time is over."""
