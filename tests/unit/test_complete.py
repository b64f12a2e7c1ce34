"""Instructions that are known without a decoder are what the decoder takes them for."""

from __future__ import annotations

import subprocess
import sys

import capstone
import pytest
from framework.run import ROOT

from hv.softkvm.complete import PLAIN, plain
from hv.softkvm.system import INSTRUCTIONS

DECODER = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


@pytest.mark.parametrize("code", PLAIN, ids=PLAIN.values())
@pytest.mark.parametrize("behind", [b"", b"\x90" * 14, b"\xd9\xf8" * 7, b"\xff" * 14])
def test_plain_instructions(code: bytes, behind: bytes) -> None:
    wanted = next(DECODER.disasm(code + behind, 0, 1))
    found = plain(code + behind)
    assert found is not None
    assert (found.mnemonic, found.size) == (wanted.mnemonic, wanted.size)
    assert found.mnemonic in INSTRUCTIONS


@pytest.mark.parametrize("code", [b"\x90", b"\xf3\x0f\xb8\xc0", b"\x0f", b"", b"\x0f\xae\x00", b"\x66\x0f\x01\xf9"])
def test_others_are_the_decoders(code: bytes) -> None:
    assert plain(code) is None


def test_nothing_of_a_decoder_is_loaded_for_them() -> None:
    program = ("import sys; from hv.softkvm.complete import Completer; Completer(None, None)._decode(b'\\x9b', 64);"
               "sys.exit('capstone' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False).returncode == 0
