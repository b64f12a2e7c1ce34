"""A processor's whole state, to plain data and back.

KVM's own structures are kept as they are in memory (asm/kvm.h): they are an ABI that does not change, and restoring is
one ioctl each. The order of loading matters (Documentation/virt/kvm/api.rst; found out on real guests where that is
silent): CPUID decides what the rest may hold, SREGS2 brings the APIC base, the local APIC must be there before the MSRs
of its timer, IA32_TSC before IA32_TSC_DEADLINE, which comes last of the MSRs; MP_STATE comes when all else stands.
Driven by tests/kvm/test_snapshot.py.
"""

from __future__ import annotations

__all__ = ["load_vcpu", "save_vcpu", "settable_msrs"]

from struct import error as StructError
from struct import pack, unpack_from

from hv.errors import KernelError, SnapshotError
from hv.kvm import ioctl as req
from hv.kvm.const import KVM_CAP_XSAVE2
from hv.linux.libc import ioctl_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.kvm.system import Kvm
    from hv.kvm.vcpu import VcpuFd
    from hv.kvm.vm import VmFd

# In the order in which they are loaded; XSAVE apart, its size depends on the processor.
BEFORE_MSRS = ("SREGS2", "XCRS", "XSAVE", "REGS", "LAPIC")
BEHIND_MSRS = ("DEBUGREGS", "VCPU_EVENTS", "MP_STATE")
SETS: dict[str, int] = {kind: getattr(req, f"KVM_SET_{kind}") for kind in (*BEFORE_MSRS, *BEHIND_MSRS)}
XSAVE_LEAST = 4096
MSR_TSC, MSR_TSC_DEADLINE = 0x10, 0x6E0
CPUID_ENTRY, CPUID_HEADER, CPUID_MOST = 40, 8, 256      # struct kvm_cpuid2, KVM_MAX_CPUID_ENTRIES
MSRS_MOST = 1024                # KVM_GET_MSRS takes fewer than MAX_IO_MSRS, 256, at once (arch/x86/kvm/x86.c)
_AT_ONCE = 200
_TSC_SLACK = 100_000_000        # cycles: more than loading takes, much less than a host's counter is away


def settable_msrs(kvm: Kvm, cpuid: bytes) -> list[int]:
    """The MSRs that hold guest state and that this host lets us set, found out on a processor of a throw-away VM.

    KVM lists some that it will not take back, as IA32_ARCH_CAPABILITIES on some hosts.
    """
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_bytes("CPUID2", cpuid)
            values = vcpu.get_msrs(kvm.msr_indices())
            refused = set(vcpu.set_msrs(values))
    return _in_order([index for index in values if index not in refused])


def _in_order(indices: list[int]) -> list[int]:
    last = (MSR_TSC, MSR_TSC_DEADLINE)
    return [index for index in indices if index not in last] + [index for index in last if index in indices]


def xsave_size(vm: VmFd) -> int:
    """Bytes of the XSAVE area: 4 KiB, more where the guest may use AMX (KVM_CAP_XSAVE2)."""
    return max(XSAVE_LEAST, vm.check(KVM_CAP_XSAVE2))


def save_vcpu(vcpu: VcpuFd, msrs: list[int], xsave: int) -> dict[str, Any]:
    """The state of a processor that stands outside the guest with no exit half served."""
    state: dict[str, Any] = {"CPUID2": vcpu.cpuid}
    for kind in (*BEFORE_MSRS, *BEHIND_MSRS):
        if kind == "XSAVE":
            state[kind] = vcpu.get_bytes("XSAVE2" if xsave > XSAVE_LEAST else "XSAVE", xsave)
        else:
            state[kind] = vcpu.get_bytes(kind)
    values: dict[int, int] = {}
    for start in range(0, len(msrs), _AT_ONCE):
        values |= vcpu.get_msrs(msrs[start:start + _AT_ONCE])
    state["msrs"] = [[index, values[index]] for index in msrs if index in values]
    return state


def load_vcpu(vcpu: VcpuFd, state: dict[str, Any], where: str) -> None:
    """Give a new processor that state. Untrusted: SnapshotError names the field, with `where` before it."""
    if not isinstance(state, dict):
        raise SnapshotError(where, "is no object", "the state is damaged or hostile")
    _load_cpuid(vcpu, state.get("CPUID2"), f"{where}.CPUID2")
    _load_kinds(vcpu, BEFORE_MSRS, state, where)
    _load_msrs(vcpu, state.get("msrs"), f"{where}.msrs")
    _mend_deadline(vcpu, dict(state["msrs"][-2:]))      # where _in_order puts the two it is about
    _load_kinds(vcpu, BEHIND_MSRS, state, where)


def _load_cpuid(vcpu: VcpuFd, data: object, where: str) -> None:
    if not isinstance(data, bytes) or not CPUID_HEADER < len(data) <= CPUID_HEADER + CPUID_MOST * CPUID_ENTRY \
            or int.from_bytes(data[:4], "little") * CPUID_ENTRY + CPUID_HEADER != len(data):
        raise SnapshotError(where, "is no CPUID table", "the state is damaged or hostile")
    try:
        ioctl_bytes(vcpu.fd, req.KVM_SET_CPUID2, data, "KVM_SET_CPUID2")
    except KernelError as error:
        raise _refusal(where, error) from None
    vcpu.cpuid = data


def _load_kinds(vcpu: VcpuFd, kinds: tuple[str, ...], state: dict[str, Any], where: str) -> None:
    for kind in kinds:
        request = SETS[kind]
        size = xsave_size(vcpu.vm) if kind == "XSAVE" else request >> 16 & 0x3FFF     # asm-generic/ioctl.h
        data = state.get(kind)
        if not isinstance(data, bytes) or len(data) != size:
            raise SnapshotError(f"{where}.{kind}", f"is not {size} bytes",
                                "the state is damaged, or of a host with another processor")
        try:
            ioctl_bytes(vcpu.fd, request, data, f"KVM_SET_{kind}")
        except KernelError as error:
            raise _refusal(f"{where}.{kind}", error) from None


def _load_msrs(vcpu: VcpuFd, pairs: object, where: str) -> None:
    try:
        flat = [int(number) for index, value in pairs for number in (index, value)]  # type: ignore[attr-defined]
        rows = pack(f"<{len(flat)}Q", *flat)
        if len(flat) > 2 * MSRS_MOST or any(index >> 32 for index in flat[::2]):
            raise ValueError
    except (TypeError, ValueError, StructError):
        raise SnapshotError(where, "are not pairs of an MSR's number and value", "the state is damaged or hostile") \
            from None
    step = 16 * _AT_ONCE        # struct kvm_msr_entry
    for start in range(0, len(rows), step):
        piece = rows[start:start + step]
        count = len(piece) >> 4
        done = ioctl_bytes(vcpu.fd, req.KVM_SET_MSRS, pack("<II", count, 0) + piece, "KVM_SET_MSRS")
        if done < count:
            index, value = unpack_from("<QQ", piece, 16 * done)
            raise SnapshotError(f"{where}: MSR {index:#x}", f"this host does not take {value:#x}",
                                "the snapshot is of another kind of host, or damaged")


def _mend_deadline(vcpu: VcpuFd, saved: dict[int, int]) -> None:
    """Where KVM can't set the time stamp counter (it says it has, and has not), the timer must end in as much time.

    Seen on software KVMs, where guests read the host's counter. Linux is told to keep time by kvmclock there.
    """
    deadline, tsc = saved.get(MSR_TSC_DEADLINE, 0), saved.get(MSR_TSC)
    if deadline and tsc is not None:
        off = vcpu.get_msrs([MSR_TSC]).get(MSR_TSC, tsc) - tsc
        if abs(off) > _TSC_SLACK:
            vcpu.set_msrs({MSR_TSC_DEADLINE: min(max(deadline + off, 1), (1 << 64) - 1)})


def _refusal(where: str, error: KernelError) -> SnapshotError:
    return SnapshotError(where, f"KVM refuses it ({error})", "the state is damaged, or of another kind of host")
