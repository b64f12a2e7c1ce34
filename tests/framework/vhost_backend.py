"""A vhost-user back end for tests: a thread that serves rings in a guest's shared memory, by a Python function.

    def serve(back_end, index, chain): return bytes written, or None to keep it
    with BackEnd(path, serve, features=...) as back_end: ...

It follows docs/interop/vhost-user.rst from the other side, asserts what the front end must keep to, and misbehaves on
demand: `mute` requests are not answered, `refused` ones are answered by an error.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from hv.devices.vhost_user import protocol as p
from hv.devices.virtio import ids
from hv.devices.virtio.chain import Chain
from hv.devices.virtio.queue import Queue
from hv.errors import GuestError

RING_FEATURES = ids.F_VERSION_1 | ids.F_INDIRECT_DESC | ids.F_EVENT_IDX
ALL_PROTOCOL = p.P_MQ | p.P_REPLY_ACK | p.P_BACKEND_REQ | p.P_CONFIG


class Mapped:
    """A region of the guest's memory, mapped here."""

    def __init__(self, fd: int, gpa: int, size: int, user: int, offset: int) -> None:
        self.gpa, self.size, self.user = gpa, size, user
        self.view = memoryview(mmap.mmap(fd, size, offset=offset))
        os.close(fd)


class Memory:
    """What hv's Queue needs of a GuestMemory."""

    dirty = first_use = None

    def __init__(self, regions: list[Mapped]) -> None:
        self.regions = regions

    def view(self, gpa: int, length: int) -> memoryview:
        for each in self.regions:
            if each.gpa <= gpa and gpa + length <= each.gpa + each.size:
                return each.view[gpa - each.gpa:gpa - each.gpa + length]
        raise GuestError("not guest RAM", gpa, length)

    def guest_address(self, user: int) -> int:
        return next(each.gpa + user - each.user for each in self.regions if each.user <= user < each.user + each.size)


class BackEnd:
    """Listens at `path`, serves one front end after the other until closed."""

    def __init__(self, path: Path | str, serve: Callable[[BackEnd, int, Chain], int | None], *,
                 features: int = RING_FEATURES | p.F_PROTOCOL_FEATURES, protocol: int = ALL_PROTOCOL, queues: int = 2,
                 config: bytes = b"") -> None:
        self.path, self.serve = str(path), serve
        self.features, self.protocol, self.queues, self.config = features, protocol, queues, bytearray(config)
        self.mute: set[int] = set()
        self.refused: set[int] = set()
        self.passive: set[int] = set()      # rings that are not served when kicked
        self.log: list[int] = []            # requests, in the order in which they came
        self.chosen = 0                     # SET_FEATURES
        self.channel: socket.socket | None = None
        self.tasks: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self.line: socket.socket | None = None
        self.memory = Memory([])
        self.rings: dict[int, Queue] = {}
        self.bases: dict[int, int] = {}
        self.kicks: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.enabled: set[int] = set()
        self._wake = os.eventfd(0)
        self._ending = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._main, name="vhost-back-end")
        self._thread.start()

    # from the test's thread ---------------------------------------------------------------------------

    def run(self, task: Callable[[], None]) -> None:
        """Have the back end's thread do it."""
        self.tasks.append(task)
        os.eventfd_write(self._wake, 1)

    def hang_up(self) -> None:
        """Cut the connection, as a death does."""
        self.run(self._cut)

    def send_on_channel(self, request: int, payload: bytes = b"", flags: int = 0) -> None:
        assert self.channel is not None
        self.channel.sendall(struct.pack("=III", request, 1 | flags, len(payload)) + payload)

    def close(self) -> None:
        self._ending = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()
        os.close(self._wake)
        os.unlink(self.path)
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> BackEnd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # its thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not self._ending:
                watched = [self._listener if self.line is None else self.line, self._wake, *self.kicks.values()]
                for ready in select.select(watched, [], [])[0]:
                    if ready is self._listener:
                        self.line = self._listener.accept()[0]
                    elif ready == self._wake:
                        os.eventfd_read(self._wake)
                        while self.tasks:
                            self.tasks.pop(0)()
                    elif ready is self.line:
                        self._message()
                    else:
                        self._kicked(next((index for index, fd in self.kicks.items() if fd == ready), -1))
        except BaseException as error:      # the test shows it
            self.failure = error
        finally:
            self._cut()

    def _kicked(self, index: int) -> None:
        if index < 0:
            return          # a message of the same round has stopped the ring
        try:
            os.eventfd_read(self.kicks[index])
        except BlockingIOError:
            return
        self.look(index)

    def look(self, index: int) -> None:
        """Serve what is in a ring."""
        queue = self.rings.get(index)
        if queue is None or index not in self.enabled or index in self.passive:
            return
        while True:
            while (chain := queue.pop()) is not None:
                written = self.serve(self, index, chain)
                if written is not None:
                    queue.push(chain, written)
            self.signal(index)
            if not queue.listen():
                return

    def signal(self, index: int) -> None:
        if self.rings[index].needs_interrupt():
            os.eventfd_write(self.calls[index], 1)

    def _cut(self) -> None:
        for fd in (*self.kicks.values(), *self.calls.values()):
            os.close(fd)
        for queue in self.rings.values():
            queue.disable()
        for table in (self.rings, self.bases, self.kicks, self.calls):
            table.clear()
        self.enabled.clear()
        self.memory = Memory([])
        for end in (self.line, self.channel):
            if end is not None:
                end.close()
        self.line = self.channel = None

    def _message(self) -> None:
        assert self.line is not None
        try:
            data, ancillary, _, _ = self.line.recvmsg(12, socket.CMSG_SPACE(32))
        except ConnectionResetError:
            data = b""
        if not data:
            self._cut()
            return
        fds = array.array("i")
        for _, _, part in ancillary:
            fds.frombytes(part)
        request, flags, size = struct.unpack("=III", data)
        payload = self.line.recv(size, socket.MSG_WAITALL) if size else b""
        assert flags & 3 == 1 and not flags & p.REPLY and len(payload) == size
        self.log.append(request)
        answer = self._handle(request, payload, list(fds))
        if request in self.mute:
            return
        if request in self.refused:
            answer = struct.pack("=Q", 1)
        if answer is None and flags & p.NEED_REPLY:
            answer = struct.pack("=Q", 0)
        if answer is not None:
            try:
                self.line.sendall(struct.pack("=III", request, 1 | p.REPLY, len(answer)) + answer)
            except (BrokenPipeError, ConnectionResetError):
                self._cut()

    def _handle(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        index, number = struct.unpack("=II", payload) if len(payload) == 8 else (0, 0)
        value = int.from_bytes(payload[:8], "little")
        if request in (p.SET_VRING_KICK, p.SET_VRING_CALL):
            index = value & 0xFF
            table = self.kicks if request == p.SET_VRING_KICK else self.calls
            table[index] = fds.pop()
        elif request == p.GET_FEATURES:
            return struct.pack("=Q", self.features)
        elif request == p.SET_FEATURES:
            self.chosen = value
            assert not value & ~self.features, hex(value)
        elif request == p.GET_PROTOCOL_FEATURES:
            return struct.pack("=Q", self.protocol)
        elif request == p.SET_PROTOCOL_FEATURES:
            assert not value & ~self.protocol
        elif request == p.GET_QUEUE_NUM:
            return struct.pack("=Q", self.queues)
        elif request == p.SET_BACKEND_REQ_FD:
            self.channel = socket.socket(fileno=fds.pop())
        elif request == p.GET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", payload)
            assert len(payload) == 12 + size
            return payload[:12] + bytes(self.config[offset:offset + size])
        elif request == p.SET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", payload)
            self.config[offset:offset + size] = payload[12:]
        elif request == p.SET_MEM_TABLE:
            rows = [struct.unpack_from("=QQQQ", payload, 8 + 32 * at) for at in range(value & 0xFF)]
            assert len(fds) == len(rows)
            self.memory = Memory([Mapped(fd, *row) for fd, row in zip(fds, rows, strict=True)])
            fds.clear()
        elif request == p.SET_VRING_NUM:
            self.rings[index] = Queue(self.memory, index, number)  # type: ignore[arg-type]
            self.rings[index].event_idx = bool(self.chosen & ids.F_EVENT_IDX)
            self.rings[index].indirect = bool(self.chosen & ids.F_INDIRECT_DESC)
        elif request == p.SET_VRING_BASE:
            self.bases[index] = number
        elif request == p.SET_VRING_ADDR:
            self._place(payload)
        elif request == p.SET_VRING_ENABLE:
            (self.enabled.add if number else self.enabled.discard)(index)
        elif request == p.GET_VRING_BASE:
            queue = self.rings.pop(index)
            base = int(queue.state()["next"])  # type: ignore[call-overload]
            queue.disable()
            os.close(self.kicks.pop(index))
            os.close(self.calls.pop(index))
            return struct.pack("=II", index, base)
        assert not fds
        return None

    def _place(self, payload: bytes) -> None:
        index, flags, desc, used, avail, log = struct.unpack("=IIQQQQ", payload)
        assert flags == log == 0
        queue, address = self.rings[index], self.memory.guest_address
        base = self.bases[index]
        used_index = int.from_bytes(self.memory.view(address(used) + 2, 2), "little")
        queue.load({"size": queue.size, "ready": True, "desc": address(desc), "avail": address(avail),
                    "used": address(used), "next": base, "used_index": used_index, "signalled": used_index})
        if not self.features & p.F_PROTOCOL_FEATURES:
            self.enabled.add(index)
