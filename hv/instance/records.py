"""All instances: found by name, by ID or by what an ID begins with; made, renamed, removed.

Driven by tests/unit/test_instance_record.py.
"""

from __future__ import annotations

__all__ = ["all_instances", "find", "free_name", "make", "remove_record", "rename"]

import os
from time import time

from hv.container.state import now
from hv.errors import HvError, StateError
from hv.instance.names import ID_LENGTH, check_name, is_id_prefix, new_id, new_name
from hv.instance.record import CREATED, Instance, instances_root, run_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_TRIES = 50
_HALF_MADE = 5.0             # seconds after which a folder without instance.json is nobody's


def make(name: str, settings: dict[str, Any], image: dict[str, Any], layers: Sequence[str] = ()) -> Instance:
    """A new instance, locked; `name` "" has one chosen. StateError where the name is taken; nothing is left then."""
    instance = Instance(new_id())
    try:
        os.makedirs(f"{instances_root()}/names", 0o700, exist_ok=True)
        os.mkdir(instance.folder, 0o700)
    except OSError as error:
        raise HvError(f"{instances_root()}: {os.strerror(error.errno or 0)}", "set PYHV_DATA to a folder to write in") \
            from None
    instance.lock()
    try:
        instance.name = _take(check_name(name), instance.id) if name else free_name(instance.id)
        instance.about = {"id": instance.id, "name": instance.name, "created": now(), "settings": settings,
                          "image": image, "layers": [*layers]}
        instance.state = {"status": CREATED}
        instance.save()             # from now on it is there: _listed() asks for this one
    except BaseException:
        remove_record(instance)
        instance.unlock()
        raise
    return instance


def _take(name: str, id: str) -> str:
    path = f"{instances_root()}/names/{name}"
    for _ in range(_TRIES):
        try:
            os.symlink(id, path)
            return name
        except FileExistsError:
            owner = _owner(name)
            if owner and os.path.isdir(f"{instances_root()}/{owner}"):
                raise StateError(f"the name {name} is taken by {owner[:12]}",
                                 f"choose another with --name, or: pyhv rm {name}") from None
            _let_go(name, owner)    # of one that a crash has left half made or half removed
        except OSError as error:
            raise HvError(f"{path}: {os.strerror(error.errno or 0)}") from None
    raise StateError(f"the name {name} can't be had", "choose another with --name")


def free_name(id: str) -> str:
    """A name that nobody had, taken for `id`."""
    for _ in range(_TRIES):
        try:
            return _take(new_name(), id)
        except StateError:
            pass
    return _take(f"{new_name()}_{id[:6]}", id)


def _owner(name: str) -> str:
    try:
        return os.readlink(f"{instances_root()}/names/{name}")
    except OSError:
        return ""


def _let_go(name: str, id: str) -> None:
    if name and _owner(name) == id:
        try:
            os.unlink(f"{instances_root()}/names/{name}")
        except OSError:
            pass


def rename(instance: Instance, name: str) -> None:
    """Another name for a loaded, locked instance."""
    old = instance.name
    _take(check_name(name), instance.id)
    try:
        instance.about["name"] = instance.name = name
        instance.save()
    except BaseException:
        _let_go(name, instance.id)
        raise
    _let_go(old, instance.id)


def find(text: str, *, damaged: bool = False) -> Instance:
    """The instance of that name, or of the only ID that begins so. StateError. `damaged`: one that can't be read as
    well, to be removed."""
    if "/" not in text and "\0" not in text and text not in ("", ".", ".."):
        owner = _owner(text)
        if owner and len(owner) == ID_LENGTH and is_id_prefix(owner):
            return _loaded(owner, damaged)
        if is_id_prefix(text):
            found = [id for id in _listed() if id.startswith(text)]
            if len(found) == 1:
                return _loaded(found[0], damaged)
            if found:
                raise StateError(f"{len(found)} instances have IDs that begin with {text}", "give more of it")
    raise StateError(f"no such instance: {text!r:.80}", "`pyhv ps -a` shows those there are")


def _loaded(id: str, damaged: bool) -> Instance:
    try:
        return Instance(id).load()
    except StateError:
        raise
    except HvError:
        if not damaged:
            raise
        instance = Instance(id)
        try:
            instance.about = instance.read("instance.json")
        except HvError:
            pass
        return instance


def _listed() -> list[str]:
    try:
        names = os.listdir(instances_root())
    except OSError:
        return []
    return sorted(name for name in names if len(name) == ID_LENGTH and is_id_prefix(name))


def all_instances(*, damaged: bool = False) -> list[Instance]:
    """All that can be read, the latest first. `damaged`: the others as well."""
    found = []
    for id in _listed():
        try:
            found.append(_loaded(id, damaged))
        except HvError:
            pass
    found.sort(key=lambda instance: str(instance.about.get("created", "")), reverse=True)
    return found


def half_made() -> list[Instance]:
    """Folders without an instance.json that nobody is at work on: what a kill has left."""
    found = []
    for id in _listed():
        instance = Instance(id)
        try:
            if (not os.path.exists(f"{instance.folder}/instance.json")
                    and time() - os.stat(instance.folder).st_mtime > _HALF_MADE and instance.lock(wait=False)):
                found.append(instance)
        except (OSError, StateError):
            pass
    return found


def forget_names() -> None:
    """Let go of names whose instance is not there: its folder was made before its name."""
    try:
        names = os.listdir(f"{instances_root()}/names")
    except OSError:
        return
    for name in names:
        owner = _owner(name)
        if owner and not os.path.isdir(f"{instances_root()}/{owner}"):
            _let_go(name, owner)


def remove_record(instance: Instance) -> None:
    """Remove its folders and its name; what can't be removed is told. The instance is locked, and does not run."""
    names = f"{instances_root()}/names"
    if not instance.name:
        try:
            instance.name = next((name for name in os.listdir(names) if _owner(name) == instance.id), "")
        except OSError:
            pass
    try:
        os.unlink(f"{instance.folder}/instance.json")       # first: from now on it is not there
    except OSError:
        pass
    _let_go(instance.name, instance.id)
    for folder in (run_folder(instance.id), instance.folder):
        remove_tree(folder)


def remove_tree(path: str) -> None:
    """Remove a folder and all in it, following no link; HvError names what can't be."""
    from hv.instance.tree import remove

    try:
        remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HvError(f"{error.filename or path}: {os.strerror(error.errno or 0)}", "remove it by hand") from None


__all__ += ["forget_names", "half_made", "remove_tree"]
