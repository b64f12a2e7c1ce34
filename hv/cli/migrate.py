"""`pyhv migrate`: a running VM from one pyhv to another (docs/migration.md). Driven by tests/kvm/test_migrate_cli.py.
"""

from __future__ import annotations

__all__ = ["receive", "send"]

from hv.cli.say import say
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE = 3600.0      # s that moving may take


def send(vm: str, address: str, downtime: float, copy_disks: bool, postcopy: bool, tls: tuple[str | None, ...],
         quiet: bool) -> int:
    """Move the VM `vm` to who receives at `address`."""
    from hv.cli.vm_client import Vm

    _whole(tls)
    cert, key, ca = tls
    fields: dict[str, object] = {} if cert is None else {"cert": cert, "key": key, "ca": ca}

    def tell(news: dict[str, Any]) -> None:
        if quiet:
            return
        if news.get("phase") == "round":
            say(f"pyhv: round {news['round']}: {news['sent_bytes'] >> 20} MiB sent, {news['left_bytes'] >> 10} KiB "
                f"changed meanwhile, {news['bytes_per_s'] >> 20} MiB/s")
        elif news.get("phase") == "note":
            say(f"pyhv: {news['text']}")

    with Vm(vm) as client:
        reply = client.ask("migrate", told=tell, address=address, downtime_ms=downtime, copy_disks=copy_disks,
                           postcopy=postcopy, patience=_PATIENCE, **fields)
    say(f"pyhv: moved: {reply['bytes'] >> 20} MiB in {reply['rounds']} rounds, {reply['total_ms']:.0f} ms; the guest "
        f"stood still for {reply['downtime_ms']:.1f} ms")
    return 0


def receive(address: str, tls: tuple[str | None, ...], wait: float | None, values: dict[str, Any]) -> int:
    """Wait for a VM at `address`, and run it on this terminal; the guest's exit code."""
    import os

    from hv.cli.boot import drive
    from hv.snapshot.arrive import Arrival
    from hv.snapshot.wire import listen, take

    whole = _whole(tls)
    sock = listen(address, whole)
    try:
        say(f"pyhv: waiting at {address}")
        wire = take(sock, whole, wait)
    finally:
        sock.close()
        if address.startswith("unix:"):
            os.unlink(address.removeprefix("unix:"))
    return drive(Arrival(wire).take(), values)


def _whole(tls: tuple[str | None, ...]) -> tuple[str, str, str] | None:
    cert, key, ca = tls
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise ConfigError("--cert, --key and --ca belong together", "give all three, or none")
    return cert, key, ca
