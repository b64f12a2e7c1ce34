"""Uploads to registries that lie or break off; a proxy; dates in Retry-After."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from framework.images import Built, busybox_image, digest, tar
from framework.registry import Request, Server

from hv.errors import HvError, RegistryError
from hv.image import registry_http
from hv.image.auth import Login
from hv.image.pull import pull
from hv.image.push import push
from hv.image.reference import Reference
from hv.image.registry_http import Session
from hv.image.registry_reach import Access
from hv.image.store import Store

LAYER = tar({"a": b"a" * 5000})


@pytest.fixture(autouse=True)
def hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setattr(Session, "first_wait", 0.01)


class Taking:
    """A registry that takes uploads; `bad` may answer a request in its place."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.bad: Any = lambda request: False
        self.server = Server(self.answer)

    def answer(self, request: Request) -> None:
        if self.bad(request):
            return
        if request.method == "HEAD":
            request.reply(200 if request.path.rpartition("/")[2] in self.kept else 404)
        elif request.method == "POST":
            request.reply(202, headers={"Location": f"{request.path.partition('?')[0]}1?state=x"})
        elif "/manifests/" in request.path:
            self.kept[digest(request.body)] = request.body
            request.reply(201)
        else:
            assert request.path.endswith(f"?state=x&digest={digest(request.body)}"), request.path
            self.kept[digest(request.body)] = request.body
            request.reply(201)

    def to(self) -> Reference:
        return Reference.parse(f"{self.server.host}/x:1")


@pytest.fixture
def taking() -> Iterator[Taking]:
    made = Taking()
    yield made
    made.server.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "images"))
    busybox_image(made, "it:1", layers=[LAYER])
    return made


def test_all_of_it_arrives(store: Store, taking: Taking) -> None:
    image = store.resolve("it:1")
    assert push(store, "it:1", taking.to()) == image.digest
    for descriptor in (image.manifest.config, *image.manifest.layers):
        assert taking.kept[descriptor.digest] == Path(store.blob_path(descriptor.digest)).read_bytes()
    assert taking.kept[image.digest] == image.manifest.raw


def test_an_upload_that_breaks_off_begins_anew(store: Store, taking: Taking) -> None:
    broken: list[str] = []

    def bad(request: Request) -> bool:
        if request.method == "PUT" and digest(LAYER) in request.path and len(broken) < 2:
            broken.append(request.path)
            if len(broken) == 1:
                request.hang_up()
            else:
                request.reply(503)
            return True
        return False

    taking.bad = bad
    push(store, "it:1", taking.to())
    assert digest(LAYER) in taking.kept and len(broken) == 2
    taking.kept.clear()
    taking.bad = lambda request: request.method == "PUT" and not request.hang_up()
    with pytest.raises(RegistryError, match="registry 127"):
        push(store, "it:1", taking.to())


def test_a_token_that_runs_out_during_an_upload(store: Store, taking: Taking) -> None:
    tokens: list[str] = []

    def bad(request: Request) -> bool:
        if request.path.startswith("/token"):
            tokens.append(f"t{len(tokens)}")
            request.reply(200, b'{"token": "%s"}' % tokens[-1].encode())
        elif request.headers.get("Authorization") != f"Bearer {tokens[-1] if tokens else ''}" or (
                request.method == "PUT" and len(tokens) == 1):
            request.reply(401, headers={"WWW-Authenticate": f'Bearer realm="http://{taking.server.host}/token"'})
        else:
            return False
        return True

    taking.bad = bad
    began = time.monotonic()
    push(store, "it:1", taking.to())
    assert digest(LAYER) in taking.kept and len(tokens) >= 2
    assert time.monotonic() - began < 20, "no wait for an answer to half an upload"


@pytest.mark.parametrize("location", ["", "ftp://x/", "http://u:p@127.0.0.1/", "http://[::1"])
def test_uploads_go_nowhere_odd(store: Store, taking: Taking, location: str) -> None:
    taking.bad = lambda request: request.method == "POST" and not request.reply(202, headers={"Location": location})
    with pytest.raises(HvError, match=r"redirects to|upload"):
        push(store, "it:1", taking.to())
    assert taking.kept == {}


def test_an_upload_elsewhere_gets_no_login(store: Store, taking: Taking) -> None:
    other = Taking()
    try:
        taking.bad = lambda request: (request.method == "POST" and not request.reply(
            202, headers={"Location": f"http://{other.server.host}/up?state=x"})) or (
            not request.headers.get("Authorization") and not request.reply(401, headers={"WWW-Authenticate": "Basic"}))
        push(store, "it:1", taking.to(), Access(login=Login("u", "p")))
        assert digest(LAYER) in other.kept
        assert not any("Authorization" in headers for headers in other.server.headers)
    finally:
        other.server.close()


def test_a_manifest_kept_as_another(store: Store, taking: Taking) -> None:
    taking.bad = lambda request: "/manifests/" in request.path and not request.reply(
        201, headers={"Docker-Content-Digest": digest(b"")})
    with pytest.raises(RegistryError, match="is kept as 'sha256:e3b0c442"):
        push(store, "it:1", taking.to())


def test_a_damaged_blob_is_not_pushed(store: Store, taking: Taking) -> None:
    Path(store.blob_path(digest(LAYER))).write_bytes(b"short")
    with pytest.raises(HvError, match=f"blob {digest(LAYER)} is missing") as caught:
        push(store, "it:1", taking.to())
    assert "fsck" in caught.value.hint


def test_an_image_of_one_layer_and_none(tmp_path: Path, taking: Taking) -> None:
    store = Store(str(tmp_path / "other"))
    built = Built([], names=["none:1"])
    with store.lock(shared=True):
        store.put_bytes(built.config)
        store.tag("none:1", store.put_bytes(built.manifest, "application/vnd.oci.image.manifest.v1+json"))
    assert push(store, "none:1", taking.to()) == digest(built.manifest)


def test_no_proxy_for_this_machine(store: Store, taking: Taking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    push(store, "it:1", taking.to())


def test_a_proxy_is_asked_for_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Server(lambda request: request.reply(403))
    try:
        monkeypatch.setenv("https_proxy", f"http://{proxy.host}")
        with pytest.raises(RegistryError, match=r"registry r\.invalid: .*403"):
            pull(Store(str(tmp_path / "x")), Reference.parse("r.invalid/x:1"))
        assert proxy.requests == [("CONNECT", "r.invalid:443")]
        monkeypatch.setenv("no_proxy", "r.invalid")
        with pytest.raises(RegistryError, match=r"no such host"):
            pull(Store(str(tmp_path / "x")), Reference.parse("r.invalid/x:1"))
        assert len(proxy.requests) == 1
    finally:
        proxy.close()


@pytest.mark.parametrize("text, low, high", [
    ("7", 7, 7), ("", 0, 0), ("-7", 0, 0), ("soon", 0, 0), ("9" * 400, 999_999_999, 999_999_999), ("\uff11", 0, 0),
    (formatdate(0, usegmt=True), 0, 0), ("Mon, 99 Foo 2026 00:00:00 GMT", 0, 0)])
def test_retry_after(text: str, low: float, high: float) -> None:
    assert low <= registry_http._retry_after(text) <= high


def test_retry_after_a_date() -> None:
    assert 50 < registry_http._retry_after(formatdate(time.time() + 60, usegmt=True)) < 61
