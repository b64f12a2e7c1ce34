"""`--filter` of `pyhv image ls` and `prune`, named as docker and podman name them.

dangling=true|false, label=KEY[=VALUE], label!=KEY[=VALUE], reference=PATTERN, before=IMAGE, since=IMAGE, until=WHEN
(a time, or how long ago: 24h, 1h30m). Driven by tests/unit/test_image_filters.py.
"""

from __future__ import annotations

__all__ = ["created", "matcher", "moment"]

import fnmatch
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime

from hv.errors import ConfigError
from hv.image.image import Image
from hv.image.reference import Reference
from hv.image.store import Store

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|[smhdw]))+")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhdw])")

Filter = Callable[[str, Image], bool]


def created(image: Image) -> float:
    """When the image was made, in seconds since 1970; 0 where it doesn't say, or says nonsense."""
    try:
        return max(datetime.fromisoformat(image.config.created).timestamp(), 0.0)
    except (ValueError, OverflowError, OSError):
        return 0.0


def matcher(filters: Iterable[str], store: Store, allowed: Iterable[str]) -> Filter:
    """What (name, image) must be like to pass all `filters`; ConfigError for one that is not understood."""
    tests = [_test(text, store, set(allowed)) for text in filters]
    return lambda name, image: all(test(name, image) for test in tests)


def _test(text: str, store: Store, allowed: set[str]) -> Filter:
    key, equals, value = text.partition("=")
    negated = key.endswith("!")
    key = key.removesuffix("!")
    if key not in allowed or not equals or (negated and key != "label"):
        raise ConfigError(f"--filter {text!r}: not understood", f"there are {', '.join(sorted(allowed))}, with =VALUE")
    if key == "dangling":
        if value not in ("true", "false", "1", "0"):
            raise ConfigError(f"--filter {text!r}: is neither true nor false")
        wanted = value in ("true", "1")
        return lambda name, image: (not name) == wanted
    if key == "label":
        label, has_value, content = value.partition("=")
        return lambda name, image: negated != (label in image.config.labels and (
            not has_value or image.config.labels[label] == content))
    if key == "reference":
        return lambda name, image: bool(name) and _named_so(Reference.parse(name), value)
    if key == "until":
        end = moment(value)
        return lambda name, image: created(image) < end
    other = created(store.resolve(value))
    return lambda name, image: created(image) < other if key == "before" else created(image) > other


def _named_so(reference: Reference, pattern: str) -> bool:
    names = {str(reference), reference.familiar(), reference.name, reference.familiar_name()}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def moment(text: str) -> float:
    """A point in time: seconds since 1970, RFC 3339, or how long ago (Go's durations, and d and w)."""
    if _DURATION.fullmatch(text):
        return time.time() - sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    try:
        return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(f"until={text}: is no time",
                          "write 24h, 2024-05-06T07:08:09Z or seconds since 1970") from None
