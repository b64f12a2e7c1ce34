"""The keeper: one process for all instances of a host, or of one $PYHV_RUN. It has nothing that can't be had again.

It reads what programs write, keeps it in their logs and hands it to who is attached; writes to them what comes from
there; learns of their ends, gives back what they had, and starts those again that are to be. Any command starts it
where there is none, and it ends when there is nothing left to keep. Streams and ends are held by a process of 30 kB for
each instance (holder.py), or by the VM's own. So whoever kills the keeper stops logs and attachments, until the next
command of pyhv starts another, which takes over from the holders; a program that writes meanwhile waits once its pipe
is full.

Why one, and no monitor for each instance: docs/run.md has the figures. Driven by tests/root/test_instance.py and
tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["Keeper", "keep"]

import gc
import os
from _socket import SO_PEERCRED, SOL_SOCKET, socket
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from select import EPOLLHUP, EPOLLIN, epoll
from time import monotonic

from hv.container.state import now
from hv.errors import HvError
from hv.instance.housekeeping import settle_layers, sweep_networks
from hv.instance.keeper_guest import Guest
from hv.instance.kept import Kept
from hv.instance.record import Instance
from hv.linux.signals import block_all
from hv.places import rootless, run_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from hv.instance.launch import Launch

_LINGER = 0.5               # seconds without anything to do, after which it ends
_RETRY = 0.02               # for an instance that a command has locked
_LOG_MOST = 1 << 20
_FD_MOST = 1 << 20


def keep(listener: socket, lock: int) -> NoReturn:
    """Be the keeper, in a process made for that. `lock` is held as long as it lives."""
    block_all()
    os.setsid()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    low = 3
    for fd in sorted((listener.fileno(), lock)):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, _FD_MOST)
    if rootless():
        from hv.instance.anchor import hold_on

        hold_on()                       # for good: by this the namespace of our instances stays
    soft, hard = getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (hard, hard))      # five for each instance
    gc.enable()                         # the command that this was had no time for it
    try:
        Keeper(listener, soft).run()
    finally:
        os._exit(0)


class Keeper:
    """The loop, who is kept, who has come."""

    def __init__(self, listener: socket, files: int) -> None:
        self._files = files             # RLIMIT_NOFILE as it was, for those that it starts
        self.listener = listener
        self.listener.setblocking(False)
        self._poll = epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self.kept: dict[str, Kept] = {}
        self.guests: set[Guest] = set()
        self._expected: dict[str, list[Guest]] = {}     # who waits for an instance to come
        self._waiters: dict[str, list[Guest]] = {}      # who waits for its end
        self._restarting: dict[str, tuple[Instance, float]] = {}

    # the loop ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until there is nothing to keep."""
        self.add(self.listener.fileno(), EPOLLIN, self._come)
        self._start()
        idle = monotonic() + _LINGER
        while True:
            if self.kept or self.guests or self._timers or self._restarting:
                idle = monotonic() + _LINGER
            elif monotonic() >= idle:
                self.guarded(sweep_networks)
                self._leave()
                self.guarded(settle_layers)
                return
            moments = [when for when, _ in self._timers]
            if not (self.kept or self.guests):
                moments.append(idle)
            moment = min(moments, default=None)
            for fd, events in self._poll.poll(-1 if moment is None else max(moment - monotonic(), 0) + 0.001):
                handler = self._handlers.get(fd)
                if handler is not None:
                    self.guarded(lambda handler=handler, events=events: handler(events))    # type: ignore[misc]
            now_ = monotonic()
            due = [row for row in self._timers if row[0] <= now_]
            self._timers = [row for row in self._timers if row[0] > now_]
            for _, callback in due:
                self.guarded(callback)

    def guarded(self, callback: Callable[[], object]) -> None:
        """Nothing that goes wrong with one instance ends the others."""
        try:
            callback()
        except Exception as error:
            self.note(f"{type(error).__name__}: {error}")

    def note(self, text: str) -> None:
        """A line in RUN/keeper.log."""
        try:
            fd = os.open(f"{run_root()}/keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if os.fstat(fd).st_size < _LOG_MOST:
                os.write(fd, f"{now()} {text}\n".encode(errors="replace"))
            os.close(fd)
        except OSError:
            pass

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler` with what has happened to `fd`."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Look out for other events."""
        self._poll.modify(fd, events)

    def drop(self, fd: int) -> None:
        """Look out no more; before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call it then."""
        self._timers.append((monotonic() + seconds, callback))

    def _start(self) -> None:
        """Take over what runs, write down what has ended unseen."""
        from hv.instance.finish import sweep

        try:
            ids = os.listdir(f"{run_root()}/instances")
        except OSError:
            ids = []
        for id in ids:
            if os.path.exists(f"{run_root()}/instances/{id}/keep.json"):
                self.guarded(lambda id=id: self.take(id))    # type: ignore[misc]
        for instance in sweep(self.kept):
            self.guarded(lambda instance=instance: self._again(instance))    # type: ignore[misc]

    def _leave(self) -> None:
        """Let go of the name. Who comes at this moment is hung up on, and asks the next one (keeper_client.py)."""
        try:
            os.unlink(f"{run_root()}/keeper.sock")
        except OSError:
            pass

    # guests ------------------------------------------------------------------------------------------

    def _come(self, events: int) -> None:
        while True:
            try:
                fd, _ = self.listener._accept()     # type: ignore[attr-defined]
            except OSError:
                return
            sock = socket(fileno=fd)
            os.set_inheritable(fd, False)
            uid = int.from_bytes(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)[4:8], "little")   # struct ucred
            if uid not in (0, os.geteuid()):
                sock.close()
                continue
            guest = Guest(self, sock)
            self.guests.add(guest)

    def gone(self, guest: Guest) -> None:
        """A guest has hung up."""
        self.guests.discard(guest)
        for table in (self._expected, self._waiters):
            for id, rows in list(table.items()):
                if guest in rows:
                    rows.remove(guest)
                    if not rows:
                        del table[id]

    def request(self, guest: Guest, asked: dict[str, Any]) -> None:
        """What a guest wants."""
        what, id = asked.get("do"), str(asked.get("id", ""))
        if what == "ping":
            guest.answer({"ok": True, "pid": os.getpid()})
        elif what == "adopt":
            self.take(id)
            guest.answer({"ok": True})
        elif what == "attach":
            if id not in self.kept and os.path.exists(f"{run_root()}/instances/{id}/keep.json"):
                self.take(id)
            if id in self.kept:
                guest.answer({"ok": True})
                self.kept[id].attach(guest, asked)
            elif asked.get("expect"):
                guest.asked = asked
                self._expected.setdefault(id, []).append(guest)
                guest.answer({"ok": True})
            else:
                guest.answer({"error": f"instance {id[:12]} is not running", "hint": f"pyhv start {id[:12]}"})
        elif what == "wait":
            if id not in self.kept and os.path.exists(f"{run_root()}/instances/{id}/keep.json"):
                self.take(id)
            if id in self.kept or id in self._restarting:
                guest.answer({"ok": True})
                self._waiters.setdefault(id, []).append(guest)
            else:
                guest.answer({"gone": True})
        else:
            guest.answer({"error": f"unknown request {what!r:.40}"})

    # instances ---------------------------------------------------------------------------------------

    def take(self, id: str) -> None:
        """Take over the streams of an instance."""
        if id in self.kept:
            return
        kept = Kept(self, Instance(id).load())
        self.kept[id] = kept
        self._restarting.pop(id, None)
        for guest in self._expected.pop(id, []):
            kept.attach(guest, guest.asked)
        kept.begin()

    def ended(self, kept: Kept, code: int | None) -> None:
        """All of its output is in its log and on its way; `code` is how it ended."""
        instance = kept.instance
        try:
            if not instance.lock(wait=False):
                self.later(_RETRY, lambda: self.ended(kept, code))
                return
        except HvError:
            self._tell_end(kept, code)          # it has been removed
            return
        from hv.instance.finish import remove, settle

        try:
            instance.refresh()
            if instance.settings.rm:
                remove(instance, volumes=True)
            else:
                settle(instance, code)
        except HvError as error:
            self.note(f"{instance.name}: {error}")
        finally:
            instance.unlock()
        self._tell_end(kept, code)
        if not instance.settings.rm:
            self._again(instance)

    def _tell_end(self, kept: Kept, code: int | None) -> None:
        from hv.instance.record import UNKNOWN_CODE

        self.kept.pop(kept.instance.id, None)
        number = UNKNOWN_CODE if code is None else code
        kept.tell_end(number)
        for guest in self._waiters.pop(kept.instance.id, []):
            guest.end(number)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    # again -------------------------------------------------------------------------------------------

    def _again(self, instance: Instance) -> None:
        """Start it again, if that is its policy."""
        from hv.instance.record import RESTARTING
        from hv.instance.restart import wait_before

        state, settings = instance.state, instance.settings
        if settings.restart == "no" or instance.is_stopping:
            return
        seconds = wait_before(settings, instance.exit_code, int(state.get("restarts", 0)),
                              _seconds_between(str(state.get("started", "")), str(state.get("finished", ""))),
                              float(state.get("wait", 0)))
        if seconds is None:
            return
        instance.save_state(status=RESTARTING, wait=seconds)
        self._restarting[instance.id] = (instance, monotonic() + seconds)
        self.later(seconds, lambda: self._launch(instance))

    def _launch(self, instance: Instance) -> None:
        from hv.instance.launch import Launch
        from hv.instance.record import EXITED, RESTARTING

        if instance.id not in self._restarting:
            return
        try:
            if not instance.lock(wait=False):
                self.later(_RETRY, lambda: self._launch(instance))
                return
            instance.load()
        except HvError:
            del self._restarting[instance.id]   # removed meanwhile
            instance.unlock()
            return
        try:
            if instance.is_stopping or instance.state.get("status") != RESTARTING:
                del self._restarting[instance.id]
                if instance.state.get("status") == RESTARTING:
                    instance.save_state(status=EXITED)
                return
            instance.save_state(restarts=int(instance.state.get("restarts", 0)) + 1)
            launch = Launch(instance, again=True, files=self._files)
        finally:
            instance.unlock()                   # the maker has it
        self.add(launch.fileno(), EPOLLIN | EPOLLHUP, lambda events: self._launched(instance, launch))

    def _launched(self, instance: Instance, launch: Launch) -> None:
        """It runs, or does not: then that is how it ended."""
        self.drop(launch.fileno())
        try:
            launch.finish()
        except HvError as error:
            self._restarting.pop(instance.id, None)
            self.note(f"{instance.name}: {error}")
            instance.refresh()
            self._again(instance)
        else:
            self._restarting.pop(instance.id, None)


def _seconds_between(start: str, end: str) -> float:
    from hv.instance.times import seconds

    try:
        return seconds(end) - seconds(start)
    except ValueError:
        return 0.0


