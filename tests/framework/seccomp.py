"""What seccomp's tests need: an interpreter of classic BPF, and libseccomp as the peer.

The interpreter does what the kernel does with a filter (net/core/filter.c, kernel/seccomp.c): 32-bit accumulator, loads
from struct seccomp_data, jumps forward. Anything else is an error of the program.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import struct
import tempfile

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
X32_BIT = 0x40000000
TOKENS = {"SCMP_ARCH_X86_64": X86_64, "SCMP_ARCH_X86": I386, "SCMP_ARCH_X32": X86_64, "SCMP_ARCH_AARCH64": AARCH64}


def seccomp_data(nr: int, arch: int, args: tuple[int, ...] = (), pointer: int = 0) -> bytes:
    """struct seccomp_data, little endian."""
    return struct.pack("<IIQ6Q", nr & 0xFFFFFFFF, arch, pointer, *args, *[0] * (6 - len(args)))


def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("<HBBI", program))


def interpret(program: list[tuple[int, int, int, int]], data: bytes) -> tuple[int, int]:
    """The filter's answer, and how many instructions it took."""
    words = struct.unpack("<16I", data)
    position = steps = accumulator = 0
    while True:
        code, yes, no, k = program[position]
        steps += 1
        position += 1
        if code == 0x06:                                    # BPF_RET | BPF_K
            return k, steps
        if code == 0x20:                                    # BPF_LD | BPF_W | BPF_ABS
            assert k % 4 == 0
            accumulator = words[k // 4]
        elif code == 0x54:                                  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= k
        elif code == 0x05:                                  # BPF_JMP | BPF_JA
            position += k
        else:
            taken = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k,
                     0x45: bool(accumulator & k)}[code]
            position += yes if taken else no


def check_form(program: list[tuple[int, int, int, int]]) -> None:
    """What the kernel asks of a program before it takes it: bpf_check_classic and seccomp_check_filter."""
    assert 0 < len(program) <= 4096
    for index, (code, yes, no, k) in enumerate(program):
        assert code in (0x06, 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45), hex(code)
        if code == 0x05:
            assert index + 1 + k < len(program)
        elif code in (0x15, 0x25, 0x35, 0x45):
            assert index + 1 + max(yes, no) < len(program)
        elif code == 0x20:
            assert k % 4 == 0 and k < 64
    assert program[-1][0] == 0x06


# libseccomp -------------------------------------------------------------------------------------------------------

ACTIONS = {"SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0, "SCMP_ACT_KILL_PROCESS": 0x80000000,
           "SCMP_ACT_TRAP": 0x30000, "SCMP_ACT_ERRNO": 0x50000, "SCMP_ACT_NOTIFY": 0x7FC00000,
           "SCMP_ACT_TRACE": 0x7FF00000, "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_ALLOW": 0x7FFF0000}
OPERATORS = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5,
             "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}
ARCHES = {"SCMP_ARCH_X86_64": X86_64, "SCMP_ARCH_X86": I386, "SCMP_ARCH_X32": 0x4000003E,
          "SCMP_ARCH_AARCH64": AARCH64}
_OPTIMIZE, _FULL_TREE = 8, 2
_UNKNOWN = -1


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def libseccomp() -> ctypes.CDLL | None:
    """The peer, or None where it is not installed."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    for name in ("seccomp_release", "seccomp_export_bpf", "seccomp_arch_add", "seccomp_attr_set",
                 "seccomp_rule_add_array"):
        getattr(library, name).argtypes = {
            "seccomp_release": (ctypes.c_void_p,),
            "seccomp_export_bpf": (ctypes.c_void_p, ctypes.c_int),
            "seccomp_arch_add": (ctypes.c_void_p, ctypes.c_uint32),
            "seccomp_attr_set": (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
            "seccomp_rule_add_array": (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p),
        }[name]
    return library


def action_value(name: str, errno: int | None) -> int:
    value = ACTIONS[name]
    return value | (1 if errno is None else errno) if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") else value


def peer_compile(library: ctypes.CDLL, profile: dict, tree: bool = False) -> bytes:
    """`profile` through libseccomp, in the way that the runtimes in C and Go feed it."""
    default = action_value(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    assert context
    try:
        for arch in profile.get("architectures", []):
            assert library.seccomp_arch_add(context, ARCHES[arch]) in (0, -17), arch
        if tree:
            assert library.seccomp_attr_set(context, _OPTIMIZE, _FULL_TREE) == 0
        for rule in profile.get("syscalls", []):
            action = action_value(rule["action"], rule.get("errnoRet"))
            if action == default:
                continue
            for name in rule["names"]:
                _peer_rule(library, context, name, action, rule.get("args") or [])
        with tempfile.TemporaryFile() as file:
            assert library.seccomp_export_bpf(context, file.fileno()) == 0
            return os.pread(file.fileno(), 1 << 20, 0)
    finally:
        library.seccomp_release(context)


def _peer_rule(library: ctypes.CDLL, context: int, name: str, action: int, args: list[dict]) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == _UNKNOWN:
        return
    compares = [_Compare(row["index"], OPERATORS[row["op"]], row["value"], row.get("valueTwo", 0)) for row in args]
    alone = len({row["index"] for row in args}) < len(args)
    for group in [[one] for one in compares] if alone else [compares]:
        array = (_Compare * max(len(group), 1))(*group)
        result = library.seccomp_rule_add_array(context, action, number, len(group), ctypes.addressof(array))
        if result not in (0, -17):
            raise OSError(-result, f"seccomp_rule_add {name} {args}: {os.strerror(-result)}")
