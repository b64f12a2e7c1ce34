"""`ps`, `pause`, `resume`, `events` of VMs, and commands that are refused.

Driven by tests/kvm/test_vm_runtime.py.
"""

from __future__ import annotations

__all__ = ["command_checkpoint", "command_events", "command_pause", "command_ps", "command_restore", "command_resume",
           "command_update"]

from hv.cli.oci import Context, parse
from hv.cli.oci_life import one_name
from hv.cli.vm_runtime_life import runtime_of
from hv.errors import ConfigError, HvError
from hv.plainjson import dumps

_PS_USAGE = """usage: pyhv-vm-runtime ps [flags] ID

  --format KIND, -f   table (default) or json: the numbers alone"""


def command_ps(context: Context, arguments: list[str]) -> int:
    """ps [--format table|json] ID"""
    values, words = parse(arguments, {"--format": ("format", "table"), "-f": ("format", "table")}, stop_early=True,
                          usage=_PS_USAGE)
    if values["format"] not in ("table", "json"):
        raise ConfigError(f"--format {values['format']}", "table or json")
    rows = runtime_of(context).processes(one_name(words[:1], "ps"))
    if values["format"] == "json":
        print(dumps([row["pid"] for row in rows]))
        return 0
    print(f"{'UID':>6} {'PID':>7} {'PPID':>7} {'S':1} {'RSS':>8} {'TIME':>8} CMD")
    for row in rows:
        print(f"{row['uid']:>6} {row['pid']:>7} {row['ppid']:>7} {row['state']:1} {row['rss'] >> 10:>7}K "
              f"{row['cpu']:>8.2f} {' '.join(row['command'])}")
    return 0


def command_pause(context: Context, arguments: list[str]) -> int:
    """pause ID"""
    _, words = parse(arguments, {}, usage="usage: pyhv-vm-runtime pause ID")
    runtime_of(context).pause(one_name(words, "pause"), True)
    return 0


def command_resume(context: Context, arguments: list[str]) -> int:
    """resume ID"""
    _, words = parse(arguments, {}, usage="usage: pyhv-vm-runtime resume ID")
    runtime_of(context).pause(one_name(words, "resume"), False)
    return 0


def command_events(context: Context, arguments: list[str]) -> int:
    """events [--stats] [--interval TIME] ID"""
    from time import sleep

    from hv.cli.oci_control import duration

    usage = "usage: pyhv-vm-runtime events [--stats] [--interval TIME] ID"
    values, words = parse(arguments, {"--stats": ("stats", False), "--interval": ("interval", "5s")}, usage=usage)
    name, interval, runtime = one_name(words, "events"), duration(values["interval"]), runtime_of(context)
    while True:
        print(dumps({"type": "stats", "id": name, "data": runtime.stats(name)}), flush=True)
        if values["stats"]:
            return 0
        sleep(interval)
        try:
            runtime.client(name)
        except HvError:
            return 0            # it has ended


def command_update(context: Context, arguments: list[str]) -> int:
    """update ..."""
    raise ConfigError("update: the limits of a VM are its memory and processors, which stay as they are",
                      "delete it, and create one with others")


def command_checkpoint(context: Context, arguments: list[str]) -> int:
    """checkpoint ..."""
    raise ConfigError("checkpoint: CRIU saves processes of this kernel, not a VM's", "`pyhv snapshot` saves VMs")


def command_restore(context: Context, arguments: list[str]) -> int:
    """restore ..."""
    raise ConfigError("restore: there are no images of a VM's processes to restore", "`pyhv snapshot` saves VMs")
