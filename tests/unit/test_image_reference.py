"""Names of images: docker's defaults, what is refused, and that the normal form is stable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ConfigError, HvError
from hv.image.reference import Reference

HEX = "0123456789abcdef" * 4

# docker's own: github.com/distribution/reference, normalize_test.go and reference_test.go
PAIRS = [
    ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
    ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
    ("library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
    ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
    ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
    ("fooo/bar", "docker.io/fooo/bar:latest", "fooo/bar:latest"),
    ("library/foo/bar", "docker.io/library/foo/bar:latest", "library/foo/bar:latest"),
    ("quay.io/a/b/c:x", "quay.io/a/b/c:x", "quay.io/a/b/c:x"),
    ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
    ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
    ("127.0.0.1:5000/foo/bar:Tag_1.x-y", "127.0.0.1:5000/foo/bar:Tag_1.x-y", "127.0.0.1:5000/foo/bar:Tag_1.x-y"),
    ("[fd00::1]:5000/x", "[fd00::1]:5000/x:latest", "[fd00::1]:5000/x:latest"),
    ("aa/asdf$$^/aa", None, None),
    (f"busybox@sha256:{HEX}", f"docker.io/library/busybox@sha256:{HEX}", f"busybox@sha256:{HEX}"),
    (f"a.b/c:1@sha256:{HEX}", f"a.b/c:1@sha256:{HEX}", f"a.b/c:1@sha256:{HEX}"),
    ("a--b/c__d.e_f", "docker.io/a--b/c__d.e_f:latest", "a--b/c__d.e_f:latest"),
    ("UPPER/x", "UPPER/x:latest", "UPPER/x:latest"),        # an upper-case first part is a host
]


@pytest.mark.parametrize("text, normal, familiar", [pair for pair in PAIRS if pair[1]])
def test_the_normal_and_the_familiar_form(text, normal, familiar):
    reference = Reference.parse(text)
    assert (str(reference), reference.familiar()) == (normal, familiar)
    assert Reference.parse(normal) == reference == Reference.parse(familiar)
    assert hash(Reference.parse(normal)) == hash(reference)


@pytest.mark.parametrize("text", [
    "", "A", "busyBox", "a/", "/a", "a//b", "a:", ":a", "-a", "a-", "a_-b", "a___b", "a..b", ".a", "a b", "a\n", "a\0b",
    "a:b:c", "a:-x", "a:" + "x" * 129, f"a@sha256:{HEX[:-1]}", f"a@sha256:{HEX.upper()}", "a@", f"a@md5:{HEX}",
    f"a@sha256:{HEX}@sha256:{HEX}", "a/" * 128 + "b", HEX, "host:port/x", "host:123456/x", "-host.x/y", "ho_st.x/y",
    "[::1/x", "a.b:/x", "aa/asdf$$^/aa", "é", "../x", "a/../b", "x" * 256, "https://quay.io/x"])
def test_what_is_refused_says_why_in_one_line(text):
    with pytest.raises(ConfigError) as caught:
        Reference.parse(text)
    assert "\n" not in str(caught.value) and caught.value.hint and len(str(caught.value)) < 800


@given(st.text(alphabet="aB0._-/:@[]", max_size=40))
def test_whatever_is_typed_is_a_name_or_an_error(text):
    try:
        reference = Reference.parse(text)
    except HvError:
        return
    assert str(Reference.parse(str(reference))) == str(reference)
    assert Reference.parse(reference.familiar()) == reference
    assert ".." not in reference.repository.split("/")
