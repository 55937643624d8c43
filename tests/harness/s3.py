"""A real S3 server on this machine, moto's, in a process of its own, with a proxy before it that injects faults.

def test_save(s3):
    (s3.place() / "x").write_bytes(b"1")          # a bucket of its own for each test; ranks see it too
    s3.inject(Fault("PUT", "distcp", status=503, times=3))
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_mtp.storage.remote_path import RemotePath

START_S = 60.0


@dataclass(slots=True)
class Fault:
    """What happens to requests instead of, or before, what they ask for.

    Attributes:
        method: of the requests.
        path: text in the path or query of the requests.
        times: how many requests meet it; then it is over.
        skip: how many matching requests pass before.
        every: the fault hits one in `every` of the others.
        status: answered without asking the server; 0: the server answers.
        code: S3's name of the error.
        delay_s: seconds before the server is asked.
        cut_at: bytes of the answer's body after which the connection is cut; -1: none is cut.
        is_cut_early: with cut_at, the connection is cut before the answer's headers.
        cut_request: the connection is cut while the request's body arrives.
        hold: a request waits until it is set, and then goes on to the server.
        met: set when a whole request has met it.
    """

    method: str
    path: str = ""
    times: int = 1_000_000
    skip: int = 0
    every: int = 1
    status: int = 0
    code: str = "ServiceUnavailable"
    delay_s: float = 0.0
    cut_at: int = -1
    is_cut_early: bool = False
    cut_request: bool = False
    hold: threading.Event | None = None
    met: threading.Event = field(default_factory=threading.Event)
    count: int = 0
    """Matching requests, those that pass too."""


class FaultProxy:
    """Passes requests on to a server, but for those that meet a fault."""

    def __init__(self, port: int):
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request since `clear`."""
        self._mutex = threading.Lock()
        proxy = self

        class Handler(_Handler):
            upstream, owner = port, proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fault-proxy", daemon=True).start()

    def clear(self) -> None:
        """No faults; requests that are held are let go."""
        with self._mutex:
            for fault in self.faults:
                if fault.hold is not None:
                    fault.hold.set()
            self.faults.clear()
            self.requests.clear()

    def meets(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets."""
        with self._mutex:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.count < fault.skip + fault.times:
                    fault.count += 1
                    if fault.count > fault.skip and fault.count % fault.every == 0:
                        return fault
        return None

    def close(self) -> None:
        """Ends the server."""
        self.clear()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: int
    owner: FaultProxy

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, BrokenPipeError):
            super().handle_one_request()
            return
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _pass_on(self) -> None:
        fault = self.owner.meets(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut_request:
            self.rfile.read(min(length // 2, 1000))
            self._cut()
            return
        body = self._chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        if len(body) < length:  # the client died, and a server does not keep half of an object
            self.close_connection = True
            return
        if fault is not None:
            fault.met.set()
        if fault is not None and fault.hold is not None:
            fault.hold.wait(60)
        if fault is not None and fault.delay_s:
            time.sleep(fault.delay_s)
        if fault is not None and fault.status:
            text = (
                f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected {fault.code}</Message></Error>"
            )
            self._answer(fault.status, {"Content-Type": "application/xml"}, text.encode())
            return
        server = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        dropped = {"expect", "connection", "transfer-encoding", "content-length"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        server.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = server.getresponse()
        content = answer.read()
        kept = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")}
        server.close()
        if fault is not None and fault.is_cut_early:
            self._cut()
        elif fault is not None and fault.cut_at >= 0:
            self._answer(answer.status, kept, content, fault.cut_at)
            self._cut()
        else:
            self._answer(answer.status, kept, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815 -- names of the base class

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut_at: int | None = None) -> None:
        self.send_response_only(status)
        if self.command != "HEAD":
            headers = {n: v for n, v in headers.items() if n.lower() != "content-length"}
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_at])
        self.wfile.flush()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Bucket:
    """An empty bucket of a test."""

    name: str
    proxy: FaultProxy

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": self.proxy.url}

    def address(self, name: str = "run") -> str:
        """Address of a folder in it."""
        return f"s3://{self.name}/{name}"

    def place(self, name: str = "run") -> RemotePath:
        """The same as a path."""
        return RemotePath(self.address(name))

    def inject(self, fault: Fault) -> Fault:
        """From now on requests meet the fault; until the test ends, or `proxy.clear`."""
        self.proxy.faults.append(fault)
        return fault


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FaultProxy]:
    """moto's server behind a proxy, for all tests of a session."""
    pytest.importorskip("moto", reason="moto is a package of the dev extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without credentials of this machine; it answers to any.
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await(port, process)
        proxy = FaultProxy(port)
        yield proxy
        proxy.close()
    finally:
        process.kill()
        process.wait()


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError("moto's server did not start")


S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def enter_environment(values: dict[str, str]) -> None:
    """Sets variables of a process, such as a rank of a pool."""
    os.environ.update(values)


@pytest.fixture(scope="session")
def _s3_environment(s3_server: FaultProxy) -> Iterator[None]:
    """Set once for a session: pools of ranks and connections outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": s3_server.url}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def s3(s3_server: FaultProxy, _s3_environment: None) -> Iterator[Bucket]:
    """A bucket of its own for one test."""
    yield new_bucket(s3_server)
    s3_server.clear()


def new_bucket(s3_server: FaultProxy) -> Bucket:
    """An empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    server = http.client.HTTPConnection(s3_server.url.removeprefix("http://"), timeout=30)
    server.request("PUT", f"/{name}")
    assert server.getresponse().status == 200
    server.close()
    return Bucket(name, s3_server)
