"""`features`: what this runtime can do, as JSON (hv/container/features.py).

Driven by tests/root/test_container_commands.py.
"""

from __future__ import annotations

__all__ = ["command_features"]

from hv import __version__
from hv.cli.oci import Context, parse
from hv.container.features import features
from hv.errors import ConfigError
from hv.plainjson import dumps


def command_features(context: Context, arguments: list[str]) -> int:
    """features"""
    _, words = parse(arguments, {}, usage="usage: pyhv-runtime features")
    if words:
        raise ConfigError(f"features: {words[0]!r}: it takes no arguments")
    print(dumps(features(__version__), 4))
    return 0
