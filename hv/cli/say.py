"""Messages to the user, on standard error, which may be gone."""

from __future__ import annotations

__all__ = ["say"]

import sys


def say(text: str) -> None:
    """Print a line (or several). Nobody is there to read it? Then the exit code must do."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
