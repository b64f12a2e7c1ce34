"""The host's end of a guest's process: what a hostile guest may send, and what becomes of data on its way."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from _thread import allocate_lock
from types import SimpleNamespace

import pytest

from hv.errors import ConfigError, HvError
from hv.machine.loop import Loop
from hv.sandbox import frames
from hv.sandbox import process as processes
from hv.sandbox.frames import FrameError, ProcessSpec, frame
from hv.sandbox.process import GuestProcess, StartError

P = frame(b"P", struct.pack("<I", 77))
X0 = frame(b"X", struct.pack("<II", 0, 0))


class Agent:
    """A device whose guest is this test: `peer` is the guest's end of the stream."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.io = self.loop
        self.lock = allocate_lock()
        self.peer: socket.socket | None = None
        self.refuses = False

    def open_for_host(self, sock: socket.socket, port: int) -> None:
        assert port == 2
        if self.refuses:
            sock.close()
            return
        sock.setblocking(True)
        sock.settimeout(10)
        self.peer = sock
        sock.send(b"OK 1073741824\n")

    def start(self, **options: object) -> GuestProcess:
        self.process = GuestProcess.start(self, ProcessSpec(["x"]), loop=self.loop, **options)   # type: ignore
        self.serve(lambda: self.peer is not None or self.refuses)
        return self.process

    def serve(self, done, timeout: float = 10) -> None:
        assert self.loop.run_until(lambda: bool(done()), timeout)

    def for_a_while(self, seconds: float = 0.05) -> None:
        self.loop.run_until(lambda: False, seconds)

    def sends(self, *parts: bytes) -> None:
        for part in parts:
            self.peer.sendall(part)

    def got(self, kind: bytes) -> bytes:
        """What is in the next frame that the host sent of this kind; others are passed over."""
        while True:
            head = self.read(8)
            body = self.read(int.from_bytes(head[4:], "little"))
            assert head[1:4] == bytes(3)
            if head[:1] == kind:
                return body

    def read(self, size: int) -> bytes:
        data = b""
        end = time.monotonic() + 10
        self.peer.setblocking(False)
        while len(data) < size:
            assert time.monotonic() < end, "the host sends too little"
            self.loop.run_until(lambda: False, 0.001)
            try:
                part = self.peer.recv(size - len(data))
            except BlockingIOError:
                continue
            assert part, "the host hung up"
            data += part
        self.peer.setblocking(True)
        return data


@pytest.fixture
def agent():
    before = set(os.listdir("/proc/self/fd"))
    made = Agent()
    yield made
    made.process.close()
    made.for_a_while(0.01)
    assert made.process.ended
    if made.peer is not None:
        made.peer.close()
    made.loop.close()
    assert set(os.listdir("/proc/self/fd")) <= before, "a descriptor is left"


@pytest.fixture
def pipe():
    made = []

    def make():
        made.append(os.pipe())
        os.set_blocking(made[-1][0], False)
        return made[-1]

    yield make
    for pair in made:
        for fd in pair:
            try:
                os.close(fd)
            except OSError:
                pass


def test_a_process_from_start_to_end(agent, pipe):
    out, err = pipe(), pipe()
    told = []
    one = agent.start(stdout=out[1], stderr=err[1], on_start=lambda p: told.append(("start", p.pid)),
                      on_exit=lambda p: told.append(("exit", p.status)), on_end=lambda p: told.append(("end", p.ended)))
    records = agent.got(b"S")
    assert records == b"a\x01\0\0\0x" and agent.got(b"G") == b"" and agent.got(b"i") == b""
    agent.sends(P)
    assert one.wait_started(5) == 77 and one.status is None
    agent.sends(frame(b"O", b"out"), frame(b"R", b"err"), frame(b"X", struct.pack("<II", 0, 9)), frame(b"O", b"put"))
    assert one.wait(5) == ("exit", 9) and not one.ended
    agent.peer.close()
    assert one.wait_end(5) == ("exit", 9) and one.error is None
    assert os.read(out[0], 100) == b"output" and os.read(err[0], 100) == b"err"
    assert told == [("start", 77), ("exit", ("exit", 9)), ("end", True)]


def test_frames_in_single_bytes(agent, pipe):
    out = pipe()
    one = agent.start(stdout=out[1])
    for byte in P + frame(b"O", b"ab") + frame(b"X", struct.pack("<II", 1, 15)):
        agent.sends(bytes((byte,)))
        agent.for_a_while(0.001)
    assert one.wait(5) == ("signal", 15) and os.read(out[0], 9) == b"ab"


def test_one_that_can_not_start(agent):
    one = agent.start()
    agent.sends(frame(b"E", struct.pack("<I", 2) + b"exec \x1b[2J/nope\xff"))
    agent.peer.close()
    with pytest.raises(StartError, match=r"exec \?\[2J/nope\?: No such file or directory \(ENOENT\)") as caught:
        one.wait(5)
    assert caught.value.errno == 2 and one.status is None and not one.pid
    with pytest.raises(StartError):
        one.wait_started(5)
    with pytest.raises(StartError):
        one.wait_end(5)


HOSTILE = {
    "unknown kind": [frame(b"Z", b"")],
    "not zero": [b"P\x01\0\0" + P[4:]],
    "too long": [b"O\0\0\0" + struct.pack("<I", frames.FRAME_MOST + 1)],
    "4 GiB": [P, b"O\0\0\0\xff\xff\xff\xff"],
    "empty output": [P, frame(b"O")],
    "short P": [frame(b"P", b"abc")],
    "pid 0": [frame(b"P", bytes(4))], "pid 1": [frame(b"P", struct.pack("<I", 1))],
    "pid of 2^31": [frame(b"P", struct.pack("<I", 1 << 31))],
    "errno 0": [frame(b"E", bytes(4))], "errno 5000": [frame(b"E", struct.pack("<I", 5000))],
    "long E": [frame(b"E", bytes(600))],
    "twice P": [P, P], "E behind P": [P, frame(b"E", struct.pack("<I", 2))],
    "output before P": [frame(b"O", b"x")], "X before P": [X0],
    "kind 2": [P, frame(b"X", struct.pack("<II", 2, 0))], "code 256": [P, frame(b"X", struct.pack("<II", 0, 256))],
    "signal 0": [P, frame(b"X", struct.pack("<II", 1, 0))], "signal 65": [P, frame(b"X", struct.pack("<II", 1, 65))],
    "input not sent": [P, frame(b"I", struct.pack("<I", 1))],
    "input of 2^32": [P, frame(b"I", struct.pack("<I", 0xFFFFFFFF))],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_frames_break_the_stream(agent, what):
    exits = []
    one = agent.start(on_exit=exits.append)
    agent.sends(*HOSTILE[what])
    with pytest.raises(FrameError):
        one.wait(5)
    assert one.ended and one.status is None and len(exits) == 1 and "agent" in str(one.error)


@pytest.mark.parametrize("late", [X0, P, frame(b"I", struct.pack("<I", 0)), frame(b"E", struct.pack("<I", 2))])
def test_nothing_but_output_comes_behind_the_end(agent, late):
    one = agent.start()
    agent.sends(P, X0, late)
    agent.serve(lambda: one.ended)
    assert one.status == ("exit", 0) and isinstance(one.error, FrameError)


def test_frames_behind_a_failure(agent):
    one = agent.start()
    agent.sends(frame(b"E", struct.pack("<I", 2)), frame(b"O", b"x"))
    agent.serve(lambda: one.ended)
    assert isinstance(one.error, StartError)


@pytest.mark.parametrize("sent", [b"", P, P + b"O\0\0\0", P + frame(b"O", b"12345678")[:-1]])
def test_a_stream_that_ends_early_is_an_error(agent, sent):
    one = agent.start()
    agent.sends(sent)
    agent.peer.close()
    with pytest.raises(HvError, match="agent"):
        one.wait_end(5)
    assert one.ended


def test_nobody_takes_the_stream(agent):
    agent.refuses = True
    one = agent.start()
    with pytest.raises(HvError, match="takes no process"):
        one.wait_started(5)
    assert one.ended


def test_waits_are_bounded(agent):
    one = agent.start()
    began = time.monotonic()
    for wait in (one.wait_started, one.wait, one.wait_end):
        with pytest.raises(TimeoutError):
            wait(0.1)
    assert time.monotonic() - began < 2


def test_a_greeting_that_is_none(agent):
    agent.open_for_host = lambda sock, port: (setattr(agent, "peer", sock), sock.send(b"x" * 100))
    one = agent.start()
    with pytest.raises(FrameError, match="no greeting"):
        one.wait(5)


def test_output_that_nobody_takes_is_not_read_from_the_guest(agent, pipe):
    out = pipe()
    one = agent.start(stdout=out[1])
    agent.sends(P)
    one.wait_started(5)
    block = os.urandom(frames.FRAME_MOST)
    sent = 0
    agent.peer.setblocking(False)
    rest = memoryview(frame(b"O", block) * 32)
    for _ in range(400):
        try:
            count = agent.peer.send(rest[sent:])
            sent += count
        except BlockingIOError:
            pass
        agent.for_a_while(0.0005)
    assert sent < 1 << 20, "held: a pipe, a frame, what the sockets take"
    held = sent
    got = bytearray()
    end = time.monotonic() + 20
    while len(got) < 32 * len(block) and time.monotonic() < end:
        agent.for_a_while(0.0005)
        try:
            got += os.read(out[0], 1 << 16)
        except BlockingIOError:
            pass
        try:
            if sent < len(rest):
                sent += agent.peer.send(rest[sent:])
        except BlockingIOError:
            pass
    assert held < sent == len(rest) and bytes(got) == block * 32


def test_a_reader_that_goes_is_told_to_the_guest(agent, pipe):
    out, err = pipe(), pipe()
    one = agent.start(stdout=out[1], stderr=err[1])
    os.close(out[0])
    agent.sends(P, frame(b"O", b"x"), frame(b"O", b"y"), frame(b"R", b"z"))
    assert agent.got(b"o") == struct.pack("<I", 1)
    agent.serve(lambda: one.pid)
    agent.sends(X0)
    assert one.wait(5) == ("exit", 0) and os.read(err[0], 9) == b"z"


def test_input_waits_for_the_guest_to_take_it(agent, pipe):
    into = pipe()
    one = agent.start(stdin=into[0])
    data = os.urandom(300_000)

    def write():
        with os.fdopen(os.dup(into[1]), "wb") as pipe_end:
            pipe_end.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    agent.for_a_while()
    agent.got(b"G")
    agent.sends(P)
    one.wait_started(5)
    got, credit = b"", frames.WINDOW
    while len(got) < len(data):
        part = agent.got(b"I")
        credit -= len(part)
        assert credit >= 0, "more than the window"
        got += part
        if not credit:
            agent.for_a_while()
            agent.peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                agent.peer.recv(1)
            agent.peer.setblocking(True)
            agent.sends(frame(b"I", struct.pack("<I", frames.WINDOW)))
            credit = frames.WINDOW
    writer.join(10)
    assert got == data
    os.close(into[1])
    assert agent.got(b"i") == b""


def test_signals_and_sizes_come_from_any_thread(agent):
    one = agent.start()
    agent.sends(P)
    one.wait_started(5)
    thread = threading.Thread(target=lambda: (one.signal(15), one.resize(40, 132)))
    thread.start()
    assert agent.got(b"K") == struct.pack("<I", 15) and agent.got(b"W") == struct.pack("<HH", 40, 132)
    thread.join(10)


def test_signals_that_a_stuck_guest_does_not_take_are_bounded(agent, monkeypatch):
    monkeypatch.setattr(processes, "OUTGOING_MOST", 1 << 16)
    one = agent.start()
    agent.sends(P)
    one.wait_started(5)
    for _ in range(40_000):
        one.signal(10)
    with pytest.raises(FrameError, match="takes nothing"):
        one.wait(20)


def test_a_file_is_read_and_written(agent, tmp_path):
    (tmp_path / "in").write_bytes(b"some input")
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "ab") as target:
        target.write(b"before ")
        target.flush()
        one = agent.start(stdin=source.fileno(), stdout=target.fileno())
        agent.sends(P, frame(b"O", b"some output"))
        assert agent.got(b"I") == b"some input" and agent.got(b"i") == b""
        agent.sends(X0)
        agent.peer.close()
        one.wait_end(5)
    assert (tmp_path / "out").read_bytes() == b"before some output"


def test_descriptors_of_others_are_not_changed(agent, pipe):
    into, out = pipe(), pipe()
    pair = socket.socketpair()
    os.set_blocking(into[0], True)
    agent.start(stdin=into[0], stdout=out[1], stderr=pair[0].fileno())
    agent.sends(P, frame(b"R", b"by a socket"), frame(b"O", b"by a pipe"))
    agent.serve(lambda: agent.process.pid)
    agent.for_a_while()
    assert os.get_blocking(into[0]) and os.get_blocking(out[1]) and pair[0].getblocking()
    assert pair[1].recv(99) == b"by a socket" and os.read(out[0], 99) == b"by a pipe"
    for one in pair:
        one.close()


def test_attaching_takes_what_the_agent_has_room_for(agent, pipe):
    into = pipe()
    agent.process = one = GuestProcess.attach(agent, 77, stdin=into[0], loop=agent.loop)     # type: ignore[arg-type]
    os.write(into[1], b"abcdef")
    agent.serve(lambda: agent.peer)
    assert agent.got(b"A") == struct.pack("<I", 77)
    one.signal(12)
    agent.for_a_while()
    with pytest.raises(BlockingIOError):        # not before the agent has answered
        agent.peer.recv(1, socket.MSG_DONTWAIT)
    agent.sends(P)
    one.wait_started(5)
    assert agent.got(b"K") == struct.pack("<I", 12)
    agent.for_a_while()
    agent.sends(frame(b"I", struct.pack("<I", 4)))
    assert agent.got(b"I") == b"abcd"


def test_nothing_is_opened_where_the_spec_is_none():
    device = SimpleNamespace(io=None)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError):
        GuestProcess.start(device, ProcessSpec([]), loop=None)      # type: ignore[arg-type]
    with pytest.raises(OSError):
        GuestProcess.start(device, ProcessSpec(["x"]), loop=None, stdin=0, stdout=9999)      # type: ignore[arg-type]
    assert os.listdir("/proc/self/fd") == before
