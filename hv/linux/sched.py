"""How a process is scheduled: policy, I/O priority, processors, execution domain (man 7 sched, man 2 ioprio_set).

Driven by tests/root/test_container_identity.py.
"""

from __future__ import annotations

__all__ = ["FLAGS", "IO_CLASSES", "POLICIES", "set_io_priority", "set_personality", "set_scheduler"]

from hv.linux.syscall import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_PERSONALITY, _SYS_IOPRIO_SET, _SYS_SCHED_SETATTR = 135, 251, 314
# include/uapi/linux/sched.h
POLICIES = {"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5,
            "SCHED_DEADLINE": 6}
FLAGS = {"SCHED_FLAG_RESET_ON_FORK": 0x01, "SCHED_FLAG_RECLAIM": 0x02, "SCHED_FLAG_DL_OVERRUN": 0x04,
         "SCHED_FLAG_KEEP_POLICY": 0x08, "SCHED_FLAG_KEEP_PARAMS": 0x10, "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
         "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40}
# include/uapi/linux/ioprio.h
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
_IOPRIO_CLASS_SHIFT, _IOPRIO_WHO_PROCESS = 13, 1
_SCHED_ATTR_SIZE = 48                   # struct sched_attr, SCHED_ATTR_SIZE_VER0


def set_scheduler(how: tuple[int, ...], do: Any = syscall) -> None:
    """sched_setattr(2): policy, flags, nice, priority; runtime, deadline, period in nanoseconds."""
    policy, flags, nice, priority, runtime, deadline, period = how
    attributes = (_SCHED_ATTR_SIZE.to_bytes(4, "little") + policy.to_bytes(4, "little") + flags.to_bytes(8, "little")
                  + nice.to_bytes(4, "little", signed=True) + priority.to_bytes(4, "little", signed=True)
                  + b"".join(time.to_bytes(8, "little") for time in (runtime, deadline, period)))
    do("sched_setattr", _SYS_SCHED_SETATTR, 0, attributes, 0, hint="process.scheduler may need CAP_SYS_NICE")


def set_io_priority(kind: int, priority: int, do: Any = syscall) -> None:
    """ioprio_set(2) of this process."""
    do("ioprio_set", _SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, kind << _IOPRIO_CLASS_SHIFT | priority,
       hint="process.ioPriority may need CAP_SYS_NICE")


def set_personality(domain: int, do: Any = syscall) -> None:
    """personality(2)."""
    do("personality", _SYS_PERSONALITY, domain)
