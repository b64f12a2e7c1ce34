"""`pyhv snapshot` of containers: by CRIU where the host has one that works, else one line that says why not."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from framework.bundle import Bundle
from framework.run import PYHV

from hv.container.runtime import Runtime

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def pyhv(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYHV, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


def works() -> bool:
    program = shutil.which("criu")
    return program is not None and subprocess.run([program, "check"], capture_output=True, timeout=60,
                                                  check=False).returncode == 0


@pytest.fixture
def container(tmp_path):
    runtime = Runtime("/run/pyhv")
    name = f"saved-{os.getpid()}"
    bundle = Bundle(tmp_path)
    bundle.config["process"]["args"] = ["sleep", "100"]
    bundle.write()
    runtime.create(name, str(bundle.folder), start=True)
    yield name
    runtime.delete(name, force=True)


def test_a_container_goes_on_whether_or_not_it_could_be_saved(container, tmp_path):
    done = pyhv("snapshot", "create", f"container:{container}", "kept", "--store", tmp_path / "store")
    assert Runtime("/run/pyhv").state(container)["status"] == "running"
    if works():
        assert done.returncode == 0, done.stderr
        assert "kept" in pyhv("snapshot", "ls", "--store", tmp_path / "store").stdout
        return
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert "criu" in done.stderr
    assert os.listdir(tmp_path / "store") == []         # nothing half written


@pytest.mark.parametrize("option", ["--diff", "--track", "--copy-disks"])
def test_what_is_for_vms_is_refused_by_name(container, tmp_path, option):
    done = pyhv("snapshot", "create", f"container:{container}", "kept", option, "--store", tmp_path / "store")
    assert done.returncode == 2
    assert option in done.stderr


def test_a_container_that_is_not_there(tmp_path):
    done = pyhv("snapshot", "create", "container:nobody", "kept", "--store", tmp_path / "store")
    assert done.returncode == 1
    assert "nobody" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "bad").mkdir()
    for content in ("", "[]", '{"version": 2}', '{"version": 1, "name": 3, "bundle": "", "root": ""}'):
        (tmp_path / "bad/container.json").write_text(content)
        done = pyhv("snapshot", "restore", "bad", "--store", tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "container.json" in done.stderr
