"""Who a process is and what it may: capabilities, securebits, no_new_privs, limits (man 7 capabilities, man 2 prctl).

`do` and `hands` make the calls: this process at once, or those of hands.py.

Driven by tests/unit/test_linux_calls.py and tests/root/test_container_identity.py.
"""

from __future__ import annotations

__all__ = ["CAPABILITIES", "SYS_CAPSET", "SYS_PRCTL", "ask_capabilities", "capability_data", "capability_sets",
           "clear_ambient", "drop_bounding", "join_session_keyring", "last_capability", "prctl", "raise_ambient",
           "read_capabilities", "set_capabilities", "set_limit"]

from hv.linux.hands import OWN
from hv.linux.syscall import syscall, try_syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 4, 8, 23, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4

# include/uapi/linux/capability.h, in the order of their numbers
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE")
_VERSION_3 = 0x20080522

# arch/x86/entry/syscalls/syscall_64.tbl
SYS_CAPGET, SYS_CAPSET, SYS_PRCTL, SYS_KEYCTL = 125, 126, 157, 250
# include/uapi/linux/keyctl.h
_KEYCTL_JOIN_SESSION_KEYRING, _KEYCTL_DESCRIBE, _KEYCTL_SETPERM = 1, 6, 5
_KEY_USR_SEARCH = 0x00080000            # include/linux/key.h
_SYS_PRLIMIT64, _RLIM_INFINITY = 302, 0xFFFFFFFFFFFFFFFF


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, do: Any = syscall) -> Any:
    """prctl(2); KernelError where it fails."""
    return do(f"prctl({option})", SYS_PRCTL, option, a, b, c, d)


def last_capability() -> int:
    """The highest capability that this kernel knows."""
    low, high = -1, 64          # asked of the kernel itself: /proc may be the container's, and hold anything
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if try_syscall(SYS_PRCTL, PR_CAPBSET_READ, middle) >= 0 else (low, middle)
    return low


def drop_bounding(keep: int, last: int, hands: Any = OWN) -> None:
    """Drop all capabilities outside the bit set `keep` from the bounding set."""
    hands.repeat("prctl(PR_CAPBSET_DROP)", SYS_PRCTL,
                 [(PR_CAPBSET_DROP, number) for number in range(last + 1) if not keep >> number & 1])


def capability_data(effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """The two arguments of capset(2): struct __user_cap_header_struct, and data in two halves."""
    header = _VERSION_3.to_bytes(4, "little") + bytes(4)
    data = b"".join((bits >> shift & 0xFFFFFFFF).to_bytes(4, "little")
                    for shift in (0, 32) for bits in (effective, permitted, inheritable))
    return header, data


def set_capabilities(effective: int, permitted: int, inheritable: int, do: Any = syscall) -> None:
    """capset(2): bit sets."""
    do("capset", SYS_CAPSET, *capability_data(effective, permitted, inheritable),
       hint="a capability can't be had that this process or its user namespace lacks")


def capability_sets(hands: Any = OWN) -> tuple[int, int, int]:
    """capget(2): effective, permitted, inheritable, as bit sets."""
    return read_capabilities(hands, ask_capabilities(hands))


def ask_capabilities(hands: Any) -> Any:
    """The first half of that, for who does it later."""
    data = hands.room(24)
    hands.do("capget", SYS_CAPGET, _VERSION_3.to_bytes(4, "little") + bytes(4), data)
    return data


def read_capabilities(hands: Any, data: Any) -> tuple[int, int, int]:
    """And the second."""
    raw = hands.read(data, 24)
    words = [int.from_bytes(raw[at:at + 4], "little") for at in range(0, 24, 4)]
    return words[0] | words[3] << 32, words[1] | words[4] << 32, words[2] | words[5] << 32


def clear_ambient(do: Any = syscall) -> None:
    """Empty the ambient set."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, do=do)


def raise_ambient(capabilities: int, do: Any = syscall) -> None:
    """Add a bit set to the ambient set; each must be permitted and inheritable."""
    for number in range(64):
        if capabilities >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, do=do)


def join_session_keyring(name: str, hands: Any = OWN) -> Callable[[], None]:
    """keyctl(2): a session keyring of its own, so that the runtime's keys can't be read from inside.

    What is given back, called, lets its owner search it.
    """
    ring = hands.do("keyctl(JOIN_SESSION_KEYRING)", SYS_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, name.encode() + b"\0",
                    hint="the host's kernel may lack keyrings, or the quota of keys be used up: --no-new-keyring")
    described = hands.room(256)
    length = hands.do("keyctl(DESCRIBE)", SYS_KEYCTL, _KEYCTL_DESCRIBE, ring, described, 256)

    def finish() -> None:
        # type;uid;gid;permissions in hexadecimal;description
        permissions = int(hands.read(described, hands.value(length)).split(b";")[3], 16)
        hands.do("keyctl(SETPERM)", SYS_KEYCTL, _KEYCTL_SETPERM, ring, permissions | _KEY_USR_SEARCH)

    return finish


def set_limit(number: int, soft: int, hard: int, do: Any = syscall) -> None:
    """prlimit(2) of this process; -1 is no limit."""
    limit = b"".join((value & _RLIM_INFINITY).to_bytes(8, "little") for value in (soft, hard))
    do(f"prlimit({number})", _SYS_PRLIMIT64, 0, number, limit, 0)
