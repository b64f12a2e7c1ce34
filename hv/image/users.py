"""Which instances use which images: a file users/HEX/NAME for each, HEX the image ID; it holds the manifest's digest.

hv/image/store.py has the interface. Driven by tests/unit/test_image_store.py.
"""

from __future__ import annotations

__all__ = ["forget", "listed", "note"]

import os

from hv.errors import ImageError
from hv.image.files import reading, said
from hv.image.reference import is_digest, is_hex

_TRIES = 1000


def note(root: str, image_id: str, user: str, digest: str, temporary: str) -> None:
    """`user` uses the image. `temporary`: a new path in tmp/."""
    folder, user = f"{root}/users/{image_id[7:]}", _plain(user)
    try:
        with open(temporary, "xb") as file:
            file.write(digest.encode())
        for left in reversed(range(_TRIES)):
            try:
                os.makedirs(folder, exist_ok=True)
                os.rename(temporary, f"{folder}/{user}")
                return
            except (FileNotFoundError, FileExistsError):
                if not left:
                    raise           # else the last other user has just gone, and the folder with it
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise said(error, f"noting that {user} uses an image") from None


def forget(root: str, name: str, user: str) -> None:
    """`user` no longer uses the image whose ID ends in `name`."""
    folder = f"{root}/users/{name}"
    try:
        os.unlink(f"{folder}/{_plain(user)}")
    except OSError:
        pass        # it was not noted
    try:
        os.rmdir(folder)
    except OSError:
        pass        # others use it


def listed(root: str) -> dict[str, dict[str, str]]:
    """Image ID to {user: digest}."""
    found: dict[str, dict[str, str]] = {}
    for name in _names(f"{root}/users"):
        if not is_hex(name):
            continue
        for user in _names(f"{root}/users/{name}"):
            held = str(reading(f"{root}/users/{name}/{user}", 100) or b"", "ascii", "replace")
            found.setdefault("sha256:" + name, {})[user] = held if is_digest(held) else ""
    return found


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _plain(user: str) -> str:
    if not user or user[0] == "." or "/" in user or "\0" in user or len(user) > 200:
        raise ImageError(f"{user[:50]!r} can't be an instance's name")
    return user
