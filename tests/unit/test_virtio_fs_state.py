"""Sessions of a shared folder as plain data, and back."""

from __future__ import annotations

import copy
import json
import os
from errno import EBADF, ESTALE

import pytest
from framework.fuse_client import ROOT, Share


def moved(share: Share, target: Share) -> None:
    """What a snapshot does: `target` goes on where `share` stood still, in the same memory."""
    share.device.stop()
    state = json.loads(json.dumps(share.device.state()))
    size = share.driver.memory.size
    target.driver.memory.write(0, share.driver.memory.read(0, size))
    target.driver.rings, target.driver._free = share.driver.rings, share.driver._free
    for ring in target.driver.rings:
        ring.memory, ring.driver = target.driver.memory, target.driver
    target.unique = share.unique
    target.device.load(state)
    target.device.resume()
    target.driver.loop.run()


def test_a_session_goes_on(tmp_path):
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/e/f").write_bytes(b"text")
    (tmp_path / os.fsdecode(b"\xff")).touch()
    with Share(tmp_path) as share, Share(tmp_path, init=False) as other:
        node, odd = share.walk("d/e/f").nodeid, share.lookup(ROOT, b"\xff").nodeid
        fh, gone = share.open(node, os.O_RDWR), share.create(ROOT, b"gone")
        dh = share.opendir(ROOT)
        share.unlink(ROOT, b"gone")
        moved(share, other)
        assert other.read(fh, 0, 9) == b"text" and other.write(fh, 4, b"!") == 1
        assert other.walk("d/e/f").nodeid == node and other.getattr(odd)
        assert {row[0] for row in other.readdir(dh)} == {b".", b"..", b"d", b"\xff"}
        for number, call, argument in ((ESTALE, other.getattr, gone[0].nodeid), (EBADF, other.release, gone[1])):
            with pytest.raises(OSError) as caught:
                call(argument)
            assert caught.value.errno == number
        assert other.create(ROOT, b"new")[0].nodeid > gone[0].nodeid


@pytest.mark.parametrize("change", [
    lambda session: session.pop("nodes"), lambda session: session["nodes"][0].__setitem__(0, 1),
    lambda session: session["nodes"][0].__setitem__(1, 0), lambda session: session["nodes"][0].__setitem__(2, 5),
    lambda session: session["nodes"][0].__setitem__(0, []), lambda session: session["handles"][0].__setitem__(1, 99),
    lambda session: session["handles"][0].__setitem__(3, True), lambda session: session["handles"].__imul__(2),
    lambda session: session["handles"][0].__setitem__(0, 10**9), lambda session: session.__setitem__("next_node", "x"),
])
def test_bad_states_are_refused_and_leave_nothing(tmp_path, change):
    (tmp_path / "f").touch()
    with Share(tmp_path) as share:
        share.open(share.lookup(ROOT, b"f").nodeid)
        share.device.stop()
        state = copy.deepcopy(share.device.state())
        change(state["model"]["session"])
        with pytest.raises(ValueError):
            share.device.load(state)
        assert not share.device.server.handles.by_number and len(share.device.server.nodes.by_id) == 1


def test_parents_in_a_circle_lead_nowhere(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    with Share(tmp_path) as share:
        a, b = share.walk("a").nodeid, share.walk("a/b").nodeid
        share.device.stop()
        state = share.device.state()
        for row in state["model"]["session"]["nodes"]:
            row[3] = {a: b, b: a}[row[0]]
        share.device.load(state)
        share.device.resume()
        with pytest.raises(OSError) as caught:
            share.lookup(b, b"x")
        assert caught.value.errno == ESTALE
