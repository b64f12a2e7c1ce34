"""Times as instances keep them (RFC 3339, UTC), and as people are told them.

Driven by tests/unit/test_instance_values.py.
"""

from __future__ import annotations

__all__ = ["ago", "lasted", "seconds", "since"]

from time import time

from hv.errors import ConfigError

_DAYS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
_STEPS = ((60, "second", 1), (3600, "minute", 60), (86400, "hour", 3600), (14 * 86400, "day", 86400),
          (60 * 86400, "week", 7 * 86400), (730 * 86400, "month", 30 * 86400))


def seconds(text: str) -> float:
    """Seconds since 1970. ValueError."""
    date, _, clock = text.rstrip("Z").partition("T")
    year, month, day = (int(word) for word in date.split("-"))
    hour, minute, second = clock.split(":") if clock else ("0", "0", "0")
    if not 1 <= month <= 12:
        raise ValueError(text)
    leaps = (year - (month < 3)) // 4 - (year - (month < 3)) // 100 + (year - (month < 3)) // 400 - 477
    days = (year - 1970) * 365 + leaps + _DAYS[month - 1] + day - 1
    return days * 86400 + int(hour) * 3600 + int(minute) * 60 + float(second)


def lasted(length: float) -> str:
    """A length of time in one word and a number."""
    if length < 1:
        return "less than a second"
    for most, word, unit in _STEPS:
        if length < most:
            count = int(length // unit)
            return f"{count} {word}{'s' if count != 1 else ''}"
    return f"{int(length // (365 * 86400))} years"


def ago(text: str) -> str:
    """How long since."""
    try:
        return f"{lasted(time() - seconds(text))} ago"
    except ValueError:
        return ""


def since(text: str, option: str) -> float:
    """--since and --until: a time, seconds since 1970, or how long ago (10m, 2h)."""
    from hv.instance.values import duration

    try:
        if text[-1:] in ("s", "m", "h") and "T" not in text:
            return time() - duration(text, option)
        return float(text) if text.replace(".", "", 1).isdecimal() else seconds(text)
    except (ValueError, TypeError):
        raise ConfigError(f"{option} {text!r:.40}", "2026-01-31T10:00:00Z, seconds since 1970, or 10m") from None
