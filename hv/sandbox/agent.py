"""The guest's agent as a sandbox uses it: mounts, the root, network, statistics, processes, the end (vsock port 1).

    with GuestAgent(machine) as agent:
        agent.wait_ready(30)
        agent.mount("virtiofs", "root", "/root")
        agent.root("/root", ("dev", "proc", "sys"))

Requests of one list go together and are answered together: to an emulated guest each packet is dear. What the guest
answers is checked here for form, and hostile otherwise. Processes: hv/sandbox/process.py. docs/agent.md is the
protocol. Not for the thread of the machine's I/O loop. Driven by tests/unit/test_agent.py and
tests/kvm/test_guest_agent.py.
"""

from __future__ import annotations

__all__ = ["GuestAgent", "GuestStats", "ProcessEntry", "words"]

from time import monotonic, sleep

from hv.snapshot.agent import PATIENCE, Agent, NoAgentError, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8      # include/uapi/linux/mount.h
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 32, 4096, 8192, 16384
GRACE = 10.0                # seconds from SIGTERM to SIGKILL
LIST_SECONDS = 60.0         # each process takes an emulated guest some 30 ms
LOOK_AGAIN = 0.02           # seconds between two looks for a guest that boots
PROCESSES_MOST = 1 << 16    # of the guest's; more is no honest answer
NUMBER_MOST = (1 << 64) - 1


class GuestStats:
    """The guest as a whole. Memory in bytes, times in seconds since the boot, as /proc has them."""

    def __init__(self, fields: dict[str, list[str]]) -> None:
        self.uptime = _decimal(fields, "uptime")
        self.load = tuple(_decimal(fields, "load", at) for at in range(3))
        ticks = [_whole(fields, "cpu", at) for at in range(8)]      # user nice system idle iowait irq softirq steal
        self.cpu_user = (ticks[0] + ticks[1]) / 100                 # USER_HZ, include/asm-generic/param.h
        self.cpu_system = (ticks[2] + ticks[5] + ticks[6]) / 100
        self.cpu_idle = (ticks[3] + ticks[4]) / 100
        self.memory_total = _whole(fields, "memory", 0) << 10
        self.memory_free = _whole(fields, "memory", 1) << 10
        self.memory_available = _whole(fields, "memory", 2) << 10
        self.processes = _whole(fields, "processes")


class ProcessEntry:
    """One process of the guest. `cpu` in seconds, `rss` in bytes, `started` in seconds after the boot."""

    __slots__ = ("command", "cpu", "name", "pid", "ppid", "rss", "started", "state", "uid")

    def __init__(self, text: str) -> None:
        parts = text.split(",")
        if len(parts) != 9:
            raise RefusedError(f"the guest's agent lists a process as {text!r:.80}")
        fields = dict(zip(("pid", "ppid", "uid", "cpu", "started", "rss"), ([part] for part in parts), strict=False))
        self.pid, self.ppid, self.uid = (_whole(fields, name) for name in ("pid", "ppid", "uid"))
        self.cpu, self.started = _whole(fields, "cpu") / 100, _whole(fields, "started") / 100
        self.rss = _whole(fields, "rss")
        self.state, self.name = parts[6][:1], plain(parts[7])
        self.command = [plain(word) for word in parts[8].split("%00") if word]     # a kernel's thread has none


class GuestAgent(Agent):
    """A running machine's agent, by all that it can do. NoAgentError, RefusedError."""

    def wait_ready(self, timeout: float) -> list[str]:
        """Until it answers; the commands it has. For a guest that boots: refusals do not count. NoAgentError."""
        end = monotonic() + timeout
        while True:
            try:
                return self.version(max(0.1, end - monotonic()))[1]
            except NoAgentError:
                if monotonic() + LOOK_AGAIN >= end or not self._machine.running():
                    raise
            sleep(LOOK_AGAIN)

    def ask_all(self, requests: Iterable[Sequence[str]], timeout: float = PATIENCE) -> list[str]:
        """Several requests at once, in order; what stands behind each `ok`.

        All are tried; then RefusedError for the first that was refused. They are sent once: where the stream breaks,
        NoAgentError, and some may have been done.
        """
        lines = [self.request_line(*request) for request in requests]
        if not lines:
            return []
        answers = self._exchange(b"".join(lines), monotonic() + timeout, len(lines), once=True)
        return [self.read_reply(line.split(b" ")[0].strip().decode(), answer)
                for line, answer in zip(lines, answers.split("\n"), strict=True)]

    # file systems ------------------------------------------------------------------------------------

    def mount(self, kind: str, source: str, target: str, flags: int = 0, data: str = "",
              timeout: float = PATIENCE) -> None:
        """mount(2); `target` is made (a file where a file is bound there)."""
        self.ask(*self.mount_request(kind, source, target, flags, data), timeout=timeout, once=True)

    @staticmethod
    def mount_request(kind: str, source: str, target: str, flags: int = 0, data: str = "") -> tuple[str, ...]:
        """The same, for ask_all."""
        return words("mount", kind, source, target, f"{flags}", data)

    def root(self, target: str, move: Sequence[str] = (), timeout: float = PATIENCE) -> None:
        """`target`, a mount, becomes the agent's and all later processes' root; mounts at /NAME move to its /NAME."""
        self.ask(*words("root", target, *move), timeout=timeout, once=True)

    # network -----------------------------------------------------------------------------------------

    def network(self, card: str, mac: str = "", address: str = "", gateway: str = "", mtu: int = 0,
                timeout: float = PATIENCE) -> None:
        """Set up a card that is there as `card` (a name, or its MAC address now); `address` is 10.0.0.2/24 or so."""
        requests: list[tuple[str, ...]] = []
        if mtu:
            requests.append(("mtu", card, f"{mtu}"))
        if address:
            requests.append(("address", card, address, *([gateway] if gateway else [])))
        if mac:
            requests.append(("mac", card, mac))
        self.ask_all(requests, timeout)

    # processes ---------------------------------------------------------------------------------------

    def kill(self, pid: int, signal: int) -> None:
        """Signal a process of the guest, by its number there."""
        self.ask("kill", f"{pid}", f"{signal}", once=True)

    def stats(self, timeout: float = PATIENCE) -> GuestStats:
        """Processor, memory, load."""
        fields = {}
        for word in self.ask("stats", timeout=timeout).split():
            name, _, value = word.partition("=")
            fields[name] = value.split(",")
        return GuestStats(fields)

    def processes(self, timeout: float = LIST_SECONDS) -> list[ProcessEntry]:
        """The guest's processes, without the kernel's threads and the agent itself."""
        found: list[ProcessEntry] = []
        after = 0
        while True:
            listed = self.ask("ps", f"{after}", timeout=timeout, once=True).split()
            more = bool(listed) and listed[-1] == "+"
            found += [ProcessEntry(text) for text in listed[:-1 if more else None]]
            if not more:
                return found
            last = found[-1].pid if found else after
            if last <= after or len(found) > PROCESSES_MOST:
                raise RefusedError("the guest's agent lists its processes in no order")
            after = last

    # the end -----------------------------------------------------------------------------------------

    def shutdown(self, reboot: bool = False, grace: float = GRACE, timeout: float = PATIENCE) -> None:
        """Have it end: SIGTERM to all, SIGKILL after `grace` seconds, file systems synced and unmounted, power off.

        Returns once the agent has begun; the machine's end is for Machine.wait() to see.
        """
        self.ask("shutdown", f"{max(0, int(grace * 1000))}", "reboot" if reboot else "off", timeout=timeout, once=True)


def words(*texts: str) -> tuple[str, ...]:
    """A request's words, percent-escaped as the agent reads them; `-` is the empty one. What follows the first is."""
    return texts[0], *(_escaped(text) for text in texts[1:])


def plain(text: str) -> str:
    """What an escaped word of the agent's means; what would not print stays escaped."""
    out = []
    parts = text.split("%")
    out.append(parts[0])
    for part in parts[1:]:
        try:
            code = int(part[:2], 16)
        except ValueError:
            code = 0
        out.append(chr(code) + part[2:] if 0x20 <= code < 0x7F else "%" + part)
    return "".join(out)


def _escaped(text: str) -> str:
    if not text:
        return "-"
    if text == "-":
        return "%2D"
    data = text.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if 0x20 < byte < 0x7F and byte != 0x25 else f"%{byte:02X}" for byte in data)


def _whole(fields: dict[str, list[str]], name: str, at: int = 0) -> int:
    text = fields.get(name, [])[at:at + 1]
    if not text or not text[0].isdecimal() or len(text[0]) > 20 or int(text[0]) > NUMBER_MOST:
        raise RefusedError(f"the guest's agent reports no usable {name}")
    return int(text[0])


def _decimal(fields: dict[str, list[str]], name: str, at: int = 0) -> float:
    text = fields.get(name, [])[at:at + 1]
    if not text or not text[0].replace(".", "", 1).isdecimal() or len(text[0]) > 20:
        raise RefusedError(f"the guest's agent reports no usable {name}")
    return float(text[0])
