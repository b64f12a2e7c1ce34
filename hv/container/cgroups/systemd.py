"""The systemd driver (--systemd-cgroup): a container's cgroup is a scope unit, which systemd knows of and limits.

linux.cgroupsPath is then SLICE:PREFIX:NAME (runc, docs/systemd.md): the unit PREFIX-NAME.scope in SLICE, where a slice
a-b.slice lies in a.slice. An empty slice is system.slice, of a user user.slice; without a path it is pyhv-ID.scope.

    runtime: forks a holder ---> systemd: a scope of the holder ---> the first process enters it ---> the holder ends

A scope must have a process from the start, and the first process wants to be born in its group, so a process that does
nothing goes before it. Root talks to the system's systemd; without root it is the user's own, to which a part of
version 2 is delegated, and which moves processes for us, since what is above is not ours. Everything else is as with
cgroups made by ourselves: systemd is told that the group is delegated, and the files say what its properties do not.
Controllers of version 1 that systemd leaves alone (cpuset, freezer, ...) get a folder of the same name.

Left out: units that are slices, and CollectMode. Driven by tests/unit/test_cgroups_systemd.py and
tests/root/test_cgroups_systemd.py.
"""

from __future__ import annotations

__all__ = ["Scope", "expand_slice", "from_unit", "scope", "unit_of"]

import os
from _signal import SIGKILL, pause

from hv.container.cgroups.bus import Bus, BusError
from hv.container.cgroups.detect import Layout, clean, detect, own_paths
from hv.container.cgroups.manager import NO_RIGHTS, Cgroup
from hv.container.cgroups.properties import annotated, properties
from hv.container.state import rootless
from hv.errors import ConfigError, HvError, StateError
from hv.linux.creds import PR_SET_PDEATHSIG, prctl
from hv.linux.ns import close_from
from hv.linux.signals import new_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.cgroups.bus import Property
    from hv.container.spec import Spec

_BOOTED = "/run/systemd/system"         # man 3 sd_booted
_CGROUPFS = "set the engine's cgroup manager to cgroupfs"
_UNIT_MOST = 255                        # systemd, src/basic/unit-def.h: UNIT_NAME_MAX is 256 with its NUL
# systemd, src/basic/unit-name.c, VALID_CHARS_WITH_AT
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@")
# controllers of version 1 whose folders systemd makes and removes (src/basic/cgroup-util.h, CGROUP_MASK_V1)
_SYSTEMDS = ("", "name=systemd", "cpu", "cpuacct", "blkio", "memory", "devices", "pids")
_ACCOUNTING = ("MemoryAccounting", "CPUAccounting", "TasksAccounting")


def scope(spec: Spec, name: str) -> Scope:
    """The cgroup of container `name`; nothing is made yet. ConfigError where systemd does not run."""
    user = rootless()
    if not os.path.isdir(_BOOTED):
        raise ConfigError("--systemd-cgroup: systemd does not run on this host", _CGROUPFS)
    slice_name, unit = unit_of(spec.cgroups_path, name, user)
    layout = detect()
    with Bus(user) as bus:
        top = clean(str(bus.property("ControlGroup")))
        version = int("".join(_digits(str(bus.property("Version")))) or 0)
    place = clean(f"{top}/{expand_slice(slice_name)}/{unit}")
    made = Scope({key: layout.mounts()[key] + _seen(place, layout.roots.get(key, "/")) for key in layout.mounts()},
                 layout, unit, user, version)
    made.slice, made.resources = slice_name, spec.resources
    made.extra = [("Description", ("s", f"container {name}")), *annotated(spec.annotations)]
    return made


def from_unit(unit: dict[str, Any], paths: dict[str, str]) -> Scope:
    """The cgroup that had these `paths` and was this `unit`."""
    return Scope(paths, None, str(unit["name"]), bool(unit["user"]), int(unit["version"]))


def _digits(version: str) -> list[str]:
    """The first number in something like v252.38-1."""
    digits = []
    for letter in version.lstrip("v"):
        if not letter.isdecimal():
            break
        digits.append(letter)
    return digits


def _seen(place: str, root: str) -> str:
    """A group as seen where not the root but `root` is mounted."""
    return place if root == "/" or not place.startswith(root + "/") else place[len(root):]


def unit_of(path: str, name: str, user: bool) -> tuple[str, str]:
    """(slice, unit) for linux.cgroupsPath."""
    where = f"linux.cgroupsPath {path!r:.80}"
    parts = path.split(":") if path else ["", "pyhv", name]
    if len(parts) != 3:
        raise ConfigError(f"{where}: with --systemd-cgroup it is slice:prefix:name",
                          "for example system.slice:pyhv:box")
    slice_name, prefix, last = parts
    if not last or last.endswith((".slice", ".scope")):
        raise ConfigError(f"{where}: the name", "without it there is no unit; .scope is added")
    unit = f"{prefix}-{last}.scope" if prefix else f"{last}.scope"
    if not _LETTERS.issuperset(unit) or len(unit) > _UNIT_MOST:
        raise ConfigError(f"{where}: {unit:.80} is no unit's name", f"at most {_UNIT_MOST} letters, digits and :-_.\\@")
    slice_name = slice_name or ("user.slice" if user else "system.slice")
    try:
        expand_slice(slice_name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", error.hint) from None
    return slice_name, unit


def expand_slice(name: str) -> str:
    """The path of a slice: a-b.slice lies in a.slice, -.slice is the root (man 5 systemd.slice)."""
    stem = name.removesuffix(".slice")
    if stem == "-" and name != stem:
        return ""
    words = stem.split("-")
    if stem == name or not all(words) or not _LETTERS.issuperset(stem) or len(name) > _UNIT_MOST or "@" in stem:
        raise ConfigError(f"{name:.80} is no slice", "for example system.slice, or a-b.slice")
    return "/".join("-".join(words[:count]) + ".slice" for count in range(1, len(words) + 1))


class Scope(Cgroup):
    """The group of the unit `unit`; `user`: of this user's systemd."""

    def __init__(self, paths: dict[str, str], layout: Layout | None, unit: str, user: bool,
                 version: int) -> None:
        super().__init__(paths, layout)
        self.name, self.user = unit, user
        self.slice = ""
        self.version = version
        self.unit = {"name": unit, "user": user, "version": version}
        self.resources: dict[str, Any] = {}
        self.extra: list[Property] = []
        self._home = paths.get("", "")

    # making ----------------------------------------------------------------------------------------

    def _create(self, made: list[str]) -> None:
        wanted: list[Property] = [
            ("Slice", ("s", self.slice)), ("Delegate", ("b", True)), ("DefaultDependencies", ("b", False)),
            *((name, ("b", True)) for name in (*_ACCOUNTING, "IOAccounting" if self._v2 else "BlockIOAccounting")),
            *self._properties(self.resources), *self.extra]
        self.held = _hold()
        try:
            with Bus(self.user) as bus:
                self._start(bus, [("PIDs", ("au", [self.held])), *wanted])
            self._check()
            super()._create(made)
        except BaseException:
            self.release()
            raise

    def _start(self, bus: Bus, wanted: list[Property]) -> None:
        try:
            bus.start(self.name, wanted)
        except BusError as error:
            if error.name != "UnitExists":
                raise
            if bus.unit_state(self.name) in ("active", "activating", "deactivating", "reloading"):
                raise StateError(f"unit {self.name} exists already", "choose another linux.cgroupsPath, or end it"
                                 ) from None
            bus.reset(self.name)        # it failed, and is kept for people to look at
            bus.start(self.name, wanted)

    def _check(self) -> None:
        """Is the holder where we have computed? Everything after relies on it."""
        where = own_paths(self.held)
        layout = self._layout()
        for key in ("", "name=systemd"):
            if key in self.paths:
                real = layout.mounts()[key] + _seen(where.get(key, "/"), layout.roots.get(key, "/"))
                if real != self.paths[key]:
                    raise HvError(f"unit {self.name}: systemd has put it into {real}, not {self.paths[key]}", _CGROUPFS)

    def release(self) -> None:
        """The holder ends."""
        if self.held:
            os.kill(self.held, SIGKILL)
            os.waitpid(self.held, 0)
            self.held = 0

    @property
    def _v2(self) -> bool:
        """Whether systemd's controllers are those of version 2."""
        return "" in self.paths and not {"memory", "cpu", "pids"} & self.paths.keys()

    def _properties(self, resources: dict[str, Any], update: bool = False) -> list[Property]:
        return properties(resources, v2=self._v2, version=self.version, update=update)

    # who is in it ----------------------------------------------------------------------------------

    def _without(self, path: str, error: OSError) -> None:
        if self.user and path == self.paths.get("") and error.errno in NO_RIGHTS:
            return                      # systemd will move the process: settle(), add()
        super()._without(path, error)

    def settle(self, pid: int) -> None:
        """The first process is there: see to it that it is in the unit's group."""
        if self.user:
            self.add(pid)

    def add(self, pid: int, beside: int = 0, *, v1: bool = True) -> None:
        """Move process `pid` into all groups (`v1`: those of version 1 too)."""
        if self.user and "" in self.paths:
            below = self.paths[""][len(self._home):]
            try:
                with Bus(True) as bus:
                    bus.attach(self.name, below, pid)
            except BusError as error:
                raise HvError(f"process {pid} can't enter {self.name}: {error}") from None
            return
        super().add(pid, beside, v1=v1)

    # limits, end -----------------------------------------------------------------------------------

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        """Set the limits of linux.resources: by systemd, which got those of the start with the unit, and by files."""
        if update and (wanted := self._properties(resources, True)):
            # while systemd writes version 1's list of devices there is a moment without any
            pausing = "devices" in self.paths and bool(resources.get("devices")) and not self.frozen()
            if pausing:
                self.freeze(True)
            try:
                with Bus(self.user) as bus:
                    bus.change(self.name, wanted)
                super().apply(resources, update=True)
            finally:
                if pausing:
                    self.freeze(False)
            return
        super().apply(resources, update=update)

    def remove(self) -> None:
        """End the unit, and remove what systemd does not."""
        try:
            with Bus(self.user) as bus:
                bus.stop(self.name)
        except HvError:
            pass                        # without systemd there is no unit either; the folders are removed all the same
        super().remove()
        for key, path in self.paths.items():
            above = os.path.dirname(path)
            point = self._layout().v1.get(key, "")
            while key not in _SYSTEMDS and point and above.startswith(point + "/"):
                try:
                    os.rmdir(above)
                except OSError:
                    break               # another container's unit is in that slice
                above = os.path.dirname(above)


def _hold() -> int:
    """A process that does nothing, until it is killed or we end. It has nothing of ours open; all other signals, a
    key's at our terminal for example, are held back in it."""
    parent = os.getpid()
    born: list[int] = []
    new_process(os.fork, born)
    if born[0]:
        return born[0]
    try:
        prctl(PR_SET_PDEATHSIG, SIGKILL)
        close_from(0, now=True)
        while os.getppid() == parent:
            pause()
    finally:
        os._exit(0)
