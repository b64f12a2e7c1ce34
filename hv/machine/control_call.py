"""A request to a control socket: read, checked, under way, answered (docs/control.md is the protocol).

A command is a function: it gets the Call first, then the request's fields as keyword-only parameters, whose annotations
(bool, int, float, str, or one of them and None) are checked before it is called. It runs in the machine's loop and
returns

    a dict          the reply
    None            the reply comes later, by call.answer()
    a generator     for what takes long: it runs in a thread of its own; each dict it yields is a line of progress, what
                    it returns is the reply; it is closed where it yields next once the client has hung up

An exception is a reply, too. Driven by tests/unit/test_control.py and
tests/unit/test_control_long.py.
"""

from __future__ import annotations

__all__ = ["Call", "fields_of", "parse", "signature"]

from _thread import allocate_lock, start_new_thread

from hv.errors import ConfigError, HvError
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Generator
    from typing import Any

    from hv.machine.control_client import Client
    from hv.machine.machine import Machine

    Reply = dict[str, Any]

ENDED = {"ok": False, "error": "the machine has ended"}
_ID_MOST = 128
_KINDS = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_TOLD = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}


class Call:
    """A request under way. `cancelled` turns true when the client has hung up or the machine ends."""

    def __init__(self, machine: Machine, client: Client) -> None:
        self.machine = machine
        self.client = client
        self.id: object = None
        self.cancelled = False
        self.final = b""            # the line that ends it, once there is one
        self.on_end: Callable[[], Reply] | None = None      # the reply of one that still waits when the machine ends

    # for commands ----------------------------------------------------------------------------------

    def answer(self, reply: Reply) -> None:
        """The reply. Safe from any thread."""
        self._finish(self._line({"ok": True} | reply))

    def fail(self, error: Exception) -> None:
        """The reply where it went wrong. Safe from any thread."""
        if isinstance(error, HvError):
            told = {"error": str(error)} | ({"hint": error.hint} if error.hint else {})
        else:
            told = {"error": f"{type(error).__name__}: {error}", "hint": "a bug of pyhv's"}
        self._finish(self._line({"ok": False} | told))

    def progress(self, news: Reply) -> None:
        """A line before the reply. Safe from any thread; one that nobody reads is dropped."""
        self.client.say(self._line(news), droppable=True)

    # for the server --------------------------------------------------------------------------------

    def work(self, steps: Generator[Reply, None, Reply | None]) -> LockType:
        """Run a generator in a thread; the lock is held as long as it runs."""
        running = allocate_lock()
        running.acquire()
        start_new_thread(self._work, (steps, running))
        return running

    def at_end(self) -> bytes:
        """The last line, when the machine has ended."""
        return self.final or self._line({"ok": True} | (ENDED if self.on_end is None else self.on_end()))

    def accept_line(self, reply: Reply) -> bytes:
        """The reply behind which the connection is the console."""
        return self._line({"ok": True} | reply)

    def _work(self, steps: Generator[Reply, None, Reply | None], running: LockType) -> None:
        import _signal

        try:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
            while not self.cancelled:
                self.progress(next(steps))
            steps.close()
            self.answer(ENDED)
        except StopIteration as stop:
            self.answer(stop.value or {})
        except Exception as error:
            self.fail(error)
        finally:
            running.release()

    def _finish(self, line: bytes) -> None:
        self.final = line
        self.machine.loop.call(lambda: self.client.finished(self))

    def _line(self, fields: Reply) -> bytes:
        return dumps({"id": self.id} | fields).encode() + b"\n"


def parse(line: bytes) -> Reply:
    """The request that `line` is; ConfigError otherwise."""
    example = 'a request is one line, such as {"command": "status"}'
    try:
        request = loads(line.decode())
    except ValueError as error:
        raise ConfigError(f"no JSON: {error}", example) from None
    if not isinstance(request, dict):
        raise ConfigError("the request is no object", example)
    number = request.get("id")
    if not (number is None or (isinstance(number, str) and len(number) <= _ID_MOST)
            or (isinstance(number, int) and abs(number) < 1 << 63)):
        raise ConfigError("the id is neither a number nor a short string", f"up to {_ID_MOST} characters")
    return request


def fields_of(function: Callable[..., Any], request: Reply) -> Reply:
    """The request's fields, as `function` wants them; ConfigError names one that is wrong."""
    known = signature(function)
    command = request["command"]
    fields = {key: value for key, value in request.items() if key not in ("id", "command")}
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"{command}: unknown field {key!r:.80}", f"its fields: {', '.join(known) or 'none'}")
        kind = known[key]
        if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{command}: {key} is not {_TOLD[kind]}: {value!r:.80}")
    for key, kind in known.items():
        if key not in fields and key not in (function.__kwdefaults__ or {}):
            raise ConfigError(f"{command}: the field {key!r} is missing", f"it is {_TOLD[kind]}")
    return fields


def signature(function: Callable[..., Any]) -> dict[str, str]:
    """A command's fields and their kinds: bool, int, float or str."""
    code = function.__code__
    names = code.co_varnames[code.co_argcount:code.co_argcount + code.co_kwonlyargcount]
    return {name: str(function.__annotations__[name]).removesuffix(" | None") for name in names}
