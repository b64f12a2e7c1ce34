"""http or https, and where certificates are looked for. The rest is in tests/root/test_registry_auth.py."""

from __future__ import annotations

import socket
import threading

import pytest
from framework.registry import Request, Server

from hv.errors import ConfigError, RegistryError
from hv.image import registry_reach
from hv.image.registry_reach import Access, is_local, split_port


@pytest.mark.parametrize("host, local", [
    ("localhost", True), ("127.0.0.1", True), ("127.255.0.3", True), ("[::1]", True), ("127.0.0.1.evil.com", False),
    ("127.evil.com", False), ("localhost.evil.com", False), ("128.0.0.1", False), ("127.0.0.999", False), ("", False)])
def test_what_is_this_machine(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_others_are_reached_by_https_without_a_try() -> None:
    assert Access().base("quay.io") == "https://quay.io:443"
    assert Access().base("quay.io:5000") == "https://quay.io:5000"
    assert Access().base("docker.io") == "https://registry-1.docker.io:443"


def test_http_where_no_tls_is_spoken_here() -> None:
    server = Server(lambda request: Request.reply(request, 200))
    try:
        assert Access().base(server.host) == f"http://{server.host}"
        assert Access(tls_verify=False).base(server.host) == f"http://{server.host}"
    finally:
        server.close()
    with pytest.raises(RegistryError, match=r"Connection refused"):
        Access().base(server.host)


def test_http_elsewhere_only_if_no_certificate_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_reach, "is_local", lambda host: False)
    server = Server(lambda request: Request.reply(request, 200))
    try:
        assert Access().base(server.host) == f"https://{server.host}"
        assert Access(tls_verify=False).base(server.host) == f"http://{server.host}"
    finally:
        server.close()


def test_a_peer_that_hangs_up_speaks_no_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        assert Access().base(host) == f"http://{host}"


def test_ports() -> None:
    assert split_port("[::1]:80") == ("[::1]", 80)
    assert split_port("[::1]") == ("[::1]", 0)
    for bad in ("x:0", "x:65536", "x:http"):
        with pytest.raises(ConfigError, match="is no port"):
            split_port(bad)
