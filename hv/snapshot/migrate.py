"""The source's side of a live migration: RAM is sent while the guest runs, then what has changed, then all the rest.

    rounds of pages    until what is left would take less than the downtime budget, or does not get less any more
    freeze             the rest of the pages, disks, state; the target builds the machine
    GO                 from here on the machine is the target's

Until GO the source can go on: an error of either side, a lost connection, an abort thaw the guest as after a pause.
After GO nobody may run it here again, whatever becomes of the connection: that both run is worse than that none does.
The disks are on storage that both hosts reach under the same path; overlays, which are this process's own, are copied
within the downtime, as are all writable ones with `copy_disks`. With `postcopy` there is one round, and what it missed
follows when the guest runs at the target already (hv/snapshot/postcopy.py). Driven by tests/kvm/test_migrate.py.
"""

from __future__ import annotations

__all__ = ["Moved", "migrate"]

import os
from time import perf_counter, sleep

from hv.errors import ConfigError, HvError, StateError
from hv.machine.freeze import Still
from hv.machine.recipe import why_not_snapshot
from hv.memory.dirty import PageSet
from hv.memory.layout import PAGE_SIZE
from hv.snapshot.cpu import settable_msrs
from hv.snapshot.disks import FOLDER, lock_disks, save_disks, unlock_disks
from hv.snapshot.machine import collect
from hv.snapshot.memory import data_runs, touched_runs
from hv.snapshot.save import describe
from hv.snapshot.track import track as track_changes
from hv.snapshot.wire import DONE, FILE, GO, HELLO, LOADED, PAGES, PIECE, READY, ROUND, STATE, VERSION, Wire, connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from hv.machine.machine import Machine
    from hv.snapshot.wire import Tls

DOWNTIME_MS = 100.0
ROUNDS_MOST = 30
_BUSY = 1.0                     # s to wait for a snapshot that is being taken
_SETTLE = 0.4                   # of the budget is for state, devices and the target's start; pages get the rest
_LET_GO = 10.0                  # s that a target which failed may hold on to the disks
_FEWER = 0.9                    # a round that leaves more than this part of the one before does not converge


class Moved:
    """How it went: `downtime_ms` between freeze and the target's DONE, `rounds`, `bytes` sent, `total_ms`."""

    __slots__ = ("bytes", "converged", "downtime_ms", "rounds", "total_ms")

    def __init__(self, downtime_ms: float, rounds: int, size: int, total_ms: float, converged: bool) -> None:
        self.downtime_ms, self.rounds, self.bytes, self.total_ms = downtime_ms, rounds, size, total_ms
        self.converged = converged


def migrate(machine: Machine, address: str, *, tls: Tls | None = None, downtime_ms: float = DOWNTIME_MS,
            copy_disks: bool = False, scratch: str | None = None,
            postcopy: bool = False) -> Generator[dict[str, Any], None, Moved]:
    """Move `machine` to who receives at `address`; yields progress, returns how it went. Closing it aborts.

    Any thread but a vCPU's may drive it. HvError leaves the machine running, unless it says otherwise.
    """
    if (why := why_not_snapshot(machine.config)) is not None:
        raise ConfigError(f"this machine can't be moved: {why}", "start it without")
    if not machine.saving.acquire(timeout=_BUSY):
        raise StateError("the machine is being saved or moved already", "try again when that is done")
    try:
        if not machine.running():
            raise StateError("the machine does not run", "only a machine that was started can be moved")
        if machine.tracker is not None:
            raise StateError("what changes is tracked for differential snapshots",
                             "restore the last one, and move that")
        if postcopy and tls is not None:
            raise ConfigError("post-copy by tls: can't be", "unix: or tcp:, through a tunnel such as ssh's")
        return (yield from _connected(machine, address, tls, downtime_ms, copy_disks, scratch, postcopy))
    finally:
        machine.saving.release()


def _connected(machine: Machine, address: str, tls: Tls | None, downtime_ms: float, copy_disks: bool,
               scratch: str | None, postcopy: bool) -> Generator[dict[str, Any], None, Moved]:
    began = perf_counter()
    machine.memory.fetch()
    msrs = settable_msrs(machine.kvm, machine.vcpus[0].fd.cpuid)
    wire = connect(address, tls)
    try:
        with Still(machine):        # a processor that is in the guest answers no question
            greeting = describe(machine)
        wire.send_plain(HELLO, {**greeting, "migration": VERSION, "postcopy": postcopy})
        wire.receive(READY)
        machine.tracker = track_changes(machine)
        try:
            moved = yield from _move(machine, wire, msrs, downtime_ms, copy_disks, scratch, postcopy)
        finally:
            tracker, machine.tracker = machine.tracker, None
            if machine.running() and tracker is not None:
                tracker.stop()
    except BaseException as error:
        wire.fail(f"{error}" if isinstance(error, HvError) else "aborted")
        raise
    finally:
        wire.close()
    moved.total_ms = (perf_counter() - began) * 1e3
    return moved


def _move(machine: Machine, wire: Wire, msrs: list[int], downtime_ms: float, copy_disks: bool,
          scratch: str | None, postcopy: bool) -> Generator[dict[str, Any], None, Moved]:
    pages = _touched(machine)
    budget = downtime_ms / 1e3 * (1 - _SETTLE)
    rate = 0.0
    left = before = len(pages) * PAGE_SIZE
    converged = True
    for number in range(1, ROUNDS_MOST + 1):
        started, sent = perf_counter(), wire.sent
        _send_pages(machine, wire, pages)
        wire.send(ROUND, number)
        wire.receive(ROUND)
        spent = max(perf_counter() - started, 1e-6)
        if wire.sent - sent > PAGE_SIZE << 4:
            rate = (wire.sent - sent) / spent
        assert machine.tracker is not None
        pages = machine.tracker.take()
        left = len(pages) * PAGE_SIZE
        yield {"phase": "round", "round": number, "sent_bytes": wire.sent, "left_bytes": left,
               "bytes_per_s": round(rate)}
        if not machine.running():
            raise StateError("the guest ended before it was moved")
        if postcopy or not rate or left / rate <= budget:
            break
        if number > 2 and left > before * _FEWER:
            converged = False
            yield {"phase": "note", "text": f"the guest changes its memory as fast as it is sent: the downtime will be "
                   f"about {left / rate * 1e3:.0f} ms"}
            break
        before = left
    downtime = _hand_over(machine, wire, pages, msrs, copy_disks, scratch, postcopy)
    return Moved(downtime * 1e3, number, wire.sent, 0.0, converged)


def _hand_over(machine: Machine, wire: Wire, pages: PageSet, msrs: list[int], copy_disks: bool,
               scratch: str | None, postcopy: bool) -> float:
    """Freeze, send the rest, and let the target go on. The seconds in which the guest ran nowhere."""
    from shutil import rmtree
    from tempfile import mkdtemp

    folder = mkdtemp(prefix="pyhv-migrate-", dir=scratch)
    started = perf_counter()
    try:
        with Still(machine):
            if not machine.running() or machine.tracker is None:
                raise StateError("the guest ended before it was moved")
            rest = machine.tracker.take()
            for first, end in pages.runs():
                rest.add_run(first, end)
            state = describe(machine) | collect(machine, msrs)
            state["disks"] = save_disks(machine, folder, copy_disks)
            later = None
            if postcopy:
                from hv.snapshot.postcopy import Later

                later, state["later"] = Later(machine, wire, rest), list(rest.runs())
            else:
                _send_pages(machine, wire, rest)
            receive = wire.receive if later is None else later.receive
            _send_files(wire, f"{folder}/{FOLDER}")
            unlock_disks(machine)
            try:
                wire.send_plain(STATE, state)
                receive(LOADED)
                wire.send(GO)       # an error says that the target can't have all of it
            except BaseException:
                _take_back(machine)
                raise
            downtime = 0.0
            try:
                receive(DONE)
                if later is not None:
                    downtime = perf_counter() - started
                    later.finish()
                why = "moved to another pyhv"
            except HvError as error:
                why = "given away; whether the target runs it is not known"
                raise HvError(f"the machine was given away, and then: {error}",
                              "look at the target: it does not run here any more, in case it does there") from None
            finally:
                downtime = downtime or perf_counter() - started
                machine.stop("quit", why)
    finally:
        rmtree(folder, ignore_errors=True)
    return downtime


def _take_back(machine: Machine) -> None:
    """The target did not take it. It goes on here, once the target has let go of its disks."""
    end = perf_counter() + _LET_GO
    while True:
        try:
            lock_disks(machine)
            return
        except ConfigError as error:
            if perf_counter() > end:
                machine.stop("internal-error", f"it was not moved, and can't go on here: {error}")
                return
        sleep(0.02)


def _touched(machine: Machine) -> PageSet:
    """All pages that may hold something."""
    pages = PageSet(machine.memory.regions)
    number = 0
    for region in machine.memory.regions:
        if region.file >= 0:
            start = region.file_offset
            for first, end in data_runs(region.file, start, start + region.size):
                pages.add_run(number + (first - start) // PAGE_SIZE, number - (start - end) // PAGE_SIZE)
        for first, end in touched_runs(region):
            pages.add_run(number + first // PAGE_SIZE, number + end // PAGE_SIZE)
        number += region.size // PAGE_SIZE
    return pages


def _send_pages(machine: Machine, wire: Wire, pages: PageSet) -> None:
    for first, end in pages.runs():
        number = 0
        for region in machine.memory.regions:
            count = region.size // PAGE_SIZE
            low, high = max(first, number), min(end, number + count)
            while low < high:
                stop = min(high, low + PIECE // PAGE_SIZE)
                view = region.view[(low - number) * PAGE_SIZE:(stop - number) * PAGE_SIZE]
                wire.send(PAGES, low, view)
                view.release()
                low = stop
            number += count


def _send_files(wire: Wire, folder: str) -> None:
    """The disks' files: a line of JSON with name, size and place, then the content; holes are left out."""
    from hv.plainjson import dumps
    from hv.snapshot.memory import data_runs

    for name in sorted(os.listdir(folder)):
        with open(f"{folder}/{name}", "rb", 0) as file:
            status = os.fstat(file.fileno())
            head = {"name": name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
            wire.send(FILE, 0, dumps(head | {"at": 0}).encode() + b"\n")
            for first, end in data_runs(file.fileno(), 0, status.st_size):
                for at in range(first, end, PIECE):
                    content = os.pread(file.fileno(), min(PIECE, end - at), at)
                    wire.send(FILE, 0, dumps(head | {"at": at}).encode() + b"\n", content)


def run(steps: Generator[dict[str, Any], None, Moved], tell: Callable[[dict[str, Any]], None]) -> Moved:
    """Drive a migration to its end."""
    while True:
        try:
            tell(next(steps))
        except StopIteration as stop:
            moved: Moved = stop.value
            return moved
