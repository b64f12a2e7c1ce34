"""One instance in the keeper: its streams, its log, who is attached, and its end.

Output is read no further while somebody who is attached is a megabyte behind: the program then waits, as it does behind
any pipe. Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["Kept"]

import os
from _signal import SIGTERM
from select import EPOLLIN, EPOLLOUT

from hv.errors import KernelError
from hv.instance.holder import read_status
from hv.instance.keeper_guest import HIGH
from hv.instance.logfile import LogWriter, log_path
from hv.linux.ns import pidfd_open, pidfd_send_signal
from hv.linux.syscall import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.instance.keeper import Keeper
    from hv.instance.keeper_guest import Guest
    from hv.instance.record import Instance

_SYS_PIDFD_GETFD = 438          # arch/x86/entry/syscalls/syscall_64.tbl
_CHUNK = 1 << 16
_LAST_WORDS = 8 << 20           # bytes read at the end, when somebody else still writes to its streams
_INPUT_HIGH = 1 << 18           # bytes of input that its program has not taken
_END = 3                        # in keep.json: the pipe that ends with the program
_STREAMS = {1: (b"O", "stdout"), 2: (b"R", "stderr")}


class Kept:
    """`instance` runs, or has ended a moment ago."""

    def __init__(self, keeper: Keeper, instance: Instance) -> None:
        self._keeper, self.instance = keeper, instance
        settings = instance.settings
        self._terminal, self._stdin_once = settings.tty, settings.stdin_once
        self._guests: list[Guest] = []
        self._input = bytearray()
        self._input_ends = False
        self._reading = False
        self._holder = -1                       # a pidfd
        self._watch = -1                        # readable at the end: holder.py's pipe, or the program's pidfd
        self._out: dict[int, int] = {}          # descriptor -> 1, 2
        self._in = -1
        kept = instance.kept()
        self._log = LogWriter(log_path(instance.folder), settings.log_size, settings.log_files)
        try:
            self._holder = pidfd_open(int(kept.get("pid", 0)))
            if instance.holder():
                self._get(kept.get("fds") or [])
        except KernelError:
            pass                                # it has ended: begin() sees

    def _get(self, numbers: list[int]) -> None:
        """Copies of the holder's descriptors."""
        for stream, number in enumerate(numbers[:4]):
            if not isinstance(number, int) or number < 0:
                continue
            fd = syscall("pidfd_getfd", _SYS_PIDFD_GETFD, self._holder, number, 0)
            os.set_blocking(fd, False)
            if stream == _END:
                self._watch = fd
            elif stream:
                self._out[fd] = stream
            else:
                self._in = fd

    def begin(self) -> None:
        """Read from now on. Who waited for it is attached by now."""
        if self._watch < 0:
            self._ended(0)
            return
        self._keeper.add(self._watch, EPOLLIN, self._ended)
        self.flow()

    # output ------------------------------------------------------------------------------------------

    def flow(self) -> None:
        """Read output, or not, as those attached have taken what there was."""
        wanted = all(guest.waiting < HIGH for guest in self._guests)
        if wanted == self._reading:
            return
        self._reading = wanted
        for fd, stream in self._out.items():
            if wanted:
                self._keeper.add(fd, EPOLLIN, lambda events, fd=fd, stream=stream:    # type: ignore[misc]
                                 self._readable(fd, stream))
            else:
                self._keeper.drop(fd)

    def _readable(self, fd: int, stream: int) -> None:
        if self._read(fd, stream) is None:
            self._keeper.drop(fd)
            self._close(fd)
            del self._out[fd]

    def _read(self, fd: int, stream: int) -> int | None:
        """Bytes read and passed on; None at the end of the stream."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return 0
        except OSError:
            return None                 # EIO: nobody has the terminal any more
        if not data:
            return None
        kind, name = _STREAMS[stream]
        self._log.write(name, data)
        for guest in list(self._guests):
            guest.output(kind, data)
        self.flow()
        return len(data)

    # input -------------------------------------------------------------------------------------------

    def attach(self, guest: Guest, asked: dict[str, Any]) -> None:
        """From now on the guest gets output; it may send input if it asked for that."""
        guest.kept = self
        guest.asked = asked
        self._guests.append(guest)
        for kind, payload in asked.pop("early", []):
            self.heard(guest, kind, payload)
        self.flow()

    def detach(self, guest: Guest) -> None:
        """It has hung up."""
        self._guests.remove(guest)
        if guest.asked.get("stdin") and self._stdin_once and not guest.asked.get("leaves"):
            self._end_input()
        self.flow()

    def heard(self, guest: Guest, kind: bytes, payload: bytes) -> None:
        """A frame of somebody who is attached."""
        if kind == b"I" and guest.asked.get("stdin") and self._in >= 0 and not self._input_ends:
            self._input += payload
            self._write()
        elif kind == b"i" and guest.asked.get("stdin"):
            if self._stdin_once:
                self._end_input()
        elif kind == b"W" and len(payload) == 4 and self._terminal:
            set_size(next(iter(self._out), -1), *(int.from_bytes(payload[at:at + 2], "little") for at in (0, 2)))
        elif kind == b"Q":              # leaves by detach keys: input stays open
            guest.asked["leaves"] = True

    def _end_input(self) -> None:
        self._input_ends = True
        self._write()

    def _write(self) -> None:
        """Give the program what it takes."""
        if self._in < 0:
            self._input.clear()
            return
        try:
            while self._input:
                del self._input[:os.write(self._in, self._input[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:                 # it reads no more
            self._input.clear()
            self._input_ends = True
        self._keeper.drop(self._in)
        if self._input:
            self._keeper.add(self._in, EPOLLOUT, lambda events: self._write())
        elif self._input_ends and not self._terminal:
            self._close(self._in)
            self._in = -1
        for guest in self._guests:
            if guest.asked.get("stdin"):
                guest.read_on(len(self._input) < _INPUT_HIGH)

    # end ---------------------------------------------------------------------------------------------

    def _ended(self, events: int) -> None:
        """The program has ended, and the holder has said how; or that was killed."""
        code = read_status(f"{self.instance.run}/status")
        self._keeper.drop(self._watch)
        self._close(self._watch)
        self._watch = -1
        program = self.instance.program()
        if code is None and program:            # the holder was killed; the program goes on
            try:
                self._watch = pidfd_open(program)
            except KernelError:
                program = 0
            if program:
                self._keeper.add(self._watch, EPOLLIN, self._ended)
                self.flow()
                return
        self._drain()
        for fd in (*self._out, self._in):
            self._keeper.drop(fd)
            self._close(fd)
        self._out.clear()
        self._in = -1
        if self._log.lost:
            self._keeper.note(f"{self.instance.name}: {self._log.lost} bytes of output could not be written to its log")
        self._log.close()
        self._release()
        self._keeper.ended(self, code)

    def _release(self) -> None:
        """The holder may go: nothing is in the pipes any more."""
        if self._holder >= 0:
            try:
                pidfd_send_signal(self._holder, SIGTERM)
            except KernelError:
                pass                            # it was killed
            os.close(self._holder)
            self._holder = -1

    def _drain(self) -> None:
        """What it wrote before it ended is in the pipes still."""
        for fd, stream in self._out.items():
            done = 0
            while done < _LAST_WORDS and (count := self._read(fd, stream)):
                done += count

    def tell_end(self, code: int) -> None:
        """Those attached hear of it behind the last of the output."""
        for guest in list(self._guests):
            guest.end(code)

    @staticmethod
    def _close(fd: int) -> None:
        if fd >= 0:
            os.close(fd)


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Give a terminal its size; nothing where it is none (a VM's is in the guest)."""
    import termios

    try:
        termios.tcsetwinsize(terminal, (rows, columns))
    except (OSError, ValueError, termios.error):
        pass
