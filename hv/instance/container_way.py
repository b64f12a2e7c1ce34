"""Instances as containers: by hv/container's runtime, whose state is in RUN/runtime.

Driven by tests/root/test_instance.py.
"""

from __future__ import annotations

__all__ = ["ContainerWay", "runtime"]

import os
from _signal import SIGKILL

from hv.container.runtime import CreateOptions, Runtime
from hv.container.spec import Spec
from hv.container.state import Record, start_time
from hv.errors import HvError, StateError
from hv.places import run_root
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from hv.instance.record import Instance
    from hv.instance.streams import Streams

_ROWS_MOST = 1 << 16
_OOM_CODE = 128 + SIGKILL


def runtime() -> Runtime:
    """The runtime with all instances' containers."""
    return Runtime(f"{run_root()}/runtime")


class ContainerWay:
    """See way.py."""

    pty = True

    def __init__(self) -> None:
        self._pid = 0

    def make(self, instance: Instance, config: dict[str, Any], streams: Streams) -> int:
        spec = Spec(config, instance.folder)
        spec.text = dumps(config).encode()
        streams.put_inside()
        options = CreateOptions(console=streams.console, reaper=instance.settings.init)
        record = runtime().create(instance.id, instance.folder, options, start=True, spec=spec)
        self._pid = int(record.data["pid"])
        streams.take_terminal()
        return self._pid

    def hold(self, instance: Instance) -> NoReturn:
        from hv.instance.holder import hold

        hold(self._pid, f"pyhv-hold {instance.id[:12]}")

    def exec(self, instance: Instance, process: dict[str, Any], *, interactive: bool, detach: bool) -> int:
        from hv.container.exec import ExecOptions
        from hv.container.foreground import attend, terminal_size

        options = ExecOptions()
        box = runtime()
        if detach:
            _silence(range(3))
            if process.get("terminal"):
                process["terminal"] = False
            box.exec(instance.id, process, options)
            return 0
        if not interactive and not process.get("terminal"):
            _silence((0,))

        def begin(console: int) -> int:
            options.console = console
            size = terminal_size() if console >= 0 else None
            if size:
                process["consoleSize"] = {"height": size[0], "width": size[1]}
            return box.exec(instance.id, process, options)

        return attend(begin, terminal=bool(process.get("terminal")))

    def kill(self, instance: Instance, signal: int) -> None:
        try:
            runtime().kill(instance.id, signal)
        except StateError:
            raise StateError(f"{instance.name} is not running") from None

    def pause(self, instance: Instance, on: bool) -> None:
        runtime().pause(instance.id, on)

    def resize(self, instance: Instance, rows: int, columns: int) -> bool:
        return False

    def stats(self, instance: Instance) -> dict[str, Any]:
        return runtime().stats(instance.id)

    def processes(self, instance: Instance) -> list[dict[str, Any]]:
        box = runtime()
        found = []
        pids = box.group(Record(box.root, instance.id).load()).pids() or _namesakes(instance.program())
        for pid in pids[:_ROWS_MOST]:
            try:
                with open(f"/proc/{pid}/stat", "rb", 0) as file:
                    fields = file.read(1024).rpartition(b")")[2].split()
                with open(f"/proc/{pid}/cmdline", "rb", 0) as file:
                    words = file.read(4096).rstrip(b"\0").replace(b"\0", b" ")
                with open(f"/proc/{pid}/comm", "rb", 0) as file:
                    name = file.read(64).strip()
                found.append({"pid": pid, "ppid": int(fields[1]), "uid": os.stat(f"/proc/{pid}").st_uid,
                              "ticks": int(fields[11]) + int(fields[12]), "start": int(fields[19]),
                              "command": words.decode(errors="replace") or f"[{name.decode(errors='replace')}]"})
            except (OSError, IndexError):
                pass                # it has ended
        return found

    def config(self, instance: Instance) -> dict[str, Any]:
        return read_config(Record(f"{run_root()}/runtime", instance.id).config, instance)

    def root(self, instance: Instance) -> str:
        return f"/proc/{instance.program()}/root"

    def clean(self, instance: Instance) -> bool:
        box = runtime()
        record = Record(box.root, instance.id)
        try:
            record.load()
        except HvError:
            killed = False
        else:
            killed = box.group(record).oom_kills() > 0
        box.delete(instance.id, force=True)
        return killed


def _namesakes(first: int) -> list[int]:
    """Those in the pid namespace of process `first`, for one without a cgroup (of a user without root)."""
    found = []
    try:
        wanted = os.readlink(f"/proc/{first}/ns/pid")
    except OSError:
        return []
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and os.readlink(f"/proc/{name}/ns/pid") == wanted:
                found.append(int(name))
        except OSError:
            pass                    # it has ended, or is another user's
    return found


def _silence(fds: Any) -> None:
    """These of our streams are /dev/null."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def read_config(path: str, instance: Instance) -> dict[str, Any]:
    """A config.json of ours."""
    from hv.plainjson import loads

    try:
        with open(path, "rb", 0) as file:
            found = loads(file.read().decode())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise StateError(f"{instance.name} is not running", f"pyhv start {instance.name}")
    return found


def first_process(pid: int) -> dict[str, Any]:
    """What keep.json says of the program."""
    return {"program": pid, "program_start": start_time(pid)}


__all__ += ["first_process", "read_config"]
