"""A talk with systemd over D-Bus: units made of processes, changed, ended (man 5 org.freedesktop.systemd1).

    with Bus(user=False) as bus:
        bus.start("box.scope", [("PIDs", ("au", [pid]))])

systemd's own socket comes first, as systemctl has it: it works where no bus daemon runs. Then the system's or the
user's bus. Messages are jeepney's; the socket, and how long we wait, are ours. Left out: descriptors in messages,
machines other than this. Driven by tests/unit/test_cgroups_bus.py and tests/root/test_cgroups_systemd.py.
"""

from __future__ import annotations

__all__ = ["Bus", "BusError", "outer_uid"]

import os
from _socket import AF_UNIX, SO_PEERCRED, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from _socket import timeout as TimedOut
from time import monotonic

from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Property = tuple[str, tuple[str, Any]]      # a name; a signature and a value (D-Bus specification, Type System)

_NAME, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
_DAEMON = "org.freedesktop.DBus"
_JOB_SECONDS = 30.0             # for systemd to have made or ended a unit
_REPLY_SECONDS = 30.0
_CREDENTIALS = 12               # struct ucred, man 7 unix
_LINE_MOST = 4096               # of the other side's words before messages begin
_CGROUPFS = "set the engine's cgroup manager to cgroupfs"


class BusError(HvError):
    """systemd said no; `name` is the error's (NoSuchUnit, UnitExists, ...), without what all have in front."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"systemd: {text or name}")
        self.name = name.rpartition(".")[2]


class Bus:
    """A connection to the system's manager, or with `user` to that of this user. A context manager."""

    def __init__(self, user: bool) -> None:
        try:
            from jeepney import Parser
        except ImportError:
            raise ConfigError("--systemd-cgroup: the Python package jeepney is missing",
                              f"pip install jeepney, or {_CGROUPFS}") from None
        self._parser = Parser()
        self._serial = 0
        self._ended: dict[str, str] = {}        # job -> its result, as far as we have been told
        self._socket = self._connect(user)

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    # connecting ------------------------------------------------------------------------------------

    def _connect(self, user: bool) -> socket:
        first = ""
        for path, daemon in addresses(user):
            end = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
            try:
                end.settimeout(_REPLY_SECONDS)
                end.connect(path)
                _authenticate(end)
                _same_pid_namespace(end)
                self._socket = end
                if daemon:
                    self._greet()
                return end
            except (OSError, BusError) as error:
                end.close()
                first = first or f"{path}: {getattr(error, 'strerror', '') or error}"
            except BaseException:
                end.close()
                raise
        raise HvError(f"--systemd-cgroup: systemd{' (of this user)' if user else ''} can't be reached: {first}",
                      f"is it running? else {_CGROUPFS}")

    def _greet(self) -> None:
        """What a bus daemon wants before it passes anything on."""
        self._call(_DAEMON, "/org/freedesktop/DBus", _DAEMON, "Hello")
        self._call(_DAEMON, "/org/freedesktop/DBus", _DAEMON, "AddMatch", "s",
                   (f"type='signal',sender='{_NAME}',interface='{_MANAGER}',member='JobRemoved'",))
        self.manager("Subscribe")

    # calls -----------------------------------------------------------------------------------------

    def manager(self, method: str, signature: str = "", *arguments: Any) -> tuple[Any, ...]:
        """Call a method of the manager."""
        return self._call(_NAME, _PATH, _MANAGER, method, signature, arguments)

    def property(self, name: str) -> Any:
        """A property of the manager."""
        return self._get(_PATH, _MANAGER, name)

    def unit_state(self, unit: str) -> str:
        """ActiveState of a unit: active, failed, ...; "" where there is no such unit."""
        try:
            path, = self.manager("GetUnit", "s", unit)
            return str(self._get(path, f"{_NAME}.Unit", "ActiveState"))
        except BusError as error:
            if error.name in ("NoSuchUnit", "UnknownObject"):
                return ""
            raise

    def _get(self, path: str, interface: str, name: str) -> Any:
        (_, value), = self._call(_NAME, path, "org.freedesktop.DBus.Properties", "Get", "ss", (interface, name))
        return value

    def start(self, unit: str, properties: list[Property]) -> None:
        """Make a transient unit, and wait until it is there."""
        job, = self.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "replace", properties, [])
        result = self._wait(job)
        if result != "done":
            raise HvError(f"systemd did not start {unit}: {result}", "its journal says why")

    def stop(self, unit: str) -> None:
        """End a unit, and have it forgotten where it failed. Nothing happens where there is none."""
        try:
            job, = self.manager("StopUnit", "ss", unit, "replace")
            self._wait(job)
        except BusError as error:
            if error.name != "NoSuchUnit":
                raise
        self.reset(unit)

    def reset(self, unit: str) -> None:
        """Have systemd forget a unit that failed, if there is one."""
        try:
            self.manager("ResetFailedUnit", "s", unit)
        except BusError as error:
            if error.name != "NoSuchUnit":
                raise

    def change(self, unit: str, properties: list[Property]) -> None:
        """Set properties of a unit until it ends."""
        self.manager("SetUnitProperties", "sba(sv)", unit, True, properties)

    def attach(self, unit: str, below: str, pid: int) -> None:
        """Move a process into a unit's group, or the one `below` it."""
        self.manager("AttachProcessesToUnit", "ssau", unit, below, [pid])

    # messages --------------------------------------------------------------------------------------

    def _call(self, name: str, path: str, interface: str, method: str, signature: str = "",
              arguments: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call

        message = new_method_call(DBusAddress(path, name, interface), method, signature or None, arguments)
        self._serial += 1
        end = monotonic() + _REPLY_SECONDS
        try:
            self._socket.sendall(message.serialise(serial=self._serial))
        except ValueError as error:     # an annotation's: an object path is more than a string
            raise ConfigError(f"systemd: {method}: {error}") from None
        except OSError as error:
            raise HvError(f"systemd: {method}: {os.strerror(error.errno or 0)}") from None
        while True:
            reply = self._receive(end, method)
            if reply.header.fields.get(HeaderFields.reply_serial) == self._serial:
                break
        if reply.header.message_type is MessageType.error:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise BusError(str(reply.header.fields.get(HeaderFields.error_name, "")), " ".join(text.split()))
        return tuple(reply.body)

    def _receive(self, end: float, what: str) -> Any:
        """The next message; word of a job's end is kept."""
        from jeepney import HeaderFields, MessageType

        while (message := self._parser.get_next_message()) is None:
            self._socket.settimeout(max(end - monotonic(), 0.001))
            try:
                data = self._socket.recv(1 << 16)
            except TimedOut:
                raise HvError(f"systemd does not answer: {what}", "`systemctl status` shows how it is") from None
            except OSError as error:
                raise HvError(f"systemd: {what}: {os.strerror(error.errno or 0)}") from None
            if not data:
                raise HvError(f"systemd hung up: {what}", "`systemctl status` shows how it is")
            self._parser.add_data(data)
        fields = message.header.fields
        if message.header.message_type is MessageType.signal and fields.get(HeaderFields.member) == "JobRemoved":
            _, job, _, result = message.body
            self._ended[job] = result
        return message

    def _wait(self, job: str) -> str:
        """The result of a job, once it has one: done, failed, canceled, timeout, dependency, skipped."""
        end = monotonic() + _JOB_SECONDS
        while job not in self._ended:
            self._receive(end, "a unit's job")
        return self._ended.pop(job)


def addresses(user: bool) -> list[tuple[str, bool]]:
    """Sockets to try in turn, and whether a bus daemon is behind them rather than systemd itself."""
    if not user:
        return [("/run/systemd/private", False), ("/run/dbus/system_bus_socket", True)]
    folder = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{outer_uid()}"
    return [(f"{folder}/systemd/private", False), (f"{folder}/bus", True)]


def outer_uid() -> int:
    """Who we are outside of our user namespace, for that is what the other side sees (man 7 user_namespaces)."""
    uid = os.geteuid()
    try:
        with open("/proc/self/uid_map", "rb", 0) as file:
            for line in file.read().splitlines():
                inside, outside, count = map(int, line.split())
                if inside <= uid < inside + count:
                    return outside + uid - inside
    except OSError:
        pass
    return uid


def _authenticate(end: socket) -> None:
    """The kernel tells the other side who we are; we only have to say the same (D-Bus specification, EXTERNAL).

    BEGIN goes with it: systemd, where it reads BEGIN together with a first message, would wait for more before that.
    """
    end.sendall(b"\0AUTH EXTERNAL " + str(outer_uid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
    answer = b""
    while not answer.endswith(b"\r\n"):
        part = end.recv(1)              # not a byte of what comes after
        if not part or len(answer) > _LINE_MOST:
            raise BusError("AuthFailed", "hung up during authentication")
        answer += part
    if not answer.startswith(b"OK "):
        raise BusError("AuthFailed", f"does not know us ({answer.decode('ascii', 'replace').strip():.60})")


def _same_pid_namespace(end: socket) -> None:
    """Process numbers mean to systemd what they mean there: it would move somebody else's."""
    pid = int.from_bytes(end.getsockopt(SOL_SOCKET, SO_PEERCRED, _CREDENTIALS)[:4], "little")
    try:
        same = pid > 0 and os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        same = pid > 0                  # not ours to look at
    if not same:
        raise ConfigError("--systemd-cgroup: systemd runs in another pid namespace", _CGROUPFS)
