"""Challenges, tokens, and token servers that lie."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import RegistryError
from hv.image.auth import Login
from hv.image.registry_auth import Authorizer, challenges

REALM = 'Bearer realm="https://auth.r.io/token",service="r.io",scope="repository:x:pull,push,delete"'


@pytest.mark.parametrize("header, found", [
    ("", []), ("Basic", [("basic", {})]), ('Basic realm="a b"', [("basic", {"realm": "a b"})]),
    ('Bearer realm="https://a/b",service="s, t",scope="x:y:pull,push"',
     [("bearer", {"realm": "https://a/b", "service": "s, t", "scope": "x:y:pull,push"})]),
    ('BEARER Realm=tok , service = "q\\"uote", Basic realm="z"',
     [("bearer", {"realm": "tok", "service": 'q"uote'}), ("basic", {"realm": "z"})]),
    ('Bearer realm="unfinished', [("bearer", {"realm": "unfinished"})]), ('=,"x"', []), ("Bearer realm=", [
        ("bearer", {"realm": ""})]), ("Negotiate, Basic x=1,x=2", [("negotiate", {}), ("basic", {"x": "1"})])])
def test_challenges(header: str, found: list[tuple[str, dict[str, str]]]) -> None:
    assert challenges(header) == found


@given(st.text(max_size=200) | st.text('Bb =,"\\asic\t', max_size=200))
def test_no_challenge_is_a_traceback(header: str) -> None:
    challenges(header)


class Asked:
    """A token server: gives the answers in turn, remembers what was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.seen = list(answers), []     # type: ignore[var-annotated]

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> bytes:
        self.seen.append((method, url, headers, body))
        answer = self.answers.pop(0)
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


def authorizer(ask: Asked, login: Login | None = None, base: str = "https://r.io:443") -> Authorizer:
    return Authorizer(base, login, ask)


def test_the_scope_is_ours_whatever_is_asked_for() -> None:
    ask = Asked({"token": "t1"}, {"access_token": "t2"})
    auth = authorizer(ask, Login("u", "p"))
    assert auth.header("repository:x:pull") == ""
    assert auth.challenged(REALM, "repository:x:pull", "")
    assert auth.header("repository:x:pull") == "Bearer t1"
    method, url, headers, _ = ask.seen[0]
    assert (method, url) == ("GET", "https://auth.r.io/token?service=r.io&account=u&scope=repository%3Ax%3Apull")
    assert headers == {"Authorization": Login("u", "p").basic()}
    assert auth.header("repository:y:pull") == "Bearer t2", "another scope has its own token"
    assert auth.header("repository:x:pull") == "Bearer t1"


def test_a_refused_token_is_fetched_anew_and_an_old_one_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("hv.image.registry_auth.time.monotonic", lambda: now[0])
    ask = Asked({"token": "t1", "expires_in": 1}, {"token": "t2", "expires_in": 300}, {"token": "t3"})
    auth = authorizer(ask)
    assert auth.challenged(REALM, "s", "")
    now[0] += 45
    assert auth.header("s") == "Bearer t1", "no token lives shorter than a minute"
    assert auth.challenged(REALM, "s", "Bearer t1")
    assert auth.challenged(REALM, "s", "Bearer t1") and len(ask.seen) == 2, "another thread has done it"
    now[0] += 295
    assert auth.header("s") == "Bearer t3"


def test_an_identity_token_goes_by_post() -> None:
    ask = Asked({"access_token": "t"})
    assert authorizer(ask, Login("", "", "ident&ity")).challenged(REALM, "repository:x:pull", "")
    method, url, headers, body = ask.seen[0]
    assert (method, url, "Authorization" in headers) == ("POST", "https://auth.r.io/token", False)
    assert b"grant_type=refresh_token" in body and b"refresh_token=ident%26ity" in body


def test_basic_only_when_asked_for_and_only_once() -> None:
    auth = authorizer(Asked(), Login("u", "p"))
    assert auth.challenged('Basic realm="x"', "s", "")
    assert auth.header("s") == Login("u", "p").basic()
    assert not auth.challenged('Basic realm="x"', "s", auth.header("s"))
    assert not authorizer(Asked()).challenged('Basic realm="x"', "s", "")
    assert not authorizer(Asked(), Login("u", "p")).challenged("Negotiate", "s", "")


@pytest.mark.parametrize("realm", ["http://auth.r.io/token", "ftp://x/y", "", "//x", "https://user@x/", "https://[::1",
                                   "https:///x", "https://x/\x7f", "https://ä.io/"])
def test_no_login_goes_to_a_bad_realm(realm: str) -> None:
    ask = Asked({"token": "t"})
    with pytest.raises(RegistryError, match="its token server"):
        authorizer(ask, Login("u", "p")).challenged(f'Bearer realm="{realm}",service="s"', "x", "")
    assert ask.seen == []


@pytest.mark.parametrize("answer, words", [
    (b"not json", "no JSON object"), ([], "no JSON object"), ({}, "token: missing"), ({"token": 7}, "token: missing"),
    ({"token": "a\r\nHost: evil"}, "token: missing"), ({"token": "x" * 100_000}, "token: missing"),
    ({"token": "a b"}, "token: missing"), ({"token": "t", "expires_in": "soon"}, "expires_in"), (b"\xff", "no JSON")])
def test_token_servers_that_lie(answer: Any, words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        authorizer(Asked(answer)).challenged(REALM, "x", "")
