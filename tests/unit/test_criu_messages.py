"""The messages that criu is spoken to in, beside the encoding's own examples; hostile ones are ValueErrors."""

from __future__ import annotations

import random

import pytest

from hv.container.criu import decode, encode, reason


def test_the_documents_examples():
    # developers.google.com/protocol-buffers/docs/encoding: 150 in field 1, "testing" in 2, both in a message in 3
    assert encode([(1, 150)]) == bytes.fromhex("089601")
    assert encode([(2, "testing")]) == bytes.fromhex("120774657374696e67")
    assert encode([(3, [(1, 150)])]) == bytes.fromhex("1a03089601")
    assert encode([(4, True), (5, False), (1, -1)]) == bytes.fromhex("20012800" "08ffffffffffffffffff01")


def test_what_is_said_is_heard():
    rng = random.Random(5)
    for _ in range(300):
        fields = {number: rng.choice([rng.getrandbits(rng.randrange(1, 64)), rng.randbytes(rng.randrange(300))])
                  for number in rng.sample(range(1, 5000), 8)}
        message = encode([(number, value if isinstance(value, int) else value.decode("utf-8", "surrogateescape"))
                          for number, value in fields.items()])
        assert decode(message) == fields


def test_fields_of_other_kinds_are_stepped_over():
    assert decode(bytes.fromhex("0d01020304" "110102030405060708" "1805")) == {1: b"\1\2\3\4", 2: bytes(range(1, 9)),
                                                                             3: 5}


@pytest.mark.parametrize("text", ["08", "0880", "1205616263", "0d0102", "0b", "08" + "ff" * 11, "12ffffffffffffffff7f"])
def test_what_is_cut_off_is_no_message(text):
    with pytest.raises(ValueError):
        decode(bytes.fromhex(text))


def test_the_reason_is_the_first_error(tmp_path):
    log = tmp_path / "dump.log"
    log.write_text("(00.000466) Version: 3.17.1\n(00.013619) Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area\n"
                   "(00.013621) Error (criu/vdso.c:613): vdso: Failed to fill self vdso symtable\n")
    assert reason(b"", str(log)) == "vdso: Unexpected rt vDSO area"
    assert reason(b"Error (criu/files-reg.c:1710): Can't lookup\n", str(log)) == "Can't lookup"
    assert reason(b"", str(tmp_path / "none")) == "it ended without a reason"
