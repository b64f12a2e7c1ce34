"""hv.plainjson, under the name that this room's files use."""

from __future__ import annotations

__all__ = ["dumps", "loads"]

from hv.plainjson import dumps, loads
