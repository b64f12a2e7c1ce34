"""Kubernetes' interface to containerd (k8s.io/cri-api, pkg/apis/runtime/v1/api.proto), as the kubelet calls it.

gRPC is HTTP/2 with a frame of five bytes around a message of protocol buffers: curl does the former, and the few
messages that are needed are nested lists of (field, value) here.
"""

from __future__ import annotations

import subprocess
from typing import Any

from framework.engines import IMAGE, RUNTIME, Containerd

Fields = list[tuple[int, Any]]
_NODE = 2                           # NamespaceMode: the host's network needs no CNI plugin


def encode(fields: Fields) -> bytes:
    """A message: numbers as varints; text, bytes and messages with their length before them."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            body = value.encode() if isinstance(value, str) else encode(value)
            out += _varint(number << 3 | 2) + _varint(len(body)) + body
    return out


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def decode(data: bytes) -> dict[int, Any]:
    """The last value of each field."""
    found: dict[int, Any] = {}
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        if key & 7:
            assert key & 7 == 2, key
            length = varint()
            found[key >> 3] = data[place:place + length]
            place += length
        else:
            found[key >> 3] = varint()
    return found


class Kubelet(Containerd):
    """A containerd with its CRI plugin on, whose runtime `pyhv` is as docs/containers.md has it."""

    program = ("sleep", "100000")   # what holds a pod's namespaces

    def settings(self) -> str:
        plugin = '[plugins."io.containerd.grpc.v1.cri"'
        return super().settings().replace('"io.containerd.grpc.v1.cri", ', "") + f'''
{plugin}]
  sandbox_image = "{IMAGE}"
  restrict_oom_score_adj = true
{plugin}.containerd]
  snapshotter = "native"
  default_runtime_name = "pyhv"
{plugin}.containerd.runtimes.pyhv]
  runtime_type = "io.containerd.runc.v2"
{plugin}.containerd.runtimes.pyhv.options]
  BinaryName = "{RUNTIME}"
  Root = "{self.folder}/runc"
'''

    def command(self, *words: str) -> list[str]:
        return ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *words]

    def ask(self, method: str, fields: Fields) -> dict[int, Any]:
        """Call the runtime service; the answer, or an AssertionError with what containerd said."""
        body = encode(fields)
        done = subprocess.run(
            ["curl", "--silent", "--include", "--max-time", "40", "--http2-prior-knowledge", "--unix-socket",
             str(self.socket), "--header", "content-type: application/grpc", "--header", "te: trailers",
             "--data-binary", "@-", f"http://localhost/runtime.v1.RuntimeService/{method}"],
            input=b"\0" + len(body).to_bytes(4, "big") + body, capture_output=True, timeout=60, check=False)
        head, _, rest = done.stdout.partition(b"\r\n\r\n")
        assert done.returncode == 0 and rest, (method, done.returncode, done.stdout, done.stderr)
        length = int.from_bytes(rest[1:5], "big")
        assert b"grpc-status: 0" in rest[5 + length:], (method, head, rest)
        return decode(rest[5:5 + length])

    def pod(self, name: str) -> Fields:
        """A PodSandboxConfig in the host's network."""
        metadata: Fields = [(1, name), (2, name), (3, "default")]
        security: Fields = [(1, [(1, _NODE)])]
        return [(1, metadata), (3, str(self.folder)), (8, [(1, f"/{self.parent}"), (2, security)])]

    def close(self) -> None:
        for row in self.said("container", "ls", "-q").split():
            self.call("task", "delete", "--force", row, code=None)
        super().close()
