"""The default profile, by what it answers."""

from __future__ import annotations

import pytest
from framework.seccomp import I386, X32_BIT, X86_64, decode, interpret, seccomp_data

from hv.container.seccomp.compile import compile_profile
from hv.container.seccomp.profile import ALLOWED, BY_CAPABILITY, FORBIDDEN, default_profile
from hv.container.seccomp.syscalls import SOCKETCALL, read_table
from hv.linux.creds import CAPABILITIES

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50001, 0x50026
TABLE = read_table()


def answers(*capabilities: str):
    program = decode(compile_profile(default_profile(capabilities), cache=False))

    def answer(name: str, *args: int, arch: int = X86_64) -> int:
        number = int(TABLE[name][0 if arch == X86_64 else 1])
        return interpret(program, seccomp_data(number, arch, args))[0]

    return answer


def test_names_are_real_and_listed_once():
    names = [*ALLOWED, *FORBIDDEN]
    assert len(names) == len(set(names))
    by_capability = {name for row in BY_CAPABILITY.values() for name in row.split()}
    assert not by_capability & set(names)
    # recv and send are socketcall's, of i386
    assert {*names, *by_capability} - set(TABLE) == {"recv", "send"} <= set(SOCKETCALL)
    assert set(BY_CAPABILITY) <= set(CAPABILITIES)


def test_every_call_of_linux_is_thought_of():
    """A new call in the table must be put somewhere. These have never been implemented, or not for decades."""
    by_capability = {name for row in BY_CAPABILITY.values() for name in row.split()}
    gone = {"afs_syscall", "bdflush", "break", "ftime", "getpmsg", "gtty", "idle", "lock", "mpx", "prof", "profil",
            "putpmsg", "security", "stty", "tuxcall", "ulimit", "vserver"}
    assert set(TABLE) - {*ALLOWED, *FORBIDDEN, *by_capability} - gone == {"personality", "socket"}


def test_what_programs_need_is_allowed():
    answer = answers()
    for name in ("read", "execve", "openat", "mmap", "futex", "clone", "wait4", "ptrace", "rseq", "exit_group"):
        assert answer(name) == ALLOW
    for name in ("read", "mmap2", "stat64", "socketcall", "ipc", "clock_gettime64"):
        assert answer(name, arch=I386) == ALLOW


@pytest.mark.parametrize("capability", sorted(BY_CAPABILITY))
def test_capabilities_open_what_they_are_for(capability):
    without, given = answers(), answers(capability)
    for name in BY_CAPABILITY[capability].split():
        if name not in ("clone", "clone3") and TABLE[name][0] != "-":
            assert (without(name), given(name)) == (EPERM, ALLOW), name


def test_nobody_gets_what_is_forbidden():
    answer = answers(*CAPABILITIES)
    for name in FORBIDDEN:
        if TABLE[name][0] != "-":
            assert answer(name) == EPERM, name


def test_new_namespaces():
    answer, admin = answers(), answers("CAP_SYS_ADMIN")
    threads = 0x3D0F00      # what the C library's pthread_create asks for
    assert answer("clone", threads) == answer("clone", 17) == ALLOW
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer("clone", bit | 17) == EPERM
        assert answer("clone", bit | 17, arch=I386) == EPERM
        assert admin("clone", bit | 17) == ALLOW
    assert (answer("clone3"), admin("clone3")) == (ENOSYS, ALLOW)
    assert (answer("unshare"), admin("unshare")) == (EPERM, ALLOW)


def test_sockets_and_personalities():
    answer = answers()
    assert [answer("socket", family) for family in (1, 2, 10, 16, 40)] == [ALLOW] * 4 + [EPERM]
    assert [answer("personality", value) for value in (0, 8, 0xFFFFFFFF, 0x40000)] == [ALLOW] * 3 + [ENOSYS]


def test_unknown_numbers_and_foreign_code():
    program = decode(compile_profile(default_profile(), cache=False))
    assert interpret(program, seccomp_data(999, X86_64))[0] == ENOSYS
    assert interpret(program, seccomp_data(X32_BIT, X86_64))[0] == ALLOW
    assert interpret(program, seccomp_data(0, 0x28))[0] == 0
