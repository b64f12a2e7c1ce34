"""Hooks: when, where and with what they run, and what becomes of the container when one fails."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle  # a fixture

pytestmark = container

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def hook(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], **more}


def test_order_state_and_namespaces(bundle: Bundle) -> None:
    log = bundle.folder / "log"
    log.touch()
    (bundle.rootfs / "log").touch()
    bundle.config["root"]["readonly"] = False
    bundle.config["mounts"].append({"destination": "/log", "type": "bind", "source": str(log), "options": ["bind"]})

    def script(kind: str) -> str:
        place = "/log" if kind == "startContainer" else str(log)
        return (f"read -r state; echo \"{kind} $(readlink /proc/self/ns/uts) $(test -e /usr && echo host) "
                f"$state\" >>{place}")

    bundle.config["hooks"] = {kind: [hook(script(kind))] for kind in KINDS}
    bundle.create("sh", "-c", "echo program >>/log; exec sleep 1000")
    seen = [line.split()[0] for line in log.read_text().splitlines()]
    assert seen == ["prestart", "createRuntime", "createContainer"]
    pid = bundle.pid()
    inside = os.readlink(f"/proc/{pid}/ns/uts")
    assert bundle.status() == "created"
    assert bundle.call("start", bundle.name).returncode == 0
    time.sleep(0.2)
    assert bundle.call("delete", "--force", bundle.name).returncode == 0
    rows = {}
    for line in log.read_text().splitlines():
        if line != "program":
            kind, _, rest = line.partition(" ")
            namespace, _, rest = rest.partition(" ")
            rows[kind] = namespace, rest.startswith("host"), json.loads(rest[rest.index("{"):])
    assert set(rows) == set(KINDS)
    order = [line.split()[0] for line in log.read_text().splitlines()]
    assert order.index("startContainer") < order.index("program") and order[-1] == "poststop"
    host = os.readlink("/proc/self/ns/uts")
    for kind, (namespace, host_files, state) in rows.items():
        contained = kind in ("createContainer", "startContainer")
        assert namespace == (inside if contained else host), kind
        assert host_files == (kind != "startContainer"), kind
        assert state["id"] == bundle.name and state["bundle"] == str(bundle.folder) and state["ociVersion"] == "1.2.0"
        assert state["status"] == {"startContainer": "created", "poststart": "running", "poststop": "stopped"}.get(
            kind, "creating"), kind
        if kind != "poststop":
            assert state["pid"] == (1 if contained else pid), kind


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_undoes_the_creation(bundle: Bundle, kind: str) -> None:
    """runtime.md, Lifecycle, 3 to 5: an error, the rest of the hooks is left out; then 12 and 13, so poststop runs."""
    mark, end = bundle.folder / "mark", bundle.folder / "end"
    bundle.config["hooks"] = {kind: [hook("echo because >&2; exit 3"), hook(f"touch {mark}")],
                              "poststop": [hook(f"touch {end}")]}
    done = bundle.create("true")
    assert done.returncode == 1 and f"hooks.{kind}[0] /bin/sh: exit code 3: because" in done.stderr
    assert bundle.status() == "gone" and not mark.exists() and end.exists()


def test_a_start_container_hook_that_fails(bundle: Bundle) -> None:
    """Lifecycle, 7: an error, and the container is destroyed (12) with its poststop hooks (13); runc keeps it."""
    end = bundle.folder / "end"
    bundle.config["hooks"] = {"startContainer": [hook("exit 3"), hook("echo more >/tmp/more")],
                              "poststop": [hook(f"echo ended >>{end}")]}
    bundle.config["root"]["readonly"] = False
    assert bundle.create("true").returncode == 0
    done = bundle.call("start", bundle.name)
    assert done.returncode == 1 and "hooks.startContainer[0]" in done.stderr
    assert bundle.status() == "gone" and end.read_text() == "ended\n" and not (bundle.rootfs / "tmp/more").exists()
    bundle.gone()
    assert bundle.call("delete", "--force", bundle.name).returncode == 0        # what an engine does then
    done = bundle.run("true")
    assert done.returncode == 1 and "startContainer" in done.stderr and end.read_text() == "ended\n" * 2


def test_a_poststart_hook_that_fails_is_a_warning(bundle: Bundle) -> None:
    """Lifecycle, 9, of version 1.2: the other hooks run, the container lives; version 1.3, as runc, would end it."""
    mark = bundle.folder / "mark"
    bundle.config["hooks"] = {"poststart": [hook("exit 3"), hook(f"touch {mark}")]}
    bundle.create("sleep", "1000")
    done = bundle.call("start", bundle.name)
    assert done.returncode == 0 and "warning: hooks.poststart[0] /bin/sh: exit code 3" in done.stderr
    assert bundle.status() == "running" and mark.exists()


def test_a_poststop_hook_that_fails_is_a_warning(bundle: Bundle) -> None:
    mark = bundle.folder / "mark"
    bundle.config["hooks"] = {"poststop": [hook("exit 3"), hook(f"touch {mark}")]}
    done = bundle.run("true")
    assert done.returncode == 0 and "warning: hooks.poststop[0]" in done.stderr and mark.exists()


def test_a_timeout(bundle: Bundle) -> None:
    child = bundle.folder / "child"
    bundle.config["hooks"] = {"createRuntime": [hook(f"sleep 1000 & echo $! >{child}; wait", timeout=1)]}
    start = time.monotonic()
    done = bundle.create("true")
    assert done.returncode == 1 and "did not end within 1 s" in done.stderr and time.monotonic() - start < 8
    time.sleep(0.2)
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("path", ["/nonexistent", "/etc/passwd", "/"])
def test_a_hook_that_cannot_be_run(bundle: Bundle, path: str) -> None:
    bundle.config["hooks"] = {"prestart": [{"path": path}]}
    done = bundle.create("true")
    assert done.returncode == 1 and f"hooks.prestart[0] {path}" in done.stderr and "Traceback" not in done.stderr


def test_a_hook_sees_nothing_of_ours(bundle: Bundle) -> None:
    out = bundle.folder / "out"
    bundle.config["hooks"] = {"createRuntime": [
        {"path": "/bin/sh", "args": ["sh", "-c", f"ls /proc/$$/fd >{out}; env >>{out}"], "env": ["A=b"]}]}
    assert bundle.run("true").returncode == 0
    lines = out.read_text().split()
    # 1 is the script's own, 10 the shell's copy of what was there, 3 the folder that ls reads
    assert {word for word in lines if word.isdecimal()} <= {"0", "1", "2", "3", "10"}
    assert "A=b" in lines and not any(word.startswith("HOME=") for word in lines)
