"""Network namespaces held by a descriptor: no mount, no name, gone with the last process that has them (man 7
network_namespaces).

    with new_netns() as netns:
        netns.path                  # /proc/PID/fd/N, which any process with the right may open as long as we hold it
        with inside(netns.fd): ...  # this thread is in it meanwhile

Driven by tests/root/test_network_netlink.py.
"""

from __future__ import annotations

__all__ = ["Netns", "inside", "new_netns", "new_netns_of_user"]

import os

from hv.errors import HvError
from hv.linux.ns import CLONE_NEWNET, setns, unshare

_OWN = "/proc/thread-self/ns/net"


class Netns:
    """A network namespace that lives at least until close()."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def path(self) -> str:
        """Where other processes find it, as long as this one holds it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Netns:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class inside:
    """This thread is in the namespace of descriptor `fd` within the block; for good in a process that may not go back,
    root of a user namespace who came from the host's network."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        self._back = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._fd, CLONE_NEWNET)
        except BaseException:
            os.close(self._back)
            raise

    def __exit__(self, *error: object) -> None:
        try:
            setns(self._back, CLONE_NEWNET)
        except HvError:
            if _is_first_user_namespace():
                os._exit(70)    # going on in a foreign namespace would be worse
        finally:
            os.close(self._back)


def _is_first_user_namespace() -> bool:
    with open("/proc/self/uid_map", "rb", 0) as file:
        return file.read(64).split() == [b"0", b"0", b"4294967295"]


def new_netns() -> Netns:
    """A new one, its loopback interface up. KernelError where that is not allowed."""
    from hv.linux.ns import loopback_up

    back = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        try:
            fd = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
            loopback_up()
        finally:
            try:
                setns(back, CLONE_NEWNET)
            except HvError:
                os._exit(70)
    finally:
        os.close(back)
    return Netns(fd)


def new_netns_of_user() -> Netns:
    """The same for root of a user namespace, who could not come back from it: made by a process that ends."""
    from hv.linux.ns import loopback_up

    wait, go = os.pipe2(os.O_CLOEXEC)
    asked, told = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            os.close(go)
            unshare(CLONE_NEWNET)
            loopback_up()
            os.write(told, b".")
            os.read(wait, 1)
        finally:
            os._exit(0)
    for fd in (wait, told):
        os.close(fd)
    try:
        if not os.read(asked, 1):
            raise HvError("no network namespace can be made here", "user.max_net_namespaces may be used up")
        return Netns(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(asked)
        os.close(go)
        os.waitpid(pid, 0)
