"""Network and console: the bench guest's packets over a tap, and what it prints; QEMU's beside it.

Driven by tests/kvm/test_bench_io.py.
"""

from __future__ import annotations

__all__ = ["console_group", "net_group"]

from hv.bench.io_group import Group, Run
from hv.bench.io_guest import pyhv_command, qemu_command, run_guest, words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hv.bench.io_guest import Values
    from hv.bench.netpeer import NetPeer

_QEMU = "QEMU microvm"


def net_group(peer: NetPeer, amounts: dict[str, int]) -> Group:
    """TCP segments of 64 KiB to the host, UDP packets there and back; the tap is the same for all."""
    work = f"{words(amounts, 'segments', 'round-trips')} {peer.words}"

    def measure(values: Values) -> dict[str, float]:
        return {"stream": values["stream"]["bytes"] * 8 / values["stream"]["ns"],
                "trip": values["round-trips"]["median-ns"] / 1e3}

    runs = [Run("pyhv", lambda: measure(run_guest(pyhv_command(work, "--net", f"tap={peer.tap}"))))]
    command = qemu_command(work, "-netdev", f"tap,id=n,ifname={peer.tap},script=no,downscript=no",
                           "-device", "virtio-net-device,netdev=n")
    if command:
        runs.append(Run(_QEMU, lambda: measure(run_guest(command))))
    return Group({"stream": ("Network: guest to a TCP socket of the host over a tap, segments of 64 KiB", "Gbit/s"),
                  "trip": ("Network: round trip of a small UDP packet, median of a run", "us")}, _QEMU, runs)


def console_group(place: Path, amounts: dict[str, int]) -> Group:
    """Lines to a file."""
    work = words(amounts, "console")

    def measure(values: Values) -> dict[str, float]:
        return {"console": values["console"]["bytes"] * 1e3 / values["console"]["ns"]}

    runs = [Run("pyhv", lambda: measure(run_guest(pyhv_command(work, "--console", "virtio"), place / "out")))]
    command = qemu_command(work, "-chardev", f"file,id=c,path={place / 'console'}", "-device", "virtio-serial-device",
                           "-device", "virtconsole,chardev=c")
    if command:
        runs.append(Run(_QEMU, lambda: measure(run_guest(command))))
    title = "Console: virtio-console to a file, buffers of 4 KiB"
    return Group({"console": (title, "MB/s")}, _QEMU, runs)
