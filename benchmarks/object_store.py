"""How long a step waits for images that lie in an object store, and what the caches change.

    python benchmarks/object_store.py --latency-ms 20

An S3 server on loopback that answers each request late stands for a store across a network. The full distillation step of
`benchmarks/step.py` trains from it with its loader running. `cold` asks as dfssd does, with nothing kept, so that each step
fetches all of its images anew (a mosaic is made of four); the other rows keep them, and have seen all images before. The
server takes its share of the same cores, which a real store does not. It knows what reading needs and no more: that dfssd
works with S3 is shown by the tests, with a whole server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import multiprocessing
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from step import FULL, Bench, data_wait
from step import Settings as StepSettings

from dfssd.data.manifest import read_manifest, write_manifest
from dfssd.report.tables import render


@dataclass
class Settings:
    """What is measured."""

    latency_ms: float = 20.0
    """What the store adds to each request (ms)."""
    imgsz: int = 224
    batch: int = 16
    """Images of a step, half of them unlabelled."""
    steps: int = 20


async def answer(folder: Path, latency_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: the part of S3 that reading files needs (HEAD and GET with a range), every answer late."""
    while request := await reader.readline():
        method, path, _ = request.decode().split()
        headers = {}
        while (line := (await reader.readline()).decode().strip()) != "":
            key, _, value = line.partition(": ")
            headers[key.lower()] = value
        await asyncio.sleep(latency_s)
        file = folder / path.split("?")[0].removeprefix("/bucket/")
        body = file.read_bytes() if file.is_file() else b""
        status = "200 OK" if body or path.rstrip("/") == "/bucket" else "404 Not Found"
        size = len(body)
        if "range" in headers and body:
            first, last = headers["range"].removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last or size) + 1], "206 Partial Content"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nx-amz-bucket-region: us-east-1\r\n"
        head += "Last-Modified: Wed, 25 Nov 2026 00:00:00 GMT\r\n\r\n"
        writer.write(head.encode() + (b"" if method == "HEAD" else body))
    writer.close()


def serve(folder: Path, port: int, latency_s: float) -> None:
    async def run() -> None:
        server = await asyncio.start_server(functools.partial(answer, folder, latency_s), "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(run())


def start_store(folder: Path, latency_s: float) -> multiprocessing.Process:
    """A server in a process of its own, and an environment that leads to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, port, latency_s), daemon=True)
    server.start()
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return server  # type: ignore[return-value]
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the store did not start")


def move(bench: Bench) -> None:
    """Let the manifest name the images in the store."""
    rows = [
        dataclasses.replace(row, uri=f"s3://bucket/{Path(row.uri).relative_to(bench.folder / 'data')}")
        for row in bench.manifest.rows
    ]
    write_manifest(bench.run.at("dataset"), dataclasses.replace(bench.manifest, rows=rows))
    bench.manifest = read_manifest(bench.run.at("dataset"))


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    own = StepSettings(imgsz=s.imgsz, batch=s.batch)
    with tempfile.TemporaryDirectory(prefix="dfssd-store-") as folder:
        server = start_store(Path(folder, "data"), s.latency_ms / 1e3)
        try:
            bench = Bench(own, Path(folder), torch.device("cpu"))

            def wait(warm: int = 4, **train: Any) -> tuple[float, float]:
                session = bench.session("student", "auto", s.batch // 2, train=train, **FULL)
                return data_wait(session, s.batch, warm, s.steps)

            found = {"local files, cold": wait(cache_gib=0.0)}
            move(bench)
            found["store, cold"] = wait(cache_gib=0.0)
            found["store, --cache-dir"] = wait(warm=12, cache_gib=0.0, cache_dir=f"{folder}/cache")
            found["store, pixels kept"] = wait(warm=12)
        finally:
            server.terminate()
    rows = [[name, f"{100 * wait:.0f} %", f"{speed:.0f}"] for name, (wait, speed) in found.items()]
    title = f"{s.batch} images of {s.imgsz} px a step, {threads} threads, each request {s.latency_ms:g} ms late"
    print(render(title, ["images from", "data wait", "img/s"], rows))


if __name__ == "__main__":
    main()
