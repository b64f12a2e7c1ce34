"""Machines that move to another pyhv while they run, and what becomes of them when either side fails."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.run import needs_kvm
from framework.snapshots import Going, Taken

from hv import ConfigError, Machine, MachineConfig, StateError
from hv.devices.virtio.blk_config import DiskConfig
from hv.errors import HvError
from hv.machine.recipe_change import for_clone
from hv.snapshot import migrate as source_side
from hv.snapshot import wire
from hv.snapshot.arrive import Arrival
from hv.snapshot.format import Snapshot
from hv.snapshot.migrate import Moved, migrate, run
from hv.snapshot.restore import restore
from hv.snapshot.save import save
from hv.snapshot.wire import Wire, listen, take

pytestmark = [needs_kvm, pytest.mark.timeout(240)]
RAM = 16 << 20
COUNT = bytes.fromhex("66ff060005" "ebf9")          # real mode: inc dword [0x500]; jmp back


def flat(**options: Any) -> MachineConfig:
    return MachineConfig(COUNT, boot_protocol="flat", memory=RAM, **options)


def counts_on(machine: Machine, seconds: float = 10) -> bool:
    held, end = machine.memory.u32(0x500), time.monotonic() + seconds
    while machine.memory.u32(0x500) == held and time.monotonic() < end:
        time.sleep(0.002)
    return machine.memory.u32(0x500) != held


def free_port() -> int:
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        port: int = test.getsockname()[1]
        return port


class Target:
    """Who takes one machine in a thread: `machine`, or `error`."""

    def __init__(self, address: str, tls: Any = None, receive: Callable[[Wire], Machine] | None = None,
                 changes: Any = None) -> None:
        self.machine: Machine | None = None
        self.error: BaseException | None = None
        self._sock = listen(address, tls)
        self._tls, self._receive, self._changes = tls, receive, changes
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._sock:
                peer = take(self._sock, self._tls, 30)
            if self._receive is not None:
                self.machine = self._receive(peer)
            else:
                machine = Arrival(peer, changes=self._changes).take()
                machine.start()
                self.machine = machine
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exc: object) -> None:
        self.join()
        if self.machine is not None:
            self.machine.close()


def move(machine: Machine, address: str, **options: Any) -> tuple[Moved, list[dict[str, Any]]]:
    news: list[dict[str, Any]] = []
    return run(migrate(machine, address, **options), news.append), news


@pytest.fixture(autouse=True)
def nothing_in_tmp() -> Iterator[None]:
    before = set(os.listdir("/tmp"))
    yield
    left = [name for name in set(os.listdir("/tmp")) - before if name.startswith(("pyhv-arrive", "pyhv-migrate"))]
    assert not left


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """One certificate for both sides, signed by an authority of ours."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    place = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pyhv -addext"
    subprocess.run(["openssl", *words.split(), "subjectAltName=IP:127.0.0.1", "-keyout", place / "key", "-out",
                    place / "cert"], check=True, capture_output=True, timeout=60)
    return str(place / "cert"), str(place / "key"), str(place / "cert")


def address_of(kind: str, place: Path) -> str:
    return f"unix:{place}/move" if kind == "unix" else f"{kind}:127.0.0.1:{free_port()}"


# small guests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"])
@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_a_guest_counts_on_elsewhere(tmp_path, request, kind, backing):
    address = address_of(kind, tmp_path)
    files = request.getfixturevalue("tls") if kind == "tls" else None
    with Machine(flat(backing=backing, cpus=2)) as machine, Target(address, files) as target:
        machine.memory.write(5 << 20, os.urandom(1 << 20))
        machine.start()
        assert counts_on(machine)
        moved, _ = move(machine, address, tls=files)
        target.join()
        assert target.machine is not None, target.error
        outcome = machine.wait(10)
        assert outcome is not None and (outcome.reason, outcome.detail) == ("quit", "moved to another pyhv")
        assert counts_on(target.machine)
        assert target.machine.memory.u32(0x500) > machine.memory.u32(0x500)
        assert target.machine.memory.read(5 << 20, 1 << 20) == machine.memory.read(5 << 20, 1 << 20)
        assert moved.converged and moved.bytes > 1 << 20 and 0 < moved.downtime_ms < moved.total_ms


def test_a_machine_moves_there_and_back_ten_times(tmp_path):
    machine = Machine(flat())
    try:
        machine.start()
        for number in range(10):
            address = f"unix:{tmp_path}/{number}"
            target = Target(address)
            move(machine, address)
            target.join()
            assert target.machine is not None, target.error
            machine.close()
            machine = target.machine
            assert counts_on(machine)
        assert machine.config.memory == RAM
    finally:
        machine.close()


def test_what_is_not_there_or_not_now_is_refused(tmp_path):
    with Machine(flat()) as machine:
        with pytest.raises(StateError, match="does not run"):
            move(machine, f"unix:{tmp_path}/x")
        machine.start()
        with pytest.raises(HvError, match="No such file"):
            move(machine, f"unix:{tmp_path}/x")
        with pytest.raises(ConfigError, match="no address"):
            move(machine, "nowhere")
        save(machine, str(tmp_path / "s"), track=True)
        with pytest.raises(StateError, match="tracked for differential"):
            move(machine, f"unix:{tmp_path}/x")
        assert counts_on(machine)


@pytest.mark.parametrize("stage", ["at once", "hello", "pages", "state"])
def test_the_source_goes_on_where_the_target_leaves_before_go(tmp_path, stage):
    """Hanging up is all that its death looks like from here."""

    def leave(peer: Wire) -> Machine:
        try:
            if stage != "at once":
                _, _, length = peer.receive(wire.HELLO)
                peer.read(length)
            if stage in ("pages", "state"):
                peer.send(wire.READY)
                kind = 0
                while kind != (wire.STATE if stage == "state" else wire.PAGES):
                    kind, argument, length = peer.receive(wire.PAGES, wire.ROUND, wire.STATE)
                    peer.read(length)
                    if kind == wire.ROUND:
                        peer.send(wire.ROUND, argument)
        finally:
            peer.close()
        raise HvError("left")

    with Machine(flat()) as machine, Target(f"unix:{tmp_path}/m", receive=leave):
        machine.memory.write(4 << 20, os.urandom(8 << 20))
        machine.start()
        with pytest.raises(HvError, match=r"is gone|hung up"):
            move(machine, f"unix:{tmp_path}/m")
        assert machine.running() and machine.frozen is None and machine.tracker is None
        assert counts_on(machine)
        save(machine, str(tmp_path / "s"))      # nothing holds it


def test_a_target_that_never_confirms_has_it_all_the_same(tmp_path):
    def take_and_die(peer: Wire) -> Machine:
        peer.receive(wire.HELLO)
        peer._sock.recv(1 << 20)
        peer.send(wire.READY)
        while True:
            kind, argument, length = peer.receive(wire.PAGES, wire.ROUND, wire.STATE)
            peer.read(length)
            if kind == wire.ROUND:
                peer.send(wire.ROUND, argument)
            if kind == wire.STATE:
                peer.send(wire.LOADED)
                peer.receive(wire.GO)
                peer.close()
                raise HvError("died")

    with Machine(flat()) as machine, Target(f"unix:{tmp_path}/m", receive=take_and_die):
        machine.start()
        with pytest.raises(HvError, match="was given away"):
            move(machine, f"unix:{tmp_path}/m")
        outcome = machine.wait(10)
        assert outcome is not None and "given away" in outcome.detail


def test_a_target_of_another_kind_says_no(tmp_path, monkeypatch):
    real = source_side.describe
    monkeypatch.setattr(source_side, "describe", lambda machine: real(machine) | {
        "host": {"maker": "Zilog", "ring0": "native", "boot_id": "", "tsc_khz": 1}})
    with Machine(flat()) as machine, Target(f"unix:{tmp_path}/m") as target:
        machine.start()
        with pytest.raises(HvError, match=r"the other side says: .*Zilog"):
            move(machine, f"unix:{tmp_path}/m")
        target.join()
        assert isinstance(target.error, HvError)
        assert counts_on(machine)


def test_a_disk_goes_along(tmp_path):
    """On storage that both reach: the lock is handed over, also back where the target fails at the end."""
    (tmp_path / "over.img").write_bytes(b"base" * 1024)
    (tmp_path / "disk.img").write_bytes(b"disk" * 1024)
    devices = (DiskConfig(str(tmp_path / "disk.img")), DiskConfig(str(tmp_path / "over.img"), overlay="temp"))

    def held() -> bool:
        try:
            DiskConfig(str(tmp_path / "disk.img")).create().close()
        except ConfigError:
            return True
        return False

    def fail_at_the_end(recipe: dict[str, Any]) -> dict[str, Any]:
        calls.append(recipe)
        if len(calls) == 2:
            raise ConfigError("changed my mind")
        return recipe

    calls: list[dict[str, Any]] = []
    with Machine(flat(devices=devices)) as machine:
        machine.start()
        overlay: Any = machine.devices["disk1"]
        overlay.disk.write([memoryview(bytearray(b"over" * 256))], 0, 1024)
        with Target(f"unix:{tmp_path}/1", changes=fail_at_the_end), pytest.raises(HvError, match="changed my mind"):
            move(machine, f"unix:{tmp_path}/1")
        assert counts_on(machine) and held()
        with Target(f"unix:{tmp_path}/2") as target:
            move(machine, f"unix:{tmp_path}/2")
            target.join()
            assert target.machine is not None, target.error
            machine.close()
            assert held() and counts_on(target.machine)
            there: Any = target.machine.devices["disk1"]
            data = bytearray(2048)
            there.disk.read([memoryview(data)], 0, len(data))
            assert data == b"over" * 256 + b"base" * 256
    assert not held()
    assert (tmp_path / "over.img").read_bytes()[:4] == b"base"


# Linux ---------------------------------------------------------------------------------------------------


def clone(micro: Taken, number: int) -> Going:
    snapshot = Snapshot(micro.folder)
    return Going(restore(snapshot, recipe=for_clone(snapshot.part("config"), number)))


def test_a_linux_moves_idle_and_at_work(micro: Taken, tmp_path: Path, tls: tuple[str, str, str]):
    """Twice: idle over TLS, then with a program that changes 4 MiB all the time, over TCP."""
    with clone(micro, 31) as shell:
        shell.run("X=moving; echo on the overlay | dd of=/dev/vda bs=512 conv=sync oflag=direct 2>/dev/null")
        address = address_of("tls", tmp_path)
        with Target(address, tls, changes=lambda recipe: for_clone(recipe, 32)) as target:
            idle, _ = move(shell.machine, address, tls=tls)
            target.join()
            assert target.machine is not None, target.error
            shell.machine.close()
            there = Going(target.machine, start=False)
            text = there.run("echo $X; dd if=/dev/vda bs=14 count=1 2>/dev/null; cat /here/note")
            assert "moving\non the overlay" in text and "shared\n" in text
            there.machine.console.send(b"steady touch 4 & steady ticks &\n")
            there.wait_for(b"touching")
            time.sleep(0.5)
            address = address_of("tcp", tmp_path)
            with Target(address, changes=lambda recipe: for_clone(recipe, 33)) as last:
                busy, news = move(there.machine, address)
                last.join()
                assert last.machine is not None, last.error
                end_of_it = Going(last.machine, start=False)
                time.sleep(1)
                end_of_it.machine.console.send(b"killall steady; wait; echo do''ne\n")
                end_of_it.wait_for(b"done", 60)
                said = bytes(last.machine.console.output).decode(errors="replace")
                assert "bad" not in said and "touched 4 MiB" in said and "ticks in" in said, said
                assert "moving" in end_of_it.run("echo $X")
    print(f"\nidle: {idle.downtime_ms:.0f} ms downtime of {idle.total_ms:.0f}, {idle.rounds} rounds; "
          f"busy: {busy.downtime_ms:.0f} ms of {busy.total_ms:.0f}, {busy.rounds} rounds, {busy.converged}")
    assert idle.converged and idle.downtime_ms < 2000
    assert [row["round"] for row in news if row["phase"] == "round"] == list(range(1, busy.rounds + 1))


