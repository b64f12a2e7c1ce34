"""The device and its tests in docs/adding-a-virtio-device.md work as printed; --device finds devices or says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from framework.run import no_traceback, pyhv

from hv.cli.devices import configurations
from hv.devices.virtio.device import VirtioDevice
from hv.errors import ConfigError

TEXT = (Path(__file__).resolve().parents[2] / "docs/adding-a-virtio-device.md").read_text()
DEVICE, LIBRARY, TESTS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
NOTHING = {"disk": [], "net": [], "console": "serial", "port": [], "rng": False, "balloon": None, "vsock": None,
           "share": []}


@pytest.fixture
def dice(tmp_path: Path) -> Path:
    file = tmp_path / "dice.py"
    file.write_text(DEVICE)
    return file


def made(text: str) -> VirtioDevice:
    return configurations({**NOTHING, "device": [text]})[0].create()


def test_the_tests_on_the_page_pass():
    names: dict[str, object] = {}
    exec(DEVICE + TESTS, names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()      # type: ignore[operator]


def test_the_configuration_class_on_the_page_makes_a_device():
    names: dict[str, object] = {}
    exec(DEVICE + LIBRARY.partition("with Machine")[0], names)
    assert names["DiceConfig"]().create().NAME == "dice"    # type: ignore[operator]


def test_a_device_by_its_file(dice: Path) -> None:
    device = made(f"{dice}:Dice,sides=20,seed=3")
    assert device.KIND == "dice" and device._sides == 20    # type: ignore[attr-defined]


def test_a_module_beside_the_file(dice: Path) -> None:
    (dice.parent / "loaded_dice.py").write_text("from dice import Dice\n\nclass Loaded(Dice):\n    KIND = 'loaded'\n")
    dice.rename(dice.parent / "dice.py")
    assert made(f"{dice.parent / 'loaded_dice.py'}:Loaded").KIND == "loaded"


def test_a_device_by_its_module_and_a_class_with_create():
    assert made("hv.devices.virtio.rng:Rng").KIND == "rng"
    assert made("hv.devices.virtio.rng:RngConfig").KIND == "rng"


@pytest.mark.parametrize(("text", "reason"), [
    ("nonsense", "not of the form"), ("no.such.module:Class", "No module named"), ("{dice}:Cards", "no class Cards"),
    ("/no/such/file.py:Dice", "FileNotFoundError"), ("{dice}:Dice,sides=0", "dice with 0 sides"),
    ("{dice}:Dice,sides=x", "invalid literal"), ("{dice}:Dice,eyes=2", "eyes"),
    ("{dice}:Dice,sides=2,sides=3", "twice"),
    ("{broken}:Dice", "SyntaxError"), ("os.path:join", "missing 1 required"),
    ("builtins:dict", "neither a VirtioDevice"),
])
def test_what_cannot_be_is_said_in_one_line(dice: Path, text: str, reason: str) -> None:
    broken = dice.parent / "broken.py"
    broken.write_text("class Dice:\n    def")
    with pytest.raises(ConfigError, match=reason):
        made(text.format(dice=dice, broken=broken))


def test_the_command_line_says_it_so(dice: Path) -> None:
    done = pyhv("boot", "guest:tiny", "--device", f"{dice}:Dice,sides=999")
    assert done.returncode == 2 and b"dice with 999 sides" in done.stderr and done.stderr.count(b"\n") == 1
    no_traceback(done)
