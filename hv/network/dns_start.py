"""Start and stop the name server of a network. All with the store's lock held.

It takes the network down when it ends, a little after the last member has left: so nothing of it stays on the host, and
instances that come one after the other don't each bring it up.

The file RUN/on/NETWORK/dns is locked by the server, and has its process ID: a lock that can be had means that there is
none. The sockets are opened here, so that a query waits in them until the server has started.

Driven by tests/root/test_network_dns.py.
"""

from __future__ import annotations

__all__ = ["ensure", "is_running", "leave", "stop"]

import errno
import os
import sys
from _socket import (
    AF_INET,
    SO_BINDTODEVICE,
    SO_REUSEADDR,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from fcntl import F_DUPFD_CLOEXEC, LOCK_EX, LOCK_NB, fcntl, flock
from time import monotonic, sleep

from hv.errors import NetworkError
from hv.network.addresses import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.network.definition import Network
    from hv.network.dns_names import Names
    from hv.network.store import Store

PORT, BACKLOG = 53, 16
STOP_PATIENCE = 2.0         # s for a server to end
_FIRST_FREE = 16            # descriptors of ours, out of the way of those that the server gets as 3, 4, 5
_CODE = "import sys; sys.path.insert(0, {place!r}); from hv.network.dns import main; main()"
_RESOLVER = "/etc/resolv.conf"
_SIGNALS = [number for number in range(1, 32) if number not in (9, 19)]     # all but SIGKILL and SIGSTOP


def ensure(store: Store, network: Network) -> None:
    """There is one, or there is one now. NetworkError where the port is taken."""
    if not network.dns:
        return
    lock = _try_lock(f"{store.on(network.name)}/dns")
    if lock < 0:
        return
    held = [lock]
    try:
        for kind in (SOCK_DGRAM, SOCK_STREAM):
            held.append(_bound(network, kind))
        pid = _start(store, network, held[1], held[2], lock)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % pid, 0)
    finally:
        for fd in held:
            os.close(fd)


def is_running(store: Store, network: Network) -> bool:
    """Whether there is one."""
    path = f"{store.on(network.name)}/dns"
    if not os.path.exists(path):
        return False
    lock = _try_lock(path)
    if lock >= 0:
        os.close(lock)
    return lock < 0


def _try_lock(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        flock(fd, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd


def _bound(network: Network, kind: int) -> int:
    made = socket(AF_INET, kind | SOCK_CLOEXEC)
    try:
        # heard from this bridge alone, and no other program's server on all addresses is in the way
        made.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, network.bridge.encode() + b"\0")
        made.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        made.bind((text(network.gateway), PORT))
        if kind == SOCK_STREAM:
            made.listen(BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise NetworkError(f"network {network.name}: port 53 of {text(network.gateway)} is in use by a program",
                               "have it listen elsewhere, or `pyhv network create --disable-dns`") from None
        raise NetworkError(f"network {network.name}: name server: {error.strerror}") from None
    return made.detach()


def _start(store: Store, network: Network, udp: int, tcp: int, lock: int) -> int:
    """Its process ID. It is nobody's child: by way of a process that has it and ends."""
    place = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    words = [sys.executable, "-I", "-S", "-E", "-c", _CODE.format(place=place), store.root, store.run, network.name,
             _RESOLVER]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    moved = [fcntl(fd, F_DUPFD_CLOEXEC, _FIRST_FREE) for fd in (null, null, null, udp, tcp, lock)]
    os.close(null)
    told, tell = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if not child:
            try:
                os.chdir("/")
                os.setsid()
                pid = os.posix_spawn(sys.executable, words, {"LANG": "C.UTF-8"}, setsigmask=[],
                                     setsigdef=_SIGNALS,
                                     file_actions=[(os.POSIX_SPAWN_DUP2, fd, at) for at, fd in enumerate(moved)])
                os.write(tell, b"%d" % pid)
            finally:
                os._exit(0)
        os.close(tell)
        tell = -1
        pid = int(os.read(told, 20) or b"0")
        try:
            os.waitpid(child, 0)
        except ChildProcessError:
            pass        # waited for elsewhere in this process
        if not pid:
            raise NetworkError(f"network {network.name}: its name server did not start")
        return pid
    finally:
        for fd in (*moved, told, tell):
            if fd >= 0:
                os.close(fd)


def leave(store: Store, network: Network, names: Names, lock: int) -> bool:
    """For the server: whether it may end, nobody being left; the network is down then, and the lock given back."""
    from hv.network.bridges import Bridges

    if not os.path.isdir(store.run):        # somebody deleted all of it: nobody else can know of the bridge any more
        Bridges(store).down(network)
        return True
    with store:
        if names.has_members():
            return False
        Bridges(store).down(network)
        os.close(lock)
        return True


def stop(store: Store, network: Network) -> None:
    """There is none any more."""
    path = f"{store.on(network.name)}/dns"
    if not os.path.exists(path):
        return
    end = monotonic() + STOP_PATIENCE
    while (lock := _try_lock(path)) < 0:
        with open(path, "rb", 0) as file:
            pid = file.read(20).strip()
        if pid.isdigit() and int(pid) > 1:
            try:
                os.kill(int(pid), 15 if monotonic() < end - STOP_PATIENCE / 2 else 9)
            except ProcessLookupError:
                pass
        if monotonic() > end:
            raise NetworkError(f"network {network.name}: its name server does not end", f"its process is {pid!r}")
        sleep(0.005)
    os.close(lock)
