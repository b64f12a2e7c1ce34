"""Instances on disk: names, finding, removing."""

from __future__ import annotations

import os
import threading

import pytest

from hv.errors import HvError, StateError
from hv.instance import records
from hv.instance.record import Instance
from hv.instance.tree import remove


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("PYHV_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYHV_RUN", str(tmp_path / "run"))


def made(name: str = "") -> Instance:
    instance = records.make(name, {"rm": True}, {"id": "sha256:x"})
    instance.unlock()
    return instance


def test_made_found_renamed_removed():
    one, two = made("first"), made()
    assert records.find("first").id == one.id and records.find(one.id[:8]).name == "first"
    assert {found.id for found in records.all_instances()} == {one.id, two.id}
    with pytest.raises(StateError, match="taken"):
        made("first")
    assert len(records.all_instances()) == 2
    records.rename(one, "second")
    assert records.find("second").id == one.id
    with pytest.raises(StateError, match="no such"):
        records.find("first")
    with pytest.raises(StateError, match="taken"):
        records.rename(two, "second")
    records.remove_record(one)
    made("second")
    with pytest.raises(StateError):
        records.find(one.id)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "../x", "nobody", "\0"])
def test_names_that_find_nothing(text):
    made("somebody")
    with pytest.raises(StateError):
        records.find(text)


def test_an_id_that_is_not_the_only_one():
    ids = [made().id for _ in range(40)]
    first = next(letter for letter in "0123456789abcdef" if sum(id[0] == letter for id in ids) > 1)
    with pytest.raises(StateError, match="that begin with"):
        records.find(first)


def test_one_name_for_many_who_want_it():
    got: list[str] = []

    def want() -> None:
        try:
            got.append(made("only").id)
        except StateError:
            pass

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(got) == 1 and len(records.all_instances()) == 1


def test_what_a_kill_left_is_swept(tmp_path):
    folder = tmp_path / "data" / "instances" / ("a" * 32)
    made("kept")
    folder.mkdir()
    os.symlink("b" * 32, tmp_path / "data" / "instances" / "names" / "dangling")
    assert not records.half_made()          # young: somebody may be at it
    os.utime(folder, (1, 1))
    assert [found.id for found in records.half_made()] == ["a" * 32]
    records.forget_names()
    assert os.listdir(tmp_path / "data" / "instances" / "names") == ["kept"]


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 9999, '{"a":'])
def test_a_damaged_file_is_named(text):
    instance = made("hurt")
    with open(f"{instance.folder}/state.json", "w", encoding="latin-1") as file:
        file.write(text)
    with pytest.raises(HvError, match=r"state\.json"):
        records.find("hurt")
    assert records.find("hurt", damaged=True).id == instance.id
    assert not records.all_instances() and len(records.all_instances(damaged=True)) == 1


def test_a_process_is_known_by_its_start_time():
    instance = made()
    os.makedirs(instance.run)
    instance.save_kept([0, 1, 2, 4], program=os.getpid(), program_start=1)
    assert instance.holder() == os.getpid() and instance.program() == 0


def test_removing_follows_no_link_and_goes_deep(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    folder = tmp_path / "folder"
    here = folder
    for number in range(400):
        here = here / "d"
        os.makedirs(here) if number == 0 else os.mkdir("d", dir_fd=fd)      # noqa: F821
        if number:
            os.close(fd)                                                    # noqa: F821
        fd = os.open(here if len(str(here)) < 4000 else ".", os.O_RDONLY)
        os.symlink(outside, "link", dir_fd=fd)
    os.close(fd)
    for number in range(50):
        (folder / f"w{number}" / "x").mkdir(parents=True)
    os.mkfifo(folder / "fifo")
    remove(str(folder))
    assert not folder.exists() and (outside / "file").exists()
