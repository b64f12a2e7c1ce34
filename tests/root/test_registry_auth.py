"""Registries that want to know who we are, and whom we trust: htpasswd, signed tokens, TLS, client certificates."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.images import Built, digest, tar
from framework.registry import (
    PASSWORD,
    SERVICE,
    USER,
    Authority,
    RealRegistry,
    TokenServer,
    closing,
    has,
    htpasswd,
    skopeo,
)

from hv.errors import ConfigError, RegistryError
from hv.image.auth import Login, Logins
from hv.image.pull import pull
from hv.image.push import push
from hv.image.reference import Reference
from hv.image.registry import check_login
from hv.image.registry_http import Session
from hv.image.registry_reach import Access
from hv.image.store import Store

pytestmark = pytest.mark.skipif(not has("docker-registry", "skopeo", "openssl"),
                                reason="no docker-registry, skopeo or openssl (Debian)")
IMAGE = Built([tar({"a": b"a"}), tar({"b": os.urandom(100_000)})], compression="gzip")
CREDS = f"--dest-creds={USER}:{PASSWORD}"
GOOD = Access(login=Login(USER, PASSWORD))


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setattr(Session, "first_wait", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "images"))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    folder = tmp_path_factory.mktemp("htpasswd")
    yield from closing(RealRegistry(folder, htpasswd(folder)))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    yield from closing(TokenServer(tmp_path_factory.mktemp("tokens")))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[RealRegistry]:
    yield from closing(RealRegistry(tmp_path_factory.mktemp("signed"), tokens.auth))


def test_basic(locked: RealRegistry, store: Store) -> None:
    name = Reference.parse(locked.push("secret:1", IMAGE, CREDS))
    with pytest.raises(RegistryError, match="a login is asked for") as caught:
        pull(store, name)
    assert (caught.value.status, caught.value.hint) == (401, f"`pyhv login {locked.host}`")
    with pytest.raises(RegistryError, match="manifest secret:1: a login is asked for") as caught:
        pull(store, name, Access(login=Login(USER, "wrong")))
    assert "another account" in caught.value.hint
    assert pull(store, name, GOOD).id == digest(IMAGE.config)
    with pytest.raises(RegistryError, match="login is asked for"):
        push(store, str(name), Reference.parse(f"{locked.host}/secret:2"))
    push(store, str(name), Reference.parse(f"{locked.host}/elsewhere/secret:2"), GOOD)


def test_logins_are_shared_with_skopeo_and_podman(locked: RealRegistry, store: Store, tmp_path: Path) -> None:
    name = Reference.parse(locked.push("shared:1", IMAGE, CREDS))
    with pytest.raises(RegistryError):
        check_login(locked.host, Access(login=Login(USER, "wrong")))
    check_login(locked.host, GOOD)
    assert Logins().save(locked.host, Login(USER, PASSWORD)) == str(tmp_path / "auth.json")
    assert (tmp_path / "auth.json").stat().st_mode & 0o777 == 0o600
    skopeo("inspect", "--tls-verify=false", f"docker://{name}")
    assert pull(store, name).id == digest(IMAGE.config)
    assert Logins().remove(locked.host)
    assert not Logins().remove(locked.host)
    with pytest.raises(RegistryError):
        pull(store, name)
    skopeo("login", "--tls-verify=false", "-u", USER, "-p", PASSWORD, locked.host)
    assert pull(store, name).id == digest(IMAGE.config)


def test_a_credential_helper(locked: RealRegistry, store: Store, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    name = Reference.parse(locked.push("helped:1", IMAGE, CREDS))
    helper = tmp_path / "bin" / "docker-credential-fake"
    helper.parent.mkdir()
    helper.write_text(f"#!/bin/sh\nread -r host || :\necho \"$1 $host\" >> {tmp_path}/calls\n"
                      f'echo \'{{"Username": "{USER}", "Secret": "{PASSWORD}"}}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    (tmp_path / "auth.json").write_text(json.dumps({"credHelpers": {locked.host: "fake"}}))
    assert pull(store, name).id == digest(IMAGE.config)
    assert (tmp_path / "calls").read_text() == f"get {locked.host}\n"


def test_tokens(signed: RealRegistry, tokens: TokenServer, store: Store) -> None:
    name = Reference.parse(signed.push("jwt:1", IMAGE, CREDS))
    tokens.asked.clear()
    with pytest.raises(RegistryError, match="token server: access denied") as caught:
        pull(store, name)
    assert caught.value.hint == f"`pyhv login {signed.host}`"
    with pytest.raises(RegistryError, match="token server: access denied") as caught:
        pull(store, name, Access(login=Login(USER, "wrong")))
    assert "was refused" in caught.value.hint
    tokens.asked.clear()
    assert pull(store, name, GOOD).id == digest(IMAGE.config)
    assert tokens.asked == [{"method": "GET", "scope": "repository:jwt:pull", "service": SERVICE, "authorization":
                             "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}], "once for all blobs"
    tokens.public = True
    try:
        assert pull(store, name).id == digest(IMAGE.config), "tokens for everybody"
        with pytest.raises(RegistryError, match="access denied"):
            push(store, str(name), Reference.parse(f"{signed.host}/mine:1"))
    finally:
        tokens.public = False
    tokens.asked.clear()
    push(store, str(name), Reference.parse(f"{signed.host}/mine:1"), GOOD)
    assert {one["scope"] for one in tokens.asked} == {
        "repository:mine:pull,push", "repository:mine:pull,push repository:jwt:pull"}
    assert signed.count("PUT", "/v2/mine/blobs/") == 0, "mounted"
    check_login(signed.host, GOOD)
    with pytest.raises(RegistryError):
        check_login(signed.host, Access(login=Login(USER, "wrong")))


def test_an_identity_token(signed: RealRegistry, tokens: TokenServer, store: Store, tmp_path: Path) -> None:
    name = Reference.parse(signed.push("identity:1", IMAGE, CREDS))
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {signed.host: {"identitytoken": tokens.refresh_token}}}))
    tokens.asked.clear()
    assert pull(store, name).id == digest(IMAGE.config)
    assert [(one["method"], one["authorization"]) for one in tokens.asked] == [("POST", "")]


def test_tls(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.sign("server")
    registry = RealRegistry(tmp_path / "tls", tls={"certificate": str(certificate), "key": str(key)})
    try:
        name = Reference.parse(registry.push("over/tls:1", IMAGE))
        with pytest.raises(RegistryError, match=r"TLS: .*certificate verify failed") as caught:
            pull(store, name)
        assert "--cert-dir" in caught.value.hint
        assert pull(store, name, Access(tls_verify=False)).id == digest(IMAGE.config)
        certs = tmp_path / "certs"
        certs.mkdir()
        (certs / "ca.crt").write_bytes(authority.certificate.read_bytes())
        for wanted in (name, Reference.parse(str(name).replace("127.0.0.1", "localhost"))):
            assert pull(Store(str(tmp_path / wanted.registry)), wanted, Access(cert_dir=str(certs))).id
        usual = tmp_path / "config" / "containers" / "certs.d" / registry.host
        usual.parent.mkdir(parents=True)
        certs.rename(usual)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        assert pull(Store(str(tmp_path / "usual")), name).id == digest(IMAGE.config)
        push(store, str(name), Reference.parse(f"{registry.host}/pushed:1"))
        (usual / "ca.crt").write_text("no certificate")
        with pytest.raises(ConfigError, match="a certificate can't be read"):
            pull(store, name)
        with pytest.raises(ConfigError, match="no such folder"):
            pull(store, name, Access(cert_dir=str(tmp_path / "nowhere")))
    finally:
        registry.close()


def test_the_certificate_of_another_host_and_a_clients_own(tmp_path: Path, store: Store) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.sign("elsewhere", "DNS:elsewhere.example")
    certs = tmp_path / "certs"
    certs.mkdir()
    (certs / "ca.crt").write_bytes(authority.certificate.read_bytes())
    other = RealRegistry(tmp_path / "other", tls={"certificate": str(certificate), "key": str(key)})
    try:
        with pytest.raises(RegistryError, match=r"TLS: .*(IP address mismatch|not valid)"):
            pull(store, Reference.parse(f"{other.host}/x:1"), Access(cert_dir=str(certs)))
    finally:
        other.close()
    certificate, key = authority.sign("server")
    strict = RealRegistry(tmp_path / "strict", tls={"certificate": str(certificate), "key": str(key),
                                                    "clientcas": [str(authority.certificate)]})
    try:
        wanted = Reference.parse(f"{strict.host}/x:1")
        with pytest.raises(RegistryError, match=r"alert bad certificate|certificate required|reset"):
            pull(store, wanted, Access(cert_dir=str(certs)))
        mine, my_key = authority.sign("client")
        mine.rename(certs / "client.cert")
        my_key.rename(certs / "client.key")
        with pytest.raises(RegistryError, match="x:1: not there"):
            pull(store, wanted, Access(cert_dir=str(certs)))
    finally:
        strict.close()
