"""The host's end of the guest's agent, on the mock driver: what a guest may answer, and when it does not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from framework.vsock import Packet, Peer

from hv import guests
from hv.devices.virtio import vsock_packet as vp
from hv.devices.virtio.vsock import EVENT
from hv.devices.virtio.vsock_config import VsockConfig
from hv.snapshot import agent as agents
from hv.snapshot.agent import Agent, NoAgentError, RefusedError
from hv.snapshot.clone import introduce

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3


class Guest:
    """An agent in a thread: `answers(line)` says what it sends back; None lets it end the stream."""

    def __init__(self, answers):
        self.device = VsockConfig(None).create()
        self.peer = Peer(self.device)
        self.answers, self.asked, self.streams = answers, [], 0
        self.machine = SimpleNamespace(devices={"vsock0": self.device}, running=lambda: True)
        self.ended = False
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        while not self.ended:
            for packet in self.peer.packets():
                self.take(packet)
            time.sleep(0.001)

    def take(self, packet: Packet) -> None:
        if packet.op == vp.OP_REQUEST:
            self.streams += 1
            listens = packet.dst_port == agents.PORT and self.answers is not None
            self.peer.answer(packet, vp.OP_RESPONSE if listens else vp.OP_RST)
        elif packet.op == vp.OP_RW:
            line = packet.data.decode()
            self.asked.append(line)
            reply = self.answers(line)
            if reply is None:
                self.peer.answer(packet, vp.OP_RST)
            elif reply:
                self.peer.answer(packet, vp.OP_RW, reply)

    def close(self):
        self.ended = True
        self.thread.join(10)
        self.peer.close()


@pytest.fixture
def guest():
    made = []

    def make(answers):
        made.append(Guest(answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_requests_and_replies(guest):
    one = guest(lambda line: b"ok pyhv-agent 1 ping time\n" if line == "ping\n" else b"ok\n")
    with Agent(one.machine) as agent:
        assert agent.version() == ("1", ["ping", "time"])
        assert agent.ask("hostname", "web-3") == ""
    assert one.asked == ["ping\n", "hostname web-3\n"] and one.streams == 1


@pytest.mark.parametrize("reply", [b"ok\n", b"ok pyhv-agent 2 ping\n", b"ok other 1\n"])
def test_another_protocol_is_told(guest, reply):
    with Agent(guest(lambda line: reply).machine) as agent, pytest.raises(NoAgentError, match="no agent of ours"):
        agent.version()


@pytest.mark.parametrize(("reply", "text"), [
    (b"error no such network card\n", "mac: no such network card"), (b"\n", "mac: "), (b"what\n", "mac: what"),
    (b"error \x1b[2J\xff\x00\n", r"mac: \?\[2J\?\?"), (b"x" * 5000, "more than 4096 bytes"),
])
def test_what_it_refuses(guest, reply, text):
    with Agent(guest(lambda line: reply).machine) as agent, pytest.raises(RefusedError, match=text):
        agent.ask("mac", "a", "b")


@pytest.mark.parametrize("words", [("a b",), ("",), ("a\nb",), ("ä",), ("x" * 5000,)])
def test_what_is_no_request_is_not_sent(guest, words):
    one = guest(lambda line: b"ok\n")
    with Agent(one.machine) as agent, pytest.raises(RefusedError, match="is no request"):
        agent.ask(*words)
    assert not one.asked


def test_a_stream_that_breaks_is_opened_again(guest):
    replies = iter([None, None, b"ok done\n"])
    one = guest(lambda line: next(replies))
    with Agent(one.machine) as agent:
        assert agent.ask("ping") == "done"
    assert one.asked == ["ping\n"] * 3 and one.streams == 3


def test_nobody_listens(guest):
    one = guest(None)
    started = time.monotonic()
    with Agent(one.machine) as agent, pytest.raises(NoAgentError, match="has no agent") as caught:
        agent.ask("ping")
    assert "--agent" in caught.value.hint and one.streams == agents.REFUSALS_MOST
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("reply", [b"", b"ok but the line does not end"])
def test_one_that_says_nothing_is_not_waited_for(guest, reply):
    started = time.monotonic()
    with Agent(guest(lambda line: reply).machine) as agent, pytest.raises(NoAgentError, match="does not answer"):
        agent.ask("ping", timeout=0.3)
    assert 0.25 < time.monotonic() - started < 2


def test_a_machine_without_the_device():
    with pytest.raises(NoAgentError, match="no vsock device"):
        Agent(SimpleNamespace(devices={}))


def test_new_streams_wait_until_the_guest_knows_that_the_old_ones_are_lost():
    peer = Peer(VsockConfig(None).create())
    device = peer.device
    ring = peer.driver.rings[EVENT]
    for _ in range(2):
        ring.add([], [8])
    peer.driver.notify(EVENT)
    peer.loop.run()
    assert device.reset_taken
    device.stop()
    device.load(device.state())
    assert not device.reset_taken, "it is not told yet"
    device.resume()
    peer.loop.run()
    assert [parts[0][:4] for _, _, parts in ring.take()] == [bytes(4)] and not device.reset_taken, "told, not taken in"
    ring.add([], [8])
    assert device.reset_taken
    peer.close()


def test_introducing_goes_on_after_a_refusal_and_says_what_was_not_done(guest):
    replies = {"entropy": b"error RNDADDENTROPY: errno 1\n", "time": b"ok\n", "hostname\n": b"ok (none)\n"}
    one = guest(lambda line: replies.get(line, replies.get(line.split()[0], b"ok\n")))
    told = introduce(one.machine, 3, address="10.0.0.3/24")
    assert told.agent and told.done == ["time", "hostname"]
    assert "errno 1" in told.failed["entropy"] and told.failed["address"] == "the machine has no network card"
    assert [line for line in one.asked if line.startswith("hostname")] == ["hostname\n", "hostname guest-3\n"]
    seconds, _, nanos = next(line for line in one.asked if line.startswith("time")).split()[1].partition(".")
    assert abs(int(seconds) - time.time()) < 30 and len(nanos) == 9
    assert len({line for line in one.asked if line.startswith("entropy")}) == 1
    assert all(len(line) == len("entropy \n") + 128 for line in one.asked if line.startswith("entropy"))


def test_a_guests_name_is_cut_where_it_would_be_too_long(guest):
    one = guest(lambda line: b"ok " + b"n" * 64 + b"\n" if line == "hostname\n" else b"ok\n")
    introduce(one.machine, 12, clock=False)
    assert one.asked[-1] == f"hostname {'n' * 61}-12\n" and not any(line.startswith("time") for line in one.asked)


def test_introducing_a_guest_without_an_agent_is_no_error(guest):
    told = introduce(guest(None).machine, 0)
    assert not told.agent and not told.done and "has no agent" in told.failed["agent"]


def test_the_agent_is_a_small_program_that_needs_nothing():
    data = Path(guests.program("agent")).read_bytes()
    assert data[:4] == b"\x7fELF" and len(data) < 21 << 10 and os.access(guests.program("agent"), os.X_OK)
    headers = int.from_bytes(data[56:58], "little")     # ELF64: e_phnum; they stand at 64, 56 bytes each
    kinds = [int.from_bytes(data[64 + 56 * n:68 + 56 * n], "little") for n in range(headers)]
    assert PT_LOAD in kinds and not {PT_DYNAMIC, PT_INTERP}.intersection(kinds)
    assert "agent" not in guests.names()
