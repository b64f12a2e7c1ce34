"""The process that fills in guest RAM as it is touched (docs/lazy-memory.md), a child of the one that has the VM.

It must be another process: a thread that touches guest RAM from Python holds the interpreter's lock while it waits for
the page, so no thread beside it could fetch that. The VM's side is hv/snapshot/lazy.py, which says by a socket what is
to be served, and whose end ends this process:

    {"regions": [{"host", "size", "offset"}], "size", "source": "file", "around", "first": [[first, end], ...]}
                            and the descriptors: userfaultfd, source, the VM's process, the guard's socket
    {"load": true}          ahead of that, where it will be for post-copy
    {"all": true}           and a pipe, to be closed once every page is there
    {"say": kind}           post-copy: a frame for the source of the machine

    {"ready": true}         back, or {"failed": "why"}
    {"heard": kind}         post-copy: the source has sent that; with ROUND, every page of its is there

Pages given back (a balloon) read 0 from then on.
Driven by tests/unit/test_pager.py and tests/kvm/test_snapshot_lazy.py.
"""

from __future__ import annotations

__all__ = ["Pager", "main"]

import os
from _socket import CMSG_SPACE, SCM_RIGHTS, SOL_SOCKET, socket
from array import array
from collections import deque
from errno import EAGAIN, EEXIST, ENOENT, ESRCH
from select import POLLIN, poll

from hv.errors import HvError
from hv.linux.userfaultfd import EVENT_PAGEFAULT, EVENT_REMOVE, Userfaultfd
from hv.memory.layout import PAGE_SIZE
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.snapshot.page_source import Source
    from hv.snapshot.page_wire import WireSource

SOCKET = 3                      # the descriptor by which it hears of the VM
MISSING, THERE, REMOVED = 0, 1, 2
_PIECE = 256                    # pages filled in without looking whether somebody waits
_LINE_MOST = 64 << 20
_FDS_MOST = 8


class Pager:
    """Serves the ranges `regions`, (host address, bytes, offset in the memory file) each, of who opened `uffd`.

    `around`: how many pages, aligned, are filled in where one is touched.
    """

    def __init__(self, uffd: Userfaultfd, regions: list[tuple[int, int, int]], source: Source, around: int) -> None:
        self.uffd = uffd
        self._regions = regions
        self._source = source
        self._around = max(1, around)
        self.pages = bytearray(max(offset + size for _, size, offset in regions) // PAGE_SIZE)
        self._faults: deque[int] = deque()
        self._removing = False
        self.work: deque[tuple[int, int]] = deque()     # runs to be filled in while nobody waits
        self.gone = False           # the VM's process, or its memory

    def serve(self) -> None:
        """Answer what has happened since the last call."""
        self._listen()
        while self._faults:
            page = self._faults.popleft()
            if not self._fault(page):
                self._faults.append(page)
                os.sched_yield()        # for who gives pages back, and has been answered
                self._listen()

    def step(self) -> None:
        """Fill in a piece of `work`."""
        first, end = self.work[0]
        at = self.pages.find(MISSING, first, end)
        if at < 0:
            self.work.popleft()
            return
        self.work[0] = at, end
        self._fill(at, at, min(end, at + _PIECE))

    def install(self, first: int, count: int, source: int) -> None:
        """These pages have come, and lie at `source`; what is there, or was given back, stays so."""
        for page in range(first, first + count):
            while self.pages[page] == MISSING:
                done, error = self.uffd.copy(self._address(page), source + (page - first) * PAGE_SIZE, PAGE_SIZE)
                if done or error == EEXIST:
                    self.pages[page] = THERE
                elif error == EAGAIN:
                    os.sched_yield()
                    self._listen()
                else:
                    self.gone = True
                    return

    def _listen(self) -> None:
        """Read events: pages given back count from now on, faults are answered next."""
        for event, first, second in self.uffd.events():
            if event == EVENT_PAGEFAULT:
                page = self._page(first)
                if page >= 0:
                    self._faults.append(page)
            elif event == EVENT_REMOVE and (page := self._page(first)) >= 0:
                count = (second - first) // PAGE_SIZE
                self.pages[page:page + count] = bytes([REMOVED]) * count

    def _page(self, address: int) -> int:
        """The number of the page at `address`, across all ranges."""
        for host, size, offset in self._regions:
            if host <= address < host + size:
                return (offset + address - host) // PAGE_SIZE
        return -1

    def _address(self, page: int) -> int:
        at = page * PAGE_SIZE
        for host, size, offset in self._regions:
            if offset <= at < offset + size:
                return host + at - offset
        raise HvError(f"page {page} is not RAM")

    def _fault(self, page: int) -> bool:
        """Somebody waits for `page`. False where he has to wait a little longer."""
        if self.pages[page] == MISSING:
            low = page // self._around * self._around
            return self._fill(page, low, low + self._around)
        # Another's fault brought it meanwhile, or it was given back.
        kind, self.pages[page] = self.pages[page], MISSING
        if self._fill(page, page, page + 1, zeros=kind == REMOVED):
            return True
        self.pages[page] = kind
        return False

    def _fill(self, page: int, low: int, high: int, *, zeros: bool = False) -> bool:
        """Fill in `page` and what is missing beside it in [low, high). False where an event must be read first."""
        found = (0, page, page + 1) if zeros else self._source.run(page)
        if found is None:
            return True             # it will come by itself: install()
        source, first, end = found
        low, high = max(low, first, self._start_of(page)), min(high, end, self._end_of(page))
        low = max(low, *(self.pages.rfind(kind, low, page) + 1 for kind in (THERE, REMOVED)))
        for kind in (THERE, REMOVED):
            at = self.pages.find(kind, page, high)
            high = high if at < 0 else at
        while low < high:
            start, length = self._address(low), (high - low) * PAGE_SIZE
            done, error = (self.uffd.copy(start, source + (low - first) * PAGE_SIZE, length) if source
                           else self.uffd.zero(start, length))
            count = done // PAGE_SIZE
            self.pages[low:low + count] = bytes([THERE]) * count
            low += count
            if error == EEXIST:
                self.pages[low] = THERE
                self.uffd.wake(self._address(low), PAGE_SIZE)
                low += 1
            elif error in (ENOENT, ESRCH):
                self.gone = True
                return True
            elif error == EAGAIN and not done:
                return False
        return True

    def _start_of(self, page: int) -> int:
        return max(offset for _, _, offset in self._regions if offset <= page * PAGE_SIZE) // PAGE_SIZE

    def _end_of(self, page: int) -> int:
        return min(offset + size for _, size, offset in self._regions if page * PAGE_SIZE < offset + size) // PAGE_SIZE


class Orders:
    """What the VM's side says, line by line. Some come with descriptors; several lines may come at once."""

    def __init__(self) -> None:
        self.socket = socket(fileno=SOCKET)
        self._buffered = bytearray()
        self._fds: list[int] = []

    @property
    def waiting(self) -> bool:
        """Whether a line is here already."""
        return b"\n" in self._buffered

    def next(self) -> dict[str, Any]:
        """The next line. EOFError where the other side has hung up."""
        while not self.waiting:
            data, ancillary, _, _ = self.socket.recvmsg(1 << 16, CMSG_SPACE(4 * _FDS_MOST))
            for level, kind, content in ancillary:
                if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                    self._fds += array("i", content[:len(content) // 4 * 4])
            if not data:
                raise EOFError
            self._buffered += data
            if len(self._buffered) > _LINE_MOST:
                raise HvError("a line that does not end")
        line, _, rest = bytes(self._buffered).partition(b"\n")
        self._buffered[:] = rest
        order = loads(line.decode())
        if not isinstance(order, dict):
            raise HvError("a line that is no object")
        return order

    def take(self, count: int) -> list[int]:
        """The descriptors of the line just read."""
        if len(self._fds) < count:
            raise HvError(f"{len(self._fds)} descriptors where {count} were to come")
        taken, self._fds[:count] = self._fds[:count], []
        return taken

    def say(self, text: dict[str, Any]) -> None:
        """A line back."""
        self.socket.sendall(dumps(text).encode() + b"\n")


def main() -> None:
    """The process, from its first instruction to its last."""
    from hv.snapshot.page_guard import fork_guard, guard

    orders = Orders()
    why = -1                        # by which the guard learns what failed
    try:
        order = orders.next()
        if order.get("load"):
            import hv.snapshot.page_wire  # noqa: F401

            order = orders.next()
        if order.get("guard"):
            guard(*orders.take(3))
        uffd, source, process, alive = orders.take(4)
        why = fork_guard(alive, process)
        _run(orders, order, uffd, source, process)
        failed = ""
    except HvError as error:
        failed = str(error)
    except (OSError, ValueError, LookupError, EOFError) as error:
        failed = f"{type(error).__name__}: {error}"
    if failed:
        try:
            orders.say({"failed": failed})
            os.write(why, failed.encode())
        except OSError:
            pass
    os._exit(1 if failed else 0)


def _run(orders: Orders, order: dict[str, Any], uffd: int, source_fd: int, process: int) -> None:
    """Serve until the VM is gone. HvError says why it can't."""
    size = order["size"]
    wire: WireSource | None = None
    if order["source"] == "wire":
        from hv.snapshot.page_wire import WireSource

        source: Source = (wire := WireSource(source_fd, size, order["later"]))
    else:
        from hv.snapshot.page_source import FileSource, PackedSource

        source = (PackedSource if order["source"] == "packed" else FileSource)(source_fd, size)
    regions = [(region["host"], region["size"], region["offset"]) for region in order["regions"]]
    pager = Pager(Userfaultfd(uffd), regions, source, order["around"])
    pager.work.extend((first, end) for first, end in order["first"])
    _serve(orders, pager, process, wire)


def _serve(orders: Orders, pager: Pager, process: int, wire: WireSource | None) -> None:
    """Until the VM is gone, or needs nothing any more."""
    orders.say({"ready": True})
    wanted: list[int] = []          # pipes of those who wait until all is here
    waits = poll()
    for fd in (pager.uffd.fd, SOCKET, process):
        waits.register(fd, POLLIN)
    if wire is not None:
        waits.register(wire.fd, POLLIN)
    while not pager.gone:
        ready = dict(waits.poll(0 if pager.work or orders.waiting else None))
        if process in ready:
            break
        if SOCKET in ready or orders.waiting:
            try:
                order = orders.next()
            except EOFError:
                break
            if wire is not None and "say" in order:
                wire.wire.send(order["say"])
            if order.get("all"):
                wanted += orders.take(1)
                if wire is None:        # else it comes by itself
                    pager.work.append((0, len(pager.pages)))
        if pager.uffd.fd in ready:
            pager.serve()
        if wire is not None and wire.fd in ready and (kind := wire.hear(pager)):
            if kind == wire.END:
                waits.unregister(wire.fd)
                wire.wire.send(kind)
            orders.say({"heard": kind})
        if pager.work:
            pager.step()
        if wanted and not pager.work and not (wire and wire.left):
            for fd in wanted:
                os.close(fd)
            wanted.clear()
