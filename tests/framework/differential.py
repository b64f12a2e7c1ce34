"""One bundle under several runtimes: what a probe program inside sees, and what the cgroup files outside say."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
from pathlib import Path

from framework.bundle import RUNTIME, Bundle, plain_signals
from framework.run import ROOT
from framework.terminal import OnTerminal

SOURCE = ROOT / "guests" / "container" / "probe.c"
CGROUP2 = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line]
HYBRID = bool(CGROUP2) and CGROUP2 != ["/sys/fs/cgroup"]


def build(folder: Path) -> Path:
    """The probe, linked statically: the root it runs in holds no libraries."""
    program = folder / "probe"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-o", str(program), str(SOURCE)], check=True, timeout=60)
    return program


def command(runtime: str) -> list[str]:
    """How `runtime` is started on this host."""
    if runtime == "pyhv-runtime":
        return RUNTIME
    if runtime == "crun" and HYBRID:
        # it refuses hosts that have both versions mounted; where it looks, there is one
        hide = " ".join(f"umount {place};" for place in CGROUP2)
        return ["unshare", "--mount", "--propagation", "slave", "sh", "-c", f'{hide} exec crun "$@"', "crun"]
    return [runtime]


def peers() -> list[str]:
    return [name for name in ("runc", "crun") if shutil.which(name)]


def probe(bundle: Bundle, runtime: str, *, terminal: tuple[int, int] | None = None, code: int = 7) -> list[str]:
    """Lines of the probe, run to its end under `runtime`; the exit code must be the probe's."""
    bundle.config["process"]["args"] = ["/probe", str(code)]
    bundle.write()
    words = [*command(runtime), "--root", str(bundle.state / runtime), "run", "--bundle", str(bundle.folder),
             bundle.name]
    if terminal:
        with OnTerminal(command=words, size=terminal) as opened:
            ended = opened.end(30)
            while select.select([opened.master], [], [], 0.1)[0]:
                opened.output += os.read(opened.master, 1 << 16)
            text, errors = opened.output.decode(errors="replace").replace("\r", ""), ""
    else:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
        ended, text, errors = done.returncode, done.stdout, done.stderr
    assert ended == code, (runtime, ended, text[-400:], errors)
    return [_plain(line) for line in plain_signals(text).splitlines()]


def _plain(line: str) -> str:
    """Without what may differ: numbers of peer groups, of inodes; names of a mount's options in their order."""
    line = re.sub(r"\b(shared|master|propagate_from):\d+", r"\1", line)
    if line.startswith("ns "):
        _, kind, target = line.split()
        same = os.path.exists(f"/proc/self/ns/{kind}") and os.readlink(f"/proc/self/ns/{kind}") == target
        return f"ns {kind} {'the host' if same else 'its own'}"
    if line.startswith("mount "):
        head, _, tail = line.rpartition(" ")        # the file system's options
        return f"{head} {','.join(sorted(tail.split(',')))}"
    return line


def outside(bundle: Bundle, runtime: str, files: tuple[str, ...]) -> list[str]:
    """Cgroup files of a created container, as the host sees them: "controller/file value"."""
    bundle.config["process"]["args"] = ["/probe", "0"]
    bundle.write()
    root = ["--root", str(bundle.state / runtime)]
    pid_file = bundle.folder / "pid"
    try:
        with (bundle.folder / "errors").open("w+") as errors:
            done = subprocess.run([*command(runtime), *root, "create", "--bundle", str(bundle.folder), "--pid-file",
                                   str(pid_file), bundle.name], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=errors, timeout=30, check=False)
            errors.seek(0)
            assert done.returncode == 0, (runtime, errors.read())
        places = {}
        for line in Path(f"/proc/{int(pid_file.read_text())}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            places |= dict.fromkeys(names.split(","), path)
        found = []
        for file in files:
            controller, leaf = file.split("/")
            place = Path("/sys/fs/cgroup") / controller / places[controller].lstrip("/") / leaf
            found += [f"{file} {line}" for line in sorted(place.read_text().splitlines())] if place.exists() else [
                f"{file} absent"]
        return found
    finally:
        remove(bundle, runtime)


def remove(bundle: Bundle, runtime: str) -> None:
    """Whatever is left of the container under `runtime`."""
    subprocess.run([*command(runtime), "--root", str(bundle.state / runtime), "delete", "--force", bundle.name],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30, check=False)


def differences(ours: list[str], theirs: list[str]) -> list[str]:
    """Lines that only one has ("- " theirs alone, "+ " ours alone), and where the order of what both have differs."""
    mine, other = set(ours), set(theirs)
    found = [f"- {line}" for line in theirs if line not in mine] + [f"+ {line}" for line in ours if line not in other]
    shared, same = [line for line in ours if line in other], [line for line in theirs if line in mine]
    if shared != same:
        found += [f"~ {line}" for line, wanted in zip(shared, same, strict=False) if line != wanted][:5]
    return found
