"""The host's package manager and other programs, run with a bound and a log."""

from __future__ import annotations

__all__ = ["install", "run_logged"]

import os
import shutil
import subprocess
from pathlib import Path

from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_INSTALL_TIMEOUT = 900      # s


def install(packages: Sequence[str], say: Callable[[str], None] = lambda text: None) -> None:
    """Install the Debian packages that are missing. HvError tells the command where we can't run it."""
    missing = [name for name in packages if not _installed(name)]
    if not missing:
        return
    command = f"apt-get install {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise HvError(f"these packages are missing: {' '.join(missing)}", "install what this distribution calls them")
    if os.geteuid() != 0:
        raise HvError(f"these packages are missing: {' '.join(missing)}", f"run: sudo {command}")
    say(f"installing {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    base = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
    for attempt in (base, ["apt-get", "update", "-q"], base):
        done = subprocess.run(attempt, env=environment, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT,
                              check=False)
        if attempt is base and done.returncode == 0:
            return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise HvError(f"{command} failed: {last}", "is there a network, or a package mirror?")


def run_logged(command: list[str], log: Path, timeout: float, what: str) -> None:
    """Run `command`, its output appended to `log`. HvError with the last line and the log's path where it fails."""
    with log.open("ab") as out:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=timeout,
                                  check=False)
            reason = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"no end after {timeout:g} s"
        except OSError as error:
            reason = f"{command[0]}: {error.strerror}"
    if reason:
        raise HvError(f"{what} failed: {reason}", f"see {log}")


def _installed(package: str) -> bool:
    try:
        done = subprocess.run(["dpkg-query", "-W", "-f=${Status}", package], capture_output=True, text=True, timeout=60,
                              check=False)
    except OSError:
        return False
    return done.stdout.startswith("install ok installed")
