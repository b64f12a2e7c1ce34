"""SCMP_ACT_NOTIFY with a real supervisor behind listenerPath."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
from fcntl import ioctl

import pytest
from framework.children import SECONDS, enter, in_child, profile, rule

from hv.container.seccomp.notify import send_listener
from hv.errors import HvError
from hv.linux.syscall import try_syscall

MKDIR, GETPPID, GETTID = 83, 110, 186
NOTIF_RECV, NOTIF_SEND, CONTINUE = 0xC0502100, 0xC0182101, 1    # include/uapi/linux/seccomp.h


class Supervisor(threading.Thread):
    """Takes one listener, and answers what it is asked until all who can ask have ended."""

    def __init__(self, path, answer) -> None:
        super().__init__(daemon=True)
        self.answer, self.asked, self.message, self.error = answer, [], None, None
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        self.server.settimeout(SECONDS)
        self.start()

    def run(self) -> None:
        try:
            connection, _ = self.server.accept()
            with connection:
                data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
                while more := connection.recv(1 << 16):
                    data += more
            self.message, (listener,) = json.loads(data), fds
            self._serve(listener)
            os.close(listener)
        except Exception as error:
            self.error = error
        finally:
            self.server.close()

    def _serve(self, listener: int) -> None:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        while True:
            events = poller.poll(1000 * SECONDS)
            if not events or not events[0][1] & select.POLLIN:
                return
            notice = bytearray(80)      # struct seccomp_notif
            ioctl(listener, NOTIF_RECV, notice)
            cookie, pid, _, number = struct.unpack_from("<QIIi", notice)
            self.asked.append((pid, number))
            value, error, flags = self.answer(number)
            ioctl(listener, NOTIF_SEND, struct.pack("<QqiI", cookie, value, error, flags))


def test_a_supervisor_decides(tmp_path):
    """As the runtime does it: C2 sends its listener, the runtime hands it on with the state, C2 goes on."""
    answers = {MKDIR: (0, 0, 0), GETPPID: (0, -95, 0), GETTID: (0, 0, CONTINUE)}
    supervisor = Supervisor(tmp_path / "agent.sock", lambda number: answers[number])
    wanted = profile(*(rule(name, "SCMP_ACT_NOTIFY") for name in ("mkdir", "getppid", "gettid")),
                     listenerPath=str(tmp_path / "agent.sock"), listenerMetadata="MKNOD=/dev/null é\U0001f600")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def calls():
        ours.close()
        fd = enter(wanted)
        socket.send_fds(theirs, [b"n"], [fd])
        os.close(fd)
        assert theirs.recv(1) == b"g"
        return [try_syscall(MKDIR, str(tmp_path / "never").encode(), 0o700), try_syscall(GETPPID),
                try_syscall(GETTID) == os.getpid()]

    state = {"ociVersion": "1.2.0", "id": "box", "status": "creating", "pid": 0, "bundle": "/b",
             "annotations": {"long": "x" * 300_000}}

    def runtime():
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        send_listener(wanted, state, 4422, fd)
        os.close(fd)
        ours.send(b"g")

    helper = threading.Thread(target=runtime, daemon=True)
    helper.start()
    result = in_child(calls)
    helper.join(SECONDS)
    supervisor.join(SECONDS)
    ours.close()
    theirs.close()
    assert supervisor.error is None
    assert result == (0, [0, -95, True])
    assert not (tmp_path / "never").exists()            # the supervisor only said so
    assert [number for _, number in supervisor.asked] == [MKDIR, GETPPID, GETTID]
    assert supervisor.message == {"ociVersion": "1.2.0", "fds": ["seccompFd"], "pid": 4422,
                                  "metadata": "MKNOD=/dev/null é\U0001f600", "state": state | {"pid": 4422}}


@pytest.mark.parametrize("path", ["nobody.sock", "n" * 200])
def test_no_supervisor(tmp_path, path):
    reader, writer = os.pipe()
    with pytest.raises(HvError, match=r"linux\.seccomp\.listenerPath .*: ") as caught:
        send_listener({"listenerPath": f"{tmp_path}/{path}"}, {"ociVersion": "1.2.0"}, 1, reader)
    assert "listen" in caught.value.hint
    os.close(reader)
    os.close(writer)
