"""What pyproject.toml can't say: a built package carries the guests compiled, and the kernel configurations.

An editable install of a checkout needs neither: hv/guests.py builds guests on demand.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithGuests(build_py):
    """build_py, then guests/ into hv/data of what was built."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        data = Path(self.build_lib) / "hv" / "data"
        subprocess.run([sys.executable, str(ROOT / "guests" / "build.py"), "--out", str(data)], check=True)
        (data / "linux").mkdir(exist_ok=True)
        for config in (ROOT / "guests" / "linux").glob("*.config"):
            shutil.copy2(config, data / "linux")


setup(cmdclass={"build_py": BuildWithGuests})
