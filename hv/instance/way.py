"""The two ways to run an instance, behind one face: as a container, as a VM.

    way = way_of(instance)
    way.make(instance, config, streams)     in the process that makes it: its program runs. Then way.hold(), for good
    way.kill(instance, 15), ...             from any process

Everything else of this room is the same for both. Driven by tests/root/test_instance.py and
tests/kvm/test_instance_vm.py.
"""

from __future__ import annotations

__all__ = ["way_of"]

from hv.instance.settings import VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, Protocol

    from hv.instance.record import Instance
    from hv.instance.streams import Streams

    class Way(Protocol):
        """What the two can do."""

        pty: bool                   # the program makes its own terminal and sends the master

        def make(self, instance: Instance, config: dict[str, Any], streams: Streams) -> int:
            """Start the program; the pid, on the host, of what ends with it."""

        def hold(self, instance: Instance) -> NoReturn:
            """Hold it until it has ended, write how to RUN/ID/status, end."""

        def exec(self, instance: Instance, process: dict[str, Any], *, interactive: bool, detach: bool) -> int:
            """Run one more program on our own streams; its exit code. Detached: 0, once it runs."""

        def kill(self, instance: Instance, signal: int) -> None:
            """Signal the program."""

        def pause(self, instance: Instance, on: bool) -> None:
            """Hold everything, or let it go on."""

        def resize(self, instance: Instance, rows: int, columns: int) -> bool:
            """The size of the program's terminal; False where the keeper has that terminal."""

        def stats(self, instance: Instance) -> dict[str, Any]:
            """Figures, as hv/container/cgroups/stats.py has them."""

        def processes(self, instance: Instance) -> list[dict[str, Any]]:
            """What runs in it: pid, ppid, uid, command."""

        def config(self, instance: Instance) -> dict[str, Any]:
            """config.json as it was made for this run."""

        def root(self, instance: Instance) -> str:
            """A path to its root, with what is mounted in it, while it runs."""

        def clean(self, instance: Instance) -> bool:
            """End and remove what is left of a run; whether memory ran out in it."""


def way_of(instance: Instance) -> Way:
    """The way of its settings."""
    if instance.kind == VM:
        from hv.instance.vm_way import VmWay

        return VmWay()
    from hv.instance.container_way import ContainerWay

    return ContainerWay()
