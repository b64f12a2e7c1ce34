"""Differential snapshots: the pages that changed since the snapshot before, and the way back to a whole memory file.

    full --- diff --- diff        each names its parent by folder and id, and its pages: "pages": [[first, end], ...]

A difference's memory file has its pages where a full one would have them, all else are holes. To restore from one, its
chain is laid out once as `memory.whole` beside it: the oldest file copied with its holes, then each difference's pages
over it; so clones of a difference share the page cache as others do. `merge` makes a snapshot of its own of that, which
needs no parent. A parent that was removed, taken anew under the same name, or damaged is noticed by its id and its
checksums. Driven by tests/kvm/test_snapshot_diff.py.
"""

from __future__ import annotations

__all__ = ["WHOLE", "chain_of", "merge", "whole_memory"]

import os

from hv.errors import SnapshotError
from hv.linux.sparse import copy_sparse
from hv.snapshot.format import DISKS, MEMORY, Snapshot
from hv.snapshot.memory import copy_data, memory_stamp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WHOLE = "memory.whole"
LONGEST = 64            # differences one on the other: each costs a pass over its pages


def chain_of(snapshot: Snapshot) -> list[Snapshot]:
    """The snapshots that `snapshot` rests on, the full one first, itself last. SnapshotError where one is not there."""
    chain = [snapshot]
    while chain[0].state.get("parent") is not None:
        child = chain[0]
        if len(chain) > LONGEST:
            raise SnapshotError("parent", f"more than {LONGEST} differences on each other", "merge some of them")
        folder, wanted = child.part("parent", "folder", kind=str), child.part("parent", "id", kind=str)
        # a store may have been moved as a whole
        beside = f"{os.path.dirname(child.folder)}/{os.path.basename(folder)}"
        try:
            parent = Snapshot(folder if os.path.isdir(folder) else beside)
        except SnapshotError as error:
            raise SnapshotError("parent", f"{child.folder} is a difference from {folder}, which can't be opened "
                                f"({error})", "bring it back; without it this one is worth nothing") from None
        if (found := parent.part("id", kind=str)) != wanted:
            raise SnapshotError("parent", f"{parent.folder} is another snapshot ({found}) than the one this is a "
                                f"difference from ({wanted})", "bring the right one back")
        if any(parent.folder == other.folder for other in chain):
            raise SnapshotError("parent", f"{parent.folder} rests on itself", "the state is damaged or hostile")
        chain.insert(0, parent)
    return chain


def whole_memory(snapshot: Snapshot, size: int) -> str:
    """The path of a whole memory file of the difference `snapshot`, made now unless it was before.

    It holds while the file and those it was made of have the stamps they had then.
    """
    chain = chain_of(snapshot)
    path, note = f"{snapshot.folder}/{WHOLE}", f"{snapshot.folder}/{WHOLE}.of"
    wanted = repr([(member.part("id", kind=str), stamp_of(member)) for member in chain])
    try:
        with open(note) as file, open(path, "rb", 0) as whole:
            if file.read() == f"{wanted} {memory_stamp(whole.fileno())}":
                return path
    except OSError:
        pass
    fresh = f"{path}.{os.getpid()}"
    try:
        lay_out(chain, size, fresh)
        os.chmod(fresh, 0o400)
        with open(fresh, "rb", 0) as whole:
            text = f"{wanted} {memory_stamp(whole.fileno())}"
        os.rename(fresh, path)
        with open(f"{note}.{os.getpid()}", "w") as file:
            file.write(text)
        os.rename(f"{note}.{os.getpid()}", note)
    except OSError as error:
        try:
            os.unlink(fresh)
        except OSError:
            pass
        raise SnapshotError(MEMORY, f"laying the differences out in {path}: {os.strerror(error.errno or 0)}",
                            "make room, or `pyhv snapshot merge` to another place") from None
    return path


def path_of(member: Snapshot) -> str:
    """Its own memory file; one that is packed is unpacked."""
    if not member.part("memory").get("packed"):
        return member.memory_path
    from hv.snapshot.pack import plain_memory

    return plain_memory(member)


def stamp_of(member: Snapshot) -> dict[str, Any]:
    """The memory file's stamp as it is now. SnapshotError where there is none."""
    try:
        with open(path_of(member), "rb", 0) as file:
            return memory_stamp(file.fileno())
    except OSError as error:
        raise SnapshotError(MEMORY, f"{member.memory_path}: {os.strerror(error.errno or 0)}",
                            "the snapshot is incomplete") from None


def lay_out(chain: list[Snapshot], size: int, path: str) -> None:
    """The memory of the last of `chain` as one sparse file at `path`."""
    with open(path, "wb", 0) as out:
        os.ftruncate(out.fileno(), size)
        for member in chain:
            if stamp_of(member)["size"] != size:
                raise SnapshotError(MEMORY, f"{member.memory_path} is not {size} bytes", "the file was cut, or swapped")
            with open(path_of(member), "rb", 0) as file:
                if member.state.get("parent") is None:
                    copy_data(file.fileno(), out.fileno(), 0, size, 0)
                    continue
                for first, end in member.runs("pages", size):
                    # what was something before may be zeros now
                    copy_sparse(file.fileno(), first, out.fileno(), first, end - first, over=True)


def merge(snapshot: Snapshot, folder: str) -> str:
    """A snapshot of its own, in `folder`, of the difference `snapshot`; its id. Those it rests on may go then."""
    from shutil import copytree

    from hv.snapshot.save import discard, finish, make_fresh

    size = snapshot.number("config", "memory", high=1 << 52)
    fresh = make_fresh(folder)
    try:
        lay_out(chain_of(snapshot), size, f"{fresh}/{MEMORY}")
        if os.path.isdir(f"{snapshot.folder}/{DISKS}"):
            copytree(f"{snapshot.folder}/{DISKS}", f"{fresh}/{DISKS}")
        state = dict(snapshot.state) | {"parent": None, "id": os.urandom(16).hex()}
        state.pop("pages", None)
        finish(fresh, folder, state)
    except BaseException:
        discard(fresh)
        raise
    return str(state["id"])
