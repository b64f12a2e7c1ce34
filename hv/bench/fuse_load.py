"""A FUSE client on the mock driver that sends the same requests to any server: ours in process, or one by vhost-user.

The driver's side costs next to nothing: requests are set up once (hv/bench/rings.py). Both servers hear of a batch by
an eventfd and tell of its end by another, as they do under a guest; ours works in a thread of its own, as there. Some
requests of each kind are checked: no error, and the right bytes. Driven by tests/unit/test_bench_load.py.
"""

from __future__ import annotations

__all__ = ["FuseLoad"]

import os
import select
import threading
import time

from hv.bench.rings import Chain, FastRing
from hv.devices.virtio import fuse
from hv.errors import HvError
from hv.memory.guest import GuestMemory
from hv.testing import Driver, FakeInterrupts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.device import VirtioDevice

REQUESTS = 1            # virtio 1.2, 5.11.2: the first request queue
RING = 1024
RAM = 64 << 20
BULK, BULK_DEPTH = 1 << 20, 4
DEPTH = 16              # of all others
LISTING = 32 << 10      # room for entries
_PATIENCE = 20.0        # s for a batch
_FLAGS = (fuse.ASYNC_READ | fuse.ATOMIC_O_TRUNC | fuse.BIG_WRITES | fuse.AUTO_INVAL_DATA | fuse.DO_READDIRPLUS
          | fuse.ASYNC_DIO | fuse.PARALLEL_DIROPS | fuse.MAX_PAGES)
_HEADER, _REPLY = fuse.IN_HEADER.size, fuse.OUT_HEADER.size


class _Signals(FakeInterrupts):
    """The one interrupt is an eventfd; a vhost-user back end writes to it itself."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def queue_used(self, index: int) -> None:
        os.eventfd_write(self._fd, 1)

    def queue_fd(self, index: int) -> int:
        """For back ends of another process."""
        return self._fd


class FuseLoad:
    """A session with `device`, which it closes. `files` are names in the folder, `big` one to read from."""

    def __init__(self, device: VirtioDevice, files: list[bytes], big: bytes) -> None:
        self._device = device
        self._memory = GuestMemory(RAM, backing="memfd")
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._driver = Driver(device, self._memory, interrupts=_Signals(self._call))
        device.kick_fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in device.queues]
        self._kick = device.kick_fds[REQUESTS]
        self._poll = select.poll()
        self._poll.register(self._call, select.POLLIN)
        self._stopping = False
        self._server = threading.Thread(target=self._serve, daemon=True)
        if not device.OUTSIDE:
            self._server.start()
        self._unique = 0
        try:
            self._driver.probe(sizes={REQUESTS: RING})
            self._ring: FastRing | None = FastRing(self._driver, REQUESTS)
            self._begin(files, big)
        except BaseException:
            self.close()
            raise

    def _begin(self, files: list[bytes], big: bytes) -> None:
        init = fuse.INIT_IN.pack(fuse.MAJOR, fuse.MINOR, 128 << 10, _FLAGS) + bytes(48)
        fields = fuse.INIT_OUT.unpack(self._ask(fuse.INIT, 0, init))
        most, pages = fields[6], fields[8]
        self.bulk = min(BULK, most, pages * 4096 if pages else most)    # what this server takes in one READ
        self._files = files
        self._nodes = [self._lookup(name) for name in files]
        self._big = self._lookup(big)
        self._big_size = fuse.ATTR.unpack_from(self._ask(fuse.GETATTR, self._big, fuse.GETATTR_IN.pack(0, 0, 0)),
                                               fuse.ATTR_OUT.size)[1]

    def _lookup(self, name: bytes) -> int:
        return int(fuse.ENTRY_OUT.unpack_from(self._ask(fuse.LOOKUP, fuse.ROOT_ID, name + b"\0"))[0])

    # the measures: each returns nanoseconds, for about `count` requests as told by the first number --------

    def getattr(self, count: int) -> tuple[int, int]:
        """GETATTR of the files: (requests, ns)."""
        return self._repeat([self._chain(fuse.GETATTR, node, fuse.GETATTR_IN.pack(0, 0, 0))
                             for node in self._nodes[:DEPTH]], count)

    def lookup(self, count: int) -> tuple[int, int]:
        """LOOKUP of the files in the root: (requests, ns)."""
        return self._repeat([self._chain(fuse.LOOKUP, fuse.ROOT_ID, name + b"\0") for name in self._files[:DEPTH]],
                            count)

    def open(self, count: int) -> tuple[int, int]:
        """OPEN, then RELEASE, of the files: (requests, ns)."""
        opens = [self._chain(fuse.OPEN, node, fuse.OPEN_IN.pack(os.O_RDONLY, 0)) for node in self._nodes[:DEPTH]]
        releases = [self._chain(fuse.RELEASE, node, fuse.RELEASE_IN.pack(0, os.O_RDONLY, 0, 0), 0)
                    for node in self._nodes[:DEPTH]]
        handles = [(closing.readable[1][:8], opening.writable[1][:8])       # fuse_open_out.fh, fuse_release_in.fh
                   for opening, closing in zip(opens, releases, strict=True)]
        start = time.perf_counter_ns()
        for _ in range(rounds := max(1, count // (2 * len(opens)))):
            self._run(opens)
            for to, source in handles:
                to[:] = source
            self._run(releases)
        spent = time.perf_counter_ns() - start
        self._check([*opens, *releases])
        return rounds * 2 * len(opens), spent

    def readdirplus(self, count: int) -> tuple[int, int]:
        """READDIRPLUS from the beginning of the root: (requests, ns)."""
        handle = fuse.OPEN_OUT.unpack(self._ask(fuse.OPENDIR, fuse.ROOT_ID, fuse.OPEN_IN.pack(0, 0)))[0]
        body = fuse.READ_IN.pack(handle, 0, LISTING, 0, 0, 0, 0)
        chains = [self._chain(fuse.READDIRPLUS, fuse.ROOT_ID, body, LISTING) for _ in range(DEPTH)]
        found = self._repeat(chains, count)
        least = len(self._files) * (fuse.ENTRY_BYTES + fuse.DIRENT.size)
        if any(fuse.OUT_HEADER.unpack(chain.writable[0])[0] < least for chain in chains):
            raise HvError("a listing is not complete")
        self._ask(fuse.RELEASEDIR, fuse.ROOT_ID, fuse.RELEASE_IN.pack(handle, 0, 0, 0), 0)
        return found

    def read(self, amount: int, expected: bytes = b"") -> tuple[int, int]:
        """READ of `amount` bytes of the big file, from its beginning to its end and again: (bytes, ns).

        `expected` is what the file begins with.
        """
        handle = fuse.OPEN_OUT.unpack(self._ask(fuse.OPEN, self._big, fuse.OPEN_IN.pack(os.O_RDONLY, 0)))[0]
        size, blocks = self.bulk, self._big_size // self.bulk
        chains = [self._chain(fuse.READ, self._big, fuse.READ_IN.pack(handle, 0, size, 0, 0, os.O_RDONLY, 0), size)
                  for _ in range(BULK_DEPTH)]
        offsets = [chain.readable[1][8:16].cast("Q") for chain in chains]       # fuse_read_in.offset
        self._run(chains)
        self._check(chains)
        if any(chain.writable[1][:len(expected)] != expected for chain in chains):
            raise HvError("what was read is not what the file holds")
        rounds = max(1, amount // (size * BULK_DEPTH))
        start = time.perf_counter_ns()
        for number in range(rounds):
            for at, offset in enumerate(offsets, number * BULK_DEPTH):
                offset[0] = at % blocks * size
            self._run(chains)
        spent = time.perf_counter_ns() - start
        self._check(chains)
        if any(fuse.OUT_HEADER.unpack(chain.writable[0])[0] != _REPLY + size for chain in chains):
            raise HvError("less was read than asked for")
        self._ask(fuse.RELEASE, self._big, fuse.RELEASE_IN.pack(handle, os.O_RDONLY, 0, 0), 0)
        return rounds * BULK_DEPTH * size, spent

    # requests --------------------------------------------------------------------------------------

    def _chain(self, opcode: int, node: int, body: bytes, room: int = 256) -> Chain:
        assert self._ring is not None
        self._unique += 2
        header = fuse.IN_HEADER.pack(_HEADER + len(body), opcode, self._unique, node, os.getuid(), os.getgid(), 1, 0)
        return self._ring.chain([header, body], [_REPLY, room] if room else [_REPLY])

    def _run(self, chains: list[Chain]) -> None:
        """Send them together, and wait until the last one is back."""
        ring = self._ring
        assert ring is not None
        ring.offer(*chains)
        os.eventfd_write(self._kick, 1)
        while not ring.done:
            if not self._poll.poll(_PATIENCE * 1000):
                raise HvError(f"the file server does not answer operation {_opcode(chains[0])}")
            os.eventfd_read(self._call)

    def _repeat(self, chains: list[Chain], count: int) -> tuple[int, int]:
        start = time.perf_counter_ns()
        for _ in range(rounds := max(1, count // len(chains))):
            self._run(chains)
        spent = time.perf_counter_ns() - start
        self._check(chains)
        return rounds * len(chains), spent

    def _check(self, chains: list[Chain]) -> None:
        for chain in chains:
            error = -fuse.OUT_HEADER.unpack(chain.writable[0])[1]
            if error:
                raise HvError(f"operation {_opcode(chain)} failed: {os.strerror(error)}")

    def _ask(self, opcode: int, node: int, body: bytes, room: int = 256) -> bytes:
        chain = self._chain(opcode, node, body, room)
        self._run([chain])
        self._check([chain])
        length = fuse.OUT_HEADER.unpack(chain.writable[0])[0]
        return bytes(chain.writable[1][:length - _REPLY]) if room else b""

    # life ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The device's thread, where it is served in this process."""
        while True:
            os.eventfd_read(self._kick)
            if self._stopping:
                return
            self._device.serve(REQUESTS)
            self._driver.loop.run()

    def close(self) -> None:
        """End the session."""
        if self._server.is_alive():
            self._stopping = True
            os.eventfd_write(self._kick, 1)
            self._server.join()
        self._device.set_status(0)
        self._device.close()
        for queue in self._device.queues:
            queue.reset()
        self._ring = None
        for fd in (self._call, *self._device.kick_fds):
            os.close(fd)
        self._memory.close()

    def __enter__(self) -> FuseLoad:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _opcode(chain: Chain) -> int:
    return int(fuse.IN_HEADER.unpack(chain.readable[0])[1])
