"""`pyhv volume ...` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from framework.run import ROOT


@pytest.fixture
def pyhv(tmp_path):
    def call(*words: str, code: int = 0) -> str:
        done = subprocess.run([sys.executable, ROOT / "bin/pyhv", "volume", *words], capture_output=True, text=True,
                              timeout=30, stdin=subprocess.DEVNULL,
                              env={"PYHV_DATA": str(tmp_path / "data"), "PYHV_RUN": str(tmp_path / "run"),
                                   "PATH": "/usr/bin:/bin"})
        assert done.returncode == code, done.stderr
        return done.stdout if not code else done.stdout + done.stderr
    return call


def test_a_volumes_life(pyhv, tmp_path):
    assert pyhv("create", "web", "--label", "a=b", "--label", "c") == "web\n"
    nameless = pyhv("create").strip()
    assert pyhv("ls", "-q").split() == sorted(["web", nameless])
    assert pyhv("ls").splitlines()[0].split() == ["DRIVER", "VOLUME", "NAME"]
    assert pyhv("ls", "-q", "-f", "label=a=b") == pyhv("ls", "-q", "--filter", "name=we") == "web\n"
    assert pyhv("ls", "--format", "{{.Name}} {{.Driver}}", "-f", "label=c") == "web local\n"
    assert pyhv("list", "-q", "-f", "dangling=false") == ""
    (found,) = json.loads(pyhv("inspect", "web"))
    assert found["Mountpoint"] == f"{tmp_path}/data/volumes/web/_data" and found["Labels"] == {"a": "b", "c": ""}
    assert Path(found["Mountpoint"]).is_dir() and found["Anonymous"] is False and "T" in found["CreatedAt"]
    assert pyhv("inspect", "-f", "{{.Mountpoint}}", "web").strip() == found["Mountpoint"]
    assert pyhv("prune", "-f").strip() == nameless
    assert pyhv("prune", "-f", "-a", "--filter", "label!=a") == ""
    assert pyhv("rm", "web") == "web\n"
    assert pyhv("ls", "-q") == ""


def test_mistakes_cost_one_line(pyhv):
    pyhv("create", "there")
    for words, code, text in ((("create", "../x"), 2, "is no name for a volume"),
                              (("create", "-d", "nfs", "x"), 2, "there is only local"),
                              (("create", "-o", "type=tmpfs", "x"), 2, "takes none here"),
                              (("ls", "-f", "size=1"), 2, "not understood"),
                              (("ls", "-f", "dangling=maybe"), 2, "neither true nor false"),
                              (("inspect", "gone"), 1, "none of that name"),
                              (("rm", "gone", "there"), 1, "none of that name"),
                              (("create", "a", "b"), 2, "unexpected extra argument")):
        lines = pyhv(*words, code=code).splitlines()
        assert text in lines[-1] and lines[-1].startswith("pyhv: "), lines
    assert pyhv("ls", "-q") == "" and pyhv("rm", "-f", "gone") == "gone\n"
