"""Memory balloon: the guest gives memory back to the host, and says how its memory is used (virtio 1.2, 5.5).

    inflate, deflate    page numbers of pages that the guest gives up, or takes again
    stats               one buffer with the guest's numbers; it stays here until new numbers are wanted
    reporting           ranges the guest has no use for now; it may use them again without a word (F_PAGE_REPORTING)

Pages given up or reported leave the host's memory at once (GuestMemory.discard); those the guest uses again read 0.
The balloon's size is a wish: the guest follows it as it can, and with DEFLATE_ON_OOM goes below it rather than kill a
process.

Queues after the second are found by what was negotiated: the specification numbers them 2, 3, 4 (5.5.2), Linux and
others leave out those whose feature is missing. FREE_PAGE_HINT is not offered, so 3 is the reporting queue there.

Left out on purpose: FREE_PAGE_HINT (for live migration), PAGE_POISON (Linux takes no reporting then where it fills free
pages), MUST_TELL_HOST (a page is there for the guest at any moment, told or not).

Driven by tests/unit/test_virtio_balloon.py and tests/kvm/test_virtio_balloon.py.
"""

from __future__ import annotations

__all__ = ["Balloon", "BalloonConfig"]

from struct import Struct
from time import monotonic, sleep

from hv.devices.virtio import ids
from hv.devices.virtio.device import VirtioDevice
from hv.devices.virtio.queue import QueueError
from hv.errors import ConfigError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.chain import Chain
    from hv.devices.virtio.device import Interrupts, Io
    from hv.memory.guest import GuestMemory

F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_REPORTING = 1 << 1, 1 << 2, 1 << 5     # 5.5.3

INFLATE, DEFLATE, STATS = 0, 1, 2       # 5.5.2
PAGE = 4096                             # 5.5.6: page numbers count 4096 bytes, whatever the guest's pages are
QUEUES = (64, 64, 8, 64, 64)            # Linux wants 32 for reporting (mm/page_reporting.h, PAGE_REPORTING_CAPACITY)

_CONFIG = Struct("<II")                 # num_pages, actual (5.5.4)
_ACTUAL = 4                             # offset of actual
_STAT = Struct("<HQ")                   # tag, value (5.5.6.3)
STATISTICS = (                          # tags from 0 on (5.5.6.4); bytes or counts
    "swapped_in", "swapped_out", "major_faults", "minor_faults", "free", "total", "available", "caches",
    "hugetlb_allocations", "hugetlb_failures",
)
_STATS_MOST = 64 * _STAT.size           # a buffer's head that is looked at
_PAGES_MOST = 64 << 10                  # page numbers in one buffer that are looked at: 256 MiB; Linux sends 256
_PIECE = 4096                           # bytes of page numbers read at once
_POLL = 0.005                           # s between looks of statistics()
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class BalloonConfig:
    """`--balloon[=SIZE]`: `size` it has at first, bytes or text as of --memory."""

    FIELDS = (("size", "number"), ("deflate_on_oom", "flag"), ("stats_interval", "text"),
              ("free_page_reporting", "flag"))

    def __init__(self, size: int | str = 0, deflate_on_oom: bool | str = True, stats_interval: float | str = 0.0,
                 free_page_reporting: bool | str = True) -> None:
        self.size = _bytes(size)
        self.deflate_on_oom = _flag("deflate-on-oom", deflate_on_oom)
        self.free_page_reporting = _flag("free-page-reporting", free_page_reporting)
        try:
            self.stats_interval = float(stats_interval)
        except ValueError:
            self.stats_interval = -1.0
        if not (self.stats_interval == 0 or 0.1 <= self.stats_interval < 1e6):
            raise ConfigError(f"--balloon: stats-interval={stats_interval} is no time to repeat after",
                              "seconds, at least 0.1; 0 for statistics only when they are asked for")

    def create(self) -> Balloon:
        """The device."""
        return Balloon(self.size, self.deflate_on_oom, self.stats_interval, self.free_page_reporting)

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        return {"size": self.size, "deflate_on_oom": self.deflate_on_oom, "stats_interval": repr(self.stats_interval),
                "free_page_reporting": self.free_page_reporting}


def _bytes(size: int | str) -> int:
    text = str(size)
    number, unit = (text[:-1], _UNITS[text[-1].upper()]) if text[-1:].upper() in _UNITS else (text, 0)
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"--balloon: size {size!r} is not a number with K, M, G or T", "for example --balloon=64M")
    # A bare number is MiB in text, as --memory has it, and bytes in Python.
    return int(number) * (unit or (1 if isinstance(size, int) else 1 << 20))


def _flag(name: str, value: bool | str) -> bool:
    if value in (True, False):
        return bool(value)
    if value not in ("on", "off"):
        raise ConfigError(f"--balloon: {name}={value} is neither on nor off", f"write {name}=on or {name}=off")
    return value == "on"


class Balloon(VirtioDevice):
    """virtio-balloon. set_target(), actual and statistics() may be used from any thread while the guest runs."""

    ID = ids.BALLOON
    NAME = "virtio-balloon"
    KIND = "balloon"
    QUEUES = QUEUES
    DRIVER = "CONFIG_VIRTIO_BALLOON (module virtio_balloon)"
    PCI_CLASS = 0x00FF00        # not one of a defined class (PCI 3.0, appendix D)

    def __init__(self, size: int = 0, deflate_on_oom: bool = True, stats_interval: float = 0.0,
                 free_page_reporting: bool = True) -> None:
        super().__init__()
        self.FEATURES = F_STATS_VQ | (F_DEFLATE_ON_OOM if deflate_on_oom else 0)
        self.FEATURES |= F_PAGE_REPORTING if free_page_reporting else 0
        self.discarded = 0          # bytes of the host's memory given back so far
        self._target = size // PAGE
        self._actual = 0            # pages, as the driver says
        self._interval = stats_interval
        self._ticking = False       # whether the timer runs; it ends by itself where the device does not run
        self._numbers: dict[str, int] = {}
        self._numbers_read = 0      # how many buffers of them came
        self._has_buffer = False    # the driver's buffer is next in the queue, and has been read

    # for the user -----------------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Bytes that the balloon should have."""
        return self._target * PAGE

    @property
    def actual(self) -> int:
        """Bytes that it has, as the driver says."""
        return min(self._actual * PAGE, self.memory.size)

    def set_target(self, size: int) -> None:
        """Have the guest give up `size` bytes, in whole pages; it takes as long as it takes. See `actual`."""
        if not 0 <= size < self.memory.size:
            raise ConfigError(f"a balloon of {size} bytes in a guest of {self.memory.size}", "less than its memory")
        with self.lock:
            self._target = size // PAGE
            self.config_changed()

    def statistics(self, wait: float = 0.0) -> dict[str, int]:
        """The guest's numbers (the names are STATISTICS; memory in bytes), as far as it gives them.

        They are those it sent last. New ones are asked for, and for `wait` seconds waited for. Not from the I/O thread.
        """
        before = self._numbers_read
        if wait or not self._interval:
            self.io.call(self._ask)
        end = monotonic() + wait
        while self._numbers_read == before and monotonic() < end:
            sleep(_POLL)
        return dict(self._numbers)

    # the device -------------------------------------------------------------------------------------

    def attach(self, memory: GuestMemory, io: Io, interrupts: Interrupts) -> None:
        """Now guest RAM is known."""
        super().attach(memory, io, interrupts)
        if self.target >= memory.size:
            raise ConfigError(f"--balloon: {self.target >> 20} MiB of {memory.size >> 20} MiB guest memory",
                              "leave the guest something")

    def config(self) -> bytes:
        """5.5.4."""
        return _CONFIG.pack(self._target, self._actual)

    def write_config(self, offset: int, data: bytes) -> None:
        """5.5.6: the driver says how far it came; only whole."""
        if offset == _ACTUAL and len(data) == 4:
            self._actual = int.from_bytes(data, "little")
        else:
            self.fault(f"a write of {len(data)} bytes to the configuration space at {offset}")

    def notified(self, index: int) -> None:
        """5.5.6."""
        if index == STATS and self.has(F_STATS_VQ):
            self._read_statistics()
            return
        queue = self.queues[index]
        for chain in self.requests(index):
            if index == INFLATE:
                self._inflate(chain)
            elif index > DEFLATE and self.has(F_PAGE_REPORTING):
                self._reported(chain)
            queue.push(chain)       # deflated pages come by themselves, when they are used
        self.used(index)

    # memory -----------------------------------------------------------------------------------------

    def _inflate(self, chain: Chain) -> None:
        """5.5.6.1: numbers of pages that the guest will not use."""
        if chain.readable_bytes > 4 * _PAGES_MOST:
            self.fault(f"a buffer of {chain.readable_bytes} bytes of page numbers; {_PAGES_MOST} are looked at")
        reader = chain.reader()
        for _ in range(4 * _PAGES_MOST // _PIECE):
            data = reader.read(_PIECE)
            if len(data) < 4:
                break
            numbers = sorted(set(memoryview(data[:len(data) & ~3]).cast("I")))
            start = previous = -2
            for number in numbers:
                if number != previous + 1:
                    self._discard(start, previous)
                    start = number
                previous = number
            self._discard(start, previous)

    def _discard(self, first: int, last: int) -> None:
        """Pages `first` to `last`, which the guest named."""
        if first < 0:
            return
        try:
            self.discarded += self.memory.discard(first * PAGE, (last + 1 - first) * PAGE)
        except GuestError:
            self.fault(f"pages {first:#x} to {last:#x}, not all of them RAM (5.5.6.1)")
            for page in range(first, last + 1):
                if self.memory.contains(page * PAGE, PAGE):
                    self.discarded += self.memory.discard(page * PAGE, PAGE)

    def _reported(self, chain: Chain) -> None:
        """5.5.6.7: the buffers themselves are what is free. Already checked to be RAM."""
        for view in chain.writable:
            self.discarded += self.memory.discard(self.memory.gpa_of(view), len(view))

    # statistics -------------------------------------------------------------------------------------

    def _read_statistics(self) -> None:
        """5.5.6.3: the driver's buffer is read when it comes, and given back when new numbers are wanted."""
        queue = self.queues[STATS]
        if self._has_buffer:
            return
        chain = queue.pop()
        if chain is None:
            if not queue.listen():
                return
            chain = queue.pop()
            if chain is None:
                return
        data = chain.reader().read(_STATS_MOST)
        queue.unpop()
        self._has_buffer = True
        found = dict(_STAT.iter_unpack(data[:len(data) // _STAT.size * _STAT.size]))
        self._numbers = {name: found[tag] for tag, name in enumerate(STATISTICS) if tag in found}
        self._numbers_read += 1

    def _ask(self) -> None:
        with self.lock:
            self._give_back()

    def _give_back(self) -> None:
        """The driver's buffer, so that it fills it anew."""
        queue = self.queues[STATS]
        if not self._has_buffer or not self.running or not queue.ready:
            return
        self._has_buffer = False
        try:
            chain = queue.pop()
            if chain is not None:
                queue.listen()      # before the driver can answer
                queue.push(chain)
                self.used(STATS)
        except (QueueError, GuestError) as error:
            self.broken(str(error))

    def _tick(self) -> None:
        with self.lock:
            self._ticking = self.running
            if self._ticking:
                self._give_back()
                self.io.call_later(self._interval, self._tick)

    # life -------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """The timer runs while the device does."""
        self.io.call(self._start_timer)

    def wake(self) -> None:
        """The timer again."""
        self.io.call(self._start_timer)

    def _start_timer(self) -> None:
        with self.lock:
            if self._interval and not self._ticking and self.running and self.has(F_STATS_VQ):
                self._ticking = True
                self.io.call_later(self._interval, self._tick)

    def drop(self) -> None:
        """5.5.6.1: after a reset the balloon is empty; memory comes back as the guest uses it."""
        self._actual = 0
        self._has_buffer = False

    def drop_queue(self, index: int) -> None:
        """The driver has its buffer back."""
        if index == STATS:
            self._has_buffer = False

    def model_state(self) -> dict[str, object]:
        """Both sizes, and whether the driver's buffer waits."""
        return {"target": self._target, "actual": self._actual, "has_buffer": self._has_buffer}

    def load_model(self, state: dict[str, object]) -> None:
        """Untrusted: cut to what a page count can be."""
        self._target = min(max(int(state["target"]), 0), self.memory.size // PAGE - 1)  # type: ignore[call-overload]
        self._actual = int(state["actual"]) & 0xFFFFFFFF  # type: ignore[call-overload]
        self._has_buffer = bool(state["has_buffer"])
