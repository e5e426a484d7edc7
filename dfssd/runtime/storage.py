"""Where artefacts lie: a local folder, NFS or an object store, behind one small class.

Everything goes through pyarrow's filesystems, so no stage may assume that the driver's disk is the workers' disk.
A file is visible only when it is complete: local files are renamed into place, object stores publish on close.
"""

from __future__ import annotations

import errno
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

from dfssd.errors import DamagedFile, DfssdError, StorageError, mask
from dfssd.runtime.retry import retried

FETCHES = 16  # requests to an object store at a time: each waits tens of milliseconds for its first byte
WINDOW = 256  # items that `side_by_side` works on before it waits for the slowest of them
T = TypeVar("T")
R = TypeVar("R")


def _write_local(path: str, data: bytes | memoryview) -> None:
    """Write beside the place, to the disk, and only then under the name: a power cut leaves the old file or the new."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(place)
    except OSError:
        part.unlink(missing_ok=True)  # it would fill a full disk for nothing
        raise
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems have no such call
            raise
    finally:
        os.close(folder)


class Storage:
    """A folder on any pyarrow filesystem.

    What fails for a moment is tried again for `RETRY_S`; what is not there raises FileNotFoundError, and every other
    fault a StorageError.

    Args:
        uri: a local path (relative ones are made absolute at once, since workers have another cwd) or a URI such as
            `s3://bucket/prefix?region=eu-central-1`; what follows the question mark is for the filesystem.

    Raises:
        DfssdError: the URI's scheme is unknown to pyarrow.
    """

    def __init__(self, uri: str) -> None:
        self.is_local, self.query = "://" not in uri, ""
        if self.is_local:
            self.uri = str(Path(uri).expanduser().absolute())
            self.fs, self.root = pafs.LocalFileSystem(), self.uri
            return
        base, mark, query = uri.partition("?")
        self._base, self.query = base.rstrip("/"), mark + query
        self.uri = self._base + self.query
        try:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:
            raise DfssdError(
                f"storage cannot be opened: {error}",
                where=uri,
                todo="give a local folder or a URI that pyarrow knows (s3://, gs://)",
            ) from error
        self.root = self.root.rstrip("/")
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)

    def __str__(self) -> str:
        return mask(self.uri)

    def at(self, *parts: str) -> Storage:
        """Return the storage of a sub-folder."""
        return Storage(self.uri_of(*parts))

    def uri_of(self, *parts: str) -> str:
        """URI of a file or folder below this one; the filesystem's query stays at its end."""
        return "/".join([self._base if self.query else self.uri, *parts]) + self.query

    def path(self, *parts: str) -> str:
        """Return the path inside `self.fs`."""
        return "/".join([self.root, *parts])

    def exists(self, name: str = "") -> bool:
        path = self.path(name) if name else self.root
        info = retried(lambda: self.fs.get_file_info(path), path)
        return bool(info.type != pafs.FileType.NotFound)

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """Size of each file (bytes); None for one that is not there."""
        infos = retried(lambda: self.fs.get_file_info([self.path(n) for n in names]), self.root) if names else []
        return {n: i.size if i.type == pafs.FileType.File else None for n, i in zip(names, infos, strict=True)}

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: it cannot be read, also after some time.
        """

        def whole() -> bytes:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return bytes(stream.read())

        return retried(whole, self.path(name))

    def read_json(self, name: str) -> Any:
        """Content of a json file.

        Raises:
            DamagedFile: it is no json.
        """
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            if isinstance(error, DfssdError):
                raise
            raise DamagedFile(
                f"the file is no whole json ({error})", where=self.path(name), todo="restore it from a backup"
            ) from error

    def read_record(self, name: str, keys: Sequence[str], todo: str) -> dict[str, Any]:
        """A json file of the project, which holds at least these keys.

        Args:
            todo: what the user can do where it is damaged.

        Raises:
            DamagedFile: it is empty, cut, or of another shape.
        """
        try:
            record = self.read_json(name)
        except DamagedFile as error:
            raise DamagedFile(error.what, where=error.where, todo=todo) from error
        lacks = [k for k in keys if not isinstance(record, dict) or k not in record]
        if lacks or not isinstance(record, dict):
            said = f"lacks {', '.join(lacks)}" if isinstance(record, dict) else f"holds a {type(record).__name__}"
            raise DamagedFile(f"the file is damaged: it {said}", where=self.path(name), todo=todo)
        return record

    @contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """Open `name` for writing; it appears under its name only when the block ends without an error."""
        buffer = io.BytesIO()  # a stream to an object store publishes on close, also where an error closes it
        yield buffer
        self.write(name, buffer.getbuffer())

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file. A reader, and whoever comes after a power cut, finds the old content or the new.

        Raises:
            StorageError: it cannot be written, also after some time.
        """
        path = self.path(name)
        retried(lambda: _write_local(path, data) if self.is_local else self._upload(path, data), path)

    def _upload(self, path: str, data: bytes | memoryview) -> None:
        self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with self.fs.open_output_stream(path) as stream:
            stream.write(data)

    def write_json(self, name: str, data: Any) -> None:
        self.write(name, json.dumps(data, indent=2, sort_keys=True, default=str).encode())

    def files(self, folder: str = "", recursive: bool = True) -> list[str]:
        """Names of all files below `folder`, relative to this storage, sorted; unfinished ones are left out."""
        infos = self._infos(folder, recursive, pafs.FileType.File)
        return sorted(i.path[len(self.root) :].lstrip("/") for i in infos if not i.path.endswith(".part"))

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly below `folder`, sorted."""
        infos = self._infos(folder, False, pafs.FileType.Directory)
        return sorted(i.path.rsplit("/", 1)[1] for i in infos)

    def listing(self) -> dict[str, tuple[int, int | None]]:
        """Size (bytes) and time of change (ns) of all files, by name relative to this storage, sorted."""
        infos = self._infos("", True, pafs.FileType.File)
        return dict(sorted((i.path[len(self.root) :].lstrip("/"), (i.size, i.mtime_ns)) for i in infos))

    def _infos(self, folder: str, recursive: bool, kind: pafs.FileType) -> list[pafs.FileInfo]:
        base = self.path(folder) if folder else self.root
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=recursive)
        return [i for i in retried(lambda: self.fs.get_file_info(selector), base) if i.type == kind]

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with all in it; nothing happens where it does not exist."""
        path = self.path(name) if name else self.root

        def remove() -> None:
            kind = self.fs.get_file_info(path).type
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(path)
            elif kind == pafs.FileType.File:
                self.fs.delete_file(path)

        retried(remove, path)

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
            what, todo = str(error), "give another --storage-path, or the rights and credentials to write there"
            if isinstance(error, StorageError):
                what, todo = error.what, error.todo
            raise StorageError(f"storage is not writable: {what}", where=self.uri, todo=todo) from error


def read_uri(uri: str) -> bytes:
    """Read one file wherever it lies: a local path or a URI.

    Raises:
        OSError: it cannot be read.
    """
    if "://" not in uri:
        return Path(uri).read_bytes()
    base, mark, query = uri.partition("?")
    folder, name = base.rsplit("/", 1)
    return _opened(os.getpid(), folder + mark + query).read(name)


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
