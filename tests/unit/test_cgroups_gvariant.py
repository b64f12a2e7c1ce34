"""Values in GVariant's text format: what is understood, what is refused, and that nothing else comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.container.cgroups.gvariant import parse
from hv.errors import ConfigError


@pytest.mark.parametrize("text, signature, value", [
    ("1", "i", 1), ("-7", "i", -7), ("+7", "i", 7), ("0x1F", "i", 31), ("uint64 100", "t", 100), ("byte 255", "y", 255),
    ("int16 -5", "n", -5), ("uint64 18446744073709551615", "t", (1 << 64) - 1), ("1.5", "d", 1.5), ("1e3", "d", 1000.0),
    ("double 2", "d", 2.0), ("true", "b", True), (" false ", "b", False), ("boolean true", "b", True),
    ("'text'", "s", "text"), ('"it\'s"', "s", "it's"), (r"'a\n\'\\\u00e4\x'", "s", "a\n'\\äx"),
    ("objectpath '/a'", "o", "/a"),
    ("['a', 'b']", "as", ["a", "b"]), ("[1,2]", "ai", [1, 2]), ("@as []", "as", []), ("@at [1, 2]", "at", [1, 2]),
    ("[uint32 1, 2]", "au", [1, 2]), ("@ay [1]", "ay", [1]), ("('a', uint32 1)", "(su)", ("a", 1)),
    ("(1,)", "(i)", (1,)),
    ("[('/dev/null', 'rw')]", "a(ss)", [("/dev/null", "rw")]), ("@a(ss) []", "a(ss)", []),
    ("@(st) ('a', 1)", "(st)", ("a", 1)), ("[[1], [2]]", "aai", [[1], [2]])])
def test_values(text, signature, value):
    assert parse(text) == (signature, value)
    assert type(parse(text)[1]) is type(value)


@pytest.mark.parametrize("text, why", [
    ("", "not a value"), ("x", "not a value"), ("1 2", "after the value"), ("'a", "does not end"),
    ("'a\\", "does not end"),
    ("[]", "needs its type"), ("[1", "does not end"), ("[1 2]", "does not end"), ("(1 2)", "does not end"),
    ("()", "empty"),
    ("2147483648", "out of the range"), ("byte 256", "out of the range"), ("byte -1", "out of the range"),
    ("uint64 18446744073709551616", "out of the range"), ("uint32 'a'", "not of type u"), ("string 1", "not of type s"),
    ("[1, 'a']", "not of type i"), ("@ab [1]", "not of type b"), ("@as 1", "not of type as"), ("@zz 1", "no type"),
    ("@ii 1", "no type"), ("@a []", "no type"), ("@(s ('a')", "no type"), ("@) 1", "no type"), ("@() ()", "no type"),
    ("uint32 uint64 1", "not of type u"), ("@(ss) ('a',)", "not of type"), ("'a\0'", "NUL"), (r"'\u0000'", "NUL"),
    (r"'\ud800'", "half"), (r"'\u12'", ""), ("[" * 20 + "1", "too deeply"), ("--1", ""), ("0x", ""), ("1_0", ""),
    ("inf", ""), ("nan", ""), ("-inf", ""), ("a" * 5000, "5000 characters"), ("{'a': 1}", ""), ("<1>", "")])
def test_refusals(text, why):
    with pytest.raises(ConfigError, match=r"^annotation x") as caught:
        parse(text, "annotation x")
    assert why in str(caught.value) and "\n" not in str(caught.value)


@given(st.text(alphabet="@asiut()[]'\"\\, 019.-exb", max_size=40))
def test_any_text_is_a_value_or_refused(text):
    try:
        signature, _ = parse(text)
    except ConfigError:
        return
    assert signature and set(signature) <= set("ybnqiuxtdsoga()")


@given(st.recursive(st.sampled_from("bsiutd"), lambda inner: inner.map(lambda one: f"a{one}"), max_leaves=3), st.data())
def test_what_is_written_is_read(signature, data):
    def value(kind: str):
        if kind[0] == "a":
            return data.draw(st.lists(st.just(0), max_size=3).map(lambda row: [value(kind[1:]) for _ in row]))
        return data.draw({"b": st.booleans(), "s": st.text(alphabet="abä' \"", max_size=5), "d": st.just(1.5)}.get(
            kind, st.integers(0, 1000)))

    def text(made) -> str:
        if isinstance(made, list):
            return f"[{', '.join(map(text, made))}]"
        if isinstance(made, str):
            return "'" + made.replace("'", "\\'") + "'"
        return str(made).lower()

    made = value(signature)
    assert parse(f"@{signature} {text(made)}") == (signature, made)
