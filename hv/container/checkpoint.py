"""A running container written to files by CRIU, and what both directions have to know of it.

What criu can't find inside the container is called external: bind mounts, version 1 cgroups (bind mounts too, see
cgroups/mount.py), namespaces joined by path, pipes at the standard streams. Each gets a name in the images, under which
restore.py gives it again. The names are runc's (libcontainer/criu_linux.go), and so is descriptors.json, which holds
what the standard streams were: images made by one can be restored by the other.

Left out: lazy migration (`--lazy-pages`), page servers. A container that shares the host's mount namespace, or has a
user namespace, is refused, and so are idmapped mounts.

Driven by tests/root/test_container_criu.py.
"""

from __future__ import annotations

__all__ = ["DESCRIPTORS", "CriuOptions", "check_spec", "checkpoint", "external_mounts", "namespace_key", "open_folder",
           "require_criu"]

import os

from hv.container.criu import DUMP, PRE_DUMP, Criu, FreshImages, find_criu
from hv.container.spec import load_file
from hv.container.state import PAUSED, RUNNING, Record
from hv.errors import ConfigError, HvError, KernelError, StateError
from hv.linux.mount import open_in
from hv.linux.ns import CLONE_NEWNET
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.runtime import Runtime
    from hv.container.spec import Spec

DESCRIPTORS = "descriptors.json"
# criu_opts of criu's images/rpc.proto
IMAGES, PID, LEAVE_RUNNING, EXT_UNIX_SK, TCP_ESTABLISHED, SHELL_JOB, FILE_LOCKS = 1, 2, 3, 4, 5, 7, 8
NOTIFY_SCRIPTS, ROOT, PARENT_IMAGES, TRACK_MEMORY, AUTO_DEDUP, WORK = 12, 13, 14, 15, 16, 17
EXTERNAL_MOUNT, MANAGE_CGROUPS, SIBLING, INHERIT = 23, 24, 26, 27
CGROUP_MODE, EXTERNAL, EMPTY_NAMESPACES, JOIN_NAMESPACE, FREEZE_CGROUP = 34, 37, 38, 39, 44
TCP_SKIP_IN_FLIGHT, ORPHAN_PTS_MASTER, LSM_PROFILE = 46, 50, 53
KEY, VALUE = 1, 2               # ext_mount_map, inherit_fd, join_namespace
_COVER = "/dev/null"            # runc's name for the host's null device where it covers a file
# criu_cg_mode; "": criu leaves cgroups to us, who make them anyway
CGROUP_MODES = {"": 0, "ignore": 0, "soft": 3, "full": 4, "strict": 5}
# what criu calls namespaces that it does not look into but finds again (criu's net.c, pid_ns)
_ROOT_NAMESPACES = {"network": ("net", "extRootNetNS"), "pid": ("pid", "extRootPidNS")}
# ... and those that a restored process enters by path (criu's namespaces.c, join_ns_add)
JOINED = {"ipc": "ipc", "uts": "uts"}


class CriuOptions:
    """What an engine asks for of either direction. `images` and `work`: folders; `work` "" is `images`."""

    def __init__(self, images: str, work: str = "", *, criu: str = "criu", tcp_established: bool = False,
                 ext_unix_sk: bool = False, shell_job: bool = False, file_locks: bool = False,
                 cgroup_mode: str = "", auto_dedup: bool = False) -> None:
        if cgroup_mode not in CGROUP_MODES:
            raise ConfigError(f"--manage-cgroups-mode {cgroup_mode!r:.40}", "ignore, soft, full or strict")
        self.images = os.path.abspath(images)
        self.work = os.path.abspath(work) if work else self.images
        self.criu = criu
        self.tcp_established, self.ext_unix_sk = tcp_established, ext_unix_sk
        self.shell_job, self.file_locks = shell_job, file_locks
        self.cgroup_mode, self.auto_dedup = cgroup_mode, auto_dedup
        self.leave_running = self.pre_dump = self.tcp_skip_in_flight = False        # of checkpoint
        self.parent = ""                # images of an earlier pre-dump, seen from `images`
        self.lsm_profile = ""           # of restore

    def fields(self, images: int, work: int) -> list[tuple[int, Any]]:
        """criu's options that both directions share."""
        fields: list[tuple[int, Any]] = [(IMAGES, images), (WORK, work), (NOTIFY_SCRIPTS, True),
                                         (ORPHAN_PTS_MASTER, True), (EMPTY_NAMESPACES, CLONE_NEWNET),
                                         (CGROUP_MODE, CGROUP_MODES[self.cgroup_mode])]
        fields += [(number, True) for number, wanted in (
            (TCP_ESTABLISHED, self.tcp_established), (EXT_UNIX_SK, self.ext_unix_sk), (SHELL_JOB, self.shell_job),
            (FILE_LOCKS, self.file_locks), (AUTO_DEDUP, self.auto_dedup),
            (MANAGE_CGROUPS, CGROUP_MODES[self.cgroup_mode])) if wanted]
        return fields


def require_criu(command: str, program: str) -> str:
    """The path of criu. ConfigError, which says what is missing, where nothing can be done."""
    if os.geteuid():
        raise ConfigError(f"{command}: criu takes processes apart and makes them with given numbers", "it needs root")
    path = find_criu(program)
    if not path:
        named = "" if program == "criu" else f" as {program}"
        raise ConfigError(f"{command}: criu is not installed on this host{named}", "it is the package criu")
    return path


def open_folder(path: str, flag: str) -> int:
    """A descriptor of a folder that the user has named."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {os.strerror(error.errno or 0)}") from None


def check_spec(spec: Spec, command: str) -> None:
    """HvError where the container has what criu can't do, and says so late or not at all."""
    if not spec.has_mount_namespace:
        raise HvError(f"{command}: the container has no mount namespace of its own", "criu can't tell its files apart")
    if any(mount["uidMappings"] or "idmap" in mount["options"] or "ridmap" in mount["options"]
           for mount in spec.mounts):
        raise HvError(f"{command}: mounts: criu does not know idmapped mounts", "leave the mapping out")
    if spec.in_user_namespace:
        raise HvError(f"{command}: linux.namespaces: user: criu's images are for root alone, and are read inside",
                      "containers without a user namespace can be saved")
    for kind, path in spec.joined:
        if kind not in _ROOT_NAMESPACES and kind not in JOINED:
            raise HvError(f"{command}: linux.namespaces: {kind} {path}: criu can't enter that kind",
                          "a new one can be saved")


def namespace_key(kind: str) -> str:
    """The name of a joined namespace in the images; "" where it is entered by its path."""
    return _ROOT_NAMESPACES[kind][1] if kind in _ROOT_NAMESPACES else ""


def checkpoint(runtime: Runtime, name: str, options: CriuOptions) -> None:
    """Write the container to files; it ends and is deleted, unless it is to go on. Where it fails, it goes on."""
    program = require_criu("checkpoint", options.criu)
    record = Record(runtime.root, name)
    record.load()
    record.lock()
    try:
        status = runtime.status(record.load())
        if status not in (RUNNING, PAUSED):
            raise StateError(f"cannot checkpoint a container that is {status}", "only a running one has a state")
        spec = load_file(record.config, record.data["bundle"])
        check_spec(spec, "checkpoint")
        with FreshImages(options.images):
            if options.work != options.images:
                os.makedirs(options.work, 0o700, exist_ok=True)
            _dump(runtime, record, spec, program, options)
    finally:
        record.unlock()
    if not (options.leave_running or options.pre_dump):
        runtime.delete(name, force=True)        # as runc does: engines count on it


def _dump(runtime: Runtime, record: Record, spec: Spec, program: str, options: CriuOptions) -> None:
    pid = record.pid
    images = work = -1
    try:
        images, work = open_folder(options.images, "--image-path"), open_folder(options.work, "--work-path")
        fields = [*options.fields(images, work), (PID, pid), (ROOT, spec.rootfs)]
        groups = runtime.group(record).paths
        freezer = groups.get("freezer") or groups.get("")
        if freezer:
            fields.append((FREEZE_CGROUP, freezer))
        for number, wanted in ((LEAVE_RUNNING, options.leave_running or options.pre_dump),
                               (TRACK_MEMORY, options.pre_dump), (TCP_SKIP_IN_FLIGHT, options.tcp_skip_in_flight)):
            if wanted:
                fields.append((number, True))
        if options.parent:
            if not os.path.isdir(f"{options.images}/{options.parent}"):
                raise ConfigError(f"--parent-path {options.parent}: no such folder below {options.images}",
                                  "it is relative to --image-path, as ../before")
            fields.append((PARENT_IMAGES, options.parent))
        fields += [(EXTERNAL_MOUNT, [(KEY, point), (VALUE, label)]) for point, label in _mounts_to_name(pid, spec)]
        for kind, _ in spec.joined:
            if kind in _ROOT_NAMESPACES:
                leaf, label = _ROOT_NAMESPACES[kind]
                fields.append((EXTERNAL, f"{leaf}[{os.stat(f'/proc/{pid}/ns/{leaf}').st_ino}]:{label}"))
        streams = _streams(pid)
        fields += [(EXTERNAL, text.partition(":/")[0]) for text in streams if text.startswith("file[")]
        criu = Criu(program, [images, work])
        try:
            criu.ask(PRE_DUMP if options.pre_dump else DUMP, fields, f"{options.work}/dump.log",
                     lambda script, number, fd: None)
        finally:
            criu.close()
        if not options.pre_dump:
            _keep(f"{options.images}/{DESCRIPTORS}", dumps(streams).encode())
    finally:
        for fd in (images, work):
            if fd >= 0:
                os.close(fd)


def _keep(path: str, content: bytes) -> None:
    try:
        with open(path, "wb", 0) as file:
            file.write(content)
    except OSError as error:
        raise HvError(f"{path}: {os.strerror(error.errno or 0)}") from None


def _streams(pid: int) -> list[str]:
    """What the standard streams are, as criu calls what it is to leave alone and find again.

    A pipe: pipe:[number]. A file of the host: file[mount:inode]:its path (the mount and inode in hexadecimal).
    """
    inside = {number for number, _, _ in _table(pid)}
    streams = []
    for fd in range(3):
        try:
            text, mount = os.readlink(f"/proc/{pid}/fd/{fd}"), _mount_of(f"/proc/{pid}/fdinfo/{fd}")
            if text.startswith("/") and mount not in inside:
                text = f"file[{int(mount):x}:{os.stat(f'/proc/{pid}/fd/{fd}').st_ino:x}]:{text}"
        except (OSError, ValueError):
            text = ""
        streams.append(text)
    return streams


def _mount_of(info: str) -> str:
    with open(info) as file:
        return next((line.split()[1] for line in file if line.startswith("mnt_id:")), "")


# mounts ------------------------------------------------------------------------------------------------------------


def _table(pid: int) -> list[tuple[str, str, str]]:
    """(number, mount point, kind and what of it) of all mounts that process `pid` sees."""
    rows = []
    with open(f"/proc/{pid}/mountinfo", "rb", 0) as file:
        for line in file.read().splitlines():
            words = line.split()
            point = words[4].decode("unicode_escape").encode("latin-1")
            kind = words[words.index(b"-") + 1] + b":" + words[3]
            rows.append((words[0].decode(), os.fsdecode(point), kind.decode(errors="replace")))
    return rows


def _binds(spec: Spec) -> list[dict[str, Any]]:
    return [mount for mount in spec.mounts if mount.get("type") == "bind" or "bind" in mount["options"]
            or "rbind" in mount["options"]]


def _mounts_to_name(pid: int, spec: Spec) -> list[tuple[str, str]]:
    """(mount point inside, name) of the mounts that come from outside of the container.

    A name is what config.json calls the place; the mount point is where links of the image have led it.
    """
    table = _table(pid)
    found: dict[str, str] = {}
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    try:
        for place in [mount["destination"] for mount in _binds(spec)]:
            point = next((point for number, point, _ in table if number == _mount_number(root, place)), "/")
            if point != "/":
                found[point] = place
                for _, below, _ in table:
                    if below.startswith(point + "/") and below not in found:
                        found[below] = place + below[len(point):]
    finally:
        os.close(root)
    for _, point, kind in table:
        if kind.startswith("cgroup:"):
            found.setdefault(point, point)
        elif kind == "devtmpfs:/null":
            found.setdefault(point, _COVER)
    return list(found.items())


def _mount_number(root: int, place: str) -> str:
    try:
        fd = open_in(root, place, os.O_PATH)
    except KernelError:
        return ""
    try:
        return _mount_of(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)


def external_mounts(spec: Spec, cgroups: dict[str, str]) -> list[tuple[str, str]]:
    """(name, place on this host) of the same: more of them than there are does no harm. `cgroups`: folders by
    controller, of the restored container."""
    found = {_COVER: _COVER}
    host = _table(os.getpid())
    for mount in _binds(spec):
        source = os.path.realpath(mount["source"])
        found[mount["destination"]] = source
        for _, point, _ in host:
            if point.startswith(source.rstrip("/") + "/"):
                found.setdefault(mount["destination"] + point[len(source.rstrip("/")):], point)
    for mount in spec.mounts:
        if mount.get("type") == "cgroup":
            for _, point, kind in host:
                leaf = point.rpartition("/")[2]
                folder = next((path for path in cgroups.values() if path.startswith(point + "/")), "")
                if kind.startswith("cgroup:") and folder:
                    found.setdefault(f"{mount['destination']}/{leaf}", folder)
    return list(found.items())
