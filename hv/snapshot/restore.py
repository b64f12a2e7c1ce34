"""From a snapshot to a machine that goes on where it was taken: the sibling of hv/machine/builder.py.

`restore` gives the machine, `rebuild` its parts in the order in which `build` does and for the same reasons. Guest RAM
is the snapshot's memory file, mapped MAP_PRIVATE: nothing is read before it is touched, clones share the page cache,
and each has its own copy of what it writes. Driven by tests/kvm/test_snapshot.py.
"""

from __future__ import annotations

__all__ = ["rebuild", "restore"]

import os

from hv.errors import ConfigError, SnapshotError
from hv.kvm.system import Kvm
from hv.machine.machine import Machine
from hv.machine.ramslots import RamSlots
from hv.machine.recipe import config_from
from hv.memory.guest import GuestMemory
from hv.memory.layout import IDENTITY_MAP, TSS
from hv.snapshot.format import MEMORY, Snapshot
from hv.snapshot.host import check_host
from hv.snapshot.machine import apply
from hv.snapshot.memory import check_memory, memory_stamp
from hv.snapshot.vmgenid import renew

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any

    from hv.devices.virtio.device import VirtioDevice
    from hv.machine.iothread import IoThread
    from hv.machine.loop import Loop


def restore(snapshot: Snapshot | str, *, loop: Loop | None = None, io: IoThread | None = None, private: bool = True,
            verify: bool = False, clock_now: bool = False, recipe: dict[str, Any] | None = None,
            backend: str = "file", prefetch: bool = False, record: float | None = None,
            allowed: Collection[str] = ()) -> Machine:
    """A machine that stands where `snapshot` (or the one in that folder) was taken; start() lets it go on.

    `private`: what it writes to disks stays with it. `verify`: compare all memory to its checksums first.
    `clock_now`: the guest's clock has gone on meanwhile. `recipe`: the configuration instead of the snapshot's, which
    may name other files and sockets (hv/machine/recipe.py, with_changes). `backend`: where guest RAM comes from, file,
    uffd or uffd:SOCKET (docs/lazy-memory.md). `prefetch`: read first what the guest touches first, as noted by a
    restore with `record`, the seconds to note that for (0: until a second after it printed something). `allowed`: the
    devices of the user's own, FILE.py:CLASS, that may run. `loop`, `io`: see Machine. SnapshotError, ConfigError say
    what can't be.
    """
    taken = Snapshot(snapshot) if isinstance(snapshot, str) else snapshot
    if recipe is None:
        recipe = taken.part("config")
    if has_disks(recipe, taken):
        from hv.snapshot.disks import disks_for_restore

        recipe = disks_for_restore(recipe, taken.part("disks", kind=list), taken.folder, private=private)
    try:
        config = config_from(recipe, allowed=allowed)
    except ConfigError as error:
        raise SnapshotError("config", str(error), error.hint) from None

    def memory(machine: Machine) -> GuestMemory:
        if backend != "file" or prefetch:
            from hv.snapshot.backing import make_memory

            return make_memory(machine, taken, config.memory, backend, verify=verify, prefetch=prefetch,
                               exact=record is not None)
        from hv.snapshot.watched import Watched

        fd = machine.own_fd(open_memory(taken, config.memory, verify=verify))
        ram = GuestMemory(config.memory, file=fd)
        Watched(machine, ram, fd)
        return ram

    def build(machine: Machine) -> None:
        rebuild(machine, taken, memory, clock_now=clock_now)
        renew(machine)
        if record is not None:
            from hv.snapshot.working_set import record as note

            note(machine, taken, record or None)
        machine.restored_from = taken.folder, taken.part("id", kind=str)

    return Machine(config, loop, build, io)


def has_disks(recipe: dict[str, Any], snapshot: Snapshot) -> bool:
    """Whether there is anything for disks_for_restore to do; so where the recipe is none, which it will say."""
    try:
        return bool(snapshot.part("disks", kind=list)) or any(
            entry["device"] == "disk" for entry in recipe["devices"])
    except (TypeError, LookupError):
        return True


def open_memory(snapshot: Snapshot, size: int, *, verify: bool) -> int:
    """A descriptor of the memory file, which is as it was written. SnapshotError otherwise.

    Size, inode and modification time say so without reading it; where they have changed, as after a copy, all of it is
    compared to the checksums.
    """
    difference = snapshot.state.get("parent") is not None
    members = [snapshot]
    if difference:
        from hv.snapshot.diff import chain_of

        members = chain_of(snapshot)
    for member in members:
        fd = open_checked(member, size, verify)
        if difference:
            os.close(fd)
    if difference:
        from hv.snapshot.diff import whole_memory

        fd = os.open(whole_memory(snapshot, size), os.O_RDONLY | os.O_CLOEXEC)
    return fd


def open_checked(snapshot: Snapshot, size: int, verify: bool) -> int:
    """Open its own memory file, and compare it to what was noted. One that is packed is unpacked first."""
    packed = bool(snapshot.part("memory").get("packed"))
    path = snapshot.memory_path
    if packed:
        from hv.snapshot.pack import open_checked_packed, plain_memory

        os.close(open_checked_packed(snapshot, size, verify))
        path = plain_memory(snapshot)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(MEMORY, f"{path}: {os.strerror(error.errno or 0)}", "the snapshot is incomplete") from None
    try:
        found, noted = memory_stamp(fd), dict(snapshot.part("memory"))
        sums = noted.pop("sums", None)
        if found["size"] != size:
            raise SnapshotError(MEMORY, f"is {found['size']} bytes, guest RAM is {size}",
                                "the file was cut, or swapped")
        if not packed and (verify or found != noted):
            check_memory(snapshot.folder, str(sums))
    except BaseException:
        os.close(fd)
        raise
    return fd


def rebuild(machine: Machine, snapshot: Snapshot, make_memory: Callable[[Machine], GuestMemory], *,
            clock_now: bool = False) -> None:
    """Give `machine` its memory, VM, devices and processors, then the state of each."""
    config = machine.config
    machine.memory = memory = make_memory(machine)
    machine.kvm = kvm = Kvm()
    kvm.require_api()
    machine.vm = vm = kvm.create_vm()
    if config.dirty_ring:
        from hv.machine.dirtyring import enable_rings, has_rings

        if has_rings(machine):
            enable_rings(machine)
        else:
            config.dirty_ring = 0       # the guest does not see how its changes are tracked
    emulated = config.softkvm == "on"
    if emulated and not config.dirty_ring and snapshot.state.get("used") is not None:
        machine.slots = RamSlots(vm, memory, snapshot.runs("used", memory.size))
    else:
        for slot, region in enumerate(memory.regions):
            vm.set_memory(slot, region.gpa, region.size, region.host)
    vm.set_identity_map_addr(IDENTITY_MAP)
    vm.set_tss_addr(TSS)
    if emulated:
        from hv.softkvm.helper import SoftKvm

        machine.softkvm = SoftKvm(machine)
        machine.softkvm.attach()
    vm.create_irqchip()

    from hv.machine.platform import add_devices
    from hv.machine.vcpu import Vcpu

    add_devices(machine)
    if machine.slots is not None:
        machine.mmio.ram = memory
    check_host(snapshot, kvm, emulated=emulated_here if emulated else bool)
    if config.devices:
        from hv.machine.attach import attach_devices

        attach_devices(machine, None)
    for index in range(config.cpus):
        machine.vcpus.append(Vcpu(machine, vm.create_vcpu(index)))
    apply(machine, snapshot, clock_now=clock_now)
    machine.at_start.append(lambda: go_on(machine))


def emulated_here() -> bool:
    """Whether this host's KVM may emulate ring 0; told without measuring."""
    from hv.softkvm.detect import is_candidate

    return is_candidate()


def go_on(machine: Machine) -> None:
    """The devices look at their queues, and tell the driver of what it may not have heard of."""
    for device in machine.devices.values():
        device.resume()
        remind(device)


def remind(device: VirtioDevice) -> None:
    """Interrupts for what was used before the snapshot and that the driver has not seen.

    An irqfd's signal may have been on its way when the state was read. One too many is harmless (2.7.7).
    """
    with device.lock:
        if device.running:
            for queue in device.queues:
                if queue.ready and queue.unseen():
                    device.interrupts.queue_used(queue.index)
