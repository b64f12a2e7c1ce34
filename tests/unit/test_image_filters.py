"""--filter: what each selects, and that nonsense is refused by name."""

from __future__ import annotations

import time

import pytest
from framework.images import Built, docker_archive

from hv.errors import ConfigError, ImageMissing
from hv.image.archive import load
from hv.image.filters import created, matcher, moment
from hv.image.store import Store

ALL = ("dangling", "label", "reference", "before", "since", "until")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("filters")
    store = Store(str(folder / "store"))
    for name, year, label in (("a:1", 2020, "x"), ("quay.io/b/c:2", 2022, "y"), ("", 2024, "z")):
        built = Built([b""], [name] if name else [], {"Labels": {"l": label}},
                      created=f"{year}-01-01T00:00:00.123456789Z")
        load(store, str(docker_archive(folder / "a.tar", built)))
    return store


@pytest.mark.parametrize("filters, years", [
    ([], {2020, 2022, 2024}), (["dangling=true"], {2024}), (["dangling=false"], {2020, 2022}),
    (["label=l"], {2020, 2022, 2024}),
    (["label=l=x"], {2020}), (["label!=l=x"], {2022, 2024}), (["label=m"], set()), (["reference=a"], {2020}),
    (["reference=a:*"], {2020}), (["reference=*/c"], {2022}), (["reference=*b/c*"], {2022}), (["reference=A"], set()),
    (["before=b"], None), (["before=quay.io/b/c:2"], {2020}), (["since=quay.io/b/c:2"], {2024}),
    (["until=2023-06-01T00:00:00Z"], {2020, 2022}), (["until=1000h"], {2020, 2022, 2024}),
    (["until=1600000000"], {2020}), (["label=l", "dangling=true"], {2024})], ids=str)
def test_what_passes(store, filters, years):
    if years is None:
        with pytest.raises(ImageMissing):
            matcher(filters, store, ALL)
        return
    test = matcher(filters, store, ALL)
    images = [(name, store.load(item, name)) for name, item in store.entries()]
    assert {int(image.config.created[:4]) for name, image in images if test(name, image)} == years


@pytest.mark.parametrize("text", ["", "x", "x=1", "dangling", "dangling=maybe", "dangling!=true", "until=yesterday",
                                  "until=", "until=99999999999999999999h5", "until=\u0663h"])
def test_nonsense_is_refused(store, text):
    with pytest.raises(ConfigError) as caught:
        matcher([text], store, ALL)
    assert "\n" not in str(caught.value)


def test_moments():
    assert abs(moment("1h30m") - (time.time() - 5400)) < 5 and moment("2020-01-01T00:00:00Z") == 1577836800
    assert moment("1577836800.5") == 1577836800.5


@pytest.mark.parametrize("text, seconds", [("", 0), ("soon", 0), ("0001-01-01T00:00:00Z", 0),
                                           ("2020-01-01T00:00:00Z", 1577836800),
                                           ("2020-01-01T01:00:00.5+01:00", 1577836800.5), ("99999-01-01T00:00:00Z", 0)])
def test_when_an_image_was_made(store, text, seconds):
    image = store.load(store.entries()[0][1])
    image.config.created = text
    assert created(image) == seconds
