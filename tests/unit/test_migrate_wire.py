"""hv/snapshot/wire.py and the target's side of a migration, with peers that break every rule."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.errors import ConfigError, HvError, SnapshotError
from hv.machine.config import MachineConfig
from hv.machine.recipe import recipe_of
from hv.memory.guest import GuestMemory
from hv.snapshot import wire
from hv.snapshot.arrive import Arrival
from hv.snapshot.format import encode
from hv.snapshot.wire import Wire, connect, listen, take

RAM, PAGE = 16 << 20, 4096


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PATIENCE", 1.0)


def pair() -> tuple[Wire, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    return Wire(ours), theirs


def frame(kind: int, content: bytes = b"", argument: int = 0, length: int | None = None) -> bytes:
    return wire._HEADER.pack(kind, len(content) if length is None else length, argument) + content


@given(kind=st.sampled_from([wire.HELLO, wire.PAGES, wire.STATE, wire.FILE]), argument=st.integers(0, 2 ** 64 - 1),
       content=st.binary(max_size=9000))
@settings(max_examples=50, deadline=None)
def test_frames_arrive_as_they_were_sent(kind, argument, content):
    ours, theirs = pair()
    other = Wire(theirs)
    try:
        ours.send(kind, argument, content[:10], memoryview(content[10:]))
        assert other.receive(kind) == (kind, argument, len(content))
        assert other.read(len(content)) == content
        assert ours.sent == 16 + len(content)
    finally:
        ours.close()
        other.close()


@pytest.mark.parametrize(("sent", "said"), [
    (frame(wire.GO), "sent GO where PAGES or STATE was due"),
    (frame(0), r"sent \? where"),
    (frame(77), "sent 0x4d where"),
    (frame(wire.PAGES, length=(1 << 20) + 1), "PAGES of 1048577 bytes"),
    (frame(wire.STATE, length=0xFFFFFFFF), "STATE of 4294967295 bytes"),
    (frame(wire.FAIL, b"no room here"), "the other side says: no room here"),
    (frame(wire.FAIL, b"\x1b[2J\xff"), r"says: '\\x1b\[2J"),
    (frame(wire.FAIL, length=5000), "sent FAIL where"),
    (b"\x04\0\0", "hung up"),
    (b"", "hung up"),
])
def test_what_is_not_due_ends_it(sent, said):
    ours, theirs = pair()
    try:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(HvError, match=said):
            ours.receive(wire.PAGES, wire.STATE)
    finally:
        ours.close()
        theirs.close()


def test_a_silent_peer_and_one_that_drips_are_left():
    ours, theirs = pair()
    try:
        began = time.monotonic()
        with pytest.raises(HvError, match="is gone"):
            ours.receive(wire.PAGES)
        assert 0.9 < time.monotonic() - began < 5
        # one that takes nothing
        with pytest.raises(HvError, match="is gone"):
            for _ in range(1000):
                ours.send(wire.PAGES, 0, bytes(1 << 20))
    finally:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("address", [
    "", "unix:", "unix:" + "x" * 200, "tcp:host", "tcp::80", "tcp:host:0", "tcp:host:70000", "tcp:host:abc", "ftp:a:1",
    "/a/path", "tcp:127.0.0.1:\u0664\u0662"])
def test_bad_addresses_are_refused(address):
    for call in (connect, listen):
        with pytest.raises(ConfigError, match="is no address"):
            call(address)


def test_tls_needs_its_files_and_only_tls():
    with pytest.raises(ConfigError, match="needs --cert"):
        listen("tls:127.0.0.1:7777")
    with pytest.raises(ConfigError, match="no use for --cert"):
        listen("tcp:127.0.0.1:7777", ("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"--cert /none, .*No such file"):
        wire._context(("/none", "/none", "/none"), server=True)


def test_nobody_there_and_nobody_comes(tmp_path):
    with pytest.raises(HvError, match="No such file"):
        connect(f"unix:{tmp_path}/none")
    sock = listen(f"unix:{tmp_path}/s")
    try:
        assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600
        with pytest.raises(HvError, match="nobody came"):
            take(sock, timeout=0.05)
        with pytest.raises(ConfigError, match="in use"):
            listen(f"unix:{tmp_path}/s")
    finally:
        sock.close()
    listen(f"unix:{tmp_path}/s").close()        # left by a killed process: nobody listens
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError):
        listen(f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "mine"


# the target ----------------------------------------------------------------------------------------------


def hello(**changes: Any) -> dict[str, Any]:
    from hv.kvm.system import Kvm
    from hv.snapshot.host import maker

    with Kvm() as kvm:
        ours = maker(bytes(kvm.supported_cpuid()))
    recipe = recipe_of(MachineConfig(b"\xf4", boot_protocol="flat", memory=RAM))
    return {"version": 1, "id": "0", "migration": wire.VERSION, "config": recipe,
            "host": {"maker": ours, "ring0": "native"}} | changes


def target(talk: Callable[[socket.socket], None]) -> HvError:
    """An Arrival whose source is `talk`: it must fail, and leave nothing."""
    ours, theirs = pair()
    found: list[BaseException] = []
    before = set(os.listdir("/tmp"))

    def run() -> None:
        try:
            Arrival(ours).take()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        talk(theirs)
    except OSError:
        pass            # it hung up on us
    thread.join(20)
    theirs.close()
    assert not thread.is_alive() and len(found) == 1
    assert isinstance(found[0], HvError), found[0]
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("pyhv-arrive")]
    return found[0]


def greeted(then: bytes) -> Callable[[socket.socket], None]:
    def talk(sock: socket.socket) -> None:
        sock.sendall(frame(wire.HELLO, encode(hello())))
        assert sock.recv(16) == frame(wire.READY)
        sock.sendall(then)
        sock.shutdown(socket.SHUT_WR)

    return talk


needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm can't be opened here")


@needs_kvm
@pytest.mark.parametrize(("changes", "said"), [
    ({"migration": 2}, "version 2, this pyhv knows 1"), ({"migration": "x" * 500}, "version 'xxx"),
    ({"config": None}, "config"), ({"config": {"memory": 1 << 62}}, "memory"),
    ({"config": {"memory": "much"}}, r"config.*memory"), ({"config": {"memory": RAM, "cpus": 4000}}, "4000"),
    ({"host": {"maker": "Zilog", "ring0": "native"}}, "Zilog"), ({"host": None}, "host"),
    ({"config": {"memory": RAM, "devices": [{"device": "own", "place": "/etc/passwd:X"}]}}, "program that would run"),
])
def test_a_hello_is_checked(changes, said):
    error = target(lambda sock: sock.sendall(frame(wire.HELLO, encode(hello(**changes)))))
    assert re.search(said, str(error)), error


@needs_kvm
@pytest.mark.parametrize(("then", "said"), [
    (frame(wire.PAGES, bytes(100)), "no whole pages"),
    (frame(wire.PAGES, bytes(PAGE), RAM // PAGE), "are not all RAM"),
    (frame(wire.PAGES, bytes(2 * PAGE), RAM // PAGE - 1), "are not all RAM"),
    (frame(wire.PAGES, bytes(PAGE), 2 ** 64 - 1), "are not all RAM"),
    (frame(wire.PAGES, bytes(PAGE), 2 ** 52), "are not all RAM"),
    (frame(wire.PAGES, length=PAGE), "hung up"),
    (frame(wire.FILE, b"no line"), "FILE"),
    (frame(wire.FILE, b'{"name": "../x", "size": 1, "at": 0, "mtime_ns": 0}\nx'), "FILE"),
    (frame(wire.FILE, b'{"name": "0.img", "size": 1, "at": 1, "mtime_ns": 0}\nx'), "out of range"),
    (frame(wire.FILE, b'{"name": "0.img", "size": -1, "at": -2, "mtime_ns": 0}\nx'), "out of range"),
    (frame(wire.FILE, b'{"name": "0.img", "size": true, "at": 0, "mtime_ns": 0}\nx'), "FILE"),
    (frame(wire.FILE, b'{"name": "0.img", "size": 1.5, "at": 0, "mtime_ns": 0}\nx'), "FILE"),
    (frame(wire.FILE, b'{"name": "0.img", "size": 1, "at": 0, "mtime_ns": 1e99}\nx'), "FILE"),
    (frame(wire.FILE, b'{"name": "0.img", "size": 1, "at": 0, "mtime_ns": ' + b"9" * 40 + b'}\nx'), "FILE"),
    (frame(wire.FILE, b'{"name": "' + b"a" * 5000 + b'"}\nx'), "FILE"),
    (frame(wire.STATE, b"{"), "STATE"), (frame(wire.STATE, b"[]"), "is no object"),
    (frame(wire.STATE, b"{}"), "config"),
    (frame(wire.STATE, encode({"config": recipe_of(MachineConfig(memory=RAM * 2)), "disks": []})), "config.memory"),
    (frame(wire.STATE, encode({"config": recipe_of(MachineConfig(memory=RAM)), "disks": []})), "host"),
    (frame(wire.GO), "sent GO where"), (frame(wire.DONE), "sent DONE where"), (frame(wire.HELLO), "sent HELLO where"),
    (b"", "hung up"), (b"\xff" * 64, "sent 0xff where"),
])
def test_what_follows_is_checked(then, said):
    error = target(greeted(then))
    assert said in str(error), error


@needs_kvm
def test_a_source_that_falls_silent_is_given_up():
    def talk(sock: socket.socket) -> None:
        greeted(frame(wire.PAGES, bytes(PAGE), 3))(sock)

    assert "hung up" in str(target(talk))

    def silent(sock: socket.socket) -> None:
        sock.sendall(frame(wire.HELLO, encode(hello())))
        time.sleep(3)

    assert "is gone" in str(target(silent))


@needs_kvm
def test_garbage_of_all_kinds():
    rng = random.Random(11)
    kinds = [wire.PAGES, wire.FILE, wire.STATE, wire.ROUND, wire.FAIL, 0, 200]
    for _ in range(60):
        data = b"".join(frame(rng.choice(kinds), rng.randbytes(rng.choice([0, 1, 16, 300, PAGE])),
                              rng.choice([0, 1, RAM // PAGE - 1, rng.getrandbits(64)])) for _ in range(8))
        target(greeted(data))


def test_pages_land_where_they_belong():
    """Across the hole below 4 GiB, too; the ranges are small ones here."""
    memory = GuestMemory(RAM)
    ours, theirs = pair()
    try:
        arrival = Arrival(ours)
        content = os.urandom(3 * PAGE)
        theirs.sendall(content)
        arrival._pages(memory, 7, len(content))
        assert memory.read(7 * PAGE, len(content)) == content
        assert memory.read(0, 7 * PAGE) == bytes(7 * PAGE)
        with pytest.raises(SnapshotError):
            arrival._pages(memory, RAM // PAGE, PAGE)
    finally:
        ours.close()
        theirs.close()
        memory.close()


# TLS -----------------------------------------------------------------------------------------------------


def certificates(place: Path) -> dict[str, tuple[str, str, str]]:
    """Files of two sides that one authority signed, and of one that another did."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True, timeout=60)

    found = {}
    for authority, sides in (("ca", ("source", "target")), ("other", ("stranger",))):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
                f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem")
        for side in sides:
            (place / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
            openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={side}",
                    "-keyout", f"{side}.key", "-out", f"{side}.csr")
            openssl("x509", "-req", "-in", f"{side}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
                    "-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", f"{side}.pem")
            found[side] = (str(place / f"{side}.pem"), str(place / f"{side}.key"), str(place / f"{authority}.pem"))
    return found


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_tls_takes_those_whom_the_authority_signed(tmp_path):
    files = certificates(tmp_path)
    results: list[object] = []

    def serve(sock: socket.socket) -> None:
        try:
            peer = take(sock, files["target"], timeout=20)
            results.append(peer.read(5))
            peer.close()
        except HvError as error:
            results.append(error)

    def attempt(who: tuple[str, str, str] | None) -> object:
        results.clear()
        sock = listen("tls:127.0.0.1:" + str(port()), files["target"])
        thread = threading.Thread(target=serve, args=(sock,))
        thread.start()
        try:
            at = sock.getsockname()[1]
            if who is None:
                with socket.create_connection(("127.0.0.1", at), 10) as plain:
                    plain.sendall(frame(wire.HELLO))
                    plain.recv(100)
            else:
                ours = connect(f"tls:127.0.0.1:{at}", who)
                try:
                    ours.send(wire.GO)
                    ours.receive(wire.DONE)
                finally:
                    ours.close()
        except (HvError, ConnectionResetError) as error:
            return error
        finally:
            thread.join(20)
            sock.close()
        return None

    assert "hung up" in str(attempt(files["source"])) and results == [frame(wire.GO)[:5]]
    assert isinstance(attempt(files["stranger"]), HvError) and isinstance(results[0], HvError)
    # one whose own certificate is good, and who trusts another authority
    assert "verify failed" in str(attempt((*files["source"][:2], files["stranger"][2])))
    attempt(None)
    assert isinstance(results[0], HvError)


def port() -> int:
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        number: int = test.getsockname()[1]
        return number
