"""The talk with systemd where it goes wrong, with a peer of our own; tests/root has the real one."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import pytest

jeepney = pytest.importorskip("jeepney")

from hv.container.cgroups import bus as module  # noqa: E402
from hv.container.cgroups.bus import Bus, BusError, outer_uid  # noqa: E402
from hv.errors import ConfigError, HvError  # noqa: E402

JOB = "/org/freedesktop/systemd1/job/7"


class Peer:
    """Listens at `path`. `answers`: method -> a function of the message's body that gives what to send: replies as
    (signature, body), errors as BusError, signals of a job's end as (job, result, None), or bytes as they are."""

    def __init__(self, path: Path, answers: dict, greeting: bytes = b"OK 0123\r\n") -> None:
        self.answers, self.greeting = answers, greeting
        self.calls: list[tuple[str, tuple]] = []
        self.said = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        end, _ = self._listener.accept()
        try:
            self._talk(end)
        except ConnectionError:
            pass                    # the other side has heard enough

    def _talk(self, end: socket.socket) -> None:
        with end:
            while not self.said.endswith(b"BEGIN\r\n"):
                self.said += end.recv(1)
            end.sendall(self.greeting)
            parser = jeepney.Parser()
            while data := end.recv(4096):
                parser.add_data(data)
                while message := parser.get_next_message():
                    self._answer(end, message)

    def _answer(self, end: socket.socket, message) -> None:
        method = message.header.fields[jeepney.HeaderFields.member]
        self.calls.append((method, message.body))
        for serial, row in enumerate(self.answers.get(method, lambda *body: [("", ())])(*message.body), 1):
            if isinstance(row, bytes):
                end.sendall(row)
                continue
            if isinstance(row, BusError):
                reply = jeepney.new_error(message, f"org.freedesktop.systemd1.{row.name}", "s", (str(row)[9:],))
            elif len(row) == 3:
                reply = jeepney.new_signal(jeepney.DBusAddress("/o", interface="a.b"), "JobRemoved", "uoss",
                                           (7, row[0], "x", row[1]))
            else:
                reply = jeepney.new_method_return(message, *row)
            end.sendall(reply.serialise(serial=serial))

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def peer(tmp_path, monkeypatch):
    made = []

    def listen(answers=None, *, daemon=False, **more) -> Peer:
        path = tmp_path / f"{len(made)}"
        monkeypatch.setattr(module, "addresses", lambda user: [(str(path), daemon)])
        made.append(Peer(path, answers or {}, **more))
        return made[-1]

    yield listen
    for one in made:
        one.close()


def test_who_we_are_is_said_at_once(peer):
    there = peer()
    Bus(False).close()
    assert there.said == b"\0AUTH EXTERNAL " + str(outer_uid()).encode().hex().encode() + b"\r\nBEGIN\r\n"


@pytest.mark.parametrize("rows", [[(JOB, "done", None), ("o", (JOB,))],
                                  [("o", (JOB,)), ("/other", "failed", None), (JOB, "done", None)]])
def test_a_unit_is_started_when_its_job_has_ended(peer, rows):
    there = peer({"StartTransientUnit": lambda *body: rows})
    with Bus(False) as bus:
        bus.start("a.scope", [("PIDs", ("au", [7])), ("Delegate", ("b", True)),
                              ("DeviceAllow", ("a(ss)", [("a", "r")])), ("AllowedCPUs", ("ay", b"\3"))])
    (method, body), = there.calls
    assert method == "StartTransientUnit" and body[:2] == ("a.scope", "replace") and body[3] == []
    assert body[2][:2] == [("PIDs", ("au", [7])), ("Delegate", ("b", True))]


def test_a_job_that_fails_is_told(peer):
    peer({"StartTransientUnit": lambda *body: [("o", (JOB,)), (JOB, "failed", None)]})
    with Bus(False) as bus, pytest.raises(HvError, match=r"systemd did not start a\.scope: failed"):
        bus.start("a.scope", [])


def test_errors_have_their_name_and_one_line(peer):
    peer({"GetUnit": lambda *body: [BusError("x.NoSuchUnit", "Unit a\n not loaded.")],
          "ResetFailedUnit": lambda *body: [BusError("x.NoSuchUnit", "")],
          "StopUnit": lambda *body: [BusError("x.NoSuchUnit", "")],
          "SetUnitProperties": lambda *body: [BusError("x.InvalidArgs", "Value out of\nrange")]})
    with Bus(False) as bus:
        assert bus.unit_state("a.scope") == ""
        bus.stop("a.scope")
        with pytest.raises(BusError, match=r"^systemd: Value out of range$") as caught:
            bus.change("a.scope", [])
        assert caught.value.name == "InvalidArgs"


def test_a_bus_daemon_is_greeted_and_asked_to_pass_on(peer):
    there = peer({"Get": lambda *body: [("v", (("s", "252"),))]}, daemon=True)
    with Bus(False) as bus:
        assert bus.property("Version") == "252"
    assert [method for method, _ in there.calls] == ["Hello", "AddMatch", "Subscribe", "Get"]


def test_the_second_address_is_tried(peer, tmp_path, monkeypatch):
    peer()
    monkeypatch.setattr(module, "addresses", lambda user: [(str(tmp_path / leaf), False) for leaf in ("absent", "0")])
    Bus(True).close()


@pytest.mark.parametrize("greeting, why", [(b"REJECTED EXTERNAL\r\n", "does not know us"), (b"x" * 5000, "hung up")])
def test_it_does_not_know_us(peer, greeting, why):
    peer(greeting=greeting)
    with pytest.raises(HvError, match=f"--systemd-cgroup: systemd can't be reached: .*{why}") as caught:
        Bus(False)
    assert "cgroupfs" in caught.value.hint


def test_nobody_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "addresses", lambda user: [(str(tmp_path / "absent"), False)])
    with pytest.raises(HvError, match=r"systemd \(of this user\) can't be reached: .*absent: No such file"):
        Bus(True)


def test_no_answer_in_time(peer, monkeypatch):
    peer({"Get": lambda *body: []})
    monkeypatch.setattr(module, "_REPLY_SECONDS", 0.2)
    with Bus(False) as bus, pytest.raises(HvError, match="systemd does not answer: Get"):
        bus.property("Version")


def test_no_end_of_a_job_in_time(peer, monkeypatch):
    peer({"StartTransientUnit": lambda *body: [("o", (JOB,))]})
    monkeypatch.setattr(module, "_JOB_SECONDS", 0.2)
    with Bus(False) as bus, pytest.raises(HvError, match="systemd does not answer: a unit's job"):
        bus.start("a.scope", [])


def test_it_hangs_up(tmp_path, monkeypatch):
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(Bus, "_connect", lambda bus, user: ours)
    theirs.sendall(b"")
    with Bus(False) as bus:
        theirs.close()
        with pytest.raises(HvError, match="systemd"):
            bus.property("Version")


def test_a_systemd_of_another_pid_namespace_is_not_asked(peer, monkeypatch):
    peer()
    monkeypatch.setattr(os, "readlink", lambda path: str(path))
    with pytest.raises(ConfigError, match="another pid namespace"):
        Bus(False)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "jeepney", None)
    with pytest.raises(ConfigError, match="the Python package jeepney is missing") as caught:
        Bus(False)
    assert "pip install jeepney" in caught.value.hint


def test_where_a_users_sockets_are(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert module.addresses(True) == [("/run/user/7/systemd/private", False), ("/run/user/7/bus", True)]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert module.addresses(True)[0][0] == f"/run/user/{outer_uid()}/systemd/private"
    assert module.addresses(False)[0] == ("/run/systemd/private", False)
