"""A process in a mount namespace of its own that starts and times commands there."""

from __future__ import annotations

__all__ = ["Elsewhere"]

import json
import os
import sys

from hv.bench.harness import spawn
from hv.errors import HvError
from hv.linux.mount import PROPAGATION, set_propagation, umount
from hv.linux.ns import CLONE_NEWNS, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


class Elsewhere:
    """The mount namespace is like ours, `without` one of our mounts."""

    def __init__(self, without: str) -> None:
        self._commands, answers = os.pipe(), os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._commands[1])
            os.close(answers[0])
            _serve(without, self._commands[0], answers[1])
        os.close(self._commands[0])
        os.close(answers[1])
        self._answers = os.fdopen(answers[0])

    def spawn(self, command: list[str], errors: bool = True) -> Callable[[], float]:
        """harness.spawn, there."""

        def sample() -> float:
            os.write(self._commands[1], json.dumps([command, errors]).encode() + b"\n")
            answer = self._answers.readline()
            try:
                return float(answer)
            except ValueError:
                raise HvError(answer.strip() or "the benchmark's helper has died") from None

        return sample

    def close(self) -> None:
        """End it."""
        os.close(self._commands[1])
        self._answers.close()
        os.waitpid(self._pid, 0)


def _serve(without: str, commands: int, answers: int) -> NoReturn:
    try:
        unshare(CLONE_NEWNS)
        set_propagation("/", PROPAGATION["private"], recursive=True)
        umount(without)
        with os.fdopen(commands) as lines, os.fdopen(answers, "w") as out:
            for line in lines:
                try:
                    command, errors = json.loads(line)
                    out.write(f"{spawn(command, errors=errors)()}\n")
                except HvError as error:
                    out.write(f"{error}\n")
                out.flush()
    finally:
        os._exit(0)
