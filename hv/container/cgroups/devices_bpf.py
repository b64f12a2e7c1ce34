"""The device rules of version 2: a small eBPF program that the kernel asks at each open and mknod.

Documentation/admin-guide/cgroup-v2.rst, Device controller; include/uapi/linux/bpf.h, struct bpf_cgroup_dev_ctx. The
rules are tried from the last to the first, as a later rule overrules an earlier one; a rule for a part of the access
that is asked for settles that part only, and what no rule speaks of is denied:

    r2 = type, r3 = access still to be settled, r4 = major, r5 = minor
    for each rule, last first:  not this type, major or minor? next rule
        deny:   r3 & access?    return 0
        allow:  r3 &= ~access;  nothing left? return 1
    return 0

Driven by tests/unit/test_cgroups_devices.py (an interpreter of these instructions) and, for real, by
tests/root/test_cgroups_unified.py.
"""

from __future__ import annotations

__all__ = ["assemble", "attach"]

import os
from _struct import pack

from hv.container.cgroups.devices import ANY, FULL, Rule
from hv.errors import HvError, KernelError
from hv.linux import bpf

# include/uapi/linux/bpf_common.h, bpf.h: operation | source | class
_LDX_W, _AND_K, _RSH_K, _MOV_K, _MOV_X, _JNE_K, _JEQ_K, _EXIT = 0x61, 0x54, 0x74, 0xB7, 0xBF, 0x55, 0x15, 0x95
_TYPES = {"b": 1, "c": 2}               # BPF_DEVCG_DEV_*
_RULES_MOST = 4096


def _insn(code: int, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return pack("<BBhi", code, src << 4 | dst, offset, value)


_HEAD = (_insn(_LDX_W, 2, 1, 0), _insn(_AND_K, 2, value=0xFFFF),    # access_type: the type below, the access above
         _insn(_LDX_W, 3, 1, 0), _insn(_RSH_K, 3, value=16), _insn(_LDX_W, 4, 1, 4), _insn(_LDX_W, 5, 1, 8))


def assemble(rules: list[Rule]) -> bytes:
    """The program for `rules`."""
    if len(rules) > _RULES_MOST:
        raise HvError(f"linux.resources.devices: {len(rules)} rules", f"at most {_RULES_MOST}")
    code = list(_HEAD)
    for allow, kind, major, minor, access in reversed(rules):
        if kind == "a":
            code += [_insn(_MOV_K, 0, value=int(allow)), _insn(_EXIT)]
            return b"".join(code)       # what comes after could never be reached, which the kernel's verifier refuses
        code += _rule(allow, kind, major, minor, access)
    code += [_insn(_MOV_K, 0, value=0), _insn(_EXIT)]
    return b"".join(code)


def _rule(allow: bool, kind: str, major: int, minor: int, access: int) -> list[bytes]:
    answer = [_insn(_MOV_K, 0, value=int(allow)), _insn(_EXIT)]
    if access != FULL:
        skip = len(answer)
        if allow:
            answer = [_insn(_AND_K, 3, value=~access & FULL), _insn(_JNE_K, 3, 0, skip, 0), *answer]
        else:
            answer = [_insn(_MOV_X, 1, 3), _insn(_AND_K, 1, value=access), _insn(_JEQ_K, 1, 0, skip, 0), *answer]
    tests = [(2, _TYPES[kind])]
    if major != ANY:
        tests.append((4, major))
    if minor != ANY:
        tests.append((5, minor))
    code = answer
    for register, value in reversed(tests):
        code = [_insn(_JNE_K, register, 0, len(code), value), *code]
    return code


def attach(path: str, rules: list[Rule]) -> None:
    """Make `rules` the device rules of the version 2 group at `path`; at no time are there none, once there were some.

    HvError where we may not. Programs further up hold as well: a device needs the consent of all.
    """
    group = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    old: list[int] = []
    fresh = -1
    try:
        old = [bpf.program_by_id(number) for number in bpf.attached(group, bpf.CGROUP_DEVICE)]
        fresh = bpf.load(bpf.PROG_TYPE_CGROUP_DEVICE, assemble(rules))
        if len(old) == 1:
            bpf.attach(group, fresh, bpf.CGROUP_DEVICE, replace_fd=old[0])
        else:
            bpf.attach(group, fresh, bpf.CGROUP_DEVICE)
            for program in old:
                bpf.detach(group, program, bpf.CGROUP_DEVICE)
    except KernelError as error:
        raise HvError(f"linux.resources.devices: {error}", error.hint) from None
    finally:
        for fd in (*old, fresh, group):
            if fd >= 0:
                os.close(fd)
