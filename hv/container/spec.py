"""config.json, checked and understood (runtime-spec 1.2, config.md and config-linux.md).

What a field asks for is done or refused by name; unknown fields are kept and ignored, as the specification wants
(config.md, Extensibility); unknown values of known fields are refused. Driven by tests/unit/test_container_spec.py.
"""

from __future__ import annotations

__all__ = ["Spec", "load_bundle"]

import os
import resource

from hv.container.plainjson import loads
from hv.errors import ConfigError
from hv.linux.creds import CAPABILITIES
from hv.linux.ns import CLONE_FLAGS, CLONE_NEWNS, CLONE_NEWUSER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONFIG_MOST = 16 << 20          # bytes


def load_bundle(bundle: str) -> Spec:
    """The configuration of the bundle folder. ConfigError names the field that can't be."""
    path = f"{bundle}/config.json"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(CONFIG_MOST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}",
                          "name a bundle with --bundle; `spec` writes a config.json to begin with") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    if len(text) > CONFIG_MOST:
        raise ConfigError(f"{path}: more than {CONFIG_MOST >> 20} MiB")
    try:
        return Spec(loads(text), bundle)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


class Spec:
    """The configuration's parts as the runtime uses them. `raw` is the whole of it."""

    def __init__(self, raw: Any, bundle: str) -> None:
        self.raw: dict[str, Any] = check(raw, dict, "config.json")
        self.bundle = bundle
        if not str(get(raw, "ociVersion", str, "")).startswith("1."):
            raise ConfigError(f"ociVersion {raw.get('ociVersion')!r}", "this runtime does 1.0 to 1.2")
        linux = get(raw, "linux", dict, {})
        root = get(raw, "root", dict, {})
        if not root.get("path"):
            raise ConfigError("root.path is missing", "name the root file system's folder")
        self.rootfs = os.path.join(bundle, get(root, "path", str, "", "root."))
        self.root_readonly = get(root, "readonly", bool, False, "root.")
        self.hostname = get(raw, "hostname", str, "")
        self.domainname = get(raw, "domainname", str, "")
        self.annotations = get(raw, "annotations", dict, {})
        self._namespaces(get(linux, "namespaces", list, [], "linux."))
        self._mounts(get(raw, "mounts", list, []))
        self.rootfs_propagation = get(linux, "rootfsPropagation", str, "", "linux.")
        self.mount_label = get(linux, "mountLabel", str, "", "linux.")
        self.masked_paths = get(linux, "maskedPaths", list, [], "linux.")
        self.readonly_paths = get(linux, "readonlyPaths", list, [], "linux.")
        self.sysctl = get(linux, "sysctl", dict, {}, "linux.")
        self.uid_mappings = self._mappings(linux, "uidMappings")
        self.gid_mappings = self._mappings(linux, "gidMappings")
        self.resources = get(linux, "resources", dict, {}, "linux.")
        self.cgroups_path = get(linux, "cgroupsPath", str, "", "linux.")
        self.seccomp = get(linux, "seccomp", dict, None, "linux.")
        self.devices = [self._device(row, index) for index, row in enumerate(get(linux, "devices", list, [], "linux."))]
        self.time_offsets = {name: (get(row, "secs", int, 0), get(row, "nanosecs", int, 0))
                             for name, row in get(linux, "timeOffsets", dict, {}, "linux.").items()}
        if self.in_user_namespace and CLONE_NEWUSER & self.new_namespaces and not self.uid_mappings:
            raise ConfigError("linux.uidMappings is missing", "a new user namespace needs it, and gidMappings")
        self._process(get(raw, "process", dict, None))

    def _namespaces(self, rows: list[Any]) -> None:
        self.new_namespaces = 0
        self.joined: list[tuple[str, str]] = []
        seen: set[str] = set()
        for index, row in enumerate(rows):
            kind = get(check(row, dict, f"linux.namespaces[{index}]"), "type", str, "", f"linux.namespaces[{index}].")
            if kind not in CLONE_FLAGS:
                raise ConfigError(f"linux.namespaces[{index}].type {kind!r}", f"one of {', '.join(CLONE_FLAGS)}")
            if kind in seen:
                raise ConfigError(f"linux.namespaces: {kind} stands there twice")
            seen.add(kind)
            path = get(row, "path", str, "", f"linux.namespaces[{index}].")
            if path:
                self.joined.append((kind, path))
            else:
                self.new_namespaces |= CLONE_FLAGS[kind]
        self.in_user_namespace = "user" in seen
        self.has_mount_namespace = bool(self.new_namespaces & CLONE_NEWNS)

    def _mounts(self, rows: list[Any]) -> None:
        self.mounts: list[dict[str, Any]] = rows
        for index, row in enumerate(rows):
            where = f"mounts[{index}]"
            destination = get(check(row, dict, where), "destination", str, "", where + ".")
            if not destination:
                raise ConfigError(f"{where}.destination is missing")
            if not destination.startswith("/"):
                row["destination"] = "/" + destination
            options = get(row, "options", list, [], where + ".")
            for option in options:
                check(option, str, f"{where}.options")
            if not row.get("type") and not {"bind", "rbind"} & set(options):
                raise ConfigError(f"{where}.type is missing", "only bind mounts go without")
            source = get(row, "source", str, "", where + ".")
            if {"bind", "rbind"} & set(options) or row.get("type") == "bind":
                if not source:
                    raise ConfigError(f"{where}.source is missing")
                row["source"] = os.path.join(self.bundle, source)

    def _mappings(self, linux: dict[str, Any], name: str) -> list[tuple[int, int, int]]:
        rows = []
        for index, row in enumerate(get(linux, name, list, [], "linux.")):
            where = f"linux.{name}[{index}]."
            check(row, dict, where)
            rows.append((get(row, "containerID", int, 0, where), get(row, "hostID", int, 0, where),
                         get(row, "size", int, 0, where)))
        return rows

    def _device(self, row: Any, index: int) -> dict[str, Any]:
        where = f"linux.devices[{index}]"
        check(row, dict, where)
        if get(row, "type", str, "", where + ".") not in ("c", "u", "b", "p"):
            raise ConfigError(f"{where}.type {row.get('type')!r}", "c, u, b or p")
        if not get(row, "path", str, "", where + ".").startswith("/"):
            raise ConfigError(f"{where}.path {row.get('path')!r}", "an absolute path")
        return dict(row)

    def _process(self, process: dict[str, Any] | None) -> None:
        if process is None:
            raise ConfigError("process is missing", "a container needs a program to start")
        self.process = process
        self.args = [check(word, str, "process.args") for word in get(process, "args", list, [], "process.")]
        if not self.args:
            raise ConfigError("process.args is empty", "name a program")
        self.environment = {}
        for word in get(process, "env", list, [], "process."):
            name, equals, value = check(word, str, "process.env").partition("=")
            if not equals or not name or "\0" in word:
                raise ConfigError(f"process.env: {word!r}", "NAME=value")
            self.environment[name] = value
        self.cwd = get(process, "cwd", str, "", "process.")
        if not self.cwd.startswith("/"):
            raise ConfigError(f"process.cwd {self.cwd!r}", "an absolute path")
        user = get(process, "user", dict, {}, "process.")
        self.uid, self.gid = (get(user, name, int, 0, "process.user.") for name in ("uid", "gid"))
        self.umask = get(user, "umask", int, None, "process.user.")
        self.groups = [check(gid, int, "process.user.additionalGids")
                       for gid in get(user, "additionalGids", list, [], "process.user.")]
        self.terminal = get(process, "terminal", bool, False, "process.")
        size = get(process, "consoleSize", dict, None, "process.")
        self.console_size = (int(size.get("height", 0)), int(size.get("width", 0))) if size else None
        self.no_new_privileges = get(process, "noNewPrivileges", bool, False, "process.")
        self.oom_score_adj = get(process, "oomScoreAdj", int, None, "process.")
        sets = get(process, "capabilities", dict, {}, "process.")
        self.bounding, self.effective, self.permitted, self.inheritable, self.ambient = (
            _capabilities(get(sets, name, list, [], "process.capabilities."), name)
            for name in ("bounding", "effective", "permitted", "inheritable", "ambient"))
        self.rlimits = [_rlimit(row, index) for index, row in enumerate(get(process, "rlimits", list, [], "process."))]


def _capabilities(names: list[Any], which: str) -> int:
    bits = 0
    for name in names:
        if name not in CAPABILITIES:
            raise ConfigError(f"process.capabilities.{which}: {name!r} is no capability", "for example CAP_KILL")
        bits |= 1 << CAPABILITIES.index(name)
    return bits


def _rlimit(row: Any, index: int) -> tuple[int, int, int]:
    where = f"process.rlimits[{index}]."
    kind = get(check(row, dict, where), "type", str, "", where)
    number = getattr(resource, kind, None) if kind.startswith("RLIMIT_") else None
    if number is None:
        raise ConfigError(f"{where}type {kind!r}", "for example RLIMIT_NOFILE")
    soft, hard = (get(row, name, int, 0, where) for name in ("soft", "hard"))
    return number, _limit(soft), _limit(hard)


def _limit(value: int) -> int:
    return -1 if value >= (1 << 64) - 1 or value < 0 else value


def get(table: dict[str, Any], name: str, kind: type, default: Any, where: str = "") -> Any:
    """Field `name` of `table`, which must be of `kind`; `default` where it is missing or null."""
    value = table.get(name)
    return default if value is None else check(value, kind, where + name)


def check(value: Any, kind: type, where: str) -> Any:
    """`value`, which must be of `kind`; ConfigError names `where`."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {dict: "an object", list: "an array", str: "a string", int: "a number", bool: "true or false"}[kind]
        raise ConfigError(f"{where}: {value!r:.60} is not {expected}")
    if kind is str and "\0" in value:
        raise ConfigError(f"{where}: a NUL byte")
    return value
