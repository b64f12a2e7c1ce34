"""Configuration space, host bridge and MSI-X, as software sees them through ports and memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.devices.bus import MmioBus, PioBus
from hv.devices.legacy.ports import ResetControl
from hv.devices.pci.config import ConfigSpace
from hv.devices.pci.host import ADDRESS_PORT, DATA, DATA_PORT, Function, HostBridge
from hv.devices.pci.msix import ENABLE, FUNCTION_MASK, Msix
from hv.errors import ConfigError

START, END = 0xD8000000, 0xD8100000
SIZE = 0x8000
MEMORY = 2


class Card(Function):
    """A function whose registers answer with its number, and that notes where it is told to be."""

    def __init__(self, number: int) -> None:
        super().__init__(ConfigSpace(0x1234, 0x5600 + number, 0x020000, pin=1, line=11))
        self.number = number
        self.places: list[int | None] = []

    def read(self, offset: int, size: int) -> int:
        return self.number

    def moved(self, base: int | None) -> None:
        self.places.append(base)


class Pc:
    """A bridge at its ports, the reset control between them, and `cards` behind it."""

    def __init__(self, cards: int = 2) -> None:
        self.pio, self.mmio, self.resets = PioBus(), MmioBus(), 0
        self.bridge = HostBridge(self.mmio, START, END)
        self.pio.add(self.bridge, ADDRESS_PORT, 1, wide=True)
        self.pio.add(self.bridge, DATA_PORT, 4, wide=True, first=DATA)
        self.pio.add(ResetControl(self._reset), 0xCF9, 1)
        self.cards = [Card(number) for number in range(cards)]
        for card in self.cards:
            self.bridge.plug(card, SIZE)

    def _reset(self) -> None:
        self.resets += 1

    def select(self, slot: int, register: int, *, bus: int = 0, function: int = 0, enable: bool = True) -> int:
        self.pio.write(0xCF8, 4, enable << 31 | bus << 16 | slot << 11 | function << 8 | register & 0xFC)
        return 0xCFC + (register & 3)

    def get(self, slot: int, register: int, size: int = 4, **where: int) -> int:
        return self.pio.read(self.select(slot, register, **where), size)

    def put(self, slot: int, register: int, size: int, value: int) -> None:
        self.pio.write(self.select(slot, register), size, value)


def test_a_scan_finds_the_bridge_and_every_card():
    pc = Pc(3)
    found = [pc.get(slot, 0) for slot in range(32)]
    assert found[:4] == [0x00081B36, 0x56001234, 0x56011234, 0x56021234]
    assert set(found[4:]) == {0xFFFFFFFF}
    assert pc.get(0, 0x08) >> 16 == 0x0600 and pc.get(1, 0x0A, 2) == 0x0200
    assert pc.get(1, 0x3C, 1) == 11 and pc.get(1, 0x3D, 1) == 1 and pc.get(1, 0x0E, 1) == 0
    for where in ({"bus": 1}, {"function": 1}, {"enable": False}):
        assert pc.get(1, 0, **where) == 0xFFFFFFFF


def test_mechanism_1_is_told_by_its_address_register():
    pc = Pc()
    pc.pio.write(0xCF8, 4, 0xFFFFFFFF)
    assert pc.pio.read(0xCF8, 4) == 0x80FFFFFC        # reserved bits read 0
    pc.pio.write(0xCF8, 4, 0x80000000)
    pc.pio.write(0xCF8, 1, 0x12)                       # only a double word is the register
    pc.pio.write(0xCFB, 1, 0x01)
    assert pc.pio.read(0xCF8, 4) == 0x80000000 and pc.pio.read(0xCF8, 1) == 0xFF
    pc.pio.write(0xCF9, 1, 6)
    assert pc.resets == 1 and pc.pio.read(0xCF8, 4) == 0x80000000


def test_a_bar_tells_its_size_and_keeps_the_rest_fixed():
    pc = Pc()
    first = pc.get(1, 0x10)
    assert (first, pc.get(2, 0x10)) == (START, START + SIZE)
    pc.put(1, 0x10, 4, 0xFFFFFFFF)
    assert pc.get(1, 0x10) == 0xFFFF8000
    for register in (0x14, 0x18, 0x1C, 0x20, 0x24, 0x30):
        pc.put(1, register, 4, 0xFFFFFFFF)
        assert pc.get(1, register) == 0         # no such BAR, no ROM
    pc.put(1, 0x12, 2, 0xD80F)                  # in parts
    pc.put(1, 0x10, 1, 0xFF)
    assert pc.get(1, 0x10) == 0xD80F8000


def test_registers_answer_where_the_bar_is_while_decoding_is_on():
    pc = Pc()
    card = pc.cards[1]
    assert pc.mmio.read(START + SIZE, 1) == 0xFF
    pc.put(2, 0x04, 2, MEMORY)
    assert pc.mmio.read(START + SIZE, 1) == 1 and card.places == [START + SIZE]
    pc.put(2, 0x10, 4, START + 8 * SIZE)
    assert pc.mmio.read(START + SIZE, 1) == 0xFF and pc.mmio.read(START + 8 * SIZE, 1) == 1
    assert card.places == [START + SIZE, None, START + 8 * SIZE]
    pc.put(2, 0x04, 2, 0)
    assert pc.mmio.read(START + 8 * SIZE, 1) == 0xFF and card.places[-1] is None and pc.bridge.conflicts == 0


@pytest.mark.parametrize("place", [0, 0x1000, START - SIZE, END, 0xFFFF8000, 0xFEE00000])
def test_nothing_answers_outside_the_window(place):
    pc = Pc()
    pc.put(1, 0x04, 2, MEMORY)
    pc.put(1, 0x10, 4, place)
    assert pc.cards[0].places == [START, None] and pc.mmio.devices == [] and pc.bridge.conflicts


def test_of_two_cards_at_one_place_the_first_answers_until_it_moves():
    pc = Pc()
    pc.put(1, 0x04, 2, MEMORY)
    pc.put(2, 0x10, 4, START)
    pc.put(2, 0x04, 2, MEMORY)
    assert pc.mmio.read(START, 1) == 0 and pc.bridge.conflicts == 1 and pc.cards[1].places == []
    pc.put(1, 0x10, 4, START + 4 * SIZE)
    assert pc.mmio.read(START, 1) == 1 and pc.mmio.read(START + 4 * SIZE, 1) == 0


def test_only_defined_bits_of_the_header_can_be_written():
    pc = Pc()
    before = [pc.get(1, register) for register in range(0, 256, 4)]
    for register in range(0, 256, 4):
        pc.put(1, register, 4, 0xFFFFFFFF if register != 0x10 else before[4])
    after = [pc.get(1, register) for register in range(0, 256, 4)]
    changed = {4 * n: after[n] ^ before[n] for n in range(64) if after[n] != before[n]}
    assert changed == {0x04: 0x0406, 0x0C: 0xFF, 0x3C: 11 ^ 0xFF}      # command, cache line, interrupt line


def test_a_bus_has_31_places():
    pc = Pc(31)
    with pytest.raises(ConfigError):
        pc.bridge.plug(Card(0), SIZE)
    assert pc.get(31, 0) == 0x561E1234
    with pytest.raises(ConfigError):
        Pc(0).bridge.plug(Card(0), 2 * (END - START))


def test_capabilities_are_a_list_within_the_space():
    space = ConfigSpace(1, 2, 3)
    assert not space.read(0x06, 2) & 0x10
    places = [space.add_capability(9, bytes((number,)) * 14) for number in range(12)]
    at, seen = space.read(0x34, 1), []
    while at:
        seen.append((at, space.read(at, 1), space.read(at + 2, 1)))
        at = space.read(at + 1, 1)
    assert seen == [(place, 9, number) for number, place in enumerate(places)] and space.read(0x06, 2) & 0x10
    with pytest.raises(OverflowError):
        space.add_capability(9, bytes(14))


VALUES = st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 3).map(lambda n: 0x80000000 | n << 11),
                   st.integers(0, 63).map(lambda n: 0x80000800 | n << 2))
ACCESSES = st.lists(st.tuples(st.booleans(), st.sampled_from(range(0xCF8, 0xD00)), st.sampled_from((1, 2, 4)), VALUES),
                    max_size=60)


@given(ACCESSES)
def test_no_sequence_of_accesses_breaks_the_bus(accesses):
    pc = Pc()
    for write, port, size, value in accesses:
        if write:
            pc.pio.write(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= pc.pio.read(port, size) < 1 << 8 * size
    for base, length, card in pc.mmio.devices:
        assert START <= base <= END - length and card.space.memory == base and card.places[-1] == base
    assert pc.get(1, 0) == 0x56001234 and pc.get(2, 0x10) & 0x7FFF == 0


def test_state_goes_over_with_the_writable_bits_only():
    pc, other = Pc(), Pc()
    pc.put(1, 0x10, 4, START + 5 * SIZE)
    pc.put(1, 0x04, 2, MEMORY)
    for mine, theirs in zip(other.cards, pc.cards, strict=True):
        mine.space.load(theirs.space.state())
    other.bridge.load(pc.bridge.state())
    assert other.mmio.read(START + 5 * SIZE, 1) == 0 and other.pio.read(0xCF8, 4) == 0x80000804
    other.cards[0].space.load({"bytes": b"\xff" * 256})
    assert other.get(1, 0) == 0x56001234
    with pytest.raises(ValueError, match="space of 5 bytes"):
        other.cards[0].space.load({"bytes": bytes(5)})


# MSI-X --------------------------------------------------------------------------------------------------


class FakeLine:
    """A vector: what it is connected to, and whether something waits."""

    def __init__(self, number: int) -> None:
        self.fd = 1000 + number
        self.sent: tuple[int, int] | None = None
        self.connects, self.waiting, self.works = 0, False, True

    def connect(self, address: int, data: int) -> bool:
        if self.works:
            self.sent = (address, data)
            self.connects += 1
        return self.works

    def disconnect(self) -> None:
        assert self.sent
        self.sent = None

    def pending(self) -> bool:
        assert not self.sent
        return self.waiting


class Card4:
    """Four vectors."""

    def __init__(self) -> None:
        self.lines = [FakeLine(number) for number in range(4)]
        self.faults: list[str] = []
        self.msix = Msix(self.lines, self.faults.append)

    def message(self, vector: int, address: int, data: int, control: int = 0) -> None:
        for field, value in enumerate((address & 0xFFFFFFFF, address >> 32, data, control)):
            self.msix.write_table(16 * vector + 4 * field, 4, value)

    @property
    def sent(self) -> list[tuple[int, int] | None]:
        return [line.sent for line in self.lines]


def test_a_vector_is_connected_while_nothing_masks_it():
    card = Card4()
    assert [card.msix.read_table(16 * n + 12, 4) for n in range(4)] == [1] * 4
    card.message(1, 0xFEE01000, 0x41)
    assert card.sent == [None] * 4                      # MSI-X is off
    card.msix.control(ENABLE | FUNCTION_MASK)
    assert card.sent == [None] * 4
    card.msix.control(ENABLE)
    assert card.sent == [None, (0xFEE01000, 0x41), None, None]
    card.msix.write_table(16 + 12, 4, 1)
    assert card.sent == [None] * 4
    card.msix.write_table(16 + 8, 8, 0x55)              # data and control in one
    assert card.sent == [None, (0xFEE01000, 0x55), None, None] and card.lines[1].connects == 2
    card.msix.control(ENABLE)                           # nothing new
    assert card.lines[1].connects == 2
    card.msix.control(0)
    assert card.sent == [None] * 4 and not card.faults


def test_pending_bits_are_those_of_vectors_that_wait():
    card = Card4()
    card.msix.control(ENABLE)
    card.message(0, 0xFEE00000, 1)
    card.lines[2].waiting = card.lines[3].waiting = True
    assert card.msix.read_pending(0, 8) == 0b1100 and card.msix.read_pending(4, 4) == 0
    assert card.msix.read_pending(0x1FF8, 8) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (2, 2), (2, 4), (4, 8), (64, 4), (60, 8), (1 << 20, 4)])
def test_odd_accesses_to_the_table_are_counted_and_do_nothing(offset, size):
    card = Card4()
    card.msix.write_table(offset, size, (1 << 8 * size) - 1)
    assert card.msix.read_table(offset, size) == 0 and len(card.faults) == 2
    assert bytes(card.msix.state()["table"]) == (bytes(12) + b"\1\0\0\0") * 4


@pytest.mark.parametrize("address", [0, 0x1000, 0xFED00000, 0xFEF00000, 0x1FEE00000, 0xFFFFFFFFFFFFFFFF])
def test_a_message_that_is_no_interrupt_goes_nowhere(address):
    card = Card4()
    card.msix.control(ENABLE)
    card.message(0, 0xFEE00000, 7)
    card.message(0, address, 7)
    assert card.sent[0] is None and card.faults
    card.message(0, 0xFEE00000, 8)
    assert card.sent[0] == (0xFEE00000, 8)
    card.lines[1].works = False
    card.message(1, 0xFEE00000, 7)
    assert card.sent[1] is None


def test_msix_state_goes_over():
    card, other = Card4(), Card4()
    card.msix.control(ENABLE)
    card.message(0, 0xFEE00000, 7)
    card.lines[3].waiting = True
    assert other.msix.load(card.msix.state()) == [3]
    other.msix.control(ENABLE)
    assert other.sent == [(0xFEE00000, 7), None, None, None]
    with pytest.raises(ValueError, match="table of 3 bytes"):
        other.msix.load({"table": bytes(3), "pending": []})


@given(st.lists(st.tuples(st.integers(-8, 80), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1),
                          st.sampled_from((None, 0, ENABLE, ENABLE | FUNCTION_MASK))), max_size=40))
def test_lines_follow_the_table_whatever_is_written(writes):
    card = Card4()
    for offset, size, value, control in writes:
        if control is not None:
            card.msix.control(control)
        card.msix.write_table(max(0, offset), size, value & (1 << 8 * size) - 1)
        for vector, line in enumerate(card.lines):
            entry = [card.msix.read_table(16 * vector + 4 * field, 4) for field in range(4)]
            live = card.msix.enabled and not card.msix._function_masked and entry[3] == 0
            message = (entry[0] | entry[1] << 32, entry[2])
            assert line.sent == (message if live and message[0] >> 20 == 0xFEE else None)
