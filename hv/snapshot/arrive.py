"""The target's side of a live migration (hv/snapshot/wire.py has what is said).

Memory is filled as it comes; the machine is built when its state is here, and started only when the source has let go
of it. Everything that comes is checked: the source may be hostile.
Driven by tests/kvm/test_migrate.py and tests/unit/test_migrate_wire.py.
"""

from __future__ import annotations

__all__ = ["Arrival", "arrive"]

import os
from tempfile import mkdtemp

from hv.errors import ConfigError, GuestError, HvError, SnapshotError
from hv.machine.machine import Machine
from hv.machine.recipe import config_from
from hv.memory.guest import GuestMemory
from hv.memory.layout import PAGE_SIZE
from hv.plainjson import loads
from hv.snapshot.disks import FOLDER, disks_for_restore
from hv.snapshot.format import Snapshot
from hv.snapshot.host import check_facts
from hv.snapshot.restore import rebuild
from hv.snapshot.wire import DONE, FILE, GO, HELLO, LOADED, PAGES, READY, ROUND, STATE, VERSION, Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.machine.loop import Loop
    from hv.snapshot.postcopy import Relay

_NAMES = frozenset("0123456789.abcdefghijklmnopqrstuvwxyz")     # of a disk's files: 0.img, 1.0.overlay
_LINE_MOST = 4096
_FILE_MOST = 1 << 50


class Arrival:
    """A machine on its way here. `changes(recipe)` may put other files and sockets into its configuration."""

    def __init__(self, wire: Wire, loop: Loop | None = None,
                 changes: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self._wire, self._loop = wire, loop
        self._changes = changes or (lambda recipe: recipe)
        self._memory: GuestMemory | None = None
        self._relay: Relay | None = None        # post-copy: another process has the connection
        self._folder = ""

    def take(self) -> Machine:
        """Receive it. It is ours then, and start() is all it waits for; the source learns of that.

        HvError where it does not come to that; the source has it then.
        """
        try:
            machine = self._receive()
            talk = self._relay or self._wire
            try:
                talk.send(LOADED)
                talk.receive(GO)
            except BaseException:
                machine.close()
                raise
        except HvError as error:
            self._wire.fail(str(error))
            self._wire.close()
            raise
        finally:
            if self._memory is not None:
                self._memory.close()
            if self._folder:
                from shutil import rmtree

                rmtree(self._folder, ignore_errors=True)    # its files are open where they are needed
        machine.at_start.append(self._tell)
        return machine

    def _tell(self) -> None:
        try:
            (self._relay or self._wire).send(DONE)
        except HvError:
            pass            # the source has let go of it all the same
        self._wire.close()

    def _receive(self) -> Machine:
        wire = self._wire
        _, _, length = wire.receive(HELLO)
        hello = Snapshot("", wire.read_plain(length, "HELLO"))
        if hello.state.get("migration") != VERSION:
            raise SnapshotError("migration", f"version {hello.state.get('migration')!r:.20}, this pyhv knows {VERSION}",
                                "use the same pyhv on both sides")
        recipe = self._changes(hello.part("config"))
        config = _config(recipe)
        check_facts(hello)
        self._memory = memory = self._make_memory(config.memory, bool(hello.state.get("postcopy")))
        self._folder = mkdtemp(prefix="pyhv-arrive-")
        os.mkdir(f"{self._folder}/{FOLDER}", 0o700)
        wire.send(READY)
        while True:
            kind, argument, length = wire.receive(PAGES, ROUND, FILE, STATE)
            if kind == PAGES:
                self._pages(memory, argument, length)
            elif kind == ROUND:
                wire.send(ROUND, argument)
            elif kind == FILE:
                self._file(wire.read(length))
            else:
                return self._build(Snapshot(self._folder, wire.read_plain(length, "STATE")), config.memory)

    def _make_memory(self, size: int, postcopy: bool) -> GuestMemory:
        if not postcopy:
            return GuestMemory(size)
        from hv.linux.userfaultfd import Userfaultfd
        from hv.snapshot.lazy import LazyMemory

        if not self._wire.plain:
            raise ConfigError("post-copy by tls: can't be", "unix: or tcp:, through a tunnel such as ssh's")
        Userfaultfd().close()       # better now than when the source stands still
        memory = LazyMemory(size)
        try:
            memory.prepare()
        except BaseException:
            memory.close()
            raise
        return memory

    def _pages(self, memory: GuestMemory, first: int, length: int) -> None:
        """Content of pages, which are numbered across all ranges."""
        if length % PAGE_SIZE:
            raise SnapshotError("PAGES", f"{length} bytes are no whole pages", "the source is damaged or hostile")
        start, left = first * PAGE_SIZE, length
        for region in memory.regions:
            if left and start < region.size:
                here = min(left, region.size - start)
                view = region.view[start:start + here]
                try:
                    self._wire.read_into(view)
                finally:
                    view.release()
                left -= here
                start = 0
            elif left:
                start -= region.size
        if left:
            raise SnapshotError("PAGES", f"page {first} and {length // PAGE_SIZE - 1} more are not all RAM",
                                "the source is damaged or hostile")

    def _file(self, data: bytes) -> None:
        """A part of a disk's file."""
        line, newline, content = data.partition(b"\n")
        try:
            head = loads(line[:_LINE_MOST].decode())
            name, size, at, changed = (head[key] for key in ("name", "size", "at", "mtime_ns"))
            if not newline or not isinstance(name, str) or not 0 < len(name) < 64 or not _NAMES.issuperset(name) \
                    or name[0] == "." or any(type(number) is not int for number in (size, at, changed)) \
                    or not 0 <= size <= _FILE_MOST or not 0 <= at <= at + len(content) <= size:
                raise ValueError("out of range")
            path = f"{self._folder}/{FOLDER}/{name}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(fd, size)
                while content:
                    done = os.pwrite(fd, content, at)
                    content, at = content[done:], at + done
                os.utime(fd, ns=(changed, changed))
            finally:
                os.close(fd)
        except OSError as error:
            raise HvError(f"a disk's file can't be written here: {error.strerror}", "make room in TMPDIR") from None
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise SnapshotError("FILE", f"is no part of a file ({error})", "the source is damaged or hostile") from None

    def _build(self, state: Snapshot, size: int) -> Machine:
        recipe = disks_for_restore(self._changes(state.part("config")), state.part("disks", kind=list), self._folder,
                                   private=False)
        config = _config(recipe)
        if config.memory != size:
            raise SnapshotError("config.memory", f"{config.memory}, it was {size} in the beginning",
                                "the source is damaged or hostile")

        def memory(machine: Machine) -> GuestMemory:
            taken, self._memory = self._memory, None
            assert taken is not None
            machine.memory = taken      # it is the machine's to close
            if "later" in state.state:
                from hv.snapshot.postcopy import Relay

                self._relay = Relay(machine, taken, self._wire, state.runs("later", size))
            return taken

        return Machine(config, self._loop, lambda machine: rebuild(machine, state, memory))


def arrive(wire: Wire, loop: Loop | None = None,
           changes: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Machine:
    """The machine that comes by `wire`, running."""
    machine = Arrival(wire, loop, changes).take()
    machine.start()
    return machine


def _config(recipe: dict[str, Any]) -> Any:
    try:
        return config_from(recipe)
    except (ConfigError, GuestError) as error:
        raise SnapshotError("config", str(error), error.hint) from None
