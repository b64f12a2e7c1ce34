"""Between the terminal that pyhv runs on and the container's: bytes both ways, raw mode, size.

Neither side holds up the other, nor a signal: what can't be written yet is kept, and no more is read meanwhile. Our
standard input may be no terminal at all; its end is then passed on as a terminal has it.

Driven by tests/root/test_container_tty.py.
"""

from __future__ import annotations

__all__ = ["Relay"]

import os
import termios
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, SOCK_CLOEXEC, SOCK_STREAM, socketpair
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, poll

from hv.errors import HvError

_CHUNK = 4096               # what a pipe or a terminal that can be written to takes without waiting (PIPE_BUF)
_GONE = POLLHUP | POLLERR
_END_OF_INPUT = b"\x04"     # VEOF, man 3 termios
_LAST_WORDS = 1 << 20       # bytes that are still shown when the program has ended and others go on writing


class Relay:
    """`sender` is what the container's first process sends its terminal to."""

    def __init__(self) -> None:
        self._ours, self._theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        self.sender = self._theirs.fileno()
        self._master = -1
        self._input, self._output = 0, 1        # -1: at its end, gone
        self._typed = self._said = b""          # read, not written yet
        self._before: list[object] | None = None

    def begin(self) -> None:
        """The container has its terminal: take the other side, set ours to raw mode."""
        try:
            _, extra, _, _ = self._ours.recvmsg(64, CMSG_SPACE(4), MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
        except OSError:
            extra = []
        if not extra:
            raise HvError("the container's terminal did not come")
        self._master = int.from_bytes(extra[0][2][:4], "little")
        os.set_blocking(self._master, False)
        if os.isatty(0):
            self.resize()
            self._before = termios.tcgetattr(0)
            raw = termios.tcgetattr(0)
            # man 3 termios, cfmakeraw
            raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
                        | termios.IGNCR | termios.ICRNL | termios.IXON)
            raw[1] &= ~termios.OPOST
            raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
            termios.tcsetattr(0, termios.TCSANOW, raw)

    def resize(self) -> None:
        """The container's terminal gets the size of ours."""
        try:
            termios.tcsetwinsize(self._master, termios.tcgetwinsize(0))
        except (OSError, termios.error):
            pass

    def turn(self, signals: int) -> bool:
        """Move what can be moved; True once a signal waits at `signals`."""
        waiter = poll()
        waiter.register(signals, POLLIN)
        if self._input >= 0 and not self._typed:
            waiter.register(self._input, POLLIN)
        if self._master >= 0:
            waiter.register(self._master, (0 if self._said else POLLIN) | (POLLOUT if self._typed else 0))
        if self._said:
            waiter.register(self._output, POLLOUT)
        ready = dict(waiter.poll())
        if self._said and ready.get(self._output):
            self._say()
        events = ready.get(self._master, 0) if self._master >= 0 else 0
        if events & POLLOUT:
            self._type()
        if events & (POLLIN | _GONE) and not self._said and not self._listen():
            os.close(self._master)      # nobody has it open inside any more
            self._master, self._typed = -1, b""
        if self._input >= 0 and self._input in ready:
            self._read()
        return signals in ready

    def _listen(self) -> bool:
        """Read what the program says; False at its end."""
        try:
            self._said = os.read(self._master, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False                # EIO: the other side of the pty is closed
        return bool(self._said)

    def _say(self) -> None:
        if self._output >= 0:
            try:
                self._said = self._said[os.write(self._output, self._said):]
                return
            except BlockingIOError:
                return
            except OSError:
                self._output = -1       # nobody reads; the program goes on
        self._said = b""

    def _read(self) -> None:
        try:
            data = os.read(self._input, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._input = -1
            data = b"" if self._before else _END_OF_INPUT
        if self._master >= 0:
            self._typed = data
            self._type()

    def _type(self) -> None:
        try:
            self._typed = self._typed[os.write(self._master, self._typed):]
        except BlockingIOError:
            pass
        except OSError:
            self._typed = b""

    def drain(self) -> None:
        """What the program said last."""
        shown = 0
        while self._master >= 0 and shown < _LAST_WORDS:
            while self._said:
                shown += len(self._said)
                self._say()
            if not self._listen() or not self._said:
                break

    def end(self) -> None:
        """Our terminal as it was."""
        if self._before is not None:
            before, self._before = self._before, None
            try:
                termios.tcsetattr(0, termios.TCSADRAIN, before)  # type: ignore[arg-type]
            except termios.error:
                pass                    # it is gone

    def close(self) -> None:
        """Close everything."""
        self._ours.close()
        self._theirs.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
