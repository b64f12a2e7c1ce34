"""Ports of the console device, by the mock driver and real clients: Unix sockets and files."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.console import RX1, TX1, Rig
from framework.driver import Driver

from hv.devices.virtio import console as model
from hv.devices.virtio.console import CONTROL_RX, VirtioConsole
from hv.devices.virtio.console_config import ConsoleConfig
from hv.errors import ConfigError


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Rig]:
    """One port besides the console: a socket."""
    rig = Rig(f"agent,socket={tmp_path}/agent").up()
    rig.heard()
    rig.control(0, model.PORT_READY, 1)
    rig.heard()
    yield rig
    assert not rig.device.faults, rig.device.fault_texts
    rig.close()


def connect(tmp_path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(f"{tmp_path}/agent")
    client.settimeout(5)
    return client


# sockets --------------------------------------------------------------------------------------------


def test_a_client_comes_talks_goes_and_comes_back(agent: Rig, tmp_path: Path) -> None:
    agent.control(1, model.PORT_READY, 1)
    assert agent.heard() == [(1, model.PORT_NAME, 1, b"agent")]
    agent.control(1, model.PORT_OPEN, 1)
    agent.give(RX1, 16, 4)
    for turn in range(3):
        with connect(tmp_path) as client:
            agent.poll()
            assert agent.heard() == [(1, model.PORT_OPEN, 1, b"")]
            client.sendall(b"to the guest %d" % turn)
            agent.poll()
            assert agent.read(RX1) == b"to the guest %d" % turn
            agent.give(RX1, 16)
            agent.write(TX1, b"to the ", b"client")
            assert client.recv(100) == b"to the client"
            assert len(agent.driver.rings[TX1].take()) == 2
        agent.poll()
        assert agent.heard() == [(1, model.PORT_OPEN, 0, b"")]
        agent.write(TX1, b"to nobody")
        assert len(agent.driver.rings[TX1].take()) == 1


def test_nothing_is_read_before_a_program_of_the_guest_listens(agent: Rig, tmp_path: Path) -> None:
    with connect(tmp_path) as client:
        client.sendall(b"early")
        agent.poll()
        agent.control(1, model.PORT_READY, 1)
        agent.give(RX1, 64, 2)
        agent.poll()
        assert agent.read(RX1) == b""
        agent.control(1, model.PORT_OPEN, 1)
        agent.poll()
        assert agent.read(RX1) == b"early"
        agent.control(1, model.PORT_OPEN, 0)
        client.sendall(b"later")
        agent.poll()
        assert agent.read(RX1) == b""
        agent.control(1, model.PORT_OPEN, 1)
        agent.poll()
        assert agent.read(RX1) == b"later"


def test_a_slow_guest_makes_the_client_wait_and_gets_all(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    data = os.urandom(300000)
    with connect(tmp_path) as client:
        agent.poll()
        client.setblocking(False)
        sent, seen = 0, b""
        while sent < len(data):
            try:
                sent += client.send(data[sent:sent + 8192])
            except BlockingIOError:
                agent.poll()                # without buffers there is nothing to do
                agent.give(RX1, 1000, 30)
                seen += agent.read(RX1)
        client.close()
        agent.poll()
        while part := (agent.give(RX1, 1000, 30), agent.read(RX1))[1]:
            seen += part
            agent.poll()
        assert seen == data
        agent.poll()
        assert agent.heard()[-1] == (1, model.PORT_OPEN, 0, b"")


def test_a_slow_client_makes_the_guest_wait_and_gets_all(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    data = os.urandom(1 << 20)
    with connect(tmp_path) as client:
        agent.poll()
        done = 0
        pieces = [data[at:at + 50000] for at in range(0, len(data), 50000)]
        agent.write(TX1, *pieces)           # 1 MiB in 21 buffers: more than the socket holds
        done += len(agent.driver.rings[TX1].take())
        assert done < len(pieces)
        assert 0 < agent.device.ports[1].sent < 50000 or done > 0
        seen = b""
        while len(seen) < len(data):
            seen += client.recv(30000)
            agent.poll()
        assert seen == data
        assert done + len(agent.driver.rings[TX1].take()) == len(pieces)


def test_half_closed_by_the_client_still_gets_its_answer(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    agent.give(RX1, 64, 4)
    with connect(tmp_path) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        agent.poll()
        assert agent.read(RX1) == b"question"
        agent.write(TX1, b"answer")
        assert client.recv(100) == b"answer"
        assert agent.heard() == [(1, model.PORT_OPEN, 1, b"")]
    agent.poll()
    assert agent.heard() == [(1, model.PORT_OPEN, 0, b"")]


def test_a_client_that_dies_with_output_waiting_does_not_hold_the_guest(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    client = connect(tmp_path)
    agent.poll()
    agent.write(TX1, *[bytes(60000)] * 10)
    assert len(agent.driver.rings[TX1].take()) < 10
    client.close()
    agent.poll()
    agent.driver.rings[TX1].take()
    assert agent.device.queues[TX1].pending() == 0 and agent.device.ports[1].sent == 0
    assert agent.heard()[-1] == (1, model.PORT_OPEN, 0, b"")


def test_the_next_client_waits_its_turn(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    agent.give(RX1, 64, 8)
    first, second = connect(tmp_path), connect(tmp_path)
    second.sendall(b"second")
    agent.poll()
    first.sendall(b"first")
    agent.poll()
    assert agent.read(RX1) == b"first"
    first.close()
    agent.poll()
    assert agent.read(RX1) == b"second"
    assert [message[2] for message in agent.heard()] == [1, 0, 1]
    second.close()
    agent.poll()


def test_the_guest_hears_of_the_end_before_the_next_client_comes(tmp_path: Path) -> None:
    rig = Rig(f"agent,socket={tmp_path}/agent").up(control=0)
    rig.control(1, model.PORT_READY, 1)
    rig.control(1, model.PORT_OPEN, 1)
    first = connect(tmp_path)
    rig.poll()
    rig.give(CONTROL_RX, 64, 8)
    assert rig.driver.rings[CONTROL_RX].take()[-1][2][0][:8] == struct.pack("<IHH", 1, model.PORT_OPEN, 1)
    for _ in range(4):                      # the rest of the buffers
        rig.device._owe(1, model.PORT_NAME)
        rig.device.guarded(rig.device._tell)
    rig.give(RX1, 8)
    first.close()
    second = connect(tmp_path)
    rig.poll()
    assert not rig.device.ports[1].connected
    rig.give(CONTROL_RX, 64)
    rig.poll()
    assert rig.device.ports[1].connected
    second.close()
    rig.close()


def test_hanging_up_lets_waiting_output_go(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    with connect(tmp_path):
        agent.poll()
        agent.write(TX1, *[bytes(60000)] * 10)
        agent.device.guarded(agent.device.ports[1]._hang_up)        # type: ignore[attr-defined]
        assert len(agent.driver.rings[TX1].take()) == 10 and agent.device.ports[1].lost > 0


def test_a_client_of_a_port_nobody_opens_does_not_hold_it(agent: Rig, tmp_path: Path) -> None:
    for _ in range(3):
        with connect(tmp_path) as client:
            client.sendall(b"anybody?")
            agent.poll()
        agent.poll()
    assert agent.device.ports[1].fd == -1      # type: ignore[attr-defined]


def test_left_unread_at_the_end_and_then_closed_by_the_guest(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    with connect(tmp_path) as client:
        agent.poll()
        client.sendall(b"unread")
        agent.poll()
    agent.poll()                            # gone, but the guest may still read
    assert agent.device.ports[1].connected
    agent.control(1, model.PORT_OPEN, 0)
    agent.poll()
    assert not agent.device.ports[1].connected


def test_a_reset_keeps_the_client_and_forgets_the_rest(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    with connect(tmp_path) as client:
        agent.poll()
        agent.write(TX1, *[bytes(60000)] * 10)
        client.sendall(b"for the next driver")
        agent.up().opened()
        agent.give(RX1, 64, 2)
        agent.poll()
        assert agent.read(RX1) == b"for the next driver"
        agent.write(TX1, b"!")
        seen = b""
        while not seen.endswith(b"!"):
            seen += client.recv(1 << 16)
            agent.poll()
        assert len(seen) % 60000 > 0        # what was under way is cut


def test_standing_still(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    agent.give(RX1, 64, 4)
    with connect(tmp_path) as client:
        agent.poll()
        agent.heard()
        agent.write(TX1, *[bytes(60000)] * 10)
        used = len(agent.driver.rings[TX1].take())
        agent.device.stop()
        client.sendall(b"while it stands")
        agent.poll()
        assert agent.read(RX1) == b""
        state = agent.device.state()
        agent.device.resume()
        agent.poll()
        assert agent.read(RX1) == b"while it stands"
        seen = 0
        while seen < 600000:
            seen += len(client.recv(1 << 16))
            agent.poll()
        assert used + len(agent.driver.rings[TX1].take()) == 10
    assert state["model"]["ports"]["1"] == {        # type: ignore[index]
        "ready": True, "guest_open": True, "told_open": True, "sent": state["model"]["ports"]["1"]["sent"]}  # type: ignore[index]


def test_state_in_another_process_where_the_client_is_gone(agent: Rig, tmp_path: Path) -> None:
    agent.opened()
    with connect(tmp_path):
        agent.poll()
        agent.heard()
        agent.device.stop()
        state = agent.device.state()
    other = VirtioConsole(None, ())
    with pytest.raises(ValueError, match="features"):
        Driver(other).device.load(state)
    fresh = ConsoleConfig(True, (f"agent,socket={tmp_path}/agent2",)).create()
    second = Driver(fresh, agent.driver.memory)
    fresh.load(state)
    fresh.resume()
    second.loop.run()
    assert agent.heard() == [(1, model.PORT_OPEN, 0, b"")]
    state["model"] = {"ports": {"1": {"ready": 1, "guest_open": 1, "told_open": 0, "sent": -5}, "9": {}},
                      "owed": [[9, 9], [1, 77], [1, 6]]}
    fresh.load(state)
    assert fresh.ports[1].sent == 0 and list(fresh._owed) == [(1, 6)]
    fresh.close()


# files ----------------------------------------------------------------------------------------------


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"old ")
    rig = Rig(f"log,file={tmp_path}/log").up().opened()
    rig.give(RX1, 8)
    rig.write(TX1, b"one ", b"two")
    assert (tmp_path / "log").read_bytes() == b"old one two" and rig.read(RX1) == b""
    assert rig.loop.handlers == {}
    rig.close()


def test_a_full_disk_loses_output_and_says_so_once() -> None:
    rig = Rig("log,file=/dev/full").up().opened()
    rig.write(TX1, b"lost", b"again")
    assert rig.device.ports[1].lost == 9 and len(rig.driver.rings[TX1].take()) == 2
    assert rig.device.warnings == ["port log: No space left on device; output was lost"]
    rig.close()


def test_a_slow_fifo_makes_the_guest_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="No such device"):
        ConsoleConfig(False, (f"log,file={tmp_path}/fifo",)).create()      # nobody reads it: not a hang
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    rig = Rig(f"log,file={tmp_path}/fifo").up().opened()
    data = os.urandom(200000)
    rig.write(TX1, data)
    assert rig.driver.rings[TX1].take() == []
    seen = b""
    while len(seen) < len(data):
        assert select.select([reader], [], [], 5)[0]
        seen += os.read(reader, 1 << 16)
        rig.poll()
    assert seen == data and len(rig.driver.rings[TX1].take()) == 1 and rig.loop.handlers == {}
    os.close(reader)
    rig.close()
