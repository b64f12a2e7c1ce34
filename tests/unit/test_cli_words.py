"""Command lines of the verbs of instances, and --format."""

from __future__ import annotations

import pytest

from hv.cli.run_options import RUN_OPTIONS
from hv.cli.template import fill
from hv.cli.verbs import VERBS
from hv.cli.words import HelpAsked, Opt, help_text, parse_words
from hv.errors import ConfigError

TABLE = (Opt("interactive", "", "x", "i"), Opt("tty", "", "x", "t"), Opt("env", "N", "x", "e", many=True),
         Opt("name", "N", "x"), Opt("user", "U", "x", "u"))


@pytest.mark.parametrize("words, values, rest", [
    (["-it", "img", "-x", "--name"], {"interactive": True, "tty": True, "env": []}, ["img", "-x", "--name"]),
    (["-eA=b", "-e", "C", "--env=D=e", "x"], {"env": ["A=b", "C", "D=e"]}, ["x"]),
    (["-itu", "5", "x"], {"interactive": True, "tty": True, "user": "5", "env": []}, ["x"]),
    (["--tty=false", "--name", "n", "--", "-x"], {"tty": False, "name": "n", "env": []}, ["-x"]),
    (["-", "x"], {"env": []}, ["-", "x"])])
def test_words(words, values, rest):
    assert parse_words(words, TABLE, "run", early=True) == (values, rest)


@pytest.mark.parametrize("words", [["--nope"], ["-z"], ["--name"], ["-e"], ["--tty=x"], ["-iz"], ["--name=a\0b"]])
def test_words_that_are_wrong(words):
    with pytest.raises(ConfigError):
        parse_words(words, TABLE, "run", early=True)


def test_a_near_miss_is_told():
    with pytest.raises(ConfigError) as caught:
        parse_words(["--inter", "x"], TABLE, "run")
    assert "--interactive" in caught.value.hint


def test_help():
    with pytest.raises(HelpAsked):
        parse_words(["--name", "x", "--help"], TABLE, "run")
    text = help_text("run IMAGE", "What it does.", RUN_OPTIONS)
    assert "--publish-all" in text and max(map(len, text.splitlines())) <= 120


def test_every_verb_is_there():
    for verb, (name, table, usage, _) in VERBS.items():
        module = __import__(name, fromlist=["*"])
        assert callable(getattr(module, f"command_{verb}")) and usage.startswith(verb)
        assert all(isinstance(option, Opt) for option in getattr(module, table))


def test_templates():
    data = {"ID": "x", "State": {"Running": True, "Code": 5, "None": None}, "List": [1]}
    assert fill("{{.ID}}\\t{{.State.Running}} {{ .State.Code }} {{json .List}} {{.State.None}}", data) \
        == "x\ttrue 5 [1] <nil>"
    for bad in ("{{.Nope}}", "{{.ID", "{{range .x}}", "{{.ID.More}}", "{{}}"):
        with pytest.raises(ConfigError):
            fill(bad, data)
