"""Everything about an instance, under docker's names as far as there are such. Driven by
tests/root/test_instance_list.py."""

from __future__ import annotations

__all__ = ["describe"]

from hv.errors import HvError
from hv.instance.bundle import command_of, hostname_of
from hv.instance.logfile import log_path
from hv.instance.networking import uses_networks
from hv.instance.show import labels_of, published

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.instance.record import Instance

_NEVER = "0001-01-01T00:00:00Z"
_NANO = 1_000_000_000


def describe(instance: Instance) -> dict[str, Any]:
    """What `inspect` prints."""
    settings, image, state, status = instance.settings, instance.image, instance.state, instance.status()
    try:
        args = command_of(settings, image)
    except HvError:
        args = [""]
    return {
        "Id": instance.id, "Created": instance.about.get("created", ""), "Name": instance.name, "Kind": settings.kind,
        "Path": args[0], "Args": args[1:],
        "State": {
            "Status": status, "Running": status in ("running", "paused"), "Paused": status == "paused",
            "Restarting": status == "restarting", "OOMKilled": bool(state.get("oom")), "Dead": False,
            "Pid": instance.program(), "ExitCode": 0 if status in ("running", "paused", "created")
            and not state.get("exit_code") else instance.exit_code, "ExitCodeKnown": not state.get("unknown"),
            "Error": state.get("error", ""),
            "StartedAt": state.get("started") or _NEVER, "FinishedAt": state.get("finished") or _NEVER},
        "Image": image.get("id", ""), "ImageName": image.get("name", ""), "ImageDigest": image.get("digest", ""),
        "RestartCount": int(state.get("restarts", 0)), "LogPath": log_path(instance.folder),
        "ResolvConfPath": f"{instance.folder}/resolv.conf", "HostnamePath": f"{instance.folder}/hostname",
        "HostsPath": f"{instance.folder}/hosts",
        "Mounts": [{"Type": row["kind"], "Source": row["source"] or instance.about.get("volumes", {}).get(row["target"],
                                                                                                        ""),
                    "Destination": row["target"], "RW": not row["readonly"]} for row in _mounts(instance)],
        "Config": {
            "Hostname": hostname_of(instance), "User": settings.user or image.get("user", ""), "Tty": settings.tty,
            "OpenStdin": settings.interactive, "StdinOnce": settings.stdin_once,
            "Env": [*(image.get("env") or []), *settings.env], "Cmd": settings.command or image.get("cmd"),
            "Entrypoint": image.get("entrypoint") if settings.entrypoint is None else settings.entrypoint,
            "WorkingDir": settings.workdir or image.get("working_dir", ""), "Labels": labels_of(instance),
            "StopSignal": settings.stop_signal or image.get("stop_signal", ""), "StopTimeout": settings.stop_timeout,
            "Image": image.get("name", ""), "ExposedPorts": {port: {} for port in image.get("exposed_ports") or ()}},
        "HostConfig": {
            "NetworkMode": (settings.networks or ["pyhv"])[0], "AutoRemove": settings.rm,
            "RestartPolicy": {"Name": settings.restart, "MaximumRetryCount": settings.restart_most},
            "Memory": settings.memory, "NanoCpus": int(settings.cpus * _NANO), "CpusetCpus": settings.cpuset_cpus,
            "PidsLimit": settings.pids_limit, "ReadonlyRootfs": settings.readonly, "CapAdd": settings.cap_add,
            "CapDrop": settings.cap_drop, "Privileged": settings.privileged, "SecurityOpt": settings.security_opt,
            "ShmSize": settings.shm_size, "Sysctls": settings.sysctls, "Ulimits": settings.ulimits,
            "Dns": settings.dns, "ExtraHosts": settings.add_host, "GroupAdd": settings.groups, "Init": settings.init,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": settings.log_size,
                                                          "max-file": settings.log_files}}},
        "NetworkSettings": _networks(instance)}


def _mounts(instance: Instance) -> list[dict[str, Any]]:
    rows = list(instance.settings.mounts)
    known = {row["target"] for row in rows}
    rows += [{"kind": "volume", "source": "", "target": target, "readonly": False}
             for target in instance.about.get("volumes", {}) if target not in known]
    return rows


def _networks(instance: Instance) -> dict[str, Any]:
    ports: dict[str, list[dict[str, str]]] = {}
    for port in published(instance):
        ports.setdefault(f"{port.inner}/{port.protocol}", []).append({"HostIp": port.address,
                                                                       "HostPort": str(port.host)})
    networks: dict[str, Any] = {}
    if uses_networks(instance) and instance.running:
        from hv.network.networks import Networks

        for card in Networks().members(instance.id):
            networks[card.network] = {"IPAddress": card.address, "IPPrefixLen": card.prefix, "Gateway": card.gateway,
                                      "MacAddress": card.mac, "Aliases": card.aliases}
    first = next(iter(networks.values()), {"IPAddress": "", "Gateway": "", "MacAddress": "", "IPPrefixLen": 0})
    return {"Ports": ports, "Networks": networks, **{key: first[key] for key in ("IPAddress", "Gateway", "MacAddress",
                                                                               "IPPrefixLen")}}
