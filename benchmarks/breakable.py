"""Servers that can be broken: an S3 endpoint (moto) behind a proxy that refuses or fails, an MLflow server that is killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "dfssd"
_WRITE = re.compile(rb"(?:PUT|POST) (/[^ ?]*)")  # at the beginning of a request


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy:
    """Hands connections on to a port of loopback; set `mode` to break them.

    pass: as they come. fail: every request is answered with 500. refuse: every connection is closed at once. Those that are
    open when the mode changes are cut. What `holds` says yes to (the path of a write) waits until it says no.
    """

    def __init__(self, target: int) -> None:
        self.target, self.requests_failed = target, 0
        self.holds: Callable[[str], bool] = lambda path: False
        self._mode, self._open, self._lock = "pass", set[socket.socket](), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        with self._lock:
            self._mode, cut, self._open = mode, self._open, set()
        for one in cut:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.mode = "refuse"

    def _held(self, client: socket.socket, data: bytes) -> None:
        """Wait with a write that is held.

        Raises:
            ConnectionError: whoever sent it is gone, and what the dead have not delivered shall not come late.
        """
        found = _WRITE.match(data)
        path = found[1].decode() if found else ""
        held = bool(path) and self._mode == "pass" and self.holds(path)
        while held:
            time.sleep(0.02)
            held = self._mode == "pass" and self.holds(path)
            with contextlib.suppress(BlockingIOError):  # after it: who died before the write was let go is noticed
                if not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    raise ConnectionError

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._mode != "pass":
                self.requests_failed += 1
                if self._mode == "fail":
                    _answer_500(client)
                return
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target), 10) as server:
                server.settimeout(None)
                with self._lock:
                    self._open |= {client, server}
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server, self._held)
                back.join()
                with self._lock:
                    self._open -= {client, server}


def _pump(
    source: socket.socket, target: socket.socket, first: Callable[[socket.socket, bytes], None] | None = None
) -> None:
    """Hand on what comes, after `first` has seen it."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if first is not None:
                first(source, data)
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _answer_500(client: socket.socket) -> None:
    """Read what was asked, as far as it comes at once, so that the answer is not lost with a reset connection."""
    client.settimeout(0.3)
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass
    with contextlib.suppress(OSError):
        client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


class Server:
    """A process that answers HTTP on loopback, and can be killed and started again."""

    def __init__(self, command: list[str], port: int, path: str, log: Path) -> None:
        self.command, self.port, self.path, self.log = command, port, path, log
        self.process: subprocess.Popen[bytes] | None = None
        self._lock, self._closed = threading.Lock(), False

    def start(self, wait_s: float = 120.0) -> None:
        """Start it where it does not run, and wait until it answers; 0: do not wait."""
        with self._lock:
            if not self._closed and (self.process is None or self.process.poll() is not None):
                clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))}
                with self.log.open("a") as log:
                    self.process = subprocess.Popen(
                        self.command, stdout=log, stderr=subprocess.STDOUT, env=clean, start_new_session=True
                    )
        deadline = time.monotonic() + wait_s
        while wait_s:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.path}", timeout=2).close()
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.command[:4]} does not answer: {self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and what it has started."""
        with self._lock:
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def close(self) -> None:
        """Kill it, and let nobody start it again."""
        self._closed = True
        self.kill()


def _client(port: int) -> Any:
    import boto3

    own = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name=KEYS["AWS_DEFAULT_REGION"], **own)


def _fill(port: int, folder: Path) -> None:
    """Make the bucket, with the files of a folder in it, as far as there are any."""
    client = _client(port)
    client.create_bucket(Bucket=BUCKET)
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        client.upload_file(str(file), BUCKET, str(file.relative_to(folder)))


def _keep(port: int, folder: Path) -> None:
    """Copy the bucket, which the endpoint holds in memory alone, into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    client = _client(port)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for name in (entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            client.download_file(BUCKET, name, str(folder / name))


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[tuple[dict[str, str], Proxy, Server]]:
    """An S3 endpoint behind a proxy, and an MLflow server; yields the environment that leads to them, and what breaks them.

    The bucket is `BUCKET`. What both hold stays in `folder` where the block ends without an error, and is there again with
    the next servers of that folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    s3_port, tracking_port = free_port(), free_port()
    s3 = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3_port)]
    tracking = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(tracking_port)]
    tracking += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    tracking += ["--artifacts-destination", str(folder / "artefacts")]
    store = Server(s3, s3_port, "/", folder / "s3.log")
    mlflow = Server(tracking, tracking_port, "/health", folder / "mlflow.log")
    proxy = Proxy(s3_port)
    try:
        mlflow.start(wait_s=0)
        store.start()
        mlflow.start()
        _fill(s3_port, folder / "bucket")
        env = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_EC2_METADATA_DISABLED": "true"}
        yield {**env, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{tracking_port}"}, proxy, mlflow
        _keep(s3_port, folder / "bucket")
    finally:
        proxy.close()
        store.close()
        mlflow.close()
