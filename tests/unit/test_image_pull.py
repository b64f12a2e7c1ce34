"""Downloads that meet: who waits for whom, who goes on; and transfers at once."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.images import Built, digest, tar
from framework.registry import Request, Server, serving

from hv.errors import ImageError, RegistryError
from hv.image.media import Descriptor
from hv.image.pull import pull
from hv.image.reference import Reference
from hv.image.registry_http import Session
from hv.image.store import Store
from hv.image.transfer import at_once

IMAGE = Built([tar({"a": b"a"}), tar({"b": os.urandom(600_000)})], compression="none")
BLOB = IMAGE.blobs[1]


@pytest.fixture(autouse=True)
def hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setattr(Session, "first_wait", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "images"))


class Gate:
    """A registry that stops in the middle of BLOB until it is opened; then it breaks off, or goes on."""

    def __init__(self) -> None:
        self.opened, self.reached, self.breaks = threading.Event(), threading.Event(), False
        self.good = serving({"x:1": IMAGE})
        self.server = Server(self.answer)
        self.name = Reference.parse(f"{self.server.host}/x:1")

    def answer(self, request: Request) -> None:
        if digest(BLOB) not in request.path or "Range" in request.headers or self.opened.is_set():
            return self.good(request)
        request.start(200, {"Content-Length": str(len(BLOB))})
        request.write(BLOB[:400_000])
        self.reached.set()
        self.opened.wait(20)
        if self.breaks:
            return request.hang_up()
        return request.write(BLOB[400_000:])

    def asked(self) -> list[str]:
        return [headers.get("Range", "all") for (_, path), headers in zip(
            self.server.requests, self.server.headers, strict=True) if digest(BLOB) in path]


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()
    made.server.close()


class Pulling(threading.Thread):
    """A pull in a thread, what it told, and how it ended."""

    def __init__(self, store: Store, name: Reference) -> None:
        super().__init__(daemon=True)
        self.store, self.name_, self.told = store, name, []     # type: ignore[var-annotated]
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = pull(self.store, self.name_, report=lambda *event: self.told.append(event)).id
        except ImageError as error:
            self.result = error

    def said(self, what: str) -> bool:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if any(event[0] == what and event[1].digest == digest(BLOB) for event in self.told):
                return True
            time.sleep(0.01)
        return False

    def end(self) -> Any:
        self.join(20)
        assert not self.is_alive()
        return self.result


def test_the_second_waits_and_fetches_nothing(store: Store, gate: Gate) -> None:
    first = Pulling(store, gate.name)
    assert gate.reached.wait(10)
    second = Pulling(store, gate.name)
    assert second.said("waits")
    gate.opened.set()
    assert first.end() == second.end() == digest(IMAGE.config)
    assert gate.asked() == ["all"]
    assert second.told[-1][0] == "there" and first.said("done")
    assert os.listdir(f"{store.root}/partial") == []


def test_the_second_goes_on_where_the_first_gave_up(store: Store, gate: Gate) -> None:
    """The holder of the lock is killed: here, an open file that is closed."""
    path = store.partial(digest(BLOB))
    Path(path).write_bytes(BLOB[:1000])
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        second = Pulling(store, gate.name)
        assert second.said("waits")
        assert gate.asked() == []
    assert second.end() == digest(IMAGE.config)
    assert gate.asked() == ["bytes=1000-"]


def test_a_file_that_was_removed_while_we_waited_is_not_written(store: Store, gate: Gate) -> None:
    gate.opened.set()
    path = store.partial(digest(BLOB))
    Path(path).write_bytes(b"")
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        second = Pulling(store, gate.name)
        assert second.said("waits")
        os.unlink(path)
    assert second.end() == digest(IMAGE.config)


def test_a_break_is_told_and_mended(store: Store, gate: Gate) -> None:
    gate.breaks = True
    first = Pulling(store, gate.name)
    assert gate.reached.wait(10)
    gate.opened.set()
    assert first.end() == digest(IMAGE.config)
    assert gate.asked() == ["all", "bytes=400000-"]
    told = [(what, done) for what, blob, done in first.told if blob.digest == digest(BLOB)]
    assert ("again", 400_000) in told
    assert [done for _, done in told] == sorted(done for _, done in told), "never backwards"
    assert told[-1] == ("done", len(BLOB))


def test_nothing_is_removed_from_under_a_pull(store: Store, gate: Gate) -> None:
    first = Pulling(store, gate.name)
    assert gate.reached.wait(10)
    with pytest.raises(Exception, match="another command is at work"), store.lock(shared=False, wait=0.1):
        pass
    gate.opened.set()
    assert first.end() == digest(IMAGE.config)


def test_the_first_failure_is_raised_and_ends_the_others() -> None:
    aborted, ran = threading.Event(), []

    def fail() -> None:
        raise RegistryError("this one")

    def wait() -> None:
        assert aborted.wait(10)
        raise RegistryError("cancelled")

    with pytest.raises(RegistryError, match="this one"):
        at_once([wait, fail, lambda: ran.append(1)], 2, aborted.set)
    assert ran == []
    with pytest.raises(RuntimeError, match="a transfer failed"):
        at_once([lambda: {}["x"]], 1, lambda: None)     # type: ignore[index]


def test_as_many_at_once_as_asked_for() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    at_once([work] * 9, 3, lambda: None)
    assert (now, most) == ([0], [3])


def test_a_descriptor_is_what_reports_get(store: Store, gate: Gate) -> None:
    gate.opened.set()
    told = []
    pull(store, gate.name, report=lambda what, blob, done: told.append((what, type(blob), done <= blob.size)))
    assert {kind for _, kind, _ in told} == {Descriptor} and all(bounded for *_, bounded in told)
