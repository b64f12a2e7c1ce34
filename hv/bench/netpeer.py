"""The host's end of the network benchmark: a tap, a TCP socket that swallows, a UDP socket that echoes."""

from __future__ import annotations

__all__ = ["NetPeer"]

import contextlib
import os
import shutil
import socket
import subprocess
import threading

ADDRESS, GUEST, PREFIX = "10.77.0.1", "10.77.0.2", 30
PAYLOAD = 44 * 1460             # of one segment (guests/bench/net_user_program.c)
_NAME = "pyhvb"
_SILENCE = 20.0         # s after which a guest is taken for gone


class NetPeer:
    """`tap` is the interface's name, "" where none can be made; then `reason` says why. Everything goes with it."""

    def __init__(self) -> None:
        self.tap = ""
        self.reason = ""
        self.received = 0           # bytes of TCP, all connections together
        self.order = 0              # how often a piece of it was not what the guest sends (each word counts up)
        self._sockets: list[socket.socket] = []

    @property
    def words(self) -> str:
        """What the bench guest's command line needs."""
        if not self.tap:
            return ""
        tcp, udp = (made.getsockname()[1] for made in self._sockets)
        peer, address = (int.from_bytes(socket.inet_aton(text), "big") for text in (ADDRESS, GUEST))
        return f"peer={peer:#x} address={address:#x} tcp={tcp} udp={udp}"

    def __enter__(self) -> NetPeer:
        name = f"{_NAME}{os.getpid()}"[:15]
        program = shutil.which("ip")
        if program is None:
            self.reason = "no `ip` program (iproute2)"
            return self
        for command in (("tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"),
                        ("addr", "add", f"{ADDRESS}/{PREFIX}", "dev", name), ("link", "set", name, "up")):
            done = subprocess.run([program, *command], capture_output=True, text=True, timeout=20, check=False)
            if done.returncode:
                self.reason = f"ip {' '.join(command)}: {done.stderr.strip()}"
                self.tap = name
                self.__exit__()
                return self
            self.tap = name
        tcp = socket.create_server((ADDRESS, 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((ADDRESS, 0))
        self._sockets = [tcp, udp]
        for work in (self._accept, self._echo):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for made in self._sockets:
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)     # wakes its thread
            made.close()
        if self.tap:
            subprocess.run(["ip", "link", "delete", self.tap], capture_output=True, timeout=20, check=False)
            self.tap = ""

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._sockets[0].accept()
                connection.settimeout(_SILENCE)
                threading.Thread(target=self._swallow, args=(connection,), daemon=True).start()

    def _swallow(self, connection: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        at = 0
        with connection, contextlib.suppress(OSError):
            while count := connection.recv_into(buffer):
                # One word of each piece: enough to see that nothing is missing or twice, without a cost.
                word = -at % 4
                if word + 4 <= count:
                    place = (at + word) % PAYLOAD
                    self.order += int.from_bytes(buffer[word:word + 4], "little") != place // 4
                at += count
                self.received += count

    def _echo(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self._sockets[1].recvfrom(2048)
                if not sender:
                    return          # shut down
                self._sockets[1].sendto(data, sender)
