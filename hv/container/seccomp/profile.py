"""The default profile: what programs need, and the capabilities they were given (man 2 syscalls, man 7 capabilities).

A call that is not listed gets ENOSYS, as on a kernel that is older than it, so that programs fall back. One that is
known to be for the host's administrator gets EPERM, as without the capability that it asks for. With the capability
it is allowed, and the kernel decides. Not even then:

    io_uring_*      a second way to make system calls, which no filter sees, with a record of holes
    userfaultfd     makes races in the kernel easy to win
    vsock           reaches the hypervisor, past the network namespace
    keyctl, ...     keys belong to no namespace

`default_profile` gives linux.seccomp of config.json, for any OCI runtime. Driven by tests/unit/test_seccomp_default.py.
"""

from __future__ import annotations

__all__ = ["ALLOWED", "BY_CAPABILITY", "FORBIDDEN", "default_profile"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_EPERM, _ENOSYS = 1, 38

_FILES = """
    access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
    fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync
    fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate
    ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat ioctl lchown lchown32 lgetxattr link linkat
    listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat
    name_to_handle_at newfstatat oldfstat oldlstat oldstat open openat openat2 pread64 preadv preadv2 pwrite64 pwritev
    pwritev2 read readahead readdir readlink readlinkat readv removexattr removexattrat rename renameat renameat2 rmdir
    sendfile sendfile64 setxattr setxattrat splice stat stat64 statfs statfs64 statx symlink symlinkat sync
    sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes
    vmsplice write writev
    fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch file_getattr file_setattr
"""
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 _newselect poll ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4
    io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit
    pipe pipe2
"""
_SOCKETS = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64
    recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair
"""
_MEMORY = """
    brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap
    mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_madvise
    process_mrelease remap_file_pages
"""
_PROCESSES = """
    arch_prctl capget capset execve execveat exit exit_group fork get_robust_list get_thread_area getcpu getegid
    getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getpgid getpgrp getpid getppid getpriority
    getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid getuid getuid32 ioprio_get
    ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lsm_get_self_attr
    lsm_list_modules lsm_set_self_attr modify_ldt nice pause pidfd_open pidfd_send_signal prctl prlimit64 ptrace
    rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
    sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid
    setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setpriority setregid setregid32
    setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sigaltstack
    times tgkill tkill ugetrlimit uprobe uretprobe vfork wait4 waitid waitpid
"""
_SIGNALS = """
    restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sgetmask sigaction signal sigpending sigprocmask
    sigreturn sigsuspend ssetmask
"""
_LOCKS_AND_QUEUES = """
    futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake ipc mq_getsetattr mq_notify mq_open
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd
    semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget
"""
_TIME = """
    adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
    clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete
    timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime
    timerfd_gettime64 timerfd_settime timerfd_settime64
"""
_SYSTEM = "getrandom olduname oldolduname sysinfo uname"

ALLOWED = " ".join((_FILES, _WAITING, _SOCKETS, _MEMORY, _PROCESSES, _SIGNALS, _LOCKS_AND_QUEUES, _TIME,
                    _SYSTEM)).split()

# What a capability is for. The kernel asks for the same one; the filter only keeps the code out of reach without it.
BY_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_CHECKPOINT_RESTORE": "kcmp",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "bpf perf_event_open",
    "CAP_SYS_ADMIN": "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount listns lookup_dcookie "
                     "mount mount_setattr move_mount open_tree open_tree_attr perf_event_open pivot_root quotactl "
                     "quotactl_fd setdomainname sethostname setns statmount swapoff swapon umount umount2 unshare",
    "CAP_SYS_BOOT": "kexec_file_load kexec_load reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "create_module delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_vm_readv process_vm_writev",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}
# Known, and refused with EPERM whatever the capabilities; other calls that are not listed get ENOSYS.
_NEVER = """
    _sysctl add_key get_kernel_syms io_uring_enter io_uring_register io_uring_setup keyctl nfsservctl query_module
    request_key sysfs uselib userfaultfd ustat vm86 vm86old
"""
FORBIDDEN = _NEVER.split()

# include/uapi/linux/sched.h: all CLONE_NEW* but NEWTIME, whose bit is the exit signal's here (man 2 clone)
_NEW_NAMESPACES = 0x7E020000
# include/uapi/linux/personality.h: PER_LINUX, PER_LINUX32, each with UNAME26, and the question
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_AF_VSOCK = 40
_ARCHITECTURES = {"SCMP_ARCH_X86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                  "SCMP_ARCH_AARCH64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]}


def default_profile(capabilities: Iterable[str] = ()) -> dict[str, Any]:
    """linux.seccomp for a program whose bounding set has `capabilities`."""
    from hv.container.seccomp.syscalls import NATIVE

    granted = set(capabilities)
    allowed, denied = set(ALLOWED), set(FORBIDDEN)
    for capability, names in BY_CAPABILITY.items():
        (allowed if capability in granted else denied).update(names.split())
    rules: list[dict[str, Any]] = [{"names": sorted(allowed - set(FORBIDDEN)), "action": "SCMP_ACT_ALLOW"}]
    rules += [_when("personality", 0, "SCMP_CMP_EQ", persona) for persona in _PERSONALITIES]
    rules.append(_when("socket", 0, "SCMP_CMP_NE", _AF_VSOCK))
    if "CAP_SYS_ADMIN" not in granted:
        denied.discard("clone")
        denied.discard("clone3")
        rules.append(_when("clone", 0, "SCMP_CMP_MASKED_EQ", _NEW_NAMESPACES, 0))
        # its flags are in memory, where no filter can look; libraries fall back to clone
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
        rules.append({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM,
                      "args": [{"index": 0, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ"}
                               for bit in (1 << number for number in range(32)) if bit & _NEW_NAMESPACES]})
    rules.append(_when("socket", 0, "SCMP_CMP_EQ", _AF_VSOCK) | {"action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM})
    rules.append({"names": sorted(denied - allowed), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM})
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": _ENOSYS,
            "architectures": _ARCHITECTURES.get(NATIVE, []), "syscalls": rules}


def _when(name: str, index: int, operator: str, value: int, second: int = 0) -> dict[str, Any]:
    return {"names": [name], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": index, "value": value, "valueTwo": second, "op": operator}]}
