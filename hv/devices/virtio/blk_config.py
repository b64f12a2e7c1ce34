"""`--disk FILE,...`: what the user asks of one disk, and the device made of it.

Driven by tests/unit/test_virtio_blk_file.py.
"""

from __future__ import annotations

__all__ = ["DiskConfig"]

import os

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.device import VirtioDevice

SERIAL_BYTES = 20       # virtio 1.2, 5.2.6
MAX_QUEUES = 64         # as many as processors
_RATE_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class DiskConfig:
    """A disk from the file or block device `path`, or from a vhost-user back end at socket `vhost_user`.

    `overlay`: "temp", or a file; the disk is then only read, and shared. `layers`: overlays between the two that are
    only read, and shared, the lowest first. `iops`, `bps`: at most so many requests, bytes a second. ConfigError names
    the option that can't be.
    """

    FIELDS = (("path", "text?"), ("readonly", "flag"), ("direct", "flag"), ("overlay", "text?"), ("layers", "texts"),
              ("serial", "text"), ("queues", "number"), ("iops", "number"), ("bps", "number"), ("vhost_user", "text?"))

    def __init__(self, path: str | None = None, *, readonly: bool = False, direct: bool = False,
                 overlay: str | None = None, layers: str | tuple[str, ...] | list[str] = (),
                 serial: str = "", queues: int | str = 1, iops: int | str = 0, bps: int | str = 0,
                 vhost_user: str | None = None) -> None:
        for name, flag in (("readonly", readonly), ("direct", direct)):
            if not isinstance(flag, bool):
                raise ConfigError(f"--disk: {name} takes no value", f"write {name} alone")
        texts: tuple[tuple[str, object], ...] = (("overlay", overlay), ("layers", layers), ("serial", serial),
                                                ("vhost-user", vhost_user))
        for name, text in texts:
            if text is True or (text == "" and name != "serial"):
                raise ConfigError(f"--disk: {name} without a value",
                                  {"overlay": "overlay=temp or overlay=FILE"}.get(name, f"write {name}=..."))
        self.path = path or None
        self.readonly = readonly
        self.direct = direct
        self.overlay = overlay
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.serial = _serial(serial)
        self.queues = _number("queues", queues)
        self.iops = _number("iops", iops)
        self.bps = _number("bps", bps)
        self.vhost_user = vhost_user
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ConfigError(f"--disk: queues={queues}", f"1 to {MAX_QUEUES}; usual is one for each processor")
        if vhost_user is None and self.path is None:
            raise ConfigError("--disk: no file", "for example --disk root.img or --disk vhost-user=SOCKET")
        if self.layers and overlay is None:
            raise ConfigError("--disk: layers are only read, so the guest's writes need an overlay",
                              "add overlay=temp or overlay=FILE")
        if vhost_user is not None and (self.path or readonly or direct or overlay or serial or self.iops or self.bps):
            raise ConfigError("--disk: with vhost-user, the back end decides about file, readonly, direct, overlay, "
                              "serial and rates", "give vhost-user=SOCKET and queues=N alone")

    def create(self) -> VirtioDevice:
        """The device, its files open and locked. ConfigError where they can't be."""
        if self.vhost_user is not None:
            from hv.devices.vhost_user.blk import VhostUserBlk

            return VhostUserBlk(self.vhost_user, self.queues)
        from hv.devices.virtio.blk import Block
        from hv.devices.virtio.blk_file import open_disk

        assert self.path is not None
        disk = open_disk(self.path, readonly=self.readonly or self.overlay is not None, direct=self.direct)
        if self.overlay is not None:
            from hv.devices.virtio.blk_overlay import open_overlay

            return Block(open_overlay(disk, self.path, self.overlay, self.layers), readonly=self.readonly,
                         serial=self.serial, queues=self.queues, iops=self.iops, bps=self.bps)
        return Block(disk, readonly=self.readonly, serial=self.serial, queues=self.queues, iops=self.iops, bps=self.bps)

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        whole = os.path.abspath
        return {"path": self.path and whole(self.path), "readonly": self.readonly, "direct": self.direct,
                "overlay": self.overlay and (self.overlay if self.overlay == "temp" else whole(self.overlay)),
                "layers": [whole(layer) for layer in self.layers], "serial": self.serial.decode(),
                "queues": self.queues, "iops": self.iops, "bps": self.bps,
                "vhost_user": self.vhost_user and whole(self.vhost_user)}


def _number(name: str, value: int | str) -> int:
    """A whole number, with K, M or G behind it."""
    text = str(value)
    unit = _RATE_UNITS.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if isinstance(value, bool) or not digits.isascii() or not digits.isdigit():
        raise ConfigError(f"--disk: {name}={value!s} is not a number", f"for example {name}=4")
    return int(digits) * unit


def _serial(text: str) -> bytes:
    data = text.encode(errors="replace")
    if len(data) > SERIAL_BYTES or not text.isascii() or not text.isprintable():
        raise ConfigError(f"--disk: serial {text!r} is not at most {SERIAL_BYTES} printable ASCII characters",
                          "for example serial=root-1")
    return data
