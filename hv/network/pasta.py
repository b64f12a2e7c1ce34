"""The network of instances whose user is not root: the program pasta, one for each, between their network namespace and
the host's sockets.

It makes a tap device `eth0` in the namespace, opens what the instance opens as sockets of the user's, and listens on
published ports. It runs in the background and ends by SIGTERM; its pid is in RUN/networks/pasta/ID, which is in its
command line as well, so no other process is taken for it. Left out: IPv6.

Source: man 1 pasta. Driven by tests/root/test_instance_rootless.py.
"""

from __future__ import annotations

__all__ = ["NAME", "RESOLVER", "check", "interface", "start", "stop"]

import os
from _signal import SIGKILL, SIGPIPE, SIGTERM
from errno import EBUSY

from hv.errors import KernelError, NetworkError
from hv.linux.mount import clone_tree, move, umount
from hv.linux.ns import pidfd_open, pidfd_send_signal
from hv.network.shape import ANYWHERE, Interface

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from hv.network.shape import Port

NAME = "pasta"
ADDRESS, PREFIX, GATEWAY = "10.0.2.15", 24, "10.0.2.2"      # those of `--net user` (hv/devices/virtio/net_passt.py)
RESOLVER = "10.0.2.3"           # what is asked here goes to the host's name server
_MAC, _MTU = "02:70:0a:00:02:0f", 1500
_END_SECONDS = 2.0
_SAID_MOST = 4096
_NOISE = ("Failed to send", "Don't run as root")
_HINT = "package passt has it; --network none and host go without"


def interface(mac: str) -> Interface:
    """The one card that there is."""
    return Interface(NAME, "eth0", mac or _MAC, ADDRESS, PREFIX, GATEWAY, _MTU, "", [], False)


def check() -> str:
    """The program's path. NetworkError where it is not installed."""
    for folder in os.get_exec_path():
        path = os.path.join(folder, NAME)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise NetworkError("the program pasta, which networks without root need, is not installed", _HINT)


def start(path: str, instance: str, netns: str, mac: str, ports: Sequence[Port]) -> None:
    """Connect the namespace at `netns`; done once it is. `path`: the folder for pids. This process is in a mount
    namespace of its own."""
    program = check()
    os.makedirs(path, 0o700, exist_ok=True)
    _bind(netns, f"{path}/{instance}.netns")
    words = [NAME, "--quiet", "--config-net", "--ipv4-only", "--ns-ifname", "eth0", "--address", ADDRESS, "--netmask",
             str(PREFIX), "--gateway", GATEWAY, "--mtu", str(_MTU), "--dns-forward", RESOLVER,
             "--no-ndp", "--no-dhcpv6", "--no-ra", "--ns-mac-addr", mac or _MAC,
             "--pid", f"{path}/{instance}", "--tcp-ns", "none", "--udp-ns", "none"]
    for option, protocol in (("--tcp-ports", "tcp"), ("--udp-ports", "udp")):
        rows = [port for port in ports if port.protocol == protocol]
        for port in rows:
            place = "" if port.address == ANYWHERE else f"{port.address}/"
            words += [option, f"{place}{port.host}:{port.inner}"]
        if not rows:
            words += [option, "none"]
    words += ["--netns", f"{path}/{instance}.netns"]
    said = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        child = os.posix_spawn(program, words, {"PATH": "/usr/bin:/bin"}, setsigmask=[],
                               setsigdef=[SIGPIPE], file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, said, 1), (os.POSIX_SPAWN_DUP2, said, 2)])
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            os.lseek(said, 0, os.SEEK_SET)
            lines = os.read(said, _SAID_MOST).decode(errors="replace").splitlines()
            why = next((line.strip() for line in lines if line.strip() and not line.startswith(_NOISE)), f"code {code}")
            raise NetworkError(f"pasta: {why}", "--network none and host go without it")
    except OSError as error:
        raise NetworkError(f"pasta: {os.strerror(error.errno or 0)}", _HINT) from None
    finally:
        os.close(said)


def _bind(netns: str, place: str) -> None:
    """The namespace at `place` as well: pasta gives up the right to look into another process's /proc."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise NetworkError(f"/dev/net/tun: {os.strerror(error.errno or 0)}; pasta needs it",
                           "`chmod 666 /dev/net/tun` as root (udev's default); --network none and host go without") \
            from None
    os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    fds = [os.open(netns, os.O_RDONLY | os.O_CLOEXEC), os.open(place, os.O_PATH | os.O_CLOEXEC)]
    try:
        fds.append(clone_tree(fds[0], "", False))
        move(fds[2], fds[1])
    finally:
        for fd in fds:
            os.close(fd)


def stop(path: str, instance: str) -> None:
    """End the one of `instance`; nothing to do is no error."""
    place = f"{path}/{instance}"
    try:
        with open(place, "rb", 0) as file:
            pid = int(file.read(20))
        with open(f"/proc/{pid}/cmdline", "rb", 0) as file:
            if place.encode() not in file.read(_SAID_MOST).split(b"\0"):
                pid = 0
    except (OSError, ValueError):
        pid = 0
    if pid:
        _end(pid)
    for leaf in (place, f"{place}.netns"):
        try:
            try:
                os.unlink(leaf)
            except OSError as error:
                if error.errno != EBUSY:
                    continue
                umount(leaf)            # by this process, whose start() has failed
                os.unlink(leaf)
        except (OSError, KernelError):
            pass


def _end(pid: int) -> None:
    from select import POLLIN, poll

    try:
        fd = pidfd_open(pid)
    except KernelError:
        return
    try:
        waiter = poll()
        waiter.register(fd, POLLIN)
        for signal in (SIGTERM, SIGKILL):
            pidfd_send_signal(fd, signal)
            if waiter.poll(_END_SECONDS * 1000):
                return
    except KernelError:
        pass                        # it has ended
    finally:
        os.close(fd)
