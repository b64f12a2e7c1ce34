"""The control socket without a VM: names, dead sockets, the protocol, and clients that misbehave."""

from __future__ import annotations

import gc
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.control import Host, Line

from hv.errors import ConfigError
from hv.machine.control_client import LINE_MOST, OUT_MOST
from hv.machine.control_names import check_name, remove_dead
from hv.machine.control_server import CLIENTS_MOST


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(str(tmp_path / "vm.sock")) as made:
        yield made


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns at nearly every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def connect(host: Host) -> Line:
    return Line(host.control.path)


# names and places -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a", "vm-17", "A.b_c-9", "_x", "x" * 64])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a b", "a\n", "é", "x" * 65, "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


def test_the_socket_is_private_and_goes_with_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    old = os.umask(0)
    try:
        with Host(str(path)):
            mode = path.lstat().st_mode
            assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
            assert [file.name for file in tmp_path.iterdir()] == ["vm.sock"]
    finally:
        os.umask(old)
    assert not list(tmp_path.iterdir())


def test_a_living_name_is_refused_and_left_alone(host: Host) -> None:
    with pytest.raises(ConfigError, match="running"):
        Host(host.control.path)
    with connect(host) as line:
        assert line.ask("echo")["ok"] is True
    assert len(os.listdir(os.path.dirname(host.control.path))) == 1


def test_a_dead_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "vm.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    with Host(path) as host, connect(host) as line:
        assert line.ask("echo")["ok"] is True


def test_only_dead_sockets_are_removed(tmp_path: Path, host: Host) -> None:
    file = tmp_path / "file.sock"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="another file"):
        Host(str(file))
    (tmp_path / "link.sock").symlink_to(file)
    assert not remove_dead(str(file)) and not remove_dead(host.control.path)
    assert not remove_dead(str(tmp_path / "link.sock"))
    assert file.read_text() == "precious" and os.path.exists(host.control.path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert remove_dead(str(tmp_path / "dead.sock"))
    assert not (tmp_path / "dead.sock").exists()


def test_one_of_many_gets_a_dead_name(tmp_path: Path, hasty: None) -> None:
    path = str(tmp_path / "vm.sock")
    for _ in range(40):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        hosts: list[Host] = []
        refused: list[ConfigError] = []
        start = threading.Barrier(6)

        def make(hosts: list[Host] = hosts, refused: list[ConfigError] = refused,
                 start: threading.Barrier = start) -> None:
            start.wait(10)
            try:
                hosts.append(Host(path))
            except ConfigError as error:
                refused.append(error)

        threads = [threading.Thread(target=make) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert (len(hosts), len(refused)) == (1, 5)
        with connect(hosts[0]) as line:
            assert line.ask("echo")["ok"] is True
        hosts[0].close()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["{}/no/such/folder/vm.sock", "{}/" + "x" * 100, "/proc/vm.sock"])
def test_a_place_that_can_not_be_had_is_one_line(tmp_path: Path, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        Host(path.format(tmp_path))
    assert "\n" not in str(caught.value) and caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == before


# requests ---------------------------------------------------------------------------------------------

def test_fields_arrive_and_the_id_comes_back(host: Host) -> None:
    with connect(host) as line:
        reply = line.ask("echo", id="x1", text="é\n", number=-7, share=2, flag=True)
        assert reply == {"id": "x1", "ok": True, "text": "é\n", "number": -7, "share": 2, "flag": True}
        assert line.ask("echo", id=5)["id"] == 5
        assert line.ask("echo")["id"] is None


@pytest.mark.parametrize(("sent", "error"), [
    (b"nonsense", "no JSON"), (b"{", "no JSON"), (b"\xff\xfe", "no JSON"), (b"[1]", "no object"), (b"7", "no object"),
    (b"[" * 60000, "no JSON"), (b'{"id": ' + b"9" * 5000 + b"}", "no JSON"), (b'{"a": 1} x', "follows"),
    (b"{}", "no command"), (b'{"command": 7}', "unknown command 7"), (b'{"command": "x"}', "unknown command 'x'"),
    (b'{"command": "echo", "color": 1}', "unknown field 'color'"),
    (b'{"command": "echo", "call": 1}', "unknown field 'call'"),
    (b'{"command": "echo", "text": 1}', "text is not a string"),
    (b'{"command": "echo", "text": null}', "text is not a string"),
    (b'{"command": "echo", "number": true}', "number is not a whole number"),
    (b'{"command": "echo", "number": 1.5}', "number is not a whole number"),
    (b'{"command": "echo", "share": "1"}', "share is not a number"),
    (b'{"command": "echo", "flag": 0}', "flag is not true or false"),
    (b'{"command": "bug"}', "field 'needed' is missing"), (b'{"command": "bug", "needed": "x"}', "IndexError"),
    (b'{"command": "echo", "id": {"a": 1}}', "id is neither"), (b'{"command": "echo", "id": true}', None),
    (b'{"command": "echo", "id": "' + b"x" * 200 + b'"}', "id is neither"),
    (b'{"command": "echo", "id": 99999999999999999999}', "id is neither"),
    (b'{"command": "echo", "id": NaN}', "id is neither"),
])
def test_a_bad_request_is_told_and_harms_nobody(host: Host, sent: bytes, error: str | None) -> None:
    with connect(host) as line:
        line.send(sent + b"\n")
        reply = line.read()
        if error is not None:
            assert reply["ok"] is False and error in reply["error"] and "\n" not in reply["error"], reply
        assert line.ask("echo", text="still there")["text"] == "still there"


def test_an_error_of_ours_says_what_to_do(host: Host) -> None:
    with connect(host) as line:
        assert line.ask("fails", id=1) == {"id": 1, "ok": False, "error": "not now", "hint": "try later"}


def test_too_long_a_line_ends_the_connection(host: Host) -> None:
    with connect(host) as line, connect(host) as other:
        line.send(b'{"command": "echo", "text": "' + b"x" * LINE_MOST)
        assert "more than 65536 bytes" in line.read()["error"]
        assert line.ended()
        assert other.ask("echo")["ok"] is True


def test_a_line_of_just_the_length_is_served(host: Host) -> None:
    head, tail = b'{"command": "echo", "text": "', b'"}'
    with connect(host) as line:
        line.send(head + b"x" * (LINE_MOST - len(head) - len(tail)) + tail + b"\n")
        assert line.read()["ok"] is True


def test_half_a_line_and_silence_harm_nobody(host: Host) -> None:
    with connect(host) as silent, connect(host) as half, connect(host) as line:
        half.send(b'{"command": ')
        for _ in range(3):
            assert line.ask("echo")["ok"] is True
        half.send(b'"echo"}\n')
        assert half.read()["ok"] is True
        assert silent.ask("echo")["ok"] is True


def test_many_requests_at_once_are_answered_in_order(host: Host) -> None:
    with connect(host) as line:
        lines = b"".join(b'{"id": %d, "command": "echo"}\n\n' % number for number in range(3000))
        sender = threading.Thread(target=lambda: line.send(lines))
        sender.start()
        assert [line.read()["id"] for _ in range(3000)] == list(range(3000))
        sender.join(10)


def test_who_does_not_read_is_not_read_from(host: Host) -> None:
    text = b'{"command": "echo", "text": "' + b"x" * 60000 + b'"}\n'
    with connect(host) as line, connect(host) as other:
        line.socket.settimeout(1)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 << 20:
                sent += line.socket.send(text[sent % len(text):])
        (greedy,) = [client for client in host.control._server.clients if client._out]  # type: ignore[union-attr]
        assert OUT_MOST < len(greedy._out) < OUT_MOST + 2 * LINE_MOST and len(greedy._in) < 4 * LINE_MOST
        assert other.ask("echo")["ok"] is True
        line.socket.settimeout(10)
        for _ in range(sent // len(text)):      # and when it reads, it gets all of them
            assert len(line.read()["text"]) == 60000
    with connect(host) as line:
        assert line.ask("echo")["ok"] is True


def test_small_requests_with_large_replies_wait_too(host: Host) -> None:
    with connect(host) as line, connect(host) as other:
        line.send(b'{"command":"help"}\n' * 3400)
        deadline = time.monotonic() + 10

        def waiting() -> int:
            assert other.ask("echo")["ok"] is True and time.monotonic() < deadline
            return max(len(client._out) for client in host.control._server.clients)     # type: ignore[union-attr]

        while waiting() < OUT_MOST:
            pass
        time.sleep(0.3)
        assert OUT_MOST < waiting() < OUT_MOST + 10000
        assert all(line.read()["ok"] for _ in range(3400))


def test_who_has_no_more_to_say_still_gets_the_replies(host: Host) -> None:
    with connect(host) as line:
        line.send(b'{"id": 1, "command": "steps", "count": 2}\n{"id": 2, "command": "echo"}')
        line.socket.shutdown(socket.SHUT_WR)
        assert [line.read() for _ in range(4)] == [
            {"id": 1, "step": 0}, {"id": 1, "step": 1}, {"id": 1, "ok": True, "steps": 2},
            {"id": 2, "ok": True, "text": "", "number": None, "share": 0.5, "flag": False}]
        assert line.ended()


def test_vanishing_clients_leave_nothing(host: Host) -> None:
    with connect(host) as line:
        line.ask("echo")
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        watched = len(host.loop._handlers)
        for number in range(200):
            with connect(host) as other:
                if number % 3:
                    other.send(b'{"command": "echo"}\n' * (number % 3) + b"{" * (number % 5))
        assert line.ask("echo")["ok"] is True
        deadline = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(host.loop._handlers) == watched
        assert len(host.control._server.clients) == 1   # type: ignore[union-attr]


def test_one_client_too_many_is_told(host: Host) -> None:
    lines = [connect(host) for _ in range(CLIENTS_MOST)]
    try:
        for line in lines:
            assert line.ask("echo")["ok"] is True
        with connect(host) as extra:
            assert "64 clients" in extra.read()["error"]
            assert extra.ended()
        assert lines[-1].ask("echo")["ok"] is True
    finally:
        for line in lines:
            line.socket.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's process")
def test_another_user_is_turned_away(host: Host) -> None:
    os.chmod(host.control.path, 0o666)
    for folder in Path(host.control.path).parents[:-2]:     # all but /tmp and /
        os.chmod(folder, 0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            with Line(host.control.path) as line:
                os.write(writer, json.dumps(line.read()).encode())
                os.write(writer, b"!" if line.ended() else b"?")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    told = os.read(reader, 4096)
    os.close(reader)
    assert b"only the VM's user" in told and told.endswith(b"!"), told
