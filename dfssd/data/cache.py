"""Files from an object store, kept on the machine's own disk, so that each is fetched once and not once an epoch."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

SLACK = 0.05  # share of the limit that is freed beyond what is needed, and after which a process looks again


class DiskCache:
    """A folder of fetched files, bounded in size; all processes of a machine may share it.

    A file appears only when it is whole, and a fault of the disk is a miss, never an error: the store is still there. Files
    that nobody has used for longest go first. Several processes together may pass the limit by `SLACK` of it each, and by the
    files that they are writing.

    Args:
        folder: made where it does not exist; nothing else may be in it.
        gib: most that is kept (GiB).

    Raises:
        DfssdError: the folder cannot be written.
    """

    def __init__(self, folder: str, gib: float) -> None:
        self.folder, self.limit = Path(folder).expanduser().absolute(), int(gib * 2**30)
        self._written = self.limit  # looks at what is there before the first file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise DfssdError(
                f"the cache cannot be written: {error}", where=str(self.folder), todo="give another --cache-dir"
            ) from error

    def read(self, uri: str) -> bytes:
        """Content of the file: from the disk, or from its store and then kept.

        Raises:
            OSError: it is in neither.
        """
        if "://" not in uri:
            return read_uri(uri)
        place = self.folder / hashlib.sha256(uri.encode()).hexdigest()
        try:
            data = place.read_bytes()
            os.utime(place)
            return data
        except OSError:
            data = read_uri(uri)
        self._keep(place, data)
        return data

    def _keep(self, place: Path, data: bytes) -> None:
        if len(data) > self.limit * (1 - SLACK):
            return
        part = None
        try:
            self._written += len(data)
            if self._written > SLACK * self.limit:
                self._make_room(len(data))
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="part-", delete=False) as file:
                part = Path(file.name)
                file.write(data)
            part.replace(place)
        except OSError as error:
            if part is not None:
                with suppress(OSError):
                    part.unlink()  # it would fill a full disk for nothing
            print(f"WARNING: {self.folder} did not take a file: {error}", flush=True)

    def _make_room(self, needed: int) -> None:
        """Delete the files unused for longest until `needed` bytes and some more fit."""
        self._written = 0
        files = []
        for file in self.folder.iterdir():
            try:
                info = file.stat()
            except FileNotFoundError:  # another process was faster
                continue
            files.append((info.st_mtime_ns, info.st_size, file))
        total = sum(size for _, size, _ in files) + needed
        for _, size, file in sorted(files):
            if total <= self.limit * (1 - SLACK):
                return
            file.unlink(missing_ok=True)
            total -= size
