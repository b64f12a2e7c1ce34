"""Where `pyhv` starts: `boot` and `snapshot restore` take fast paths, so do the verbs of instances (`run`, `ps`, ...);
`oci` is the runtime, all else is click's."""

from __future__ import annotations

__all__ = ["main"]

import _signal
import os

from hv.cli.say import say
from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket


def main(arguments: list[str], maker: tuple[int, socket] | None = None) -> int:
    """Run the command line `arguments` (without the program's name) and return the exit code. `maker`: as start()."""
    try:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)     # bin/pyhv made it end the process silently
        if arguments[:1] == ["boot"]:
            from hv.cli.boot import OPTIONS, boot
            from hv.cli.options import parse

            parsed = parse(arguments[1:], OPTIONS, 1)
            if parsed is not None:
                return boot(parsed[0], parsed[1][0] if parsed[1] else None)
        if arguments[:2] == ["snapshot", "restore"]:
            from hv.cli.options import parse
            from hv.cli.restore import RESTORE_OPTIONS, restore

            parsed = parse(arguments[2:], RESTORE_OPTIONS, 1)
            if parsed is not None and parsed[1]:
                return restore(parsed[0], parsed[1][0])
        if arguments[:1] == ["oci"]:
            from hv.cli.oci import main as runtime

            return runtime(arguments[1:])
        from hv.cli.verbs import VERBS, run_verb

        if arguments[:1] and arguments[0] in VERBS:
            return run_verb(arguments, maker)
        from hv.cli.full import run

        return run(arguments)
    except HvError as error:
        return report(error, debug="--debug" in arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def report(error: HvError, debug: bool = False) -> int:
    """Print `error` as one line with what to do next; its exit code."""
    text = f"pyhv: {error}"
    if error.hint:
        text += f" - {error.hint}"
    say(text)
    if debug:
        raise error
    return error.exit_code
