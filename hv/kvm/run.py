"""Where things are in struct kvm_run (linux/kvm.h, uapi), the page a vCPU shares with its driver.

Offsets are in bytes. The vCPU loop reads them through casts of one memoryview (an index into a cast
costs 30 ns, a ctypes field 100), so each offset also has the form it is indexed with: `x // 4` for the
32-bit view and so on. tests/unit/test_kvm_abi.py holds every offset to the header.
"""

from __future__ import annotations

REQUEST_INTERRUPT_WINDOW = 0    # u8
IMMEDIATE_EXIT = 1              # u8
EXIT_REASON = 8                 # u32
READY_FOR_INTERRUPT = 12        # u8
IF_FLAG = 13                    # u8
CR8 = 16                        # u64
APIC_BASE = 24                  # u64
HW_EXIT_REASON = 32             # u64: KVM_EXIT_UNKNOWN
FAIL_ENTRY_REASON = 32          # u64: KVM_EXIT_FAIL_ENTRY
IO_DIRECTION = 32               # u8:  KVM_EXIT_IO
IO_SIZE = 33                    # u8
IO_PORT = 34                    # u16
IO_COUNT = 36                   # u32
IO_DATA_OFFSET = 40             # u64, from the start of kvm_run
DEBUG_EXCEPTION = 32            # u32: KVM_EXIT_DEBUG
DEBUG_PC = 40                   # u64
DEBUG_DR6 = 48                  # u64
MMIO_ADDR = 32                  # u64: KVM_EXIT_MMIO
MMIO_DATA = 40                  # u8[8]
MMIO_LEN = 48                   # u32
MMIO_IS_WRITE = 52              # u8
INTERNAL_SUBERROR = 32          # u32: KVM_EXIT_INTERNAL_ERROR
INTERNAL_NDATA = 36             # u32
INTERNAL_DATA = 40              # u64[16]
EMULATION_FLAGS = 40            # u64: suberror KVM_INTERNAL_ERROR_EMULATION
EMULATION_INSN_SIZE = 48        # u8
EMULATION_INSN_BYTES = 49       # u8[15]
SYSTEM_EVENT_TYPE = 32          # u32: KVM_EXIT_SYSTEM_EVENT
MSR_ERROR = 32                  # u8:  KVM_EXIT_X86_RDMSR, WRMSR
MSR_REASON = 40                 # u32
MSR_INDEX = 44                  # u32
MSR_DATA = 48                   # u64
VALID_REGS = 288                # u64: sync regs
DIRTY_REGS = 296                # u64
SYNC_REGS = 304                 # struct kvm_regs
SYNC_SREGS = 448                # struct kvm_sregs
SYNC_EVENTS = 760               # struct kvm_vcpu_events
