"""config.json, checked and understood (runtime-spec 1.2, config.md and config-linux.md).

What a field asks for is done or refused by name; unknown fields are kept and ignored, as the specification wants
(config.md, Extensibility); unknown values of known fields are refused. `process` is read by program.py.

Driven by tests/unit/test_container_spec.py.
"""

from __future__ import annotations

__all__ = ["Spec", "load_bundle", "load_file"]

import os

from hv.container.fields import check, choice, get, number, rows, words
from hv.container.program import Program
from hv.errors import ConfigError
from hv.linux.ns import CLONE_FLAGS, CLONE_NEWNS, CLONE_NEWTIME, CLONE_NEWUSER, CLONE_NEWUTS
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.seccomp.compile import Program as Filter

CONFIG_MOST = 16 << 20          # bytes
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_ID_MOST = (1 << 32) - 1
# What a kernel namespace keeps apart (Documentation/admin-guide/sysctl/, man 7 ipc_namespaces); the rest is the host's.
_IPC_SYSCTLS = ("kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem", "kernel/shmall", "kernel/shmmax",
                "kernel/shmmni", "kernel/shm_rmid_forced", "kernel/auto_msgmni")
_PERSONALITIES = {"LINUX": 0x0000, "LINUX32": 0x0008}       # include/uapi/linux/personality.h
_CLOCKS = {"monotonic": "monotonic", "boottime": "boottime"}
_PROPAGATIONS = {prefix + kind: prefix + kind for prefix in ("", "r")
                 for kind in ("shared", "slave", "private", "unbindable")}


def load_bundle(bundle: str) -> Spec:
    """The configuration of the bundle folder. ConfigError names the field that can't be."""
    return load_file(f"{bundle}/config.json", bundle)


def load_file(path: str, bundle: str) -> Spec:
    """The configuration in `path`, of the bundle folder `bundle`."""
    try:
        with open(path, "rb", 0) as file:
            text = file.read(CONFIG_MOST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}",
                          "name a bundle with --bundle; `spec` writes a config.json to begin with") from None
    if len(text) > CONFIG_MOST:
        raise ConfigError(f"{path}: more than {CONFIG_MOST >> 20} MiB")
    try:
        spec = Spec(loads(text.decode()), bundle)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", error.hint) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    spec.text = text
    return spec


class Spec:
    """The configuration's parts as the runtime uses them. `raw` is the whole of it, `text` as it was read."""

    def __init__(self, raw: Any, bundle: str) -> None:
        self.raw: dict[str, Any] = check(raw, dict, "config.json")
        self.text = b""
        self.bundle = bundle
        version = get(raw, "ociVersion", str, "")
        if not version.startswith("1."):
            raise ConfigError(f"ociVersion {version!r:.60}", "this runtime does 1.0 to 1.2")
        for foreign in ("windows", "solaris", "vm", "zos"):
            if raw.get(foreign):
                raise ConfigError(f"{foreign}: this is a Linux runtime")
        linux = get(raw, "linux", dict, {})
        root = get(raw, "root", dict, {})
        if not get(root, "path", str, "", "root."):
            raise ConfigError("root.path is missing", "name the root file system's folder")
        self.rootfs = os.path.normpath(os.path.join(bundle, root["path"]))
        self.root_readonly = get(root, "readonly", bool, False, "root.")
        self.hostname = get(raw, "hostname", str, "")
        self.domainname = get(raw, "domainname", str, "")
        self.annotations = get(raw, "annotations", dict, {})
        for name, value in self.annotations.items():
            check(value, str, f"annotations[{name!r:.60}]")
        self._namespaces(linux)
        self._mounts(raw)
        self.rootfs_propagation = choice(linux, "rootfsPropagation", "linux.", _PROPAGATIONS, "") \
            if linux.get("rootfsPropagation") else ""
        self.mount_label = get(linux, "mountLabel", str, "", "linux.")
        self.masked_paths = [_absolute(path, "linux.maskedPaths") for path in words(linux, "maskedPaths", "linux.")]
        self.readonly_paths = [_absolute(path, "linux.readonlyPaths")
                               for path in words(linux, "readonlyPaths", "linux.")]
        self._sysctls(get(linux, "sysctl", dict, {}, "linux."))
        self.resources = get(linux, "resources", dict, {}, "linux.")
        self.cgroups_path = get(linux, "cgroupsPath", str, "", "linux.")
        self.seccomp = get(linux, "seccomp", dict, None, "linux.")
        self.filter: Filter | None = None       # the same compiled, once a container was made from it
        self.devices = [_device(row, where) for row, where in rows(linux, "devices", "linux.")]
        self._rare(linux)
        self._hooks(get(raw, "hooks", dict, {}))
        process = get(raw, "process", dict, None)
        if process is None:
            raise ConfigError("process is missing", "a container needs a program to start")
        self.program = Program(process)
        self._consistent()

    def _namespaces(self, linux: dict[str, Any]) -> None:
        self.new_namespaces = 0
        self.joined: list[tuple[str, str]] = []
        self.kinds: set[str] = set()
        for row, where in rows(linux, "namespaces", "linux."):
            choice(row, "type", where, CLONE_FLAGS)
            kind = get(row, "type", str, None, where)
            if kind is None:
                raise ConfigError(f"{where}type is missing", f"one of {', '.join(CLONE_FLAGS)}")
            if kind in self.kinds:
                raise ConfigError(f"linux.namespaces: {kind} stands there twice")
            self.kinds.add(kind)
            path = get(row, "path", str, "", where)
            if path:
                self.joined.append((kind, _absolute(path, where + "path")))
            else:
                self.new_namespaces |= CLONE_FLAGS[kind]
        self.uid_mappings = mappings(linux, "uidMappings", "linux.")
        self.gid_mappings = mappings(linux, "gidMappings", "linux.")
        self.in_user_namespace = "user" in self.kinds
        self.has_mount_namespace = bool(self.new_namespaces & CLONE_NEWNS)

    def _mounts(self, raw: dict[str, Any]) -> None:
        self.mounts: list[dict[str, Any]] = []
        for row, where in rows(raw, "mounts", ""):
            mount = dict(row)
            destination = get(row, "destination", str, "", where)
            if not destination:
                raise ConfigError(f"{where}destination is missing")
            mount["destination"] = os.path.normpath("/" + destination.lstrip("/"))
            options = mount["options"] = words(row, "options", where)
            kind = get(row, "type", str, "", where)
            source = get(row, "source", str, "", where)
            bind = "bind" in options or "rbind" in options
            if not kind and not bind:
                raise ConfigError(f"{where}type is missing", "only bind mounts go without")
            if bind or kind == "bind":
                if not source:
                    raise ConfigError(f"{where}source is missing")
                mount["source"] = os.path.join(self.bundle, source)
            mount["uidMappings"] = mappings(row, "uidMappings", where)
            mount["gidMappings"] = mappings(row, "gidMappings", where)
            self.mounts.append(mount)

    def _sysctls(self, table: dict[str, Any]) -> None:
        """linux.sysctl as paths below /proc/sys; only those that a namespace of the container's own keeps apart."""
        self.sysctl: list[tuple[str, str, str]] = []
        for name, value in table.items():
            check(value, str, f"linux.sysctl[{name!r:.60}]")
            dot, slash = name.find("."), name.find("/")
            # sysctl(8): the first separator is the separator, the other one stands for itself
            path = name.replace(".", "/") if slash < 0 or 0 <= dot < slash else name
            if slash >= 0 and 0 <= dot < slash:
                path = name.translate({ord("."): "/", ord("/"): "."})
            if not path or "" in path.split("/") or ".." in path.split("/") or "." in path.split("/"):
                raise ConfigError(f"linux.sysctl {name!r:.60}", "for example net.ipv4.ip_forward")
            if path.startswith("net/"):
                needed = "network"
            elif path in _IPC_SYSCTLS or path.startswith("fs/mqueue/"):
                needed = "ipc"
            elif path in ("kernel/hostname", "kernel/domainname"):
                needed = "uts"
            else:
                raise ConfigError(f"linux.sysctl {name}: not kept apart by any namespace, it would change the host")
            if needed not in self.kinds:
                raise ConfigError(f"linux.sysctl {name}: the container has no {needed} namespace of its own")
            self.sysctl.append((name, path, value))

    def _rare(self, linux: dict[str, Any]) -> None:
        self.time_offsets = []
        for clock, row in get(linux, "timeOffsets", dict, {}, "linux.").items():
            where = f"linux.timeOffsets.{clock}."
            if clock not in _CLOCKS:
                raise ConfigError(f"linux.timeOffsets {clock!r:.60}", "monotonic or boottime")
            check(row, dict, where[:-1])
            self.time_offsets.append((clock, number(row, "secs", where, -(1 << 62), 1 << 62),
                                      number(row, "nanosecs", where, 0, 999_999_999)))
        row = get(linux, "personality", dict, None, "linux.")
        self.personality = None
        if row is not None:
            self.personality = choice(row, "domain", "linux.personality.", _PERSONALITIES)
            if self.personality is None:
                raise ConfigError("linux.personality.domain is missing", "LINUX or LINUX32")
            if row.get("flags"):
                raise ConfigError("linux.personality.flags", "none are defined")
        if linux.get("intelRdt"):
            raise ConfigError("linux.intelRdt: cache and bandwidth control is not offered by this runtime",
                              "leave it out of config.json")
        if linux.get("netDevices"):
            raise ConfigError("linux.netDevices: moving network devices is not offered by this runtime",
                              "move them in a createRuntime hook")

    def _hooks(self, table: dict[str, Any]) -> None:
        """{kind: [(path, args, env, timeout in seconds or 0)]}"""
        self.hooks: dict[str, list[tuple[str, list[str], list[str], int]]] = {}
        for kind in HOOKS:
            for row, where in rows(table, kind, "hooks."):
                path = _absolute(get(row, "path", str, "", where), where + "path")
                timeout = number(row, "timeout", where, 1, 1 << 31, 0)
                self.hooks.setdefault(kind, []).append(
                    (path, words(row, "args", where), words(row, "env", where), timeout))

    def _consistent(self) -> None:
        """What one field means for another."""
        if not self.has_mount_namespace:
            for name, value in (("mounts", self.mounts), ("linux.maskedPaths", self.masked_paths),
                                ("linux.readonlyPaths", self.readonly_paths), ("root.readonly", self.root_readonly),
                                ("linux.devices", self.devices)):
                if value:
                    raise ConfigError(f"{name}: the container has no new mount namespace")
        new_user = self.new_namespaces & CLONE_NEWUSER
        if new_user and not (self.uid_mappings and self.gid_mappings):
            raise ConfigError("linux.uidMappings or linux.gidMappings is missing", "a new user namespace needs both")
        if not new_user and not self.in_user_namespace and (self.uid_mappings or self.gid_mappings):
            raise ConfigError("linux.uidMappings: the container has no user namespace")
        for name, value, flag, kind in (("hostname", self.hostname, CLONE_NEWUTS, "uts"),
                                        ("domainname", self.domainname, CLONE_NEWUTS, "uts"),
                                        ("linux.timeOffsets", self.time_offsets, CLONE_NEWTIME, "time")):
            if value and not (self.new_namespaces & flag or (kind != "time" and kind in self.kinds)):
                raise ConfigError(f"{name}: the container has no {kind} namespace of its own")
        for name, label, lsm in (("process.apparmorProfile", self.program.apparmor, "apparmor"),
                                 ("process.selinuxLabel", self.program.selinux, "selinux"),
                                 ("linux.mountLabel", self.mount_label, "selinux")):
            if label:
                from hv.container.labels import require

                require(lsm, name)




def mappings(table: dict[str, Any], name: str, where: str) -> list[tuple[int, int, int]]:
    """uidMappings or gidMappings: (inside, outside, count)."""
    found = []
    for row, place in rows(table, name, where):
        inside, outside = (number(row, key, place, 0, _ID_MOST) for key in ("containerID", "hostID"))
        size = number(row, "size", place, 1, _ID_MOST, 0)
        if not size:
            raise ConfigError(f"{place}size is missing or 0")
        found.append((inside, outside, size))
    return found


def _absolute(path: str, where: str) -> str:
    if not path.startswith("/"):
        raise ConfigError(f"{where} {path!r:.60}", "an absolute path")
    return path


def _device(row: dict[str, Any], where: str) -> dict[str, Any]:
    kind = get(row, "type", str, "", where)
    if kind not in ("c", "u", "b", "p"):
        raise ConfigError(f"{where}type {kind!r:.60}", "c, u, b or p")
    path = os.path.normpath(_absolute(get(row, "path", str, "", where), where + "path"))
    if kind != "p" and (row.get("major") is None or row.get("minor") is None):
        raise ConfigError(f"{where}major or {where}minor is missing")
    return {"path": path, "type": kind, "major": number(row, "major", where, 0, (1 << 12) - 1),
            "minor": number(row, "minor", where, 0, (1 << 20) - 1),
            "fileMode": number(row, "fileMode", where, 0, 0o177777, 0o666) & 0o7777,
            "uid": number(row, "uid", where, 0, _ID_MOST - 1), "gid": number(row, "gid", where, 0, _ID_MOST - 1)}
