"""Registries on loopback: Debian's docker-registry (open, htpasswd, tokens, TLS), which skopeo fills, and bad ones.

`RealRegistry.requests` are the lines of its access log: what was asked, and how it was answered.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from framework.images import Built, digest, oci_layout

USER, PASSWORD = "user", "secret"
_BCRYPT = "$2b$04$5aTX28JnUgM9rohRFYA/aOHsAK0GYEF2R3bESY90ILiqLbzKduXAy"      # of PASSWORD
ISSUER, SERVICE = "pyhv-test-issuer", "pyhv-test-service"
_COMBINED = re.compile(r'"([A-Z]+) (\S+) HTTP/1\.1" (\d+)')


class RealRegistry:
    """docker-registry serve, until close()."""

    def __init__(self, folder: Path, auth: dict[str, Any] | None = None, tls: dict[str, Any] | None = None,
                 **more: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        config = {"version": 0.1, "log": {"level": "info"},
                  "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
                  "http": {"addr": "127.0.0.1:0", "secret": "x", **({"tls": tls} if tls else {})},
                  **({"auth": auth} if auth else {}), **more}
        (folder / "config.yml").write_text(json.dumps(config))      # JSON is YAML
        self._out, errors = folder / "access.log", folder / "log"
        # it takes REGISTRY_AUTH_FILE, which is skopeo's, as a setting of its own
        environment = {key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")}
        with self._out.open("wb") as out, errors.open("wb") as file:
            self.process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=out,
                                            stderr=file, stdin=subprocess.DEVNULL, env=environment)
        end = time.monotonic() + 20
        while not (found := re.search(r"listening on 127\.0\.0\.1:(\d+)", errors.read_text())):
            assert time.monotonic() < end and self.process.poll() is None, errors.read_text()
            time.sleep(0.02)
        self.host = f"127.0.0.1:{found[1]}"

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """(method, path, status), in order."""
        return [(method, path, int(status)) for method, path, status in _COMBINED.findall(self._out.read_text())]

    def count(self, method: str, part: str) -> int:
        """Good answers to requests of that kind."""
        time.sleep(0.1)         # it writes the line after the answer
        return len([1 for its, path, status in self.requests if its == method and part in path and status < 300])

    def push(self, name: str, built: Built, *options: str) -> str:
        """Send an image with skopeo; what to pull it by."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            layout = oci_layout(Path(folder), built)
            tag = built.names[0]
            skopeo("copy", "--dest-tls-verify=false", *options, f"oci:{layout}:{tag}", f"docker://{self.host}/{name}")
        return f"{self.host}/{name}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def htpasswd(folder: Path) -> dict[str, Any]:
    """The auth section for USER and PASSWORD."""
    (folder / "htpasswd").write_text(f"{USER}:{_BCRYPT}\n")
    return {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}


def skopeo(*words: str, code: int = 0) -> str:
    """A command of skopeo's; its output."""
    done = subprocess.run(["skopeo", "--insecure-policy", *words], capture_output=True, text=True, timeout=60,
                          check=False, env=os.environ | {"REGISTRY_AUTH_FILE": "/nonexistent"}
                          if "REGISTRY_AUTH_FILE" not in os.environ else None)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done.stdout


def _openssl(*words: str, **options: Any) -> bytes:
    return subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=30, **options).stdout


class Authority:
    """A certificate authority of its own, and what it signs: ca.crt, NAME.key, NAME.crt in the folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.certificate = folder, folder / "ca.crt"
        _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                 "-subj", "/CN=pyhv test authority", "-keyout", str(folder / "ca.key"), "-out", str(self.certificate))

    def sign(self, name: str, alternative: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """Certificate and key."""
        key, request, certificate = (self.folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                 "-addext", f"subjectAltName={alternative}", "-keyout", str(key), "-out", str(request))
        _openssl("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey",
                 str(self.folder / "ca.key"), "-CAcreateserial", "-days", "2", "-copy_extensions", "copy", "-out",
                 str(certificate))
        return certificate, key


class TokenServer:
    """Signs tokens as distribution/docs/spec/auth/jwt.md has them, for USER; the real registry verifies them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._key, self._crt = folder / "token.key", folder / "token.crt"
        _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tokens", "-keyout",
                 str(self._key), "-out", str(self._crt))
        self.asked: list[dict[str, str]] = []
        self.public = False         # whether it gives tokens to everybody, for pulling
        self.life = 300
        self.refresh_token = "identity-token-1"
        self.server = Server(self._answer)
        self.auth = {"token": {"realm": f"http://{self.server.host}/token", "service": SERVICE, "issuer": ISSUER,
                               "rootcertbundle": str(self._crt)}}

    def _answer(self, request: Request) -> None:
        form = parse_qs(request.body.decode()) if request.method == "POST" else parse_qs(urlsplit(request.path).query)
        scopes = " ".join(form.get("scope", [])).split()
        login = request.headers.get("Authorization", "")
        self.asked.append({"method": request.method, "scope": " ".join(scopes), "authorization": login,
                           "service": form.get("service", [""])[0]})
        good = login == "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode() \
            or form.get("refresh_token") == [self.refresh_token]
        if (login and not good) or (not good and not self.public):
            return request.reply(401, b'{"details": "bad login"}')
        access = [{"type": kind, "name": name, "actions": actions.split(",") if good else ["pull"]}
                  for kind, name, actions in (scope.split(":") for scope in scopes)]
        token = self._token(access)
        return request.reply(200, json.dumps({"access_token" if request.method == "POST" else "token": token,
                                              "expires_in": self.life}).encode())

    def _token(self, access: list[dict[str, Any]]) -> str:
        def text(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).decode().rstrip("=")

        chain = "".join(self._crt.read_text().splitlines()[1:-1])
        now = int(time.time())
        head = text(json.dumps({"typ": "JWT", "alg": "RS256", "x5c": [chain]}).encode())
        claims = text(json.dumps({"iss": ISSUER, "sub": USER, "aud": SERVICE, "exp": now + 300, "nbf": now - 60,
                                  "iat": now, "jti": os.urandom(8).hex(), "access": access}).encode())
        signature = _openssl("dgst", "-sha256", "-sign", str(self._key), input=f"{head}.{claims}".encode())
        return f"{head}.{claims}.{text(signature)}"

    def close(self) -> None:
        self.server.close()


class Request:
    """One request to a Server, and the means to answer it, well or badly."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.handler, self.body = handler, body
        self.method, self.path, self.headers = handler.command, handler.path, handler.headers

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """An answer; headers may override the Content-Length, which is otherwise right."""
        self.start(status, {"Content-Length": str(len(body))} | (headers or {}))
        if self.method != "HEAD":
            self.handler.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        """The head of an answer only."""
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()

    def write(self, data: bytes) -> None:
        """Bytes of a body, or of anything else."""
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def hang_up(self) -> None:
        """Break the connection off."""
        self.handler.close_connection = True


class Server:
    """An HTTP/1.1 server whose answers a function gives; it may break every rule."""

    def __init__(self, answer: Any) -> None:
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        seen = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen.requests.append((self.command, self.path))
                seen.headers.append(dict(self.headers.items()))
                try:
                    answer(Request(self, body))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_CONNECT = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass        # a TLS probe, a client that was killed

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def serving(images: dict[str, Built]) -> Any:
    """An `answer` that serves images as a registry should: {"repo:tag": Built}; Range too."""
    manifests: dict[str, tuple[str, bytes]] = {}
    blobs: dict[str, bytes] = {}
    for name, built in images.items():
        repository, _, tag = name.partition(":")
        described = built.descriptor()
        for key in (tag, described["digest"]):
            manifests[f"/v2/{repository}/manifests/{key}"] = (described["mediaType"], built.manifest)
        for blob in (*built.blobs, built.config):
            blobs[f"/v2/{repository}/blobs/{digest(blob)}"] = blob

    def answer(request: Request) -> None:
        if request.path in manifests:
            media_type, raw = manifests[request.path]
            return request.reply(200, raw, {"Content-Type": media_type})
        if request.path in blobs:
            data, part = blobs[request.path], request.headers.get("Range", "")
            if not part:
                return request.reply(200, data)
            begin = int(part.removeprefix("bytes=").rstrip("-"))
            return request.reply(206, data[begin:], {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"})
        return request.reply(404, b'{"errors": [{"code": "UNKNOWN", "message": "no such thing"}]}')

    return answer


def has(*programs: str) -> bool:
    """Whether all of them are installed."""
    return all(shutil.which(program) for program in programs)


def closing(thing: Any) -> Iterator[Any]:
    """For fixtures: `yield from closing(X())`."""
    try:
        yield thing
    finally:
        thing.close()
