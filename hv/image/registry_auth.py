"""What a registry wants to see before it answers: WWW-Authenticate, tokens, Basic.

Source: RFC 9110 section 11 (challenges), distribution/docs/spec/auth/token.md (tokens by GET) and oauth.md (by POST,
for identity tokens). A registry may lie: the scope is what we need and never what it asks for; nothing is sent over
http to where a registry on https points; tokens are bounded, and one that is refused is fetched anew once.

Driven by tests/unit/test_image_registry_auth.py and tests/unit/test_image_registry_hostile.py.
"""

from __future__ import annotations

__all__ = ["Authorizer", "challenges"]

import threading
import time
from typing import Protocol
from urllib.parse import quote, urlsplit

from hv.errors import RegistryError
from hv.image.auth import Login
from hv.plainjson import loads

_HEADER_LIMIT = 8 << 10
_TOKEN_LIMIT = 64 << 10
_SHORTEST_LIFE = 60             # token.md: "expires_in ... if omitted, this defaults to 60 seconds"
_LONGEST_LIFE = 86_400
_EARLY = 10                     # seconds before its end that a token is replaced


class Asker(Protocol):
    """Sends one request to a token server; the body of a good answer, bounded."""

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> bytes: ...


class Authorizer:
    """Authorization headers for one registry."""

    def __init__(self, base: str, login: Login | None, ask: Asker) -> None:
        self._base, self._login, self._ask = base, login, ask
        self._lock = threading.Lock()
        self._basic = ""
        self._tokens: dict[str, tuple[str, float]] = {}
        self._bearer: dict[str, str] = {}           # the last challenge's parameters

    def header(self, scope: str) -> str:
        """What to send with a request of that scope; "" before anything was asked for."""
        if self._basic:
            return self._basic
        with self._lock:
            token, end = self._tokens.get(scope, ("", 0.0))
            if self._bearer and time.monotonic() > end - _EARLY:
                token = self._fetch(scope)
            return token

    def challenged(self, header: str, scope: str, sent: str) -> bool:
        """A request got 401 with this WWW-Authenticate; whether it should be sent again, with another header."""
        found = dict(challenges(header))
        with self._lock:
            if self._basic or self._tokens.get(scope, ("", 0.0))[0] not in ("", sent):
                return (self._basic or self._tokens[scope][0]) != sent      # another thread has been here
            if "bearer" in found:
                self._bearer = found["bearer"]
                self._fetch(scope)
                return True
            if "basic" in found and self._login is not None and self._login.user:
                self._basic = self._login.basic()
                return True
        return False

    @property
    def known(self) -> bool:
        """Whether there is a login."""
        return self._login is not None

    def _fetch(self, scope: str) -> str:
        realm, service = self._bearer.get("realm", ""), self._bearer.get("service", "")
        try:
            parts = urlsplit(realm)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc \
                or not realm.isascii() or not realm.isprintable():
            raise RegistryError(f"{self._base}: its token server {realm[:100]!r} is no http(s) address")
        if parts.scheme == "http" and self._base.startswith("https:"):
            raise RegistryError(f"{self._base}: its token server {realm[:100]!r} is not on https",
                                hint="it would see the login; tell the registry's owner")
        login = self._login
        if login is not None and login.token:
            form = {"grant_type": "refresh_token", "client_id": "pyhv", "service": service, "scope": scope,
                    "refresh_token": login.token}
            raw = self._ask("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, _query(form).encode())
        else:
            query = "&".join([_query({"service": service, "account": login.user if login else ""}),
                              *(_query({"scope": one}) for one in scope.split())]).strip("&")
            raw = self._ask("GET", f"{realm}{'&' if parts.query else '?'}{query}",
                            {"Authorization": login.basic()} if login else {}, None)
        token, life = _token(raw, realm)
        self._tokens[scope] = (f"Bearer {token}", time.monotonic() + life)
        return f"Bearer {token}"


def _query(fields: dict[str, str]) -> str:
    return "&".join(f"{key}={quote(value, safe='')}" for key, value in fields.items() if value)


def _token(raw: bytes, realm: str) -> tuple[str, int]:
    try:
        answer = loads(raw.decode("utf-8"))
        token = answer.get("token") or answer.get("access_token")
        life = answer.get("expires_in", _SHORTEST_LIFE)
    except (ValueError, AttributeError):
        raise RegistryError(f"token server {realm[:100]}: its answer is no JSON object") from None
    if not isinstance(token, str) or not token or len(token) > _TOKEN_LIMIT or not token.isascii() \
            or not token.isprintable() or " " in token:
        raise RegistryError(f"token server {realm[:100]}: token: missing, or not one")
    if type(life) is not int:
        raise RegistryError(f"token server {realm[:100]}: expires_in: {str(life)[:30]!r} is no number of seconds")
    return token, min(max(life, _SHORTEST_LIFE), _LONGEST_LIFE)


def challenges(header: str) -> list[tuple[str, dict[str, str]]]:
    """WWW-Authenticate as (scheme, parameters), both in lower case; what is malformed ends the list."""
    found: list[tuple[str, dict[str, str]]] = []
    rest = header[:_HEADER_LIMIT].strip(" ,")
    while rest:
        word, rest = _word(rest)
        if not word:
            break
        if found and rest.startswith("="):
            value, rest = _value(rest[1:].lstrip())
            found[-1][1].setdefault(word.lower(), value)
        else:
            found.append((word.lower(), {}))
        rest = rest.lstrip(" \t,")
    return found


def _word(text: str) -> tuple[str, str]:
    length = next((n for n, char in enumerate(text) if not (char.isalnum() or char in "!#$%&'*+-.^_`|~")), len(text))
    return text[:length], text[length:].lstrip()


def _value(text: str) -> tuple[str, str]:
    if not text.startswith('"'):
        end = next((n for n, char in enumerate(text) if char in ", \t"), len(text))
        return text[:end], text[end:]
    value, n = "", 1
    while n < len(text) and text[n] != '"':
        n += text[n] == "\\"
        value += text[n:n + 1]
        n += 1
    return value, text[n + 1:]
