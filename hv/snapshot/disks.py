"""Disks in a snapshot: what is copied, what is referred to, and what a restored machine writes to.

    the machine's disk                  in the snapshot                              a restored machine gets
    file, only read                     a reference: path, size, time of change      the file
    file + overlay (temp or FILE)       a reference, and disks/N.0.overlay           file + disks/N.0.overlay + temp
    file, written                       a reference: it holds until somebody writes  the file, or file + temp
    file, written, copy=True            disks/N.img                                  disks/N.img + temp

Nothing of a snapshot is ever written to again, so any number of machines share it; each has a temporary overlay of its
own on top. A snapshot of such a machine links to the files of the one before (link(2); a copy where that can't be) and
adds what is new, so that either can be removed; beyond LAYERS_MOST overlays they become one. Copies share their blocks
where the file system can, and keep holes (hv/linux/sparse.py).

A reference is refused where size, time of change, or the first 64 KiB are others than they were. Of a block device only
size and beginning can be compared. Driven by tests/unit/test_snapshot_disks.py, test_snapshot_disks_refused.py and
test_snapshot_disks_flight.py there, and tests/kvm/test_snapshot_disk_guests.py.
"""

from __future__ import annotations

__all__ = ["disks_for_restore", "lock_disks", "save_disks", "sync_disks", "unlock_disks"]

import fcntl
import os
import stat
from time import sleep, time_ns

from hv.devices.virtio.blk import Block
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.blk_file import DiskFile, lock, open_disk
from hv.devices.virtio.blk_overlay import LAYERS_MOST, Overlay, base_identity, write_overlay
from hv.errors import ConfigError, HvError, StateError
from hv.linux.sparse import copy_sparse
from hv.machine.recipe import check_fields, checked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.machine.machine import Machine

    Saved = dict[str, Any]

FOLDER = "disks"
STATE = "state.json"            # beside it in every snapshot (hv/snapshot/format.py)
# What the snapshot notes of a disk; `image` and `layers` are files in its own folder.
FIELDS = (("path", "text"), ("overlay", "text?"), ("writable", "flag"), ("size", "number"), ("mtime_ns", "number"),
          ("inode", "number"), ("sample", "number"), ("image", "text?"), ("layers", "texts"))
_TICK_NS = 20_000_000           # a file's times move in steps: of 4 ms with CONFIG_HZ=250, 10 ms with 100


def save_disks(machine: Machine, folder: str, copy: bool = False) -> list[Saved]:
    """Put what a restore needs of the machine's disks into `folder`/disks; what is to be noted of each.

    The machine is paused and its devices stopped. `copy`: also the files that the guest writes to itself. Nothing is
    synced: see sync_disks. HvError, OSError.
    """
    pairs = [(config, device) for config, device in zip(machine.config.devices, machine.devices.values(), strict=True)
             if isinstance(config, DiskConfig)]
    os.makedirs(f"{folder}/{FOLDER}", 0o700, exist_ok=True)
    saved = []
    for number, (config, device) in enumerate(pairs):
        if not isinstance(device, Block):
            raise ConfigError(f"disk {number} is another program's (vhost-user={config.vhost_user})",
                              "what it holds can't be kept in a snapshot")
        if not device.paused:
            raise StateError(f"disk {number} is at work", "stop the devices first")
        saved.append(_save(number, config, device, f"{folder}/{FOLDER}", copy))
    return saved


def _save(number: int, config: DiskConfig, device: Block, folder: str, copy: bool) -> Saved:
    try:
        device.disk.flush()
    except OSError as error:
        raise HvError(f"disk {number} ({config.path}): what the guest wrote can't be flushed: {error.strerror}",
                      "the host's disk may be full or broken") from None
    base, parts = _stack(device.disk)
    assert config.path is not None
    path = os.path.abspath(config.path)
    writable = not parts and not config.readonly
    changed, sample = base_identity(base)
    image = f"{number}.img" if (copy and writable) or _is_in_snapshot(path) else None
    if image is not None:
        if writable or not _link(base.fd, f"{folder}/{image}"):
            _copy_image(base, f"{folder}/{image}", changed)
    elif not _is_same(path, base.fd):
        raise ConfigError(f"disk {number}: {path} is not the file any more that the machine uses",
                          "put it back, or move it only when the machine has ended")
    elif writable:
        _let_time_pass(changed)
    layers = _save_layers(number, parts, folder)
    return {"path": path, "overlay": config.recipe()["overlay"], "writable": writable, "size": base.size,
            "mtime_ns": changed, "inode": os.fstat(base.fd).st_ino, "sample": sample, "image": image, "layers": layers}


def _stack(disk: DiskFile | Overlay) -> tuple[DiskFile, list[Overlay]]:
    """(the file below all, the overlays on it, the lowest first)."""
    parts: list[Overlay] = []
    while isinstance(disk, Overlay):
        parts.insert(0, disk)
        disk = disk.base
    return disk, parts


def _is_in_snapshot(path: str) -> bool:
    """Whether it is the copy of a disk in some snapshot, which may be removed while ours is kept."""
    folder, name = os.path.split(path)
    return os.path.basename(folder) == FOLDER and name.endswith(".img") and \
        os.path.isfile(f"{os.path.dirname(folder)}/{STATE}")


def _is_same(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def _let_time_pass(changed: int) -> None:
    """Return when a write would give the file another time of change than it has now."""
    left = changed + _TICK_NS - time_ns()
    if 0 < left <= 2 * _TICK_NS:        # more is a clock that was set back
        sleep(left / 1e9)


def _link(fd: int, target: str) -> bool:
    """A second name for the open file, which nobody writes to. False where that can't be."""
    try:
        # Only with a folder's descriptor, which is not used here, Python has link(2) follow.
        os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=fd, follow_symlinks=True)
    except OSError:
        return False        # another file system; not ours; the last name is gone
    return True


def _copy_image(base: DiskFile, target: str, changed: int) -> None:
    """Copy the file, with its time of change: overlays know it by that."""
    source = os.open(f"/proc/self/fd/{base.fd}", os.O_RDONLY | os.O_CLOEXEC)       # ours may be O_DIRECT
    try:
        fd = _create(target)
        try:
            os.ftruncate(fd, base.size)
            copy_sparse(source, 0, fd, 0, base.size)
            os.fchmod(fd, 0o400)
            os.utime(fd, ns=(changed, changed))
        finally:
            os.close(fd)
    finally:
        os.close(source)


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _save_layers(number: int, parts: list[Overlay], folder: str) -> list[str]:
    """Link to the overlays that are only read, write the one that is not; the names, the lowest first."""
    groups = [[part] for part in parts] if len(parts) <= LAYERS_MOST else [parts]
    names = []
    for index, group in enumerate(groups):
        name = f"{number}.{index}.overlay"
        names.append(name)
        if group[0].readonly and len(group) == 1 and _link(group[0].fd, f"{folder}/{name}"):
            continue
        fd = _create(f"{folder}/{name}")
        try:
            write_overlay(group, fd)
            os.fchmod(fd, 0o400)
        finally:
            os.close(fd)
    return names


def sync_disks(folder: str) -> None:
    """Have all files that save_disks made on the disk. OSError."""
    place = f"{folder}/{FOLDER}"
    if not os.path.isdir(place):
        return
    for name in ["", *os.listdir(place)]:
        fd = os.open(f"{place}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# the way back --------------------------------------------------------------------------------------------


def disks_for_restore(recipe: object, saved: object, folder: str, *, private: bool) -> dict[str, Any]:
    """The recipe of a machine whose disks have the content they had; the snapshot's own files are not written to.

    `private`: what the machine writes stays with it; else it goes to the files it went to, where these were the guest's
    own. What with_changes put into `recipe` before wins: another file is taken as it is, if it has the same size.
    Nothing is trusted: ConfigError names disk and file, and what to do.
    """
    values = checked(recipe)
    entries = [entry for entry in values["devices"] if entry["device"] == "disk"]
    if not isinstance(saved, list) or len(saved) != len(entries):
        raise ConfigError(f"snapshot: disks: not a list of {len(entries)}, one for each disk", "it is damaged")
    for number, (entry, noted) in enumerate(zip(entries, saved, strict=True)):
        kept = check_fields(noted, FIELDS, f"snapshot: disks[{number}]")
        if missing := [name for name, _ in FIELDS if name not in kept]:
            raise ConfigError(f"snapshot: disks[{number}].{missing[0]}: is missing", "the snapshot is damaged")
        _prepare(number, entry, kept, os.path.abspath(folder), private)
    return values


def _prepare(number: int, entry: dict[str, Any], kept: Saved, folder: str, private: bool) -> None:
    """Set path, layers and overlay of one disk."""
    replaced = entry.get("path") != kept["path"]
    chosen = entry.get("overlay") if entry.get("overlay") != kept["overlay"] else None
    if replaced:
        _check_file(number, str(entry.get("path")), kept, is_replaced=True)
    elif kept["image"] is not None:
        entry["path"] = _own_file(number, kept["image"], folder, kept["size"])
        entry["direct"] = False         # the page cache has it once for all machines
    else:
        _check_file(number, kept["path"], kept, is_replaced=False)
    if len(kept["layers"]) > LAYERS_MOST:
        raise ConfigError(f"snapshot: disk {number}: {len(kept['layers'])} overlays", f"possible are {LAYERS_MOST}")
    entry["layers"] = [_own_file(number, name, folder, None) for name in kept["layers"]]
    shared = bool(entry["layers"]) or (kept["image"] is not None and not replaced)
    written = not entry.get("readonly", False)
    entry["overlay"] = chosen or ("temp" if shared or (private and written) else None)


def _own_file(number: int, name: str, folder: str, size: int | None) -> str:
    """A file of the snapshot's own, which is there, no link, and as large as it should be."""
    path = f"{folder}/{FOLDER}/{name}"
    if "/" in name or name in ("", ".", ".."):
        raise ConfigError(f"snapshot: disk {number}: {name!r:.80} is no name of a file in it", "it is damaged")
    try:
        status = os.lstat(path)
    except OSError as error:
        raise ConfigError(f"snapshot: disk {number}: {path}: {error.strerror}", "the snapshot is incomplete") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"snapshot: disk {number}: {path} is not a file", "the snapshot is damaged, or hostile")
    if size is not None and status.st_size != size:
        raise ConfigError(f"snapshot: disk {number}: {path} has {status.st_size} bytes, not {size}",
                          "it has been cut, or swapped")
    return path


def _check_file(number: int, path: str, kept: Saved, *, is_replaced: bool) -> None:
    """Whether the file outside of the snapshot is the one that the guest had, or can stand in for it."""
    hint = f"name another: --disk {number}=FILE" + (
        "; or take the snapshot with --copy-disks" if kept["writable"] and not is_replaced else "")
    try:
        disk = open_disk(path, readonly=True, direct=False)
    except ConfigError as error:
        raise ConfigError(f"disk {number}: {str(error).removeprefix('disk ')}", hint) from None
    try:
        # With direct, a disk may end before its file does (hv/devices/virtio/blk_file.py).
        if not 0 <= disk.size - kept["size"] < 4096:
            raise ConfigError(f"disk {number}: {path} has {disk.size} bytes, in the snapshot {kept['size']}", hint)
        disk.size = kept["size"]
        if not is_replaced and base_identity(disk) != (kept["mtime_ns"], kept["sample"]):
            raise ConfigError(f"disk {number}: {path} has changed since the snapshot was taken", hint)
    except OSError as error:
        raise ConfigError(f"disk {number}: {path}: {error.strerror}", hint) from None
    finally:
        disk.close()


# for a machine that moves ----------------------------------------------------------------------------------


def unlock_disks(machine: Machine) -> None:
    """Let another process have the files that the machine writes to; the machine is frozen."""
    for disk in _written(machine):
        fcntl.flock(disk.fd, fcntl.LOCK_UN)


def lock_disks(machine: Machine) -> None:
    """The way back. ConfigError where another process has one by now: the machine must not run on."""
    for disk in _written(machine):
        lock(disk.fd, f"/proc/self/fd/{disk.fd}", shared=False)


def _written(machine: Machine) -> list[DiskFile]:
    found = []
    for device in machine.devices.values():
        if isinstance(device, Block):
            base, parts = _stack(device.disk)
            if not parts and not base.readonly:
                found.append(base)
    return found
