"""Shards of `prepare`: images that one task reads, decodes and hashes, and the parquet file that comes of them.

A shard's file holds what an image is by itself (size, sha256, thumbnail, or what is wrong with it), nothing of its label: so
labels can change while a large set is being checked. Its name has the digest of what it was made from, so that an interrupted
`prepare` finds what is still good. The files are removed once the manifest is written.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dfssd.data.checks import THUMB_SIDE, ImageFacts, Problem, check_image, is_usable
from dfssd.data.formats.listing import printable
from dfssd.data.images import BadImage, memory_to_open, size_of
from dfssd.data.large import LARGE, turn
from dfssd.data.manifest import read_table, write_table
from dfssd.errors import DfssdError, StorageError
from dfssd.runtime.storage import Storage, is_remote, read_uri, side_by_side

FOLDER = "checked"
SHARD = 256  # images: some seconds of work
FORMAT = 1
MANY = 20_000  # images from which the start of Ray is worth it: half a minute of one core
MANY_REMOTE = 2_000  # the same behind a network
_decoding = threading.Lock()  # a task has one core, and memory for one picture that is not large

SCHEMA = pa.schema(
    [
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("thumb", pa.binary(THUMB_SIDE**2)),
        ("grey", pa.bool_()),
        ("top", pa.float64()),
        ("floating", pa.bool_()),
        ("pages", pa.int32()),
    ]
)
Seen = ImageFacts | Problem


def on_cluster(images: int, remote: bool) -> tuple[bool, str]:
    """Is checking so many images a job for the cluster, and why?"""
    where, many = ("behind a network", MANY_REMOTE) if remote else ("local", MANY)
    if images >= many:
        return True, f"{images} images {where}: checked by tasks on all nodes"
    return False, f"{images} images {where}, below {many}: checked in this process"


@dataclass(frozen=True)
class Shard:
    """Images number `first` to `first + len(uris)`, and the file of what is found."""

    first: int
    uris: tuple[str, ...]
    max_side: int
    file: str


def cut(uris: Sequence[str], max_side: int) -> list[Shard]:
    """Images cut into shards.

    Args:
        max_side: largest accepted side (px).
    """
    shards = []
    for first in range(0, len(uris), SHARD):
        part = tuple(uris[first : first + SHARD])
        what = "\n".join([f"{FORMAT} {max_side}", *part]).encode("utf-8", "surrogateescape")
        name = f"{FOLDER}/part-{first // SHARD:06d}-{hashlib.sha256(what).hexdigest()[:12]}.parquet"
        shards.append(Shard(first, part, max_side, name))
    return shards


def look(uri: str, max_side: int) -> Seen:
    """Read, decode and hash one image."""
    try:
        data = read_uri(uri)
    except OSError as error:
        return Problem("unreadable", str(error))
    try:
        width, height = size_of(data)
    except BadImage as error:
        return Problem(error.reason, error.detail)
    is_large = width * height >= LARGE and is_usable(width, height, max_side)
    with _decoding, turn(width * height, memory_to_open(data)) if is_large else nullcontext():
        return check_image(data, max_side)


def check_shard(shard: Shard, store_uri: str) -> tuple[int, int]:
    """Check a shard's images and write its file, which appears whole or not at all; runs on a CPU task.

    Returns:
        images, and how many of them cannot be used.

    Raises:
        DfssdError: this node does not see the folder, or the storage cannot be written.
    """
    first = shard.uris[0]
    remote = is_remote(first)
    if not remote and "://" not in first and not Path(first).parent.is_dir():
        raise DfssdError(
            f"node {socket.gethostname()} does not see the data",
            where=repr(printable(str(Path(first).parent))),
            todo="put images where every node finds them under the same path: NFS, or s3://, gs://",
        )
    seen = list(side_by_side(lambda uri: look(uri, shard.max_side), shard.uris, remote))
    write_table(Storage(store_uri), shard.file, to_table(seen))
    return len(seen), sum(isinstance(one, Problem) for one in seen)


def to_table(seen: Sequence[Seen]) -> pa.Table:
    """One row an image, in order."""
    rows: list[dict[str, Any]] = []
    for one in seen:
        if isinstance(one, Problem):
            rows.append({"reason": one.reason, "detail": printable(one.detail)})
            continue
        assert one.thumb_hw is not None  # `check_image` makes it
        facts = {name: getattr(one, name) for name in SCHEMA.names[2:] if name != "thumb"}
        rows.append({"thumb": one.thumb_hw.tobytes(), **facts})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def read_shard(store: Storage, shard: Shard) -> tuple[list[Seen], np.ndarray]:
    """What was found, without thumbnails; and these: (n,48,48) uint8, of zeros where there is none.

    Raises:
        FileNotFoundError: it is not there yet.
        ValueError: the file is damaged (pyarrow's errors are ValueErrors, or OSErrors).
    """
    table = read_table(store, shard.file)
    if table.num_rows != len(shard.uris) or table.schema.names != SCHEMA.names:
        raise ValueError(f"{table.num_rows} rows, expected {len(shard.uris)}")
    thumbs, seen = np.zeros((len(shard.uris), THUMB_SIDE, THUMB_SIDE), np.uint8), list[Seen]()
    for k, row in enumerate(table.to_pylist()):
        thumb, reason, detail = row.pop("thumb"), row.pop("reason"), row.pop("detail")
        if reason is not None:
            seen.append(Problem(reason, detail))
            continue
        thumbs[k] = np.frombuffer(thumb, np.uint8).reshape(THUMB_SIDE, THUMB_SIDE)
        seen.append(ImageFacts(thumb_hw=None, **row))
    return seen, thumbs


def read_if_good(store: Storage, shard: Shard) -> tuple[list[Seen], np.ndarray] | None:
    """`read_shard` of what an earlier attempt has left; None where it must be made (again): it is missing or damaged, or an
    image could not be read, which somebody may have brought back."""
    try:
        seen, thumbs = read_shard(store, shard)
    except StorageError:
        raise
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        print(f"WARNING: {store.path(shard.file)} is damaged ({str(error).splitlines()[0][:200]}) and is made again")
        return None
    lost = any(isinstance(one, Problem) and one.reason == "unreadable" for one in seen)
    return None if lost else (seen, thumbs)
