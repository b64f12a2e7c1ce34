"""What of config.json becomes what of the guest: its shape, its processes.

linux.resources.memory.limit and cpu.quota are the VM's memory and processors; annotations io.pyhv.vm.memory, .cpus,
.kernel, .initrd come first. seccomp, AppArmor and SELinux confine a program towards the kernel it shares with others,
here it has its own: they are not applied, as with other VM runtimes. Driven by tests/unit/test_sandbox_spec.py.
"""

from __future__ import annotations

__all__ = ["ANNOTATION", "Shape", "host_resources", "process_spec", "shape_of"]

import os

from hv.errors import ConfigError
from hv.sandbox.frames import ProcessSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.program import Program
    from hv.container.spec import Spec

ANNOTATION = "io.pyhv.vm"
MEMORY_DEFAULT, MEMORY_LEAST, MEMORY_STEP, MEMORY_MOST = 256, 128, 128, 1 << 20     # MiB
CPUS_MOST = 64                  # hv/machine/config.py
OVERHEAD = 160 << 20            # bytes that the VM's own process may have beside the guest's RAM
_PERIOD = 100_000               # us; Documentation/scheduler/sched-bwc.rst
_NO_LIMIT = (1 << 64) - 1       # RLIM_INFINITY
_MEMORY_FIELDS = ("limit", "reservation", "swap")


class Shape:
    """What a guest is made of: `memory` MiB, `cpus`, a `kernel` file and an `initrd`, "" for the usual ones."""

    __slots__ = ("cpus", "initrd", "kernel", "memory")

    def __init__(self, memory: int, cpus: int, kernel: str, initrd: str) -> None:
        self.memory, self.cpus, self.kernel, self.initrd = memory, cpus, kernel, initrd


def shape_of(spec: Spec, memory_mib: int = 0, cpus: int = 0, kernel: str = "", initrd: str = "") -> Shape:
    """The arguments where given, then annotations, then the bundle's limits, then defaults. ConfigError."""
    notes = spec.annotations
    memory_mib = memory_mib or _number(notes, "memory") or _memory_limit(spec.resources)
    cpus = cpus or _number(notes, "cpus") or _cpu_limit(spec.resources)
    if not MEMORY_LEAST // 2 <= memory_mib <= MEMORY_MOST:
        raise ConfigError(f"{ANNOTATION}.memory {memory_mib} MiB", f"{MEMORY_LEAST // 2} to {MEMORY_MOST}")
    if not 1 <= cpus <= CPUS_MOST:
        raise ConfigError(f"{ANNOTATION}.cpus {cpus}", f"1 to {CPUS_MOST}")
    return Shape(memory_mib, cpus, kernel or notes.get(f"{ANNOTATION}.kernel", ""),
                 initrd or notes.get(f"{ANNOTATION}.initrd", ""))


def _number(notes: dict[str, str], name: str) -> int:
    text = notes.get(f"{ANNOTATION}.{name}", "")
    if not text:
        return 0
    digits = text[:-1] if name == "memory" and text[-1:] in "mMgG" else text
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise ConfigError(f"annotation {ANNOTATION}.{name} {text!r:.60}",
                          "MiB, or with M or G" if name == "memory" else "a number")
    return int(digits) << (10 if text[-1:] in "gG" else 0)


def _memory_limit(resources: dict[str, Any]) -> int:
    limit = (resources.get("memory") or {}).get("limit")
    if not isinstance(limit, int) or limit <= 0 or limit >= MEMORY_MOST << 20:
        return MEMORY_DEFAULT
    step = MEMORY_STEP << 20
    return max(MEMORY_LEAST, -(-limit // step) * MEMORY_STEP)


def _cpu_limit(resources: dict[str, Any]) -> int:
    cpu = resources.get("cpu") or {}
    quota, period = cpu.get("quota"), cpu.get("period") or _PERIOD
    if not isinstance(quota, int) or not isinstance(period, int) or quota <= 0 or period <= 0:
        return 1
    return max(1, min(-(-quota // period), os.cpu_count() or 1, CPUS_MOST))


def host_resources(spec: Spec, shape: Shape) -> dict[str, Any]:
    """linux.resources for the cgroup of the VM's process: limits of memory are moved up by what the VM itself takes;
    numbers of processes and devices are the guest's matter."""
    kept = {name: spec.resources[name] for name in ("cpu", "blockIO", "network") if spec.resources.get(name)}
    memory = spec.resources.get("memory") or {}
    if isinstance(memory.get("limit"), int) and memory["limit"] > 0:
        kept["memory"] = {"limit": (shape.memory << 20) + OVERHEAD}
    return kept


def process_spec(program: Program, home: str = "/") -> ProcessSpec:
    """`process` as the agent starts it. HOME is set where it is not."""
    # of a name that is there twice the last value counts
    environment = list({word.partition("=")[0]: word for word in program.environment}.values())
    if not any(word.startswith("HOME=") and len(word) > 5 for word in environment):
        environment = [word for word in environment if word != "HOME="] + [f"HOME={home}"]
    size = program.console_size or (0, 0)
    return ProcessSpec(
        program.args, environment, program.cwd, uid=program.uid, gid=program.gid, groups=program.groups,
        terminal=(int(size[0]), int(size[1])) if program.terminal else None,
        rlimits=[(number, _limit(soft), _limit(hard)) for number, soft, hard, _ in program.rlimits],
        capabilities=(program.bounding, program.effective, program.inheritable, program.permitted, program.ambient),
        no_new_privs=program.no_new_privileges, umask=0o022 if program.umask is None else program.umask,
        oom_score_adj=program.oom_score_adj)


def _limit(value: int) -> int:
    return _NO_LIMIT if value < 0 else value
