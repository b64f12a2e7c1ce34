"""A container's record on disk: whole or not at all, one command at a time, a pid that came again is not it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from framework.run import ROOT

from hv.container.state import Record, now, start_time, write_whole
from hv.errors import ConfigError, HvError, StateError


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "x" * 1025, "../x", "a\n", "a\0"])
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="container id"):
        Record(str(tmp_path), name)


@pytest.mark.parametrize("name", ["a", "A-b_c+d.e", "0", "..a", "-x"])
def test_names_that_are_taken(tmp_path: Path, name: str) -> None:
    record = Record(str(tmp_path), name)
    record.make()
    record.data = {"id": name, "x": [1, None, True, "ä\n"]}
    record.save()
    assert Record(str(tmp_path), name).load().data == record.data
    with pytest.raises(StateError, match="exists"):
        Record(str(tmp_path), name).make()
    record.remove()
    record.unlock()
    with pytest.raises(StateError, match="does not exist"):
        Record(str(tmp_path), name).load()


def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(HvError, match="Not a directory"):
        Record("/dev/null/x", "a").make()


@pytest.mark.parametrize("text", ["", "{", "[1]", "nonsense", '{"a": 1} x', "\xff"])
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(HvError) as caught:
        Record(str(tmp_path), "a").load()
    assert "delete --force" in caught.value.hint


def test_a_record_that_was_never_finished(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(HvError, match="never finished"):
        Record(str(tmp_path), "a").load()


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_whole(str(path), b"old")
    (tmp_path / "f.new").mkdir()        # the fresh file can't be written, as on a full disk
    with pytest.raises(HvError):
        write_whole(str(path), b"new")
    assert path.read_bytes() == b"old"


def test_status(tmp_path: Path) -> None:
    record = Record(str(tmp_path), "a")
    record.make()
    record.data = {"creating": True}
    assert record.status() == "creating"
    record.data = {"creating": False, "pid": os.getpid(), "pid_start": start_time(os.getpid())}
    assert record.status() == "running" and record.status(frozen=True) == "paused"
    Path(record.socket).touch()
    assert record.status() == "created"
    record.data["pid_start"] += 1       # the number came again
    assert record.status() == "stopped" and record.pid == 0
    record.data |= {"creating": True}
    assert record.status() == "stopped"
    record.unlock()


def test_an_ended_process_that_nobody_waited_for_has_ended(tmp_path: Path) -> None:
    """Read as it ended, its start is 0: that must not pass for alive later on."""
    child = subprocess.Popen(["true"])
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert start_time(child.pid) == 0
    record = Record(str(tmp_path), "a")
    record.data = {"pid": child.pid, "pid_start": 0}
    assert record.pid == 0 and record.status() == "stopped"
    child.wait()
    assert record.status() == "stopped"


def test_one_command_at_a_time(tmp_path: Path) -> None:
    first = Record(str(tmp_path), "a")
    first.make()
    code = ("import sys; sys.path.insert(0, '.'); from hv.container.state import Record\n"
            f"r = Record({str(tmp_path)!r}, 'a'); r.lock(); print('in', flush=True)")
    other = subprocess.Popen([sys.executable, "-ISE", "-c", code], stdout=subprocess.PIPE, text=True,
                             cwd=ROOT)
    time.sleep(0.3)
    assert other.poll() is None
    first.unlock()
    assert other.communicate(timeout=10)[0] == "in\n"


def test_a_lock_on_what_is_deleted_meanwhile(tmp_path: Path) -> None:
    first = Record(str(tmp_path), "a")
    first.make()
    seen: list[str] = []

    def wait() -> None:
        try:
            Record(str(tmp_path), "a").lock()
        except StateError as error:
            seen.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    first.remove()
    first.unlock()
    thread.join(10)
    assert seen == ["container a does not exist"]


def test_time_format() -> None:
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d\.\d{9}Z", now())
