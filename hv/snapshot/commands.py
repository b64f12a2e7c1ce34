"""What a control socket can do with snapshots (docs/control.md). Driven by tests/kvm/test_snapshot_cli.py."""

from __future__ import annotations

__all__ = ["snapshot"]

from hv.errors import ConfigError
from hv.snapshot.save import save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from hv.machine.control_call import Call


def snapshot(call: Call, *, folder: str, diff: bool = False, track: bool = False, copy_disks: bool = False,
             stop: bool = False) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Save the machine to `folder`, an absolute path. See hv.snapshot.save.save for the rest."""
    if not folder.startswith("/") or "\0" in folder:
        raise ConfigError(f"snapshot: folder {folder!r:.80} is no absolute path")
    yield {"phase": "saving"}
    saved = save(call.machine, folder, diff=diff, track=track, copy_disks=copy_disks, stop=stop)
    return {"id": saved.id, "folder": saved.folder, "paused_ms": round(saved.paused_ms, 3),
            "total_ms": round(saved.total_ms, 3), "bytes": saved.bytes}
