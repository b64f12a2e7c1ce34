"""The program passt as a child process: its start, its complaints, its end.

passt translates between frames and the host's sockets, so a guest reaches the network without root. One end of a socket
pair is its descriptor 3, and it ends when the other end closes: with us, whatever way we end. It is in a process group
of its own, since ^C is for the guest. As root it changes to user nobody by itself.

Driven by tests/unit/test_virtio_net_user.py and tests/kvm/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["ADDRESS", "GATEWAY", "Passt", "arp"]

import os
from _socket import (
    AF_INET,
    AF_UNIX,
    MSG_WAITALL,
    SO_RCVTIMEO,
    SO_REUSEADDR,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
    inet_aton,
    socket,
    socketpair,
)
from fcntl import F_DUPFD_CLOEXEC, fcntl
from struct import pack
from time import monotonic, sleep

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.net_config import Forward

PROGRAM = "passt"
ADDRESS, PREFIX, GATEWAY = "10.0.2.15", 24, "10.0.2.2"      # what DHCP tells the guest; the gateway is this host
START_SECONDS, END_SECONDS = 10, 2
_EVERYBODY = b"\xff" * 6
_COMPLAINTS_MOST = 4096
# What it says on the way, and nobody needs to know.
_NOISE = ("Failed to send", "Don't run as root")


class Passt:
    """A running passt; `fd` is our end of the stream, `errors` what it writes on standard error."""

    def __init__(self, forwards: tuple[Forward, ...], mtu: int) -> None:
        program = _find()
        for forward in forwards:
            _check_port(*forward)
        arguments = [PROGRAM, "--foreground", "--quiet", "--fd", "3", "--address", ADDRESS, "--netmask", str(PREFIX),
                     "--gateway", GATEWAY]
        if mtu:
            arguments += ["--mtu", str(mtu)]
        for protocol, address, host, guest in forwards:
            place = f"{address}/{host}:{guest}" if address else f"{host}:{guest}"
            arguments += ["--udp-ports" if protocol == "udp" else "--tcp-ports", place]
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        self.errors, complaints = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # above the descriptors that the child gets, wherever ours were
        high = [fcntl(fd, F_DUPFD_CLOEXEC, 10) for fd in (theirs.fileno(), complaints)]
        try:
            self.pid = os.posix_spawn(program, arguments, os.environ, setpgroup=0, setsigmask=[], file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, high[1], 2), (os.POSIX_SPAWN_DUP2, high[0], 3)])
        except OSError as error:
            ours.close()
            os.close(self.errors)
            raise ConfigError(f"--net user: {program}: {error.strerror}", "is it executable?") from None
        finally:
            for fd in (*high, complaints):
                os.close(fd)
            theirs.close()
        try:
            self._wait(ours)
        except BaseException:
            self.fd = ours.detach()
            self.close()
            raise
        self.fd = ours.detach()
        os.set_blocking(self.fd, False)

    def _wait(self, ours: socket) -> None:
        """Until it answers: what the gateway's hardware address is. ConfigError with its complaint if not."""
        question = arp(_EVERYBODY, ADDRESS, GATEWAY)    # from nobody in particular
        ours.setsockopt(SOL_SOCKET, SO_RCVTIMEO, pack("ll", START_SECONDS, 0))
        try:
            ours.sendall(pack(">I", len(question)) + question)
            size = int.from_bytes(ours.recv(4, MSG_WAITALL), "big")
            if size and len(ours.recv(size & 0xFFFF, MSG_WAITALL)) == size:
                return      # some frame: it works
        except OSError:
            pass
        raise ConfigError(f"--net user: {PROGRAM} did not start: {self.complaint() or 'it says nothing'}",
                          "see the command `passt --help`; or use --net tap")

    def complaint(self) -> str:
        """The first line of what it wrote since the last call, of those that matter."""
        try:
            text = os.read(self.errors, _COMPLAINTS_MOST).decode(errors="replace")
        except BlockingIOError:
            return ""
        return next((line for line in text.splitlines() if line.strip() and not line.startswith(_NOISE)), "")

    def close(self) -> None:
        """End it, and wait for its end."""
        if self.fd < 0:
            return
        for fd in (self.fd, self.errors):
            os.close(fd)
        self.fd = self.errors = -1
        end = monotonic() + END_SECONDS
        while monotonic() < end:        # by itself, within a few ms
            if self._reap(os.WNOHANG):
                return
            sleep(0.001)
        os.kill(self.pid, 9)
        self._reap(0)

    def _reap(self, options: int) -> bool:
        try:
            return os.waitpid(self.pid, options)[0] != 0
        except ChildProcessError:
            return True     # somebody else has waited for it


def arp(sender: bytes, address: str, wanted: str) -> bytes:
    """A frame that asks for the hardware address of `wanted` (RFC 826)."""
    return (_EVERYBODY + sender + pack(">HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + sender + inet_aton(address)
            + bytes(6) + inet_aton(wanted))


def _find() -> str:
    for folder in os.get_exec_path():
        path = os.path.join(folder, PROGRAM)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise ConfigError("--net user needs the program passt, which is not installed",
                      "install the package passt (Debian, Ubuntu, Fedora and others have it); or use --net tap")


def _check_port(protocol: str, address: str, host: int, guest: int) -> None:
    """passt goes on without a port that it can't have: find out before."""
    test = socket(AF_INET, (SOCK_DGRAM if protocol == "udp" else SOCK_STREAM) | SOCK_CLOEXEC)
    try:
        if protocol == "tcp":
            test.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        test.bind((address, host))
    except OSError as error:
        raise ConfigError(f"--net user: port {host}/{protocol} of this host: {error.strerror}",
                          "forward another one") from None
    finally:
        test.close()
