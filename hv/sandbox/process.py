"""A process of the guest, seen from the host: its start, its standard streams, signals, how it ended.

    process = GuestProcess.start(device, ProcessSpec(["true"]), loop=machine.loop)
    process.wait(30)                        # ("exit", 0)

Each has a stream of its own to the guest's agent (vsock port 2; docs/agent.md), pumped in the I/O loop: no thread, and
at most some 200 KiB however fast one side is or slow the other. Nobody waits but in wait() and its like, which serve
the loop meanwhile. A guest is hostile: frames of a wrong kind, length, or order break the stream, and a broken stream
is an error of this process alone. Driven by tests/unit/test_guest_process.py and
tests/kvm/test_guest_agent.py.
"""

from __future__ import annotations

__all__ = ["GuestProcess", "StartError"]

import os
from _socket import AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_STREAM, socketpair
from errno import EAGAIN, EINTR, errorcode
from select import EPOLLIN, EPOLLOUT

from hv.errors import HvError, StateError
from hv.sandbox.ends import Sink, Source, Watched
from hv.sandbox.frames import (
    PORT,
    WINDOW,
    FrameError,
    Frames,
    attach_frame,
    exited,
    failed,
    frame,
    gone_frame,
    resize_frame,
    signal_frame,
    started,
    taken,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Protocol

    from hv.devices.virtio.device import Io
    from hv.devices.virtio.vsock import Vsock
    from hv.sandbox.frames import ProcessSpec

    class Loop(Io, Protocol):
        """hv/machine/loop.py, or a part of it."""

        def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool: ...
        def run_there(self, function: Callable[[], None]) -> None: ...

READ_MOST = 1 << 16
WELCOME_MOST = 32               # "OK 1073741824\n", from our own device
OUTGOING_MOST = 4 << 20         # a start's records, and signals that a stuck guest does not take


class StartError(HvError):
    """The guest could not start the process: `errno`, and the `step` that failed (`exec /bin/x`, `chdir /y`)."""

    def __init__(self, errno: int, step: str) -> None:
        super().__init__(f"{step}: {os.strerror(errno)} ({errorcode.get(errno, errno)})")
        self.errno = errno
        self.step = step


class GuestProcess:
    """Made by start(). `pid` is 0 until it runs, `status` None until it has ended, `error` what went wrong instead."""

    def __init__(self, stream: _socket.socket, loop: Loop, stdin: int | None, stdout: int | None, stderr: int | None,
                 told: dict[str, Callable[[GuestProcess], None] | None]) -> None:
        self.pid = 0                                    # in the guest
        self.status: tuple[str, int] | None = None      # ("exit", code) or ("signal", number)
        self.error: HvError | None = None               # StartError, FrameError, or that the stream broke
        self.ended = False                              # all output has been passed on, everything is closed
        self._loop = loop
        self._stream = stream
        self._told = told
        self._frames = Frames()
        self._welcome: bytearray | None = bytearray()   # until the device's own line has come
        self._outgoing = bytearray()
        self._window = WINDOW                           # bytes that the agent may still be sent
        self._over = False                              # the guest sends no more
        self._late: bytearray | None = None             # what is to be sent once it is attached to
        self._source: Source | None = None
        self._sinks: dict[bytes, Sink | None] = {b"O": None, b"R": None}
        try:
            if stdin is not None:
                self._source = Source(loop, stdin, self._input)
            if stdout is not None:
                self._sinks[b"O"] = Sink(loop, stdout, lambda: self._flush(b"O"))
            if stderr is not None:
                self._sinks[b"R"] = Sink(loop, stderr, lambda: self._flush(b"R"))
        except BaseException:
            self._close_ends()
            raise
        self._reading = Watched(loop, stream.fileno(), EPOLLIN, self._receive)
        self._copy = os.dup(stream.fileno())            # epoll has one entry for a descriptor
        self._writing = Watched(loop, self._copy, EPOLLOUT, self._send)

    @classmethod
    def start(cls, device: Vsock, spec: ProcessSpec, *, stdin: int | None = None, stdout: int | None = None,
              stderr: int | None = None, loop: Loop,
              on_start: Callable[[GuestProcess], None] | None = None,
              on_exit: Callable[[GuestProcess], None] | None = None,
              on_end: Callable[[GuestProcess], None] | None = None) -> GuestProcess:
        """Ask the guest to run it; returns at once, from any thread. ConfigError for a spec that can't be sent.

        Input is read from `stdin`, output written to `stdout` and `stderr` (with a terminal all goes to `stdout`); None
        is nothing. The descriptors stay the caller's. The calls are made once each, in the loop's thread: on_start
        where it runs, on_exit once `status` or `error` is there, on_end last of all.
        """
        told = {"start": on_start, "exit": on_exit, "end": on_end}
        return cls._open(device, spec.frames(), WINDOW, stdin, stdout, stderr, loop, told)

    @classmethod
    def attach(cls, device: Vsock, pid: int, *, stdin: int | None = None, stdout: int | None = None,
               stderr: int | None = None, loop: Loop,
               on_start: Callable[[GuestProcess], None] | None = None,
               on_exit: Callable[[GuestProcess], None] | None = None,
               on_end: Callable[[GuestProcess], None] | None = None) -> GuestProcess:
        """start() for one that runs, or has ended meanwhile: whose stream broke, as all do when a guest is restored.

        What was under way when that happened is lost. StartError (ESRCH) where the agent has no such process.
        """
        told = {"start": on_start, "exit": on_exit, "end": on_end}
        return cls._open(device, attach_frame(pid), 0, stdin, stdout, stderr, loop, told)

    @classmethod
    def _open(cls, device: Vsock, first: bytes, window: int, stdin: int | None, stdout: int | None,
              stderr: int | None, loop: Loop, told: dict[str, Callable[[GuestProcess], None] | None]) -> GuestProcess:
        ours, its = socketpair(AF_UNIX, SOCK_STREAM)
        try:
            process = cls(ours, loop, stdin, stdout, stderr, told)
        except BaseException:
            ours.close()
            its.close()
            raise
        its.setblocking(False)

        def ask() -> None:
            with device.lock:
                device.open_for_host(its, PORT)

        process._window = window
        process._outgoing += first
        if not window:
            process._late = bytearray()                 # the agent takes no more until it has answered
        if stdin is None:
            process._to_send.extend(frame(b"i"))
        device.io.call(ask)
        loop.call(process._begin)
        return process

    # for everybody, from any thread ------------------------------------------------------------------

    def wait_started(self, timeout: float) -> int:
        """Its number in the guest. StartError, HvError where the stream broke, TimeoutError."""
        self._await(lambda: self.pid or self.error is not None, timeout, "does not start")
        if self.pid:
            return self.pid
        assert self.error is not None
        raise self.error

    def wait(self, timeout: float) -> tuple[str, int]:
        """How it ended: ("exit", code) or ("signal", number). As wait_started()."""
        self._await(lambda: self.status is not None or self.error is not None, timeout, "does not end")
        if self.status is not None:
            return self.status
        assert self.error is not None
        raise self.error

    def wait_end(self, timeout: float) -> tuple[str, int]:
        """wait(), and until all output has been passed on: that of processes it left behind, too."""
        self._await(lambda: self.ended, timeout, "has output that nobody takes, or its children run")
        return self.wait(timeout)

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens where it has ended."""
        self._tell(signal_frame(number))

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size."""
        self._tell(resize_frame(rows, columns))

    def close(self) -> None:
        """Hang up: its output goes nowhere, and what it does is not heard of. It runs on."""
        self._loop.run_there(lambda: self._fail(StateError("the process was left to itself")))

    # in the loop's thread ----------------------------------------------------------------------------

    def _await(self, done: Callable[[], object], timeout: float, what: str) -> None:
        if not self._loop.run_until(lambda: bool(done()), timeout):
            raise TimeoutError(f"the guest's process {what} within {timeout:g} s")

    def _tell(self, data: bytes) -> None:
        def put() -> None:
            if self.status is None and not self.ended:
                self._to_send.extend(data)
                if len(self._to_send) > OUTGOING_MOST:
                    self._fail(FrameError("the guest's agent takes nothing any more"))
                else:
                    self._send()

        self._loop.call(put)

    @property
    def _to_send(self) -> bytearray:
        return self._outgoing if self._late is None else self._late

    def _begin(self) -> None:
        if not self.ended:
            self._reading.want(True)
            self._send()

    def _send(self) -> None:
        """Pass on to the guest what its stream takes."""
        try:
            while self._outgoing:
                count = self._stream.send(self._outgoing, MSG_DONTWAIT | MSG_NOSIGNAL)
                del self._outgoing[:count]
        except OSError as error:
            if error.errno not in (EAGAIN, EINTR):
                self._outgoing.clear()          # reading shows what there is to say
        self._settle()

    def _settle(self) -> None:
        """Watch what can go on."""
        if self.ended:
            return
        self._writing.want(bool(self._outgoing))
        stuck = any(sink is not None and sink.pending for sink in self._sinks.values())
        self._reading.want(not self._over and not stuck)
        if self._source is not None:
            self._source.watched.want(bool(self.pid) and self._window > 0 and not self._outgoing)
        if self._over and not stuck:
            self._finish()

    def _input(self) -> None:
        """Standard input has something."""
        assert self._source is not None
        data = self._source.read(self._window)
        if data is None:
            return
        if data:
            self._window -= len(data)
            self._outgoing += frame(b"I", data)
        else:
            self._outgoing += frame(b"i")
            self._end_input()
        self._send()

    def _end_input(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _receive(self) -> None:
        """The guest's end has something."""
        try:
            data = self._stream.recv(READ_MOST, MSG_DONTWAIT)
        except OSError as error:
            if error.errno in (EAGAIN, EINTR):
                return
            data = b""
        if not data:
            self._over = True
            if self.status is None and self.error is None:
                self._fail(StateError("the guest's agent broke off" if self.pid else
                                      "the guest's agent takes no process", "has the guest ended?"))
            elif len(self._frames):
                self._fail(FrameError("the guest's agent broke off within a frame"))
            self._settle()
            return
        if self._welcome is not None:
            data = self._greeted(data)
        self._frames.feed(data)
        self._serve()

    def _greeted(self, data: bytes) -> bytes:
        """What stands behind the device's line that the guest has accepted."""
        assert self._welcome is not None
        self._welcome += data
        line, newline, rest = bytes(self._welcome).partition(b"\n")
        if newline:
            self._welcome = None
            return rest
        if len(line) > WELCOME_MOST:
            self._fail(FrameError("what stands before the first frame is no greeting"))
        return b""

    def _serve(self) -> None:
        """Frames, as long as what they carry can be passed on."""
        try:
            while not self.ended and not any(sink is not None and sink.pending for sink in self._sinks.values()):
                got = self._frames.next()
                if got is None:
                    break
                self._take(*got)
        except FrameError as error:
            self._fail(error)
        self._settle()

    def _take(self, kind: bytes, body: bytes) -> None:
        first, last = not self.pid and self.error is None, self.status is not None
        if (kind in b"PE") != first or (last and kind not in b"OR") or self.error is not None:
            raise FrameError(f"the guest's agent sent a frame {kind.decode()!r} out of turn")
        if kind in b"OR":
            sink = self._sinks[kind]
            if sink is not None and not sink.write(body):
                self._reader_gone(kind)
        elif kind == b"P":
            self.pid = started(body)
            if self._late is not None:
                self._outgoing += self._late
                self._late = None
                self._send()
            self._call("start")
        elif kind == b"E":
            self.error = StartError(*failed(body))
            self._end_input()
            self._call("exit")
        elif kind == b"I":
            count = taken(body)
            if count > WINDOW - self._window:
                raise FrameError(f"the guest's agent took {count} bytes of input that it was not sent")
            self._window += count
        else:
            self.status = exited(body)
            self._end_input()
            self._call("exit")

    def _flush(self, kind: bytes) -> None:
        """Standard output or error can be written."""
        sink = self._sinks[kind]
        if sink is not None and not sink.flush():
            self._reader_gone(kind)
        self._serve()

    def _reader_gone(self, kind: bytes) -> None:
        sink = self._sinks[kind]
        if sink is not None:
            sink.close()
            self._sinks[kind] = None
            if not self._over:
                self._outgoing += gone_frame(1 if kind == b"O" else 2)
                self._send()

    def _fail(self, error: HvError) -> None:
        if self.ended:
            return
        tell = self.error is None and self.status is None
        self.error = self.error or error
        self._over = True
        if tell:
            self._call("exit")
        self._finish()

    def _finish(self) -> None:
        if self.ended:
            return
        self.ended = True
        self._close_ends()
        self._reading.want(False)
        self._writing.want(False)
        os.close(self._copy)
        self._stream.close()
        self._call("end")

    def _close_ends(self) -> None:
        self._end_input()
        for kind, sink in self._sinks.items():
            if sink is not None:
                sink.close()
                self._sinks[kind] = None

    def _call(self, what: str) -> None:
        told = self._told.get(what)
        if told is not None:
            self._told[what] = None
            told(self)
