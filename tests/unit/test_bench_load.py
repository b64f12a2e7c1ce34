"""What drives devices for `pyhv bench io`: it sends what it says, counts right, and notices what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from framework.driver import Driver

from hv.bench import io_vsock, stream_end
from hv.bench.fuse_load import FuseLoad
from hv.bench.io_group import background, program
from hv.bench.rings import FastRing
from hv.devices.virtio import fuse
from hv.devices.virtio.device import VirtioDevice
from hv.devices.virtio.fs_config import ShareConfig
from hv.errors import HvError

MIB = 1 << 20
NAMES = [b"file%d" % number for number in range(20)]


class Echo(VirtioDevice):
    """Writes what it reads."""

    QUEUES = (8,)

    def notified(self, index):
        for chain in self.requests(index):
            self.queues[index].push(chain, chain.writer().write(chain.reader().read(100)))
        self.used(index)


def test_requests_go_out_again_and_again_and_around_the_ring():
    driver = Driver(Echo()).probe()
    ring = FastRing(driver, 0)
    chains = [ring.chain([b"abc"], [3]), ring.chain([b"defg"], [2, 2])]
    for number in range(70000):         # the indices wrap at 65536
        chains[0].readable[0][:] = b"%03d" % (number % 1000)
        ring.offer(*chains)
        assert ring.in_flight == 2 and not ring.done
        driver.notify(0)
        assert ring.done and ring.ready
        assert list(ring.taken()) == [(0, 3), (2, 4)] and not ring.ready and not ring.in_flight
        assert chains[0].writable[0] == b"%03d" % (number % 1000)
    assert [bytes(view) for view in chains[1].writable] == [b"de", b"fg"]
    assert driver.interrupts.used[0] == 70000, "one interrupt for each batch"
    with pytest.raises(ValueError, match="no descriptor"):
        ring.chain([b"x"] * 4, [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    share = tmp_path / "share"
    share.mkdir()
    for name in NAMES:
        (share / os.fsdecode(name)).write_bytes(b"x")
    (share / "big").write_bytes(os.urandom(8 * MIB))
    return share


def seen(load: FuseLoad, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which operations the server is asked for."""
    found: list[int] = []
    server = load._device.server
    answer = server.answer

    def noted(request):
        found.append(request.opcode)
        return answer(request)

    monkeypatch.setattr(type(server), "answer", lambda self, request: noted(request))
    return found


def test_every_request_reaches_our_server_and_is_counted(folder, monkeypatch):
    with FuseLoad(ShareConfig(folder).create(), NAMES, b"big") as load:
        found = seen(load, monkeypatch)
        assert load.getattr(160)[0] == found.count(fuse.GETATTR) == 160
        assert load.lookup(160)[0] == found.count(fuse.LOOKUP) == 160
        assert load.open(160)[0] == found.count(fuse.OPEN) + found.count(fuse.RELEASE) == 160
        assert load.readdirplus(32)[0] == found.count(fuse.READDIRPLUS) == 32
        amount, spent = load.read(16 * MIB, (folder / "big").read_bytes()[:MIB])
        assert amount == 16 * MIB and spent > 0
        assert found.count(fuse.READ) == 16 + 4     # the first four are compared
        assert not load._device.faults


def test_what_a_server_does_wrong_is_noticed(folder):
    with FuseLoad(ShareConfig(folder).create(), NAMES, b"big") as load:
        with pytest.raises(HvError, match="not what the file holds"):
            load.read(8 * MIB, b"other")
        (folder / "file3").unlink()
        with pytest.raises(HvError, match="operation 14 failed: Stale file handle"):
            load.open(32)
        with pytest.raises(HvError, match="not complete"):
            [(folder / os.fsdecode(name)).unlink() for name in NAMES[4:]]
            load.readdirplus(16)


def test_virtiofsd_takes_the_same_requests(folder, tmp_path):
    daemon = program("virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "virtiofsd")
    if daemon is None or os.geteuid():
        pytest.skip("virtiofsd is not installed, or needs root")
    socket = tmp_path / "fs.sock"
    before = len(os.listdir("/proc/self/fd"))
    with background([daemon, "-f", f"--socket-path={socket}", "-o", f"source={folder}"], socket), \
            FuseLoad(ShareConfig(tag="x", vhost_user=str(socket)).create(), NAMES, b"big") as load:
        assert load.bulk == MIB
        assert load.getattr(160)[0] == load.lookup(160)[0] == load.open(160)[0] == 160
        assert load.readdirplus(32)[0] == 32
        assert load.read(16 * MIB, (folder / "big").read_bytes()[:MIB])[0] == 16 * MIB
    assert not socket.exists() and len(os.listdir("/proc/self/fd")) == before


def test_a_program_that_does_not_start_says_why(tmp_path):
    with pytest.raises(HvError, match="sh does not start: no such luck"), \
            background(["sh", "-c", "echo no such luck >&2; exit 1"], tmp_path / "s"):
        pass


@pytest.mark.parametrize("cut", [1, 7, 8, 100, 65535, 65536, 65537, 200000])
def test_the_numbers_in_a_stream_are_found_whatever_the_reads(cut):
    piece = stream_end.PIECE
    stream = b"".join(n.to_bytes(8, "little") + bytes(piece - 16) + stream_end.TAIL for n in range(8))
    at = 0
    for start in range(0, len(stream), cut):
        data = memoryview(stream)[start:start + cut]
        assert not stream_end.wrong(data, at)
        at += len(data)
        if cut < 100 and start > 3 * piece:
            break
    if cut >= 65535:
        moved = stream[:piece] + stream[piece + 8:]      # eight bytes are lost
        assert sum(stream_end.wrong(memoryview(moved)[start:start + cut], start)
                   for start in range(0, len(moved), cut))


@pytest.mark.parametrize("buffer", [4096, stream_end.PIECE])
def test_vsock_streams_arrive(buffer):
    before = len(os.listdir("/proc/self/fd"))
    assert io_vsock._to_guest(8 * MIB, buffer) > 0
    assert io_vsock._to_host(8 * MIB) > 0
    assert io_vsock._plain(8 * MIB) > 0
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("credit", [2, 3])
def test_the_guest_sends_no_more_than_it_should(monkeypatch, credit):
    send = io_vsock._Guest.send

    def meagre(self, most):
        self.credit = min(self.credit, credit * stream_end.PIECE)
        send(self, most)

    monkeypatch.setattr(io_vsock._Guest, "send", meagre)
    assert io_vsock._to_host(2 * MIB) > 0


def test_a_byte_that_changed_on_the_way_to_the_host_is_noticed(monkeypatch):
    send = io_vsock._Guest.send

    def changed(self, most):
        if self.sent > MIB:
            self._packets[0].readable[1][-8:] = b"not end."
        send(self, most)

    monkeypatch.setattr(io_vsock._Guest, "send", changed)
    with pytest.raises(HvError, match="as wrong"):
        io_vsock._to_host(8 * MIB)


def test_a_piece_lost_on_the_way_to_the_guest_is_noticed(monkeypatch):
    poll = io_vsock._Guest.poll

    def forgets(self, timeout):
        before = self.received
        poll(self, timeout)
        if before < MIB <= self.received:
            self.received -= 8

    monkeypatch.setattr(io_vsock._Guest, "poll", forgets)
    monkeypatch.setattr(io_vsock, "_PATIENCE", 2.0)
    with pytest.raises(HvError, match="the guest has"):
        io_vsock._to_guest(8 * MIB, 4096)
