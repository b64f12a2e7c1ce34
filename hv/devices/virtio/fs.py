"""File system device: a folder of the host, mounted by its tag (virtio 1.2, 5.11); the driver speaks FUSE.

    mount -t virtiofs TAG /mnt              or, as root file system:  rootfstype=virtiofs root=TAG rw

Two queues: a short one for what must not wait behind others (FORGET, INTERRUPT), one for requests. This file checks
queues and headers; the file server behind it (fs_host.py) does the rest, in the device's own thread, one request after
the other. Data of READ and WRITE goes straight between files and guest RAM. Left out: more request queues (one thread
serves them all), the notification queue and the DAX window. Driven by tests/unit/test_virtio_fs.py and
tests/kvm/test_virtio_fs.py.
"""

from __future__ import annotations

__all__ = ["Fs"]

from errno import EIO

from hv.devices.virtio import fuse, ids
from hv.devices.virtio.device import VirtioDevice
from hv.devices.virtio.fs_files import fitted
from hv.devices.virtio.fs_host import LATER, NO_REPLY, FileServer, Request
from hv.devices.virtio.fs_state import load_server, server_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.devices.virtio.chain import Chain

TAG_SIZE = 36               # 5.11.4: padded with NULs
HIPRIO, REQUESTS = 0, 1     # 5.11.2
REQUEST_QUEUES = 1
BATCH = 64                  # requests between two interrupts
BODY_MOST = 128 << 10       # of all but WRITE: a name and an attribute of 64 KiB, 4096 nodes to forget
LOCK_SECONDS = 0.05         # between two tries for locks that others hold

_HEADER, _REPLY = fuse.IN_HEADER.size, fuse.OUT_HEADER.size
_WRITE = fuse.WRITE_IN.size


class Fs(VirtioDevice):
    """virtio-fs. The share's name is its tag, unless one is given."""

    ID = ids.FS
    NAME = "virtio-fs"
    KIND = "share"
    QUEUES = (256, 1024)        # the driver makes requests as long as the queue has room for their pages
    DRIVER = "CONFIG_VIRTIO_FS (module virtiofs)"
    PCI_CLASS = 0x018000        # mass storage, other (PCI 3.0, appendix D)
    OWN_THREAD = True

    def __init__(self, server: FileServer, tag: bytes = b"") -> None:
        super().__init__()
        self.server = server
        self._tag = tag
        self._timer: object = None

    @property
    def tag(self) -> bytes:
        """By what the guest mounts it."""
        return self._tag or self.name.encode()

    def config(self) -> bytes:
        """Tag and number of request queues (5.11.4)."""
        return self.tag.ljust(TAG_SIZE, b"\0") + REQUEST_QUEUES.to_bytes(4, "little")

    def notified(self, index: int) -> None:
        """Answer what waits (5.11.6)."""
        queue, locks = self.queues[index], self.server.locks
        for chain in self.requests(index, BATCH):
            written = self._answer(chain, index)
            if written is not LATER:
                queue.push(chain, written)
        if locks.waiting or locks.done:
            self._look_after_locks()
        if self.server.faults:
            self._count_faults()
        self.used(index)

    def _answer(self, chain: Chain, index: int) -> int | None:
        """Serve one chain: how much of it was written, None where the reply comes later."""
        request = self._parse(chain)
        if request is None:
            return 0
        error, reply = self.server.answer(request)
        if reply is LATER and not error:
            request.place = index, chain
            return LATER
        if request.opcode in NO_REPLY:
            return 0
        return self._reply(chain, request, error, reply or b"")

    def _parse(self, chain: Chain) -> Request | None:
        """The request in `chain`; None where it is none, or has no room for a reply that it needs (5.11.6.1)."""
        views = chain.readable
        if views and len(views[0]) == _HEADER:          # as Linux lays it out
            header, rest = views[0], views[1:]
        else:
            reader = chain.reader()
            header, rest = memoryview(reader.read(_HEADER)), reader.take(1 << 32)
            if len(header) < _HEADER:
                self.fault("a request without a header")
                return None
        length, opcode, unique, nodeid, uid, gid, pid, _ = fuse.IN_HEADER.unpack(header)
        total = _HEADER + sum(map(len, rest))
        room = chain.writable_bytes - _REPLY
        if room < 0 and opcode not in NO_REPLY:
            self.fault(f"operation {opcode} without room for a reply")
            return None
        if length != total:
            self.fault(f"operation {opcode} of {length} bytes in a chain of {total}")
            length = min(length, total)
        data: list[memoryview] = []
        if opcode == fuse.WRITE:
            if rest and len(rest[0]) == _WRITE:
                body, data = bytes(rest[0]), rest[1:]
            else:
                whole = chain.reader()
                whole.take(_HEADER)
                body, data = whole.read(_WRITE), whole.take(1 << 32)
        else:
            body = b"".join(fitted(rest, min(length - _HEADER, BODY_MOST))) if length > _HEADER else b""
        return Request(opcode, unique, nodeid, uid, gid, pid, body, data, room,
                       self._behind_header(chain) if opcode == fuse.READ else [])

    def _behind_header(self, chain: Chain) -> list[memoryview]:
        views = chain.writable
        if len(views[0]) == _REPLY:
            return views[1:]
        writer = chain.writer()
        writer.take(_REPLY)
        return writer.take(1 << 32)

    def _reply(self, chain: Chain, request: Request, error: int, reply: bytes | bytearray | int) -> int:
        size = reply if isinstance(reply, int) else len(reply)
        if error:
            reply, size = b"", 0
        elif size > request.room:
            self.fault(f"operation {request.opcode} with room for {request.room} bytes of {size}")
            error, reply, size = EIO, b"", 0
        header = fuse.OUT_HEADER.pack(_REPLY + size, -error, request.unique)
        views = chain.writable
        if len(views[0]) == _REPLY:
            views[0][:] = header
            if isinstance(reply, int):
                return _REPLY + size
            if not size:
                return _REPLY
            if len(views[1]) >= size:
                views[1][:size] = reply
                return _REPLY + size
        writer = chain.writer()
        writer.write(header)
        if isinstance(reply, int):
            return _REPLY + size
        writer.write(reply)
        return writer.written

    def _count_faults(self) -> None:
        for text in self.server.faults:
            self.fault(text)
        self.server.faults.clear()

    # locks that must wait --------------------------------------------------------------------------

    def _look_after_locks(self) -> None:
        """Answer those that got their lock or gave up; come back for the others."""
        locks = self.server.locks
        if locks.released and locks.waiting:
            locks.retry(self.server)
        done, locks.done = locks.done, []
        for request, error in done:
            if request.place is not None:
                index, chain = request.place
                self.queues[index].push(chain, self._reply(chain, request, error, b""))
                self.used(index)
        if locks.waiting and self._timer is None:
            self._timer = self.io.call_later(LOCK_SECONDS, self._try_locks)

    def _try_locks(self) -> None:
        with self.lock:
            self._timer = None
            if self.running:
                self.server.locks.released = True
                self._look_after_locks()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self.io.cancel(self._timer)
            self._timer = None

    # life ------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """A reset ends the session: files are closed, nodes forgotten."""
        self._stop_timer()
        self.server.end()
        self.server.locks.done.clear()

    def drop_queue(self, index: int) -> None:
        """Forget the locks that requests of this queue wait for."""
        locks = self.server.locks
        locks.waiting = [request for request in locks.waiting if request.place and request.place[0] != index]

    def pause(self) -> None:
        """Locks that must wait go on waiting; nobody looks after them."""
        self._stop_timer()

    def wake(self) -> None:
        """Look after them again."""
        self._look_after_locks()

    def close(self) -> None:
        """Close everything."""
        self.server.close()

    def model_state(self) -> dict[str, Any]:
        """The session, and which requests wait for locks."""
        places = [request.place for request in self.server.locks.waiting]
        waiting = [[place[0], place[1].head] for place in places if place is not None]
        return {"session": server_state(self.server), "waiting": waiting}

    def load_model(self, state: dict[str, Any]) -> None:
        """Open again what can be found by its name; who waited for a lock tries again."""
        load_server(self.server, state["session"])
        self.server.locks.done.clear()      # of the session that was here before
        for index, head in state["waiting"]:
            chain = self.queues[int(index)].again(int(head))
            request = self._parse(chain)
            if request is None or request.opcode != fuse.SETLKW:
                raise ValueError(f"no lock is waited for at descriptor {head}")
            request.place = int(index), chain
            self.server.locks.waiting.append(request)
