"""User-mode networking: the stream to passt, and passt itself where it is installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from framework.driver import Driver
from framework.packets import check_tcp, rfc1071, tcp_packet
from framework.run import ROOT

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.net_user import FRAME_MOST, NetUser
from hv.errors import ConfigError

HEADER = bytes(net.HEADER_SIZE)
FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(range(200))
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


class FakePasst:
    """The other end of the stream, in place of the program."""

    def __init__(self, forwards: object, mtu: int) -> None:
        self.peer, ours = socket.socketpair()
        ours.setblocking(False)
        self.fd = ours.detach()
        self.errors, self.complaints = os.pipe2(os.O_NONBLOCK)

    def complaint(self) -> str:
        return os.read(self.errors, 100).decode()

    def close(self) -> None:
        for fd in (self.fd, self.errors, self.complaints):
            os.close(fd)
        self.peer.close()


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr("hv.devices.virtio.net_user.Passt", FakePasst)
    device = Net(NetUser())
    driver = Driver(device).probe()
    peer = device.backend.passt.peer
    length = int.from_bytes(peer.recv(4), "big")        # the announcement
    assert peer.recv(length)[6:12] == device.mac
    for _ in range(60):
        driver.rings[net.RX].add([], [4096])
    driver.notify(net.RX)
    yield device, driver, peer
    device.close()


def arrived(driver: Driver) -> list[tuple[int, bytes]]:
    while driver.loop.poll():
        pass
    rows = [b"".join(parts)[:written] for _, written, parts in driver.rings[net.RX].take()]
    found = []
    while rows:
        count = int.from_bytes(rows[0][net.NUM_BUFFERS:net.HEADER_SIZE], "little")
        data = b"".join(rows[:count])
        found.append((data[0], data[net.HEADER_SIZE:]))
        del rows[:count]
    return found


def test_frames_have_their_length_in_front(stream):
    _, driver, peer = stream
    for parts in ([HEADER, FRAME], [HEADER + FRAME], [HEADER + FRAME[:9], FRAME[9:]], [HEADER[:5], HEADER[5:] + FRAME]):
        driver.request(net.TX, parts, [])
        assert peer.recv(4096) == struct.pack(">I", len(FRAME)) + FRAME


def test_frames_come_in_any_pieces(stream):
    device, driver, peer = stream
    frames = [FRAME, FRAME[:14], os.urandom(65000), FRAME * 3]
    data = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    got = []
    for at in range(0, len(data), 7001):
        peer.sendall(data[at:at + 7001])
        got += arrived(driver)
    assert got == [(net.HDR_DATA_VALID, frame) for frame in frames] and device.received == 4


def test_checksums_are_completed_and_too_large_frames_cut(stream):
    _, driver, peer = stream
    for size, count in ((1000, 1), (60000, 1), (65495, 46)):
        packet = tcp_packet(bytes(size), 4, gso_size=1448 if size > 1448 else 0)
        driver.request(net.TX, [packet[:12], packet[12:]], [])
        got, data = 0, b""
        while got < count:
            while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
                data += peer.recv(1 << 17)
            length = int.from_bytes(data[:4], "big")
            assert length <= FRAME_MOST
            frame, data = bytearray(data[4:4 + length]), data[4 + length:]
            if count == 1:
                assert len(frame) == len(packet) - net.HEADER_SIZE
                struct.pack_into(">H", frame, 24, rfc1071(bytes(frame[14:34])))     # IP's own is the guest's business
            check_tcp(bytes(frame), 4, 14)
            got += 1
        assert not data


def test_a_full_stream_loses_nothing(stream):
    device, driver, peer = stream
    ring, sent = driver.rings[net.TX], 0
    while not device._full:
        ring.add([HEADER + bytes(14) + sent.to_bytes(4, "big") * 10000], [])
        driver.notify(net.TX)
        sent += 1
        ring.take()
    peer.settimeout(5)
    data = bytearray()
    for number in range(sent):
        while len(data) < 4 + 40014:
            driver.loop.poll()
            data += peer.recv(1 << 16)
        assert data[:4] == (40014).to_bytes(4, "big") and data[18:22] == number.to_bytes(4, "big")
        del data[:40018]
    assert device.dropped == 0 and device.sent == sent


@pytest.mark.parametrize("data", [b"\0\0\0\1x", b"\xff\xff\xff\xff", b"\0\1\0\0"])
def test_a_stream_without_sense_takes_the_link_down(stream, data):
    device, driver, peer = stream
    peer.sendall(data)
    assert arrived(driver) == [] and device.config()[6] == 0 and "a frame of" in device.lost
    driver.request(net.TX, [HEADER + FRAME], [])
    assert device.dropped == 1 and driver.loop.poll() == 0


def test_passt_ends(stream):
    device, driver, peer = stream
    peer.close()
    assert arrived(driver) == [] and device.config()[6] == 0 and device.lost == "passt has ended"


# the program ---------------------------------------------------------------------------------------

def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_passt
def test_it_answers_and_ends_with_the_device():
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        port = test.getsockname()[1]
    device = NetConfig("user", forward=f"{port}:80").create()
    pid = device.backend.passt.pid
    try:
        assert alive(pid)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(ConfigError, match=f"port {port}/tcp of this host"):
            NetConfig("user", forward=f"{port}:80").create()
        driver = Driver(device).probe()
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 5
        while device.config()[6] and time.monotonic() < end:
            driver.rings[net.RX].add([], [2048])
            driver.notify(net.RX)
            driver.loop.poll(0.05)
        assert device.config()[6] == 0
    finally:
        device.close()
    assert not os.path.exists(f"/proc/{pid}"), "a zombie"


@needs_passt
def test_it_ends_when_we_are_killed():
    code = ("import sys, time; from hv.devices.virtio.net_config import NetConfig; "
            "device = NetConfig('user').create(); print(device.backend.passt.pid, flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(pid)


def test_without_the_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="passt, which is not installed") as caught:
        NetConfig("user").create()
    assert "install the package passt" in caught.value.hint
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho 'Failed to send' >&2\necho 'No external interface' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match="did not start: No external interface"):
        NetConfig("user").create()
    program.write_text("no program")
    with pytest.raises(ConfigError, match=r"Exec format error|did not start"):
        NetConfig("user").create()
    assert os.listdir("/proc/self/fd") == before
