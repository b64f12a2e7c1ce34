"""`ps`: the processes of a container, as the host's ps shows them (man 8 runc-ps), or as JSON: an array of numbers.

Driven by tests/root/test_container_commands.py.
"""

from __future__ import annotations

__all__ = ["command_ps"]

import os

from hv.cli.oci import Context, parse
from hv.cli.oci_life import runtime_of
from hv.container.state import Record
from hv.errors import ConfigError, HvError
from hv.plainjson import dumps

_PS = ("/bin/ps", "/usr/bin/ps", "/usr/local/bin/ps")
_USAGE = """usage: pyhv-runtime ps [flags] ID [options of ps]

  --format KIND, -f   table (default) or json: the numbers alone

Options of ps are the host's ps's [-ef]; a column PID must be among what it prints."""


def command_ps(context: Context, arguments: list[str]) -> int:
    """ps [--format table|json] ID [ps options]"""
    known = {"--format": ("format", "table"), "-f": ("format", "table")}
    values, words = parse(arguments, known, stop_early=True, usage=_USAGE)
    if not words:
        raise ConfigError("ps: no container id", "`pyhv-runtime ps --help`")
    if values["format"] not in ("table", "json"):
        raise ConfigError(f"--format {values['format']}", "table or json")
    runtime = runtime_of(context)
    record = Record(runtime.root, words[0]).load()
    pids = sorted(runtime.group(record).pids()) or _by_namespace(record.pid)
    if values["format"] == "json":
        print(dumps(pids))
        return 0
    lines = _ask(words[1:] or ["-ef"]).splitlines()
    columns = lines[0].split() if lines else []
    if "PID" not in columns:
        raise HvError("ps: no column PID in what the host's ps prints", "leave its options out, or ask for pid")
    place, wanted = columns.index("PID"), {str(pid) for pid in pids}
    print(lines[0])
    for line in lines[1:]:
        fields = line.split()
        if len(fields) > place and fields[place] in wanted:
            print(line)
    return 0


def _by_namespace(first: int) -> list[int]:
    """Those of a container without a cgroup (rootless): who is in the pid namespace of the first, unless it is ours."""
    try:
        wanted = os.readlink(f"/proc/{first}/ns/pid")
        if not first or wanted == os.readlink("/proc/self/ns/pid"):
            return [first] if first else []
    except OSError:
        return []
    found = []
    for leaf in os.listdir("/proc"):
        try:
            if leaf.isdecimal() and os.readlink(f"/proc/{leaf}/ns/pid") == wanted:
                found.append(int(leaf))
        except OSError:
            pass                # it has ended, or is somebody else's
    return sorted(found)


def _ask(options: list[str]) -> str:
    """What the host's ps prints."""
    for program in _PS:
        if os.access(program, os.X_OK):
            break
    else:
        raise HvError("this host has no ps", "--format json needs none; package procps")
    said = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        child = os.posix_spawn(program, ["ps", *options], os.environ, file_actions=((os.POSIX_SPAWN_DUP2, said, 1),))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise HvError(f"ps {' '.join(options)}: exit code {code}")
        os.lseek(said, 0, os.SEEK_SET)
        with open(said, "rb", closefd=False) as file:
            return file.read().decode(errors="replace")
    finally:
        os.close(said)
