"""A bundle's VM: its root file system, its guest, its program, in the process that calls prepare().

    sandbox = Sandbox(load_bundle(folder), "box", "/run/pyhv/instances/box")
    sandbox.prepare()                       # mounts, a restored (or booted) guest that knows who it is
    process = sandbox.start(0, 1, 2)        # the bundle's program
    code = sandbox.serve()                  # until the guest is gone; other processes ask by SandboxClient(folder)
    sandbox.close()

prepare() gives this process a mount namespace of its own, so it must have one thread then; what is mounted vanishes
with the process, however that ends. Driven by tests/kvm/test_sandbox.py.
"""

from __future__ import annotations

__all__ = ["Sandbox"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.spec import Spec
    from hv.machine.loop import Loop
    from hv.sandbox.process import GuestProcess


class Sandbox:
    """The VM of one bundle. `folder` is there, ours, and gets the socket `vm.sock`.

    `memory_mib`, `cpus`, `kernel`, `initrd`: 0 and "" take the annotations io.pyhv.vm.*, then the bundle's limits, then
    defaults. The network is what linux.namespaces names: no path, no card. `warn` is told what is not applied.
    """

    def __init__(self, spec: Spec, name: str, folder: str, *, memory_mib: int = 0, cpus: int = 0, kernel: str = "",
                 initrd: str = "", warn: Callable[[str], None] = lambda text: None) -> None:
        self.spec, self.name, self.folder, self.warn = spec, name, folder, warn
        self.exit_code: int | None = None       # of the bundle's program: its code, or 128 + a signal's number
        self.loop: Loop                         # that serve() runs in the caller's thread; there after prepare()

    def prepare(self) -> None:
        """Mount the tree, have a guest, tell it who it is. HvError, with nothing left behind."""
        raise NotImplementedError

    def start(self, stdin: int, stdout: int, stderr: int) -> GuestProcess:
        """Run the bundle's program. The descriptors stay the caller's until it has ended (they are duplicated).

        With process.terminal `stdin` and `stdout` carry the terminal's bytes (a pty's raw end, pipes, a socket), and
        `stderr` is not used; tell its size by GuestProcess.resize(rows, columns). HvError where it can't be run:
        `.exit_code` 127 where there is no such program, 126 where it can't be executed.
        """
        raise NotImplementedError

    def exec(self, process: dict[str, Any], stdin: int, stdout: int, stderr: int) -> GuestProcess:
        """One more program, as in config.json's `process`; otherwise as start()."""
        raise NotImplementedError

    def serve(self) -> int:
        """Serve the guest and who comes to the socket until the VM has ended; the exit code.

        The VM ends when the bundle's program has. Handlers of `loop` (add, call, call_later) run meanwhile.
        """
        raise NotImplementedError

    def kill(self, signal: int) -> None:
        """Signal the bundle's program; SIGKILL ends the VM where the guest does not do it."""
        raise NotImplementedError

    def stop(self, seconds: float) -> None:
        """SIGTERM (the image's stop signal is the caller's to send first), and the VM's end `seconds` later."""
        raise NotImplementedError

    def pause(self) -> None:
        """Hold all of the guest."""
        raise NotImplementedError

    def resume(self) -> None:
        """Let it go on."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Figures in the form of hv.container.cgroups' stats: cpu, memory, pids; and `vm`, the host's side."""
        raise NotImplementedError

    def processes(self) -> list[dict[str, Any]]:
        """The guest's processes, as {"pid", "ppid", "uid", "command", ...}."""
        raise NotImplementedError

    def close(self) -> None:
        """End the VM, give everything back. May be called twice."""
