"""README's library example is run as it stands, and its other promises about text are held."""

from __future__ import annotations

import re
import subprocess
import sys

from framework.run import ROOT, pyhv

README = (ROOT / "README.md").read_text()


def test_library_example_works_and_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    body = [line for line in code.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(body) <= 15
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "MiB" in done.stdout and "Outcome('poweroff'" in done.stdout and "code=0" in done.stdout, done.stdout


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "guests/README.md"]:
        for link in re.findall(r"\]\(([\w./-]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_every_option_the_readme_names_exists() -> None:
    commands = (["boot"], ["kernel", "build"], ["oci", "run"], ["oci", "spec"],
                ["snapshot", "create"], ["snapshot", "restore"], ["pool", "serve"],
                ["run"], ["rm"], ["logs"])
    known = "".join(pyhv(*command, "--help").stdout.decode() for command in commands)
    ours = "\n".join(line for line in README.splitlines() if "podman" not in line)
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)):
        assert option in known, option
