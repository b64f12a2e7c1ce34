"""bpf(2): programs loaded and attached to cgroups (man 2 bpf, include/uapi/linux/bpf.h).

Driven by tests/root/test_cgroups_unified.py.
"""

from __future__ import annotations

__all__ = ["CGROUP_DEVICE", "PROG_TYPE_CGROUP_DEVICE", "attach", "attached", "detach", "load", "program_by_id"]

from _ctypes import addressof
from _struct import pack

from hv.linux.syscall import buffer, syscall

_SYS_BPF = 321                          # arch/x86/entry/syscalls/syscall_64.tbl
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16      # enum bpf_cmd
PROG_TYPE_CGROUP_DEVICE = 15            # enum bpf_prog_type
CGROUP_DEVICE = 6                       # enum bpf_attach_type
_ALLOW_MULTI, _REPLACE = 2, 4           # BPF_F_*
_PROGRAMS_MOST = 64                     # BPF_CGROUP_MAX_PROGS
_QUERY_COUNT = 24                       # where union bpf_attr has query.prog_cnt


def _bpf(command: int, attr: object, size: int, name: str) -> int:
    return syscall(f"bpf({name})", _SYS_BPF, command, attr, size,
                   hint="it needs root (CAP_BPF and CAP_NET_ADMIN) and a kernel with CONFIG_CGROUP_BPF")


def load(kind: int, code: bytes) -> int:
    """BPF_PROG_LOAD: a descriptor of the program, which the kernel's verifier has accepted."""
    instructions, licence = buffer(len(code), code), buffer(16, b"Apache-2.0")
    # prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags
    attr = pack("IIQQIIQII", kind, len(code) // 8, addressof(instructions), addressof(licence), 0, 0, 0, 0, 0)
    return _bpf(_PROG_LOAD, attr, len(attr), "PROG_LOAD")


def attach(target: int, program: int, kind: int, *, replace_fd: int = -1) -> None:
    """BPF_PROG_ATTACH beside others, or in the place of `replace_fd`."""
    flags, old = (_ALLOW_MULTI | _REPLACE, replace_fd) if replace_fd >= 0 else (_ALLOW_MULTI, 0)
    attr = pack("IIIII", target, program, kind, flags, old)
    _bpf(_PROG_ATTACH, attr, len(attr), "PROG_ATTACH")


def detach(target: int, program: int, kind: int) -> None:
    """BPF_PROG_DETACH."""
    attr = pack("IIIII", target, program, kind, 0, 0)
    _bpf(_PROG_DETACH, attr, len(attr), "PROG_DETACH")


def attached(target: int, kind: int) -> list[int]:
    """BPF_PROG_QUERY: the ids of the programs attached to this very group."""
    ids = buffer(4 * _PROGRAMS_MOST)
    # target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt
    attr = buffer(32, pack("IIIIQI", target, kind, 0, 0, addressof(ids), _PROGRAMS_MOST))
    _bpf(_PROG_QUERY, attr, _QUERY_COUNT + 4, "PROG_QUERY")
    count = int.from_bytes(attr.raw[_QUERY_COUNT:_QUERY_COUNT + 4], "little")
    return [int.from_bytes(ids.raw[4 * index:4 * index + 4], "little") for index in range(count)]


def program_by_id(number: int) -> int:
    """BPF_PROG_GET_FD_BY_ID: a descriptor of a loaded program."""
    attr = pack("III", number, 0, 0)
    return _bpf(_PROG_GET_FD_BY_ID, attr, len(attr), "PROG_GET_FD_BY_ID")
