"""Tables and templates: what docker's users type, and what hostile text can't do."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from framework.run import ROOT

from hv.cli.table import age, human, print_rows, render, safe
from hv.errors import ConfigError, HvError

ROWS = [{"ID": "abc", "Name": "x\x1b[31m\ny", "Size": 5}, {"ID": "def", "Name": "é", "Size": 6}]
COLUMNS = {"THE ID": "ID", "NAME": "Name"}


TABLE = "THE ID   NAME\nabc      x\\x1b[31m\\ny\ndef      é\n"


@pytest.mark.parametrize("form, quiet, wanted", [
    ("", "", TABLE), ("table", "", TABLE), ("", "ID", "abc\ndef\n"), ("plain", "", "plain\nplain\n"),
    ("{{.ID}}: {{ .Size }}", "", "abc: 5\ndef: 6\n"), ("{{json .Name}}", "", '"x\\u001b[31m\\ny"\n"\\u00e9"\n'),
    ("table {{.Size}}\\t{{.ID}}", "", "SIZE   THE ID\n5      abc\n6      def\n")])
def test_the_forms(capsys, form, quiet, wanted):
    print_rows(ROWS, COLUMNS, form, quiet)
    assert capsys.readouterr().out == wanted


def test_json_is_the_rows(capsys):
    print_rows(ROWS, COLUMNS, "json")
    assert json.loads(capsys.readouterr().out) == ROWS
    assert json.loads(render("{{json .}}", ROWS[0])) == ROWS[0]


@pytest.mark.parametrize("form", ["{{.Nothing}}", "{{range .}}", "{{.ID | upper}}", "table {{.Nothing}}", "{{"])
def test_a_template_that_is_not_understood(form):
    with pytest.raises(ConfigError):
        print_rows(ROWS, COLUMNS, form)


def test_many_columns_are_whole_where_nobody_looks(capsys):
    print_rows([{"ID": "x" * 500, "Name": "y" * 500}], COLUMNS)
    assert "x" * 500 + "   " + "y" * 500 in capsys.readouterr().out


def test_a_narrow_terminal_gets_an_ellipsis():
    code = "from hv.cli.table import print_rows; print_rows([{'A': 'x' * 200}], {'A': 'A'})"
    master, slave = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], stdout=slave,
                       check=True, timeout=30, env=os.environ | {"COLUMNS": "40", "TERM": "xterm"})
        out = os.read(master, 4096).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert out.splitlines()[1].rstrip() == "x" * 39 + "…" and "\x1b" not in out


@pytest.mark.parametrize("size, text", [(0, "0B"), (999, "999B"), (1000, "1kB"), (4_261_550, "4.262MB"),
                                        (10 ** 9, "1GB"), (10 ** 19, "1e+04PB")])
def test_sizes(size, text):
    assert human(size) == text


@pytest.mark.parametrize("seconds, text", [(-5, "0 seconds ago"), (1, "1 second ago"), (119, "1 minute ago"),
                                           (7200, "2 hours ago"), (3 * 86400, "3 days ago"),
                                           (21 * 86400, "3 weeks ago"), (100 * 86400, "3 months ago"),
                                           (2000 * 86400, "5 years ago")])
def test_ages(seconds, text):
    assert age(seconds) == text


def test_control_characters_are_shown():
    assert safe("a\x1b]0;x\x07\r\n\u202e\ud800b") == "a\\x1b]0;x\\x07\\r\\n\\u202e\\ud800b"


def test_without_rich_there_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(HvError, match="tables take the Python package rich") as caught:
        print_rows(ROWS, COLUMNS)
    assert "json" in caught.value.hint
