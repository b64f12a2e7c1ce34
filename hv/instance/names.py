"""IDs, and names for those who give none: an adjective and a noun. Driven by tests/unit/test_instance_values.py."""

from __future__ import annotations

__all__ = ["ID_LENGTH", "SHORT", "check_name", "is_id_prefix", "new_id", "new_name"]

import os

from hv.errors import ConfigError

ID_LENGTH = 32          # hexadecimal digits; paths of Unix sockets (107 bytes) have an ID in them
SHORT = 12              # as `ps` shows it
_NAME_MOST = 128
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_REST = _FIRST | frozenset("_.-")

_ADJECTIVES = """
    amber ancient autumn blue bold brave breezy brisk calm clear clever cosy crimson curious daring dawn deep early
    eager gentle golden grand green happy hidden humble icy jolly keen kind late lively lucky merry misty mossy
    noble patient polite proud quick quiet rapid rosy royal rustic silent silver sleepy smooth snowy solid spring
    steady still summer sunny swift tall tidy warm wild winter wise witty young
"""
_NOUNS = """
    acorn badger beacon birch breeze brook canyon cedar cliff clover comet coral crane creek delta dune ember falcon
    fern finch fjord forest fox garden glacier grove harbor hare hawk heron hill island ivy lagoon lake lark leaf
    lily lynx maple marsh meadow moon moss oak ocean orchard otter owl pebble pine plum pond raven reef ridge river
    robin rose sage shell shore sparrow star stone stream sun swan thicket thrush tide trail valley violet wave
    willow wolf wren
"""


def new_id() -> str:
    """An ID that nobody has."""
    return os.urandom(ID_LENGTH // 2).hex()


def new_name() -> str:
    """A name that perhaps somebody has: then ask again."""
    first, second, third = os.urandom(3)
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    adjective = adjectives[(first << 8 | third) % len(adjectives)]
    return f"{adjective}_{nouns[(second << 8 | third) % len(nouns)]}"


def check_name(name: str) -> str:
    """`name`, which a person chose for an instance."""
    if not 2 <= len(name) <= _NAME_MOST or name[0] not in _FIRST or not _REST.issuperset(name):
        raise ConfigError(f"--name {name!r:.80}", "letters, digits, _ . - and a letter or digit first; two at least")
    return name


def is_id_prefix(text: str) -> bool:
    """Whether this may be the beginning of an ID."""
    return 0 < len(text) <= ID_LENGTH and not text.strip("0123456789abcdef")
