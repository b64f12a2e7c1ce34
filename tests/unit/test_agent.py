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
from hv.sandbox.agent import GuestAgent, plain, words
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
            for line in packet.data.decode().splitlines(keepends=True):
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


STATS = "uptime=5.75 load=0.10,0.20,0.30 cpu=1,2,300,4,5,6,7,8 memory=100,50,80 processes=3"
ENTRY = "7,1,1000,250,300,8192,S,sh,sh%00-c%00a%20b%FF"


def test_a_sandbox_asks_for_several_things_at_once(guest):
    one = guest(lambda line: b"ok " + line.split()[0].encode() + b"\n")
    with GuestAgent(one.machine) as agent:
        assert agent.ask_all([("ping",), words("dir", "/a b", "755")]) == ["ping", "dir"]
        assert agent.ask_all([]) == []
        agent.network("eth0", address="10.0.0.2/24", gateway="10.0.0.1", mtu=1400, mac="02:00:00:00:00:05")
        agent.mount("tmpfs", "", "/x%y", 6, "mode=755,size=1m")
        agent.shutdown(grace=1.5)
    assert one.streams == 1
    assert one.asked == ["ping\n", "dir /a%20b 755\n", "mtu eth0 1400\n", "address eth0 10.0.0.2/24 10.0.0.1\n",
                         "mac eth0 02:00:00:00:00:05\n", "mount tmpfs - /x%25y 6 mode=755,size=1m\n",
                         "shutdown 1500 off\n"]


def test_all_are_tried_and_the_first_refusal_is_told(guest):
    one = guest(lambda line: b"ok\n" if "2" in line else b"error errno " + line.split()[1].encode() + b"\n")
    with GuestAgent(one.machine) as agent, pytest.raises(RefusedError, match="dir: errno 1"):
        agent.ask_all([("dir", "1"), ("dir", "2"), ("dir", "3")])
    assert len(one.asked) == 3


@pytest.mark.parametrize("ask", [lambda agent: agent.mount("proc", "proc", "/proc"), lambda agent: agent.kill(5, 9),
                                 lambda agent: agent.ask_all([("dir", "/a", "755")]), lambda agent: agent.shutdown(),
                                 lambda agent: agent.root("/root")])
def test_what_must_not_be_done_twice_is_asked_once(guest, ask):
    one = guest(lambda line: None)
    with GuestAgent(one.machine) as agent, pytest.raises(NoAgentError):
        ask(agent)
    assert len(one.asked) == 1


def test_statistics_and_processes(guest):
    lists = {"ps 0\n": f"ok {ENTRY} +\n", "ps 7\n": "ok 9,7,0,0,5,0,Z,a%2Cb,\n", "stats\n": f"ok {STATS}\n"}
    with GuestAgent(guest(lambda line: lists[line].encode()).machine) as agent:
        about = agent.stats()
        first, second = agent.processes()
    assert about.uptime == 5.75 and about.load == (0.1, 0.2, 0.3) and about.processes == 3
    assert (about.cpu_user, about.cpu_system, about.cpu_idle) == (0.03, 3.13, 0.09)
    assert (about.memory_total, about.memory_free, about.memory_available) == (102400, 51200, 81920)
    assert (first.pid, first.ppid, first.uid, first.cpu, first.started, first.rss) == (7, 1, 1000, 2.5, 3.0, 8192)
    assert (first.state, first.name, first.command) == ("S", "sh", ["sh", "-c", "a b%FF"])
    assert (second.pid, second.state, second.name, second.command) == (9, "Z", "a,b", [])


@pytest.mark.parametrize("reply", ["", "uptime=1", STATS.replace("5.75", "x"), STATS.replace("300", "-1"),
                                   STATS.replace("100,", "9" * 30 + ","), STATS.replace("5.75", "1e5"),
                                   STATS.replace("=3", "=")])
def test_hostile_statistics(guest, reply):
    with GuestAgent(guest(lambda line: f"ok {reply}\n".encode()).machine) as agent, pytest.raises(RefusedError):
        agent.stats()


@pytest.mark.parametrize("reply", [f"{ENTRY},", ENTRY.replace("7,", "x,"), ENTRY.replace("250", ""), "+", f"{ENTRY} +"])
def test_hostile_lists_of_processes(guest, reply):
    with GuestAgent(guest(lambda line: f"ok {reply}\n".encode()).machine) as agent, pytest.raises(RefusedError):
        agent.processes()


def test_words_are_what_the_agent_reads():
    assert words("mount", "", "-", "a b", "%\n\xe4", "x-y") == ("mount", "-", "%2D", "a%20b", "%25%0A%C3%A4", "x-y")
    assert plain("a%20b%1B%25%zz%") == "a b%1B%%zz%"


def test_the_agent_is_a_small_program_that_needs_nothing():
    data = Path(guests.program("agent")).read_bytes()
    assert data[:4] == b"\x7fELF" and len(data) < 21 << 10 and os.access(guests.program("agent"), os.X_OK)
    headers = int.from_bytes(data[56:58], "little")     # ELF64: e_phnum; they stand at 64, 56 bytes each
    kinds = [int.from_bytes(data[64 + 56 * n:68 + 56 * n], "little") for n in range(headers)]
    assert PT_LOAD in kinds and not {PT_DYNAMIC, PT_INTERP}.intersection(kinds)
    assert "agent" not in guests.names()
