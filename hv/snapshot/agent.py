"""The host's end of the guest's agent (guests/agent/agent.c, where the requests are listed).

    with Agent(machine) as agent:
        agent.ask("hostname", "web-3")

It goes through the machine's own vsock device: no file, no other process. What the agent answers is a hostile guest's:
it is bounded in length and time, and it is text, in which nothing but printable ASCII stays. A stream that breaks is
opened again and the request repeated, which does no harm: Linux ends all streams that it has when it learns that it was
restored. Not for the thread of the machine's I/O loop. Driven by tests/unit/test_agent.py and tests/kvm/test_clones.py.
"""

from __future__ import annotations

__all__ = ["PORT", "Agent", "NoAgentError", "RefusedError"]

from time import monotonic, sleep

from hv.devices.virtio.queue import QueueError
from hv.devices.virtio.vsock_local import connect_bare
from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

    from hv.devices.virtio.vsock import Vsock
    from hv.machine.machine import Machine

PORT = 1                        # guests/agent/agent.c
VERSIONS = ("1",)
REPLY_MOST = 4096               # bytes of a line
PATIENCE = 10.0                 # seconds for a request, with all that goes wrong
REFUSALS_MOST = 3               # a guest that refuses so often has no agent
AGAIN = 0.1                     # seconds between two attempts
RESET_SECONDS = 2.0             # for the guest to learn that its streams are lost
RESET_LOOK = 0.005
ANSWER_SECONDS = 2.0            # then the stream is taken for lost
_PRINTABLE = range(0x20, 0x7F)
_HINT = "put it into the guest's initramfs: pyhv kernel initramfs FILE --agent (docs/clones.md)"


class NoAgentError(HvError):
    """The guest has no agent that could be asked."""


class RefusedError(HvError):
    """The agent could not do what it was asked for; its own words."""


class Agent:
    """A machine's agent; the machine runs. NoAgentError where it has no vsock device."""

    def __init__(self, machine: Machine) -> None:
        from hv.devices.virtio.vsock import Vsock

        device = next((device for device in machine.devices.values() if isinstance(device, Vsock)), None)
        if device is None:
            raise NoAgentError("the machine has no vsock device to reach an agent by", "start it with --vsock SOCKET")
        self._machine = machine
        self._device: Vsock = device
        self._stream: socket | None = None

    def version(self, timeout: float = PATIENCE) -> tuple[str, list[str]]:
        """Its protocol's version, and the commands it has. NoAgentError where it speaks another one."""
        words = self.ask("ping", timeout=timeout).split()
        if len(words) < 2 or words[0] != "pyhv-agent" or words[1] not in VERSIONS:
            raise NoAgentError(f"what listens at the guest's vsock port {PORT} is no agent of ours",
                               "use the agent of this pyhv")
        return words[1], words[2:]

    def ask(self, *words: str, timeout: float = PATIENCE, once: bool = False) -> str:
        """A request; what stands behind `ok`. RefusedError, NoAgentError. `once` for one that must not be repeated."""
        return self.read_reply(words[0], self._exchange(self.request_line(*words), monotonic() + timeout, once=once))

    @staticmethod
    def request_line(*words: str) -> bytes:
        """The line of a request. RefusedError where it can't be one."""
        request = " ".join(words)
        if not request.isascii() or not request.isprintable() or len(request) >= REPLY_MOST \
                or len(request.split()) != len(words):
            raise RefusedError(f"{request!r:.80} is no request", "words of printable ASCII without spaces")
        return request.encode() + b"\n"

    @staticmethod
    def read_reply(name: str, line: str) -> str:
        """What stands behind `ok` in the answer to request `name`. RefusedError."""
        kind, _, text = line.partition(" ")
        if kind == "ok":
            return text
        raise RefusedError(f"the guest's agent: {name}: {text if kind == 'error' else line}")

    def close(self) -> None:
        """Hang up."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _exchange(self, request: bytes, end: float, lines: int = 1, once: bool = False) -> str:
        """Send it and read the `lines` that answer, by other streams where one breaks unless it may be sent `once`."""
        refusals, sent = 0, False
        while not sent and (left := end - monotonic()) > 0 and self._machine.running():
            try:
                if self._stream is None:
                    self._await_reset(min(left, RESET_SECONDS))
                    self._stream = connect_bare(self._device, PORT, min(left, ANSWER_SECONDS))
                sent = once
                return self._talk(self._stream, request, end if once else min(end, monotonic() + ANSWER_SECONDS), lines)
            except ConnectionRefusedError:
                refusals += 1
                if refusals == REFUSALS_MOST:
                    raise NoAgentError("the guest has no agent", _HINT) from None
            except OSError:
                pass            # a stream that broke, or no answer in time
            self.close()
            sleep(max(0.0, min(AGAIN, end - monotonic())))
        raise NoAgentError("the guest's agent does not answer" if self._machine.running() else "the machine has ended",
                           "is the guest busy, or without pyhv's agent?")

    def _await_reset(self, seconds: float) -> None:
        """Until the guest knows that its old streams are lost: new ones would be lost with them."""
        end = monotonic() + seconds
        try:
            while not self._device.reset_taken and monotonic() < end:
                sleep(RESET_LOOK)
        except QueueError:
            pass                # connecting will show

    def _talk(self, stream: socket, request: bytes, end: float, lines: int) -> str:
        """Requests over `stream`; what answers them, a line each. OSError where it breaks, or takes too long."""
        stream.settimeout(max(0.001, end - monotonic()))
        stream.sendall(request)     # of more than one, what answers fits into a socket until all are sent
        most = REPLY_MOST * lines
        got = b""
        while got.count(b"\n") < lines:
            if len(got) >= most:
                self.close()
                raise RefusedError(f"the guest's agent answers with more than {most} bytes", "it is none of ours")
            if (left := end - monotonic()) <= 0:
                raise TimeoutError
            stream.settimeout(left)
            part = stream.recv(most - len(got))
            if not part:
                raise ConnectionResetError
            got += part
        return "\n".join("".join(chr(byte) if byte in _PRINTABLE else "?" for byte in line)
                         for line in got.split(b"\n")[:lines])
