"""Who `-u NAME[:GROUP]` and an image's user are: looked up in the instance's own /etc/passwd and /etc/group.

Files are opened below the instance's root by openat2(2), so no link of the image leads out; they are the image's text,
so bounded and read with patience for nonsense. Driven by tests/unit/test_instance_users.py.
"""

from __future__ import annotations

__all__ = ["User", "find_user"]

from hv.errors import ConfigError
from hv.linux.mount import read_file_in

_FILE_MOST = 4 << 20
_ID_MOST = (1 << 32) - 2


class User:
    """uid, gid and the other groups of a process."""

    __slots__ = ("gid", "groups", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int]) -> None:
        self.uid, self.gid, self.groups = uid, gid, groups


def find_user(root: int, text: str, more: list[str]) -> User:
    """The user of `text`, NAME|UID[:GROUP|GID]; `more`: groups beside the user's own. `root`: descriptor of its root.

    ConfigError where a name is not there.
    """
    word, colon, group = text.partition(":")
    if not more and word in ("", "0") and (not colon or group == "0"):
        return User(0, 0, _memberships(root, "root") if not colon else [])
    rows = _rows(root, "/etc/passwd", 7)
    number = _number(word or "0")
    row = next((row for row in rows if row[0] == word), None) or next(
        (row for row in rows if number >= 0 and _number(row[2]) == number), None)
    if row is None and number < 0:
        raise ConfigError(f"-u {text!r:.80}: no user {word!r:.60} in the image's /etc/passwd", "a number needs no name")
    uid = number if row is None else _number(row[2])
    gid = 0 if row is None else max(_number(row[3]), 0)
    if uid < 0:
        raise ConfigError(f"-u {text!r:.80}: the image's /etc/passwd has no number for it")
    groups = _memberships(root, row[0]) if row is not None and not colon else []
    if colon:
        gid = _group(root, group, f"-u {text!r:.80}")
    groups += [_group(root, name, f"--group-add {name!r:.60}") for name in more]
    return User(uid, gid, [found for found in dict.fromkeys(groups) if found != gid])


def _group(root: int, word: str, option: str) -> int:
    number = _number(word)
    for row in _rows(root, "/etc/group", 3):
        if row[0] == word and _number(row[2]) >= 0:
            return _number(row[2])
    if number < 0:
        raise ConfigError(f"{option}: no group {word!r:.60} in the image's /etc/group", "a number needs no name")
    return number


def _memberships(root: int, name: str) -> list[int]:
    return [_number(row[2]) for row in _rows(root, "/etc/group", 4)
            if name in row[3].split(",") and _number(row[2]) >= 0]


def _number(word: str) -> int:
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 11 and int(word) <= _ID_MOST else -1


def _rows(root: int, path: str, fields: int) -> list[list[str]]:
    """The lines of a file of the image with that many fields at least; none where it can't be read."""
    text = read_file_in(root, path, _FILE_MOST)
    rows = [line.split(":") for line in text.decode("utf-8", "surrogateescape").split("\n")]
    return [row for row in rows if len(row) >= fields]
