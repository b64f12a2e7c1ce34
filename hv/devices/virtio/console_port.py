"""What stands behind the ports of the console device, on the host: the guest's console, a Unix socket, a file.

The device (console.py) moves bytes; a port says where to. None of them blocks, and none holds bytes of its own: what
the host is too slow to take stays in the guest's buffers, which makes the guest wait; what the guest is too slow to
take stays in the socket, which makes the client wait.

    put(views)      the guest's output: how much of it was taken, 0 for "call output() again when there is room"
    take(views)     fill the guest's buffers: how much was, 0 for "fill() again when there is something"

All is called with the device's lock held, but for the handlers of the I/O loop, which take it. Driven by
tests/unit/test_virtio_console.py, test_virtio_console_ports.py
there, and tests/kvm/test_virtio_console.py.
"""

from __future__ import annotations

__all__ = ["FilePort", "GuestPort", "Port", "SocketPort"]

import os
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.console import VirtioConsole

    Views = list[memoryview]

_RETRY = 1.0            # seconds until a client is accepted after that failed, for want of descriptors
_NOTHING = -1           # not watched at all; 0 is watched for hang-ups alone


class Port:
    """One port. `connected`: somebody is there on the host's side."""

    connected = True
    is_console = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.lost = 0               # bytes of output that went nowhere
        self.ready = False          # the driver has the port
        self.guest_open = False     # a program of the guest has it open
        self.told_open = False      # what the driver was last told of `connected`
        self.sent = 0               # bytes of the next chain of output that were taken already
        self.device: VirtioConsole

    def reset(self) -> None:
        """The driver is gone: nothing is known of it."""
        self.ready = self.guest_open = self.told_open = False
        self.sent = 0

    def join(self, device: VirtioConsole, number: int) -> None:
        """Before the guest starts: the device, and the number among its ports."""
        self.device, self.number = device, number

    def put(self, views: Views) -> int:
        """See above."""
        raise NotImplementedError

    def take(self, views: Views) -> int:
        """See above. By default there is no input."""
        return 0

    def has_buffers(self, there: bool) -> None:
        """Whether the guest has given buffers for input; without them nothing need be looked for."""

    def told(self) -> None:
        """The driver was told of `connected`."""

    def hold(self) -> None:
        """Stand still, for a snapshot."""

    def go_on(self) -> None:
        """It is over; output() and fill() come by themselves."""

    def close(self) -> None:
        """Give back what is open."""


class GuestPort(Port):
    """The guest's console: joins hv/machine/console.py as the UART does, by `feed`, `on_room` and `on_return`."""

    is_console = True

    def __init__(self) -> None:
        super().__init__("console")
        self.sink: Callable[[bytes], None] = lambda data: None
        self.on_room: Callable[[], None] | None = None
        self.on_return: Callable[[bytes], None] | None = None   # never called: what the driver has, it keeps
        self._wanting = False

    def put(self, views: Views) -> int:
        """Console.write never waits."""
        data = b"".join(views)
        self.sink(data)
        return len(data)

    def feed(self, data: bytes) -> int:
        """Let the guest receive the head of `data`; how many bytes it had room for. Safe from any thread.

        A sink may call this, in the I/O thread, which holds the lock then: it is tried, and else done a little later.
        """
        lock = self.device.lock
        if not lock.acquire(False):
            self.device.io.call(self._room)
            return 0
        try:
            taken = self.device.feed(self, data)
            self._wanting = taken < len(data)
            return taken
        finally:
            lock.release()

    def has_buffers(self, there: bool) -> None:
        """Ask for what was typed, if some of it waits."""
        if there and self._wanting:
            self._wanting = False
            self.device.io.call(self._room)     # without the lock, which feed() takes

    def _room(self) -> None:
        if self.on_room is not None:
            self.on_room()

    def resize(self, columns: int, rows: int) -> None:
        """The user's terminal has this size now. Safe from any thread."""
        self.device.resize(columns, rows)


class _FdPort(Port):
    """A port whose host side is the descriptor `fd`, not blocking; -1 while there is none."""

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(name)
        self.fd = fd
        self._watched = _NOTHING    # the events that the loop looks for
        self._blocked = False       # output waits for room
        self._warned = False

    def put(self, views: Views) -> int:
        """Write; what can't be written because of an error is lost, and counted."""
        try:
            return os.writev(self.fd, views)
        except BlockingIOError:
            self._blocked = True
            self._watch()
            return 0
        except OSError as error:
            size = sum(map(len, views))
            self.lost += size
            self.failed(error)
            return size

    def failed(self, error: OSError) -> None:
        """Writing failed. A full disk may have room later, so it is tried again with what comes next."""
        if self.lost and not self._warned:
            self._warned = True
            self.device.warn(f"port {self.name}: {os.strerror(error.errno or 0)}; output was lost")

    def hold(self) -> None:
        """Nothing is looked for."""
        self._forget()

    def go_on(self) -> None:
        """Look for it again."""
        self._watch()

    def _wanted(self) -> int:
        return EPOLLOUT if self._blocked else _NOTHING

    def _watch(self) -> None:
        """Have the loop look for what is wanted now. Hang-ups and errors it tells of anyway."""
        wanted = self._wanted()
        if self.fd < 0 or self.device.paused or wanted == self._watched:
            return
        if wanted == _NOTHING:
            self._forget()
        elif self._watched != _NOTHING:
            self.device.io.modify(self.fd, wanted)
            self._watched = wanted
        elif self.device.io.add(self.fd, wanted, self._event):
            self._watched = wanted

    def _forget(self) -> None:
        if self._watched != _NOTHING:
            self.device.io.remove(self.fd)
            self._watched = _NOTHING

    def _event(self, events: int) -> None:
        self.device.guarded(lambda: self._serve(events))

    def _serve(self, events: int) -> None:
        if events & (EPOLLOUT | EPOLLERR):
            self._blocked = False
            self.device.output(self)
            self._watch()

    def close(self) -> None:
        """Close the descriptor. The loop may be closed already."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._watched = _NOTHING


class FilePort(_FdPort):
    """Output appended to a file, a FIFO or a terminal; no input."""


class SocketPort(_FdPort):
    """A listening Unix stream socket: one client at a time, the next one waits."""

    connected = False

    def __init__(self, name: str, path: str, listener: int) -> None:
        super().__init__(name, -1)
        self.path = path
        self._listener = listener
        self._listening = False
        self._hungry = False        # the guest has buffers for input
        self._ended = False         # the client has sent all it had to
        self._failed = False        # it is gone, to be told by a call under way
        made = os.stat(path)
        self._made = (made.st_dev, made.st_ino)

    def join(self, device: VirtioConsole, number: int) -> None:
        """Wait for a client from now on."""
        super().join(device, number)
        self._listen()

    # a client comes ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Wait for one, but only after the guest has heard of the last one's end."""
        if not (self._listening or self.fd >= 0 or self._listener < 0 or self.device.paused or self.told_open):
            self._listening = self.device.io.add(self._listener, EPOLLIN, self._accept)

    def _stop_listening(self) -> None:
        if self._listening:
            self.device.io.remove(self._listener)
            self._listening = False

    def _accept(self, events: int) -> None:
        self.device.guarded(self._take_client)

    def _take_client(self) -> None:
        import socket

        if not self._listening:
            return
        listener = socket.socket(fileno=self._listener)
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._stop_listening()      # the loop would tell of the waiting client at once again
            self.device.io.call_later(_RETRY, lambda: self.device.guarded(self._listen))
            return
        finally:
            listener.detach()
        client.setblocking(False)
        self.fd = client.detach()
        self.connected = True
        self._stop_listening()
        self._watch()
        self.device.host_changed(self)

    # it talks ---------------------------------------------------------------------------------------

    def take(self, views: Views) -> int:
        """Read; at the client's end of stream nothing more is looked for, but what it is sent still goes out."""
        if self.fd < 0 or self._ended or self._failed:
            return 0
        try:
            done = os.readv(self.fd, views)
        except BlockingIOError:
            return 0
        except OSError as error:        # it closed without having read all
            self.failed(error)
            return 0
        if not done:
            self._ended = True
            self._watch()
        return done

    def has_buffers(self, there: bool) -> None:
        """Read while there are some. Also called when the guest closes the port: then an unread end is looked for."""
        self._hungry = there
        self._watch()

    def _wanted(self) -> int:
        return (EPOLLIN if self._hungry and not self._ended else 0) | (EPOLLOUT if self._blocked else 0)

    def _serve(self, events: int) -> None:
        fd = self.fd
        super()._serve(events)
        if events & EPOLLIN and self._hungry:
            self.device.fill(self)
        if events & (EPOLLHUP | EPOLLERR) and fd >= 0 and self.fd == fd:
            # The client is gone. What it sent is still there for a guest that has the port open: it is read when the
            # guest gives buffers, up to the end. A guest that has not gets nothing of it.
            if self._ended or not self.guest_open:
                self._hang_up()
            elif not self._hungry:
                self._forget()

    # it goes ----------------------------------------------------------------------------------------

    def failed(self, error: OSError) -> None:
        """The client is gone; told later, for somebody is in the middle of using it."""
        if not self._failed:
            self._failed = True
            self.device.io.call(lambda: self.device.guarded(self._hang_up_failed))

    def _hang_up_failed(self) -> None:
        if self._failed:
            self._hang_up()

    def _hang_up(self) -> None:
        self._forget()
        os.close(self.fd)
        self.fd = -1
        self.connected = self._blocked = self._ended = self._failed = False
        self.device.host_changed(self)
        self.device.output(self)        # what was meant for it goes nowhere; the guest need not wait
        self._listen()

    def told(self) -> None:
        """The guest knows."""
        self._listen()

    def reset(self) -> None:
        """The driver is gone; the client stays."""
        super().reset()
        self._hungry = False
        self._watch()
        self._listen()

    def hold(self) -> None:
        """Nobody is looked after or let in."""
        self._forget()
        self._stop_listening()

    def go_on(self) -> None:
        """As before."""
        self._watch()
        self._listen()

    def close(self) -> None:
        """Close both, and remove the socket's name, if it is still ours."""
        super().close()
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1
            try:
                found = os.stat(self.path)
                if (found.st_dev, found.st_ino) == self._made:
                    os.unlink(self.path)
            except OSError:
                pass        # gone already
