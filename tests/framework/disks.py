"""A machine's disks without its processors: made, written, saved into a snapshot's folder, restored."""

from __future__ import annotations

__all__ = ["SIZE", "Guest", "guest", "listing", "restored"]

import os
from pathlib import Path
from typing import Any

from hv.devices.virtio.blk import Block
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.blk_overlay import CLUSTER
from hv.devices.virtio.rng import RngConfig
from hv.machine.config import MachineConfig
from hv.machine.recipe import config_from, recipe_of
from hv.machine.recipe_change import with_changes
from hv.snapshot.disks import disks_for_restore, save_disks, sync_disks

SIZE = 40 * CLUSTER + 1536      # the last cluster is a short one


class Guest:
    """Configuration and devices of a machine, without a processor."""

    def __init__(self, config: MachineConfig) -> None:
        self.config = config
        self.devices: dict[str, Any] = {}
        try:
            for number, device in enumerate(config.devices):
                made = device.create()
                self.devices[f"{made.KIND}{number}"] = made
        except BaseException:
            self.close()
            raise

    @property
    def blocks(self) -> list[Block]:
        return [device for device in self.devices.values() if isinstance(device, Block)]

    def write(self, at: int, data: bytes, disk: int = 0) -> None:
        self.blocks[disk].disk.write([memoryview(bytearray(data))], at, len(data))

    def read(self, disk: int = 0) -> bytes:
        room = memoryview(bytearray(self.blocks[disk].disk.size))
        self.blocks[disk].disk.read([room], 0, len(room))
        return bytes(room)

    def save(self, folder: Path, copy: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
        """(recipe, what is noted of disks, folder)."""
        os.makedirs(folder)
        (folder / "state.json").touch()
        at_work = [device for device in self.blocks if not device.paused]
        for device in at_work:
            device.stop()
        try:
            saved = save_disks(self, str(folder), copy)     # type: ignore[arg-type]
        finally:
            for device in at_work:
                device.paused = False       # resume() is for devices with a driver
        sync_disks(str(folder))
        return recipe_of(self.config), saved, str(folder)

    def close(self) -> None:
        for device in self.devices.values():
            device.close()


def guest(*disks: DiskConfig) -> Guest:
    return Guest(MachineConfig(devices=(RngConfig(), *disks)))


def restored(snapshot: tuple[Any, Any, str], *, private: bool = True, **changes: Any) -> Guest:
    recipe, saved, folder = snapshot
    return Guest(config_from(disks_for_restore(with_changes(recipe, **changes), saved, folder, private=private)))


def listing(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, "disks", name).read_bytes() for name in sorted(os.listdir(f"{folder}/disks"))}
