"""The console device, by the mock driver: the guest's console, control messages, options."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from framework.console import TX1, Rig
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.devices.virtio import console as model
from hv.devices.virtio import ids
from hv.devices.virtio.console import CONTROL_RX, CONTROL_TX, RX0, TX0
from hv.devices.virtio.console_config import ConsoleConfig
from hv.errors import ConfigError

# the guest's console --------------------------------------------------------------------------------


def test_console_alone_is_the_plainest_device() -> None:
    rig = Rig().up()
    assert len(rig.device.queues) == 2 and not rig.device.offered & model.F_MULTIPORT
    rig.write(TX0, b"hello ", b"", b"world\n")
    assert rig.console.output == b"hello world\n" and len(rig.driver.rings[TX0].take()) == 3
    rig.close()


def test_typed_input_waits_for_buffers_and_keeps_its_order() -> None:
    rig = Rig()
    typed = bytes(range(256)) * 256         # 64 KiB
    rig.console.send(typed[:1000])          # before there is a driver
    rig.up()
    for at in range(1000, len(typed), 5000):
        rig.console.send(typed[at:at + 5000])
    seen = b""
    for size in (1, 16, 4096, *[4096] * 20):
        rig.give(RX0, size)
        seen += rig.read(RX0)
    assert seen == typed and rig.console.waiting == 0 and not rig.device.faults
    drained = []
    rig.console.on_drained = lambda: drained.append(True)
    rig.give(RX0, 64)
    rig.console.send(b"x")
    assert rig.read(RX0) == b"x" and drained
    rig.close()


def test_an_answer_from_within_a_sink_does_not_lock_up() -> None:
    rig = Rig().up()
    rig.console.add_sink(lambda data: rig.console.send(b"root\n") if b"login:" in data else None)
    rig.give(RX0, 64)
    rig.write(TX0, b"login:")
    assert rig.read(RX0) == b"root\n"
    rig.close()


def test_input_into_odd_buffers() -> None:
    rig = Rig().up()
    ring = rig.driver.rings[RX0]
    for head in range(8):                   # nothing to write to
        ring.describe(head, 0x400000, 4, 0, 0)
        ring.offer(head)
    rig.console.send(b"abc")
    assert [row[1] for row in ring.take()] == [0] * 8
    ring.free = 8
    rig.give(RX0, 64)
    assert rig.read(RX0) == b"abc"
    rig.close()


def test_a_large_write_is_passed_on_in_pieces() -> None:
    rig = Rig().up()
    pieces: list[int] = []
    rig.console.add_sink(lambda data: pieces.append(len(data)))
    ring = rig.driver.rings[TX0]
    for at in range(32):                    # 32 times the same 256 KiB: 8 MiB in one chain
        ring.describe(at, 0x400000, 256 << 10, ids.DESC_NEXT if at < 31 else 0, at + 1)
    ring.offer(0)
    rig.device.serve(TX0)
    assert sum(pieces) == 1 << 20           # then others get a turn
    rig.loop.run()
    assert sum(pieces) == 8 << 20 and max(pieces) <= 64 << 10 and len(ring.take()) == 1
    rig.close()


def test_a_broken_ring_while_typing_asks_for_a_reset() -> None:
    rig = Rig().up()
    rig.driver.rings[RX0].offer(999)
    rig.console.send(b"x")
    assert rig.device.status & ids.NEEDS_RESET and rig.console.waiting == 1
    rig.driver.probe()
    rig.give(RX0, 8)
    assert rig.read(RX0) == b"x"
    rig.close()


def test_size_without_control_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(model, "monotonic", lambda: clock[0])
    rig = Rig()
    rig.console.resize(132, 43)
    rig.up()
    assert rig.device.read_config(0, 4) == 132 | 43 << 16
    rig.write(TX0, b"first output")
    assert rig.driver.interrupts.config == 1
    rig.write(TX0, b"at once")
    assert rig.driver.interrupts.config == 1
    for _ in range(10):
        clock[0] += 5
        rig.write(TX0, b"later")
    assert rig.driver.interrupts.config == 4
    rig.console.resize(80, 25)
    rig.loop.run()
    assert rig.driver.interrupts.config == 5 and rig.device.read_config(0, 4) == 80 | 25 << 16
    rig.close()


def test_emergency_write_before_negotiation() -> None:
    rig = Rig()
    for value in b"oops":
        rig.device.put_config(8, 4, value)
    assert rig.console.output == b"oops" and not rig.device.faults
    rig.device.put_config(0, 4, 1)
    assert rig.device.faults == 1
    rig.close()


def test_hostile_output_is_an_error_of_the_guest() -> None:
    rig = Rig().up()
    rig.driver.rings[TX0].describe(0, 1 << 40, 16, 0, 0)
    rig.driver.rings[TX0].offer(0)
    rig.driver.notify(TX0)
    assert rig.device.status & ids.NEEDS_RESET and not rig.console.output
    rig.close()


# control messages -----------------------------------------------------------------------------------


def test_handshake_names_ports_and_the_console(tmp_path: Path) -> None:
    rig = Rig(f"log,file={tmp_path}/log", f"org.agent.0,socket={tmp_path}/agent").up()
    assert rig.device.read_config(4, 4) == 3
    assert rig.heard() == [(n, model.DEVICE_ADD, 0, b"") for n in range(3)]
    rig.console.resize(100, 30)
    rig.loop.run()
    rig.control(0, model.PORT_READY, 1)
    assert rig.heard() == [(0, model.CONSOLE_PORT, 1, b""), (0, model.RESIZE, 0, struct.pack("<HH", 100, 30)),
                           (0, model.PORT_NAME, 1, b"console"), (0, model.PORT_OPEN, 1, b"")]
    rig.control(1, model.PORT_READY, 1)
    assert rig.heard() == [(1, model.PORT_NAME, 1, b"log"), (1, model.PORT_OPEN, 1, b"")]
    rig.control(2, model.PORT_READY, 1)
    assert rig.heard() == [(2, model.PORT_NAME, 1, b"org.agent.0")]
    rig.console.resize(101, 31)
    rig.loop.run()
    assert rig.heard() == [(0, model.RESIZE, 0, struct.pack("<HH", 101, 31))]
    rig.console.send(b"not yet")
    rig.give(RX0, 64)
    assert rig.read(RX0) == b""
    rig.control(0, model.PORT_OPEN, 1)
    assert rig.read(RX0) == b"not yet"
    assert rig.driver.interrupts.config == 0
    rig.close()


def test_ports_without_a_console_begin_at_1(tmp_path: Path) -> None:
    rig = Rig(f"log,file={tmp_path}/log", guest=False).up()
    assert rig.device.guest_console is None and not rig.device.offered & model.F_SIZE
    assert rig.heard() == [(1, model.DEVICE_ADD, 0, b"")]
    rig.give(RX0, 16)
    rig.write(TX0, b"to nobody")
    assert len(rig.driver.rings[TX0].take()) == 1 and not rig.device.faults
    rig.close()


def test_messages_wait_for_buffers_and_do_not_pile_up(tmp_path: Path) -> None:
    rig = Rig(f"agent,socket={tmp_path}/agent").up(control=0)
    for _ in range(500):
        rig.control(1, model.PORT_READY, 1)
        rig.control(0xFFFFFFFF, model.DEVICE_READY, 1)
    assert len(rig.device._owed) <= 10
    rig.give(CONTROL_RX, 4)                 # too small for any
    assert rig.driver.rings[CONTROL_RX].take()[0][1] == 4 and rig.device.faults == 1
    rig.give(CONTROL_RX, 64, 8)
    assert {message[:2] for message in rig.heard()} <= {(0, model.DEVICE_ADD), (1, model.DEVICE_ADD),
                                                        (1, model.PORT_NAME)}
    rig.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([CONTROL_TX, TX0, TX1, 7, 9]), st.one_of(
    st.binary(max_size=12), st.builds(lambda port, event, value: struct.pack("<IHH", port, event, value),
                                      st.integers(0, 4), st.integers(0, 9), st.integers(0, 2)))), max_size=30))
def test_any_messages(messages: list[tuple[int, bytes]]) -> None:
    rig = Rig("a,file=/dev/null", "b,file=/dev/full").up()
    for queue, data in messages:
        if queue < len(rig.device.queues):
            rig.give(RX0, 8)
            rig.write(queue, data)
            assert len(rig.driver.rings[queue].take()) == 1
            rig.driver.rings[RX0].take()
        rig.heard()
    assert not rig.device.status & ids.NEEDS_RESET
    rig.close()


# options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a", "a,socket", "a,socket=", "a,pipe=x", ",file=x", "a b,file=x",
                                  "a" * 64 + ",file=x", "a,file=/nowhere/x", "a,socket=/nowhere/x",
                                  "a,socket=" + "x" * 108, "a,file=/", "a,socket=/dev/null"])
def test_bad_ports_cost_one_line(text: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as raised:
        ConsoleConfig(True, ("fine,file=/dev/null", text)).create()
    assert "\n" not in str(raised.value) and raised.value.hint
    assert set(os.listdir("/proc/self/fd")) == before


def test_more_bad_options() -> None:
    for guest, ports in ((False, ()), (True, ("a,file=x", "a,file=y")),
                         (True, tuple(f"p{n},file=/dev/null" for n in range(31)))):
        with pytest.raises(ConfigError):
            ConsoleConfig(guest, ports)
    rig = Rig(*(f"p{n},file=/dev/null" for n in range(30)))
    assert len(rig.device.queues) == 64
    rig.close()


def test_socket_names_left_by_the_dead_are_taken_over_and_others_not(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    config = ConsoleConfig(False, (f"agent,socket={path}",))
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    device = config.create()
    with pytest.raises(ConfigError, match="in use"):
        config.create()
    assert path.is_socket()
    device.close()
    assert not path.exists()
    device = config.create()
    path.unlink()
    path.write_text("somebody else's")
    device.close()
    assert path.read_text() == "somebody else's"
