"""Every `pyhv boot ...` line that README and docs/ show is one that pyhv takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hv.cli.boot import OPTIONS
from hv.cli.devices import configurations
from hv.cli.options import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "guests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:^|`)(?:\s*\$ |\s{4}|)(?:PYTHONPATH=\S+ )?pyhv boot ?([^`\n]*)", text, re.MULTILINE):
            found.append((page.name, re.split(r"\s#|\s[|<>&]|;", line)[0].strip()))
    return found


def test_there_are_some():
    assert len(commands()) > 25


@pytest.mark.parametrize(("page", "line"), commands())
def test_the_command_is_taken(page: str, line: str):
    parsed = parse(shlex.split(line), OPTIONS, 1)
    assert parsed is not None, f"{page}: pyhv boot {line}"
    values, _ = parsed
    values["device"] = []           # those name files of the reader's own
    configurations(values)
