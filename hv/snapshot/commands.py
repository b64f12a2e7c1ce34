"""What a control socket can do with snapshots (docs/control.md). Driven by tests/kvm/test_snapshot_cli.py."""

from __future__ import annotations

__all__ = ["migrate", "snapshot"]

from hv.errors import ConfigError
from hv.snapshot.save import save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from hv.machine.control_call import Call


def snapshot(call: Call, *, folder: str, diff: bool = False, track: bool = False, copy_disks: bool = False,
             stop: bool = False, compress: bool = False) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Save the machine to `folder`, an absolute path. See hv.snapshot.save.save for the rest."""
    if not folder.startswith("/") or "\0" in folder:
        raise ConfigError(f"snapshot: folder {folder!r:.80} is no absolute path")
    yield {"phase": "saving"}
    saved = save(call.machine, folder, diff=diff, track=track, copy_disks=copy_disks, stop=stop,
                 compress=compress)
    return {"id": saved.id, "folder": saved.folder, "paused_ms": round(saved.paused_ms, 3),
            "total_ms": round(saved.total_ms, 3), "bytes": saved.bytes}


def migrate(call: Call, *, address: str, downtime_ms: float = 100.0, copy_disks: bool = False, postcopy: bool = False,
            cert: str | None = None, key: str | None = None,
            ca: str | None = None) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Move the machine to the pyhv that receives at `address`. Who hangs up before it is gone aborts that."""
    from hv.snapshot.migrate import migrate as move

    if not 0 < downtime_ms <= 60_000:
        raise ConfigError(f"migrate: downtime_ms {downtime_ms} is not between 0 and 60000")
    if (cert is None) != (key is None) or (cert is None) != (ca is None):
        raise ConfigError("migrate: cert, key and ca belong together", "give all three, or none")
    tls = (cert, key, ca) if cert is not None and key is not None and ca is not None else None
    moved = yield from move(call.machine, address, tls=tls, downtime_ms=downtime_ms, copy_disks=copy_disks,
                            postcopy=postcopy)
    return {"downtime_ms": round(moved.downtime_ms, 3), "rounds": moved.rounds, "bytes": moved.bytes,
            "total_ms": round(moved.total_ms, 3), "converged": moved.converged}
