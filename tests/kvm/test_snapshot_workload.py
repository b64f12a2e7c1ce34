"""Work that must not notice: a Linux is saved and restored again and again while it computes, ticks and talks.

Its disk is summed up and written, a timer is counted, and a TCP stream goes to another guest, which is never saved. 15
times here, as often as PYHV_ROUNDS says: `PYHV_ROUNDS=50 pytest tests/kvm/test_snapshot_workload.py`.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from framework.run import needs_kvm
from framework.snapshots import Going, Taken

from hv.machine.recipe_change import for_clone, with_changes
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(1800)]
ROUNDS = int(os.environ.get("PYHV_ROUNDS", "15"))
SECONDS = 0.4               # that the guest runs between two saves


def test_work_goes_on_through_many_snapshots(micro: Taken, tmp_path: Path):
    snapshot = Snapshot(micro.folder)
    cable = {0: {"pair": str(tmp_path / "cable")}}

    def guest(number: int) -> Going:
        recipe = with_changes(for_clone(snapshot.part("config"), number), nets=cable)
        for entry in recipe["devices"]:
            if entry["device"] == "net":
                entry["mac"] = f"02:00:00:00:00:{number:02x}"
        shell = Going(restore(snapshot, recipe=recipe))
        shell.run(f"ip link set eth0 address 02:00:00:00:00:{number:02x}; ip link set eth0 up; "
                  f"ip addr add 10.7.7.{number}/24 dev eth0")
        return shell

    paused, took = [], []
    machine = None
    with guest(2) as other:
        try:
            other.machine.console.send(b"steady listen 700 &\n")
            other.wait_for(b"listening")
            machine = guest(1).machine
            machine.console.send(b"steady sum /dev/vda & steady ticks & steady send 10.7.7.2 700 &\n")
            time.sleep(2)
            folder = ""
            for number in range(ROUNDS):
                time.sleep(SECONDS)
                before, folder = folder, str(tmp_path / str(number))
                saved = save(machine, folder, stop=True)
                paused.append(saved.paused_ms)
                assert machine.wait(20) is not None
                machine.close()
                began = time.monotonic()
                machine = restore(folder)
                machine.start()
                took.append((time.monotonic() - began) * 1e3)
                if number % 5 == 4:     # what is not needed any more may go, and what is needed stays
                    for name in ("memory", "memory.sums"):
                        os.unlink(f"{before}/{name}")
            shell = Going(machine, start=False)
            machine.console.send(b"killall steady; wait; echo do''ne\n")
            shell.wait_for(b"done", 120)
            other.wait_for(b"received", 120)
            said = bytes(machine.console.output).decode(errors="replace")
            heard = bytes(other.machine.console.output).decode(errors="replace")
            assert "bad" not in said + heard, (said, heard)
            rounds = int(re.findall(r"sum [0-9a-f]{16}, (\d+) rounds", said)[0])
            ticks, least, most = map(int, re.findall(r"(\d+) ticks in (\d+) to (\d+) ms", said)[0])
            sent, received = re.findall(r"sent (\d+)", said)[0], re.findall(r"received (\d+)", heard)[0]
            assert sent == received and int(sent) > 0 and rounds > 1
            assert least - 60 < ticks * 20 <= most
            assert shell.run("dmesg | grep -ciE 'stall|lockup|BUG:|I/O error'").startswith("0\n")
            middle = ROUNDS // 2
            print(f"\n{ROUNDS} times: {rounds} sums, {ticks} ticks, {sent} numbers; medians: saved in "
                  f"{sorted(paused)[middle]:.0f} ms, restored in {sorted(took)[middle]:.1f} ms")
        finally:
            if machine is not None:
                machine.close()
