"""Guests that are ready: booted once for each shape, saved, and gone on with in milliseconds by every later sandbox.

    machine = Templates(warn).machine(shape, cards, directory)       # restored, not started

A template is a snapshot (hv/snapshot) of a kernel whose init is the agent, idle, furnished (guest.py) and no more: a
root file system of mount points, no random numbers but the boot's, no stream. Its key names everything that made it:
kernel file, agent, initrd, memory, processors, cards, this pyhv. It is made under a lock, and appears whole or not at
all; one that can't be restored is made again. Guest RAM is its memory file, mapped MAP_PRIVATE: sandboxes share the
pages they do not write. Driven by tests/kvm/test_sandbox.py.
"""

from __future__ import annotations

__all__ = ["Templates"]

import os
from fcntl import LOCK_EX, flock

from hv.errors import HvError, SnapshotError
from hv.places import data_root
from hv.sandbox.kernel import find_kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.machine.machine import Machine
    from hv.sandbox.spec_guest import Shape

FORMAT = 3                      # another, where what a template holds changes and its parts do not
SHARE_TIMEOUT = "1.0"           # s; in the template 0, so that nothing of its folder is remembered
KEPT = 24                       # templates: some 20 MB each, and as many shapes as a host will see
BOOT_SECONDS = 300.0            # a kernel whose ring 0 is emulated takes 10, one with modules a minute
# Programs may listen on [::], but no card takes an address by itself, as in containers: it would wake the guest.
CMDLINE = "quiet rdinit=/init ipv6.disable_ipv6=1"


class Templates:
    """Those under data_root()/templates. `warn` is told when one is made, which takes seconds."""

    def __init__(self, warn: Callable[[str], None] = lambda text: None) -> None:
        self.folder = f"{data_root()}/templates"
        self.warn = warn

    def machine(self, shape: Shape, nets: list[dict[str, Any]], directory: str) -> Machine:
        """A machine that goes on with the template of `shape`, made first where there is none.

        `nets`: arguments of NetConfig for its cards, with their MAC addresses. `directory`: the folder that its share
        is from now on.
        """
        kernel = find_kernel(shape.kernel, shape.cpus)
        folder = f"{self.folder}/{self._key(shape, kernel, len(nets))}"
        for again in (False, True):
            if again or not os.path.isdir(folder):
                self._make(folder, shape, kernel, len(nets), anew=again)
            try:
                return self._restore(folder, nets, directory)
            except SnapshotError as error:
                if again:
                    raise
                self.warn(f"template {folder}: {error}; it is made anew")
        raise AssertionError

    def _key(self, shape: Shape, kernel: str, cards: int) -> str:
        from _blake2 import blake2b

        from hv.guests import program
        from hv.snapshot.format import VERSION

        parts: list[object] = [FORMAT, VERSION, _identity(kernel), _identity(program("agent")), CMDLINE,
                               _identity(shape.initrd) if shape.initrd else "", shape.memory, shape.cpus, cards]
        return blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()

    def _restore(self, folder: str, nets: list[dict[str, Any]], directory: str) -> Machine:
        from hv.devices.virtio.vsock import Vsock
        from hv.snapshot.format import Snapshot
        from hv.snapshot.restore import restore

        snapshot = Snapshot(folder)
        try:
            os.utime(f"{folder}.lock")      # when it was last used
        except OSError:
            pass                            # by somebody who may not note it
        recipe: dict[str, Any] = snapshot.part("config")
        entries = recipe.get("devices")
        fresh = iter(nets)
        try:
            assert isinstance(entries, list)
            for entry in entries:
                if entry["device"] == "share":
                    entry.update({"directory": directory, "timeout": SHARE_TIMEOUT})
                elif entry["device"] == "net":
                    from hv.devices.virtio.net_config import NetConfig

                    entry.clear()
                    entry.update({"device": "net"} | NetConfig(**next(fresh)).recipe())
        except (AssertionError, LookupError, TypeError, StopIteration):
            raise SnapshotError("config", "is none of a template", "it is made anew") from None
        machine = restore(snapshot, recipe=recipe)      # the agent sets the time of day
        for device in machine.devices.values():
            if isinstance(device, Vsock):
                device.lost_nothing()
        return machine

    def _make(self, folder: str, shape: Shape, kernel: str, cards: int, *, anew: bool) -> None:
        """Boot one and save it, unless somebody else has meanwhile."""
        from hv.snapshot.save import discard

        os.makedirs(self.folder, 0o700, exist_ok=True)
        fd = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            before = _identity(folder) if anew else ""
            flock(fd, LOCK_EX)
            if os.path.isdir(folder):
                if not anew or _identity(folder) != before:
                    return
                discard(folder)
            self._sweep()
            self.warn(f"a guest of {shape.memory} MiB is booted once, for all later ones to start from")
            boot(shape, kernel, cards, folder, self._stand_in())
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        """Remove those not used for longest, beyond KEPT. Who runs on one goes on: its memory file is open."""
        from hv.snapshot.save import discard

        found = [path for leaf in os.listdir(self.folder) if leaf.endswith(".lock")
                 and os.path.isdir(path := f"{self.folder}/{leaf}".removesuffix(".lock"))]
        for path in sorted(found, key=_last_used, reverse=True)[KEPT:]:
            discard(path)

    def _stand_in(self) -> str:
        """A folder with nothing but the mount points."""
        from hv.sandbox.guest import POINTS

        folder = f"{self.folder}/root"
        for name in POINTS:
            os.makedirs(f"{folder}/{name}", exist_ok=True)
        return folder


def boot(shape: Shape, kernel: str, cards: int, folder: str, stand_in: str) -> None:
    """Boot a guest, furnish it, and save it as `folder`."""
    from hv.machine.machine import Machine
    from hv.snapshot.save import save

    with Machine(configuration(shape, kernel, cards, stand_in)) as machine:
        machine.start()
        await_agent(machine)
        settle()
        save(machine, folder)


def configuration(shape: Shape, kernel: str, cards: int, directory: str) -> Any:
    """The machine that a template is, before it has booted."""
    from hv.devices.virtio.fs_config import ShareConfig
    from hv.devices.virtio.net_backend import Unplugged
    from hv.devices.virtio.net_config import NetConfig
    from hv.devices.virtio.net_packet import NetPacket
    from hv.devices.virtio.vsock_config import VsockConfig
    from hv.machine.config import MachineConfig
    from hv.sandbox.guest import TAG

    class Absent(Unplugged):
        """The driver takes no offload that the interface which comes later lacks."""

        features = NetPacket.features

    nets = [NetConfig(Absent(), mac=b"\x02pyhv" + bytes((card,))) for card in range(cards)]
    share = ShareConfig(directory, tag=TAG, submounts=True, timeout=0)
    return MachineConfig(kernel, initrd=initramfs(shape.initrd, directory), cmdline=CMDLINE, memory=shape.memory << 20,
                         cpus=shape.cpus, devices=(VsockConfig(None), share, *nets))


def initramfs(named: str, stand_in: str) -> bytes:
    """The folders of `stand_in`, and the agent as init; before it `named`, an archive with modules and their order."""
    from hv.guests import program
    from hv.kernels.initramfs import from_directory

    data = from_directory(stand_in, [(program("agent"), "init")])
    if named:
        with open(named, "rb") as file:
            first = file.read()
        data = first + bytes(-len(first) % 4) + data
    return data


def await_agent(machine: Machine) -> None:
    """Until the agent of a booting guest has furnished it. HvError with the last of its console where it does not."""
    from hv.sandbox.agent import GuestAgent
    from hv.sandbox.guest import furnish

    agent = GuestAgent(machine)
    try:
        agent.wait_ready(BOOT_SECONDS)
        furnish(agent)
    except HvError as error:
        said = bytes(machine.console.output[-300:]).decode(errors="replace").split("\n")
        last = " ".join(line.strip() for line in said if line.strip())
        outcome = machine.outcome
        why = f"{outcome.reason}: {outcome.detail}" if outcome is not None else str(error)
        raise HvError(f"the guest does not come up: {why}", f"its console ends: {last[-200:]!r}") from None
    finally:
        agent.close()


def settle(seconds: float = 0.3) -> None:
    """Let the guest take in that the stream has ended, and go idle."""
    from time import sleep

    sleep(seconds)


def _last_used(path: str) -> float:
    try:
        return os.stat(f"{path}.lock").st_mtime
    except OSError:
        return 0.0


def _identity(path: str) -> str:
    """What names the contents of a file, or a folder, without reading it."""
    try:
        status = os.stat(path)
    except OSError:
        return f"{path} -"
    return f"{path} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
