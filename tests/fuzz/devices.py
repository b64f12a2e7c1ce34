"""Targets in the devices: headers and messages that a guest's drivers write, and what other programs send."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from framework.console import Rig
from framework.vsock import EpollLoop

from fuzz.engine import Target
from fuzz.script import BROKEN, chain, descriptor, drive, driven, life, outside
from hv.devices.virtio import blk, fuse
from hv.devices.virtio import console as console_model
from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.balloon import DEFLATE, INFLATE, STATS, BalloonConfig
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.console import CONTROL_RX, CONTROL_TX, RX0, TX0
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_pair import NetCable
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError

DISK = 1 << 18


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new folder, gone afterwards, whatever a guest made of it."""
    place = Path(tempfile.mkdtemp(prefix="pyhv-fuzz-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# block -------------------------------------------------------------------------------------------


def _head(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def run_block(data: bytes) -> None:
    """A request's header, ranges, and where they are split."""
    with folder() as place:
        (place / "disk").write_bytes(bytes(DISK))
        driven(DiskConfig(str(place / "disk")).create(), data)
        assert (place / "disk").stat().st_size == DISK


def run_overlay(data: bytes) -> None:
    """A copy-on-write overlay with any head, and requests on top of it where it is taken."""
    with folder() as place:
        (place / "base").write_bytes(bytes(DISK))
        with contextlib.suppress(ConfigError):      # a fresh one, so that the changes are few
            DiskConfig(str(place / "base"), overlay=str(place / "top")).create().close()
        whole = bytearray((place / "top").read_bytes()) if (place / "top").exists() else bytearray()
        cut = int.from_bytes(data[:2], "little")
        whole[:len(data[2:cut + 2])] = data[2:cut + 2]
        (place / "top").write_bytes(whole)
        try:
            device = DiskConfig(str(place / "base"), overlay=str(place / "top")).create()
        except ConfigError:
            return
        driven(device, data[cut + 2:])
        assert (place / "base").read_bytes() == bytes(DISK)


def _ranges(*rows: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *row) for row in rows)


BLOCK = (
    chain(0, [_head(blk.IN, 3)], [4096, 1]) + chain(0, [_head(blk.OUT, 8), bytes(1024)], [1]) + life(2),
    chain(0, [_head(blk.OUT, 1)[:5], _head(blk.OUT, 1)[5:] + bytes(512)], [1], indirect=True) + life(1) + life(3),
    chain(0, [_head(blk.FLUSH)], [1]) + chain(0, [_head(blk.GET_ID)], [16, 8, 1]) + life(4),
    chain(0, [_head(blk.DISCARD), _ranges((0, 8, 0), (16, 8, 1))], [1]),
    chain(0, [_head(blk.WRITE_ZEROES), _ranges((0, 8, 0), (1, 1, 1))], [1]) + chain(0, [_head(99)], [1]),
    *BROKEN)


# network -----------------------------------------------------------------------------------------

_FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(60)


def _tcp(length: int) -> bytes:
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + length, 0, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    return b"\2" * 12 + b"\x08\0" + ip + struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 512, 0, 0) + bytes(length)


def _net_header(flags: int = 0, gso: int = 0, length: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, length, size, start, offset, 0)


def run_net(data: bytes) -> None:
    """Headers of frames, from the guest and from the guest at the other end of the cable; control commands."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)

    def peer(frame: bytes) -> None:
        with contextlib.suppress(OSError):
            theirs.send(frame)
        with contextlib.suppress(OSError):
            theirs.recv(1 << 17)

    with theirs:
        driven(Net(NetCable(ours.detach())), data, peer)


NETWORK = (
    chain(1, [_net_header() + _FRAME], []) + chain(0, [], [4096]) + outside(_net_header() + _FRAME) + life(2),
    chain(1, [_net_header(1, 1, 54, 1000, 34, 16), _tcp(3000)], []) + life(0, 1) + life(1),
    chain(0, [], [1024, 4096], indirect=True) + outside(_net_header(1, 1, 54, 1000, 34, 16) + _tcp(3000)),
    chain(0, [], [65536]) * 3 + outside(_net_header(1, 0, 0, 0, 34, 16) + _tcp(9)) + outside(b"") + outside(b"x" * 5),
    chain(2, [b"\0\0", b"\1"], [1]) + chain(2, [b"\1\0" + bytes(12)], [1]), *BROKEN)


# console -----------------------------------------------------------------------------------------


def run_console(data: bytes) -> None:
    """Control messages, the guest's console and a port on a Unix socket with somebody at it."""
    with folder() as place:
        rig = Rig(f"agent,socket={place}/port", f"log,file={place}/log")
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        try:
            with contextlib.suppress(OSError):
                client.connect(f"{place}/port")

            def peer(text: bytes) -> None:
                rig.console.send(text[:64])
                with contextlib.suppress(OSError):
                    client.send(text)
                with contextlib.suppress(OSError):
                    client.recv(1 << 16)

            drive(rig.driver, data, peer)
        finally:
            client.close()
            rig.device.set_status(0)
            rig.device.close()
            for queue in rig.device.queues:
                queue.reset()


def _control(port: int, event: int, value: int) -> bytes:
    return chain(CONTROL_TX, [struct.pack("<IHH", port, event, value)], [])


CONSOLE = (
    chain(CONTROL_RX, [], [64]) * 8 + _control(0xFFFFFFFF, console_model.DEVICE_READY, 1)
    + _control(1, console_model.PORT_READY, 1) + _control(1, console_model.PORT_OPEN, 1) + chain(4, [], [64])
    + outside(b"hello") + chain(5, [b"answer"], []) + _control(1, console_model.PORT_OPEN, 0) + life(2),
    chain(TX0, [b"text\n"], []) + chain(RX0, [], [16]) + outside(b"typed") + life(1), *BROKEN)


# balloon -----------------------------------------------------------------------------------------


def _pages(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


BALLOON = (
    chain(INFLATE, [_pages(0xC00, 0xC01, 0xFFF, 0x1000)], []) + chain(DEFLATE, [_pages(0xC00)], []) + life(2),
    chain(STATS, [struct.pack("<HQHQ", 4, 1 << 30, 5, 1 << 20)], []) + life(3) + life(1),
    descriptor(INFLATE, 0, 0xC00000, 1 << 20, 0, 0, 0) + chain(3, [], [4096]) + chain(4, [], [65536]), *BROKEN)


# sockets -----------------------------------------------------------------------------------------


def run_vsock(data: bytes) -> None:
    """Packets of the guest, and what a host client says before and after its CONNECT line."""
    with folder() as place:
        device = VsockConfig(str(place / "v")).create()
        loop = EpollLoop()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place / "v_80"))
        listener.listen(8)
        listener.setblocking(False)
        clients: list[socket.socket] = []

        def peer(text: bytes) -> None:
            if not clients or text[:1] == b"+":
                clients.append(socket.socket(socket.AF_UNIX))
                clients[-1].setblocking(False)
                with contextlib.suppress(OSError):
                    clients[-1].connect(str(place / "v"))
            with contextlib.suppress(OSError):
                clients.append(listener.accept()[0])
                clients[-1].setblocking(False)
            with contextlib.suppress(OSError):
                clients[-1].send(text)
            with contextlib.suppress(OSError):
                clients[-1].recv(1 << 16)

        try:
            driven(device, data, peer, loop)
        finally:
            for each in (*clients, listener, loop.epoll):
                each.close()


def _packet(op: int, port: int, host_port: int, data: bytes = b"", kind: int = 1, flags: int = 0) -> bytes:
    head = struct.pack("<QQIIIHHIII", 3, 2, port, host_port, len(data), kind, op, flags, 1 << 18, 0)
    return chain(1, [head, data] if data else [head], [])


SOCKETS = (
    chain(0, [], [44, 4096]) * 8 + _packet(vp.OP_REQUEST, 1000, 80) + _packet(vp.OP_RW, 1000, 80, b"hello")
    + outside(b"answer") + _packet(vp.OP_CREDIT_UPDATE, 1000, 80) + _packet(vp.OP_SHUTDOWN, 1000, 80, flags=3)
    + life(2),
    chain(0, [], [44, 4096]) * 4 + outside(b"CONNECT 5000\n") + outside(b"more")
    + _packet(vp.OP_RESPONSE, 5000, 1 << 30) + _packet(vp.OP_RST, 5000, 1 << 30) + life(3) + life(4),
    _packet(vp.OP_REQUEST, 1, 81) + _packet(vp.OP_REQUEST, 1, 80, kind=2) + _packet(77, 1, 80), *BROKEN)


# shared folder -----------------------------------------------------------------------------------


def run_share(data: bytes) -> None:
    """FUSE requests by a guest that owns its folder; nothing beside it may change."""
    with folder() as place:
        inside = place / "shared"
        inside.mkdir()
        (place / "secret").write_text("beside the folder")
        (inside / "file").write_bytes(b"0123456789" * 100)
        (inside / "dir").mkdir()
        (inside / "dir" / "deep").write_text("deep")
        (inside / "out").symlink_to("../secret")
        driven(ShareConfig(str(inside)).create(), data)
        assert sorted(os.listdir(place)) == ["secret", "shared"]
        assert (place / "secret").read_text() == "beside the folder"


def _fuse(opcode: int, node: int, body: bytes = b"", room: int = 256, queue: int = 1) -> bytes:
    head = fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), opcode, 2, node, 0, 0, 100, 0)
    return chain(queue, [head, body] if body else [head], [16, room] if room else [], indirect=True)


_INIT = _fuse(fuse.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFFFFFF))
_FILE = _INIT + _fuse(fuse.LOOKUP, 1, b"file\0") + _fuse(fuse.OPEN, 2, fuse.OPEN_IN.pack(os.O_RDWR, 0))
SHARE = (
    _FILE + _fuse(fuse.READ, 2, fuse.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0), 4096)
    + _fuse(fuse.WRITE, 2, fuse.WRITE_IN.pack(1, 5, 5, 0, 0, 0, 0) + b"hello") + _fuse(fuse.GETATTR, 2, bytes(16))
    + _fuse(fuse.FLUSH, 2, fuse.FLUSH_IN.pack(1, 0, 0, 0)) + _fuse(fuse.RELEASE, 2, fuse.RELEASE_IN.pack(1, 2, 0, 0))
    + _fuse(fuse.FORGET, 2, fuse.FORGET_IN.pack(1), 0) + life(2),
    _INIT + _fuse(fuse.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0))
    + _fuse(fuse.READDIRPLUS, 1, fuse.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0), 4096)
    + _fuse(fuse.READDIR, 1, fuse.READ_IN.pack(1, 0, 1024, 0, 0, 0, 0), 1024) + _fuse(fuse.STATFS, 1),
    _INIT + _fuse(fuse.LOOKUP, 1, b"dir\0") + _fuse(fuse.RENAME2, 1, fuse.RENAME2_IN.pack(2, 2, 0) + b"file\0deep\0")
    + _fuse(fuse.MKDIR, 2, fuse.MKDIR_IN.pack(0o755, 0) + b"new\0") + _fuse(fuse.UNLINK, 1, b"out\0")
    + _fuse(fuse.SYMLINK, 1, b"link\0../secret\0") + _fuse(fuse.LINK, 1, fuse.LINK_IN.pack(2) + b"again\0")
    + _fuse(fuse.LOOKUP, 1, b"..\0") + _fuse(fuse.LOOKUP, 2, b"../../secret\0") + _fuse(fuse.READLINK, 3),
    _FILE + _fuse(fuse.SETATTR, 2, fuse.SETATTR_IN.pack(fuse.FATTR_SIZE | 1, 0, 0, 50, *[0] * 7, 0o600, *[0] * 4))
    + _fuse(fuse.SETXATTR, 2, fuse.SETXATTR_IN.pack(3, 0) + b"user.a\0abc") + _fuse(fuse.LISTXATTR, 2, bytes(8))
    + _fuse(fuse.GETXATTR, 2, fuse.GETXATTR_IN.pack(64, 0) + b"user.a\0")
    + _fuse(fuse.FALLOCATE, 2, fuse.FALLOCATE_IN.pack(1, 0, 8192, 0, 0))
    + _fuse(fuse.LSEEK, 2, fuse.LSEEK_IN.pack(1, 0, 3, 0)),
    _FILE + _fuse(fuse.SETLK, 2, fuse.LK_IN.pack(1, 7, 0, 99, 1, 100, 0, 0))
    + _fuse(fuse.SETLKW, 2, fuse.LK_IN.pack(1, 8, 0, 99, 1, 100, 0, 0))
    + _fuse(fuse.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(2), 0, 0)
    + _fuse(fuse.GETLK, 2, fuse.LK_IN.pack(1, 8, 0, 99, 1, 100, 0, 0)) + life(1) + life(2)
    + _fuse(fuse.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(1, 0) + fuse.FORGET_ONE.pack(2, 1), 0, 0)
    + _fuse(fuse.DESTROY, 0),
    *BROKEN)


TARGETS = {
    "block": Target(run_block, BLOCK),
    "overlay": Target(run_overlay, (b"\0\0" + BLOCK[0], *(struct.pack("<H", 64) + bytes(64) + seed for seed in BLOCK))),
    "network": Target(run_net, NETWORK),
    "console": Target(run_console, CONSOLE),
    "balloon": Target(lambda data: driven(BalloonConfig().create(), data), BALLOON),
    "vsock": Target(run_vsock, SOCKETS),
    "share": Target(run_share, SHARE),
}
