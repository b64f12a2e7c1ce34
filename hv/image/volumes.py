"""Volumes: folders that outlive instances. data_root()/volumes/NAME/_data, with volume.json and users/ beside it.

Driven by tests/unit/test_image_volumes.py.
"""

from __future__ import annotations

__all__ = ["Volume", "VolumeUse", "Volumes", "parse_volume"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class VolumeUse:
    """What `-v [SOURCE:]TARGET[:OPTIONS]` asks for. `source`: an absolute path (bind), a name, or "" (anonymous)."""

    __slots__ = ("chown", "copy", "propagation", "read_only", "relabel", "source", "target")

    def __init__(self) -> None:
        self.source = self.target = self.propagation = ""
        self.read_only = self.chown = False
        self.copy = True            # nocopy: don't fill an empty volume from the image
        self.relabel = ""           # "z", "Z" or ""

    @property
    def is_bind(self) -> bool:
        """Whether a folder or file of the host is meant."""
        return self.source.startswith("/")


class Volume:
    """One volume, as volume.json has it."""

    __slots__ = ("anonymous", "created", "driver", "labels", "mountpoint", "name", "options")


def parse_volume(text: str) -> VolumeUse:
    """`-v`'s value. ConfigError."""
    raise NotImplementedError


class Volumes:
    """The volumes beneath `root` (default data_root()/volumes)."""

    def __init__(self, root: str = "") -> None:
        raise NotImplementedError

    def create(self, name: str = "", labels: Mapping[str, str] | None = None, driver: str = "local",
               options: Mapping[str, str] | None = None, *, anonymous: bool = False) -> Volume:
        """Make a volume, or give the one of that name; no name means a random one."""
        raise NotImplementedError

    def get(self, name: str) -> Volume:
        """The volume of that name, or of a name that starts so. ConfigError."""
        raise NotImplementedError

    def ls(self) -> list[Volume]:
        """All, by name."""
        raise NotImplementedError

    def users(self, name: str) -> list[str]:
        """IDs of the instances that use it."""
        raise NotImplementedError

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it and what is in it; refused while an instance uses it."""
        raise NotImplementedError

    def use(self, name: str, instance_id: str, *, anonymous: bool = False) -> Volume:
        """The volume, made if need be, marked as used by an instance until release()."""
        raise NotImplementedError

    def release(self, instance_id: str, *, remove_anonymous: bool = False) -> None:
        """Forget an instance's uses; with --rm and rm -v its anonymous volumes go too."""
        raise NotImplementedError

    def fill(self, name: str, root_fd: int, target: str) -> bool:
        """If the volume is empty, copy what the root file system open as `root_fd` has at `target`; whether it did."""
        raise NotImplementedError

    def unused(self, *, everything: bool = False) -> list[Volume]:
        """Those that no instance uses: anonymous ones, or `everything`."""
        raise NotImplementedError
