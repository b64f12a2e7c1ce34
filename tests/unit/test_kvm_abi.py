"""Every ioctl number, constant, structure size and field offset against the installed kernel header.

A small C program prints what the header says; Python says what the bindings say.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from hv.kvm import abi, abi_chips, abi_io, abi_state, abi_x86, const, ioctl, run

STRUCTURES = {
    "kvm_userspace_memory_region": abi.UserspaceMemoryRegion, "kvm_pit_config": abi.PitConfig,
    "kvm_enable_cap": abi.EnableCap, "kvm_irq_level": abi_io.IrqLevel, "kvm_irqfd": abi_io.Irqfd,
    "kvm_ioeventfd": abi_io.Ioeventfd, "kvm_coalesced_mmio_zone": abi_io.CoalescedZone,
    "kvm_dirty_log": abi_io.DirtyLog, "kvm_clear_dirty_log": abi_io.ClearDirtyLog,
    "kvm_msr_filter_range": abi.MsrFilterRange, "kvm_msr_filter": abi.MsrFilter, "kvm_msi": abi_io.Msi,
    "kvm_irq_routing_entry": abi_io.IrqRoutingEntry, "kvm_create_device": abi_io.CreateDevice,
    "kvm_device_attr": abi_io.DeviceAttr, "kvm_regs": abi_x86.Regs, "kvm_segment": abi_x86.Segment,
    "kvm_dtable": abi_x86.Dtable, "kvm_sregs": abi_x86.Sregs, "kvm_cpuid_entry2": abi_x86.CpuidEntry2,
    "kvm_fpu": abi_state.Fpu, "kvm_xcr": abi_state.Xcr, "kvm_xcrs": abi_state.Xcrs,
    "kvm_lapic_state": abi_state.LapicState, "kvm_mp_state": abi_state.MpState,
    "kvm_debugregs": abi_state.DebugRegs, "kvm_vcpu_events": abi_state.VcpuEvents,
    "kvm_irqchip": abi_chips.IrqchipState,
    "kvm_pit_channel_state": abi_chips.PitChannelState, "kvm_pit_state2": abi_chips.PitState2,
    "kvm_clock_data": abi_chips.ClockData, "kvm_sregs2": abi_state.Sregs2, "kvm_translation": abi_state.Translation,
}
RUN_FIELDS = {
    "REQUEST_INTERRUPT_WINDOW": "request_interrupt_window", "IMMEDIATE_EXIT": "immediate_exit",
    "EXIT_REASON": "exit_reason", "READY_FOR_INTERRUPT": "ready_for_interrupt_injection", "IF_FLAG": "if_flag",
    "CR8": "cr8", "APIC_BASE": "apic_base", "HW_EXIT_REASON": "hw.hardware_exit_reason",
    "FAIL_ENTRY_REASON": "fail_entry.hardware_entry_failure_reason", "IO_DIRECTION": "io.direction",
    "IO_SIZE": "io.size", "IO_PORT": "io.port", "IO_COUNT": "io.count", "IO_DATA_OFFSET": "io.data_offset",
    "DEBUG_EXCEPTION": "debug.arch.exception", "DEBUG_PC": "debug.arch.pc", "DEBUG_DR6": "debug.arch.dr6",
    "MMIO_ADDR": "mmio.phys_addr", "MMIO_DATA": "mmio.data", "MMIO_LEN": "mmio.len",
    "MMIO_IS_WRITE": "mmio.is_write", "INTERNAL_SUBERROR": "internal.suberror", "INTERNAL_NDATA": "internal.ndata",
    "INTERNAL_DATA": "internal.data", "EMULATION_FLAGS": "emulation_failure.flags",
    "EMULATION_INSN_SIZE": "emulation_failure.insn_size", "EMULATION_INSN_BYTES": "emulation_failure.insn_bytes",
    "SYSTEM_EVENT_TYPE": "system_event.type", "MSR_ERROR": "msr.error", "MSR_REASON": "msr.reason",
    "MSR_INDEX": "msr.index", "MSR_DATA": "msr.data", "VALID_REGS": "kvm_valid_regs", "DIRTY_REGS": "kvm_dirty_regs",
    "SYNC_REGS": "s.regs.regs", "SYNC_SREGS": "s.regs.sregs", "SYNC_EVENTS": "s.regs.events",
}


def numbers(module: object) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.startswith("KVM_") and isinstance(value, int)}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (apt-get install gcc)")
    lines = ["#include <linux/kvm.h>", "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    for name in (*numbers(ioctl), *numbers(const)):
        lines += [f"#ifdef {name}", f'printf("{name} %lu\\n", (unsigned long)({name}));', "#endif"]
    for c_name, structure in STRUCTURES.items():
        lines.append(f'printf("sizeof {c_name} %zu\\n", sizeof(struct {c_name}));')
        for field in structure._fields_:
            if field[0].strip("0123456789") in ("pad", "padding", "reserved"):
                continue
            lines.append(f'printf("{c_name}.{field[0]} %zu\\n", offsetof(struct {c_name}, {field[0]}));')
    for name, c_name in RUN_FIELDS.items():
        lines.append(f'printf("run.{name} %zu\\n", offsetof(struct kvm_run, {c_name}));')
    lines.append("return 0; }")
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text("\n".join(lines))
    subprocess.run([compiler, "-w", "-o", folder / "abi", folder / "abi.c"], check=True, timeout=60)
    output = subprocess.run([folder / "abi"], check=True, timeout=10, capture_output=True, text=True).stdout
    return {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in output.splitlines()}


@pytest.mark.parametrize("module", [ioctl, const], ids=["requests", "constants"])
def test_numbers_match_the_header(header: dict[str, int], module: object) -> None:
    ours = numbers(module)
    known = {name: value for name, value in ours.items() if name in header}
    assert {name: header[name] for name in known} == known
    # An older header may lack the newest names; most must be there or this test checks nothing.
    assert len(known) >= 0.9 * len(ours), sorted(set(ours) - set(known))


def test_structures_match_the_header(header: dict[str, int]) -> None:
    for c_name, structure in STRUCTURES.items():
        assert ctypes.sizeof(structure) == header[f"sizeof {c_name}"], c_name
        for field in structure._fields_:
            key = f"{c_name}.{field[0]}"
            if key in header:
                assert getattr(structure, field[0]).offset == header[key], key


def test_kvm_run_offsets_match_the_header(header: dict[str, int]) -> None:
    ours = {name: value for name, value in vars(run).items() if name.isupper()}
    assert set(ours) == set(RUN_FIELDS), "every offset is checked"
    assert {name: header[f"run.{name}"] for name in ours} == ours


def test_shared_numbers_stay_distinct() -> None:
    assert ioctl.KVM_GET_PIT2 != ioctl.KVM_GET_VCPU_EVENTS
    values = list(numbers(ioctl).values())
    assert len(values) == len(set(values))


def test_header_is_real() -> None:
    assert Path("/usr/include/linux/kvm.h").exists(), "apt-get install linux-libc-dev"
