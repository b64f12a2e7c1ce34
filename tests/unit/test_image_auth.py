"""Logins in docker's and podman's files, and their helpers."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hv.errors import ConfigError
from hv.image import auth
from hv.image.auth import Login, Logins


def entry(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    return tmp_path


def write(path: Path, config: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))


def helper(home: Path, name: str, script: str) -> None:
    path = home / "bin" / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def users(registry: str, repository: str = "") -> str:
    found = Logins().find(registry, repository)
    return found.user if found else "nobody"


def test_files_in_their_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert users("quay.io") == "nobody"
    files = [home / ".docker/config.json", home / ".config/containers/auth.json", home / "run/containers/auth.json"]
    for n, path in enumerate(files):
        write(path, {"auths": {"quay.io": entry(f"user{n}", "p"), f"only{n}.io": entry(f"only{n}", "p")}})
        assert users("quay.io") == f"user{n}"
    assert [users(f"only{n}.io") for n in range(3)] == ["only0", "only1", "only2"]
    write(home / "own/config.json", {"auths": {"quay.io": entry("own", "p")}})
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "own"))
    assert (users("quay.io"), users("only0.io"), users("only1.io")) == ("own", "nobody", "only1")
    write(home / "file.json", {"auths": {"only.io": entry("file", "p")}})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "file.json"))
    assert (users("only.io"), users("quay.io")) == ("file", "nobody")
    with pytest.raises(ConfigError, match=r"nowhere.json: no such file"):
        Logins(str(home / "nowhere.json")).find("quay.io")


def test_the_longest_key_wins_and_no_other_registrys(home: Path) -> None:
    write(home / ".docker/config.json", {"auths": {
        "r.io": entry("all", "p"), "r.io/a": entry("a", "p"), "r.io/a/b": entry("ab", "p"),
        "https://s.io/v1/": entry("s", "p"), "https://index.docker.io/v1/": entry("hub", "p:with:colons"),
        "empty.io": {}, "t.io:5000": entry("t", "p")}})
    assert [users("r.io", name) for name in ("", "a", "a/b", "a/b/c", "a/c", "ab")] == [
        "all", "a", "ab", "ab", "a", "all"]
    assert (users("s.io", "x"), users("docker.io", "library/x"), users("empty.io")) == ("s", "hub", "nobody")
    assert (users("t.io"), users("t.io:5000"), users("r.io.evil"), users("evil-r.io")) == ("nobody", "t", "nobody",
                                                                                         "nobody")
    found = Logins().find("docker.io")
    assert found and found.password == "p:with:colons"
    assert found.basic() == "Basic " + base64.b64encode(b"hub:p:with:colons").decode()


@pytest.mark.parametrize("config, words", [
    ("{", "is not JSON"), ("[]", "not a file of logins"), ('{"auths": []}', "auths: not an object"),
    ('{"auths": {"quay.io": 1}}', "auths: quay.io: not an object"),
    ('{"auths": {"quay.io": {"auth": "%%%"}}}', "auth: no base64"),
    ('{"auths": {"quay.io": {"auth": "bm9jb2xvbg=="}}}', "auth: no base64"),
    ('{"auths": {"quay.io": {"auth": "//8="}}}', "auth: no base64"),
    ('{"credsStore": "../../bin/sh"}', "is no name of one"), ('{"credHelpers": {"quay.io": 7}}', "is no name of one"),
    ('{"credsStore": "not-installed"}', "docker-credential-not-installed: No such file"),
    (" " * (1 << 20) + "{}", "is larger than")], ids=range(11))
def test_bad_files_are_one_line(home: Path, config: str, words: str) -> None:
    write(home / ".docker/config.json", config)
    with pytest.raises(ConfigError, match=words) as caught:
        Logins().find("quay.io")
    assert "\n" not in str(caught.value)


def test_an_identity_token(home: Path) -> None:
    write(home / ".docker/config.json", {"auths": {"a.io": {"auth": "", "identitytoken": "tok"}}})
    found = Logins().find("a.io")
    assert found and (found.user, found.token) == ("", "tok")


def test_helpers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, "one", 'read -r host || :; echo "{\\"Username\\": \\"$1-$host\\", \\"Secret\\": \\"s\\"}"')
    helper(home, "token", 'echo \'{"Username": "<token>", "Secret": "identity"}\'')
    helper(home, "none", "echo credentials not found in native keychain; exit 1")
    helper(home, "rude", 'echo "the keychain   is\nlocked"; exit 1')
    helper(home, "odd", "echo '{}'")
    helper(home, "endless", "exec cat /dev/zero")
    helper(home, "stuck", "sleep 60")
    write(home / ".docker/config.json", {
        "auths": {"plain.io": entry("plain", "p"), "any.io": {}},
        "credsStore": "none", "credHelpers": {f"{name}.io": name for name in (
            "token", "rude", "odd", "endless", "stuck")} | {"docker.io": "one", "one.io": "one"}})
    assert users("one.io") == "get-one.io"
    assert users("docker.io") == "get-https://index.docker.io/v1/"
    assert (users("any.io"), users("plain.io")) == ("nobody", "plain")
    found = Logins().find("token.io")
    assert found and found.token == "identity"
    monkeypatch.setattr(auth, "_HELPER_SECONDS", 0.3)
    for name, words in {"rude": "the keychain is locked", "odd": "no Username and Secret", "endless": "has no end",
                        "stuck": "no answer in 0.3 seconds"}.items():
        with pytest.raises(ConfigError, match=f"docker-credential-{name} get: .*{words}"):
            Logins().find(f"{name}.io")


def test_saving_keeps_what_is_not_ours(home: Path) -> None:
    path = home / ".docker/config.json"
    assert Logins().save("quay.io", Login("u", "p")) == str(path)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    config = json.loads(path.read_text())
    write(path, config | {"HttpHeaders": {"X": "1"}, "ratio": 0.5})
    Logins().save("docker.io", Login("hub", "é"))
    config = json.loads(path.read_text())
    assert (config["HttpHeaders"], config["ratio"]) == ({"X": "1"}, 0.5)
    assert config["auths"]["https://index.docker.io/v1/"] == entry("hub", "é")
    assert (users("quay.io"), users("docker.io")) == ("u", "hub")
    assert Logins().remove("docker.io") and not Logins().remove("docker.io")
    assert (users("quay.io"), users("docker.io")) == ("u", "nobody")
    assert sorted(os.listdir(path.parent)) == ["config.json"]


def test_saving_into_a_helper_and_through_a_link(home: Path) -> None:
    helper(home, "keep", f'if [ "$1" = get ]; then echo \'{{"Username": "u", "Secret": "s"}}\'; '
                         f'else echo "$1 $(cat)" >> {home}/calls; fi')
    (home / "real").mkdir()
    write(home / "real/config.json", {"credsStore": "keep"})
    (home / ".docker").mkdir()
    (home / ".docker/config.json").symlink_to(home / "real/config.json")
    assert Logins().save("quay.io", Login("u", "p")) == "docker-credential-keep"
    assert (home / ".docker/config.json").is_symlink()
    verb, _, sent = (home / "calls").read_text().partition(" ")
    assert (verb, json.loads(sent)) == ("store", {"ServerURL": "quay.io", "Username": "u", "Secret": "p"})
    assert "auths" not in json.loads((home / "real/config.json").read_text())
    assert Logins().remove("quay.io")
    assert (home / "calls").read_text().endswith("erase quay.io\n")
