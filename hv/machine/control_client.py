"""One connection to a control socket: lines until it becomes a console, then bytes.

All of it runs in the machine's loop and never waits, but for `say` and the console's output, which any thread may
call. What the client has not finished sending is held up to LINE_MOST; what it does not take, up to OUT_MOST, and then
nothing more is read from it. A client has one request under way at a time. Driven by tests/unit/test_control.py.
"""

from __future__ import annotations

__all__ = ["Client"]

from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket
from _thread import allocate_lock
from select import POLLOUT, poll

from hv.errors import HvError
from hv.machine.control_call import Call, fields_of, parse
from hv.machine.loop import EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.control_server import Server

LINE_MOST = 64 << 10        # bytes of one request
OUT_MOST = 1 << 20          # bytes of replies that wait
VIEW_MOST = 256 << 10       # bytes of console output, or of progress, that wait; then some are lost
_CHUNK = 1 << 16
_INPUT_HIGH = 1 << 16       # bytes typed ahead at which reading stops until the guest has taken them
_LOOK_AGAIN = 0.02          # s between looks whether it has
_PATIENCE = 100             # ms in which a client must take something, at the end


class Client:
    """`connection`, served from now until it is gone."""

    def __init__(self, server: Server, connection: socket) -> None:
        self.call: Call | None = None
        self.server = server
        self._machine = server.machine
        self._loop = server.machine.loop
        self._connection = connection
        self._fd = connection.fileno()
        self._lock = allocate_lock()        # of what waits to go out
        self._out = bytearray()
        self._lost = 0
        self._flushing = False              # _flush will be called
        self._in = bytearray()
        self._events = EPOLLIN
        self._heard = False                 # the other side sends no more
        self._leaving = False               # close once all is sent
        self._console = self._types = False
        self._open = True
        server.clients.add(self)
        self._loop.add(self._fd, EPOLLIN, self._ready)

    def refuse(self, error: HvError) -> None:
        """One line, and good-bye."""
        self._leaving = True
        self.call = Call(self._machine, self)
        self.call.fail(error)

    # events ----------------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if events & EPOLLOUT:
            self._flush()
        if events & self._events & EPOLLIN and self._open:
            self._read()
        elif events & ~(EPOLLIN | EPOLLOUT):
            self.gone()         # hung up: that is told whatever is waited for

    def _watch(self) -> None:
        """Wait for what can be dealt with now."""
        if not self._open:
            return
        if self._console:
            busy = self._types and self._machine.console.waiting > _INPUT_HIGH
        else:
            busy = self.call is not None or self._leaving or b"\n" in self._in or len(self._out) > OUT_MOST
        events = (0 if busy or self._heard else EPOLLIN) | (EPOLLOUT if self._out else 0)
        if events != self._events:
            self._events = events
            self._loop.modify(self._fd, events)

    def _read(self) -> None:
        try:
            data = self._connection.recv(_CHUNK, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            self.gone()
            return
        self._heard = not data
        if self._console:
            self._type(data)
        else:
            self._in += data or b"\n"       # a last line may lack its end
            self._next()
        self._watch()

    def gone(self) -> None:
        """The other side is away: forget it."""
        if not self._open:
            return
        self._open = False
        if self.call is not None:
            self.call.cancelled = True
        if self._console:
            self._machine.console.remove_sink(self._printed)
        self._loop.remove(self._fd)
        self.server.clients.discard(self)
        self._connection.close()

    def end(self) -> None:
        """The machine has ended: the last words. Nothing more is read."""
        call, self.call = self.call, None
        self._leaving = False           # it is hung up on when the machine has let go of everything
        self._heard = True
        self._in.clear()
        if call is not None:
            with self._lock:
                self._out += call.at_end()
        waiter = poll()
        waiter.register(self._fd, POLLOUT)
        while self._out and self._open and waiter.poll(_PATIENCE):
            self._flush()
        with self._lock:
            self._out.clear()

    # out -------------------------------------------------------------------------------------------

    def say(self, data: bytes, droppable: bool = False) -> None:
        """Send `data`, soon. What is droppable is dropped where too much waits. Safe from any thread."""
        with self._lock:
            if not self._open or (droppable and len(self._out) > VIEW_MOST):
                self._lost += len(data)
                return
            self._out += data
            if self._flushing:
                return
            self._flushing = True
        self._loop.call(self._flush)

    def _flush(self) -> None:
        if not self._open:
            return
        with self._lock:
            try:
                while self._out:
                    del self._out[:self._connection.send(self._out[:_CHUNK], MSG_DONTWAIT | MSG_NOSIGNAL)]
            except BlockingIOError:
                pass
            except OSError:
                self._out.clear()       # nobody reads
                self._leaving = True
            if not self._out and self._lost and self._console:
                self._out += b"\r\n[pyhv: %d bytes came too fast and are lost]\r\n" % self._lost
                self._lost = 0
            self._flushing = bool(self._out)
        if self._leaving and not self._out:
            self.gone()
        elif not self._flushing and self._in:
            self._next()
        self._watch()

    # requests --------------------------------------------------------------------------------------

    def _next(self) -> None:
        """Begin the next request that is complete, if none is under way."""
        if not self._open or self.call is not None or self._console or self._leaving or len(self._out) > OUT_MOST:
            return
        end = self._in.find(b"\n")
        if max(end, len(self._in) if end < 0 else 0) > LINE_MOST:
            self.refuse(HvError(f"a request of more than {LINE_MOST} bytes"))
            return
        if end >= 0:
            line = bytes(self._in[:end])
            del self._in[:end + 1]
            if line.strip():
                self._begin(line)
            if not self._console:
                self._loop.call(self._next)     # others get a turn between two of ours
        elif self._heard:
            self._leaving = True
            self.say(b"")
        self._watch()

    def _begin(self, line: bytes) -> None:
        call = self.call = Call(self._machine, self)
        try:
            request = parse(line)
            call.id = request.get("id")
            function = self.server.command(request.get("command"))
            answer: Any = function(call, **fields_of(function, request))
        except Exception as error:      # a bug in a command is told to who called it; the machine goes on
            call.fail(error)
            return
        if isinstance(answer, dict):
            call.answer(answer)
        elif answer is not None:
            self.server.work(call, answer)

    def finished(self, call: Call) -> None:
        """The request under way has its last line."""
        if self.call is call and self._open:
            self.call = None
            self.say(call.final)
            self._next()

    # console ---------------------------------------------------------------------------------------

    def become_console(self, history: int, types: bool) -> None:
        """Answer the request under way; from there on, bytes of the console, and what comes is typed where `types`."""
        call, self.call = self.call, None
        assert call is not None
        self._console, self._types = True, types
        with self._lock:        # what is printed from now on waits here until the history is in place
            self._out += call.accept_line({"name": self.server.control.name})
            self._out += self._machine.console.follow(self._printed, history)
        self.say(b"")
        typed = bytes(self._in)
        self._in.clear()
        self._type(typed)

    def _printed(self, data: bytes) -> None:
        self.say(data, droppable=True)

    def _type(self, data: bytes) -> None:
        if data and self._types:
            self._machine.console.send(data)
            self._look_again()

    def _look_again(self) -> None:
        """Has the guest taken what was typed ahead? The console tells only one listener, and that is the terminal."""
        if self._open and self._machine.console.waiting > _INPUT_HIGH:
            self._loop.call_later(_LOOK_AGAIN, self._look_again)
        self._watch()
