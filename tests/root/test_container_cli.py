"""The command line: flags and their order as in runc, what is printed, how errors come."""

from __future__ import annotations

import json
import marshal
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from framework.bundle import Bundle, container
from framework.bundle import bundle as bundle  # a fixture
from framework.run import PYHV, ROOT

pytestmark = container


def test_version_and_help(bundle: Bundle) -> None:
    done = bundle.call("--version")
    assert re.fullmatch(r"pyhv-runtime version \S+\nspec: 1\.2\.0\n", done.stdout)
    assert "create a container" in bundle.call("--help").stdout and bundle.call("--help").returncode == 0
    for command in ("create", "start", "run", "state", "kill", "delete", "list", "spec"):
        done = bundle.call(command, "--help")
        assert done.returncode == 0 and f"pyhv-runtime {command}" in done.stdout


@pytest.mark.parametrize("words", [
    ["nosuch"], ["run"], ["run", "a", "b"], ["run", "--nosuch", "a"], ["state"], ["kill"], ["kill", "a", "TERM", "x"],
    ["--log-format", "xml", "list"], ["run", "--preserve-fds", "x", "a"], ["run", "--bundle"], ["list", "x"],
    ["list", "--format", "yaml"], ["run", "a/b"], ["delete", "../x"], ["run", "--detach=maybe", "a"]])
def test_bad_usage_is_one_line(bundle: Bundle, words: list[str]) -> None:
    done = bundle.call(*words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_errors_in_the_log_as_engines_read_them(bundle: Bundle) -> None:
    log = bundle.folder / "log"
    for format_words, check in ((("--log-format", "json"), True), ((), False)):
        log.unlink(missing_ok=True)
        done = bundle.call("--log", str(log), *format_words, "start", "nobody")
        assert done.returncode == 1 and "nobody does not exist" in done.stderr and done.stderr.count("\n") == 1
        line = log.read_text()
        assert line.count("\n") == 1
        if check:
            record = json.loads(line)
            assert record["level"] == "error" and "nobody does not exist" in record["msg"]
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", record["time"])
        else:
            assert re.fullmatch(r'time="\S+Z" level=error msg=".*"\n', line)


def test_list(bundle: Bundle) -> None:
    assert bundle.call("list", "--format", "json").stdout == "null\n" and bundle.call("list", "-q").stdout == ""
    bundle.create("sleep", "1000")
    rows = json.loads(bundle.call("list", "-f", "json").stdout)
    assert [(row["id"], row["status"], row["owner"]) for row in rows] == [(bundle.name, "created", "root")]
    assert set(rows[0]) == {"ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"}
    head, line = bundle.call("list").stdout.splitlines()
    assert head.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert line.split()[:4] == [bundle.name, str(bundle.pid()), "created", str(bundle.folder)]
    assert bundle.call("list", "--quiet").stdout == bundle.name + "\n"
    (bundle.state / "broken").mkdir()
    assert bundle.call("list", "-q").stdout == bundle.name + "\n"
    assert bundle.call("delete", "-f", "broken").returncode == 0


def test_flags_in_any_of_their_spellings(bundle: Bundle) -> None:
    bundle.write()
    for words in (("run", f"--bundle={bundle.folder}", "a"), ("run", "-b", str(bundle.folder), "a"),
                  ("run", "a", "--bundle", str(bundle.folder)), ("run", "-bundle", str(bundle.folder), "--", "a"),
                  ("--debug", "--systemd-cgroup=false", "run", "--detach=false", "-b", str(bundle.folder), "a")):
        done = bundle.call(*words)
        assert done.returncode == 0, (words, done.stderr)


def test_systemd_cgroups_are_refused(bundle: Bundle) -> None:
    bundle.write()
    done = bundle.call("--systemd-cgroup", "run", bundle.name)
    assert done.returncode == 1 and "--systemd-cgroup" in done.stderr


def test_spec(bundle: Bundle) -> None:
    done = bundle.call("spec")
    assert done.returncode == 0
    config = json.loads((bundle.folder / "config.json").read_text())
    assert config["process"]["args"] == ["sh"] and config["root"] == {"path": "rootfs", "readonly": True}
    again = bundle.call("spec")
    assert again.returncode == 1 and "exists" in again.stderr


def test_console_socket_rules(bundle: Bundle) -> None:
    bundle.write()
    done = bundle.call("create", "--console-socket", "/nowhere", bundle.name)
    assert done.returncode == 1 and "process.terminal" in done.stderr
    bundle.config["process"]["terminal"] = True
    bundle.write()
    assert "--console-socket" in bundle.call("create", bundle.name).stderr
    assert "/nowhere" in bundle.call("create", "--console-socket", "/nowhere/x", bundle.name).stderr


def test_pyhv_oci_is_the_same(bundle: Bundle) -> None:
    bundle.write()
    done = subprocess.run([*PYHV, "oci", "--root", str(bundle.state), "run", bundle.name], cwd=bundle.folder,
                          capture_output=True, timeout=30, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = subprocess.run([*PYHV, "oci", "state", "nobody"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "nobody" in done.stderr


def test_started_without_standard_streams(bundle: Bundle) -> None:
    bundle.write()
    command = f"exec {sys.executable} -ISE {ROOT}/bin/pyhv-runtime --root {bundle.state} run {bundle.name} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=bundle.folder, timeout=30).returncode == 0


def test_the_bundles_of_modules(bundle: Bundle) -> None:
    """Written by the first command of its kind, used by the next, without which no module is searched for."""
    copy = bundle.folder / "checkout"
    for name in ("bin", "hv"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "hv/__pycache__").mkdir()
    command = [sys.executable, "-ISE", str(copy / "bin/pyhv-runtime")]
    silent: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    bundle.config["process"]["args"] = ["sleep", "1000"]
    bundle.write()

    def life(runtime: list[str]) -> None:
        for words in (["create"], ["start"], ["state"], ["exec", "true"], ["kill", "CONT"], ["delete", "--force"]):
            words.insert(1 if words[0] != "delete" else 2, bundle.name)
            assert bundle.call(*words, runtime=runtime, **silent).returncode == 0, words

    life(command)
    names = {}
    for kind in ("create", "exec", "life"):
        saved = copy / f"hv/__pycache__/{kind}.{sys.hexversion:x}.bundle"
        names[kind] = {name for name, *_ in marshal.loads(saved.read_bytes())[2]}
        assert not any(name.startswith(("hv.machine", "hv.kvm", "hv.cli.full", "hv.cli.bundle"))
                       for name in names[kind])
    assert {"hv.container.runtime", "hv.container.init", "hv.cli.oci"} <= names["create"]
    assert {"hv.container.enter", "hv.cli.oci_exec"} <= names["exec"] and "hv.container.init" not in names["life"]
    if shutil.which("strace"):
        trace = copy / "trace"
        life(["strace", "-A", "-e", "trace=openat", "-o", str(trace), *command])
        opened = [line for line in trace.read_text().splitlines() if f"{copy}" in line and "/hv/" in line]
        assert len(opened) == 6 and all(".bundle" in line for line in opened), opened
    source = copy / "hv/container/state.py"
    source.write_text(source.read_text() + "\nraise SystemExit(77)\n")
    assert bundle.run("true", runtime=command).returncode == 77
    assert bundle.call("state", bundle.name, runtime=command).returncode == 77
