"""Being attached to an instance: our streams are its program's, signals and the terminal's size go on to it.

What we can't write yet is kept, and no more is read meanwhile: the program waits for our reader. Driven by
tests/root/test_instance.py and tests/root/test_instance_tty.py.
"""

from __future__ import annotations

__all__ = ["Attached", "parse_keys"]

import os
from _signal import SIG_SETMASK, SIGCHLD, SIGWINCH, pthread_sigmask
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, poll

from hv.errors import ConfigError, HvError, StateError
from hv.instance.keeper_client import KeeperGone, request
from hv.instance.way import way_of
from hv.instance.wire import frame, frames
from hv.linux.signals import block_all, read_signal, signal_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.instance.record import Instance

_CHUNK = 1 << 16
_PIECE = 4096               # what a pipe or a terminal that can be written to takes without waiting (PIPE_BUF)
_IGNORED = (SIGCHLD, SIGWINCH, 13, 23)      # 13: SIGPIPE, 23: SIGURG
_DETACHING = (1, 2, 15)     # SIGHUP, SIGINT, SIGTERM end us where they do not go to the program
_DEFAULT_KEYS = "ctrl-p,ctrl-q"


def parse_keys(text: str | None) -> bytes:
    """--detach-keys: letters, or ctrl- and one of a-z @ [ \\ ] ^ _, by commas; "" is none."""
    keys = bytearray()
    for word in (_DEFAULT_KEYS if text is None else text).split(","):
        if len(word) == 1 and word.isascii():
            keys += word.encode()
        elif word.startswith("ctrl-") and len(word) == 6 and word[5].lower() in "abcdefghijklmnopqrstuvwxyz@[\\]^_":
            keys.append(ord(word[5].upper()) & 0x1F)
        elif word or text:
            raise ConfigError(f"--detach-keys {text!r:.40}", "for example ctrl-p,ctrl-q")
    return bytes(keys)


class Attached:
    """`expect`: the instance is about to be started. run() gives its exit code, None where we left it running."""

    def __init__(self, instance: Instance, *, stdin: bool, keys: bytes, proxy: bool, expect: bool = False) -> None:
        self._instance, self._proxy, self._keys = instance, proxy, keys
        self._terminal = instance.settings.tty
        self._asked: dict[str, Any] = {"do": "attach", "id": instance.id, "stdin": stdin}
        self._connection, _ = request(self._asked | {"expect": expect})
        self._input = 0 if stdin else -1
        self._typed = bytearray()           # for the keeper
        self._said: list[tuple[int, bytes]] = []        # for our streams
        self._held = b""                    # typed, and perhaps the beginning of the keys to detach
        self._code: int | None = None
        self._over = self._left = False
        self._before: list[Any] | None = None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def run(self) -> int | None:
        """Until its end, or the keys to detach."""
        mask = block_all()
        signals = signal_descriptor()
        try:
            self._raw()
            self._resize()
            while not (self._over and not self._said):
                self._turn(signals)
        finally:
            self._cook()
            os.close(signals)
            self.close()
            pthread_sigmask(SIG_SETMASK, mask)
        return None if self._left else self._code

    def _raw(self) -> None:
        if self._terminal and self._input >= 0 and os.isatty(0):
            from hv.linux.rawmode import set_raw

            self._before = set_raw(0)

    def _cook(self) -> None:
        if self._before is not None:
            from hv.linux.rawmode import restore

            before, self._before = self._before, None
            restore(0, before)

    def _resize(self) -> None:
        if not self._terminal:
            return
        try:
            columns, rows = os.get_terminal_size(1)
        except OSError:
            return
        if not way_of(self._instance).resize(self._instance, rows, columns):
            self._typed += frame(b"W", rows.to_bytes(2, "little") + columns.to_bytes(2, "little"))

    def _turn(self, signals: int) -> None:
        """Wait for what can be done next, and do it."""
        waiter = poll()
        waiter.register(signals, POLLIN)
        if self._said:
            waiter.register(self._said[0][0], POLLOUT)
        sock = -1
        if not self._over:
            sock = self._connection.fileno()
            waiter.register(sock, (0 if self._said else POLLIN) | (POLLOUT if self._typed else 0))
        if self._input >= 0 and len(self._typed) < _CHUNK and not self._over:
            waiter.register(self._input, POLLIN)
        ready = dict(waiter.poll())
        if signals in ready:
            self._signal(read_signal(signals))
        if self._said and ready.get(self._said[0][0]):
            self._say()
        events = ready.get(sock, 0)
        if events & POLLOUT:
            self._send()
        if events & (POLLIN | POLLHUP | POLLERR) and not self._said:
            self._listen()
        if self._input >= 0 and ready.get(self._input):
            self._read()

    # from the program ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            self._connection.read()
        except (KeeperGone, OSError):
            self._again()
            return
        for kind, payload in self._connection.waiting:
            if kind == b"O":
                self._said.append((1, payload))
            elif kind == b"R":
                self._said.append((2, payload))
            elif kind == b"X":
                self._code = int.from_bytes(payload[:4], "little")
                self._over = True
        self._connection.waiting.clear()

    def _say(self) -> None:
        fd, data = self._said[0]
        try:
            done = os.write(fd, data[:_PIECE])
        except BlockingIOError:
            return
        except OSError:
            done = len(data)            # nobody reads; the program goes on
        if done < len(data):
            self._said[0] = fd, data[done:]
        else:
            del self._said[0]

    def _again(self) -> None:
        """The keeper was killed: go on with the next one."""
        self._connection.close()
        try:
            self._connection, _ = request(self._asked)
        except StateError:              # it has ended meanwhile
            self._over = True
            try:
                self._code = self._instance.refresh().exit_code
            except HvError:
                self._code = 255        # and was removed

    # to the program ------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = os.read(self._input, _PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._input = -1
            self._typed += frame(b"i")
            return
        if self._terminal and self._keys:
            data = self._look_for_keys(data)
        if data:
            self._typed += frames(b"I", data)

    def _look_for_keys(self, data: bytes) -> bytes:
        """`data` without what may be the beginning of the keys to detach; at their end we leave."""
        data = self._held + data
        self._held = b""
        at = data.find(self._keys)
        if at >= 0:
            self._left = self._over = True
            self._said.clear()
            self._typed += frames(b"I", data[:at]) if at else b""
            self._typed += frame(b"Q")
            self._connection.socket.settimeout(1)
            self._send()
            return b""
        for size in range(min(len(self._keys) - 1, len(data)), 0, -1):
            if data.endswith(self._keys[:size]):
                self._held = data[-size:]
                return data[:-size]
        return data

    def _send(self) -> None:
        try:
            del self._typed[:self._connection.socket.send(self._typed[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            self._typed.clear()         # _listen() hears of it

    def _signal(self, number: int) -> None:
        if number == SIGWINCH:
            self._resize()
        elif number not in _IGNORED:
            if self._proxy:
                try:
                    way_of(self._instance).kill(self._instance, number)
                except HvError:
                    pass                # it has ended, or is about to begin
            elif number in _DETACHING:
                self._over = True
                self._code = 128 + number


