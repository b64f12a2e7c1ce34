"""Is this KVM a real one? Decided by how fast ring 0 runs.

Hardware runs about a billion instructions a second, KVM's instruction emulator a million or two. The measurement
costs two milliseconds, so it is made only where /proc/cpuinfo shows no VT-x or SVM. Driven by tests/kvm.
"""

from __future__ import annotations

__all__ = ["SOFTWARE_RING0", "is_candidate", "is_software", "measure_ring0"]

from time import perf_counter_ns

from hv.kvm.const import KVM_EXIT_HLT
from hv.memory.layout import PAGE_SIZE
from hv.memory.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.system import Kvm

SOFTWARE_RING0 = 20e6       # instructions/s: a factor of ten from either kind
_DECIDE = 1500              # iterations that tell a billion a second from a million
# 16-bit: mov ecx, imm32; 1: dec ecx; jnz 1b; hlt
_LOOP = b"\x66\xb9%b\x66\x49\x75\xfc\xf4"

_answer: bool | None = None     # per process: a host does not change its mind


def is_candidate() -> bool:
    """True where the processor shows no virtualisation extension, so that KVM can't be using one."""
    try:
        with open("/proc/cpuinfo", "rb", 0) as file:
            flags = next((line for line in file.read(8192).split(b"\n") if line.startswith(b"flags")), b"")
    except OSError:
        return True
    words = flags.split()
    return b"vmx" not in words and b"svm" not in words


def is_software(kvm: Kvm) -> bool:
    """True where this host's KVM emulates guest ring 0, by measurement."""
    global _answer
    if _answer is None:
        _answer = is_candidate() and measure_ring0(kvm, _DECIDE) < SOFTWARE_RING0
    return _answer


def measure_ring0(kvm: Kvm, iterations: int = 20000) -> float:
    """Guest ring-0 instructions per second: a two-instruction real-mode loop in a throw-away VM."""
    memory = Region(0, PAGE_SIZE)
    try:
        code = _LOOP % iterations.to_bytes(4, "little")
        memory.view[:len(code)] = code
        with kvm.create_vm() as vm:
            vm.set_memory(0, 0, PAGE_SIZE, memory.host)
            with vm.create_vcpu(0) as vcpu:
                sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
                sregs.cs.base = sregs.cs.selector = 0
                regs.rip, regs.rflags = 0, 2
                vcpu.set_sregs(sregs)
                vcpu.set_regs(regs)
                start = perf_counter_ns()
                reason = vcpu.run()
                spent = perf_counter_ns() - start
        return iterations * 2 / (spent / 1e9) if reason == KVM_EXIT_HLT else 0.0
    finally:
        memory.close()
