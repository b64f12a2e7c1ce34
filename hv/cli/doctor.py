"""`pyhv doctor`: can this host run VMs and containers, and how well?"""

from __future__ import annotations

__all__ = ["doctor", "examine"]

import json
import os
import sys

from hv.errors import HvError
from hv.kvm import const
from hv.kvm.system import Kvm

OK, WARN, FAIL = "ok", "warn", "fail"
SOFTWARE_RING0 = 20e6       # ring-0 instructions/s below which KVM emulates: hardware does 1e9, emulators 1e6 to 2e6

# Capability, what is lost without it, and whether VMs can't run then.
CAPABILITIES = (
    ("IRQCHIP", "no in-kernel interrupt controllers: no VMs", True),
    ("USER_MEMORY", "no guest memory: no VMs", True),
    ("PIT2", "no in-kernel timer: no VMs", True),
    ("SET_TSS_ADDR", "Intel processors can't enter real mode", False),
    ("SET_IDENTITY_MAP_ADDR", "Intel processors can't enter real mode", False),
    ("IMMEDIATE_EXIT", "pausing a VM may be late", False),
    ("IRQFD", "virtio interrupts would go through Python", False),
    ("IOEVENTFD", "virtio notifications would go through Python", False),
    ("SIGNAL_MSI", "no MSI for virtio-pci", False),
    ("COALESCED_MMIO", "frequent device writes each exit", False),
    ("COALESCED_PIO", "frequent port writes each exit", False),
    ("SYNC_REGS", "reading registers costs an ioctl each", False),
    ("SET_GUEST_DEBUG", "no single-stepping: no --trace insn", False),
    ("VCPU_EVENTS", "no snapshots, no help on software KVM", False),
    ("XSAVE", "no snapshots", False),
    ("MP_STATE", "no snapshots of several processors", False),
    ("ADJUST_CLOCK", "guest clocks jump when a snapshot is restored", False),
    ("X86_USER_SPACE_MSR", "no --trace msr, no Linux userspace on software KVM", False),
    ("X86_MSR_FILTER", "no --trace msr, no Linux userspace on software KVM", False),
    ("EXIT_ON_EMULATION_FAILURE", "software KVM help must fetch instructions itself", False),
    ("DIRTY_LOG_RING", "incremental snapshots use the slower bitmap", False),
    ("MANUAL_DIRTY_LOG_PROTECT2", "incremental snapshots pause the guest longer", False),
    ("READONLY_MEM", "no read-only guest memory", False),
    ("TSC_CONTROL", "restored guests must find the same TSC frequency", False),
)


class Check:
    """One line of the examination."""

    __slots__ = ("area", "detail", "name", "status", "value")

    def __init__(self, area: str, name: str, status: str, value: object, detail: str = "") -> None:
        self.area = area
        self.name = name
        self.status = status
        self.value = value
        self.detail = detail


def doctor(as_json: bool) -> int:
    """Print the examination; 0 if VMs can run, else 1."""
    checks = examine()
    runs = all(check.status != FAIL for check in checks if check.area == "vm")
    if as_json:
        print(json.dumps({
            "vms": runs, "containers": all(c.status != FAIL for c in checks if c.area == "container"),
            "checks": [{name: getattr(check, name) for name in Check.__slots__} for check in checks]}, indent=2))
        return int(not runs)
    area = ""
    color = sys.stdout.isatty()
    for check in checks:
        if check.area != area:
            area = check.area
            print({"vm": "Virtual machines", "container": "Containers", "host": "Host"}[area])
        mark = {OK: "ok  ", WARN: "warn", FAIL: "FAIL"}[check.status]
        if color:
            mark = f"\x1b[{ {OK: 32, WARN: 33, FAIL: 31}[check.status]}m{mark}\x1b[0m"
        value = {True: "yes", False: "no"}[check.value] if isinstance(check.value, bool) else check.value
        print(f"  {mark}  {check.name:<33} {value}" + (f" - {check.detail}" if check.detail else ""))
    print("This host can run virtual machines." if runs else "This host can't run virtual machines.")
    return int(not runs)


def examine() -> list[Check]:
    """All checks, in reading order. Never raises on what a host may lack."""
    return [*_vm(), *_containers(), *_host()]


def _vm() -> list[Check]:
    try:
        kvm = Kvm()
    except HvError as error:
        hint = error.hint
        if not os.path.exists("/dev/kvm") and (place := _container()):
            hint = f"this is a container ({place}): start it with --device /dev/kvm"
        return [Check("vm", "/dev/kvm", FAIL, str(error), hint)]
    with kvm:
        checks = [Check("vm", "/dev/kvm", OK, "readable and writable")]
        try:
            kvm.require_api()
            checks.append(Check("vm", "API version", OK, kvm.api_version()))
        except HvError as error:
            return [*checks, Check("vm", "API version", FAIL, str(error), error.hint)]
        checks += _speed(kvm)
        most = kvm.check(const.KVM_CAP_MAX_VCPUS)
        advised = kvm.check(const.KVM_CAP_NR_VCPUS)
        checks.append(Check("vm", "processors per VM", OK, f"{advised} advised, {most} at most"))
        checks.append(Check("vm", "memory slots", OK, kvm.check(const.KVM_CAP_NR_MEMSLOTS)))
        for name, loss, needed in CAPABILITIES:
            value = kvm.check(getattr(const, f"KVM_CAP_{name}"))
            status = OK if value else FAIL if needed else WARN
            checks.append(Check("vm", f"KVM_CAP_{name}", status, bool(value), "" if value else loss))
    return checks


def _speed(kvm: Kvm) -> list[Check]:
    from hv.softkvm.detect import measure_ring0

    try:
        speed = measure_ring0(kvm)
    except HvError as error:
        return [Check("vm", "guest ring-0 speed", FAIL, str(error), error.hint)]
    text = f"{speed / 1e6:.1f} million instructions/s"
    if speed > SOFTWARE_RING0:
        return [Check("vm", "guest ring-0 speed", OK, text, "hardware KVM")]
    return [Check("vm", "guest ring-0 speed", WARN, text,
                  "software KVM: guest kernels are emulated; pyhv helps them along (docs/software-kvm.md)")]


def _containers() -> list[Check]:
    checks = []
    root = os.geteuid() == 0
    allowed = _number("/proc/sys/user/max_user_namespaces")
    clone = _number("/proc/sys/kernel/unprivileged_userns_clone")
    if allowed == 0 or (clone == 0 and not root):
        checks.append(Check("container", "user namespaces", OK if root else FAIL, False,
                            "" if root else "sysctl user.max_user_namespaces or kernel.unprivileged_userns_clone is 0"))
    elif allowed is None:
        checks.append(Check("container", "user namespaces", WARN, "unknown", "no /proc/sys/user: no CONFIG_USER_NS?"))
    else:
        checks.append(Check("container", "user namespaces", OK, f"at most {allowed}"))
    for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup", "time"):
        there = os.path.exists(f"/proc/self/ns/{name}")
        checks.append(Check("container", f"{name} namespace", OK if there else FAIL if name in ("mnt", "pid") else WARN,
                            there, "" if there else "this kernel lacks it"))
    checks += _cgroups()
    filesystems = _read("/proc/filesystems").split()
    overlay = "overlay" in filesystems
    checks.append(Check("container", "overlayfs", OK if overlay else WARN, overlay,
                        "" if overlay else "images are copied for each container; try: modprobe overlay"))
    return checks


def _cgroups() -> list[Check]:
    v1: list[str] = []
    v2 = ""
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind = right.split(" ")
        if kind[0] == "cgroup2":
            v2 = left.split(" ")[4]
        elif kind[0] == "cgroup":
            v1 += [word for word in kind[-1].split(",") if word not in ("rw", "ro") and "=" not in word]
    unified = _read(f"{v2}/cgroup.controllers").split() if v2 else []
    version = "v1 and v2 (hybrid)" if v1 and v2 else "v2" if v2 else "v1" if v1 else "none"
    controllers = sorted({*v1, *unified})
    missing = [name for name in ("cpu", "memory", "pids") if name not in controllers]
    checks = [Check("container", "cgroups", OK if v1 or v2 else FAIL, version,
                    "" if v1 or v2 else "mount -t cgroup2 none /sys/fs/cgroup")]
    checks.append(Check("container", "cgroup controllers", WARN if missing else OK, " ".join(controllers) or "none",
                        f"no limits on {', '.join(missing)}" if missing else ""))
    return checks


def _host() -> list[Check]:
    checks = []
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        checks.append(Check("host", "/dev/net/tun", OK, "readable and writable"))
    except OSError as error:
        checks.append(Check("host", "/dev/net/tun", WARN, os.strerror(error.errno or 0),
                            "no tap networking; user-mode networking remains"))
    for name, loss in (("/dev/vhost-net", "virtio-net stays in user space"),
                       ("/dev/vhost-vsock", "vsock stays in user space")):
        there = os.path.exists(name)
        checks.append(Check("host", name, OK if there else WARN, there, "" if there else loss))
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    available = int(fields.get("MemAvailable", "0").split()[0]) >> 10
    checks.append(Check("host", "memory available", OK if available > 512 else WARN, f"{available} MiB",
                        "" if available > 512 else "too little for an ordinary guest"))
    checks.append(Check("host", "processors", OK, os.cpu_count() or 1))
    checks.append(Check("host", "kernel", OK, os.uname().release))
    return checks


def _container() -> str:
    for path, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return name
    for item in _read("/proc/1/environ").split("\0"):
        if item.startswith("container="):
            return item.partition("=")[2]
    return ""


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None
