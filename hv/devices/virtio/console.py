"""Console device: ports that carry bytes both ways, one of them the guest's console (virtio 1.2, 5.3).

    port 0          the guest's console (hvc0 in Linux), where it is wanted: queues 0 and 1
    ports 1 ...     Unix sockets and files of the host (console_port.py): queues 2n+2 and 2n+3
    queues 2, 3     control messages: which ports there are, who has them open, the console's size

MULTIPORT is offered only where there are ports beside the console: without it Linux makes hvc0 while it probes the
device, before it looks for a console to give to init; with it, some time later, which on several processors has been
too late. So `pyhv boot` puts ports on a device of their own. Without MULTIPORT Linux learns the size by the
configuration space, but not before hvc0 is complete, and nothing says when that is; so it is told with its first
output, and again a little later.

Nothing is queued for the guest: what it must still be told is a set of (port, event), whose values are taken when a
buffer for them is there. Output that the host can't take stays in the queue, with a note of how much of it is done.

Left out on purpose: removing ports at run time; the console's size by port (there is one console); the order of the
resize message's fields that Linux expected before 6.15 (rows first), against 5.3.6.2.

Driven by tests/unit/test_virtio_console.py, test_virtio_console_ports.py
there, and tests/kvm/test_virtio_console.py.
"""

from __future__ import annotations

__all__ = ["PORTS_MOST", "VirtioConsole"]

from struct import Struct
from time import monotonic

from hv.devices.virtio import ids
from hv.devices.virtio.device import BATCH, VirtioDevice
from hv.devices.virtio.queue import QueueError
from hv.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.chain import Chain
    from hv.devices.virtio.console_port import GuestPort, Port
    from hv.devices.virtio.device import Interrupts, Io
    from hv.memory.guest import GuestMemory

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2     # 5.3.3

RX0, TX0, CONTROL_RX, CONTROL_TX = 0, 1, 2, 3       # 5.3.2
PORTS_MOST = 30             # Linux: at most 31 with port 0 (drivers/char/virtio_console.c, VIRTCONS_MAX_PORTS)
QUEUE_SIZE = 32             # Linux puts a page into every entry for input, at some cost while it boots

_CONFIG = Struct("<HHII")   # cols, rows, max_nr_ports, emerg_wr (5.3.4)
_EMERG_WRITE = 8            # offset of emerg_wr

_CONTROL = Struct("<IHH")   # port, event, value (5.3.6.2)
_RESIZE = Struct("<HH")     # cols, rows
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)

_PIECE = 64 << 10           # output passed on at once
_TURN = 1 << 20             # output passed on before other devices get a turn
_TELL_SIZE = (0.0, 0.25, 1.0, 4.0)      # seconds between the times the size is told, without MULTIPORT


class VirtioConsole(VirtioDevice):
    """virtio-console. `guest` is port 0, the guest's console, or None; `others` are ports 1, 2, ..."""

    ID = ids.CONSOLE
    NAME = "virtio-console"
    KIND = "console"
    DRIVER = "CONFIG_VIRTIO_CONSOLE (module virtio_console)"
    PCI_CLASS = 0x078000    # communication controller, other (PCI 3.0, appendix D)

    def __init__(self, guest: GuestPort | None, others: tuple[Port, ...] = ()) -> None:
        super().__init__()
        self.guest_console = guest
        self.ports: dict[int, Port] = dict(enumerate(others, 1))
        if guest is not None:
            self.ports[0] = guest
        count = len(others)
        self.QUEUES = (QUEUE_SIZE,) * (4 + 2 * count if count else 2)
        self.FEATURES = F_SIZE | F_EMERG_WRITE if guest is not None else 0
        if count:
            self.FEATURES |= F_MULTIPORT
        self.columns = self.rows = 0
        self._owed: dict[tuple[int, int], None] = {}        # what the driver must be told: (port, event), in order
        self._size_told = 0
        self._size_told_at = 0.0

    def attach(self, memory: GuestMemory, io: Io, interrupts: Interrupts) -> None:
        """The ports begin to listen."""
        super().attach(memory, io, interrupts)
        for number, port in self.ports.items():
            port.join(self, number)

    # configuration ----------------------------------------------------------------------------------

    def config(self) -> bytes:
        """5.3.4."""
        return _CONFIG.pack(self.columns, self.rows, max(self.ports) + 1, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """5.3.4: one character to emerg_wr, from a driver that is not up yet."""
        if offset == _EMERG_WRITE and self.guest_console is not None:
            self.guest_console.put([memoryview(data)[:1]])
        else:
            self.fault(f"a write to the configuration space at {offset:#x}")

    def resize(self, columns: int, rows: int) -> None:
        """The console has this size now. Safe from any thread, and at any time once attached."""
        self.columns, self.rows = min(columns, 0xFFFF), min(rows, 0xFFFF)
        self.io.call(lambda: self.guarded(self._resized))

    def _resized(self) -> None:
        self._size_told = 0
        if not self.has(F_MULTIPORT):
            self._tell_size()
        elif self.columns and 0 in self.ports and self.ports[0].ready:
            self._owe(0, RESIZE)
            self._tell()

    def _tell_size(self) -> None:
        """Without control messages: an interrupt, on which the driver reads the configuration space."""
        if self._size_told < len(_TELL_SIZE) and self.columns and self.has(F_SIZE) and self.running:
            now = monotonic()
            if now - self._size_told_at >= _TELL_SIZE[self._size_told]:
                self._size_told += 1
                self._size_told_at = now
                self.config_changed()

    # bytes ------------------------------------------------------------------------------------------

    def notified(self, index: int) -> None:
        """5.3.6."""
        if index == CONTROL_TX:
            self._control()
        elif index == CONTROL_RX:
            self._tell()
        else:
            port = self.ports.get(max(index // 2 - 1, 0))
            if port is None:
                self._discard(index)
            elif index & 1:
                self.output(port)
                if port is self.guest_console and not self.has(F_MULTIPORT):
                    self._tell_size()
            else:
                self.fill(port)

    def _queues_of(self, port: Port) -> tuple[int, int]:
        """The indices of its input and output queues (5.3.2)."""
        return (2 * port.number + 2, 2 * port.number + 3) if port.number else (RX0, TX0)

    def output(self, port: Port) -> None:
        """Pass on what the guest has written to `port`, as far as the host takes it. With the lock held."""
        index = self._queues_of(port)[1]
        queue = self.queues[index]
        if not self.running or not queue.ready:
            return
        turn = _TURN
        for chain in self.requests(index):
            size = chain.readable_bytes
            while port.sent < size and port.connected and turn > 0:
                done = port.put(self._rest(chain, port.sent))
                if not done:
                    break
                port.sent += done
                turn -= done
            if port.sent < size and port.connected:
                queue.unpop()
                if turn <= 0:
                    self.io.call(lambda: self.serve(index))
                break
            port.lost += max(size - port.sent, 0)
            port.sent = 0
            queue.push(chain)
        self.used(index)

    @staticmethod
    def _rest(chain: Chain, sent: int) -> list[memoryview]:
        reader = chain.reader()
        if sent:
            reader.take(sent)
        return reader.take(_PIECE)

    def fill(self, port: Port) -> None:
        """Give the guest what the host has for `port`, as far as it has buffers. With the lock held."""
        index = self._queues_of(port)[0]
        queue = self.queues[index]
        if not self.running or not queue.ready or not self._open(port):
            port.has_buffers(False)
            return
        if port is self.guest_console:
            port.has_buffers(True)      # it comes to feed()
            return
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                if queue.listen():
                    continue
                port.has_buffers(False)
                break
            done = port.take(chain.writable) if chain.writable else 0
            if not done and chain.writable:
                queue.unpop()
                queue.quiet()
                port.has_buffers(True)
                break
            queue.push(chain, done)
        else:
            self.io.call(lambda: self.serve(index))
        self.used(index)

    def feed(self, port: Port, data: bytes) -> int:
        """Let the guest receive the head of `data` on `port`; how much it had room for. With the lock held."""
        index = self._queues_of(port)[0]
        queue = self.queues[index]
        done = 0
        if not self.running or not queue.ready or not self._open(port):
            return 0
        try:
            for _ in range(2 * queue.size):     # more only where the guest plays tricks
                chain = queue.pop() if done < len(data) else None
                if chain is None:
                    if done == len(data) or not queue.listen():
                        break
                    continue
                written = chain.writer().write(data[done:])
                queue.push(chain, written)
                done += written
            self.used(index)
        except (QueueError, GuestError) as error:
            self.broken(str(error))
        return done

    def _open(self, port: Port) -> bool:
        """Whether the guest takes input: a console without MULTIPORT always does (5.3.5)."""
        return port.guest_open or (port.number == 0 and not self.has(F_MULTIPORT))

    def _discard(self, index: int) -> None:
        """Port 0, where it is not the console: output goes nowhere, and input never comes."""
        if index & 1:
            for chain in self.requests(index):
                self.queues[index].push(chain)
            self.used(index)

    # control messages (5.3.6.2) ---------------------------------------------------------------------

    def _control(self) -> None:
        queue = self.queues[CONTROL_TX]
        for chain in self.requests(CONTROL_TX):
            data = chain.reader().read(_CONTROL.size)
            queue.push(chain)
            if len(data) < _CONTROL.size:
                self.fault(f"a control message of {len(data)} bytes (5.3.6.2)")
            else:
                self._message(*_CONTROL.unpack(data))
        self.used(CONTROL_TX)
        self._tell()

    def _message(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            if value:
                for there in sorted(self.ports):
                    self._owe(there, DEVICE_ADD)
            return
        port = self.ports.get(number)
        if port is None:
            self.fault(f"control message {event} for port {number}, which is not there (5.3.6.2)")
        elif event == PORT_READY:
            port.ready = bool(value)
            if value:
                if port.is_console:
                    self._owe(number, CONSOLE_PORT)
                    if self.has(F_SIZE) and self.columns:
                        self._owe(number, RESIZE)
                self._owe(number, PORT_NAME)
                if port.connected:
                    self._owe(number, PORT_OPEN)
        elif event == PORT_OPEN:
            port.guest_open = bool(value)
            self.fill(port)
        else:
            self.fault(f"control message {event}, which is not the driver's to send (5.3.6.2)")

    def host_changed(self, port: Port) -> None:
        """Somebody came to, or left, the host's side of `port`. With the lock held."""
        if port.ready and port.connected != port.told_open:
            self._owe(port.number, PORT_OPEN)
            self._tell()

    def _owe(self, number: int, event: int) -> None:
        self._owed[number, event] = None

    def _tell(self) -> None:
        """Send what the driver must be told, as far as it has buffers for it."""
        if not self._owed or not self.running or not self.has(F_MULTIPORT) or not self.queues[CONTROL_RX].ready:
            return
        queue = self.queues[CONTROL_RX]
        while self._owed:
            chain = queue.pop()
            if chain is None:
                if queue.listen():
                    continue
                break
            number, event = next(iter(self._owed))
            del self._owed[number, event]
            writer = chain.writer()
            message = self._text(self.ports[number], event)
            if writer.write(message) < len(message):
                self.fault(f"a buffer too small for a control message of {len(message)} bytes")
            queue.push(chain, writer.written)
        self.used(CONTROL_RX)
        for port in self.ports.values():
            port.told()

    def _text(self, port: Port, event: int) -> bytes:
        value, more = 1, b""
        if event == PORT_OPEN:
            port.told_open = port.connected
            value = int(port.connected)
        elif event == RESIZE:
            value, more = 0, _RESIZE.pack(self.columns, self.rows)
        elif event == PORT_NAME:
            more = port.name.encode()
        elif event == DEVICE_ADD:
            value = 0
        return _CONTROL.pack(port.number, event, value) + more

    # life -------------------------------------------------------------------------------------------

    def guarded(self, action: Callable[[], None]) -> None:
        """Run `action`, of the I/O thread, with the lock held and the guest's mistakes caught."""
        with self.lock:
            if not self.paused:
                try:
                    action()
                except (QueueError, GuestError) as error:
                    self.broken(str(error))

    def activate(self) -> None:
        """5.3.5. Ports without a driver that knows of more than one need no messages."""
        self._size_told = 0
        self._size_told_at = 0.0

    def drop(self) -> None:
        """The driver is gone."""
        self._owed.clear()
        for port in self.ports.values():
            port.reset()

    def drop_queue(self, index: int) -> None:
        """What was half sent goes with its chain."""
        port = self.ports.get(max(index // 2 - 1, 0))
        if port is not None and index not in (CONTROL_RX, CONTROL_TX) and index & 1:
            port.sent = 0

    def pause(self) -> None:
        """Nothing is ever in flight; only the ports must stand still."""
        for port in self.ports.values():
            port.hold()

    def resume(self) -> None:
        """Also where no driver is there: clients may come and go."""
        super().resume()
        self.io.call(lambda: self.guarded(self._go_on))

    def _go_on(self) -> None:
        for port in self.ports.values():
            port.go_on()
            self.host_changed(port)     # other clients may be there than before
        self._resized()

    def close(self) -> None:
        """Close sockets and files."""
        for port in self.ports.values():
            port.close()

    def model_state(self) -> dict[str, object]:
        """Who has which port open, how far the output of each is, what is still to be told."""
        return {"owed": [list(key) for key in self._owed],
                "ports": {str(number): {"ready": port.ready, "guest_open": port.guest_open,
                                        "told_open": port.told_open, "sent": port.sent}
                          for number, port in self.ports.items()}}

    def load_model(self, state: dict[str, object]) -> None:
        """Untrusted; ports that are not here are left out. Clients have to come again."""
        saved: dict[str, dict[str, object]] = state["ports"]  # type: ignore[assignment]
        for number, port in self.ports.items():
            if str(number) in saved:
                values = saved[str(number)]
                port.ready, port.guest_open = bool(values["ready"]), bool(values["guest_open"])
                port.told_open = bool(values["told_open"])
                port.sent = max(0, int(values["sent"]))  # type: ignore[call-overload]
        self._owed.clear()
        for number, event in state["owed"]:  # type: ignore[attr-defined]
            if number in self.ports and event in (DEVICE_ADD, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME):
                self._owe(number, event)
