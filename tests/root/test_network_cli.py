"""`pyhv network` at the command line."""

from __future__ import annotations

import json
import os

import pytest
from framework.run import PYHV
from framework.sites import Site, a_site  # noqa: F401 (the fixture `site`)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def pyhv(site: Site, *words: str) -> tuple[int, str, str]:
    done = site.host.call("env", f"PYHV_DATA={site.folder}", f"PYHV_RUN={site.folder}/cli", *PYHV, "network",
                          *words)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_networks_at_the_command_line(site: Site) -> None:
    assert pyhv(site, "create", "a", "--subnet", "10.213.70.0/24", "--gateway", "10.213.70.5", "--ip-range",
                "10.213.70.128/25", "--internal", "--label", "k=v", "--disable-dns") == (0, "a\n", "")
    assert pyhv(site, "create", "b", "--driver", "bridge")[0] == 0
    code, out, _ = pyhv(site, "inspect", "a")
    (shown,) = json.loads(out)
    assert code == 0 and {key: shown[key] for key in ("Name", "Driver", "Subnet", "Gateway", "IPRange", "Internal",
                                                      "DNSEnabled", "Labels", "Containers")} == {
        "Name": "a", "Driver": "bridge", "Subnet": "10.213.70.0/24", "Gateway": "10.213.70.5",
        "IPRange": "10.213.70.128/25", "Internal": True, "DNSEnabled": False, "Labels": {"k": "v"}, "Containers": {}}
    assert pyhv(site, "inspect", "b", "--format", "{{.Subnet}}")[1] == "10.144.0.0/24\n"
    code, out, _ = pyhv(site, "ls")
    assert code == 0 and [line.split()[1:4] for line in out.splitlines()[1:]] == \
        [["a", "bridge", "10.213.70.0/24"], ["b", "bridge", "10.144.0.0/24"]]
    assert pyhv(site, "ls", "--filter", "label=k=v", "--format", "{{.Name}}")[1] == "a\n"
    assert pyhv(site, "list", "-q")[1].split() == [json.loads(pyhv(site, "inspect", name)[1])[0]["ID"]
                                                   for name in ("a", "b")]
    for words, code, said in ((("create", "a"), 1, "already"), (("create", "none"), 2, "means something else"),
                              (("create", "c", "--subnet", "10.213.70.0/25"), 1, "overlaps"),
                              (("create", "c", "--subnet", "x"), 2, "no IPv4 subnet"),
                              (("create", "c", "--driver", "macvlan"), 2, "no such kind"),
                              (("create",), 2, "Missing argument"), (("inspect", "zz"), 1, "no network 'zz'"),
                              (("rm", "zz"), 1, "no network 'zz'"), (("ls", "--filter", "x=y"), 2, "--filter"),
                              (("connect", "a", "nobody"), 1, "nobody"), (("disconnect", "a", "nobody"), 1, "nobody")):
        found, _, error = pyhv(site, *words)
        assert (found, len(error.splitlines())) == (code, 1) and said in error, (words, error)
    assert pyhv(site, "rm", "-f", "zz") == (0, "", "")
    assert pyhv(site, "rm", "zz", "a")[:2] == (1, "a\n")
    assert pyhv(site, "prune", "--force") == (0, "b\n", "") and pyhv(site, "ls", "-q")[1] == ""
