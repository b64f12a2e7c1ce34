"""What one instance is to be: the options of `pyhv run` and `create`, checked, as plain data.

    Settings.of(values)         from what a command line said (texts by key; hv/cli/run_options.py has the table)
    Settings(data)              from instance.json, where it was kept

What the image says (its environment, command, user, ...) is merged in by bundle.py each time it starts.
Driven by tests/unit/test_instance_settings.py.
"""

from __future__ import annotations

__all__ = ["CONTAINER", "VM", "Settings"]

import os

from hv.errors import ConfigError
from hv.instance import values as read
from hv.instance.names import check_name
from hv.places import rootless

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONTAINER, VM = "container", "vm"
_MIB = 1 << 20
_MEMORY_LEAST = 6 * _MIB            # docker's: less and the first process does not come up
_CPUS_MOST = 1024
_HOSTNAME_MOST = 64                 # man 2 sethostname
_RETRIES_MOST = 1 << 31
# options of containers that have no meaning in a VM, and why
_NOT_IN_VM = {
    "privileged": "its kernel is the guest's own: root may do all there is already",
    "security_opt": "filters and labels are the host kernel's",
    "cpuset_cpus": "its processors are the guest's; pin the VM's process instead",
}
_DEFAULTS: dict[str, Any] = {
    "kind": CONTAINER, "command": [], "entrypoint": None, "env": [], "workdir": "", "user": "", "groups": [],
    "tty": False, "interactive": False, "detach": False, "rm": False, "hostname": "", "labels": {}, "mounts": [],
    "publish": [], "publish_all": False, "networks": [], "aliases": [], "ip": "", "mac": "", "add_host": [], "dns": [],
    "dns_search": [], "memory": 0, "memory_swap": None, "cpus": 0.0, "cpu_shares": 0, "cpuset_cpus": "",
    "pids_limit": 0, "readonly": False, "cap_add": [], "cap_drop": [], "privileged": False, "security_opt": [],
    "restart": "no", "restart_most": 0, "stop_signal": 0, "stop_timeout": 10.0, "ulimits": [], "sysctls": {},
    "init": False, "shm_size": 64 * _MIB, "log_size": 0, "log_files": 1, "kernel": "", "initrd": "",
    "stdin_once": False, "devices": [], "oom_score_adj": None,
}


class Settings:
    """Attributes as in _DEFAULTS; `data` holds those that differ."""

    kind: str
    command: list[str]
    entrypoint: list[str] | None
    env: list[str]
    workdir: str
    user: str
    groups: list[str]
    tty: bool
    interactive: bool
    detach: bool
    rm: bool
    hostname: str
    labels: dict[str, str]
    mounts: list[dict[str, Any]]
    publish: list[str]
    publish_all: bool
    networks: list[str]
    aliases: list[str]
    ip: str
    mac: str
    add_host: list[str]
    dns: list[str]
    dns_search: list[str]
    memory: int
    memory_swap: int | None
    cpus: float
    cpu_shares: int
    cpuset_cpus: str
    pids_limit: int
    readonly: bool
    cap_add: list[str]
    cap_drop: list[str]
    privileged: bool
    security_opt: list[str]
    restart: str
    restart_most: int
    stop_signal: int
    stop_timeout: float
    ulimits: list[dict[str, Any]]
    sysctls: dict[str, str]
    init: bool
    shm_size: int
    log_size: int
    log_files: int
    kernel: str
    initrd: str
    stdin_once: bool
    devices: list[str]
    oom_score_adj: int | None

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.__dict__.update(_DEFAULTS)
        for name, value in data.items():
            if name in _DEFAULTS:
                setattr(self, name, value)

    @classmethod
    def of(cls, given: dict[str, Any], command: list[str]) -> Settings:
        """The settings that a command line asks for. ConfigError names the option."""
        data: dict[str, Any] = {"command": command} if command else {}
        for key in ("tty", "interactive", "detach", "rm", "readonly", "privileged", "init", "publish_all"):
            if given.get(key):
                data[key] = True
        _kind(given, data)
        _process(given, data)
        _network(given, data)
        _limits(given, data)
        _life(given, data)
        mounts = [*map(read.volume, given.get("volume", ())), *map(read.mount, given.get("mount", ())),
                  *map(read.tmpfs, given.get("tmpfs", ()))]
        seen: set[str] = set()
        for row in mounts:
            if row["target"] in seen:
                raise ConfigError(f"two mounts at {row['target']}", "one of -v, --mount and --tmpfs")
            seen.add(row["target"])
        if mounts:
            data["mounts"] = mounts
        settings = cls(data)
        settings.check()
        return settings

    def check(self) -> None:
        """What one option means for another. ConfigError."""
        if self.rm and self.restart != "no":
            raise ConfigError("--rm and --restart exclude each other", "leave one out")
        if self.kind == VM:
            for key, why in _NOT_IN_VM.items():
                if getattr(self, key):
                    raise ConfigError(f"--{key.replace('_', '-')} is not for --vm: {why}", "leave it out")
        else:
            for key in ("kernel", "initrd"):
                if getattr(self, key):
                    raise ConfigError(f"--{key} is for --vm: a container has the host's kernel", "add --vm")
        if self.publish and self.networks[:1] in (["none"], ["host"]):
            raise ConfigError(f"-p and --network {self.networks[0]} exclude each other", "leave one out")
        if self.tty and not self.interactive and not self.detach:
            pass                    # a terminal to look at: allowed, as in docker


def _kind(given: dict[str, Any], data: dict[str, Any]) -> None:
    if given.get("vm") and given.get("container"):
        raise ConfigError("--vm and --container exclude each other", "give one of them")
    way = VM if given.get("vm") else CONTAINER if given.get("container") else os.environ.get("PYHV_WAY") or CONTAINER
    if way not in (VM, CONTAINER):
        raise ConfigError(f"PYHV_WAY={way!r:.40}", f"{CONTAINER} or {VM}")
    if way != CONTAINER:
        data["kind"] = way
    for key in ("kernel", "initrd"):
        if given.get(key):
            data[key] = given[key] if "/" not in given[key] else os.path.abspath(given[key])


def _process(given: dict[str, Any], data: dict[str, Any]) -> None:
    env = [line for path in given.get("env_file", ()) for line in read.env_lines(path)] + list(given.get("env", ()))
    words = []
    for word in env:
        name, equals, _ = word.partition("=")
        if not name or "\0" in word:
            raise ConfigError(f"-e {word!r:.60}", "NAME=VALUE, or NAME to take ours")
        if equals:
            words.append(word)
        elif name in os.environ:
            words.append(f"{name}={os.environ[name]}")
    if words:
        data["env"] = words
    if given.get("entrypoint") is not None:
        data["entrypoint"] = [given["entrypoint"]] if given["entrypoint"] else []
    if workdir := given.get("workdir"):
        if not workdir.startswith("/"):
            raise ConfigError(f"-w {workdir!r:.60}", "an absolute path")
        data["workdir"] = os.path.normpath(workdir)
    for key, place in (("user", "user"), ("group_add", "groups")):
        if given.get(key):
            data[place] = given[key]
    labels = dict(read.pair(word, "--label") for word in given.get("label", ()))
    if labels:
        data["labels"] = labels
    for key in ("cap_add", "cap_drop"):
        if given.get(key):
            data[key] = [_capability(name, f"--{key.replace('_', '-')}") for name in given[key]]
    for key in ("security_opt",):
        if given.get(key):
            data[key] = [_security(word) for word in given[key]]
    if given.get("device"):
        data["devices"] = given["device"]
    if given.get("ulimit"):
        data["ulimits"] = [read.ulimit(word) for word in given["ulimit"]]
    if given.get("sysctl"):
        data["sysctls"] = dict(read.pair(word, "--sysctl") for word in given["sysctl"])


def _network(given: dict[str, Any], data: dict[str, Any]) -> None:
    if hostname := given.get("hostname"):
        if len(hostname) > _HOSTNAME_MOST or not hostname.replace("-", "").replace(".", "").isalnum():
            raise ConfigError(f"--hostname {hostname!r:.80}", "letters, digits, - and ., 64 at most")
        data["hostname"] = hostname
    for key, place in (("network", "networks"), ("network_alias", "aliases"), ("publish", "publish"),
                       ("add_host", "add_host"), ("dns", "dns"), ("dns_search", "dns_search"), ("ip", "ip"),
                       ("mac_address", "mac")):
        if given.get(key):
            data[place] = given[key]
    if "networks" not in data and rootless():
        data["networks"] = ["pasta"]
    for row in given.get("add_host", ()):
        host, colon, address = row.partition(":")
        if not colon or not host or not address:
            raise ConfigError(f"--add-host {row!r:.60}", "HOST:IP")


def _limits(given: dict[str, Any], data: dict[str, Any]) -> None:
    if given.get("memory"):
        data["memory"] = read.size(given["memory"], "--memory", _MEMORY_LEAST)
    if given.get("memory_swap"):
        data["memory_swap"] = -1 if given["memory_swap"] == "-1" else read.size(given["memory_swap"], "--memory-swap")
        if not data.get("memory") or -1 != data["memory_swap"] < data["memory"]:
            raise ConfigError("--memory-swap counts memory and swap: it needs --memory, and is not less")
    if given.get("cpus"):
        data["cpus"] = read.cpus(given["cpus"])
    if given.get("cpu_shares"):
        data["cpu_shares"] = read.number(given["cpu_shares"], "--cpu-shares", 2, 262144)
    if given.get("cpuset_cpus"):
        data["cpuset_cpus"] = given["cpuset_cpus"]
    if given.get("pids_limit"):
        limit = read.number(given["pids_limit"], "--pids-limit", -1, 1 << 22)
        data["pids_limit"] = max(limit, 0)
    if given.get("shm_size"):
        data["shm_size"] = read.size(given["shm_size"], "--shm-size", 4096)
    if given.get("oom_score_adj"):
        data["oom_score_adj"] = read.number(given["oom_score_adj"], "--oom-score-adj", -1000, 1000)


def _life(given: dict[str, Any], data: dict[str, Any]) -> None:
    if given.get("name"):
        check_name(given["name"])
    if policy := given.get("restart"):
        name, colon, most = policy.partition(":")
        if name not in ("no", "on-failure", "always", "unless-stopped") or (colon and name != "on-failure"):
            raise ConfigError(f"--restart {policy!r:.40}", "no, on-failure[:TIMES], always or unless-stopped")
        if name != "no":
            data["restart"] = name
        if colon:
            data["restart_most"] = read.number(most, "--restart on-failure", 0, _RETRIES_MOST)
    if given.get("stop_signal"):
        data["stop_signal"] = read.signal_number(given["stop_signal"], "--stop-signal")
    if given.get("stop_timeout"):
        data["stop_timeout"] = read.duration(given["stop_timeout"], "--stop-timeout")
    if given.get("log_driver") not in (None, "", "json-file"):
        raise ConfigError(f"--log-driver {given['log_driver']!r:.40}", "json-file is what there is")
    for word in given.get("log_opt", ()):
        name, value = read.pair(word, "--log-opt")
        if name == "max-size":
            data["log_size"] = read.size(value, "--log-opt max-size", 4096)
        elif name == "max-file":
            data["log_files"] = read.number(value, "--log-opt max-file", 1, 1000)
        else:
            raise ConfigError(f"--log-opt {word!r:.40}", "max-size=SIZE or max-file=NUMBER")
    if data.get("log_files", 1) > 1 and not data.get("log_size"):
        raise ConfigError("--log-opt max-file needs max-size")


def _capability(name: str, option: str) -> str:
    from hv.linux.creds import CAPABILITIES

    word = name.upper()
    if word == "ALL":
        return word
    word = word if word.startswith("CAP_") else "CAP_" + word
    if word not in CAPABILITIES:
        raise ConfigError(f"{option} {name!r:.40} is no capability", "for example NET_ADMIN, or ALL")
    return word


def _security(word: str) -> str:
    name, separator, value = word.partition("=")
    if not separator:
        name, separator, value = word.partition(":")
    if name == "no-new-privileges" and value in ("", "true", "false"):
        return f"no-new-privileges={value or 'true'}"
    if name == "seccomp" and value:
        return f"seccomp={value if value == 'unconfined' else os.path.abspath(value)}"
    if name in ("apparmor", "label", "systempaths") and value:
        return f"{name}={value}"
    raise ConfigError(f"--security-opt {word!r:.60}", "no-new-privileges, seccomp=unconfined|FILE, apparmor=PROFILE, "
                      "systempaths=unconfined, label=disable")
