"""From an instance's settings and its image to config.json (runtime-spec 1.2), the same for containers and VMs.

    config = make_config(instance, rootfs, root, attachment_files, mounts)

Called with the root file system mounted, since users are looked up in it. Driven by tests/unit/test_instance_bundle.py.
"""

from __future__ import annotations

__all__ = ["command_of", "environment_of", "make_config"]

import os

from hv.container.state import OCI_VERSION
from hv.errors import ConfigError, HvError
from hv.instance import defaults
from hv.instance.settings import VM
from hv.instance.users import find_user
from hv.places import rootless

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.instance.record import Instance
    from hv.instance.settings import Settings

_PERIOD = 100_000               # us: of the CPU quota (Documentation/scheduler/sched-bwc.rst)
_SYS_OF_HOST = {"destination": "/sys", "type": "bind", "source": "/sys",
                "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", "ro"]}
_PROFILE_MOST = 4 << 20
ANNOTATIONS = {"kernel": "io.pyhv.vm.kernel", "initrd": "io.pyhv.vm.initrd"}


def command_of(settings: Settings, image: dict[str, Any]) -> list[str]:
    """The program and its arguments: an entrypoint of the options drops the image's command, as docker has it."""
    if settings.entrypoint is None:
        entry, command = image.get("entrypoint") or [], settings.command or image.get("cmd") or []
    else:
        entry, command = settings.entrypoint, settings.command
    args = [*entry, *command]
    if not args:
        raise ConfigError("the image names no command", "give one behind the image's name")
    return args


def environment_of(settings: Settings, image: dict[str, Any], hostname: str) -> list[str]:
    """Later words win: what every instance has, the image's, the options'."""
    table = {"PATH": defaults.PATH, "HOSTNAME": hostname}
    if settings.tty:
        table["TERM"] = defaults.TERM
    for word in (*(image.get("env") or ()), *settings.env):
        name, equals, value = word.partition("=")
        if name and equals:
            table[name] = value
    return [f"{name}={value}" for name, value in table.items()]


def make_config(instance: Instance, rootfs: str, root: int, *, files: list[tuple[str, str]],
                mounts: list[dict[str, Any]], netns: str, warn: Any = None) -> dict[str, Any]:
    """config.json. `root`: descriptor of `rootfs`. `files`: (host's file, place) to be bound; `mounts`: volumes and
    the like; `netns`: a namespace's path, "" a new one, "host"."""
    settings, image = instance.settings, instance.image
    hostname = hostname_of(instance)
    user = find_user(root, settings.user or image.get("user") or "", settings.groups)
    capabilities = _capabilities(settings)
    process: dict[str, Any] = {
        "terminal": settings.tty, "args": command_of(settings, image),
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "env": environment_of(settings, image, hostname),
        "cwd": settings.workdir or image.get("working_dir") or "/",
        "capabilities": _sets(capabilities, user.uid),
        "rlimits": settings.ulimits,
        "noNewPrivileges": "no-new-privileges=true" in settings.security_opt}
    if settings.oom_score_adj is not None:
        process["oomScoreAdj"] = settings.oom_score_adj
    if not process["cwd"].startswith("/"):
        process["cwd"] = "/" + process["cwd"]
    size = instance.state.get("console")
    if settings.tty and size:
        process["consoleSize"] = {"height": size[0], "width": size[1]}
    network: list[dict[str, str]] = [] if netns == "host" else [{"type": "network"}]
    if network and netns:
        network[0]["path"] = netns
    open_paths = settings.privileged or "systempaths=unconfined" in settings.security_opt
    linux: dict[str, Any] = {
        "resources": _resources(settings),
        "namespaces": [*({"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")), *network],
        # a relative one lies where the user's own session is (hv/container/cgroups/manager.py)
        "cgroupsPath": instance.id if rootless() else f"/pyhv/{instance.id}",
        "maskedPaths": [] if open_paths else list(defaults.MASKED),
        "readonlyPaths": [] if open_paths else list(defaults.READONLY)}
    if settings.sysctls:
        linux["sysctl"] = settings.sysctls
    devices = _devices(settings)
    if devices:
        linux["devices"] = devices
    profile = _seccomp(settings, capabilities)
    if profile is not None and settings.kind != VM:
        linux["seccomp"] = profile
    for word in settings.security_opt:
        if word.startswith("apparmor=") and word != "apparmor=unconfined":
            process["apparmorProfile"] = word.partition("=")[2]
    system = defaults.mounts(settings.shm_size, privileged=settings.privileged)
    if netns == "host" and rootless():      # sysfs shows a network, and this one is not the user's
        system = [row if row["destination"] != "/sys" else _SYS_OF_HOST for row in system]
    taken = {row["destination"] for row in mounts}
    annotations = {"io.pyhv.instance": instance.name}
    for key, name in ANNOTATIONS.items():
        if getattr(settings, key):
            annotations[name] = getattr(settings, key)
    config: dict[str, Any] = {
        "ociVersion": OCI_VERSION, "process": process, "root": {"path": rootfs, "readonly": settings.readonly},
        "mounts": [*(row for row in system if row["destination"] not in taken),
                   *({"destination": place, "type": "bind", "source": source,
                      "options": ["rbind", "rprivate"] + (["ro"] if settings.readonly else [])}
                     for source, place in files if place not in taken),
                   *mounts],
        "linux": linux, "annotations": annotations}
    if netns != "host" or settings.hostname:
        config["hostname"] = hostname
    return config


def hostname_of(instance: Instance) -> str:
    """Its own, or the first digits of its ID; in the host's network the host's."""
    settings = instance.settings
    return settings.hostname or (os.uname().nodename if settings.networks[:1] == ["host"] else instance.id[:12])


def _capabilities(settings: Settings) -> list[str]:
    from hv.linux.creds import CAPABILITIES, last_capability

    everything = list(CAPABILITIES[:last_capability() + 1])
    if settings.privileged:
        return everything
    chosen = set(defaults.CAPABILITIES)
    if "ALL" in settings.cap_add:
        chosen = set(everything)
    if "ALL" in settings.cap_drop:
        chosen = set()
    chosen |= set(settings.cap_add) - {"ALL"}
    chosen -= set(settings.cap_drop) - {"ALL"}
    return [name for name in everything if name in chosen]


def _sets(capabilities: list[str], uid: int) -> dict[str, list[str]]:
    # another user than root gains them by running a set-uid program only, as by execve(2)'s own rules
    sets = {"bounding": capabilities}
    if uid == 0:
        sets |= {"effective": capabilities, "permitted": capabilities}
    return sets


def _resources(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {"devices": defaults.devices(privileged=settings.privileged)}
    for device in _devices(settings):
        found["devices"].append({"allow": True, "type": device["type"], "major": device["major"],
                                 "minor": device["minor"], "access": device["access"]})
    if settings.memory:
        found["memory"] = {"limit": settings.memory}
        swap = 2 * settings.memory if settings.memory_swap is None else settings.memory_swap
        if settings.memory_swap is not None or _swap_counts():
            found["memory"]["swap"] = swap
    cpu: dict[str, Any] = {}
    if settings.cpus:
        cpu |= {"quota": int(settings.cpus * _PERIOD), "period": _PERIOD}
    if settings.cpu_shares:
        cpu["shares"] = settings.cpu_shares
    if settings.cpuset_cpus:
        cpu["cpus"] = settings.cpuset_cpus
    if cpu:
        found["cpu"] = cpu
    if settings.pids_limit:
        found["pids"] = {"limit": settings.pids_limit}
    return found


def _swap_counts() -> bool:
    """Whether version 1 counts swap on this host (a kernel parameter); version 2 says so in each group."""
    return os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")


def _devices(settings: Settings) -> list[dict[str, Any]]:
    """--device HOST[:INSIDE[:ACCESS]]"""
    import stat

    found = []
    for word in settings.devices:
        source, _, rest = word.partition(":")
        place, _, access = rest.partition(":")
        try:
            status = os.stat(source)
        except OSError as error:
            raise ConfigError(f"--device {word!r:.80}: {os.strerror(error.errno or 0)}") from None
        kind = "c" if stat.S_ISCHR(status.st_mode) else "b" if stat.S_ISBLK(status.st_mode) else ""
        if not kind or set(access) - set("rwm"):
            raise ConfigError(f"--device {word!r:.80}", "a device of the host: /dev/fuse, /dev/sda:/dev/xvda:r")
        found.append({"path": place or source, "type": kind, "major": os.major(status.st_rdev),
                      "minor": os.minor(status.st_rdev), "fileMode": status.st_mode & 0o777, "uid": status.st_uid,
                      "gid": status.st_gid, "access": access or "rwm"})
    return found


def _seccomp(settings: Settings, capabilities: list[str]) -> dict[str, Any] | None:
    said = next((word.partition("=")[2] for word in settings.security_opt if word.startswith("seccomp=")), "")
    if said == "unconfined" or (settings.privileged and not said):
        return None
    if said:
        from hv.plainjson import loads

        try:
            with open(said, "rb", 0) as file:
                profile = loads(file.read(_PROFILE_MOST).decode())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--security-opt seccomp={said}: {error}") from None
        if not isinstance(profile, dict):
            raise ConfigError(f"--security-opt seccomp={said}: no object", "linux.seccomp of config.json")
        return profile
    from hv.container.seccomp.profile import default_profile

    return default_profile(capabilities)


def exec_process(config: dict[str, Any], args: list[str], *, tty: bool, env: list[str], workdir: str) -> dict[str, Any]:
    """`process` of one more program: as the first one's, with these changes. Its user stays to be set."""
    process: dict[str, Any] = dict(config.get("process") or {})
    if not process:
        raise HvError("the instance's configuration has no process")
    process |= {"args": args, "terminal": tty, "env": [*(process.get("env") or ()), *env]}
    process.pop("consoleSize", None)
    if workdir:
        process["cwd"] = workdir
    if tty and not any(word.startswith("TERM=") for word in process["env"]):
        process["env"].append(f"TERM={defaults.TERM}")
    return process


__all__ += ["exec_process", "hostname_of"]
