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

__all__ = ["Sandbox", "exit_code_of", "explain", "failure_code"]

import gc
import os
from _signal import SIGKILL, SIGTERM
from errno import EACCES, ENOENT, ENOEXEC, ENOTDIR, EPERM

from hv.container.program import Program
from hv.errors import HvError, StateError
from hv.phases import mark
from hv.sandbox.process import GuestProcess, StartError
from hv.sandbox.spec_guest import process_spec, shape_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.spec import Spec
    from hv.machine.loop import Loop
    from hv.machine.machine import Machine
    from hv.machine.share import Share
    from hv.sandbox.rootfs_tree import Tree
    from hv.sandbox.server import Server

NOT_FOUND, NOT_RUN, LOST, KILLED = 127, 126, 125, 128 + SIGKILL
KILL_SECONDS = 2.0              # for a guest to have a process killed; then it ends with all that is in it
_AS_OWN = ("rlimits", "oomScoreAdj", "capabilities")    # of a further process, where it does not say


class Sandbox:
    """The VM of one bundle. `folder` is there, ours, and gets the socket `vm.sock`.

    `memory_mib`, `cpus`, `kernel`, `initrd`: 0 and "" take the annotations io.pyhv.vm.*, then the bundle's limits, then
    defaults. The network is what linux.namespaces names: no path, no card. `warn` is told what is not applied.
    """

    def __init__(self, spec: Spec, name: str, folder: str, *, memory_mib: int = 0, cpus: int = 0, kernel: str = "",
                 initrd: str = "", warn: Callable[[str], None] = lambda text: None) -> None:
        self.spec, self.name, self.folder, self.warn = spec, name, folder, warn
        self.shape = shape_of(spec, memory_mib, cpus, kernel, initrd)
        self.exit_code: int | None = None       # of the bundle's program: its code, or 128 + a signal's number
        self.process: GuestProcess | None = None    # the bundle's program
        self.on_start: Callable[[], GuestProcess] | None = None     # what a client's `start` does; None: it may not
        self.machine: Machine
        self.loop: Loop | Share                 # that serve() runs in the caller's thread; there after prepare()
        self._tree: Tree | None = None
        self._server: Server | None = None
        self._made = self._closed = False

    # making ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Mount the tree, have a guest, tell it who it is. HvError, with nothing left behind but this process's mounts.
        """
        from hv.sandbox.guest import introduce
        from hv.sandbox.rootfs_tree import assemble
        from hv.sandbox.server import Server
        from hv.sandbox.template import Templates

        try:
            nets = self._cards()
            self._tree = assemble(self.spec, self.warn)
            self.machine = Templates(self.warn).machine(self.shape, nets, self._tree.path)
            self._made, self.loop = True, self.machine.loop
            self.machine.start()
            mark("restored")
            introduce(self.machine, self.spec, self._tree, self.warn)
            mark("answered")
            self._server = Server(self)
        except BaseException:
            self.close()
            raise

    def require_program(self) -> None:
        """HvError where the bundle's program is not in its tree. After prepare()."""
        from hv.sandbox.lookup import require_program

        assert self._tree is not None
        require_program(self._tree, self.spec.program)

    def _cards(self) -> list[dict[str, Any]]:
        path = next((path for kind, path in self.spec.joined if kind == "network"), "")
        if not path:
            return []
        from hv.sandbox.cards import cards_of

        return cards_of(path)

    # programs ----------------------------------------------------------------------------------------

    def start(self, stdin: int | None, stdout: int | None, stderr: int | None) -> GuestProcess:
        """Run the bundle's program, once; returns at once: GuestProcess.wait_started() tells whether it could be.

        The descriptors stay the caller's. With process.terminal `stdin` and `stdout` carry the terminal's bytes (a
        pty's raw end, pipes, a socket), and `stderr` is not used; its size is told by GuestProcess.resize(). None is
        nothing. The VM ends when it has, or could not be started; exit_code is 127 then where there is no such
        program, 126 where it can't be run.
        """
        if self.process is not None:
            raise StateError(f"{self.name} has been started", "only a created one can be")
        self.process = self._run(self.spec.program, stdin, stdout, stderr, self._program_ended)
        return self.process

    def exec(self, process: dict[str, Any], stdin: int | None, stdout: int | None, stderr: int | None,
             on_exit: Callable[[GuestProcess], None] | None = None) -> GuestProcess:
        """One more program, as in config.json's `process`; otherwise as start()."""
        own, process = self.spec.raw["process"], dict(process)
        for name in _AS_OWN:
            if process.get(name) in (None, "", []) and own.get(name) is not None:
                process[name] = own[name]
        return self._run(Program(process), stdin, stdout, stderr, on_exit)

    def _run(self, program: Program, stdin: int | None, stdout: int | None, stderr: int | None,
             on_exit: Callable[[GuestProcess], None] | None) -> GuestProcess:
        assert self._tree is not None
        from hv.sandbox.guest import home_of, vsock_of

        return GuestProcess.start(vsock_of(self.machine), process_spec(program, home_of(self._tree.fd, program)),
                                  stdin=stdin, stdout=stdout, stderr=None if program.terminal else stderr,
                                  loop=self.loop, on_exit=on_exit)

    def _program_ended(self, process: GuestProcess) -> None:
        if self.exit_code is None:
            self.exit_code = exit_code_of(process)
        self.machine.stop("quit", "its program has ended")

    # while it runs -----------------------------------------------------------------------------------

    def serve(self) -> int:
        """Serve the guest and who comes to the socket until the VM has ended; the exit code.

        The VM ends when the bundle's program has. Handlers of `loop` (add, call, call_later) run meanwhile.
        """
        gc.enable()                     # launchers turn it off for what is short (bin/pyhv)
        outcome = self.machine.wait(None)
        assert outcome is not None
        if self.exit_code is None:      # it was ended by itself, by close(), or by what it did to its kernel
            self.exit_code = outcome.code
        if outcome.reason not in ("quit", "poweroff", "reset", "halt"):
            self.warn(f"the guest ended: {outcome.reason}: {outcome.detail}")
        if self._server is not None:
            self._server.tell_end()
        return self.exit_code

    def kill(self, signal: int) -> None:
        """Signal the bundle's program. SIGKILL ends the VM with it, whatever the guest does."""
        if signal != SIGKILL:
            self.running().signal(signal)
            return
        if self.process is not None and not self.machine.pausing:
            self.process.signal(SIGKILL)
            self.loop.call_later(KILL_SECONDS, self.end)
        else:
            self.end()

    def end(self) -> None:
        """End the VM now, as SIGKILL ends a container."""
        if self.exit_code is None:
            self.exit_code = KILLED
        self.machine.stop("quit", "killed")

    def stop(self, seconds: float, signal: int = SIGTERM) -> None:
        """Signal the bundle's program, and end the VM `seconds` later if it still runs."""
        self.kill(signal)
        self.loop.call_later(max(0.0, seconds), lambda: self.kill(SIGKILL))

    def running(self) -> GuestProcess:
        """The bundle's program, which runs. StateError."""
        if self.process is None or self.process.status is not None or self.process.error is not None:
            raise StateError(f"{self.name} is not running")
        return self.process

    def pause(self) -> None:
        """Hold all of the guest."""
        self.machine.pause()

    def resume(self) -> None:
        """Let it go on."""
        self.machine.resume()

    def stats(self) -> dict[str, Any]:
        """Figures in the form of `events --stats`, of the guest as it sees itself. Not from the loop's thread."""
        from hv.sandbox.guest import figures

        return figures(self.machine)

    def processes(self) -> list[dict[str, Any]]:
        """The guest's processes: pid, ppid, uid, state, rss, cpu, started, command. Not from the loop's thread."""
        from hv.sandbox.guest import listed

        return listed(self.machine)

    # the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the VM, give everything back. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._server is not None:
            self._server.close()
        if self._made:
            self.machine.close()
        if self._tree is not None:
            self._tree.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def exit_code_of(process: GuestProcess) -> int:
    """A shell's code for how it ended."""
    if process.status is not None:
        kind, value = process.status
        return value if kind == "exit" else 128 + value
    return failure_code(process.error)


def explain(error: HvError | None, program: str) -> HvError:
    """Why `program` was not started, as a container's failure is told (engines look for these words)."""
    if isinstance(error, StartError) and error.step.startswith("exec"):
        what = "executable file not found in $PATH" if error.errno == ENOENT and "/" not in program \
            else os.strerror(error.errno).lower()
        return HvError(f'exec: "{program}": {what}')
    return error or HvError(f'exec: "{program}": not started')


def failure_code(error: HvError | None) -> int:
    """127: no such program; 126: it can't be run; 125: anything else that kept it from being started."""
    if not isinstance(error, StartError) or not error.step.startswith("exec"):
        return LOST
    if error.errno in (ENOENT, ENOTDIR):
        return NOT_FOUND
    return NOT_RUN if error.errno in (EACCES, EPERM, ENOEXEC) else LOST
