"""docs/security.md names tests: each is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "security.md").read_text())))


@pytest.mark.parametrize("file, name", NAMED)
def test_the_tests_that_security_names_exist(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file()
    assert not name or re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)


def test_it_names_some() -> None:
    assert len(NAMED) > 30
