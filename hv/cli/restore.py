"""`pyhv snapshot restore`: the options, and the run from a snapshot to an exit code; a fast path as `pyhv boot` is."""

from __future__ import annotations

__all__ = ["RESTORE_OPTIONS", "restore"]

from hv.cli.boot import OPTIONS, drive
from hv.cli.options import FLAG, INT, MANY, MAYBE, TEXT, Option
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER = "answer"
CLOCKS = ("saved", "now")
# Those of `pyhv boot` that concern the run, not how the machine is built.
SHARED = ("--name", "--control", "--no-control", "--timeout", "--log", "--json", "--trace", "--symbols", "--stats",
          "--profile", "--quiet", "--debug")
RESTORE_OPTIONS = (
    Option("--store", TEXT, None, "DIR", "where snapshots are kept"),
    Option("--clone", INT, 0, "N", "N machines that differ in MAC, CID, random numbers (docs/snapshots.md)"),
    Option("--clock", TEXT, "saved", "WHEN", "the guest's clock goes on from when it was saved, or from now"),
    Option("--verify", FLAG, False, "", "compare all memory to its checksums first"),
    Option("--shared-disks", FLAG, False, "", "write to the disks' original files, as the saved machine did; never to "
           "files in the snapshot"),
    Option("--disk", MANY, None, "N=FILE", "another file for disk N; may be given several times"),
    Option("--device", MANY, None, "FILE.py:CLASS", "a device of your own in the snapshot that is to run here"),
    Option("--memory-backend", TEXT, "file", "KIND", "where guest RAM comes from: file, uffd or uffd:SOCKET "
           "(docs/lazy-memory.md)"),
    Option("--prefetch", FLAG, False, "", "read what the guest will touch first, as recorded, before it starts"),
    Option("--record-working-set", MAYBE, None, "[=SECONDS]", "note what the guest touches so long, or until a second "
           "after it has printed something", ANSWER),
    *(option for option in OPTIONS if option.name in SHARED),
)


def restore(values: dict[str, Any], name: str) -> int:
    """Go on with the snapshot `name`; the guest's exit code."""
    from os.path import isfile

    from hv.snapshot.format import Snapshot, store_folder
    from hv.snapshot.restore import restore as restored

    if values["clock"] not in CLOCKS:
        raise ConfigError(f"--clock {values['clock']}: no such clock", "saved or now")
    folder = store_folder(name, values["store"])
    if isfile(f"{folder}/container.json"):
        from hv.cli.snapshot_container import restore as container

        return container(folder, values["name"])
    snapshot = Snapshot(folder)
    if values["disk"]:
        from hv.machine.recipe_change import with_changes

        snapshot.state["config"] = with_changes(snapshot.part("config"), disks=_disks(values["disk"]))
    if values["clone"]:
        from hv.cli.clones import clones

        return clones(values, snapshot)
    machine = restored(snapshot, private=not values["shared_disks"], verify=values["verify"],
                       clock_now=values["clock"] == "now", backend=values["memory_backend"],
                       prefetch=values["prefetch"], allowed=tuple(values["device"]),
                       record=_seconds(values["record_working_set"]))
    return drive(machine, values)


def _disks(texts: list[str]) -> dict[int, dict[str, Any]]:
    """What --disk says: number -> its other arguments."""
    from os.path import abspath

    found: dict[int, dict[str, Any]] = {}
    for text in texts:
        number, equals, path = text.partition("=")
        if not equals or not path or not number.isascii() or not number.isdigit() or int(number) in found:
            raise ConfigError(f"--disk {text}: {'is there twice' if number.isdigit() and path else 'is no N=FILE'}",
                              "for example --disk 0=other.img, once for each disk")
        found[int(number)] = {"path": abspath(path)}
    return found


def _seconds(text: str | None) -> float | None:
    """The value of --record-working-set; 0 where it is left to the guest."""
    if text is None or text == ANSWER:
        return None if text is None else 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise ConfigError(f"--record-working-set={text}: no number of seconds", "for example =2")
    return seconds
