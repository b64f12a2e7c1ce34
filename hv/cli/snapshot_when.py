"""`pyhv boot --snapshot NAME`: a VM is saved when its console has printed something, or by SIGUSR1.

A thread does it, so that the console goes on. Driven by tests/kvm/test_snapshot_cli.py.
"""

from __future__ import annotations

__all__ = ["Saver"]

import _signal
import os
from threading import Lock, Thread

from hv.cli.say import say
from hv.errors import ConfigError, HvError
from hv.snapshot.format import store_folder
from hv.snapshot.save import save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine


class Saver:
    """Saves `machine` as the option values ask. ConfigError where they make no sense. close() ends it."""

    def __init__(self, machine: Machine, values: dict[str, Any]) -> None:
        text, by_signal = values["snapshot_when"], values["snapshot_on_signal"]
        if not values["snapshot"]:
            raise ConfigError("--snapshot-when, --snapshot-on-signal and --snapshot-stop go with --snapshot NAME",
                              "name what is to be saved")
        if not text and not by_signal:
            raise ConfigError("--snapshot: when?", "--snapshot-when TEXT, or --snapshot-on-signal (SIGUSR1)")
        self._machine, self._stop = machine, values["snapshot_stop"]
        self._folder = store_folder(values["snapshot"])
        if os.path.lexists(self._folder):
            raise ConfigError(f"{self._folder} is there already", "another name, or `pyhv snapshot rm` first")
        self._text = os.fsencode(text or "")
        self._tail = b""
        self._count = 0
        self._busy = Lock()             # held while one is saved
        self._thread: Thread | None = None
        self._by_signal = by_signal
        if self._text:
            machine.console.add_sink(self._look)
        if by_signal:
            _signal.signal(_signal.SIGUSR1, lambda number, frame: self._start())

    def _look(self, data: bytes) -> None:
        """The guest printed something; what is looked for may come in pieces."""
        seen = self._tail + data
        if self._text in seen:
            self._machine.console.remove_sink(self._look)
            self._start()
        self._tail = seen[-len(self._text):]

    def _start(self) -> None:
        if not self._busy.acquire(False):
            return              # asked again while it is saved
        self._count += 1
        folder = self._folder if self._count == 1 else f"{self._folder}-{self._count}"
        self._thread = Thread(target=self._save, args=(folder,))
        self._thread.start()

    def _save(self, folder: str) -> None:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
        try:
            saved = save(self._machine, folder, stop=self._stop)
            say(f"pyhv: saved {folder}: {saved.bytes >> 20} MiB of memory, the guest stood still for "
                f"{saved.paused_ms:.1f} ms")
        except HvError as error:
            say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
        finally:
            self._busy.release()

    def close(self) -> None:
        """Wait for what is being saved; no more after that."""
        if self._by_signal:
            _signal.signal(_signal.SIGUSR1, _signal.SIG_IGN)
        self._machine.console.remove_sink(self._look)
        if self._thread is not None:
            self._thread.join()
