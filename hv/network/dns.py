"""The name server of one network: a process of its own, on the gateway's address.

    names of instances          answered from hv/network/dns_names.py
    other names with a dot      passed on to the host's name servers, or those that the instance was given
    other names without one     nobody outside knows them: NXDOMAIN, at once

It begins with a network's first member (hv/network/dns_start.py), which opened its sockets, so that nobody asks too
early; and ends, taking the network down, LINGER after the last one has left. It holds nothing but sockets: when it
dies, the next command that has to do with a network starts it again. Bounded: queries under way, connections, time for
each.

Driven by tests/root/test_network_dns.py.
"""

from __future__ import annotations

__all__ = ["LINGER", "Server", "main"]

import os
import sys
from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, socket
from select import EPOLLIN, epoll
from time import monotonic

from hv.linux.syscall import syscall
from hv.network import dns_wire as wire
from hv.network.dns_names import Names
from hv.network.dns_stream import Streams

UDP_FD, TCP_FD, LOCK_FD = 3, 4, 5
LINGER = 2.0                # s for which it, and the network, wait for another member
PATIENCE = 2.5              # s for one name server to answer
ATTEMPTS = 3                # name servers that are asked, one after the other
PENDING_MOST = 256          # queries passed on and not answered yet
OF_ONE_MOST = 64            # of these, queries of one client
_BATCH = 64                 # queries read in one go
_DATAGRAM = 65535
DNS_PORT = 53
# include/uapi/linux/inotify.h; arch/x86/entry/syscalls/syscall_64.tbl
_IN_DELETE, _IN_DELETE_SELF, _SYS_INOTIFY_INIT1, _SYS_INOTIFY_ADD_WATCH = 0x200, 0x400, 294, 254


class _Pending:
    """A query that was passed on."""

    __slots__ = ("client", "deadline", "identity", "query", "question", "servers", "socket")

    def __init__(self, client: tuple[str, int], query: bytes, question: wire.Question, servers: list[str]) -> None:
        self.client, self.query, self.question, self.servers = client, query, question, servers
        self.identity = 0
        self.deadline = 0.0
        self.socket: socket | None = None


class Server:
    """Serves on two sockets until `names` has no members. Closes nothing that it was given."""

    def __init__(self, udp: socket, tcp: socket, names: Names) -> None:
        self._udp, self._tcp, self.names = udp, tcp, names
        self._pending: dict[int, _Pending] = {}
        self._streams = Streams(self)
        self._poll = epoll()
        self._watch = -1

    # the loop ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until nobody is left."""
        self._udp.setblocking(False)
        self._tcp.setblocking(False)
        self._watch = self._watch_members()
        for fd in (self._udp.fileno(), self._tcp.fileno(), self._watch):
            self._poll.register(fd, EPOLLIN)
        alone = 0.0 if self.names.has_members() else monotonic()
        while not alone or monotonic() - alone < LINGER:
            for fd, _ in self._poll.poll(self._timeout(alone), 64):
                if fd == self._udp.fileno():
                    self._hear()
                elif fd == self._tcp.fileno():
                    self._streams.accept(self._tcp)
                elif fd == self._watch:
                    os.read(self._watch, 65536)
                else:
                    self._heard_back(fd)
            self._expire()
            if self.names.has_members():
                alone = 0.0
            elif not alone:
                alone = monotonic()

    def _watch_members(self) -> int:
        fd = syscall("inotify_init1", _SYS_INOTIFY_INIT1, os.O_NONBLOCK | os.O_CLOEXEC)
        folder = os.fsencode(f"{self.names.run}/on/{self.names.network}/leases")
        syscall("inotify_add_watch", _SYS_INOTIFY_ADD_WATCH, fd, folder, _IN_DELETE | _IN_DELETE_SELF, may=(2,))
        return fd

    def _timeout(self, alone: float) -> float:
        nearest = [pending.deadline for pending in self._pending.values()]
        if alone:
            nearest.append(alone + LINGER)
        return max(0.0, min(nearest) - monotonic()) + 0.001 if nearest else -1

    # queries -----------------------------------------------------------------------------------------

    def _hear(self) -> None:
        for _ in range(_BATCH):
            try:
                query, client = self._udp.recvfrom(_DATAGRAM)
            except OSError:
                return      # none left; or an answer of ours came back as undeliverable
            said = self.reply(query, client[0])
            if isinstance(said, bytes):
                self._say(said, client)
            elif said is not None:
                self._pass_on(_Pending(client, query, *said))

    def reply(self, query: bytes, client: str) -> bytes | tuple[wire.Question, list[str]] | None:
        """The answer; or what is to be asked of which name servers; None: no answer."""
        question = wire.parse(query)
        if question is None:
            return None
        if isinstance(question, int):
            return wire.error(query, question)
        networks, own = self.names.client(client)
        if question.kind_class == wire.IN:
            if (found := self.names.addresses(question.name, networks)) is not None:
                wanted = question.kind in (wire.A, wire.ANY_TYPE)
                return wire.answer(query, question, [(wire.A, data) for data in found] if wanted else [])
            if question.kind == wire.PTR and (address := self.names.is_reverse(question.name)) >= 0:
                name = self.names.name_of(".".join(map(str, address.to_bytes(4, "big"))), networks)
                if name:
                    return wire.answer(query, question, [(wire.PTR, wire.encode_name(name))])
        if "." not in question.name and question.name:
            return wire.answer(query, question, [], wire.NXDOMAIN)
        if self.names.internal and networks == [self.names.network]:
            return wire.answer(query, question, [], wire.NXDOMAIN)
        servers = (own or self.names.servers())[:ATTEMPTS]
        if not servers:
            return wire.answer(query, question, [], wire.SERVFAIL)
        return question, list(servers)

    def _say(self, message: bytes, client: tuple[str, int]) -> None:
        try:
            self._udp.sendto(message, client)
        except OSError:
            pass        # it is gone, or takes nothing: it asks again

    # passing on --------------------------------------------------------------------------------------

    def _pass_on(self, pending: _Pending) -> None:
        """To the next server that takes it; each time from another port, with another number."""
        own = sum(other.client[0] == pending.client[0] for other in self._pending.values())
        if len(self._pending) >= PENDING_MOST or own >= OF_ONE_MOST:
            self._say(wire.answer(pending.query, pending.question, [], wire.SERVFAIL), pending.client)
            return
        while pending.servers:
            server = pending.servers.pop(0)
            asker = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
            try:
                asker.connect((server, DNS_PORT))
                number = os.urandom(2)
                asker.send(number + pending.query[2:])
            except OSError:
                asker.close()
                continue
            pending.identity, pending.socket = int.from_bytes(number, "big"), asker
            pending.deadline = monotonic() + PATIENCE
            self._pending[asker.fileno()] = pending
            self._poll.register(asker.fileno(), EPOLLIN)
            return
        self._say(wire.answer(pending.query, pending.question, [], wire.SERVFAIL), pending.client)

    def _heard_back(self, fd: int) -> None:
        pending = self._pending.get(fd)
        if pending is None or pending.socket is None:
            return
        try:
            response = pending.socket.recv(_DATAGRAM)
        except BlockingIOError:
            return
        except OSError:
            self._drop(fd)              # nobody listens there
            self._pass_on(pending)
            return
        if wire.matches(response, pending.identity, pending.query, pending.question.end):
            self._drop(fd)
            self._say(pending.query[:2] + response[2:], pending.client)

    def _drop(self, fd: int) -> None:
        pending = self._pending.pop(fd)
        if pending.socket is not None:
            self._poll.unregister(fd)
            pending.socket.close()
            pending.socket = None

    def _expire(self) -> None:
        now = monotonic()
        for fd, pending in list(self._pending.items()):
            if pending.deadline <= now:
                self._drop(fd)
                self._pass_on(pending)

    def close(self) -> None:
        """Its own descriptors."""
        for fd in list(self._pending):
            self._drop(fd)
        self._poll.close()
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1


def main() -> None:
    """`... ROOT RUN NETWORK RESOLV.CONF`, with the sockets at 3 and 4, the lock at 5."""
    from hv.errors import HvError
    from hv.network.dns_start import leave
    from hv.network.store import Store

    root, run, name, resolver = sys.argv[1:5]
    store = Store(root, run)
    udp, tcp = socket(fileno=UDP_FD), socket(fileno=TCP_FD)
    try:
        network = store.network(name)
        names = Names(run, name, network.internal, resolver)
        while True:
            server = Server(udp, tcp, names)
            try:
                server.run()
            finally:
                server.close()
            if leave(store, network, names, LOCK_FD):
                return
    except (HvError, OSError):
        return          # the next command that has to do with the network starts another one
