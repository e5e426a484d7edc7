"""Tables in many files, read side by side, and once for all processes of a machine.

A million pseudo-labelled images are 15,600 files; every rank of every node needs them all, and the manifest, before its first
step.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dfssd.errors import StorageError
from dfssd.runtime.storage import Storage, is_remote, side_by_side

WORTH_SHARING = 128  # files; fewer are read in less time than it takes to look for a copy
KEPT = 8  # copies on a machine: manifest and pseudo-labels of a few runs
THREADS = 4  # that read local files


def read_tables(store: Storage, names: Sequence[str], shared: bool = False) -> pa.Table:
    """The rows of all files, in their order.

    The first process of a machine that asks keeps them as one file on its disk, which the others map into memory. It is
    known by the artefact's `stage.json`, which is written last and says what all files hold; without one nothing is kept.

    Args:
        shared: do so for few files too, since several processes of this machine are about to ask.
    """
    if not (shared or len(names) >= WORTH_SHARING) or not store.exists("stage.json"):
        return _read(store, names)
    what, version = (hashlib.sha256(b).hexdigest()[:16] for b in (repr((store.uri, list(names))).encode(),
                                                                  store.read("stage.json")))  # fmt: skip
    try:
        folder = Path(tempfile.gettempdir()) / f"dfssd-tables-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError("the folder belongs to another user")
        with (folder / "lock").open("w") as lock:
            fcntl.flock(
                lock, fcntl.LOCK_EX
            )  # the others wait here for the first; the system lets go of it if that dies
            return _kept(folder / f"{what}-{version}.arrow", store, names)
    except StorageError:
        raise
    except OSError as error:
        print(f"WARNING: {store.uri} is read by each process: {error}", flush=True)
        return _read(store, names)


def _kept(place: Path, store: Storage, names: Sequence[str]) -> pa.Table:
    """From the copy, which is made where there is none; one of an earlier version goes then, and what was not asked for
    longest."""
    if not place.exists():
        table = _read(store, names).unify_dictionaries()  # the format knows one dictionary a column
        what = place.name.split("-")[0]
        others = sorted(place.parent.glob("*.arrow*"), key=lambda p: p.stat().st_mtime, reverse=True)
        for k, old in enumerate(others):
            if k >= KEPT - 1 or old.name.startswith(what):
                old.unlink()
        part = place.with_suffix(".arrow-part")
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        part.replace(place)
    os.utime(place)
    try:
        return pa.ipc.open_file(pa.memory_map(str(place))).read_all()
    except pa.ArrowInvalid:  # a power cut left its name without its content: the next process makes it again
        place.unlink()
        return _read(store, names)


def _read(store: Storage, names: Sequence[str]) -> pa.Table:
    tables = side_by_side(
        lambda name: pq.read_table(io.BytesIO(store.read(name))), names, is_remote(store.uri), threads=THREADS
    )
    return pa.concat_tables(tables)
