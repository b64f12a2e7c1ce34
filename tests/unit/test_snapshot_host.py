"""hv/snapshot/host.py: which hosts may go on with a snapshot."""

from __future__ import annotations

from struct import pack

import pytest

from hv.errors import SnapshotError
from hv.snapshot import host
from hv.snapshot.format import Snapshot


def table(*rows: tuple[int, ...]) -> bytes:
    return pack("<II", len(rows), 0) + b"".join(pack("<7I12x", *row) for row in rows)


INTEL = (0, 0, 0, 0x16, 0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0, 0, 0, 0x10, 0x68747541, 0x444D4163, 0x69746E65)


class _Kvm:
    def __init__(self, offered: bytes) -> None:
        self._offered = offered

    def supported_cpuid(self) -> bytes:
        return self._offered


def snapshot(cpuid: bytes, **facts: object) -> Snapshot:
    made = Snapshot.__new__(Snapshot)
    made.folder = "/x"
    made.state = {"vcpus": [{"CPUID2": cpuid}],
                  "host": {"maker": host.maker(cpuid), "ring0": "native", "boot_id": "another"} | facts}
    return made


def test_makers_are_read():
    assert host.maker(table(INTEL)) == "GenuineIntel"
    assert host.maker(table(AMD)) == "AuthenticAMD"
    assert host.maker(b"") == ""


def test_the_same_features_or_more_will_do():
    wanted = snapshot(table(INTEL, (1, 0, 0, 0, 0, 0x1, 0x2), (7, 0, 1, 0, 0x100, 0, 0)))
    offered = table(INTEL, (1, 0, 0, 0, 0, 0x3, 0x2), (7, 0, 1, 0, 0x100, 0, 0))
    host.check_host(wanted, _Kvm(offered), emulated=lambda: False)


def test_a_missing_feature_is_named():
    wanted = snapshot(table(INTEL, (1, 0, 0, 0, 0, 0x1, 0x2), (7, 0, 1, 0, 0x120, 0, 0)))
    offered = table(INTEL, (1, 0, 0, 0, 0, 0x3, 0x2), (7, 0, 1, 0, 0x100, 0, 0))
    with pytest.raises(SnapshotError, match=r"leaf 0x7\.0 EBX: .*bits 0x20"):
        host.check_host(wanted, _Kvm(offered), emulated=lambda: False)


def test_bits_that_are_no_features_do_not_count():
    wanted = snapshot(table(INTEL, (1, 0, 0, 0, 0, 1 << 24 | 1 << 27 | 1 << 31, 1 << 28)))
    host.check_host(wanted, _Kvm(table(INTEL, (1, 0, 0, 0, 0, 0, 0))), emulated=lambda: False)


def test_another_maker_and_another_kind_of_kvm_are_refused():
    with pytest.raises(SnapshotError, match=r"host\.maker"):
        host.check_host(snapshot(table(AMD)), _Kvm(table(INTEL)), emulated=lambda: False)
    with pytest.raises(SnapshotError, match=r"host\.ring0"):
        host.check_host(snapshot(table(INTEL)), _Kvm(table(INTEL)), emulated=lambda: True)


def test_the_same_boot_of_the_same_host_is_not_compared():
    host.check_host(snapshot(table(AMD), boot_id=host.boot_id()), _Kvm(table(INTEL)), emulated=lambda: False)


@pytest.mark.parametrize("cpuid", [b"", b"\xff" * 8, b"\xff" * 47, table(INTEL)[:-3]])
def test_hostile_tables_do_no_harm(cpuid):
    host.features(cpuid)
    host.maker(cpuid)
