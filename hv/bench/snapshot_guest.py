"""The guests of `pyhv bench snapshot`: a Linux that answers, booted once and saved; and a tiny one for comparison.

The Linux is the micro kernel with 256 MiB, a socket device, and hv/bench/answer.c as its first program. All of it lies
below a temporary folder. Driven by tests/kvm/test_bench_snapshot.py.
"""

from __future__ import annotations

__all__ = ["MIB", "WORK", "Conversation", "Guests", "compiled", "first_answer", "over_vsock", "without_vsock"]

import select
import shutil
import socket
import subprocess
import time
from _queue import Empty, SimpleQueue
from pathlib import Path

from hv.bench.harness import say
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import ConfigError, HvError
from hv.guests import path as guest_path
from hv.kernels.cache import find
from hv.kernels.initramfs import busybox
from hv.machine.config import MachineConfig
from hv.machine.machine import Machine
from hv.machine.recipe_change import with_changes
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MIB = 1 << 20
MEMORY = 256 * MIB
WORK = 20 * MIB                 # answer.c: what `d` changes
VSOCK_PORT = 5000
_BOOT, _ANSWER, _TOUCH = 120.0, 20.0, 120.0     # s
_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec /bin/answer
"""


class Conversation:
    """Types at a machine's console and waits for what comes back."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._heard: SimpleQueue[bytes] = SimpleQueue()
        machine.console.add_sink(self._heard.put)

    def ask(self, typed: bytes, answer: bytes, timeout: float = _ANSWER) -> None:
        """Type, wait for the answer. HvError where it does not come."""
        self._machine.console.send(typed)
        self.wait(answer, timeout)

    def wait(self, text: bytes, timeout: float) -> None:
        """Wait until the guest has said `text`."""
        seen = b""
        end = time.monotonic() + timeout
        while text not in seen:
            try:
                seen += self._heard.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                raise HvError(f"the guest did not say {text!r} within {timeout:g} s but {seen[-200:]!r} "
                              f"({self._machine.outcome})") from None


class Guests:
    """Snapshots below `place`: `idle`, and those made when they are first asked for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.vsock = str(place / "v")
        self.idle = str(place / "idle")
        self._touched = self._tiny = self._alone = ""
        folder = find("micro")
        if folder is None:
            raise ConfigError("no micro kernel in the cache", "pyhv kernel build micro")
        program = compiled("answer", place, "-static")
        if program is None:
            raise ConfigError("no C compiler for the guest's program", "install the package gcc")
        config = MachineConfig(str(folder / "vmlinux"), memory=MEMORY, devices=(VsockConfig(self.vsock),),
                               initrd=busybox(init=_INIT, files=((program, "bin/answer"),)))
        say("booting the Linux guest")
        with Machine(config) as machine:
            talk = Conversation(machine)
            machine.start()
            talk.wait(b"answer: ready", _BOOT)
            for _ in range(2):          # the way to an answer has been gone once
                talk.ask(b"?", b"!")
                over_vsock(self.vsock)
            time.sleep(1)
            save(machine, self.idle)

    @property
    def touched(self) -> str:
        """The Linux guest, its program's memory touched: from here on the program changes it in ring 3 alone."""
        if not self._touched:
            folder = str(self.place / "touched")
            with restore(self.idle) as machine:
                talk = Conversation(machine)
                machine.start()
                talk.ask(b"t", b"T", _TOUCH)
                time.sleep(0.5)
                save(machine, folder)
            self._touched = folder
        return self._touched

    @property
    def alone(self) -> str:
        """The idle Linux guest, its socket device without a host side: many can run at once."""
        if not self._alone:
            folder = str(self.place / "alone")
            with restore(self.idle, recipe=without_vsock(self.idle)) as machine:
                talk = Conversation(machine)
                machine.start()
                talk.ask(b"?", b"!")
                time.sleep(0.5)
                save(machine, folder)
            self._alone = folder
        return self._alone

    @property
    def tiny(self) -> str:
        """The guest `echo`, which QEMU can boot everywhere, 64 MiB."""
        if not self._tiny:
            folder = str(self.place / "tiny")
            config = MachineConfig(guest_path("echo"), memory=64 * MIB, cmdline="echo", raw_cmdline=True)
            with Machine(config) as machine:
                talk = Conversation(machine)
                machine.start()
                talk.wait(b"echo: ready", _ANSWER)
                talk.ask(b"x", b"x")
                save(machine, folder)
            self._tiny = folder
        return self._tiny


def without_vsock(folder: str) -> dict[str, Any]:
    """The recipe of a snapshot, its socket device without a host side."""
    return with_changes(Snapshot(folder).part("config"), vsock={"socket": None})


def over_vsock(path: str) -> None:
    """One question by the socket device; returns with the answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_ANSWER)
        sock.connect(path)
        sock.sendall(b"CONNECT %d\n?" % VSOCK_PORT)
        seen = b""
        while b"!" not in seen:
            data = sock.recv(64)
            if not data:
                raise HvError(f"the guest hung up its vsock stream after {seen!r}")
            seen += data


def first_answer(command: list[str], typed: bytes, answer: bytes, *, again: bool = False,
                 end: bytes = b"") -> tuple[float, float]:
    """Start a VMM whose console is its standard streams: ms from there to the first answer, and to its end.

    `again`: what is typed before the guest runs is lost, so it is typed every millisecond. `end`: what ends the guest;
    without it the VMM is told to (SIGTERM).
    """
    start = time.perf_counter_ns()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          bufsize=0) as child:
        try:
            assert child.stdin is not None and child.stdout is not None
            seen = b""
            child.stdin.write(typed)
            while answer not in seen:
                if select.select([child.stdout], [], [], 0.001 if again else _ANSWER)[0]:
                    data = child.stdout.read(4096)
                    if not data:
                        raise HvError(f"{command[0]} ended without an answer")
                    seen += data
                elif time.perf_counter_ns() - start > _ANSWER * 1e9:
                    raise HvError(f"no answer from the guest of {command[0]}")
                elif again:
                    child.stdin.write(typed)
            answered = time.perf_counter_ns()
            if end:
                child.stdin.write(end)
            else:
                child.terminate()
            child.wait(_ANSWER)
            return (answered - start) / 1e6, (time.perf_counter_ns() - start) / 1e6
        except (BrokenPipeError, subprocess.TimeoutExpired) as error:
            raise HvError(f"{command[0]}: {error}") from None
        finally:
            child.kill()


def compiled(name: str, place: Path, *options: str) -> str | None:
    """hv/bench/NAME.c as a program in `place`; None where there is no compiler."""
    program = place / name
    compiler = shutil.which("cc")
    if compiler is None:
        say(f"no C compiler: {name}.c is left out")
        return None
    done = subprocess.run([compiler, "-O2", "-o", str(program), *options, str(Path(__file__).with_name(f"{name}.c")),
                           "-pthread"], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise HvError(f"{name}.c: {done.stderr.strip().splitlines()[-1] if done.stderr else 'cc failed'}")
    return str(program)
