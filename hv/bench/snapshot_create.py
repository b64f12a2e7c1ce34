"""Taking snapshots: how long the guest stands still, how long it takes, what is on disk.

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["create_groups"]

import os
import shutil
import time
from pathlib import Path

from hv.bench.figures import Aim, Figure, Group, Run, measure
from hv.bench.harness import say
from hv.bench.snapshot_guest import MIB, Conversation, Guests, without_vsock
from hv.machine.machine import Machine
from hv.snapshot.restore import restore
from hv.snapshot.save import save


def create_groups(guests: Guests, rounds: int) -> list[Group]:
    """Measured."""
    full = Figure("full: guest paused", "ms")
    difference = Figure("20 MiB changed, tracked: guest paused", "ms", Aim(100))
    clone = Figure("20 MiB changed since a restore: guest paused", "ms", Aim(100))
    times = {figure: Figure(figure.name.replace("guest paused", "until all is on disk"), "ms")
             for figure in (full, difference, clone)}
    sizes = {figure: Figure(figure.name.replace("guest paused", "on disk"), "MiB")
             for figure in (full, difference, clone)}
    plain = Figure("the full one's bytes, written and synced", "ms", vm=False)
    say(f"taking snapshots: {rounds} rounds")
    with _Tracked(guests) as tracked:
        measure([
            Run(lambda: _full(guests), full, times[full], sizes[full]),
            Run(tracked.sample, difference, times[difference], sizes[difference]),
            Run(lambda: _since_restore(guests), clone, times[clone], sizes[clone]),
            Run(lambda: [_plain_write(guests)], plain)], rounds)
    text = ("A running Linux guest with 256 MiB. The full snapshot is of an idle one. The others are of one that has "
            "changed each page of 20 MiB: since the snapshot before it, by KVM's dirty log, or since it was restored. "
            "`On disk` is what the folder's files take.")
    return [Group("create", "Taking a snapshot: the pause", text, [full, difference, clone]),
            Group("create", "Taking a snapshot: the whole of it", "The same, until they are synced and named.",
                  [*times.values(), plain]),
            Group("create", "Taking a snapshot: on disk", "The same snapshots.", list(sizes.values()))]


def _full(guests: Guests) -> tuple[float, float, float]:
    with restore(guests.idle) as machine:
        talk = Conversation(machine)
        machine.start()
        talk.ask(b"?", b"!")
        return _saved(machine, guests.place / "full")


def _since_restore(guests: Guests) -> tuple[float, float, float]:
    with restore(guests.touched) as machine:
        talk = Conversation(machine)
        machine.start()
        talk.ask(b"d", b"D")
        return _saved(machine, guests.place / "since", diff=True)


class _Tracked:
    """A machine that runs all the time, its changes tracked; each snapshot is a difference from the one before."""

    def __init__(self, guests: Guests) -> None:
        self._place = guests.place
        self._guests = guests
        self._last: Path | None = None
        self._number = 0

    def __enter__(self) -> _Tracked:
        self._machine = restore(self._guests.touched, recipe=without_vsock(self._guests.touched))
        try:
            self._talk = Conversation(self._machine)
            self._machine.start()
            self._talk.ask(b"?", b"!")
            self._last = self._place / "base"
            save(self._machine, str(self._last), track=True)
        except BaseException:
            self._machine.close()
            raise
        return self

    def sample(self) -> tuple[float, float, float]:
        """Change 20 MiB, save the difference. What it rests on may go: it is never restored."""
        self._talk.ask(b"d", b"D")
        self._number += 1
        folder = self._place / f"difference{self._number}"
        values = _saved(self._machine, folder, keep=True, diff=True)
        if self._last is not None:
            shutil.rmtree(self._last)
        self._last = folder
        return values

    def __exit__(self, *exc: object) -> None:
        self._machine.close()


def _saved(machine: Machine, folder: Path, *, keep: bool = False, diff: bool = False) -> tuple[float, float, float]:
    """ms the guest stood still, ms in all, MiB on disk."""
    saved = save(machine, str(folder), diff=diff)
    size = sum(entry.stat().st_blocks * 512 for entry in folder.rglob("*") if entry.is_file())
    if not keep:
        shutil.rmtree(folder)
    return saved.paused_ms, saved.total_ms, size / MIB


def _plain_write(guests: Guests) -> float:
    """ms to write as many bytes as the idle guest's memory file has, and to sync them."""
    path = guests.place / "plain"
    size = os.stat(f"{guests.idle}/memory").st_blocks * 512
    data = os.urandom(MIB)
    start = time.perf_counter_ns()
    with open(path, "wb", 0) as file:
        for _ in range(max(1, size // MIB)):
            file.write(data)
        os.fsync(file.fileno())
    spent = (time.perf_counter_ns() - start) / 1e6
    path.unlink()
    return spent
