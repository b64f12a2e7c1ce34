"""What a host must have to go on with a snapshot: noted when it is taken, compared when it is restored.

Compared are the processor features that the guest saw against those that this host's KVM can give, whether ring 0 needs
help here (hv/softkvm), and the processor's maker: guests patch themselves for it.
Driven by tests/unit/test_snapshot_host.py.
"""

from __future__ import annotations

__all__ = ["check_facts", "check_host", "host_facts"]

from struct import iter_unpack

from hv.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.kvm.system import Kvm
    from hv.machine.machine import Machine
    from hv.snapshot.format import Snapshot

# (leaf, subleaf) -> registers whose bits are features, with the bits that are not: they follow the guest's own settings
# (OSXSAVE, OSPKE) or are pyhv's (hypervisor, TSC deadline, HTT). SDM 2A, CPUID; APM 3, appendix E.
_EAX, _EBX, _ECX, _EDX = range(4)
FEATURES = {
    (0x1, 0): {_ECX: 1 << 24 | 1 << 27 | 1 << 31, _EDX: 1 << 28},
    (0x7, 0): {_EBX: 0, _ECX: 1 << 4, _EDX: 0},
    (0x7, 1): {_EAX: 0, _EDX: 0},
    (0xD, 0): {_EAX: 0, _EDX: 0},
    (0xD, 1): {_EAX: 0},
    (0x80000001, 0): {_ECX: 0, _EDX: 0},
    (0x80000008, 0): {_EBX: 0},
}
_NAMES = ("EAX", "EBX", "ECX", "EDX")
_HEADER, _ROW = 8, 40            # struct kvm_cpuid2, kvm_cpuid_entry2
_BOOT_ID: list[str] = []        # read once: no process outlives its host's boot
KHZ_TOLERANCE = 250             # parts per million: KVM takes such a guest clock for the host's (arch/x86/kvm/x86.c)


def host_facts(machine: Machine) -> dict[str, Any]:
    """What is noted of the host."""
    return {"maker": maker(bytes(machine.kvm.supported_cpuid())), "tsc_khz": machine.vcpus[0].fd.tsc_khz(),
            "ring0": "emulated" if machine.softkvm is not None else "native", "boot_id": boot_id()}


def boot_id() -> str:
    """Names this host from its boot to its next one (random(4)); "" where it can't be told."""
    if not _BOOT_ID:
        try:
            with open("/proc/sys/kernel/random/boot_id", "rb", 0) as file:
                _BOOT_ID.append(file.read(64).decode("ascii", "replace").strip())
        except OSError:
            return ""
    return _BOOT_ID[0]


def check_host(snapshot: Snapshot, kvm: Kvm, *, emulated: Callable[[], bool]) -> None:
    """SnapshotError where this host can't go on with the snapshot; `emulated` tells whether ring 0 needs help here.

    Where it was taken since this host booted nothing is compared: asking KVM what it offers takes 0.7 ms.
    """
    if (here := boot_id()) and snapshot.part("host").get("boot_id") == here:
        return
    saved = snapshot.part("vcpus", 0, "CPUID2", kind=bytes)
    offered = bytes(kvm.supported_cpuid())
    if (theirs := snapshot.part("host", "maker", kind=str)) != (ours := maker(offered)):
        raise SnapshotError("host.maker", f"taken on a processor of {theirs!r}, this is one of {ours!r}",
                            "restore it on a host of the first kind")
    kind = "emulated" if emulated() else "native"
    if (theirs := snapshot.part("host", "ring0", kind=str)) != kind:
        raise SnapshotError("host.ring0", f"taken where guest ring 0 is {theirs}, here it is {kind}",
                            "the guest was set up for the other kind: boot it anew here")
    have = features(offered)
    for (leaf, subleaf, register), bits in features(saved).items():
        missing = bits & ~have.get((leaf, subleaf, register), 0)
        if missing:
            raise SnapshotError(f"vcpus[0].CPUID2 leaf {leaf:#x}.{subleaf} {_NAMES[register]}",
                                f"this host lacks processor features that the guest uses (bits {missing:#x})",
                                "restore it on a host with at least the features of the one it was taken on")


def check_facts(snapshot: Snapshot) -> None:
    """What can be told before the state is here: whether it is worth while to bring it. SnapshotError."""
    from hv.kvm.system import Kvm
    from hv.softkvm.detect import is_candidate

    with Kvm() as kvm:
        ours = maker(bytes(kvm.supported_cpuid()))
    if (theirs := snapshot.part("host", "maker", kind=str)) != ours:
        raise SnapshotError("host.maker", f"runs on a processor of {theirs!r}, this is one of {ours!r}",
                            "move it to a host of the first kind")
    if snapshot.part("host", "ring0", kind=str) == "emulated" and not is_candidate():
        raise SnapshotError("host.ring0", "runs where guest ring 0 is emulated, here it is native", "boot it anew here")


def features(table: bytes) -> dict[tuple[int, int, int], int]:
    """The feature words of a struct kvm_cpuid2."""
    found = {}
    count = int.from_bytes(table[:4], "little")
    rows = table[_HEADER:_HEADER + _ROW * count]
    for function, index, _, *registers in iter_unpack("<7I12x", rows[:len(rows) // _ROW * _ROW]):
        for register, ignored in FEATURES.get((function, index), {}).items():
            found[function, index, register] = registers[register] & ~ignored
    return found


def maker(table: bytes) -> str:
    """GenuineIntel, AuthenticAMD ... (leaf 0)."""
    first = table[_HEADER:_HEADER + _ROW]
    for function, _, _, _, ebx, ecx, edx in iter_unpack("<7I12x", first if len(first) == _ROW else b""):
        if function == 0:
            return b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx)).decode("latin-1")
    return ""
