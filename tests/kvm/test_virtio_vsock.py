"""The socket device and a real Linux guest: streams both ways, half close, refusal, hundreds at once, lost streams.

The megabytes are few: where the guest's kernel is emulated, it copies a few of them a second.
"""

from __future__ import annotations

import selectors
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import ROOT, needs_kvm
from framework.vsock import listener_at

from hv.devices.virtio.vsock import Vsock
from hv.devices.virtio.vsock_config import VsockConfig
from hv.kernels.initramfs import busybox

pytestmark = [needs_kvm, pytest.mark.timeout(2400),
              pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")]

CID = 42
BYTES = 4 << 20
MANY = 200


class Guest:
    """The shell, and the host's end of its socket device."""

    def __init__(self, shell: Shell, path: str) -> None:
        self.shell, self.path = shell, path
        self.device: Vsock = shell.machine.devices["vsock0"]    # type: ignore[assignment]

    def background(self, command: str, waits_for: str = "listening") -> None:
        """Start a command that says when it is ready."""
        self.shell.machine.console.send(f"vsock {command} > /tmp/out 2>&1 & "
                                        f"until grep -q {waits_for} /tmp/out; do :; done; echo REA''DY\n".encode())
        self.shell.wait_for(b"READY")
        self.shell.wait_for(b"pyhv# ")

    def said(self) -> str:
        """What the background command printed, once it has ended."""
        return self.shell.run("wait; cat /tmp/out", timeout=120)

    def connect(self, port: int) -> socket.socket:
        """As a host program does it."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        client.connect(self.path)
        client.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n"):
            byte = client.recv(1)
            if not byte:
                client.close()
                raise ConnectionRefusedError
            line += byte
        assert line.startswith(b"OK ")
        return client


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    skip_without_build_tools()
    folder = tmp_path_factory.mktemp("vsock")
    program = folder / "vsock"
    source = ROOT / "guests/linux/vsock.c"
    subprocess.run(["gcc", "-static", "-O2", "-s", "-o", program, source], check=True, timeout=60)
    initrd = busybox(files=((str(program), "bin/vsock"),))
    path = str(folder / "v")
    with Shell(kernel("micro") / "vmlinux", devices=(VsockConfig(path, CID),), initrd=initrd, timeout=900) as shell:
        yield Guest(shell.booted(), path)
        assert shell.power_off() == "halt"      # this kernel knows no other way
        device = shell.machine.devices["vsock0"]
        assert not device.faults, device.fault_texts
    assert not Path(path).exists()


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Run `work` beside the guest; the answer waits for its result."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()

    def wait() -> object:
        thread.join(120)
        assert result, "the host's program failed"
        return result[0]

    return wait


def drain(stream: socket.socket) -> tuple[int, int]:
    """(bytes, checksum) to the stream's end."""
    count = checksum = 0
    while data := stream.recv(1 << 16):
        count, checksum = count + len(data), zlib.crc32(data, checksum)
    return count, checksum


def data_of(count: int) -> bytes:
    return (bytes(range(251)) * (count // 251 + 1))[:count]


def test_the_guest_knows_its_cid(guest: Guest) -> None:
    assert f"cid {CID}" in guest.shell.run("vsock cid")


def test_guest_to_host_with_an_answer_behind_its_half_close(guest: Guest) -> None:
    with listener_at(f"{guest.path}_5000") as listener:
        def take() -> str:
            with listener.accept()[0] as stream:
                count, checksum = drain(stream)
                stream.sendall(b"%d %08x" % (count, checksum))
                return f"sent {count} {checksum:08x} answer {count} {checksum:08x}"

        listener.settimeout(60)
        host = in_thread(take)
        said = guest.shell.run(f"vsock send 2 5000 {BYTES}", timeout=120)
        assert str(host()) in said and f"sent {BYTES} " in said


def test_host_to_guest_with_an_answer_behind_its_half_close(guest: Guest) -> None:
    guest.background("sink 6000")
    data = data_of(BYTES)
    with guest.connect(6000) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        assert stream.recv(100) == b"%d %08x\n" % (BYTES, zlib.crc32(data))
        assert stream.recv(1) == b""
    assert f"sunk {BYTES} {zlib.crc32(data):08x}" in guest.said()


def test_a_guest_listener_sends(guest: Guest) -> None:
    guest.background("source 6001 1000000")
    with guest.connect(6001) as stream:
        count, checksum = drain(stream)
    assert count == 1000000 and f"sent {checksum:08x}" in guest.said()


def test_a_host_listener_sends_behind_the_guests_half_close(guest: Guest) -> None:
    data = data_of(1000000)
    with listener_at(f"{guest.path}_5001") as listener:
        def give() -> bool:
            with listener.accept()[0] as stream:
                assert stream.recv(1) == b""
                stream.sendall(data)
                return True

        listener.settimeout(60)
        host = in_thread(give)
        assert f"got {len(data)} {zlib.crc32(data):08x}" in guest.shell.run("vsock get 2 5001", timeout=120)
        assert host()


def test_a_closed_port_is_refused_both_ways(guest: Guest) -> None:
    assert "connect: Connection reset by peer" in guest.shell.run("vsock try 2 7777")
    with pytest.raises(ConnectionRefusedError):
        guest.connect(7777)
    assert "connect: " in guest.shell.run("vsock try 9 7777")      # no such CID


def test_a_guest_that_does_not_read_its_last_bytes(guest: Guest) -> None:
    with listener_at(f"{guest.path}_5003") as listener:
        def give() -> bytes:
            with listener.accept()[0] as stream:
                first = stream.recv(1)
                stream.sendall(b"nobody reads this")
                return first + stream.recv(1)

        listener.settimeout(60)
        host = in_thread(give)
        assert "dropped" in guest.shell.run("vsock drop 2 5003")
        assert host() == b"x"


def test_hundreds_of_streams_from_the_guest(guest: Guest) -> None:
    with listener_at(f"{guest.path}_5002", backlog=8) as listener, selectors.DefaultSelector() as selector:
        def echo() -> bool:
            selector.register(listener, selectors.EVENT_READ)
            ended = most = 0
            while ended < MANY:
                for key, _ in selector.select(60):
                    stream = key.fileobj
                    assert isinstance(stream, socket.socket)
                    if stream is listener:
                        selector.register(stream.accept()[0], selectors.EVENT_READ)
                    elif data := stream.recv(4096):
                        stream.sendall(data)
                    else:
                        selector.unregister(stream)
                        stream.close()
                        ended += 1
                most = max(most, len(selector.get_map()) - 1)
            return most == MANY

        host = in_thread(echo)
        assert f"many {MANY}" in guest.shell.run(f"vsock many 2 5002 {MANY}", timeout=120)
        assert host()


def test_hundreds_of_streams_from_the_host(guest: Guest) -> None:
    guest.background(f"serve 6002 {MANY}")
    streams = [guest.connect(6002) for _ in range(MANY)]
    assert guest.device.open >= MANY
    for number, stream in enumerate(streams):
        stream.sendall(b"stream %d" % number)
    for number, stream in enumerate(streams):
        assert stream.recv(100) == b"stream %d" % number
        stream.close()
    assert f"served {MANY}" in guest.said()


def test_a_program_in_this_process(guest: Guest) -> None:
    with guest.device.listen(5004) as listener:
        listening = in_thread(lambda: listener.accept(timeout=60))
        done = in_thread(lambda: guest.shell.run("vsock get 2 5004"))
        stream = listening()
        assert isinstance(stream, socket.socket)
        stream.sendall(b"from Python")
        stream.close()
        assert f"got 11 {zlib.crc32(b'from Python'):08x}" in str(done())
    guest.background("serve 6003 1")
    with guest.device.connect(6003, timeout=60) as stream:
        stream.settimeout(60)
        stream.sendall(b"there and back")
        assert stream.recv(100) == b"there and back"
    assert "served 1" in guest.said()


def test_streams_are_gone_once_a_state_is_loaded(guest: Guest) -> None:
    machine, device = guest.shell.machine, guest.device
    with listener_at(f"{guest.path}_5005") as listener:
        listener.settimeout(60)
        waiting = in_thread(lambda: guest.shell.run("vsock get 2 5005"))
        stream = listener.accept()[0]
        assert stream.recv(1) == b""        # the guest has ended its half, and waits for ours
        machine.pause()
        device.stop()
        device.load(device.state())
        device.resume()
        machine.resume()
        # Linux wakes a recv that waits with the one, and answers a later one with the other (virtio_vsock_reset_sock).
        said = str(waiting())
        assert "recv: Connection reset by peer" in said or "recv: Transport endpoint is not connected" in said
        stream.close()
    end = time.monotonic() + 30
    while device.open and time.monotonic() < end:
        time.sleep(0.05)
    assert not device.open
