"""The console on a real terminal, on pipes, and without either; signals and other ends of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from framework.run import PYHV, boot, needs_kvm, no_traceback
from framework.terminal import OnTerminal

pytestmark = needs_kvm
ECHO = ("boot", "guest:echo", "--cmdline", "echo", "--timeout", "30")


def test_terminal_is_raw_for_the_guest_and_restored_after() -> None:
    with OnTerminal(*ECHO) as run:
        run.wait_for(b"echo: ready")
        assert not termios.tcgetattr(run.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        run.type(b"abc\x03def\x1a")         # Ctrl-C and Ctrl-Z are the guest's
        run.wait_for(b"abc\x03def\x1a")
        run.type(b"\x04")
        assert run.end() == 0
        assert termios.tcgetattr(run.slave) == run.before
        assert b"echo: 8 bytes" in run.output


def test_escape_key_help_registers_pause_resume_quit() -> None:
    with OnTerminal(*ECHO) as run:
        run.wait_for(b"echo: ready")
        run.type(b"\x01h")
        run.wait_for(b"this help")
        run.type(b"\x01r")
        run.wait_for(b"rip")
        run.wait_for(b"cr3")
        run.type(b"\x01p")
        run.wait_for(b"paused")
        run.type(b"while paused")
        time.sleep(0.3)
        assert b"while paused" not in run.output
        run.type(b"\x01p")
        run.wait_for(b"resumed")
        run.wait_for(b"while paused")
        run.type(b"\x01a")                  # Ctrl-A itself
        run.wait_for(b"while paused\x01")
        run.type(b"\x01x")
        assert run.end() == 0
        assert termios.tcgetattr(run.slave) == run.before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_run_and_restore_the_terminal(sent: signal.Signals, code: int) -> None:
    with OnTerminal(*ECHO) as run:
        run.wait_for(b"echo: ready")
        run.process.send_signal(sent)
        assert run.end() == code
        assert termios.tcgetattr(run.slave) == run.before
        assert b"Traceback" not in run.output


def test_signal_while_paused_ends_the_run() -> None:
    with OnTerminal(*ECHO) as run:
        run.wait_for(b"echo: ready")
        run.type(b"\x01p")
        run.wait_for(b"paused")
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143


def test_closed_terminal_ends_the_run() -> None:
    run = OnTerminal(*ECHO)
    try:
        run.wait_for(b"echo: ready")
        os.close(run.slave)
        run.slave = -1
        os.close(run.master)
        assert run.process.wait(15) == 129
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@pytest.mark.parametrize("after", [0.0, 0.005, 0.01, 0.02, 0.05])
def test_interrupt_at_any_moment_is_no_traceback(after: float) -> None:
    process = subprocess.Popen([*PYHV, "boot", "guest:fault", "--cmdline", "spin", "--timeout", "20"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=15)
    if b"Fatal Python error: init" in error or b", line 0, in <module>\nKeyboardInterrupt" in error:
        return      # the interpreter itself was hit while it started, before any line of ours
    assert process.returncode in (130, -signal.SIGINT), error
    assert b"Traceback" not in error, error.decode()


def test_console_reader_that_goes_away_does_not_stop_the_guest() -> None:
    process = subprocess.Popen([*PYHV, "boot", "guest:fault", "--cmdline", "flood=20000", "--timeout", "60"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1000)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0, error
    assert b"Traceback" not in error


def test_slow_reader_gets_everything() -> None:
    with subprocess.Popen([*PYHV, "boot", "guest:fault", "--cmdline", "flood=3000", "--timeout", "60"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        time.sleep(1)
        out = process.stdout.read()
        assert process.wait(60) == 0
    assert out.count(b"\n") == 3001


def test_without_stdin_stdout_and_stderr() -> None:
    shell = f"exec {' '.join(PYHV)} boot guest:tiny <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], timeout=30, check=False).returncode == 0


def test_stdin_from_a_file_and_output_to_a_full_disk(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(b"typed from a file\x04")
    with keys.open("rb") as source, open("/dev/full", "wb") as full:
        done = subprocess.run([*PYHV, *ECHO], stdin=source, stdout=full, stderr=subprocess.PIPE, timeout=30,
                              check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_log_has_all_the_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = boot("guest:echo", "--cmdline", "echo", "--log", str(log), stdin=b"hello\x04")
    no_traceback(done)
    assert log.read_bytes() == done.stdout
    assert b"hello" in log.read_bytes()


def test_sigkill_leaves_nothing() -> None:
    process = subprocess.Popen([*PYHV, *ECHO], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait(10)
    process.stdout.close()
    group = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False)
    assert group.stdout == b""
