"""`checkpoint` and `restore`: runc's flags (man 8 runc-checkpoint, runc-restore), done by CRIU.

Refused by name: lazy migration and page servers, and what else hv/container/checkpoint.py says. Where criu is missing
or this kernel is none that it understands, one line says so. Driven by tests/root/test_container_criu.py.
"""

from __future__ import annotations

__all__ = ["command_checkpoint", "command_restore"]

import os

from hv.cli.oci import Context, parse
from hv.cli.oci_life import end_by_exception, one_name, runtime_of
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.container.checkpoint import CriuOptions

_BOTH: dict[str, tuple[str, Any]] = {
    "--image-path": ("images", "checkpoint"), "--work-path": ("work", ""),
    "--tcp-established": ("tcp_established", False), "--ext-unix-sk": ("ext_unix_sk", False),
    "--shell-job": ("shell_job", False), "--file-locks": ("file_locks", False),
    "--manage-cgroups-mode": ("cgroup_mode", ""), "--empty-ns": ("empty", []),
    "--auto-dedup": ("auto_dedup", False), "--lazy-pages": ("lazy", False)}
_CHECKPOINT = _BOTH | {
    "--parent-path": ("parent", ""), "--leave-running": ("leave_running", False), "--pre-dump": ("pre_dump", False),
    "--tcp-skip-in-flight": ("tcp_skip_in_flight", False), "--page-server": ("page_server", ""),
    "--status-fd": ("status_fd", "")}
_RESTORE = _BOTH | {
    "--bundle": ("bundle", "."), "-b": ("bundle", "."), "--detach": ("detach", False), "-d": ("detach", False),
    "--console-socket": ("console_socket", ""), "--pid-file": ("pid_file", ""), "--no-pivot": ("no_pivot", False),
    "--no-subreaper": ("no_subreaper", False), "--lsm-profile": ("lsm_profile", ""),
    "--lsm-mount-context": ("lsm_mount_context", "")}
_REFUSED = {"lazy": "--lazy-pages", "page_server": "--page-server", "status_fd": "--status-fd",
            "lsm_mount_context": "--lsm-mount-context"}
_BOTH_USAGE = """
  --image-path DIR     the folder of the images [checkpoint]
  --work-path DIR      where criu's log goes [that of the images]
  --tcp-established    save open TCP connections too
  --ext-unix-sk        leave Unix sockets connected to the outside alone
  --shell-job          its terminal is that of the session it was started from
  --file-locks         save file locks too
  --manage-cgroups-mode KIND  ignore (the runtime does it), soft, full, strict
  --empty-ns network   make a network namespace without what was in it: it is so anyway
  --auto-dedup         punch what a later image has out of the earlier ones
  --lazy-pages         refused"""
_CHECKPOINT_USAGE = "usage: pyhv-runtime checkpoint [flags] ID\n" + _BOTH_USAGE + """
  --leave-running      the container goes on
  --pre-dump           its memory only; it goes on
  --parent-path DIR    an earlier --pre-dump, seen from --image-path
  --tcp-skip-in-flight leave out TCP connections that are being made
  --page-server, --status-fd  refused"""
_RESTORE_USAGE = "usage: pyhv-runtime restore [flags] ID\n" + _BOTH_USAGE + """
  --bundle DIR, -b     the bundle [.]
  --detach, -d         do not wait for the end
  --console-socket S   a Unix socket that gets the terminal's descriptor
  --pid-file FILE      write the first process's number there
  --no-subreaper       leave orphans of the container to init
  --no-pivot           taken, and without effect: criu decides
  --lsm-profile KIND:NAME  the security profile instead of the one saved
  --lsm-mount-context  refused"""


def _options(context: Context, values: dict[str, Any]) -> CriuOptions:
    from hv.container.checkpoint import CriuOptions

    for key, flag in _REFUSED.items():
        if values.get(key):
            raise ConfigError(f"{flag}: not offered by this runtime", "leave it out")
    for kind in values["empty"]:
        if kind != "network":
            raise ConfigError(f"--empty-ns {kind!r:.40}", "network")
    return CriuOptions(values["images"], values["work"], criu=context.criu,
                       **{name: values[name] for name in ("tcp_established", "ext_unix_sk", "shell_job", "file_locks",
                                                          "cgroup_mode", "auto_dedup")})


def command_checkpoint(context: Context, arguments: list[str]) -> int:
    """checkpoint [flags] ID"""
    from hv.container.checkpoint import checkpoint

    values, words = parse(arguments, _CHECKPOINT, usage=_CHECKPOINT_USAGE)
    name, options = one_name(words, "checkpoint"), _options(context, values)
    for key in ("leave_running", "pre_dump", "parent", "tcp_skip_in_flight"):
        setattr(options, key, values[key])
    end_by_exception()
    checkpoint(runtime_of(context), name, options)
    return 0


def command_restore(context: Context, arguments: list[str]) -> int:
    """restore [flags] ID"""
    from hv.container.restore import restoring
    from hv.container.runtime import CreateOptions
    from hv.container.spec import load_bundle

    values, words = parse(arguments, _RESTORE, usage=_RESTORE_USAGE)
    runtime, name, criu = runtime_of(context), one_name(words, "restore"), _options(context, values)
    criu.lsm_profile = values["lsm_profile"]
    spec = load_bundle(os.path.abspath(values["bundle"]))
    options = CreateOptions(console_socket=values["console_socket"], pid_file=values["pid_file"],
                            systemd_cgroup=context.systemd_cgroup, spawn=restoring(spec, criu))
    end_by_exception()
    if values["detach"]:
        runtime.create(name, spec.bundle, options, start=True, spec=spec)
        return 0
    from hv.container.foreground import run

    return run(runtime, name, spec, options, subreaper=not values["no_subreaper"])
