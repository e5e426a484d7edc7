"""Exports as they are downloaded: a .zip is unpacked once, to where all machines of a run can read it."""

from __future__ import annotations

import hashlib
import io
import posixpath
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dfssd.data.formats.listing import Tree, is_hidden, is_image
from dfssd.errors import DfssdError
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage, read_uri

DONE = "unpacked.json"


def is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def find_zip(data: str) -> str:
    """The .zip that `data` is, or that lies alone in the folder `data`; '' where there is none.

    Raises:
        DfssdError: a folder without pictures holds several.
    """
    if is_zip(data):
        return data
    if data.lower().endswith((".yaml", ".yml")) or "://" in data or not Path(data).expanduser().is_dir():
        return ""
    tree = Tree(data)
    files = tree.below()
    found = [f for f in files if is_zip(f)]
    if not found or any(is_image(f) for f in files):
        return ""
    if len(found) > 1:
        raise DfssdError(
            f"the folder holds no pictures, and {len(found)} .zip files: {', '.join(map(repr, found[:3]))}",
            where=repr(data),
            todo="give one of them with --data",
        )
    return found[0]


def unpack(path: str, run: Storage) -> str:
    """Unpack below the run's storage, unless that was done before; returns the folder.

    The folder is named after the content of the file, so that another file of the same name is another folder.

    Raises:
        DfssdError: it is no .zip, is damaged, is encrypted, or names files outside of itself.
    """
    try:
        with _opened(path) as stream:
            target = run.at("unpacked", _digest(stream))
            if not target.exists(DONE):
                count = _extract(zipfile.ZipFile(stream), path, target)
                target.write_json(DONE, {"from": path, "files": count})
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError, OSError) as error:
        why = "it is encrypted" if "encrypted" in str(error) else error
        raise DfssdError(
            f"the .zip cannot be unpacked: {why}", where=repr(path), todo="download it again, or unpack it by hand"
        ) from error
    return target.uri


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if "://" in path:
        yield io.BytesIO(read_uri(path))
        return
    with Path(path).expanduser().open("rb") as stream:
        yield stream


def _digest(stream: BinaryIO) -> str:
    """Name of the folder: from the file's size, its table of contents and its first megabyte."""
    state = hashlib.sha256(stream.read(2**20))
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 2**22))
    state.update(stream.read())
    state.update(str(size).encode())
    stream.seek(0)
    return state.hexdigest()[:16]


def _extract(archive: zipfile.ZipFile, path: str, target: Storage) -> int:
    members = [m for m in archive.infolist() if not m.is_dir()]
    wanted = [(m, name) for m in members if not any(map(is_hidden, (name := _name(m, path)).split("/")))]
    progress = Progress("unpacking", len(wanted), "file")
    for member, name in wanted:
        target.write(name, archive.read(member))  # whole in memory: one picture or one label file
        progress.add()
    return len(wanted)


def _name(member: zipfile.ZipInfo, path: str) -> str:
    """Path of a member. Programs that know no UTF-8 flag write the names in their own code page; ASCII stays as it is."""
    name = member.filename.replace("\\", "/")
    if not member.flag_bits & 0x800 and not name.isascii():
        raw = member.filename.encode("cp437", "replace")
        for encoding in ("utf-8", "gb18030", "cp932"):
            try:
                name = raw.decode(encoding).replace("\\", "/")
                break
            except UnicodeDecodeError:
                continue
    clean = posixpath.normpath(name)
    if clean.startswith(("/", "../")) or clean == ".." or ":" in clean.split("/")[0]:
        raise DfssdError(
            f"the .zip names a file outside of itself: {name!r}",
            where=repr(path),
            todo="do not unpack it: it is no data set",
        )
    return clean


def resolve_zip(data: str, run: Storage) -> str:
    """`data`, or where it was unpacked: the only folder in it where there is just one."""
    found = find_zip(data)
    if not found:
        return data
    folder = unpack(found, run)
    print(f"data: {found!r} is unpacked at {folder!r}", flush=True)
    return folder
