"""A VM in the foreground: this process is the VM's, its streams, terminal, signals and exit code are the program's.

Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["run"]

import os
from _signal import SIG_SETMASK, pthread_sigmask

from hv.container.spec import load_bundle
from hv.linux.signals import block_all
from hv.sandbox.daemon import attend_signals, join
from hv.sandbox.sandbox import Sandbox, explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.sandbox.runtime import VmOptions, VmRuntime


def run(runtime: VmRuntime, name: str, bundle: str, options: VmOptions, *, keep: bool = False) -> int:
    """Create, start, wait, delete; the program's exit code, 128 + n where signal n ended it."""
    spec = load_bundle(bundle)
    record, group = runtime.begin(name, spec, options)
    mask: set[int] | None = None
    before: list[object] | None = None
    sandbox: Sandbox | None = None
    try:
        join(group)
        runtime.note_own(record)
        sandbox = Sandbox(spec, name, record.folder, warn=runtime.warn)
        sandbox.prepare()
        record.unlock()
        if options.pid_file:
            from hv.container.state import write_whole

            write_whole(options.pid_file, str(os.getpid()).encode())
        mask = block_all()
        terminal = 0 if spec.program.terminal and os.isatty(0) else -1
        if terminal == 0:
            from hv.sandbox.terminal import make_raw, size_of

            spec.program.console_size = size_of(0)
            before = make_raw(0)
        attend_signals(sandbox, terminal)
        process = sandbox.start(0, 1, 2)
        code = sandbox.serve()
        if process.error is not None and not process.pid:
            raise explain(process.error, spec.program.args[0])
        return code
    finally:
        if before is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, before)  # type: ignore[arg-type]
        if sandbox is not None:
            sandbox.close()
        record.unlock()
        if not keep:
            leave(group.paths)
            runtime.note_ended(record)
            runtime.delete(name, force=True)
        if mask is not None:
            pthread_sigmask(SIG_SETMASK, mask)


def leave(paths: dict[str, str]) -> None:
    """This process out of its groups, up into the one above each, so that they can be removed."""
    for path in dict.fromkeys(paths.values()):
        try:
            with open(f"{os.path.dirname(path)}/cgroup.procs", "wb", 0) as file:
                file.write(str(os.getpid()).encode())
        except OSError:
            pass                # the group is removed when somebody deletes it
