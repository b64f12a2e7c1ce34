"""What two pyhv processes say to each other while a machine moves (docs/migration.md): frames on a stream socket.

    kind: u8 | 3 bytes 0 | length: u32 | argument: u64 | `length` bytes            little-endian

    source                                      target
    HELLO   JSON: version, config, host ->
                                            <-  READY, or FAIL with why not
    PAGES   number of the first page, content ->           while the guest runs, again and again
    ROUND   number of the round ->
                                            <-  ROUND   all of it is here
    FILE    a part of a disk's file: JSON line, content ->
    STATE   JSON: all but RAM ->
                                            <-  LOADED, or FAIL: the source goes on
    GO ->                                       the machine is the target's from here on
                                            <-  DONE

and for post-copy WANT, see hv/snapshot/postcopy.py.
Either may say FAIL and hang up; before GO the source goes on with its guest then. What comes is checked: a kind that
is not due, a length beyond its kind's, a page that is not RAM end the connection with FAIL.
Addresses are unix:PATH, tcp:HOST:PORT and tls:HOST:PORT. Driven by tests/unit/test_migrate_wire.py.
"""

from __future__ import annotations

__all__ = [
    "DONE", "FAIL", "FILE", "GO", "HELLO", "LOADED", "PAGES", "PATIENCE", "PIECE", "READY", "ROUND", "STATE",
    "VERSION", "WANT", "Wire", "connect", "listen", "take",
]

import os
import select
import socket
import stat
from struct import Struct
from time import monotonic

from hv.errors import ConfigError, HvError
from hv.snapshot.format import STATE_MOST, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any

    Tls = tuple[str, str, str]          # files: our certificate, our key, the authority that signed the peer's

VERSION = 1
HELLO, READY, FAIL, PAGES, ROUND, FILE, STATE, LOADED, GO, DONE, WANT = range(1, 12)
NAMES = ("?", "HELLO", "READY", "FAIL", "PAGES", "ROUND", "FILE", "STATE", "LOADED", "GO", "DONE",
         "WANT")
PIECE = 1 << 20                 # bytes of content in one frame
_MOST = {HELLO: 1 << 20, FAIL: 4096, PAGES: PIECE, FILE: PIECE + 4096, STATE: STATE_MOST}     # all others carry none
_HEADER = Struct("<B3xIQ")
PATIENCE = 60.0                 # s that the other side may be silent


class Wire:
    """One connection. HvError says what went wrong with it; close() may be called twice."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(PATIENCE)
        self.sent = 0

    def send(self, kind: int, argument: int = 0, *content: bytes | memoryview) -> None:
        """One frame."""
        length = sum(len(part) for part in content)
        try:
            if length > 4096:
                self._sock.sendall(_HEADER.pack(kind, length, argument))
                for part in content:
                    self._sock.sendall(part)
            else:
                self._sock.sendall(b"".join((_HEADER.pack(kind, length, argument), *content)))
        except OSError as error:
            raise HvError(f"the other side is gone ({error.strerror or error})", "see what it printed") from None
        self.sent += _HEADER.size + length

    def receive(self, *expected: int) -> tuple[int, int, int]:
        """(kind, argument, length) of the next frame, which is of an `expected` kind; read its content with `read`."""
        kind, length, argument = _HEADER.unpack(self.read(_HEADER.size))
        if kind == FAIL and length <= _MOST[FAIL]:
            text = self.read(length).decode("utf-8", "replace")
            raise HvError(f"the other side says: {text if text.isprintable() else ascii(text)}")
        if kind not in expected:
            name = NAMES[kind] if kind < len(NAMES) else hex(kind)
            raise HvError(f"the other side sent {name} where {' or '.join(NAMES[each] for each in expected)} was due",
                          "is it a pyhv of another version?")
        if length > _MOST.get(kind, 0):
            raise HvError(f"the other side sent {NAMES[kind]} of {length} bytes",
                          f"{_MOST.get(kind, 0)} at most may be")
        return kind, argument, length

    def read(self, length: int) -> bytes:
        """The next bytes."""
        data = bytearray(length)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """The next bytes, into `view`."""
        while len(view):
            try:
                count = self._sock.recv_into(view)
            except OSError as error:
                raise HvError(f"the other side is gone ({error.strerror or error})", "see what it printed") from None
            if not count:
                raise HvError("the other side hung up", "see what it printed")
            view = view[count:]

    def send_plain(self, kind: int, value: dict[str, Any]) -> None:
        """A frame of plain data."""
        self.send(kind, 0, encode(value))

    def read_plain(self, length: int, what: str) -> dict[str, Any]:
        """Plain data. SnapshotError where it is none."""
        return decode(self.read(length), what)

    def fail(self, text: str) -> None:
        """Say why it ends here, if anybody listens still."""
        try:
            self.send(FAIL, 0, text.encode()[:_MOST[FAIL]])
        except HvError:
            pass

    def ready(self) -> bool:
        """Whether something has come, of a connection that is `plain`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def plain(self) -> bool:
        """Whether its descriptor can be given to another process: not in the midst of TLS."""
        return type(self._sock) is socket.socket

    def fileno(self) -> int:
        """The descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def connect(address: str, tls: Tls | None = None) -> Wire:
    """A connection to who listens at `address`. ConfigError, HvError."""
    kind, place = _parse(address, tls)
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else _family(place))
    try:
        sock.settimeout(PATIENCE)
        sock.connect(place)
        if kind != "unix":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None and kind == "tls":
            sock = _context(tls, server=False).wrap_socket(sock, server_hostname=place[0])
    except (OSError, ValueError) as error:
        sock.close()
        raise HvError(f"{address}: {_reason(error)}", "does `pyhv migrate receive` wait there?") from None
    return Wire(sock)


def listen(address: str, tls: Tls | None = None) -> socket.socket:
    """A socket that waits at `address`."""
    kind, place = _parse(address, tls)
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else _family(place))
    try:
        if kind == "unix":
            _remove_dead(place)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        if kind == "unix":
            os.chmod(place, 0o600)
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{address}: {_reason(error)}", "name another address") from None
    return sock


def take(sock: socket.socket, tls: Tls | None = None, timeout: float | None = None) -> Wire:
    """The next connection."""
    try:
        peer = _accept(sock, timeout)
        if tls is not None:
            peer = _context(tls, server=True).wrap_socket(peer, server_side=True)       # closes it where that fails
    except OSError as error:
        raise HvError(f"nobody came: {_reason(error)}", "start the migration on the other side") from None
    return Wire(peer)


def _accept(sock: socket.socket, timeout: float | None) -> socket.socket:
    """Who has something to say. One that hangs up at once only looked whether somebody is here (_remove_dead)."""
    end = None if timeout is None else monotonic() + timeout
    while True:
        sock.settimeout(None if end is None else max(1e-3, end - monotonic()))
        peer, _ = sock.accept()
        try:
            peer.settimeout(PATIENCE)
            if peer.recv(1, socket.MSG_PEEK):
                if sock.family != socket.AF_UNIX:
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return peer
        except OSError:
            pass
        except BaseException:
            peer.close()
            raise
        peer.close()


def _parse(address: str, tls: Tls | None) -> tuple[str, Any]:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest and len(os.fsencode(rest)) < 108:
        return kind, rest
    host, colon, port = rest.rpartition(":")
    if kind not in ("tcp", "tls") or not colon or not host or not port.isascii() \
            or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r:.120} is no address", "unix:PATH, tcp:HOST:PORT or tls:HOST:PORT")
    if (kind == "tls") != (tls is not None):
        raise ConfigError(f"{address}: {'needs' if kind == 'tls' else 'has no use for'} --cert, --key and --ca",
                          "tls: with all three, tcp: with none")
    return kind, (host.strip("[]"), int(port))


def _family(place: tuple[str, int]) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConfigError(f"{place[0]}: {error.strerror}", "name a host that is known") from None


def _context(tls: Tls, *, server: bool) -> ssl.SSLContext:
    """Both sides show a certificate that the authority signed; TLS 1.3."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(tls[0], tls[1])
        context.load_verify_locations(tls[2])
    except OSError as error:
        raise ConfigError(f"--cert {tls[0]}, --key {tls[1]}, --ca {tls[2]}: {_reason(error)}",
                          "three files in PEM form") from None
    return context


def _remove_dead(path: str) -> None:
    """A socket that a killed process left; nothing else that is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
