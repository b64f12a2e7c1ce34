"""`pyhv-vm-runtime`: the commands of an OCI runtime that puts each bundle into a VM (docs/vm-runtime.md).

Flags, order of arguments and log are pyhv-runtime's (oci.py), which comes here by itself for bundles whose annotation
io.pyhv.vm is "true". Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["COMMANDS", "main", "start"]

import posix
import sys

PROGRAM = "pyhv-vm-runtime"
COMMANDS = {
    "create": ("hv.cli.vm_runtime_life", "create a VM, its guest up, its program not started"),
    "start": ("hv.cli.vm_runtime_life", "run the program of a created VM"),
    "run": ("hv.cli.vm_runtime_life", "create and start a VM, and wait for its end"),
    "state": ("hv.cli.vm_runtime_life", "print the state of a VM"),
    "kill": ("hv.cli.vm_runtime_life", "send a signal (default: SIGTERM) to a VM's program"),
    "delete": ("hv.cli.vm_runtime_life", "remove a VM that has ended"),
    "list": ("hv.cli.oci_list", "list the VMs and containers under --root"),
    "spec": ("hv.cli.oci_spec", "write a config.json to begin with"),
    "exec": ("hv.cli.vm_runtime_exec", "run a program in a running VM"),
    "ps": ("hv.cli.vm_runtime_more", "list a VM's processes"),
    "pause": ("hv.cli.vm_runtime_more", "hold a VM"),
    "resume": ("hv.cli.vm_runtime_more", "let it go on"),
    "update": ("hv.cli.vm_runtime_more", "refused: a VM's limits are its shape"),
    "events": ("hv.cli.vm_runtime_more", "print figures of the guest"),
    "features": ("hv.cli.oci_features", "print what this runtime can do"),
    "checkpoint": ("hv.cli.vm_runtime_more", "refused: `pyhv snapshot` saves VMs"),
    "restore": ("hv.cli.vm_runtime_more", "refused: the same"),
}
# bundle of compiled modules -> (its commands, what they need that this one may not have loaded); hv/cli/bundle.py
KINDS = {
    "vmcreate": (("run", "create"), (
        "hv.sandbox.cards", "hv.sandbox.server", "hv.sandbox.template", "hv.sandbox.guest", "hv.sandbox.daemon",
        "hv.sandbox.foreground", "hv.sandbox.rootfs_tree", "hv.sandbox.lookup", "hv.container.cgroups.manager",
        "hv.devices.virtio.net_config", "hv.devices.virtio.fs_config", "hv.devices.virtio.fs_mounts",
        "hv.devices.virtio.fs_state", "hv.devices.virtio.vsock_config", "hv.devices.virtio.vsock_unix",
        "hv.devices.virtio.vsock_local", "hv.kvm.abi_chips", "hv.kvm.abi_io", "hv.kvm.abi_x86", "hv.kvm.msrs",
        "hv.machine.attach", "hv.machine.iothread", "hv.machine.vcpu", "hv.snapshot.restore", "hv.snapshot.watched")),
    "vmlife": (("start", "state", "kill", "delete", "exec"), ("hv.sandbox.runtime", "hv.cli.vm_runtime_exec")),
}


def main(arguments: list[str]) -> int:
    """Run the command line; the exit code."""
    from hv.cli.oci import main as run

    return run(arguments, PROGRAM, COMMANDS)


def start(arguments: list[str], kind: str = "") -> None:
    """Run the command line and end the process with its exit code. `kind`: of the bundle that there was not."""
    for fd in range(3):         # must be somebody's, or a file of ours would become the program's standard streams
        try:
            posix.fstat(fd)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)
    if sys.stdout is None or sys.stderr is None:
        sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")    # noqa: SIM115
    code = main(arguments)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass                    # whoever read our output has gone
    # not where a template was made: what booted it is not needed again
    if kind and code == 0 and set(KINDS[kind][0]) & set(arguments) and "hv.machine.builder" not in sys.modules:
        from hv.cli.bundle import place_of, save

        for name in KINDS[kind][1]:
            __import__(name)
        save(place_of(kind), rare=())
    posix._exit(code)
