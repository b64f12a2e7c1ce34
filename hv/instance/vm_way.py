"""Instances as VMs: by hv/sandbox, whose VM lives in the process that makes the instance, and so is its holder.

Driven by tests/kvm/test_instance_vm.py.
"""

from __future__ import annotations

__all__ = ["VmWay"]

import os
from _signal import SIGKILL, SIGTERM, sigwait

from hv.errors import HvError, StateError
from hv.instance.holder import ENDING, STATUS, pack_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from hv.instance.record import Instance
    from hv.instance.streams import Streams
    from hv.sandbox.client import SandboxClient
    from hv.sandbox.sandbox import Sandbox

_MIB = 1 << 20
_PATIENCE, _KILL_PATIENCE = 20.0, 3.0   # seconds for an answer


class VmWay:
    """See way.py."""

    pty = False

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None

    def make(self, instance: Instance, config: dict[str, Any], streams: Streams) -> int:
        from hv.container.spec import Spec
        from hv.container.state import write_whole
        from hv.plainjson import dumps
        from hv.sandbox.sandbox import Sandbox, explain, failure_code

        settings = instance.settings
        spec = Spec(config, instance.folder)
        spec.text = dumps(config).encode()
        write_whole(f"{instance.run}/config.json", spec.text)
        sandbox = self._sandbox = Sandbox(
            spec, instance.id, instance.run, memory_mib=settings.memory // _MIB, cpus=-int(-settings.cpus // 1),
            kernel=settings.kernel, initrd=settings.initrd)
        sandbox.prepare()
        sandbox.require_program()       # what can be seen from here costs no turn of the guest's
        process = sandbox.start(*streams.inner)
        try:
            process.wait_started(_PATIENCE)
        except HvError as error:
            failure = explain(error, spec.program.args[0])
            failure.exit_code = failure_code(error)
            raise failure from None
        except TimeoutError as error:
            raise HvError(f"the guest does not start the program: {error}") from None
        return os.getpid()

    def hold(self, instance: Instance) -> NoReturn:
        code = 255
        try:
            assert self._sandbox is not None
            code = self._sandbox.serve()
            self._sandbox.close()
        except BaseException as error:
            _note(instance, f"{type(error).__name__}: {error}")
        finally:
            os.write(STATUS, pack_status(code))
            os.close(ENDING)
            sigwait((SIGTERM,))         # as holder.py: until what was written last has been read
            os._exit(0)

    def _client(self, instance: Instance) -> SandboxClient:
        from hv.sandbox.client import SandboxClient

        if not instance.running:
            raise StateError(f"{instance.name} is not running", f"pyhv start {instance.name}")
        return SandboxClient(instance.run, _PATIENCE)

    def exec(self, instance: Instance, process: dict[str, Any], *, interactive: bool, detach: bool) -> int:
        from hv.instance.vm_exec import attend

        with _answering(instance):
            return attend(self._client(instance), process, interactive=interactive, detach=detach)

    def kill(self, instance: Instance, signal: int) -> None:
        client = self._client(instance)
        if signal == SIGKILL:
            client.timeout = _KILL_PATIENCE
        try:
            client.kill(signal)
        except StateError:
            raise
        except (HvError, TimeoutError) as error:
            pid = instance.program()
            if signal != SIGKILL or not pid:
                raise HvError(f"{instance.name}: {error}", f"pyhv kill {instance.name} ends the VM itself") from None
            os.kill(pid, SIGKILL)       # a guest, or a VM, that never answers

    def pause(self, instance: Instance, on: bool) -> None:
        client = self._client(instance)
        with _answering(instance):
            if on:
                client.pause()
            else:
                client.resume()

    def resize(self, instance: Instance, rows: int, columns: int) -> bool:
        try:
            self._client(instance).resize(rows, columns)
        except (HvError, TimeoutError):
            pass                    # it has ended
        return True

    def stats(self, instance: Instance) -> dict[str, Any]:
        with _answering(instance):
            return self._client(instance).stats()

    def processes(self, instance: Instance) -> list[dict[str, Any]]:
        with _answering(instance):
            rows = self._client(instance).processes()
        for row in rows:
            if isinstance(row.get("command"), list):
                row["command"] = " ".join(map(str, row["command"]))
        return rows

    def config(self, instance: Instance) -> dict[str, Any]:
        from hv.instance.container_way import read_config

        return read_config(f"{instance.run}/config.json", instance)

    def root(self, instance: Instance) -> str:
        return f"/proc/{instance.program()}/root{instance.kept().get('root', '')}"

    def clean(self, instance: Instance) -> bool:
        pid = instance.program()
        if pid:
            try:
                os.kill(pid, SIGKILL)
            except OSError:
                pass
        try:
            os.unlink(f"{instance.run}/vm.sock")
        except OSError:
            pass
        return False


class _answering:
    """For a with statement: a guest that does not answer costs one line."""

    def __init__(self, instance: Instance) -> None:
        self._name = instance.name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, TimeoutError):
            raise HvError(f"{self._name}: {error}", f"pyhv kill {self._name} ends the VM") from None


def _note(instance: Instance, text: str) -> None:
    try:
        instance.refresh()
        instance.save_state(error=text)
    except HvError:
        pass
