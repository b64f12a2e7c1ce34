"""Children that enter a seccomp filter, do something, and tell."""

from __future__ import annotations

import json
import os
import signal

from hv.container.seccomp.compile import compile_profile
from hv.linux import creds
from hv.linux.seccomp import load_filter

SECONDS = 20


def in_child(action) -> tuple[int, object]:
    """What `action` answers in a child (JSON), and how the child ended: its exit code, or minus a signal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(SECONDS)
            os.close(reader)
            os.write(writer, json.dumps(action()).encode())
            code = 0
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), json.loads(data) if data else None


def enter(profile: dict, *, listener: bool = False) -> int:
    """As C2 does it with noNewPrivileges."""
    program = compile_profile(profile, cache=False)
    creds.prctl(creds.PR_SET_NO_NEW_PRIVS, 1)
    return load_filter(program, program.flags, program.listener)


def profile(*rules: dict, default: str = "SCMP_ACT_ALLOW", **more) -> dict:
    return {"defaultAction": default, "syscalls": list(rules), **more}


def rule(name: str, action: str, **more) -> dict:
    return {"names": [name], "action": action, **more}
