"""Messages to the user, on standard error, which may be gone."""

from __future__ import annotations

__all__ = ["say", "say_error"]

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.errors import HvError


def say(text: str) -> None:
    """Print a line (or several). Nobody is there to read it? Then the exit code must do."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def say_error(error: HvError) -> None:
    """What went wrong and what to do next, in a line."""
    say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
