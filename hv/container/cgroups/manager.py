"""A container's cgroup, whatever the host's version: made, limited, joined, counted, frozen, removed.

    manager(path, name)     where the container with this linux.cgroupsPath goes; nothing is made yet
    from_paths(paths)       the same, from what `Cgroup.paths` was (state.json)

linux.cgroupsPath (config-linux.md, Cgroups Path): an absolute path counts from each hierarchy's root, a relative one
from /pyhv there, none is /pyhv-ID, which needs no group above it to be made and removed. All hierarchies that are
mounted are joined, as the peers do; on a hybrid host the controllers are looked for in version 1 first. Without rights
(rootless) both start from the caller's own group, in version 2 from the one above it, and hierarchies that can't be had
are done without, until a limit is asked for that needs one. Groups below /pyhv that are empty at the end are removed
with the container.

Groups that systemd keeps (--systemd-cgroup) are hv/container/cgroups/systemd.py's, which adds to the Cgroup here.
Driven by tests/unit/test_cgroups_manager.py and tests/root/test_cgroups.py.
"""

from __future__ import annotations

__all__ = ["NO_RIGHTS", "Cgroup", "from_paths", "manager"]

import errno
import os

from hv.container.cgroups import v1
from hv.container.cgroups.detect import Layout, clean, detect, own_paths
from hv.container.cgroups.fields import Fields
from hv.container.cgroups.folder import Folder, make, pids_below, remove_tree
from hv.container.fields import get
from hv.container.state import rootless
from hv.errors import ConfigError, HvError, StateError
from hv.linux.signals import Held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.errors import KernelError
    from hv.linux.hands import Hands

    Apply = Callable[[Folder, Fields], None]

_DEFAULT = "/pyhv"
NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
_SYS_WRITE = 1                          # arch/x86/entry/syscalls/syscall_64.tbl
# a part of linux.resources -> (fields that ask, () for any; controller, function of v1; controller and function of v2)
_PARTS: dict[str, tuple[tuple[tuple[str, ...], str, Apply, str], ...]] = {
    "memory": (((), "memory", v1.memory, "memory"),),
    "cpu": ((("shares", "quota", "period", "burst", "idle", "realtimePeriod", "realtimeRuntime"), "cpu", v1.cpu, "cpu"),
            (("cpus", "mems"), "cpuset", v1.cpuset, "cpuset")),
    "pids": (((), "pids", v1.pids, "pids"),),
    "blockIO": (((), "blkio", v1.blkio, "io"),),
    "network": ((("classID",), "net_cls", v1.net_cls, ""), (("priorities",), "net_prio", v1.net_prio, "")),
    "rdma": (((), "rdma", v1.rdma, "rdma"),),
}
_HUGE = ((), "hugetlb", v1.hugetlb, "hugetlb")
# unset is None, 0, "" or false, but these say something even so
_ZERO_COUNTS = ("swappiness", "idle", "burst", "disableOOMKiller", "useHierarchy")


def manager(path: str, name: str, *, layout: Layout | None = None) -> Cgroup:
    """The cgroup of container `name`, whose linux.cgroupsPath is `path`."""
    layout = layout or detect()
    below = path if path.startswith("/") else f"{_DEFAULT}/{path}" if path else f"{_DEFAULT}-{name}"
    below = clean(below)
    if below == "/":
        raise ConfigError(f"linux.cgroupsPath {path!r}: the root itself", "name a group below it")
    own: dict[str, str] = {}
    if not path.startswith("/") and rootless():
        own = own_paths()               # whatever was delegated to a user lies below where the user's session is
    paths = {}
    for key, point in layout.mounts().items():
        start = own.get(key, "/")
        root = layout.roots.get(key, "/")
        if root != "/":
            start = start[len(root):] if start.startswith(root + "/") else "/"
        if not key and own:
            start = _above(point, start)
        paths[key] = point + clean(start + below)
    return Cgroup(paths, layout)


def _above(point: str, own: str) -> str:
    """The group above `own` where we may make others there. Our own holds processes, so it can hand no controllers on
    (Documentation/admin-guide/cgroup-v2.rst, No Internal Process Constraint); runc does the same."""
    above = os.path.dirname(own)
    return above if os.access(f"{point}{above}/cgroup.procs", os.W_OK, effective_ids=True) else own


def from_paths(paths: dict[str, str]) -> Cgroup:
    """The cgroup that had these `paths`."""
    return Cgroup(paths, None)


class Cgroup:
    """`paths`: plain data, folders by controller, or name=NAME; that of version 2 under "". Shrinks in create() and
    add() where we have no rights."""

    def __init__(self, paths: dict[str, str], layout: Layout | None) -> None:
        self.paths = paths
        self.made = False                       # by create(), and so ours to empty
        self._layout_known = layout
        self._refused: dict[str, int] = {}      # key -> errno, of those that could not be had
        self.held = 0                           # of systemd.py: the process that the group was made with,
        self.unit: dict[str, Any] = {}          # and plain data to keep beside the paths

    def _layout(self) -> Layout:
        if self._layout_known is None:
            self._layout_known = detect()
        return self._layout_known

    def _folders(self) -> list[str]:
        return list(dict.fromkeys(self.paths.values()))         # comounted controllers share theirs

    def _folder(self, *keys: str) -> Folder | None:
        for key in keys:
            if key in self.paths:
                return Folder(self.paths[key])
        return None

    # making ----------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the groups. StateError where one is there already and in use: its processes are not ours to end.

        Where it fails, those that it made are removed again.
        """
        made: list[str] = []
        try:
            with Held():
                self._create(made)
                self.made = True
        except BaseException:
            for path in () if self.made else made:
                try:
                    os.rmdir(path)      # nobody has joined yet
                except OSError:
                    pass
            raise

    def _create(self, made: list[str]) -> None:
        for path in self._folders():
            try:
                if make(path):
                    made.append(path)
                elif found := [pid for pid in pids_below(path) if pid != self.held]:
                    raise StateError(f"cgroup {path} holds {len(found)} processes already",
                                     "choose another linux.cgroupsPath, or end them")
            except OSError as error:
                self._without(path, error)
        try:
            if "cpuset" in self.paths:
                v1.inherit_cpuset(self.paths["cpuset"], self._layout().v1["cpuset"])
        except HvError:
            if not rootless():
                raise
            self._drop(self.paths["cpuset"], errno.EACCES)
        if "" in self.paths and len(self.paths) == 1:
            from hv.container.cgroups.v2 import enable

            enable(self.paths[""], self._layout().v2)

    def _without(self, path: str, error: OSError) -> None:
        if error.errno not in NO_RIGHTS or not rootless():
            raise _not_had(path)(error) from None
        self._drop(path, error.errno)

    def _drop(self, path: str, number: int) -> None:
        for key in [key for key, value in self.paths.items() if value == path]:
            del self.paths[key]
            self._refused[key] = number

    def settle(self, pid: int) -> None:
        """The first process is there: something to be done about where it is?"""

    def release(self) -> None:
        """The first process is ready, or will never be."""

    def add(self, pid: int, beside: int = 0, *, v1: bool = True) -> None:
        """Move process `pid` into all groups (`v1`: those of version 1 too). `beside`: for a version 2 group that was
        split up by its processes, the one whose group to join then."""
        for path in self._folders() if v1 else filter(None, [self.paths.get("")]):
            try:
                Folder(path).put("cgroup.procs", pid)
            except OSError as error:
                if error.errno == errno.EBUSY and beside and path == self.paths.get(""):
                    self._join(pid, beside)
                elif error.errno == errno.ESRCH:
                    raise HvError(f"process {pid} has ended before it was in its cgroup") from None
                elif error.errno == errno.ENOENT:
                    raise StateError(f"cgroup {path} is gone", "somebody removed it; delete the container") from None
                else:
                    self._without(path, error)

    def join(self, hands: Hands, *, v2: bool = True) -> None:
        """The process of `hands`, which must have a single thread, moves itself into all groups (`v2`: that of version
        2 too).

        A thread that names itself by 0 in a version 1 `tasks` is moved without the lock that holds up every fork on the
        host, and for which add() waits for a grace period: 5 to 15 ms (kernel/cgroup, cgroup_procs_write_start).
        """
        may = NO_RIGHTS if rootless() else ()
        for path in self._folders():
            if path == self.paths.get(""):
                if not v2:
                    continue
                leaf = "cgroup.procs"
            else:
                leaf = "tasks"
            with hands.failing(_not_had(path)):
                fd = hands.open(f"{path}/{leaf}", os.O_WRONLY, may=may)
                written = hands.do("write", _SYS_WRITE, fd, b"0", 1, may=(*may, errno.EBADF) if may else ())
                hands.close(fd)
            if may and hands.value(written) < 0:
                self._without(path, OSError(-(min(hands.value(fd), 0) or hands.value(written)), ""))

    def _join(self, pid: int, beside: int) -> None:
        layout = self._layout()
        root = layout.roots.get("", "/")
        where = own_paths(beside)[""]
        where = where[len(root):] if root != "/" and where.startswith(root) else where
        try:
            Folder(layout.v2 + clean(where)).put("cgroup.procs", pid)
        except OSError as error:
            raise HvError(f"cgroup {where}: {os.strerror(error.errno or 0)}") from None

    # limits ----------------------------------------------------------------------------------------

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        """Set the limits of linux.resources. ConfigError, or HvError, names the field that can't be had.

        `update`: the container runs; what is not named stays, device rules too.
        """
        for part, rows in _PARTS.items():
            if resources.get(part) is not None:
                fields = Fields(resources[part], part)
                for names, controller, apply, twin in rows:
                    if fields.any(*(names or fields.table)) or any(
                            fields.table.get(name) is not None for name in _ZERO_COUNTS if name in names or not names):
                        self._set(fields, part, controller, apply, twin)
        if resources.get("hugepageLimits") not in (None, []):
            self._set(Fields(resources, "hugepageLimits"), "hugepageLimits", *_HUGE[1:])
        if resources.get("unified") not in (None, {}):
            self._unified(Fields(resources["unified"], "unified").table)
        if not update or resources.get("devices"):
            self._devices(get(resources, "devices", list, [], "linux.resources."), update)

    def _set(self, fields: Fields, part: str, controller: str, apply: Apply, twin: str) -> None:
        if controller in self.paths:
            apply(Folder(self.paths[controller]), fields)
            return
        if "" in self.paths and twin:
            from hv.container.cgroups import v2

            group = Folder(self.paths[""])
            if twin in v2.enable(group.path, self._layout().v2, {twin}):
                (apply if twin == "rdma" else getattr(v2, twin))(group, fields)
                return
        self._missing(part, controller, twin)

    def _missing(self, part: str, controller: str, twin: str = "") -> None:
        refused = self._refused.get(controller) or self._refused.get("")
        if refused:
            raise HvError(f"linux.resources.{part}: cgroup controller {controller}: {os.strerror(refused)}",
                          "limits need root, or a cgroup that was delegated to this user")
        mounts = self._layout().mounts()
        if controller in mounts or (not self.paths and mounts):
            raise HvError(f"linux.resources.{part}: the container has no cgroup of controller {controller}",
                          "limits need root, or a cgroup that was delegated to this user")
        if twin and "" in self.paths:
            from hv.container.cgroups.v2 import held_back

            if above := held_back(self.paths[""], self._layout().v2, twin):
                raise HvError(f"linux.resources.{part}: cgroup {above} does not pass controller {twin} on",
                              "it can't while it has processes of its own: choose another linux.cgroupsPath")
        raise ConfigError(f"linux.resources.{part}: this host has no cgroup controller {controller}",
                          "leave the limit out, or mount the controller")

    def _unified(self, table: dict[str, Any]) -> None:
        from hv.container.cgroups import v2

        if "" not in self.paths:
            if self._refused.get(""):
                self._missing("unified", "")
            raise ConfigError("linux.resources.unified: this host has no cgroup version 2",
                              "name the limits one by one")
        wanted = {leaf.partition(".")[0] for leaf in table} - {"cgroup"}
        v2.unified(Folder(self.paths[""]), table, v2.enable(self.paths[""], self._layout().v2, wanted))

    def _devices(self, rows: list[Any], update: bool) -> None:
        from hv.container.cgroups.devices import read_rules, write_v1

        rules = read_rules(rows)
        if "devices" in self.paths:
            write_v1(Folder(self.paths["devices"]), rules, fresh=not update)
        elif "" in self.paths:
            from hv.container.cgroups.devices_bpf import attach

            try:
                attach(self.paths[""], rules)
            except HvError:
                if not rootless():     # in a user namespace nobody makes device nodes, so nothing is lost
                    raise
        elif not rootless():
            self._missing("devices", "devices")

    # what runs in it -------------------------------------------------------------------------------

    def pids(self) -> list[int]:
        """All processes, those in groups below included."""
        group = self._folder("pids", "freezer", "devices", "") or self._folder(*self.paths)
        return pids_below(group.path) if group else []

    def kill(self) -> bool:
        """Kill all at once, forks included (cgroup.kill, Linux 5.14); False where version 2 is not there."""
        try:
            Folder(self.paths[""]).put("cgroup.kill", 1)
        except (KeyError, OSError):
            return False
        return True

    def freeze(self, on: bool) -> None:
        """Stop all processes, or let them go on; it is so on return."""
        if group := self._folder("freezer"):
            v1.freeze(group, on)
        elif group := self._folder(""):
            from hv.container.cgroups import v2

            v2.freeze(group, on)
        else:
            raise HvError("the container has no cgroup that can be frozen", "pausing needs root, or cgroup delegation")

    def frozen(self) -> bool:
        """Whether they are stopped."""
        if group := self._folder("freezer"):
            return v1.frozen(group)
        group = self._folder("")
        return group is not None and group.read("cgroup.freeze").strip() == "1"

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        if group := self._folder("memory"):
            return group.table("memory.oom_control").get("oom_kill", 0)
        group = self._folder("")
        return group.table("memory.events").get("oom_kill", 0) if group else 0

    def stats(self) -> dict[str, Any]:
        """Figures as `events --stats` prints them (hv/container/cgroups/stats.py)."""
        from hv.container.cgroups.stats import collect

        return collect(self.paths)

    def mount(self, hands: Hands, root: Any, mount: dict[str, Any], options: Any, label: str = "") -> None:
        """Attach a mount of type cgroup in a container's root (hv/container/cgroups/mount.py)."""
        from hv.container.cgroups.mount import attach

        attach(self.paths, self._layout(), hands, root, mount, options, label)

    # end -------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Remove the groups and all below them; HvError, after the others are gone, where one is in use still."""
        failure: HvError | None = None
        for path in self._folders():
            try:
                remove_tree(path)
                above = os.path.dirname(path)
                while f"{_DEFAULT}/" in above + "/":
                    os.rmdir(above)
                    above = os.path.dirname(above)
            except HvError as error:
                failure = error
            except OSError:
                pass                    # another container is below it
        if failure:
            raise failure


def _not_had(path: str) -> Callable[[OSError | KernelError], HvError]:
    return lambda error: HvError(f"cgroup {path}: {os.strerror(error.errno or 0)}",
                                 "a group above it is a threaded one: choose another linux.cgroupsPath"
                                 if error.errno == errno.EOPNOTSUPP else "is it mounted read-only, or full?")
