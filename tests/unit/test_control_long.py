"""The control socket without a VM: commands that take long, and consoles."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.control import Host, Line

from hv.machine.control_client import VIEW_MOST


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


# long commands ----------------------------------------------------------------------------------------

def test_progress_then_the_reply_while_others_are_served(host: Host) -> None:
    with connect(host) as line, connect(host) as other:
        line.send(b'{"id": 1, "command": "steps", "count": 3, "pause": 0.2}\n')
        assert line.read() == {"id": 1, "step": 0}
        start = time.monotonic()
        assert other.ask("echo")["ok"] is True
        assert time.monotonic() - start < 0.15
        assert [line.read() for _ in range(3)][-1] == {"id": 1, "ok": True, "steps": 3}


def test_hanging_up_breaks_a_long_command_off(host: Host) -> None:
    with connect(host) as line:
        line.send(b'{"command": "steps", "count": 1000000, "pause": 0.01}\n')
        line.read()
    deadline = time.monotonic() + 5
    while not host.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert host.seen == ["closed"]


def test_the_end_of_the_machine_is_told_to_who_waits(tmp_path: Path) -> None:
    with Host(str(tmp_path / "vm.sock")) as host:
        busy, waiting, idle, console = (connect(host) for _ in range(4))
        busy.send(b'{"id": 1, "command": "steps", "count": 1000000, "pause": 0.01}\n')
        busy.read()
        waiting.send(b'{"id": 2, "command": "later"}\n')
        assert idle.ask("echo")["ok"] is True
        assert console.ask("attach")["ok"] is True
        host.console.write(b"last words")
    assert host.seen == ["closed"]
    for line in iter(busy.read, None):
        if "ok" in line:
            break
    assert line == {"id": 1, "ok": False, "error": "the machine has ended"}
    assert waiting.read() == {"id": 2, "ok": True, "last": "words"}
    assert console.wait_for(b"last words") == b"last words"
    for line in (busy, waiting, idle, console):
        assert line.ended()
        line.socket.close()


# consoles ---------------------------------------------------------------------------------------------

def test_history_and_output_lack_and_repeat_nothing(host: Host, hasty: None) -> None:
    stop = threading.Event()
    printed = bytearray()

    def print_numbers() -> None:
        number = 0
        while not stop.is_set():
            text = b"%d\n" % number
            printed.extend(text)
            host.console.write(text)
            number += 1
            if number % 16 == 0:
                time.sleep(0.0001)

    thread = threading.Thread(target=print_numbers)
    thread.start()
    seen = []
    try:
        for _ in range(100):
            with connect(host) as line:
                assert line.ask("attach", history=1000)["ok"] is True
                while len(line.buffer) < 1500:
                    line.buffer += line.socket.recv(65536)
                seen.append(line.buffer)
    finally:
        stop.set()
        thread.join(10)
    assert all(text in printed for text in seen)
    assert not host.console._sinks or len(host.console._sinks) < 2


def test_several_view_and_all_type(host: Host) -> None:
    class Port:
        on_room = on_return = None
        got = b""

        def feed(self, data: bytes) -> int:
            self.got += data
            return len(data)

    port = Port()
    host.console.connect(port)  # type: ignore[arg-type]
    with connect(host) as one, connect(host) as two, connect(host) as silent:
        one.send(b'{"command": "attach"}\nab')          # what follows the request is typed already
        assert one.read()["ok"] is True
        assert two.ask("attach")["ok"] is True
        assert silent.ask("attach", types=False)["ok"] is True
        silent.send(b"never")
        two.send(b"cd\x00\xff\n")
        host.console.write(b"to all\n")
        for line in (one, two, silent):
            assert line.wait_for(b"to all\n") == b"to all\n"
        deadline = time.monotonic() + 5
        while len(port.got) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert port.got == b"abcd\x00\xff\n"


def test_a_viewer_that_does_not_read_loses_output_and_holds_up_nobody(host: Host) -> None:
    with connect(host) as slow, connect(host) as quick:
        assert slow.ask("attach")["ok"] is quick.ask("attach")["ok"] is True
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: seen.append(quick.wait_for(b"the end", 30)))
        reader.start()
        spent = 0.0
        for _ in range(1500):
            start = time.monotonic()
            host.console.write(b"x" * 1000)
            spent += time.monotonic() - start
            time.sleep(0.0003)
        assert spent < 1
        host.console.write(b"the end")
        reader.join(30)
        assert seen == [b"x" * 1500000 + b"the end"]
        clients = host.control._server.clients      # type: ignore[union-attr]
        assert max(len(client._out) for client in clients) <= VIEW_MOST + 1000
        slow.wait_for(b"too fast and are lost]\r\n")
        host.console.write(b"again")
        slow.wait_for(b"again")


def test_typing_waits_for_the_guest(host: Host) -> None:
    class Port:
        on_room = on_return = None
        room = 0
        got = 0

        def feed(self, data: bytes) -> int:
            taken = min(self.room, len(data))
            self.room -= taken
            self.got += taken
            return taken

    port = Port()
    host.console.connect(port)  # type: ignore[arg-type]
    with connect(host) as line, connect(host) as other:
        assert line.ask("attach")["ok"] is True
        line.socket.settimeout(1)
        with pytest.raises(TimeoutError):
            line.send(b"x" * (8 << 20))
        assert host.console.waiting < 256 << 10
        assert other.ask("echo")["ok"] is True
        port.room = 1 << 30
        host.console._pump()
        line.socket.settimeout(10)
        line.send(b"y" * (1 << 20))
        deadline = time.monotonic() + 5
        while host.console.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert port.got > 1 << 20
