"""What of a restore needs no criu, which this host's kernel may not let work: the process that is to become criu, and
the network namespace of those that it has made."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle

from hv.container.process import Plan, spawn
from hv.container.restore import _bring_up, _Restore
from hv.container.runtime import CreateOptions, Runtime
from hv.container.state import Record

pytestmark = container


def test_criu_starts_in_the_cgroup_and_a_mount_namespace_of_its_own(bundle: Bundle) -> None:
    bundle.write()
    runtime = Runtime(str(bundle.state))
    seen: dict[str, Any] = {}

    def restored(plan: Plan, record: Record) -> int:
        pid = os.fork()
        if not pid:
            try:
                _Restore(plan, record, None, "")._prepare()     # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGSTOP)
            finally:
                os._exit(1)
        try:
            assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
            seen["cgroup"] = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
            seen["mounted"] = record.folder in Path(f"/proc/{pid}/mountinfo").read_text()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert record.folder not in Path("/proc/self/mountinfo").read_text()
        made = spawn(plan)
        assert record.pid == made       # it is known before anything else can go wrong
        _bring_up(made, [("net.ipv4.ip_forward", "net/ipv4/ip_forward", "1")])
        return made

    bundle.config["process"]["args"] = ["sh", "-c", "exit $(cat /proc/sys/net/ipv4/ip_forward)"]
    bundle.write()
    runtime.create(bundle.name, str(bundle.folder), CreateOptions(spawn=restored))
    try:
        assert seen["mounted"]
        assert all(bundle.name in row for row in seen["cgroup"]), seen
        runtime.start(bundle.name)
        assert runtime.wait(bundle.name, 20) == 1
    finally:
        runtime.delete(bundle.name, force=True)
