"""A terminal in raw mode, and back: every key is a byte for the other side, Ctrl-C included (man 3 termios).

Driven by tests/kvm/test_terminal.py and tests/kvm/test_control.py.
"""

from __future__ import annotations

__all__ = ["restore", "set_raw"]

import termios

IFLAG, OFLAG, CFLAG, LFLAG = 0, 1, 2, 3         # what tcgetattr returns


def set_raw(fd: int) -> list[object]:
    """Put the terminal `fd` in raw mode; what restore() needs."""
    saved = termios.tcgetattr(fd)
    mode = termios.tcgetattr(fd)
    mode[IFLAG] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
    mode[OFLAG] &= ~termios.OPOST
    mode[CFLAG] = mode[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    mode[LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    termios.tcsetattr(fd, termios.TCSADRAIN, mode)
    return saved


def restore(fd: int, saved: list[object]) -> None:
    """As it was before set_raw(); a terminal that is gone needs nothing."""
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
    except termios.error:
        pass
