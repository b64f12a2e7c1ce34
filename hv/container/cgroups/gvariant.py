"""Values in GVariant's text format, for the annotations org.systemd.property.NAME (runc, docs/systemd.md).

    parse("uint64 100")     ("t", 100)
    parse("['a', 'b']")     ("as", ["a", "b"])

Strings, numbers, booleans, arrays, tuples; a type before a value by keyword or @signature. Left out: dictionaries,
variants, maybes, byte strings: no property of a scope needs them. Driven by tests/unit/test_cgroups_gvariant.py.
"""

from __future__ import annotations

__all__ = ["parse"]

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# GVariant Text Format, Type Annotations; the letters are D-Bus's
_KEYWORDS = {"boolean": "b", "byte": "y", "int16": "n", "uint16": "q", "int32": "i", "uint32": "u", "int64": "x",
             "uint64": "t", "double": "d", "string": "s", "objectpath": "o", "signature": "g"}
_RANGES = {"y": (0, 8), "n": (1, 16), "q": (0, 16), "i": (1, 32), "u": (0, 32), "x": (1, 64), "t": (0, 64)}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._")
_DEEPEST = 8
_LONGEST = 4096


def parse(text: str, where: str = "value") -> tuple[str, Any]:
    """(signature, value). ConfigError names `where`."""
    if len(text) > _LONGEST:
        raise ConfigError(f"{where}: {len(text)} characters", f"at most {_LONGEST}")
    try:
        reader = _Reader(text)
        found = reader.value("", 0)
        if reader.peek():
            raise ValueError(f"what is {text[reader.at:]!r:.40} after the value")
        return found
    except ValueError as error:
        raise ConfigError(f"{where} {text!r:.60}: {error}", "for example: uint64 5, true, 'text'") from None


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at:self.at + 1]

    def take(self, wanted: str) -> bool:
        if self.peek() == wanted:
            self.at += 1
            return True
        return False

    def word(self, letters: frozenset[str] = _WORD) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] in letters:
            self.at += 1
        return self.text[start:self.at]

    def value(self, kind: str, depth: int) -> tuple[str, Any]:
        """A value of `kind`, or of its own where that is ""."""
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        first = self.peek()
        if first in ("'", '"') and first:
            return self._is(kind, "sog", "s"), self.string(first)
        if first == "[":
            return self.read_array(kind, depth)
        if first == "(":
            return self.read_tuple(kind, depth)
        if first == "@":
            self.at += 1
            named = self.word(frozenset("ybnqiuxtdsoga()"))
            return self.value(_same(kind, named), depth)
        word = self.word()
        if word in _KEYWORDS:
            return self.value(_same(kind, _KEYWORDS[word]), depth)
        if word in ("true", "false"):
            return self._is(kind, "b", "b"), word == "true"
        return self.number(word, kind)

    @staticmethod
    def _is(kind: str, allowed: str, default: str) -> str:
        if kind and (len(kind) > 1 or kind not in allowed):
            raise ValueError(f"not of type {kind}")
        return kind or default

    def string(self, quote: str) -> str:
        self.at += 1
        out: list[str] = []
        while True:
            letter = self.text[self.at:self.at + 1]
            self.at += 1
            if letter == quote:
                return "".join(out)
            if letter == "\\":
                letter = self.text[self.at:self.at + 1]
                self.at += 1
                if letter in ("u", "U"):
                    digits = self.text[self.at:self.at + (4 if letter == "u" else 8)]
                    self.at += len(digits)
                    letter = chr(int(digits, 16))
                    if "\ud800" <= letter <= "\udfff":
                        raise ValueError("half a character")
                else:
                    letter = _ESCAPES.get(letter, letter)
            if not letter:
                raise ValueError("a string that does not end")
            if letter == "\0":
                raise ValueError("a NUL byte")
            out.append(letter)

    def read_array(self, kind: str, depth: int) -> tuple[str, Any]:
        if kind and kind[0] != "a":
            raise ValueError(f"not of type {kind}")
        self.at += 1
        items: list[Any] = []
        inner = kind[1:]
        if not self.take("]"):
            while True:
                inner, item = self.value(inner, depth + 1)
                items.append(item)
                if self.take("]"):
                    break
                if not self.take(","):
                    raise ValueError("an array that does not end")
        if not inner:
            raise ValueError("an empty array needs its type, as in @as []")
        return f"a{inner}", items

    def read_tuple(self, kind: str, depth: int) -> tuple[str, Any]:
        self.at += 1
        parts = _parts(kind[1:-1]) if kind else []
        if kind and (kind[0] != "(" or kind[-1] != ")"):
            raise ValueError(f"not of type {kind}")
        found: list[str] = []
        items: list[Any] = []
        while not self.take(")"):
            wanted = parts[len(items)] if kind and len(items) < len(parts) else ""
            inner, item = self.value(wanted, depth + 1)
            found.append(inner)
            items.append(item)
            if not self.take(",") and self.peek() != ")":
                raise ValueError("a tuple that does not end")
        made = f"({''.join(found)})"
        if not items or (kind and made != kind):
            raise ValueError(f"not of type {kind}" if kind else "an empty tuple")
        return made, tuple(items)

    def number(self, word: str, kind: str) -> tuple[str, Any]:
        plain = word.lstrip("+-")
        if not plain or not plain[0].isdecimal() or "_" in word:
            raise ValueError("not a value")
        kind = self._is(kind, "ynqiuxtd", "d" if "." in word or ("e" in word and "x" not in word) else "i")
        if kind == "d":
            return kind, float(word)
        number = int(word, 16 if plain[:2].lower() == "0x" else 10)
        signed, bits = _RANGES[kind]
        if not (-(1 << bits - 1) * signed <= number < 1 << bits - signed):
            raise ValueError(f"out of the range of type {kind}")
        return kind, number


def _same(kind: str, named: str) -> str:
    """The signature `named`, which must be one whole type, and `kind` where that is known."""
    if len(_parts(named)) != 1:
        raise ValueError(f"no type {named!r:.20}")
    if kind and kind != named:
        raise ValueError(f"not of type {kind}")
    return named


def _parts(signature: str) -> list[str]:
    """A signature's single types."""
    parts: list[str] = []
    start = depth = 0
    for index, letter in enumerate(signature):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            raise ValueError(f"no type {signature!r:.20}")
        if letter != "a" and depth == 0:
            parts.append(signature[start:index + 1])
            start = index + 1
    if start != len(signature) or "()" in signature:
        raise ValueError(f"no type {signature!r:.20}")
    return parts
