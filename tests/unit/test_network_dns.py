"""DNS messages against dnspython, and hostile ones; what a name server knows."""

from __future__ import annotations

from pathlib import Path

import dns.exception
import dns.message
import dns.name
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.network import dns_wire as wire
from hv.network.dns_names import Names
from hv.plainjson import dumps

LABEL = st.text("abcXYZ019-_", min_size=1, max_size=63)


def parsed(data: bytes) -> wire.Question:
    question = wire.parse(data)
    assert isinstance(question, wire.Question)
    return question


@given(st.lists(LABEL, min_size=1, max_size=3), st.sampled_from(["A", "AAAA", "PTR", "TXT", "ANY"]),
       st.integers(0, 65535), st.booleans())
def test_questions_are_read_as_dnspython_writes_them(labels: list[str], kind: str, identity: int, edns: bool) -> None:
    query = dns.message.make_query(".".join(labels), kind, id=identity, use_edns=edns)
    question = parsed(query.to_wire())
    assert (question.name, question.kind, question.kind_class, question.id) == \
        (".".join(labels).lower(), query.question[0].rdtype, 1, identity)


@given(st.lists(LABEL, min_size=1, max_size=3), st.lists(st.ip_addresses(v=4), max_size=60))
def test_answers_are_read_by_dnspython(labels: list[str], addresses: list) -> None:
    query = dns.message.make_query(".".join(labels), "A")
    data = query.to_wire()
    said = wire.answer(data, parsed(data), [(wire.A, address.packed) for address in addresses])
    response = dns.message.from_wire(said)
    assert query.is_response(response) and len(said) <= 512
    told = [record.address for rrset in response.answer for record in rrset]
    assert set(told) <= set(map(str, addresses))
    assert bool(response.flags & dns.flags.TC) or set(told) == set(map(str, addresses))


def test_other_answers() -> None:
    data = dns.message.make_query("9.0.0.10.in-addr.arpa", "PTR").to_wire()
    response = dns.message.from_wire(wire.answer(data, parsed(data), [(wire.PTR, wire.encode_name("a.b"))]))
    assert response.answer[0][0].target == dns.name.from_text("a.b")
    for code in (wire.NXDOMAIN, wire.SERVFAIL, wire.REFUSED):
        assert dns.message.from_wire(wire.answer(data, parsed(data), [], code)).rcode() == code
    assert dns.message.from_wire(wire.error(data, wire.FORMERR)).rcode() == dns.rcode.FORMERR


HEAD = b"\1\2\1\0\0\1\0\0\0\0\0\0"


@pytest.mark.parametrize("data, expected", [
    (b"", None), (HEAD[:11], None), (b"\1\2\x81\0" + HEAD[4:] + b"\1a\0\0\1\0\1", None),
    (b"\1\2\x28\0" + HEAD[4:], wire.NOTIMP), (HEAD, wire.FORMERR), (HEAD + b"\xc0\x0c\0\1\0\1", wire.FORMERR),
    (HEAD + b"\x40" + b"a" * 64 + b"\0\0\1\0\1", wire.FORMERR), (HEAD + b"\5ab", wire.FORMERR),
    (HEAD + b"\1a\0\0\1\0", wire.FORMERR), (HEAD + b"\x3f" * 300 + bytes(300), wire.FORMERR),
    (b"\1\2\1\0\0\2" + HEAD[6:] + b"\1a\0\0\1\0\1", wire.FORMERR),
    (b"\1\2\1\0\0\1\0\1" + HEAD[8:] + b"\1a\0\0\1\0\1", wire.FORMERR),
])
def test_what_is_no_question(data: bytes, expected: int | None) -> None:
    assert wire.parse(data) == expected


@given(st.one_of(st.binary(max_size=600), st.binary(max_size=300).map(lambda tail: HEAD + tail)))
def test_no_bytes_make_trouble(data: bytes) -> None:
    question = wire.parse(data)
    if isinstance(question, wire.Question):
        assert "/" not in question.name and "\0" not in question.name and ".." not in question.name
        assert len(question.name) < 256 and question.end <= len(data)
        dns.message.from_wire(wire.answer(data, question, []), ignore_trailing=True)
    elif question is not None:
        assert len(wire.error(data, question)) == 12


def test_an_answer_belongs_to_its_question() -> None:
    query = dns.message.make_query("a.example", "A", id=7)
    data, end = query.to_wire(), parsed(query.to_wire()).end
    good = dns.message.make_response(query).to_wire()
    assert wire.matches(good, 7, data, end)
    other = dns.message.make_response(dns.message.make_query("b.example", "A", id=7)).to_wire()
    kind = dns.message.make_response(dns.message.make_query("a.example", "AAAA", id=7)).to_wire()
    for wrong in (data, good[:11], b"", other, kind, b"\0\x08" + good[2:], good[:end - 1],
                  b"\0\7\x80\0" + bytes(8)):
        assert not wire.matches(wrong, 7, data, end)
    assert wire.matches(b"\0\7\x80\1" + bytes(8), 7, data, end), "an error without a question"


def test_what_a_server_knows(tmp_path: Path) -> None:
    for network, address, name in (("one", "10.0.0.2", "web"), ("two", "10.0.1.2", "db")):
        (tmp_path / f"on/{network}/leases").mkdir(parents=True)
        (tmp_path / f"on/{network}/names/{name}").mkdir(parents=True)
        (tmp_path / f"on/{network}/names/{name}/{address}").touch()
        (tmp_path / f"on/{network}/leases/{address}").write_text(dumps({"instance": "i", "names": [name]}))
    (tmp_path / "instances").mkdir()
    (tmp_path / "instances/i.json").write_text(dumps({"endpoints": [{"network": "one"}, {"network": "two"}],
                                                      "dns": ["192.0.2.1"]}))
    names = Names(str(tmp_path), "one", False)
    assert names.client("10.0.0.2") == (["one", "two"], ["192.0.2.1"])
    assert names.client("10.0.0.9") == (["one"], []) == names.client("../../etc/passwd")
    assert names.addresses("db", ["one", "two"]) == [bytes((10, 0, 1, 2))] and names.addresses("db", ["one"]) is None
    for odd in ("", ".", "..", "x" * 300, "..."):
        assert names.addresses(odd, ["one"]) is None
    assert names.name_of("10.0.1.2", ["one", "two"]) == "db" and names.name_of("10.0.1.3", ["one"]) == ""
    assert names.is_reverse("2.0.0.10.in-addr.arpa") == 0x0A000002 and names.is_reverse("x.in-addr.arpa") == -1
    for damage in ("", "[]", "{", '{"instance": 7}', '{"instance": "../i"}', '{"names": 7, "instance": "none"}'):
        (tmp_path / "on/one/leases/10.0.0.2").write_text(damage)
        assert names.client("10.0.0.2") == (["one"], []) and names.name_of("10.0.0.2", ["one"]) == ""
