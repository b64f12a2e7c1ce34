"""A real guest whose init is the agent, its root a shared folder of busybox; its processes, seen from the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

from framework.linux import kernel

from hv import Machine, MachineConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.guests import program
from hv.kernels.initramfs import agent_alone
from hv.sandbox.agent import GuestAgent
from hv.sandbox.frames import ProcessSpec
from hv.sandbox.process import GuestProcess

COMMANDS = ("sh", "true", "cat", "echo", "sleep", "id", "stty", "ls", "md5sum", "env", "dd", "tty")


class Ran:
    """What became of a process: its two outputs, and how it ended."""

    def __init__(self, out: bytes, err: bytes, status: tuple[str, int]) -> None:
        self.out, self.err, self.status = out, err, status


class Guest:
    """A machine with the agent as init, whose loop a thread of ours serves."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.start()
        self.server = threading.Thread(target=lambda: machine.wait(500))
        self.server.start()
        self.device = machine.devices["vsock0"]
        self.agent = GuestAgent(machine)
        self.made: list[GuestProcess] = []
        self.root: Path

    def start(self, *argv: str, env: tuple[str, ...] = ("PATH=/bin",), stdin: int | None = None,
              stdout: int | None = None, stderr: int | None = None, **spec: object) -> GuestProcess:
        spoken = ProcessSpec(argv, env, **spec)         # type: ignore[arg-type]
        self.made.append(GuestProcess.start(self.device, spoken, stdin=stdin, stdout=stdout, stderr=stderr,
                                            loop=self.machine.loop))
        return self.made[-1]

    def run(self, *argv: str, given: bytes | None = None, timeout: float = 60, **options: object) -> Ran:
        """Run it to the end of its output."""
        files = [os.memfd_create(name) for name in ("in", "out", "err")]
        try:
            if given is not None:
                os.write(files[0], given)
                os.lseek(files[0], 0, os.SEEK_SET)
                options["stdin"] = files[0]
            one = self.start(*argv, stdout=files[1], stderr=files[2], **options)     # type: ignore[arg-type]
            status = one.wait_end(timeout)
            return Ran(*(os.pread(fd, 1 << 24, 0) for fd in files[1:]), status)
        finally:
            for fd in files:
                os.close(fd)

    def shell(self, script: str, **options: object) -> Ran:
        return self.run("sh", "-c", script, **options)      # type: ignore[arg-type]

    def close(self) -> None:
        self.agent.close()
        for one in self.made:
            one.close()
        self.machine.stop()
        self.server.join(30)
        self.machine.close()


class Terminal:
    """A process with a terminal (or pipes), to be typed at and waited for."""

    def __init__(self, guest: Guest, *argv: str, **options: object) -> None:
        self.out, theirs = os.pipe()
        mine, self.into = os.pipe()
        os.set_blocking(self.out, False)
        self.seen = b""
        options.setdefault("terminal", (24, 80))
        self.process = guest.start(*argv, stdin=mine, stdout=theirs, **options)     # type: ignore[arg-type]
        os.close(theirs)
        os.close(mine)

    def expect(self, text: bytes, timeout: float = 30) -> None:
        end = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            try:
                self.seen += os.read(self.out, 4096)
            except BlockingIOError:
                time.sleep(0.005)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.into, text)

    def close(self) -> None:
        os.close(self.into)
        os.close(self.out)


def make_root(folder: Path) -> str:
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc", "home", "empty"):
        (folder / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "bin/busybox")
    for name in COMMANDS:
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "bin/plain").write_text("not executable")
    (folder / "bin/noise").write_bytes(b"\0\1\2")
    (folder / "bin/noise").chmod(0o755)
    (folder / "home").chmod(0o777)
    subprocess.run(["gcc", "-Os", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-ffreestanding", "-o",
                    str(folder / "bin/patient"), str(Path(__file__).with_name("patient.c"))], check=True)
    return str(folder)


def boot(root: str, vsock: str | None = None) -> Guest:
    devices = (VsockConfig(vsock), ShareConfig(root, tag="root"), NetConfig("none", mac="02:00:00:00:00:01"))
    return Guest(Machine(MachineConfig(str(kernel("micro") / "vmlinux"), initrd=agent_alone(program("agent")),
                                       devices=devices, timeout=500)))
