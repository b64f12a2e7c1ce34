"""`pyhv image pull`, `image push`, `login`, `logout` as people and scripts use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.images import Built, digest, tar
from framework.registry import PASSWORD, USER, RealRegistry, Request, Server, closing, has, htpasswd, serving
from framework.run import PYHV, Done, no_traceback, pyhv
from framework.terminal import OnTerminal

pytestmark = pytest.mark.skipif(not has("docker-registry", "skopeo"), reason="no docker-registry or skopeo (Debian)")
IMAGE = Built([tar({"a": b"a"}), tar({"b": os.urandom(2_000_000)})], compression="gzip")
ID = digest(IMAGE.config)[7:]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    folder = tmp_path_factory.mktemp("registry")
    yield from closing(RealRegistry(folder, htpasswd(folder)))


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYHV_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYHV_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def name(registry: RealRegistry) -> str:
    return registry.push("cli/one:1", IMAGE, f"--dest-creds={USER}:{PASSWORD}")


def run(code: int, *words: str, stdin: bytes = b"") -> Done:
    done = pyhv(*words, stdin=stdin)
    no_traceback(done)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done


def failed(code: int, words: str, *command: str, stdin: bytes = b"") -> None:
    """Exit code, and one line (after the one that says what is done) with `words` in it."""
    lines = run(code, *command, stdin=stdin).stderr.decode().splitlines()
    complaint = [line for line in lines if line.startswith("pyhv: ")]
    assert len(complaint) == 1 and words in complaint[0], lines


def test_login_pull_push_logout(registry: RealRegistry, name: str, tmp_path: Path) -> None:
    failed(1, f"a login is asked for - `pyhv login {registry.host}`", "image", "pull", name)
    failed(1, "login", "login", "-u", USER, "--password-stdin", registry.host, stdin=b"wrong\n")
    assert not (tmp_path / "docker").exists(), "a bad login is not kept"
    done = run(0, "login", "-u", USER, "--password-stdin", registry.host, stdin=f"{PASSWORD}\n".encode())
    assert done.stderr.decode() == f"logged in to {registry.host} as {USER}; kept in {tmp_path}/docker/config.json\n"
    assert registry.host in json.loads((tmp_path / "docker/config.json").read_text())["auths"]
    done = run(0, "image", "pull", name)
    assert done.stdout.decode() == f"{ID}\n"
    assert done.stderr.count(b": done\n") == 3 and b"\x1b" not in done.stderr
    assert run(0, "pull", "--quiet", name, f"{name.removesuffix(':1')}@{digest(IMAGE.manifest)}").stdout.decode() == (
        f"{ID}\n{ID}\n")
    assert run(0, "pull", "-q", name).stderr == b""
    pushed = run(0, "image", "push", "-q", name, f"{registry.host}/cli/two:2")
    assert pushed.stdout.decode() == f"{digest(IMAGE.manifest)}\n"
    run(0, "push", name)
    assert run(0, "logout", registry.host).stderr.decode() == f"logged out of {registry.host}\n"
    failed(1, "no login for", "logout", registry.host)
    failed(1, "a login is asked for", "push", name)
    assert run(0, "pull", "-q", "--creds", f"{USER}:{PASSWORD}", name).stdout.decode() == f"{ID}\n"
    failed(1, "with another account", "pull", "--creds", f"{USER}:no", name)


@pytest.mark.parametrize("code, words, command", [
    (2, "see `pyhv pull --help`", ["pull"]), (2, "tls-verify", ["pull", "--tls-verify=maybe", "x"]),
    (2, "upper case", ["image", "pull", "localhost:1/UPPER"]), (1, "Connection refused", ["pull", "127.0.0.1:9/x"]),
    (2, "--platform 'arm'", ["pull", "--platform", "arm", "127.0.0.1:9/x"]),
    (2, "no such file", ["pull", "--authfile", "/nowhere", "127.0.0.1:9/x"]),
    (2, "with a dot or a port in it", ["login", "-u", "x", "-p", "y", "myhost"]),
    (2, "no terminal to ask on - give --username", ["login", "127.0.0.1:9"]),
    (2, "give --password-stdin", ["login", "-u", "x", "127.0.0.1:9"]),
    (2, "exclude each other", ["login", "-u", "x", "-p", "y", "--password-stdin", "127.0.0.1:9"]),
    (2, "has no colon", ["login", "-u", "x:y", "-p", "y", "127.0.0.1:9"]),
    (1, "is not in the store", ["push", "never:pulled"]),
    (1, "no such host", ["pull", "registry.invalid/x"])])
def test_mistakes_cost_one_line(code: int, words: str, command: list[str]) -> None:
    failed(code, words, *command)


def test_bars_on_a_terminal(name: str) -> None:
    command = [*PYHV, "pull", "--creds", f"{USER}:{PASSWORD}", name]
    with OnTerminal(size=(24, 100), command=command) as terminal:
        assert terminal.end() == 0
        while len(terminal.output) < 100_000 and ID.encode() not in terminal.output:
            terminal.output += os.read(terminal.master, 4096)
    assert "━".encode() in terminal.output and digest(IMAGE.blobs[1])[7:19].encode() in terminal.output


def test_a_password_is_typed_unseen(registry: RealRegistry) -> None:
    with OnTerminal(command=[*PYHV, "login", registry.host]) as terminal:
        terminal.wait_for(b"user of ")
        terminal.type(f"{USER}\n".encode())
        terminal.wait_for(b"password of ")
        terminal.type(f"{PASSWORD}\n".encode())
        terminal.wait_for(b"logged in")
        assert terminal.end() == 0
    assert PASSWORD.encode() not in terminal.output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_soon_and_the_next_pull_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    blob, good = IMAGE.blobs[1], serving({"x:1": IMAGE})

    def stall(request: Request) -> None:
        if digest(blob) in request.path and "Range" not in request.headers:
            request.start(200, {"Content-Length": str(len(blob))})
            request.write(blob[:700_000])
            time.sleep(30)
        else:
            good(request)

    server = Server(stall)
    try:
        child = subprocess.Popen([*PYHV, "pull", f"{server.host}/x:1"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        partial = tmp_path / "data/images/partial" / digest(blob)[7:]
        end = time.monotonic() + 20
        while not (partial.exists() and partial.stat().st_size > 400_000):
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.2)
        kept = partial.stat().st_size
        began = time.monotonic()
        child.send_signal(how)
        _, errors = child.communicate(timeout=20)
        assert time.monotonic() - began < 10
        assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}[how]
        assert b"Traceback" not in errors
        assert run(0, "pull", "-q", f"{server.host}/x:1").stdout.decode() == f"{ID}\n"
        assert any(headers.get("Range") == f"bytes={kept}-" for headers in server.headers)
    finally:
        server.close()
