"""A thread that serves an I/O loop: device work happens here, so that vCPU threads stay in the guest.

A machine with virtio devices has one for all devices that never wait, and one for each device that may wait for the
host's disks (VirtioDevice.OWN_THREAD). Many machines of one process can share a single one (hv/machine/fleet.py), for
all their devices: a thread less for each, but a disk that waits for the host then holds up the others' devices.
Driven by tests/kvm/test_virtio_rng.py.
"""

from __future__ import annotations

__all__ = ["IoThread"]

import _signal
from _thread import allocate_lock, start_new_thread

from hv.machine.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ALL_SIGNALS = _signal.valid_signals()


class IoThread:
    """`loop`, served from start() to stop(). `failed(error)` is told of what no handler caught: a bug of ours."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.loop = Loop()
        self._failed = failed
        self._stopping = False
        self._ended = allocate_lock()       # held while the thread runs

    def start(self) -> None:
        """Start the thread."""
        self._ended.acquire()
        start_new_thread(self._main, ())

    def stop(self) -> None:
        """End the thread, wait for it, and close the loop."""
        self._stopping = True
        self.loop.call(lambda: None)
        with self._ended:
            self.loop.close()

    def _main(self) -> None:
        try:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, _ALL_SIGNALS)
            self.loop.run_until(lambda: self._stopping)
        except Exception as error:
            self._failed(error)
        finally:
            self._ended.release()
