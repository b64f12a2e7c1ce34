"""Post-copy: a real Linux whose pages follow it, and what becomes of it when the connection is lost."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.run import PYHV, needs_kvm
from framework.snapshots import Going, Taken

from hv import ConfigError
from hv.errors import HvError, KernelError, SnapshotError
from hv.linux.userfaultfd import Userfaultfd
from hv.machine.recipe_change import for_clone
from hv.memory.dirty import PageSet
from hv.snapshot import migrate as source_side
from hv.snapshot.arrive import Arrival
from hv.snapshot.format import Snapshot
from hv.snapshot.migrate import migrate, run
from hv.snapshot.page_wire import WireSource
from hv.snapshot.postcopy import Later
from hv.snapshot.restore import restore
from hv.snapshot.wire import FILE, GO, HELLO, LOADED, PAGES, READY, ROUND, STATE, WANT, Wire

pytestmark = [needs_kvm, pytest.mark.timeout(300)]
QUESTION = "head -c 300000 /bin/busybox | md5sum; echo $X; cat /tmp/file"


@pytest.fixture(scope="module", autouse=True)
def permitted() -> None:
    try:
        Userfaultfd().close()
    except KernelError as error:
        pytest.skip(f"{error}: {error.hint}")


@pytest.fixture
def all_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent in the first round: it all has to follow."""
    def keep(machine: Any, wire: Wire, pages: PageSet) -> None:
        for first, end in pages.runs():
            machine.tracker.changed_again(first, end)

    monkeypatch.setattr(source_side, "_send_pages", keep)


class Receiver:
    """`pyhv migrate receive` as a process."""

    def __init__(self, place: Path) -> None:
        self.address = f"unix:{place}/arrive"
        self.process = subprocess.Popen([*PYHV, "migrate", "receive", self.address, "--wait", "60", "--no-control"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stderr is not None and self.process.stdout is not None
        self.process.stderr.readline()      # it is waiting
        os.set_blocking(self.process.stdout.fileno(), False)

    def ask(self, command: str, timeout: float = 60) -> str:
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{command}; echo E''ND\n".encode())
        process.stdin.flush()
        output, end = b"", time.monotonic() + timeout
        while b"\nEND" not in output:
            assert process.poll() is None and time.monotonic() < end, output
            output += process.stdout.read() or b""
            time.sleep(0.01)
        return output.decode().replace("\r", "")

    def end(self, timeout: float = 30) -> tuple[int, str]:
        code = self.process.wait(timeout)
        assert self.process.stderr is not None
        return code, self.process.stderr.read().decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path)
    yield made
    made.close()


@pytest.fixture
def guest(micro: Taken) -> Iterator[Going]:
    recipe = for_clone(Snapshot(micro.folder).part("config"), 7)
    for device in recipe["devices"]:
        if device["device"] == "vsock":
            device["socket"] = None     # both are on this host, and would want it
    with Going(restore(micro.folder, recipe=recipe)) as shell:
        yield shell


def test_all_pages_follow(guest, receiver, all_later):
    right = guest.run(QUESTION)
    steps: list[dict[str, Any]] = []
    moved = run(migrate(guest.machine, receiver.address, postcopy=True), steps.append)
    assert moved.rounds == 1 and moved.bytes > 8 << 20 and moved.downtime_ms < moved.total_ms
    assert guest.machine.outcome is not None and guest.machine.outcome.detail == "moved to another pyhv"
    found = receiver.ask(QUESTION)
    assert all(line in found for line in right.splitlines()[:3]), (right, found)
    # nothing is left of the process that had served it
    tasks = f"/proc/{receiver.process.pid}/task"
    assert not any(Path(f"{tasks}/{task}/children").read_text().split() for task in os.listdir(tasks))
    receiver.process.stdin.write(b"poweroff -f\n")
    receiver.process.stdin.flush()
    assert receiver.end(60)[0] == 0


def test_what_changed_after_the_first_round_follows(guest, receiver):
    right = guest.run(QUESTION)
    guest.machine.console.send(b"i=0; while true; do i=$((i+1)); echo $i > /tmp/count; done &\n")
    guest.machine.wait(0.5)
    run(migrate(guest.machine, receiver.address, postcopy=True), lambda news: None)
    found = receiver.ask(QUESTION)
    assert all(line in found for line in right.splitlines()[:3]), (right, found)
    first, second = count(receiver), count(receiver)
    assert 0 < first < second


def count(receiver: Receiver) -> int:
    """How far the guest has counted; now and then the file is empty, between being cut and being written."""
    for _ in range(50):
        if found := re.search(r"\nat (\d+)\n", receiver.ask("echo at $(cat /tmp/count)")):
            return int(found[1])
    raise AssertionError("the file is empty each time")


def test_a_connection_that_is_lost_ends_the_machine(guest, receiver, all_later, monkeypatch):
    def give_up(self: Later) -> None:
        raise HvError("the cable was cut")

    monkeypatch.setattr(Later, "finish", give_up)
    monkeypatch.setattr(Later, "_push", lambda self: False)
    with pytest.raises(HvError, match="given away, and then: the cable was cut"):
        run(migrate(guest.machine, receiver.address, postcopy=True), lambda news: None)
    assert not guest.machine.running()          # it does not go on here as well
    code, text = receiver.end()
    assert "Traceback" not in text
    lost = "the memory handler says: the other side"
    assert (code == 74 and f"pyhv: memory-lost: pages of the guest's memory are nowhere: {lost}" in text) \
        or (code == -9 and "killed, since it can't end otherwise" in text), (code, text)


def test_a_target_that_wants_what_is_not_there_gets_nothing(guest, tmp_path):
    """Before GO: the guest goes on at the source."""
    errors: list[BaseException] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)

        def target() -> None:
            wire = Wire(listener.accept()[0])
            try:
                _, _, length = wire.receive(HELLO)
                assert wire.read_plain(length, "HELLO")["postcopy"] is True
                wire.send(READY)
                while True:
                    kind, argument, length = wire.receive(PAGES, ROUND, FILE, STATE)
                    wire.read(length)
                    if kind == ROUND:
                        wire.send(ROUND, argument)
                    elif kind == STATE:
                        break
                wire.send(WANT, 1 << 40)
                while True:
                    kind, argument, length = wire.receive(PAGES)
                    wire.read(length)
            except BaseException as error:
                errors.append(error)
            finally:
                wire.close()

        thread = threading.Thread(target=target)
        thread.start()
        with pytest.raises(HvError, match=r"wants page 1099511627776 of \d+"):
            run(migrate(guest.machine, f"unix:{tmp_path}/s", postcopy=True), lambda news: None)
        thread.join(20)
    assert "wants page" in str(errors[0])       # it was told
    assert "kept\n" in guest.run(QUESTION)


def test_not_by_tls(guest):
    with pytest.raises(ConfigError, match="post-copy by tls"):
        run(migrate(guest.machine, "tls:localhost:1", tls=("a", "b", "c"), postcopy=True), lambda news: None)


# the source may be hostile ----------------------------------------------------------------------------


def arrival(**fields: Any) -> tuple[Wire, threading.Thread, list[BaseException]]:
    """A target in a thread, and the other end of its connection."""
    ours, theirs = socket.socketpair()
    errors: list[BaseException] = []

    def target() -> None:
        try:
            Arrival(Wire(theirs)).take()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return Wire(ours), thread, errors


@pytest.mark.parametrize(("later", "asked", "says"), [
    ([[0, 1 << 40]], True, r"later\[0\]"), ([[5, 6], [5, 6]], True, r"later\[1\]"), ("all", True, "later"),
    ([[0, -1]], True, r"later\[0\]"), ([[1, 2]], False, "later: comes without post-copy having been asked for"),
])
def test_a_source_that_names_wild_pages(micro, later, asked, says):
    state = dict(Snapshot(micro.folder).state)
    state["config"] = dict(state["config"], devices=[])
    state |= {"disks": [], "devices": {}}
    wire, thread, errors = arrival()
    try:
        wire.send_plain(HELLO, state | {"migration": 1, "postcopy": asked})
        wire.receive(READY)
        wire.send_plain(STATE, state | {"later": later})
        with pytest.raises(HvError, match=says):
            wire.receive(LOADED)
    finally:
        thread.join(20)
        wire.close()
    assert isinstance(errors[0], SnapshotError) and "later" in errors[0].field


@pytest.mark.parametrize(("frame", "says"), [
    ((PAGES, 3, b"x" * 4096), "not what was due"), ((PAGES, 10, b"x" * 100), "not what was due"),
    ((PAGES, 11, b"x" * 8192), "not what was due"), ((PAGES, 1 << 63, b"x" * 4096), "not what was due"),
    ((PAGES, 10, b""), "not what was due"), ((ROUND, 0, b""), "all is here, and 2 pages are not"),
    ((STATE, 0, b""), "sent STATE where"), ((PAGES, 10, b"x" * 8193), "not what was due"),
])
def test_frames_that_are_not_due(frame, says):
    ours, theirs = socket.socketpair()
    source = WireSource(theirs.detach(), 16 * 4096, [(10, 12)])
    other = Wire(ours)
    try:
        other.send(*frame)
        with pytest.raises(HvError, match=says):
            source.hear(None)  # type: ignore[arg-type]     # nothing of it gets there
    finally:
        source.wire.close()
        other.close()


def test_a_page_is_asked_for_once_and_others_are_zeros():
    ours, theirs = socket.socketpair()
    source = WireSource(theirs.detach(), 16 * 4096, [(3, 4), (10, 12)])
    other = Wire(ours)
    try:
        assert source.run(5) == (0, 4, 10) and source.run(0) == (0, 0, 3) and source.run(15) == (0, 12, 16)
        assert source.run(11) is None and source.run(11) is None and source.run(3) is None
        assert [other.receive(WANT)[1] for _ in range(2)] == [11, 3] and not other.ready()
        other.send(GO)
        assert source.hear(None) == GO and source.left == 3  # type: ignore[arg-type]
    finally:
        source.wire.close()
        other.close()
