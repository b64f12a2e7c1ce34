"""The name server of a network, asked by dnspython: names, passing on, failures, bounds."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rrset
import pytest
from framework.sites import Site, a_site  # noqa: F401 (the fixture `site`)

from hv.linux.netns import inside
from hv.network.dns import OF_ONE_MOST, PENDING_MOST, Server
from hv.network.dns_names import Names

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


class Upstream:
    """A name server of the host's, at 127.0.0.x port 53: knows one name, says nothing to some, lies about others."""

    def __init__(self, address: str) -> None:
        self.seen: list[tuple[str, int, int]] = []      # name, number, port that was asked from
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((address, 53))
        self.tcp = socket.create_server((address, 53))
        for sock in (self.udp, self.tcp):
            sock.settimeout(0.1)
        self.going = True
        self.threads = [threading.Thread(target=run) for run in (self._udp, self._tcp)]
        for thread in self.threads:
            thread.start()

    def _answer(self, data: bytes, long: bool) -> list[bytes]:
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text().rstrip(".").lower()
        if name == "silent.example":
            return []
        response = dns.message.make_response(query)
        if name == "known.example":
            response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "198.51.100.7"))
        elif name == "long.example":
            if long:
                for number in range(200):
                    response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT",
                                                               f'"{number:060}"'))
            else:
                response.flags |= dns.flags.TC
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        said = response.to_wire(max_size=65535)
        if name == "forged.example":        # wrong number, wrong question; then the true one
            other = dns.message.make_response(dns.message.make_query("else.example", "A", id=query.id))
            return [bytes((data[0] ^ 1,)) + said[1:], other.to_wire(), b"", said]
        return [said]

    def _udp(self) -> None:
        while self.going:
            try:
                data, sender = self.udp.recvfrom(4096)
            except OSError:
                continue
            query = dns.message.from_wire(data)
            self.seen.append((query.question[0].name.to_text(), query.id, sender[1]))
            for answer in self._answer(data, False):
                self.udp.sendto(answer, sender)

    def _tcp(self) -> None:
        while self.going:
            try:
                connection, _ = self.tcp.accept()
            except OSError:
                continue
            with connection:
                size = int.from_bytes(connection.recv(2), "big")
                for answer in self._answer(connection.recv(size), True):
                    connection.sendall(len(answer).to_bytes(2, "big") + answer)

    def close(self) -> None:
        self.going = False
        for thread in self.threads:
            thread.join()
        self.udp.close()
        self.tcp.close()


class Asked:
    """A Server in a thread of this process, on addresses of the site's loopback interface."""

    def __init__(self, site: Site, internal: bool, resolver: str) -> None:
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.port = self.udp.getsockname()[1]
        self.tcp = socket.create_server(("127.0.0.1", self.port))
        (site.folder / "resolv.conf").write_text(resolver)
        self.names = Names(str(site.folder / "run"), "pyhv", internal, str(site.folder / "resolv.conf"))
        self.server = Server(self.udp, self.tcp, self.names)
        self.thread = threading.Thread(target=self._run, args=(site,))
        self.thread.start()

    def _run(self, site: Site) -> None:
        with inside(site.host.netns.fd):
            self.server.run()

    def ask(self, name: str, kind: str = "A", timeout: float = 5, stream: bool = False) -> dns.message.Message:
        return (dns.query.tcp if stream else dns.query.udp)(dns.message.make_query(name, kind), "127.0.0.1",
                                                            port=self.port, timeout=timeout)

    def close(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server.close()
        self.udp.close()
        self.tcp.close()


@pytest.fixture
def upstream(site: Site) -> Iterator[Upstream]:
    made = Upstream("127.0.0.53")
    yield made
    made.close()


def asked(site: Site, resolver: str, internal: bool = False) -> Asked:
    site.join("web")
    return Asked(site, internal, resolver)


def test_other_names_are_passed_on(site: Site, upstream: Upstream) -> None:
    server = asked(site, "nameserver 127.0.0.53\n")
    try:
        assert server.ask("web").answer[0][0].address == site.address("web")
        assert server.ask("WeB", stream=True).answer[0].name.to_text() == "WeB.", "the case of the question"
        assert not server.ask("web", "AAAA").answer and server.ask("web", "AAAA").rcode() == dns.rcode.NOERROR
        reverse = ".".join(reversed(site.address("web").split("."))) + ".in-addr.arpa"
        assert server.ask(reverse, "PTR").answer[0][0].target.to_text() == "web."
        assert server.ask("unknown").rcode() == dns.rcode.NXDOMAIN and not upstream.seen, "nobody outside is asked"
        for _ in range(4):
            assert server.ask("known.example").answer[0][0].address == "198.51.100.7"
        assert len({entry[1] for entry in upstream.seen}) > 1 and len({entry[2] for entry in upstream.seen}) > 1
        assert server.ask("other.example").rcode() == dns.rcode.NXDOMAIN
        assert server.ask("forged.example").rcode() == dns.rcode.NXDOMAIN
        short = server.ask("long.example", "TXT")
        assert short.flags & dns.flags.TC and not short.answer
        assert len(server.ask("long.example", "TXT", stream=True).answer[0]) == 200
        # what is no query, or none of the usual kind
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.settimeout(2)
            raw.connect(("127.0.0.1", server.port))
            for data, code in ((b"\1\2\0\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", 1), (b"\1\2\x28\0" + bytes(8), 4),
                               (b"\1\2\0\0\0\2" + bytes(6), 1)):
                raw.send(data)
                answer = raw.recv(512)
                assert answer[:2] == b"\1\2" and answer[3] & 15 == code
            for data in (b"", b"x", b"\1\2\x80\0" + bytes(20)):
                raw.send(data)
        assert server.ask("web").answer
        site.networks.detach("web" * 8)
    finally:
        site.networks.detach("web" * 8)
        server.close()


def test_a_name_server_that_says_nothing_is_not_waited_for_long(site: Site, upstream: Upstream) -> None:
    second = Upstream("127.0.0.54")
    server = asked(site, "nameserver 127.0.0.52\nnameserver 127.0.0.53\nnameserver 127.0.0.54\n")
    try:
        start = time.monotonic()
        assert server.ask("known.example").answer, "nobody listens at the first one"
        assert time.monotonic() - start < 1
        start = time.monotonic()
        assert server.ask("silent.example", timeout=9).rcode() == dns.rcode.SERVFAIL
        assert 4 < time.monotonic() - start < 7 and second.seen
        # many that wait keep nobody else waiting, and are not many more than can be
        clients = [f"127.0.1.{number}" for number in range(1, PENDING_MOST // OF_ONE_MOST + 2)]
        for client in clients:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
                raw.bind((client, 0))
                raw.connect(("127.0.0.1", server.port))
                for number in range(OF_ONE_MOST + 20):
                    raw.send(dns.message.make_query("silent.example", "A", id=number).to_wire())
                assert server.ask("web").answer
                raw.settimeout(2)
                assert dns.message.from_wire(raw.recv(999)).rcode() == dns.rcode.SERVFAIL
            if client == clients[0]:
                assert server.ask("known.example").answer, "one client takes no other's place"
        assert len(server.server._pending) == PENDING_MOST
        (site.folder / "resolv.conf").write_text("# none\n")
        assert server.ask("known.example").rcode() == dns.rcode.SERVFAIL, "the file as it is now"
    finally:
        site.networks.detach("web" * 8)
        server.close()
        second.close()


def test_an_internal_network_asks_nobody(site: Site, upstream: Upstream) -> None:
    server = asked(site, "nameserver 127.0.0.53\n", internal=True)
    try:
        assert server.ask("known.example").rcode() == dns.rcode.NXDOMAIN and not upstream.seen
        assert server.ask("web").answer
    finally:
        site.networks.detach("web" * 8)
        server.close()


def test_connections_are_bounded(site: Site) -> None:
    server = asked(site, "")
    try:
        mine = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(16)]
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", server.port), 2, ("127.0.1.9", 0)) as other:
            query = dns.message.make_query("web", "A").to_wire()
            other.sendall(len(query).to_bytes(2, "big") + query)
            assert other.recv(2), "one client takes no other's place"
        for connection in mine:
            connection.close()
        time.sleep(0.3)
        held = [socket.create_connection(("127.0.0.1", server.port), 2, (f"127.0.1.{number // 4}", 0))
                for number in range(4, 24)]
        time.sleep(0.3)
        closed = 0
        for connection in held:
            connection.settimeout(0.05)
            try:
                closed += connection.recv(1) == b""
            except TimeoutError:
                pass
            connection.close()
        assert closed == 4
        time.sleep(0.3)
        assert server.ask("web", stream=True).answer
    finally:
        site.networks.detach("web" * 8)
        server.close()


def test_own_name_servers_and_none_at_all(site: Site) -> None:
    assert site.join("own", dns=["192.0.2.53"], search=["corp.example"]).resolv_conf == \
        f"search corp.example\nnameserver {site.networks.inspect('pyhv')['gateway']}\noptions ndots:0\n"
    names = Names(str(site.folder / "run"), "pyhv", False)
    assert names.client(site.address("own")) == (["pyhv"], ["192.0.2.53"])
    site.networks.create("plain", dns=False)
    told = site.join("quiet", "plain", dns=["192.0.2.54"])
    assert told.resolv_conf == "nameserver 192.0.2.54\n" and len(site.servers()) == 1
