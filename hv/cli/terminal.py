"""Standard input and output as the guest's console.

A terminal is put in raw mode and restored on every way out; an escape key (Ctrl-A) reaches pyhv itself.
Pipes and files work too: end of input is simply no more input. A reader that goes away stops the output,
not the guest. Driven by tests/kvm/test_terminal.py.
"""

from __future__ import annotations

__all__ = ["Terminal"]

import os
import select
from _thread import allocate_lock

from hv.cli.say import say
from hv.errors import ConfigError
from hv.machine.loop import EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.machine.machine import Machine

STDIN, STDOUT = 0, 1
ESCAPE = b"\x01"                # Ctrl-A, as QEMU, kvmtool and screen have it
HELP = (
    "\r\npyhv: Ctrl-A then\r\n"
    "  h  this help           x  quit\r\n"
    "  p  pause or resume     r  show registers\r\n"
    "  a  send Ctrl-A itself\r\n"
)
_BACKLOG_MAX = 1 << 20          # bytes held for a slow reader; beyond, output is dropped and counted
_OUTPUT_PIECE = 512             # written at once: a terminal or pipe that can be written to has room for it
_INPUT_CHUNK = 4096
_PATIENCE = 1000                # ms that a reader may take nothing when the guest has ended
_SIGWINCH = 28                  # man 7 signal
_INPUT_HIGH = 1 << 16           # bytes typed ahead at which reading stops until the guest has taken them


class Terminal:
    """A context manager that joins `machine.console` to this process's stdin and stdout."""

    def __init__(self, machine: Machine, log: str | None = None) -> None:
        self._machine = machine
        self._in, self._out = STDIN, STDOUT
        self._lock = allocate_lock()
        self._saved: list[object] | None = None
        self._escaped = False
        self._reading = False
        self._backlog = bytearray()
        self._poll = select.poll()
        self.dropped = 0
        self._signals: list[tuple[int, object]] = []
        self._log = -1
        if log is not None:
            try:
                self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise ConfigError(f"--log {log}: {os.strerror(error.errno or 0)}", "name a writable file") from None

    def __enter__(self) -> Terminal:
        machine, loop = self._machine, self._machine.loop
        try:
            self._poll.register(self._out, select.POLLOUT)
        except OSError:
            self._out = -1
        machine.console.add_sink(self._print)
        self._catch_signals()
        self._set_raw()
        if machine.console.has_size:
            self._follow_size()
        try:
            readable = loop.add(self._in, EPOLLIN, self._read)
        except OSError:
            return self     # stdin is closed: a guest without input
        if readable:
            self._reading = True
        elif os.isatty(self._in) is False:
            loop.call(self._read_file)
        return self

    def __exit__(self, *exc: object) -> None:
        self._machine.loop.remove(self._in)
        self._machine.loop.remove(STDOUT)
        self._flush_all()
        self.restore()
        import _signal

        for number, handler in self._signals:
            _signal.signal(number, handler)
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    # the terminal ---------------------------------------------------------------------------------

    def _set_raw(self) -> None:
        try:
            if not os.isatty(self._in) or os.tcgetpgrp(self._in) != os.getpgrp():
                return      # not ours, or we are in the background: touching it would stop us
        except OSError:
            return
        from hv.linux.rawmode import set_raw

        self._saved = set_raw(self._in)

    def restore(self) -> None:
        """Put the terminal back as it was."""
        if self._saved is not None:
            from hv.linux.rawmode import restore

            restore(self._in, self._saved)
            self._saved = None

    def _catch_signals(self) -> None:
        import _signal

        machine = self._machine
        for number, reason in ((2, "interrupted"), (15, "terminated"), (1, "hangup")):

            def stop(caught: int, frame: object, reason: str = reason) -> None:
                machine.stop(reason, f"signal {caught}")

            self._signals.append((number, _signal.signal(number, stop)))

    def _follow_size(self) -> None:
        """Tell the guest how large the terminal is, now and whenever that changes."""
        import _signal

        machine = self._machine
        try:
            os.get_terminal_size(self._out)
        except OSError:
            return      # not a terminal

        def tell() -> None:
            try:
                machine.console.resize(*os.get_terminal_size(STDOUT))
            except OSError:
                pass        # it is gone

        def changed(caught: int, frame: object) -> None:
            machine.loop.call(tell)     # a handler may not take locks

        tell()
        self._signals.append((_SIGWINCH, _signal.signal(_SIGWINCH, changed)))

    # output: called in vCPU threads and I/O threads --------------------------------------------------

    def _print(self, data: bytes) -> None:
        if self._log >= 0:
            self._write_log(data)
        if self._out < 0:
            return
        at = 0
        while at < len(data) and not self._backlog and self._writable():
            at += self._write(data[at:at + _OUTPUT_PIECE])
        if at < len(data):
            with self._lock:
                first = not self._backlog
                if len(self._backlog) < _BACKLOG_MAX:
                    self._backlog += data[at:]
                else:
                    self.dropped += len(data) - at
            if first:
                self._machine.loop.call(self._watch_output)

    def _write_log(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._log, data):]
        except OSError as error:        # a full disk, most likely; the guest goes on
            log, self._log = self._log, -1
            os.close(log)
            say(f"pyhv: --log: {os.strerror(error.errno or 0)}; the log ends here")

    def _writable(self) -> bool:
        ready = self._poll.poll(0)
        return bool(ready) and bool(ready[0][1] & (select.POLLOUT | select.POLLERR | select.POLLHUP))

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._out, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._out = -1      # the reader has gone; the guest goes on
            return len(data)

    def _watch_output(self) -> None:
        if self._out >= 0 and self._backlog:
            try:
                self._machine.loop.add(self._out, EPOLLOUT, self._drain)
            except FileExistsError:
                pass        # watched already

    def _drain(self, events: int) -> None:
        with self._lock:        # a vCPU may be adding to it
            del self._backlog[:self._write(bytes(self._backlog[:_OUTPUT_PIECE]))]
            if self._out < 0:
                self._backlog.clear()
            if not self._backlog:
                self._machine.loop.remove(STDOUT)

    def _flush_all(self) -> None:
        """At the end: what is left goes out, unless a slow reader takes nothing for a second."""
        while self._backlog and self._out >= 0 and self._poll.poll(_PATIENCE):
            del self._backlog[:self._write(bytes(self._backlog[:_OUTPUT_PIECE]))]

    # input: called by the loop ---------------------------------------------------------------------

    def _read(self, events: int) -> None:
        try:
            data = os.read(self._in, _INPUT_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._machine.loop.remove(self._in)
            self._reading = False
            if self._saved is not None:
                self._machine.stop("hangup", "the terminal was closed")
            return
        self.typed(data)
        console = self._machine.console
        if console.waiting > _INPUT_HIGH:
            self._machine.loop.remove(self._in)
            console.on_drained = self._read_again

    def _read_again(self) -> None:
        self._machine.console.on_drained = None

        def again() -> None:
            self._machine.loop.add(self._in, EPOLLIN, self._read)

        self._machine.loop.call(again)

    def _read_file(self) -> None:
        """Standard input is a regular file, which epoll refuses: read it whole, it is always ready."""
        try:
            while data := os.read(self._in, 1 << 16):
                self._machine.console.send(data)
        except OSError:
            pass

    def typed(self, data: bytes) -> None:
        """Bytes from the user: the guest's, but for what follows the escape key on a terminal."""
        if self._saved is None:
            self._machine.console.send(data)
            return
        plain = bytearray()
        for value in data:
            key = bytes((value,))
            if self._escaped:
                self._escaped = False
                if key in (b"a", ESCAPE):
                    plain += ESCAPE
                else:
                    self._command(key)
            elif key == ESCAPE:
                self._escaped = True
            else:
                plain += key
        if plain:
            self._machine.console.send(bytes(plain))

    def _command(self, key: bytes) -> None:
        machine = self._machine
        if key in (b"x", b"q"):
            machine.stop("quit", "the user quit")
        elif key == b"p":
            if machine.pausing:
                self._say("\r\npyhv: resumed\r\n")
                machine.thaw()
            else:
                machine.freeze()
                self._say("\r\npyhv: paused; Ctrl-A p resumes\r\n")
        elif key == b"r":
            from hv.debug.regs import describe

            self._say("\r\n" + describe(machine).replace("\n", "\r\n") + "\r\n")
        else:
            self._say(HELP)

    def _say(self, text: str) -> None:
        say(text.removesuffix("\n"))
