"""A target for what a vhost-user back end answers: another program, which may be broken or foreign."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
from pathlib import Path

from framework.driver import Driver

from fuzz.engine import Target
from fuzz.script import Script
from hv.devices.vhost_user import frontend, protocol
from hv.devices.vhost_user.blk import CONFIG_SIZE, VhostUserBlk
from hv.devices.virtio import ids
from hv.errors import ConfigError
from hv.memory.guest import GuestMemory

FEATURES = ids.F_VERSION_1 | ids.F_INDIRECT_DESC | ids.F_EVENT_IDX | protocol.F_PROTOCOL_FEATURES


def run_back_end(data: bytes) -> None:
    """Replies from `data`, one after the other, whatever is asked; then the end of the connection."""
    with tempfile.TemporaryDirectory(prefix="pyhv-fuzz-") as place:
        path = str(Path(place) / "s")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=_answer, args=(listener, data))
        thread.start()
        memory = GuestMemory(16 << 20, backing="memfd")
        drain, frontend.DRAIN = frontend.DRAIN, 0.005       # nobody serves the rings: don't wait for it
        try:
            _front_end(path, memory)
        finally:
            frontend.DRAIN = drain
            listener.close()
            thread.join(5)
            memory.close()
        assert not thread.is_alive()


def _front_end(path: str, memory: GuestMemory) -> None:
    try:
        device = VhostUserBlk(path, 1)
    except ConfigError:
        return
    driver = Driver(device, memory)
    device.kick_fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in device.queues]
    try:
        driver.probe()
        driver.rings[0].add([bytes(16)], [512, 1])
        driver.notify(0)
        driver.loop.poll(0.01)
        device.read_config(0, 8)
        device.stop()
        device.resume()
        device.set_status(0)
    finally:
        device.close()
        for queue in device.queues:
            queue.reset()
        for fd in device.kick_fds:
            os.close(fd)


def _answer(listener: socket.socket, data: bytes) -> None:
    """For each message one piece of `data`: its length, flags (1: as many bytes as claimed), and the bytes."""
    script = Script(data)
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(0.3)
            while script.left:
                head, ancillary, _, _ = connection.recvmsg(12, socket.CMSG_SPACE(32))
                protocol.close_descriptors(ancillary)
                if len(head) < 12:
                    return
                request, flags, size = struct.unpack("=III", head)
                if size:
                    connection.recv(size)
                asked = request in (1, 11, 15, 17, 24) or flags & protocol.NEED_REPLY
                if not asked:
                    continue
                code = script.number(1)
                payload = script.take(script.number(2))
                number = request if not code & 1 else script.number(4)
                answered = 5 if not code & 2 else script.number(4)
                length = len(payload) if not code & 4 else script.number(4)
                connection.sendall(struct.pack("=III", number, answered, length) + payload)


def _replies(*payloads: bytes) -> bytes:
    return b"".join(struct.pack("<BH", 0, len(payload)) + payload for payload in payloads)


def _number(value: int) -> bytes:
    return struct.pack("=Q", value)


_CONFIG = struct.pack("=III", 0, CONFIG_SIZE, 0) + (1 << 11).to_bytes(8, "little").ljust(CONFIG_SIZE, b"\0")
_PLAIN = protocol.P_MQ | protocol.P_CONFIG

TARGETS = {
    "vhost-user": Target(run_back_end, (
        _replies(_number(FEATURES), _number(_PLAIN), _number(1), _CONFIG, _number(FEATURES), struct.pack("=II", 0, 0),
                 _number(FEATURES), struct.pack("=II", 0, 0)),
        _replies(_number(FEATURES), _number(_PLAIN | protocol.P_REPLY_ACK), _number(0), _number(0), _number(1), _CONFIG,
                 *[_number(0)] * 12, struct.pack("=II", 0, 1), *[_number(0)] * 12),
        _replies(_number(0)), _replies(_number(FEATURES), _number(0)))),
}
