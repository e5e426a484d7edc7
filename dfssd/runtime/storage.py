"""Where artefacts lie: a local folder, NFS or an object store, behind one small class.

Everything goes through pyarrow's filesystems, so no stage may assume that the driver's disk is the workers' disk.
A file is visible only when it is complete: local files are renamed into place, object stores publish on close.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pyarrow import fs as pafs

from dfssd.errors import DfssdError

FETCHES = 16  # requests to an object store at a time: each waits tens of milliseconds for its first byte
WINDOW = 256  # items that `side_by_side` works on before it waits for the slowest of them
T = TypeVar("T")
R = TypeVar("R")


class Storage:
    """A folder on any pyarrow filesystem.

    Args:
        uri: a local path (relative ones are made absolute at once, since workers have another cwd) or a URI such as
            `s3://bucket/prefix`.

    Raises:
        DfssdError: the URI's scheme is unknown to pyarrow.
    """

    def __init__(self, uri: str) -> None:
        self.is_local = "://" not in uri
        if self.is_local:
            self.uri = str(Path(uri).expanduser().absolute())
            self.fs, self.root = pafs.LocalFileSystem(), self.uri
            return
        self.uri = uri.rstrip("/")
        try:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:
            raise DfssdError(
                f"storage cannot be opened: {error}",
                where=uri,
                todo="give a local folder or a URI that pyarrow knows (s3://, gs://)",
            ) from error
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)

    def at(self, *parts: str) -> Storage:
        """Return the storage of a sub-folder."""
        return Storage("/".join([self.uri, *parts]))

    def path(self, *parts: str) -> str:
        """Return the path inside `self.fs`."""
        return "/".join([self.root, *parts])

    def exists(self, name: str = "") -> bool:
        info = self.fs.get_file_info(self.path(name) if name else self.root)
        return bool(info.type != pafs.FileType.NotFound)

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    @contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """Open `name` for writing; it appears under its name only when the block ends without an error."""
        path = self.path(name)
        self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        if not self.is_local:
            buffer = io.BytesIO()  # a stream to an object store publishes on close, also where an error closes it
            yield buffer
            with self.fs.open_output_stream(path) as stream:
                stream.write(buffer.getvalue())
            return
        with self.fs.open_output_stream(f"{path}.part") as stream:
            yield stream
        self.fs.move(f"{path}.part", path)

    def write(self, name: str, data: bytes) -> None:
        with self.writer(name) as stream:
            stream.write(data)

    def write_json(self, name: str, data: Any) -> None:
        self.write(name, json.dumps(data, indent=2, sort_keys=True, default=str).encode())

    def files(self, folder: str = "", recursive: bool = True) -> list[str]:
        """Names of all files below `folder`, relative to this storage, sorted; unfinished ones are left out."""
        base = self.path(folder) if folder else self.root
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=recursive)
        infos = [i for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.File]
        return sorted(i.path[len(self.root) :].lstrip("/") for i in infos if not i.path.endswith(".part"))

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly below `folder`, sorted."""
        base = self.path(folder) if folder else self.root
        selector = pafs.FileSelector(base, allow_not_found=True)
        infos = self.fs.get_file_info(selector)
        return sorted(i.path.rsplit("/", 1)[1] for i in infos if i.type == pafs.FileType.Directory)

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with all in it; nothing happens where it does not exist."""
        path = self.path(name) if name else self.root
        kind = self.fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            self.fs.delete_file(path)

    def digest(self, name: str) -> dict[str, Any]:
        """Size (bytes) and sha256 of one file."""
        data = self.read(name)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def check_writable(self) -> None:
        """Raise a DfssdError where nothing can be written."""
        try:
            self.write(".write-test", b"ok")
            self.delete(".write-test")
        except OSError as error:
            raise DfssdError(
                f"storage is not writable: {error}",
                where=self.uri,
                todo="give another --storage-path, or the rights and credentials to write there",
            ) from error


def read_uri(uri: str) -> bytes:
    """Read one file wherever it lies: a local path or a URI.

    Raises:
        OSError: it cannot be read.
    """
    if "://" not in uri:
        return Path(uri).read_bytes()
    folder, name = uri.rsplit("/", 1)
    return _opened(os.getpid(), folder).read(name)


def is_remote(uri: str) -> bool:
    """Does a network lie between here and this file or folder?"""
    return "://" in uri and not uri.startswith("file:")


def side_by_side(work: Callable[[T], R], items: Sequence[T], remote: bool, threads: int = 1) -> Iterator[R]:
    """`work` of every item, in order; at least `FETCHES` at a time where each waits for an object store.

    Args:
        remote: do the items lie behind a network?
        threads: items at a time where they do not; 1: in this thread.
    """
    threads = max(threads, FETCHES) if remote else threads
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(items), WINDOW):
            yield from pool.map(work, items[first : first + WINDOW])


@lru_cache(64)
def _opened(process: int, folder: str) -> Storage:
    """The storage of a folder, opened once a process: to open a bucket asks the network, and a fork must not share it."""
    return Storage(folder)
