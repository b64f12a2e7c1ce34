"""`pyhv vm`: look after running VMs by their control sockets. Driven by tests/kvm/test_control.py."""

from __future__ import annotations

__all__ = ["VmConsole", "console", "list_vms", "pause", "resume", "stats", "status", "stop"]

import os
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, poll

from hv.cli.say import say
from hv.cli.vm_client import Vm, running_vms
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STDIN, STDOUT = 0, 1
ESCAPE = b"\x01"            # Ctrl-A, as in hv/cli/terminal.py
HELP = b"\r\npyhv: Ctrl-A then\r\n  h  this help    d  leave the guest running\r\n  a  send Ctrl-A itself\r\n"
_HISTORY = 4096             # bytes printed before that are shown first: the prompt that waits
_CHUNK = 4096
_HELD_MOST = 1 << 16        # bytes waiting for either side, beyond which its source is not read
_STOP_MARGIN = 15.0         # s beyond --timeout until a VM that does not end is given up


def list_vms(as_json: bool) -> int:
    """`pyhv vm ls`."""
    rows = running_vms()
    if as_json:
        print(dumps(rows, 2))
        return 0
    table = [("NAME", "PID", "STATE", "UPTIME", "CPUS", "MEMORY", "KERNEL")]
    for row in rows:
        known = row["state"] != "silent"
        table.append((row["name"], str(row["pid"]) if known else "-", row["state"],
                      _duration(row["uptime"]) if known else "-", str(row["cpus"]) if known else "-",
                      _size(row["memory"]) if known else "-", _printable(row["kernel"]) if known else "-"))
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    for line in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[6]]))
    return 0


def status(name: str, as_json: bool) -> int:
    """`pyhv vm status`."""
    with Vm(name) as vm:
        data = _data(vm.ask("status"))
    if as_json:
        print(dumps(data, 2))
        return 0
    data["uptime"] = _duration(data["uptime"])
    data["memory"] = _size(data["memory"])
    data["softkvm"] = "in use" if data["softkvm"] else "not needed"
    data["devices"] = ", ".join(f"{device['name']} ({device['kind']}{'' if device['driven'] else ', not driven'})"
                                for device in data["devices"]) or "none"
    for key, value in data.items():
        if value not in ([], None):
            print(f"{key:<9} {_printable(value)}")
    return 0


def stats(name: str, as_json: bool) -> int:
    """`pyhv vm stats`."""
    with Vm(name) as vm:
        data = _data(vm.ask("stats"))
    if as_json:
        print(dumps(data, 2))
        return 0
    memory = data["memory"]
    print(f"guest memory     {_size(memory['size'])}, in use {_size(memory['rss'])} (PSS {_size(memory['pss'])})")
    print(f"process          {_size(memory['process_rss'])} (PSS {_size(memory['process_pss'])})")
    for index, vcpu in enumerate(data["vcpus"]):
        exits = ", ".join(f"{kind} {count}" for kind, count in sorted(vcpu["exits"].items(), key=lambda i: -i[1]))
        print(f"vCPU {index:<11} {vcpu['cpu_seconds']:.3f} s of processor time{'; exits: ' + exits if exits else ''}")
    for device, counters in data["devices"].items():
        print(f"{device:<16} " + ", ".join(f"{key} {_printable(value)}" for key, value in counters.items() if value))
    if data["softkvm"]:
        print("software-KVM     " + ", ".join(f"{key} {value}" for key, value in data["softkvm"].items()))
    if not data["measured"]:
        print("exits            not counted; boot with --stats or --json")
    return 0


def pause(name: str) -> int:
    """`pyhv vm pause`."""
    with Vm(name) as vm:
        vm.ask("pause")
    return 0


def resume(name: str) -> int:
    """`pyhv vm resume`."""
    with Vm(name) as vm:
        vm.ask("resume")
    return 0


def stop(name: str, force: bool, timeout: float) -> int:
    """`pyhv vm stop`: ends when the VM has."""
    with Vm(name) as vm:
        reply = vm.ask("stop", force=force, timeout=timeout, patience=timeout + _STOP_MARGIN)
        if reply["forced"] and not force:
            say(f"pyhv: the guest did not answer its power button within {timeout:g} s and was ended")
        vm.socket.settimeout(_STOP_MARGIN)
        try:
            while vm.socket.recv(_CHUNK):
                pass            # until its process lets go
        except OSError:
            pass
    return 0


def console(name: str, view: bool) -> int:
    """`pyhv vm console`."""
    with Vm(name) as vm:
        vm.ask("console", history=_HISTORY, view=view)
        return VmConsole(vm, view).run()


class VmConsole:
    """Standard input and output joined to a VM's console, until it ends, the user leaves, or nobody reads."""

    def __init__(self, vm: Vm, view: bool) -> None:
        self._vm = vm
        self._types = not view
        self._saved: list[object] | None = None
        self._escaped = self._left = False
        self._to_guest = b""
        self._to_user = vm.rest()

    def run(self) -> int:
        """Exit code 0, whichever way it ended."""
        self._vm.socket.setblocking(False)
        try:
            if os.isatty(STDIN) and os.tcgetpgrp(STDIN) == os.getpgrp():
                from hv.linux.rawmode import set_raw

                say(f"pyhv: console of {self._vm.name}; Ctrl-A d leaves it, Ctrl-A h shows the keys")
                self._saved = set_raw(STDIN)
            ended = self._serve()
        finally:
            if self._saved is not None:
                from hv.linux.rawmode import restore

                restore(STDIN, self._saved)
        if self._saved is not None:
            say("\npyhv: the VM has ended" if ended else "\npyhv: left; the VM runs on")
        return 0

    def _serve(self) -> bool:
        """True where the VM ended, False where we leave it."""
        fd = self._vm.socket.fileno()
        open_in, more = True, True
        while more or self._to_user:
            waiter = poll()
            if more:
                waiter.register(fd, (POLLIN if len(self._to_user) < _HELD_MOST else 0)
                                | (POLLOUT if self._to_guest else 0))
            if open_in and more and len(self._to_guest) < _HELD_MOST:
                waiter.register(STDIN, POLLIN)
            if self._to_user:
                waiter.register(STDOUT, POLLOUT)
            ready = dict(waiter.poll())
            if ready.get(STDOUT) and not self._show():
                return False
            if ready.get(fd, 0) & POLLOUT:
                self._send()
            if ready.get(fd, 0) & (POLLIN | POLLHUP | POLLERR) and len(self._to_user) < _HELD_MOST:
                more = self._receive()
            if ready.get(STDIN):
                open_in = self._read()
            if self._left:
                return False
        return True

    def _receive(self) -> bool:
        try:
            data = self._vm.socket.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._to_user += data
        return bool(data)

    def _show(self) -> bool:
        try:
            self._to_user = self._to_user[os.write(STDOUT, self._to_user[:512]):]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _send(self) -> None:
        try:
            self._to_guest = self._to_guest[self._vm.socket.send(self._to_guest):]
        except BlockingIOError:
            pass
        except OSError:
            self._to_guest = b""

    def _read(self) -> bool:
        """Take from standard input; False at its end."""
        try:
            data = os.read(STDIN, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self._left = self._saved is not None        # the terminal is gone
            return False
        self._to_guest += data if self._saved is None else self._keys(data)
        if not self._types:
            self._to_guest = b""
        return True

    def _keys(self, data: bytes) -> bytes:
        """What of the keys is the guest's: all but what follows the escape key."""
        plain = bytearray()
        for value in data:
            key = bytes((value,))
            if self._escaped:
                self._escaped = False
                if key in (b"a", ESCAPE):
                    plain += ESCAPE
                elif key == b"d":
                    self._left = True
                    break
                else:
                    self._to_user += HELP
            elif key == ESCAPE:
                self._escaped = True
            else:
                plain += key
        return bytes(plain)


def _data(reply: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in reply.items() if key not in ("id", "ok")}


def _duration(seconds: float) -> str:
    whole = int(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f}".removesuffix(".0") + " MiB" if count < 10 << 30 else f"{count >> 30} GiB"


def _printable(value: object) -> str:
    """Text of a VM's, without what would move the cursor."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))
