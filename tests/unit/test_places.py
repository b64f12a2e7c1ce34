"""Where things are kept."""

from __future__ import annotations

import os

from hv import places
from hv.places import data_root, run_root


def test_the_variables_name_the_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYHV_DATA", "data")
    monkeypatch.setenv("PYHV_RUN", str(tmp_path / "run"))
    assert data_root() == str(tmp_path / "data")
    assert run_root() == str(tmp_path / "run")


def test_a_user_has_folders_of_its_own(monkeypatch):
    for name in ("PYHV_DATA", "PYHV_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/a/data")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert data_root() == "/home/a/data/pyhv"
    assert run_root() == "/run/user/1000/pyhv"


def test_root_keeps_them_where_the_system_does(monkeypatch):
    for name in ("PYHV_DATA", "PYHV_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (data_root(), run_root()) == ("/var/lib/pyhv", "/run/pyhv")


def test_a_folder_that_somebody_else_made_in_tmp_is_not_taken(monkeypatch, tmp_path):
    for name in ("PYHV_DATA", "PYHV_RUN", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    user = os.geteuid() or os.getuid() + 1000
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(places, "_TEMPORARY", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "/home/a/data")
    folder = tmp_path / f"pyhv-{user}"
    other = "/home/a/data/pyhv/run"
    if os.getuid() != user:
        assert run_root() == other              # root made it: not this user's
        os.chown(folder, user, user)
    assert run_root() == f"{folder}/pyhv"
    folder.chmod(0o777)
    assert run_root() == other
    folder.chmod(0o700)
    assert run_root() == f"{folder}/pyhv"
    folder.rmdir()
    folder.symlink_to("/home/a")
    assert run_root() == other
