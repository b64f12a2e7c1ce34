"""Live migration over the loopback: from this process to a `pyhv migrate receive`, which the guest then answers from.

Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["migrate_groups"]

import select
import socket
import subprocess
import time

from hv.bench.figures import Aim, Figure, Group, Run, measure
from hv.bench.harness import launcher, say
from hv.bench.snapshot_guest import MIB, Conversation, Guests, without_vsock
from hv.errors import HvError
from hv.snapshot.migrate import migrate, run
from hv.snapshot.restore import restore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE = 60.0        # s for any step
_SETTLE = 1.0           # s that the busy guest has been busy for


def migrate_groups(guests: Guests, rounds: int) -> list[Group]:
    """Measured."""
    down: list[Figure] = []
    whole: list[Figure] = []
    sent: list[Figure] = []
    steps: list[Figure] = []
    runs: list[Run] = []
    for name, folder, typed, aims in (("idle", guests.alone, b"?", (Aim(100),)),
                                      ("changes 20 MiB/s", guests.touched, b"s", ())):
        figures = [Figure(name, "ms", *aims), Figure(name, "ms"), Figure(name, "MiB"), Figure(name, "")]
        for column, figure in zip((down, whole, sent, steps), figures, strict=True):
            column.append(figure)
        runs.append(Run(lambda folder=folder, typed=typed: _move(folder, typed), *figures))     # type: ignore[misc]
    say(f"migrating: {rounds} rounds")
    measure(runs, rounds)
    text = ("A Linux guest with 256 MiB moves from one process to another by TCP over the loopback. Downtime is from "
            "where the source freezes the guest to where the target says that it runs; then it is asked for an answer.")
    return [Group("migrate", "Live migration: downtime", text, down),
            Group("migrate", "Live migration: the whole of it", "The same.", whole),
            Group("migrate", "Live migration: bytes sent", "The same.", sent),
            Group("migrate", "Live migration: rounds until the guest is frozen", "The same.", steps)]


def _move(folder: str, typed: bytes) -> tuple[float, float, float, float]:
    """ms of downtime, ms in all, MiB sent, rounds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{probe.getsockname()[1]}"
    command = [*launcher(), "migrate", "receive", address, "--wait", str(_PATIENCE), "--no-control"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          bufsize=0) as child:
        try:
            _read(child, child.stderr, b"waiting at")
            with restore(folder, recipe=without_vsock(folder)) as machine:
                talk = Conversation(machine)
                machine.start()
                talk.ask(typed, b"!" if typed == b"?" else b"S")
                time.sleep(_SETTLE)
                moved = run(migrate(machine, address), lambda news: None)
            assert child.stdin is not None
            child.stdin.write(b"?")
            _read(child, child.stdout, b"!")
        finally:
            child.terminate()
            try:
                child.wait(_PATIENCE)
            finally:
                child.kill()
    return moved.downtime_ms, moved.total_ms, moved.bytes / MIB, float(moved.rounds)


def _read(child: subprocess.Popen[bytes], stream: Any, text: bytes) -> None:
    """Wait until the target has said `text`."""
    seen = b""
    end = time.monotonic() + _PATIENCE
    while text not in seen:
        if not select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
            raise HvError(f"the target did not say {text!r} but {seen[-200:]!r}")
        data = stream.read(4096)
        if not data:
            raise HvError(f"the target ended ({child.poll()}) with {seen[-200:]!r}")
        seen += data
