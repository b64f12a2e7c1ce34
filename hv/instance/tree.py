"""Removing a folder that an instance has filled: as deep and as wide as it liked, with links, sockets and devices.

By descriptor, one folder at a time, so that no link is followed and depth costs no recursion (shutil is 10 ms of
imports on the way of every `pyhv run --rm`). Driven by tests/unit/test_instance_record.py.
"""

from __future__ import annotations

__all__ = ["remove"]

import os

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(path: str) -> None:
    """Remove the folder at `path` and all that is in it. OSError."""
    above, _, leaf = path.rpartition("/")
    base = os.open(above or "/", _FOLDER & ~os.O_NOFOLLOW)
    try:
        _remove_in(base, leaf)
    finally:
        os.close(base)


def _remove_in(base: int, leaf: str) -> None:
    """Down into the next folder there is, and up again once one is empty; only two descriptors are held."""
    names, waiting = [leaf], []
    here = os.open(leaf, _FOLDER, dir_fd=base)
    try:
        waiting.append(_empty(here))
        while names:
            if waiting[-1]:
                below = waiting[-1].pop()
                inner = os.open(below, _FOLDER, dir_fd=here)
                os.close(here)
                here = inner
                names.append(below)
                waiting.append(_empty(here))
                continue
            last = names.pop()
            waiting.pop()
            if not names:
                os.rmdir(last, dir_fd=base)
                return
            outer = os.open("..", _FOLDER, dir_fd=here)
            os.close(here)
            here = outer
            os.rmdir(last, dir_fd=here)
    finally:
        os.close(here)


def _empty(folder: int) -> list[str]:
    """Remove what is in the open folder but for folders that are not empty; their names."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                try:
                    os.rmdir(entry.name, dir_fd=folder)
                except OSError:
                    found.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return found
