"""`pyhv snapshot`, all but restore: take, list, look into, compare, check, merge, remove.

Driven by tests/kvm/test_snapshot_cli.py.
"""

from __future__ import annotations

__all__ = ["create", "diff", "fsck", "inspect", "list_snapshots", "merge", "pack", "remove"]

import os
from time import localtime, strftime

from hv.cli.say import say
from hv.errors import ConfigError, HvError, SnapshotError
from hv.plainjson import dumps
from hv.snapshot.format import DISKS, Snapshot, default_store, store_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILES = ("state.json", "container.json")       # one of them makes a folder a snapshot
_PATIENCE = 600.0       # s that saving may take


def create(vm: str, name: str, store: str | None, options: dict[str, Any]) -> int:
    """Save the running VM `vm`, or `container:ID`, as `name`."""
    from hv.cli.vm_client import Vm

    folder = store_folder(name, store)
    if vm.startswith("container:"):
        from hv.cli.snapshot_container import create as container

        return container(vm.removeprefix("container:"), folder, options)
    with Vm(vm) as client:
        reply = client.ask("snapshot", folder=folder, patience=_PATIENCE, **options)
    say(f"pyhv: saved {folder}: {_size(reply['bytes'])} of memory, the guest stood still for "
        f"{reply['paused_ms']:.1f} ms")
    return 0


def list_snapshots(store: str | None, as_json: bool) -> int:
    """The snapshots of a store."""
    from hv.snapshot.save import sweep

    folder = store or default_store()
    sweep(folder)
    rows = [_row(f"{folder}/{name}", name) for name in sorted(_names(folder))]
    if as_json:
        print(dumps(rows, 2))
        return 0
    table = [("NAME", "CREATED", "MEMORY", "ON DISK", "CPUS", "PARENT")]
    for row in rows:
        if "error" in row:
            table.append((row["name"], row["error"], "", "", "", ""))
            continue
        table.append((row["name"], strftime("%Y-%m-%d %H:%M:%S", localtime(row["created"])), _size(row["memory"]),
                      _size(row["on_disk"]), str(row["cpus"]), row["parent"] or "-"))
    widths = [max(len(line[column]) for line in table if line[2] or column == 0) for column in range(5)]
    for line in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]]).rstrip())
    return 0


def inspect(name: str, store: str | None, as_json: bool) -> int:
    """What a snapshot holds, its registers decoded."""
    snapshot = Snapshot(store_folder(name, store))
    data = describe(snapshot)
    if as_json:
        print(dumps(data, 2))
        return 0
    for key, value in data.items():
        if key == "vcpus":
            for index, registers in enumerate(value):
                for start in range(0, len(registers), 4):
                    some = list(registers.items())[start:start + 4]
                    cells = [f"{register} {number:#018x}" for register, number in some]
                    print(f"{f'vCPU {index}' if not start else '':<10} " + "  ".join(cells))
        else:
            print(f"{key:<10} {value if not isinstance(value, (list, dict)) else dumps(value)}")
    return 0


def diff(first: str, second: str, store: str | None) -> int:
    """In what two snapshots differ: state by field, memory by page."""
    one, other = (Snapshot(store_folder(name, store)) for name in (first, second))
    for line in _differences(one.state, other.state, ""):
        print(line)
    pages = _different_pages(one, other)
    print(f"memory: {pages} pages differ ({_size(pages * 4096)})" if pages else "memory: equal")
    return 0


def fsck(name: str, store: str | None) -> int:
    """Check everything that can be checked without restoring."""
    from hv.snapshot.diff import chain_of
    from hv.snapshot.pack import check

    members = chain_of(Snapshot(store_folder(name, store)))
    for member in members:
        check(member)
    say(f"pyhv: {name}: sound ({len(members)} {'snapshot' if len(members) == 1 else 'snapshots, one on the other'})")
    return 0


def pack(names: tuple[str, ...], store: str | None, back: bool) -> int:
    """Pack the memory of snapshots, or unpack it."""
    from hv.snapshot.pack import pack as command
    from hv.snapshot.pack import unpack

    for name in names:
        snapshot = Snapshot(store_folder(name, store))
        if back:
            unpack(snapshot)
        else:
            before, after = command(snapshot)
            say(f"pyhv: packed {name}: {_size(before)} of memory is {_size(after)} on disk")
    return 0


def merge(name: str, target: str, store: str | None) -> int:
    """A snapshot of its own of a difference."""
    from hv.snapshot.diff import merge as command

    snapshot = Snapshot(store_folder(name, store))
    if snapshot.state.get("parent") is None:
        raise ConfigError(f"{name} is no difference: it needs no parent", "copy its folder")
    command(snapshot, store_folder(target, store))
    return 0


def remove(names: tuple[str, ...], store: str | None, force: bool) -> int:
    """Remove snapshots; one that others are differences from only with `force`."""
    from hv.snapshot.save import discard

    folders = {store_folder(name, store) for name in names}
    for folder in folders:
        if not any(os.path.isfile(f"{folder}/{file}") for file in FILES):
            raise SnapshotError("state.json", f"there is no snapshot in {folder}",
                                "`pyhv snapshot ls` shows those there are")
        around = os.path.dirname(folder)
        for other in _names(around):
            child = f"{around}/{other}"
            if not force and child not in folders and _parent(child) == folder:
                raise ConfigError(f"{other} is a difference from {os.path.basename(folder)}",
                                  "merge or remove that one first, or --force")
    for folder in folders:
        # under another name first: a snapshot is there as a whole or not at all
        gone = f"{os.path.dirname(folder)}/.{os.path.basename(folder)}.new-{os.getpid()}"
        try:
            os.rename(folder, gone)
        except OSError as error:
            raise HvError(f"removing {folder}: {error.strerror}", "it is there still") from None
        discard(gone)
    return 0


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """What `inspect` tells."""
    from hv.kvm.abi_x86 import Regs

    state = snapshot.state
    vcpus = []
    for index in range(len(snapshot.part("vcpus", kind=list))):
        data = snapshot.part("vcpus", index, "REGS", kind=bytes)
        registers = Regs.from_buffer_copy(data.ljust(144, b"\0"))
        vcpus.append({name: getattr(registers, name) for name, *_ in Regs._fields_})
    return {"folder": snapshot.folder, "version": state["version"], "id": state.get("id"),
            "created": strftime("%Y-%m-%d %H:%M:%S", localtime(float(state.get("created") or 0))),
            "parent": state.get("parent"), "host": state.get("host"), "cmdline": state.get("cmdline"),
            "config": state.get("config"), "devices": sorted(snapshot.part("devices")),
            "disks": state.get("disks"), "on_disk": _on_disk(snapshot.folder), "vcpus": vcpus}


def _row(folder: str, name: str) -> dict[str, Any]:
    try:
        if os.path.isfile(f"{folder}/container.json"):
            from hv.cli.snapshot_container import read

            saved = read(folder)
            return {"name": name, "container": saved["name"], "created": float(saved["created"]), "memory": 0,
                    "on_disk": _on_disk(folder), "cpus": 0, "parent": None}
        snapshot = Snapshot(folder)
        parent = snapshot.state.get("parent")
        return {"name": name, "id": snapshot.part("id", kind=str), "created": float(snapshot.state.get("created") or 0),
                "memory": snapshot.number("config", "memory", high=1 << 60), "on_disk": _on_disk(folder),
                "cpus": snapshot.number("config", "cpus", high=1 << 16),
                "parent": os.path.basename(snapshot.part("parent", "folder", kind=str)) if parent else None}
    except SnapshotError as error:
        return {"name": name, "error": str(error)}


def _names(folder: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder)
                if name[0] != "." and any(os.path.isfile(f"{folder}/{name}/{file}") for file in FILES)]
    except OSError:
        return []


def _parent(folder: str) -> str | None:
    try:
        state = Snapshot(folder).state
        return str(state["parent"]["folder"]) if state.get("parent") else None
    except (SnapshotError, TypeError, KeyError):
        return None


def _on_disk(folder: str) -> int:
    total = 0
    for place in (folder, f"{folder}/{DISKS}", f"{folder}/images"):
        try:
            total += sum(entry.stat().st_blocks * 512 for entry in os.scandir(place) if entry.is_file())
        except OSError:
            pass
    return total


def _differences(one: Any, other: Any, where: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        lines = []
        for key in sorted({*one, *other}):
            lines += _differences(one.get(key), other.get(key), f"{where}.{key}" if where else key)
        return lines
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for index, (a, b) in enumerate(zip(one, other, strict=True))
                for line in _differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [f"{where}: {_short(one)} -> {_short(other)}"]


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = hex(value) if type(value) is int and abs(value) > 9999 else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _different_pages(one: Snapshot, other: Snapshot) -> int:
    from hv.snapshot.diff import path_of, whole_memory

    size = one.number("config", "memory", high=1 << 52)
    if size != other.number("config", "memory", high=1 << 52):
        return -1
    paths = [path_of(snapshot) if snapshot.state.get("parent") is None else whole_memory(snapshot, size)
             for snapshot in (one, other)]
    count = 0
    with open(paths[0], "rb") as a, open(paths[1], "rb") as b:
        while True:
            x, y = a.read(1 << 20), b.read(1 << 20)
            if not x and not y:
                return count
            if x != y:
                count += sum(x[at:at + 4096] != y[at:at + 4096] for at in range(0, max(len(x), len(y)), 4096))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
