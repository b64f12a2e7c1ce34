"""DNS over TCP, for answers too long for a datagram (RFC 7766): a thread for each of a few connections.

Driven by tests/root/test_network_dns.py.
"""

from __future__ import annotations

__all__ = ["Streams"]

import os
from _socket import AF_INET, SOCK_CLOEXEC, SOCK_STREAM, socket
from _thread import allocate_lock, start_new_thread

from hv.network import dns_wire as wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.network.dns import Server

CONNECTIONS_MOST = 16
OF_ONE_MOST = 4             # connections of one client: the others are for others
QUERIES_MOST = 64           # on one connection
PATIENCE = 5.0              # s that either side may take to say something
DNS_PORT = 53


class Streams:
    """The connections that are open."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._open: list[str] = []      # whose they are
        self._lock = allocate_lock()

    def accept(self, listener: socket) -> None:
        """One more; closed at once where there are too many."""
        try:
            fd, client = listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        connection = socket(fileno=fd)
        with self._lock:
            if len(self._open) >= CONNECTIONS_MOST or self._open.count(client[0]) >= OF_ONE_MOST:
                connection.close()
                return
            self._open.append(client[0])
        connection.settimeout(PATIENCE)
        try:
            start_new_thread(self._serve, (connection, client[0]))
        except RuntimeError:
            self._end(connection, client[0])

    def _serve(self, connection: socket, client: str) -> None:
        try:
            for _ in range(QUERIES_MOST):
                query = _message(connection)
                if query is None:
                    return
                said = self._server.reply(query, client)
                if said is None:
                    return
                if not isinstance(said, bytes):
                    said = _ask(query, *said)
                connection.sendall(len(said).to_bytes(2, "big") + said)
        except OSError:
            pass        # it has gone, or says nothing
        finally:
            self._end(connection, client)

    def _end(self, connection: socket, client: str) -> None:
        connection.close()
        with self._lock:
            self._open.remove(client)


def _message(connection: socket) -> bytes | None:
    head = _exactly(connection, 2)
    return _exactly(connection, int.from_bytes(head, "big")) if head else None


def _exactly(connection: socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return data


def _ask(query: bytes, question: wire.Question, servers: list[str]) -> bytes:
    """What the first server that answers says."""
    for server in servers:
        asker = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            asker.settimeout(PATIENCE)
            asker.connect((server, DNS_PORT))
            number = os.urandom(2)
            asker.sendall(len(query).to_bytes(2, "big") + number + query[2:])
            response = _message(asker)
            if response and wire.matches(response, int.from_bytes(number, "big"), query, question.end):
                return query[:2] + response[2:]
        except OSError:
            pass
        finally:
            asker.close()
    return wire.answer(query, question, [], wire.SERVFAIL)
