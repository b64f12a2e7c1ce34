"""`update`: new limits for a running container. What is named is changed, all else stays.

The limits that hold are kept in the container's config, so that the next update starts from them. Where one can't be
set, those before it are set back. Driven by tests/unit/test_cgroups_update.py and tests/root/test_cgroups.py.
"""

from __future__ import annotations

__all__ = ["merge", "update"]

from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.manager import Cgroup


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the fields of `new`, object by object; arrays are replaced. Null means: not named."""
    result = dict(old)
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merge(result[name], value)
        elif value is not None:
            result[name] = value
    return result


def update(group: Cgroup, config: dict[str, Any], new: dict[str, Any]) -> None:
    """Apply `new` (a linux.resources) to `group`, and note it in the container's `config`, which the caller saves."""
    linux = config.setdefault("linux", {})
    old = linux.get("resources") or {}
    memory = new.get("memory")
    if isinstance(memory, dict) and memory.get("limit") == -1 and not memory.get("swap"):
        new = new | {"memory": memory | {"swap": -1}}   # the two are limited together or not at all
    try:
        group.apply(_together(old, new), update=True)
    except HvError:
        try:
            group.apply({name: old[name] for name in new if old.get(name)}, update=True)
        except HvError:
            pass                # the first error is the one to tell
        raise
    linux["resources"] = merge(old, new)


def _together(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new`, with what of `old` a limit there can't be understood without: version 2's swap depends on the limit, quota
    and period are one file."""
    result = {name: value for name, value in new.items() if value}
    for part, groups in (("memory", (("limit", "swap"),)), ("cpu", (("quota", "period"),))):
        if not isinstance(result.get(part), dict) or not isinstance(old.get(part), dict):
            continue
        row = dict(result[part])
        for names in groups:
            if any(row.get(name) for name in names):
                for name in names:
                    if not row.get(name) and old[part].get(name):
                        row[name] = old[part][name]
        result[part] = row
    return result
