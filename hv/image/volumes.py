"""Volumes: folders that outlive instances.

    data_root()/volumes/NAME/_data          what is in it
    data_root()/volumes/NAME/volume.json    driver, labels, when it was made
    data_root()/volumes/NAME/users/ID       instance ID uses it; counts as long as data_root()/instances/ID is there
    data_root()/volumes/NAME/filling        while it is being filled from an image: what is there is not whole
    data_root()/volumes/.lock, .new-*, .gone-*

A volume comes and goes by a rename, so it is whole or not there. Who makes or removes one holds .lock; what a killed
process left in .new-* and .gone-* goes with the next. The only driver is `local`, without options: a file system of
its own is mounted by the host, and bound with -v. Driven by tests/unit/test_image_volumes.py.
"""

from __future__ import annotations

__all__ = ["Volume", "Volumes"]

import fcntl
import os

from hv.errors import ConfigError, HvError, ImageError, StateError
from hv.image.files import Lock, reading, said
from hv.places import data_root
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME_MOST = 128
_INFO_MOST = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Volume:
    """One volume. `created`: seconds since 1970. `mountpoint`: the folder to bind."""

    __slots__ = ("anonymous", "created", "driver", "labels", "mountpoint", "name")

    def __init__(self, folder: str, name: str, fields: dict[str, object]) -> None:
        self.name, self.mountpoint = name, f"{folder}/_data"
        self.driver = str(fields.get("driver", "local"))
        labels, created = fields.get("labels"), fields.get("created")
        self.labels = {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}
        self.created = float(created) if isinstance(created, (int, float)) else 0.0
        self.anonymous = fields.get("anonymous") is True


class Volumes:
    """The volumes beneath `root` (default data_root()/volumes)."""

    def __init__(self, root: str = "") -> None:
        self.root = os.path.abspath(root) if root else data_root() + "/volumes"
        self._instances = os.path.dirname(self.root) + "/instances"

    # -- making and finding ------------------------------------------------------------------------------------

    def create(self, name: str = "", labels: Mapping[str, str] | None = None, driver: str = "local",
               options: Mapping[str, str] | None = None, *, anonymous: bool = False) -> Volume:
        """Make a volume, or give the one of that name; no name means a random one."""
        if driver != "local":
            raise ConfigError(f"volume driver {driver}: there is only local", "leave --driver out")
        if options:
            raise ConfigError(f"volume option {next(iter(options))}: the local driver takes none here",
                              "mount it on the host, and bind it with -v /PATH:TARGET")
        name = _checked(name) if name else os.urandom(32).hex()
        if not os.path.isdir(f"{self.root}/{name}"):
            from time import time

            fields = {"driver": driver, "labels": dict(labels or {}), "created": time(), "anonymous": anonymous}
            try:
                # nobody else gets in: root of an instance may make set-user-ID files and devices there
                os.makedirs(self.root, mode=0o700, exist_ok=True)
                with self._lock():
                    self._make(name, dumps(fields).encode())
            except OSError as error:
                raise _said(error, f"making {name}") from None
        return self.get(name)

    def _make(self, name: str, content: bytes) -> None:
        new = f"{self.root}/.new-{os.urandom(6).hex()}"
        os.makedirs(f"{new}/users", mode=0o700)
        os.mkdir(f"{new}/_data", 0o755)
        os.chmod(f"{new}/_data", 0o755)
        with open(f"{new}/volume.json", "wb") as file:
            file.write(content)
        try:
            os.rename(new, f"{self.root}/{name}")
        except OSError:
            _clear(new)
            if not os.path.isdir(f"{self.root}/{name}"):        # else somebody made it just now
                raise

    def get(self, name: str) -> Volume:
        """The volume of that name, or the only one whose name starts so. ConfigError."""
        if not os.path.isdir(f"{self.root}/{_checked(name)}"):
            names = [other for other in self._names() if other.startswith(name)]
            if len(names) != 1:
                raise ConfigError(f"volume {name}: " + (f"{len(names)} names start so" if names else
                                                        "there is none of that name"), "`pyhv volume ls` lists them")
            name = names[0]
        folder = f"{self.root}/{name}"
        try:
            fields = loads(str(reading(f"{folder}/volume.json", _INFO_MOST) or b"{}", "utf-8"))
        except (ValueError, ImageError):
            fields = {}                         # its files are there all the same
        return Volume(folder, name, fields if isinstance(fields, dict) else {})

    def ls(self) -> list[Volume]:
        """All, by name."""
        found = []
        for name in self._names():
            try:
                found.append(self.get(name))
            except HvError:
                continue                        # removed meanwhile
        return found

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root) if name[0] in _LETTERS)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _said(error, "listing them") from None

    def _lock(self) -> Lock:
        return Lock(f"{self.root}/.lock", shared=False)

    # -- who uses them -----------------------------------------------------------------------------------------

    def users(self, name: str) -> list[str]:
        """IDs of the instances that use it."""
        try:
            return sorted(user for user in os.listdir(f"{self.root}/{_checked(name)}/users")
                          if os.path.isdir(f"{self._instances}/{user}"))
        except FileNotFoundError:
            return []

    def use(self, name: str, instance_id: str, *, anonymous: bool = False) -> Volume:
        """The volume, made if need be, marked as used by an instance until release(). Its folder must be there."""
        _checked(instance_id)
        volume = self.create(_checked(name), anonymous=anonymous)
        with self._lock():
            try:
                os.close(os.open(f"{self.root}/{name}/users/{instance_id}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC,
                                 0o600))
            except OSError as error:
                raise _said(error, f"using {name}") from None
        return volume

    def release(self, instance_id: str, *, remove_anonymous: bool = False) -> None:
        """Forget an instance's uses; with --rm and rm -v its anonymous volumes go too, if nobody else has them."""
        for name in self._names():
            try:
                os.unlink(f"{self.root}/{name}/users/{_checked(instance_id)}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _said(error, f"releasing {name}") from None
            if remove_anonymous and self.get(name).anonymous and not self.users(name):
                self.remove(name)

    def unused(self, *, everything: bool = False) -> list[Volume]:
        """Those that no instance uses: anonymous ones, or `everything`."""
        return [volume for volume in self.ls()
                if (everything or volume.anonymous) and not self.users(volume.name)]

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it and what is in it; refused while an instance uses it. `force`: no error if it is not there."""
        if force and _checked(name) not in self._names():
            return
        name = self.get(name).name
        try:
            with self._lock():
                if users := self.users(name):
                    raise StateError(f"volume {name}: is used by {', '.join(user[:12] for user in users[:5])}",
                                     "remove these first: `pyhv rm`")
                os.rename(f"{self.root}/{name}", f"{self.root}/.gone-{os.urandom(6).hex()}")
                self._sweep()
        except OSError as error:
            raise _said(error, f"removing {name}") from None

    def _sweep(self) -> None:
        """With the lock held, nobody is at work on these."""
        for name in os.listdir(self.root):
            if name.startswith((".new-", ".gone-")):
                _clear(f"{self.root}/{name}")

    # -- filling -----------------------------------------------------------------------------------------------

    def fill(self, name: str, root_fd: int, target: str) -> bool:
        """If the volume is empty, copy what the root file system open as `root_fd` has at `target`; whether it did.

        The folder's owner and mode are copied, too, as docker does. Others who want to fill it wait. What a killed
        process has copied is removed first.
        """
        folder = f"{self.root}/{_checked(name)}"
        marker = f"{folder}/filling"
        try:
            lock = os.open(folder, _FOLDER)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                into = os.open(f"{folder}/_data", _FOLDER)
                try:
                    return self._fill(into, marker, root_fd, target)
                finally:
                    os.close(into)
            finally:
                os.close(lock)
        except OSError as error:
            raise _said(error, f"filling {name}") from None

    @staticmethod
    def _fill(into: int, marker: str, root_fd: int, target: str) -> bool:
        half_done = os.path.exists(marker)
        with os.scandir(into) as entries:
            if not half_done and next(entries, None) is not None:
                return False
        from hv.image.copytree import copy_tree, open_folder

        source = open_folder(root_fd, target)
        try:
            if half_done:
                from hv.image.tree import clear_folder

                clear_folder(into)
            if source >= 0:
                os.close(os.open(marker, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
                copy_tree(source, into)
            if source >= 0 or half_done:
                os.unlink(marker)
            return source >= 0
        finally:
            if source >= 0:
                os.close(source)


def _checked(name: str) -> str:
    if not name or len(name) > _NAME_MOST or name[0] not in _LETTERS or not set(name) <= _LETTERS | set("_.-"):
        raise ConfigError(f"volume {name[:60]!r}: is no name for a volume",
                          "letters, digits, and _ . - behind the first; a path begins with /")
    return name


def _clear(folder: str) -> None:
    from hv.image.tree import clear_folder

    fd = os.open(folder, _FOLDER)
    try:
        clear_folder(fd)
    finally:
        os.close(fd)
    os.rmdir(folder)


def _said(error: OSError, doing: str) -> HvError:
    wrapped = said(error, doing)
    return ImageError(str(wrapped).replace("image store:", "volumes:", 1),
                      wrapped.hint.replace("store is $PYHV_DATA/images; root's is /var/lib/pyhv/images",
                                           "volumes are in $PYHV_DATA/volumes"))
