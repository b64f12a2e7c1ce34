"""What happens between fork and exec, in the new process: namespaces, root, identity, then the user's program.

The order is the field's, learned from its CVEs (docs/security.md): cgroup first, then namespaces, mounts, pivot_root,
what is hidden in /proc, limits, capabilities, seccomp, and last the program. Everything needed is imported before the
root changes: afterwards there is no Python to import from. Driven by tests/root/test_container_life.py.
"""

from __future__ import annotations

__all__ = ["stage_one"]

import os
from signal import SIG_DFL, SIG_SETMASK, pthread_sigmask, signal, valid_signals

from hv.container import identity, rootfs, sync
from hv.container.mounts import attach_all
from hv.container.tty import open_console
from hv.errors import HvError
from hv.linux import ns
from hv.linux.netif import set_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from hv.container.process import Plan

_FAILED = 1


def stage_one(plan: Plan, channel: sync.Channel) -> NoReturn:
    """C1: enter and leave namespaces, then make C2, the first process inside. Never returns."""
    try:
        channel.ask(sync.CGROUP)        # before the cgroup namespace, whose root this becomes
        new = _namespaces(plan, channel)
        pid = ns.clone_sibling(new)
        if pid:
            channel.send(sync.PID, str(pid))
            os._exit(0)
        _stage_two(plan, channel)
    except HvError as error:
        channel.send(sync.ERROR, f"{error}" + (f" - {error.hint}" if error.hint else ""))
    except BaseException as error:
        channel.send(sync.ERROR, f"{type(error).__name__}: {error}")
    os._exit(_FAILED)


def _namespaces(plan: Plan, channel: sync.Channel) -> int:
    """Join those given by path, the user namespace first; the flags of the new ones that are left for the clone."""
    spec = plan.spec
    order = sorted(plan.namespace_fds, key=lambda row: row[0] != "user")
    new = spec.new_namespaces
    for name, fd in order:
        if name == "user":
            ns.setns(fd, ns.CLONE_NEWUSER)
            identity.become_root()
    if new & ns.CLONE_NEWUSER:
        ns.unshare(ns.CLONE_NEWUSER)
        channel.ask(sync.MAP)
        identity.become_root()
    for name, fd in order:
        if name != "user":
            ns.setns(fd, ns.CLONE_FLAGS[name])
        os.close(fd)
    if new & ns.CLONE_NEWTIME:
        ns.unshare(ns.CLONE_NEWTIME)    # offsets must be set before anybody is in it (man 7 time_namespaces)
        identity.set_time_offsets(spec.time_offsets)
    return new & ~(ns.CLONE_NEWUSER | ns.CLONE_NEWTIME)


def _stage_two(plan: Plan, channel: sync.Channel) -> None:
    """C2: everything inside. Returns only by an exception, until the program runs."""
    spec = plan.spec
    os.setsid()
    if spec.new_namespaces & ns.CLONE_NEWNET:
        set_up("lo")
    if spec.hostname:
        ns.set_hostname(spec.hostname.encode())
    if spec.domainname:
        ns.set_domainname(spec.domainname.encode())
    if spec.has_mount_namespace:
        root = rootfs.open_root(plan.rootfs, spec.rootfs_propagation)
        assert plan.cgroup_mount is not None
        attach_all(spec.mounts, root, plan.cgroup_mount, spec.mount_label)
        rootfs.make_devices(spec.devices, root, bind=spec.in_user_namespace)
        channel.ask(sync.HOOKS)
        spec.hooks.run("createContainer", spec)
        rootfs.switch(root, pivot=plan.pivot)
        os.close(root)
    else:
        channel.ask(sync.HOOKS)
        os.chroot(plan.rootfs)
        os.chdir("/")
    identity.set_sysctls(spec.sysctl)
    if plan.console_socket or spec.terminal:
        open_console(spec.console_size, plan.console_socket)
    rootfs.hide(spec.masked_paths, spec.readonly_paths, root_readonly=spec.root_readonly and spec.has_mount_namespace)
    program = identity.take_on(plan)
    channel.send(sync.READY)
    channel.end.close()
    _wait_for_start(plan)
    spec.hooks.run("startContainer", spec)
    ns.close_from(3 + plan.preserve_fds)
    for number in valid_signals():
        try:
            signal(number, SIG_DFL)     # Python ignores SIGPIPE and others, which a program would inherit
        except (OSError, ValueError):
            pass
    pthread_sigmask(SIG_SETMASK, ())
    identity.last_step(plan)
    os.execve(program, spec.args, spec.environment)


def _wait_for_start(plan: Plan) -> None:
    """Stand still until somebody connects; then say by closing the connection that the program runs."""
    if plan.start_socket < 0:
        return
    from socket import socket

    listener = socket(fileno=plan.start_socket)
    connection, _ = listener.accept()
    listener.close()
    connection.detach()     # closed by exec, or with this process: either way the other end learns
