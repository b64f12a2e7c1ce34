"""Ask a sandbox from another process, by the socket in its folder.

    with SandboxClient(folder) as vm:
        vm.kill(15)
        process = vm.exec({"args": ["sh"], "cwd": "/"}, 0, 1, 2)     # descriptors go along (SCM_RIGHTS)
        code = process.wait()

A connection is one request, or one process that it waits for. Driven by tests/kvm/test_sandbox.py.
"""

from __future__ import annotations

__all__ = ["ClientProcess", "SandboxClient"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class SandboxClient:
    """The sandbox of `folder`. StateError where it does not run."""

    def __init__(self, folder: str, timeout: float = 10.0) -> None:
        self.folder, self.timeout = folder, timeout

    def start(self) -> int:
        """Let the bundle's program go, where its sandbox waits for that (`pyhv-vm-runtime create`); its guest's pid."""
        raise NotImplementedError

    def exec(self, process: dict[str, Any], stdin: int, stdout: int, stderr: int) -> ClientProcess:
        """Run one more program. HvError; `.exit_code` 127, 126 as with Sandbox.start()."""
        raise NotImplementedError

    def wait(self) -> int:
        """The exit code of the bundle's program, once it has ended."""
        raise NotImplementedError

    def kill(self, signal: int) -> None:
        """As Sandbox.kill()."""
        raise NotImplementedError

    def stop(self, seconds: float) -> None:
        """As Sandbox.stop(); returns at once."""
        raise NotImplementedError

    def resize(self, rows: int, columns: int) -> None:
        """The size of the bundle's program's terminal."""
        raise NotImplementedError

    def pause(self) -> None:
        """As Sandbox.pause()."""
        raise NotImplementedError

    def resume(self) -> None:
        """As Sandbox.resume()."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """As Sandbox.stats()."""
        raise NotImplementedError

    def processes(self) -> list[dict[str, Any]]:
        """As Sandbox.processes()."""
        raise NotImplementedError


class ClientProcess:
    """A program that exec() started; it is killed where this process ends before it does."""

    pid: int                        # in the guest

    def fileno(self) -> int:
        """Readable once it has ended."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, 128 + n by signal n. TimeoutError."""
        raise NotImplementedError

    def kill(self, signal: int) -> None:
        """Signal it."""
        raise NotImplementedError

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal's size."""
        raise NotImplementedError

    def close(self) -> None:
        """Hang up: it is killed if it runs."""
        raise NotImplementedError
