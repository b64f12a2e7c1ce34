"""One conversation with a registry: redirects, retries, refusals; every answer bounded in size and time.

Source: RFC 9110 (section 15.4 redirects, 10.2.3 Retry-After), distribution-spec v1.1 (errors). urllib3's own retries
and redirects are off, since these rules are not its:

- the login goes to the registry's own scheme, host and port, and nowhere else;
- at most 5 redirects, never from https to http, never for what changes something;
- 429, 5xx and broken connections are tried again, 5 times in all, after 0.5, 1, 2, 4 seconds or as Retry-After says
  (at most a minute); a host that was never reached is not;
- no answer's head or small body may take more than a minute, no body less than 1 KiB/s for half a minute.

Driven by tests/unit/test_image_registry_hostile.py and tests/unit/test_image_registry_push.py.
"""

from __future__ import annotations

__all__ = ["Broken", "Session"]

import random
import threading
import time
from collections.abc import Generator
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, NameResolutionError, SSLError
from urllib3.response import BaseHTTPResponse

from hv.errors import RegistryError
from hv.image.registry_auth import Authorizer
from hv.image.registry_pool import new_manager
from hv.image.registry_reach import Access
from hv.plainjson import loads

_WHOLE_SECONDS = 60.0           # for a small body
_SLOWEST, _WINDOW = 1 << 10, 30.0   # bytes per second, over so many seconds
_PIECE = 1 << 20
_GATHERED, _HELD_SECONDS = 256 << 10, 0.1     # TLS gives 16 KiB at a time: handed on together, or after so long
_SMALL = 64 << 10               # bodies that only explain
_TOKEN_ANSWER = 256 << 10
_REDIRECTS = 5
_ATTEMPTS = 5
_LONGEST_WAIT = 60.0
_URL_LIMIT = 16 << 10           # signed addresses of object stores are long


class Broken(RegistryError):
    """The connection broke, or the registry is busy: worth another attempt, after `retry_after` (as it was sent)."""

    retry_after = ""


class Session:
    """Requests to one registry, from several threads."""

    first_wait = 0.5            # seconds before the second attempt; doubled for each further one

    def __init__(self, registry: str, access: Access, repository: str = "") -> None:
        login = access.login(registry, repository)      # before anything is sent: a bad file of logins ends it here
        self.base = access.base(registry)
        self.name = registry
        self.cancelled = threading.Event()
        self._access = access
        self._origin = _origin(self.base)
        self._auth = Authorizer(self.base, login, self._ask)
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, str, int], urllib3.PoolManager] = {}
        self._open: set[BaseHTTPResponse] = set()
        self._reached = False

    def send(self, method: str, path: str, scope: str = "", expect: tuple[int, ...] = (200,), what: str = "",
             headers: dict[str, str] | None = None, body: Any = None, attempts: int = _ATTEMPTS,
             patience: float = 0) -> BaseHTTPResponse:
        """The answer, its body unread: hand it to `small`, `pieces` or `drop`. `path` may be a whole address;
        `patience` is how many seconds the registry may think, other than usual."""
        url = urljoin(self.base, path)
        hops = challenged = failures = 0
        while True:
            mine = _origin(url) == self._origin
            authorization = self._auth.header(scope) if mine else ""
            sent = {"Authorization": authorization} if authorization else {}
            try:
                response = self._once(method, url, (headers or {}) | sent, body, patience)
                if response.status not in expect and _is_busy(response.status):
                    raise self._refusal(response, url, what, Broken)
            except Broken as broken:
                failures += 1
                if failures >= attempts or (not self._reached and not broken.status):
                    raise
                self.wait(failures, broken)
                continue
            if response.status in expect:
                return response
            if response.status == 401 and mine and challenged < 2:
                challenged += 1
                header = ", ".join(response.headers.getlist("WWW-Authenticate"))
                self.drop(response)
                if self._auth.challenged(header, scope, authorization):
                    if hasattr(body, "read"):       # it has been read: whoever has it begins anew
                        raise Broken(f"registry {self.name}: {what}: the login ran out", 401)
                    continue
                hint = f"`pyhv login {self.name}`" + (" with another account" if self._auth.known else "")
                raise RegistryError(f"registry {self.name}: {what or 'the request'}: a login is asked for", 401, hint)
            if response.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                hops += 1
                location = response.headers.get("Location", "")
                self.drop(response)
                if hops > _REDIRECTS:
                    raise RegistryError(f"registry {self.name}: redirects more than {_REDIRECTS} times")
                url = self.address(url, location)
                continue
            raise self._refusal(response, url, what)

    def address(self, url: str, location: str) -> str:
        """Where an answer from `url` sends us, if we may go there."""
        try:
            target = urljoin(url, location)
            scheme, host, _ = _origin(target)
        except ValueError:
            scheme = host = target = ""
        if not location or scheme not in ("http", "https") or not host or "@" in urlsplit(target).netloc \
                or not target.isascii() or not target.isprintable() or len(target) > _URL_LIMIT:
            raise RegistryError(f"registry {self.name}: redirects to {location[:100]!r}, which is no http(s) address")
        if scheme == "http" and url.startswith("https:"):
            raise RegistryError(f"registry {self.name}: redirects from https to http ({_host(target)}): refused")
        return target

    def small(self, response: BaseHTTPResponse, limit: int, what: str) -> bytes:
        """A whole body of at most `limit` bytes."""
        pieces, total, end = [], 0, time.monotonic() + _WHOLE_SECONDS
        for piece in self.pieces(response):
            total += len(piece)
            if total > limit:
                response.close()
                raise RegistryError(f"registry {self.name}: {what}: is larger than {limit} bytes")
            if time.monotonic() > end:
                response.close()
                raise Broken(f"registry {self.name}: {what}: not whole after {_WHOLE_SECONDS:.0f} seconds")
            pieces.append(piece)
        return b"".join(pieces)

    def pieces(self, response: BaseHTTPResponse) -> Generator[bytes, None, None]:
        """A body piece by piece, as it comes; Broken where it breaks or stalls."""
        since = told = time.monotonic()
        received, held, size = 0, [], 0
        broken: Broken | None = None
        done = False
        with self._lock:
            self._open.add(response)
        try:
            while not done and broken is None and not self.cancelled.is_set():
                try:
                    piece = response.read1(_PIECE, decode_content=False)
                except (HTTPError, OSError) as error:
                    broken, piece = Broken(f"registry {self.name}: the answer broke off: {_reason(error)}"), b""
                done = not piece and broken is None
                held.append(piece)
                size, received, now = size + len(piece), received + len(piece), time.monotonic()
                if size and (size >= _GATHERED or now - told > _HELD_SECONDS or not piece):
                    yield b"".join(held)
                    held, size, told = [], 0, now
                if now - since > _WINDOW and not done:
                    if received < _SLOWEST * _WINDOW and broken is None:
                        broken = Broken(f"registry {self.name}: the answer stalls: {received} bytes in "
                                        f"{now - since:.0f} seconds")
                    since, received = now, 0
            if not done:
                raise broken or RegistryError("cancelled")
        finally:
            with self._lock:
                self._open.discard(response)
            if done:
                response.release_conn()
            else:
                response.close()

    def drop(self, response: BaseHTTPResponse) -> None:
        """Done with an answer; its connection is kept if the rest is short and has come already."""
        if response.headers.get("Content-Length", "") in ("0", "") and not response.headers.get("Transfer-Encoding"):
            response.drain_conn() if response.headers.get("Content-Length") == "0" else response.close()
            return
        self._explanation(response)

    def wait(self, failures: int, broken: Broken) -> None:
        """Before another attempt; raises `broken` if the registry wants us to wait too long."""
        seconds = self.first_wait * 2 ** (failures - 1) * random.uniform(1, 1.25)
        asked = _retry_after(broken.retry_after)
        if asked > _LONGEST_WAIT:
            broken.hint = broken.hint or f"it asks to wait {asked:.0f} seconds"
            raise broken
        if self.cancelled.wait(max(seconds, asked)):
            raise RegistryError("cancelled")

    def abort(self) -> None:
        """Make every thread that waits for this registry give up soon."""
        self.cancelled.set()
        with self._lock:
            for response in self._open:
                try:
                    response.shutdown()
                except (ValueError, RuntimeError, OSError):
                    pass        # it has ended meanwhile

    def close(self) -> None:
        """Close all connections."""
        for manager in self._managers.values():
            manager.clear()

    def _once(self, method: str, url: str, headers: dict[str, str], body: Any,
              patience: float = 0) -> BaseHTTPResponse:
        if self.cancelled.is_set():
            raise RegistryError("cancelled")
        headers = {"User-Agent": "pyhv"} | headers
        try:
            more = {"timeout": urllib3.Timeout(connect=patience, read=patience)} if patience else {}
            response = self._manager(url).urlopen(method, url, body=body, headers=headers, redirect=False,
                                                  retries=False, preload_content=False, decode_content=False, **more)
        except NameResolutionError:
            raise RegistryError(f"registry {self.name}{self._elsewhere(url)}: no such host") from None
        except SSLError as error:
            if self._reached and "CERTIFICATE" not in str(error):
                raise Broken(f"registry {self.name}{self._elsewhere(url)}: TLS: {_reason(error)}") from None
            raise RegistryError(f"registry {self.name}{self._elsewhere(url)}: TLS: {_reason(error)}",
                                hint="--cert-dir DIR adds an authority, --tls-verify=false trusts anyone") from None
        except (HTTPError, OSError) as error:
            raise Broken(f"registry {self.name}{self._elsewhere(url)}: {_reason(error)}") from None
        except ValueError as error:         # http.client: a header or an address that can't be sent
            raise RegistryError(f"registry {self.name}: {str(error)[:200]}") from None
        self._reached = True
        return response

    def _manager(self, url: str) -> urllib3.PoolManager:
        origin = _origin(url)
        with self._lock:
            if origin not in self._managers:
                self._managers[origin] = new_manager(*origin, self._access)
            return self._managers[origin]

    def _ask(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> bytes:
        """A token server's answer. It is never followed elsewhere: what is sent is a login."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self._once(method, url, headers, body)
                if _is_busy(response.status):
                    raise self._refusal(response, url, "its token server", Broken)
                if response.status == 200:
                    return self.small(response, _TOKEN_ANSWER, "its token server's answer")
            except Broken as broken:
                if attempt == _ATTEMPTS:
                    raise
                self.wait(attempt, broken)
                continue
            refusal = self._refusal(response, url, "its token server")
            if response.status in (400, 401, 403):
                known = self._auth.known
                refusal.hint = f"`pyhv login {self.name}`" + (": the login that is kept was refused" if known else "")
            raise refusal
        raise AssertionError("not reached")

    def _refusal(self, response: BaseHTTPResponse, url: str, what: str,
                 kind: type[RegistryError] = RegistryError) -> RegistryError:
        status = response.status
        wait = response.headers.get("Retry-After", "")
        why = self._explanation(response)
        usual = {401: "access denied", 403: "access denied", 404: "not there", 429: "too many requests"}
        said = usual.get(status, f"HTTP status {status}")
        text = f"registry {self.name}{self._elsewhere(url)}: {what or 'the request'}: {said}"
        hint = f"`pyhv login {self.name}`" if status in (401, 403) and not self._auth.known else ""
        error = kind(text + (f" ({why})" if why else ""), status, hint)
        if isinstance(error, Broken):
            error.retry_after = wait
        return error

    def _elsewhere(self, url: str) -> str:
        return "" if _origin(url) == self._origin else f" ({_host(url)})"

    def _explanation(self, response: BaseHTTPResponse) -> str:
        """What an error's body says (distribution-spec, error codes), made fit for one line of a terminal."""
        try:
            answer = loads(self.small(response, _SMALL, "its refusal").decode("utf-8"))
            first = answer["errors"][0]
            said = f"{first.get('code', '')}: {first.get('message', '')}"
        except (RegistryError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            return ""
        return "".join(char if char.isprintable() else " " for char in said)[:200].strip(": ")


def _is_busy(status: int) -> bool:
    return status == 429 or (status >= 500 and status not in (501, 505))


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _host(url: str) -> str:
    return urlsplit(url).netloc[:100]


def _reason(error: Exception) -> str:
    """The innermost words of urllib3's nested errors, in one line."""
    inner: Any = error
    while getattr(inner, "reason", None) and isinstance(inner.reason, Exception):
        inner = inner.reason
    if isinstance(inner, TimeoutError) or "timed out" in str(inner):
        return "no answer in time"
    inner = next((part for part in reversed(inner.args) if isinstance(part, Exception)), inner)
    text = getattr(inner, "strerror", None) or str(inner).rpartition(">: ")[2] or str(inner) or type(inner).__name__
    return "".join(char if char.isprintable() else " " for char in str(text))[:200]


def _retry_after(text: str) -> float:
    """Seconds, from seconds or a date."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    if text:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            pass
    return 0.0
