"""Architectures and their system calls: names to numbers, read from syscalls.txt (scripts/gen_syscalls.py writes it).

The table is read when a filter has to be compiled, and only then. Architectures that no host of pyhv can run are
known by name: the kernel will never report one, so a profile that lists them gets the same answers without code for
them. Driven by tests/unit/test_seccomp_syscalls.py.
"""

from __future__ import annotations

__all__ = ["ARCHITECTURES", "IPC", "NATIVE", "OTHER_ARCHITECTURES", "SOCKETCALL", "TABLE", "Architecture", "read_table"]

import os

TABLE = __file__.rpartition("/")[0] + "/syscalls.txt"


class Architecture:
    """One ABI: what the kernel calls it, where its numbers stand in the table."""

    def __init__(self, token: int, column: int, wide: bool, bit: int = 0) -> None:
        self.token = token      # include/uapi/linux/audit.h: AUDIT_ARCH_*
        self.column = column
        self.wide = wide        # arguments have 64 bits; of the others only the lower halves are compared
        self.bit = bit          # set in every number


X32_BIT = 0x40000000            # arch/x86/include/uapi/asm/unistd.h: __X32_SYSCALL_BIT
ARCHITECTURES = {
    "SCMP_ARCH_X86_64": Architecture(0xC000003E, 0, True),
    "SCMP_ARCH_X86": Architecture(0x40000003, 1, False),
    # x32 is x86_64 for the kernel, but for the bit. Pointers and longs have 32 bits.
    "SCMP_ARCH_X32": Architecture(0xC000003E, 2, False, X32_BIT),
    "SCMP_ARCH_AARCH64": Architecture(0xC00000B7, 3, True),
}
# runtime-spec 1.2, config-linux.md, Seccomp, and libseccomp 2.6
OTHER_ARCHITECTURES = frozenset("SCMP_ARCH_" + name for name in (
    "ARM", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC", "PPC64", "PPC64LE", "S390",
    "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB"))
NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}.get(os.uname().machine, "")

# Calls that i386 also makes through one other call, whose first argument tells which: name -> that argument.
SOCKETCALL = {name: number for number, name in enumerate((      # include/uapi/linux/net.h: SYS_*
    "socket", "bind", "connect", "listen", "accept", "getsockname", "getpeername", "socketpair", "send", "recv",
    "sendto", "recvfrom", "shutdown", "setsockopt", "getsockopt", "sendmsg", "recvmsg", "accept4", "recvmmsg",
    "sendmmsg"), 1)}
IPC = {"semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4, "msgsnd": 11, "msgrcv": 12, "msgget": 13, "msgctl": 14,
       "shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24}    # include/uapi/linux/ipc.h


def read_table() -> dict[str, list[str]]:
    """Name to row: a number or "-" for each column."""
    with open(TABLE) as file:
        lines = file.read().split("\n")
    return {name: row.split(" ") for name, _, row in [line.partition(" ") for line in lines if line[:1] != "#"] if row}
