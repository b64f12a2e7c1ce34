"""Registries that lie, stall, loop and break off: one line each, within its time, and a store that is whole."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.images import Built, digest, tar
from framework.registry import Request, Server, serving

from hv.errors import HvError, ImageError, RegistryError
from hv.image import registry_auth, registry_http, registry_pool
from hv.image.auth import Login
from hv.image.pull import pull
from hv.image.reference import Reference
from hv.image.registry_http import Session
from hv.image.registry_reach import Access
from hv.image.store import Store

IMAGE = Built([tar({"a": b"a"}), tar({"b": os.urandom(300_000)})], compression="none")
BLOB = IMAGE.blobs[1]
GOOD = serving({"x:1": IMAGE})
OCI = "application/vnd.oci.image."
Answer = Callable[[Request], Any]


@pytest.fixture(autouse=True)
def hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setattr(Session, "first_wait", 0.01)
    monkeypatch.setattr(registry_pool, "_READ_SECONDS", 0.5)
    monkeypatch.setattr(registry_http, "_WINDOW", 0.5)
    monkeypatch.setattr(registry_http, "_WHOLE_SECONDS", 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "images"))


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def but(part: str, bad: Answer, times: int = 1 << 30) -> Answer:
    """A good registry but for the first `times` requests whose address has `part` in it."""
    left = [times]

    def answer(request: Request) -> None:
        if part in request.path and left[0] > 0:
            left[0] -= 1
            bad(request)
        else:
            GOOD(request)

    return answer


def get(store: Store, server: Server, **access: Any) -> str:
    return pull(store, Reference.parse(f"{server.host}/x:1"), Access(**access)).id


def refused(store: Store, server: Server, words: str, **access: Any) -> HvError:
    began = time.monotonic()
    with pytest.raises(HvError, match=words) as caught:
        get(store, server, **access)
    assert time.monotonic() - began < 20, "every wait is cut short here; uncut it would take longer"
    assert "\n" not in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 700
    assert store.names() == {}
    assert os.listdir(f"{store.root}/tmp") == []
    for path in Path(store.root, "blobs/sha256").iterdir():
        assert digest(path.read_bytes())[7:] == path.name
    return caught.value


def manifest(**changes: Any) -> Answer:
    raw = json.dumps(json.loads(IMAGE.manifest) | changes).encode()
    return lambda request: request.reply(200, raw, {"Content-Type": f"{OCI}manifest.v1+json"})


def test_the_good_one_is_good(store: Store, serve: Any) -> None:
    assert get(store, serve(GOOD)) == digest(IMAGE.config)


def test_a_blob_that_is_another(store: Store, serve: Any) -> None:
    other = bytes(len(BLOB))
    refused(store, serve(but(digest(BLOB), lambda request: request.reply(200, other))),
            f"its content has the digest {digest(other)}")
    assert os.listdir(f"{store.root}/partial") == [], "of no use to a later pull"


def test_manifests_that_are_others(store: Store, serve: Any) -> None:
    exact = Reference.parse(f"{serve(but('/manifests/', manifest(annotations={}))).host}/x@{digest(IMAGE.manifest)}")
    with pytest.raises(RegistryError, match=r"its digest is sha256:.*, asked for sha256:"):
        pull(store, exact)
    refused(store, serve(but("/manifests/", lambda request: request.reply(
        200, IMAGE.manifest, {"Docker-Content-Digest": digest(b"")}))), "announced as sha256:e3b0c442")


@pytest.mark.parametrize("size, words", [
    (len(BLOB) - 1, "is announced with"), (len(BLOB) + 1, "is announced with"), (1 << 60, r"needs \d+ MiB"),
    (-1, r"layers\[1\].size"), ("9", r"layers\[1\].size")])
def test_sizes_that_are_wrong(store: Store, serve: Any, size: Any, words: str) -> None:
    layers = json.loads(IMAGE.manifest)["layers"]
    layers[1]["size"] = size
    refused(store, serve(but("/manifests/", manifest(layers=layers))), words)


@pytest.mark.parametrize("changes, words", [
    ({"config": None}, "config"), ({"schemaVersion": 1}, "schemaVersion"), ({"layers": [{}]}, r"layers\[0\].digest"),
    ({"mediaType": "text/html"}, "mediaType"), ({"manifests": []}, "manifests"), ({"layers": []}, "diff_ids"),
    ({"config": json.loads(IMAGE.manifest)["config"] | {"mediaType": "application/vnd.cncf.helm.config.v1+json"}},
     "is not a container image's")])
def test_manifests_that_are_none(store: Store, serve: Any, changes: dict[str, Any], words: str) -> None:
    refused(store, serve(but("/manifests/", manifest(**changes))), words)


def test_an_index_within_an_index(store: Store, serve: Any) -> None:
    inner = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    outer = json.dumps({"schemaVersion": 2, "manifests": [{
        "mediaType": f"{OCI}index.v1+json", "digest": digest(inner), "size": len(inner),
        "platform": {"os": "linux", "architecture": "amd64"}}]}).encode()
    refused(store, serve(lambda request: request.reply(200, outer if request.path.endswith("/1") else inner)),
            "an index within an index")


def flood(request: Request) -> None:
    request.start(200, {"Transfer-Encoding": "chunked"})
    for _ in range(300):
        request.write(b"10000\r\n" + bytes(65536) + b"\r\n")
    request.hang_up()


@pytest.mark.parametrize("bad", [lambda request: request.reply(200, bytes(5 << 20)), flood], ids=["length", "chunked"])
def test_huge_manifests(store: Store, serve: Any, bad: Answer) -> None:
    refused(store, serve(but("/manifests/", bad)), "is larger than 4194304 bytes")


def test_a_blob_without_end(store: Store, serve: Any) -> None:
    refused(store, serve(but(digest(BLOB), flood)), "is longer than the 3072.. bytes that the manifest says")
    assert os.listdir(f"{store.root}/partial") == []


def test_endless_redirects(store: Store, serve: Any) -> None:
    server = serve(lambda request: request.reply(307, headers={"Location": f"{request.path}x"}))
    refused(store, server, "redirects more than 5 times")
    assert len(server.requests) == 6


@pytest.mark.parametrize("location", ["", "ftp://x/", "file:///etc/passwd", "http://user:pass@127.0.0.1/", "http://[::1",
                                      "http://127.0.0.1:99999/", "http://x/" + "y" * 20_000])
def test_redirects_to_nowhere(store: Store, serve: Any, location: str) -> None:
    refused(store, serve(lambda request: request.reply(302, headers={"Location": location})),
            "redirects to .* which is no http")


def test_never_from_https_to_http() -> None:
    session = Session("r.io", Access())
    with pytest.raises(RegistryError, match=r"from https to http \(r\.io\)"):
        session.address("https://r.io/v2/", "http://r.io/v2/")
    assert session.address("https://r.io/v2/a", "/v2/b") == "https://r.io/v2/b"
    assert session.address("http://127.0.0.1/v2/a", "https://r.io/b") == "https://r.io/b"


def test_a_login_goes_to_no_other_host(store: Store, serve: Any) -> None:
    target = serve(GOOD)

    def answer(request: Request) -> None:
        if not request.headers.get("Authorization"):
            request.reply(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        elif "/blobs/" in request.path:
            request.reply(307, headers={"Location": f"http://{target.host}{request.path}"})
        else:
            GOOD(request)

    server = serve(answer)
    assert get(store, server, login=Login("u", "p")) == digest(IMAGE.config)
    assert len(target.headers) == 3 and not any("Authorization" in headers for headers in target.headers)
    # nor does a challenge of the other host get it
    for challenge in ('Basic realm="x"', 'Bearer realm="http://{}/token"'):
        jealous = serve(lambda request, challenge=challenge: request.reply(
            401, headers={"WWW-Authenticate": challenge.format(request.headers["Host"])}))
        target = jealous
        trusting = serve(but("/blobs/", lambda request, host=jealous.host: request.reply(
            307, headers={"Location": f"http://{host}{request.path}"})))
        for server in (serve(answer), trusting):        # one that has had the login, one that never asked
            refused(Store(f"{store.root}2"), server, "access denied", login=Login("u", "p"))
        assert not any("Authorization" in headers for headers in jealous.headers)
        assert not any("/token" in path for _, path in jealous.requests)


def test_refused_for_ever(store: Store, serve: Any) -> None:
    def answer(request: Request) -> None:
        if request.path.startswith("/token"):
            return request.reply(200, b'{"token": "t"}')
        return request.reply(401, headers={
            "WWW-Authenticate": f'Bearer realm="http://{request.headers["Host"]}/token",service="s"'})

    server = serve(answer)
    refused(store, server, "access denied")
    assert len(server.requests) <= 6
    refused(store, serve(lambda request: request.reply(401)), "a login is asked for")
    basic = serve(lambda request: request.reply(401, headers={"WWW-Authenticate": "Basic"}))
    refused(store, basic, "a login is asked for", login=Login("u", "p"))
    assert len(basic.requests) == 2


@pytest.mark.parametrize("reply, words", [
    (lambda request: request.reply(302, headers={"Location": "/token"}), "HTTP status 302"),
    (lambda request: request.reply(200, bytes(300_000)), "is larger than"),
    (lambda request: request.reply(500), "HTTP status 500"), (lambda request: request.reply(403), "access denied"),
    (flood, "is larger than")])
def test_token_servers_that_misbehave(store: Store, serve: Any, reply: Answer, words: str) -> None:
    def answer(request: Request) -> None:
        if request.path.startswith("/token"):
            return reply(request)
        return request.reply(401, headers={
            "WWW-Authenticate": f'Bearer realm="http://{request.headers["Host"]}/token",service="s"'})

    refused(store, serve(answer), f"token server.*{words}")


def test_no_escape_sequence_reaches_the_terminal(store: Store, serve: Any) -> None:
    body = json.dumps({"errors": [{"code": "X", "message": "\x1b[2J\r\nroot#" + "y" * 5000}]}).encode()
    refused(store, serve(lambda request: request.reply(404, body)), r"not there \(X:  \[2J  root#yyy")
    for odd in (b"[]", b'{"errors": 7}', b'{"errors": [7]}', b"\xff" * 100_000, b'{"errors": []}'):
        refused(store, serve(lambda request, odd=odd: request.reply(403, odd)), "access denied")


def drip(data: bytes, pause: float) -> Answer:
    def answer(request: Request) -> None:
        for n in range(len(data)):
            request.write(data[n:n + 1])
            time.sleep(pause)

    return answer


def test_stalls(store: Store, serve: Any) -> None:
    def half(request: Request) -> None:
        request.start(200, {"Content-Length": str(len(BLOB))})
        request.write(BLOB[:1000])
        time.sleep(2)

    refused(store, serve(but(digest(BLOB), half)), "broke off: no answer in time")

    def slow(request: Request) -> None:
        request.start(200, {"Content-Length": str(len(BLOB))})
        drip(BLOB[:40], 0.1)(request)

    refused(store, serve(but(digest(BLOB), slow)), r"the answer stalls: \d+ bytes in \d+ seconds")


def test_heads_and_small_bodies_that_never_end(store: Store, serve: Any) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100
    refused(store, serve(but("/manifests/", drip(head, 0.05))), "registry 127")

    def body(request: Request) -> None:
        request.start(200, {"Content-Length": "4000"})
        drip(bytes(4000), 0.0005)(request)

    refused(store, serve(but("/manifests/", body)), "registry 127")


@pytest.mark.parametrize("garbage", [
    b"hello\r\n\r\n", b"HTTP/1.1 2 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello"])
def test_what_is_no_http(store: Store, serve: Any, garbage: bytes) -> None:
    def answer(request: Request) -> None:
        request.write(garbage)
        request.hang_up()

    refused(store, serve(but("/manifests/", answer)), ".")


def test_breaks_are_resumed_by_range(store: Store, serve: Any) -> None:
    def broken(request: Request) -> None:
        begin = int(request.headers.get("Range", "bytes=0-")[6:-1])
        request.start(206 if begin else 200, {"Content-Length": str(len(BLOB) - begin)} | (
            {"Content-Range": f"bytes {begin}-{len(BLOB) - 1}/{len(BLOB)}"} if begin else {}))
        request.write(BLOB[begin:begin + 70_000])
        request.handler.connection.shutdown(socket.SHUT_RDWR)
        request.hang_up()

    server = serve(but(digest(BLOB), broken, times=3))
    assert get(store, server) == digest(IMAGE.config)
    assert [headers["Range"] for headers in server.headers if "Range" in headers] == [
        "bytes=70000-", "bytes=140000-", "bytes=210000-"]
    endless = serve(but(digest(BLOB), lambda request: request.hang_up()))
    refused(Store(f"{store.root}2"), endless, "registry 127")
    assert len([path for _, path in endless.requests if digest(BLOB) in path]) == 5


@pytest.mark.parametrize("reply, words", [
    (lambda request: request.reply(206, BLOB[5:], {"Content-Range": f"bytes 5-{len(BLOB) - 1}/{len(BLOB)}"}),
     "sends another part"), (lambda request: request.reply(206, BLOB[1000:]), "sends another part"),
    (lambda request: request.reply(206, BLOB, {"Content-Range": f"bytes 1000-{len(BLOB) - 1}/{len(BLOB)}"}),
     "is announced with")])
def test_parts_that_were_not_asked_for(store: Store, serve: Any, reply: Answer, words: str) -> None:
    Path(store.partial(digest(BLOB))).write_bytes(BLOB[:1000])
    refused(store, serve(but(digest(BLOB), reply)), words)


@pytest.mark.parametrize("reply", [lambda request: request.reply(200, BLOB), lambda request: request.reply(416)
                                   if "Range" in request.headers else request.reply(200, BLOB)], ids=["whole", "416"])
def test_registries_that_cannot_resume(store: Store, serve: Any, reply: Answer) -> None:
    Path(store.partial(digest(BLOB))).write_bytes(BLOB[:1000])
    assert get(store, serve(but(digest(BLOB), reply))) == digest(IMAGE.config)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_busy_for_a_while(store: Store, serve: Any, status: int) -> None:
    server = serve(but("/manifests/", lambda request: request.reply(status, headers={"Retry-After": "1"}), times=1))
    began = time.monotonic()
    assert get(store, server) == digest(IMAGE.config)
    assert time.monotonic() - began >= 1, "it asked for a second"


def test_busy_for_ever(store: Store, serve: Any) -> None:
    server = serve(but("/manifests/", lambda request: request.reply(503)))
    assert isinstance(refused(store, server, "HTTP status 503"), RegistryError)
    assert len(server.requests) == 5
    server = serve(but("/manifests/", lambda request: request.reply(429, headers={"Retry-After": "86400"})))
    assert refused(store, server, "too many requests").hint == "it asks to wait 86400 seconds"
    assert len(server.requests) == 1


def test_one_failure_ends_the_others_soon(store: Store, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_pool, "_READ_SECONDS", 30.0)
    done = threading.Event()

    def answer(request: Request) -> None:
        if digest(BLOB) in request.path:
            request.start(200, {"Content-Length": str(len(BLOB))})
            request.write(BLOB[:5000])
            done.wait(20)
        elif digest(IMAGE.blobs[0]) in request.path:
            time.sleep(0.3)
            request.reply(200, bytes(len(IMAGE.blobs[0])))
        else:
            GOOD(request)

    try:
        refused(store, serve(answer), "its content has the digest")
        assert os.path.getsize(store.partial(digest(BLOB))) == 5000, "what came is kept"
    finally:
        done.set()


def test_the_bounds_are_what_is_promised() -> None:
    assert registry_auth._HEADER_LIMIT <= 8 << 10 and registry_http._REDIRECTS == 5
    assert issubclass(RegistryError, ImageError)
