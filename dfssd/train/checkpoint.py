"""Checkpoints that exist only when they are whole.

A checkpoint is a folder `step_0000168` with `state.pt` (tensors and plain values only, so that it loads with
`weights_only=True`) and `MANIFEST.json` (size, sha256), written last. One without a manifest was being written when its
process ended, and does not count. One that was read completely and does not verify is passed over, loudly, and the one
before it is used; `BAD` beside it names the digest of what was found, so that a file that is brought back counts again.
A storage that does not answer says nothing about a checkpoint: it is tried again, and then stops the run.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from typing import Any

import torch

from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup

State = dict[str, Any]
KEEP = 2  # checkpoints; the newest may be the one that was being written
FORMAT = 1  # of the state; a change that older versions cannot read counts it up
READS = (1,)  # formats that this version reads
NEEDED = ("format", "fingerprint", "step")


def folder_name(step: int) -> str:
    return f"step_{step:07d}"


def _files(state: State) -> dict[str, bytes]:
    """`state.pt` and `MANIFEST.json`, in the order in which they are written."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    data = buffer.getvalue()
    entry = {"state.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    return {"state.pt": data, "MANIFEST.json": json.dumps(entry).encode()}


def store_newest(store: Storage, step: int, state: State, keep: int) -> None:
    """Write a checkpoint straight to its storage, and remove all but the newest `keep` and those of later steps.

    Later steps are there where a damaged checkpoint was passed over: they are replaced on the way.
    """
    folder = folder_name(step)
    if store.exists(folder):
        store.delete(folder)  # its manifest and its mark belong to what was there before
    for name, data in _files(state).items():
        store.write(f"{folder}/{name}", data)
    for old in [n for n in store.folders() if n.startswith("step_") and n <= folder][:-keep]:
        store.delete(old)


def newest_step(store: Storage) -> int:
    """Step of the newest checkpoint that was written to its end; 0 where there is none."""
    names = [n for n in store.folders() if n.startswith("step_") and store.exists(f"{n}/MANIFEST.json")]
    return int(names[-1].removeprefix("step_")) if names else 0


def load_newest(store: Storage, fingerprint: str | None) -> State | None:
    """State of the newest whole checkpoint below `store`, or None where there is none at all.

    Args:
        store: folder that holds the `step_*` folders.
        fingerprint: of the settings; a checkpoint of others is refused; None takes any.

    Raises:
        DfssdError: there are checkpoints, and not one is whole; or the newest one belongs to other settings, or to another
            version.
        StorageError: the storage does not answer; nothing was marked.
    """
    found = newest(store, fingerprint)
    return found[1] if found else None


def newest(store: Storage, fingerprint: str | None) -> tuple[str, State] | None:
    """sha256 and state of the newest whole checkpoint; see `load_newest`."""
    names = [n for n in reversed(store.folders()) if n.startswith("step_") and store.exists(f"{n}/MANIFEST.json")]
    for name in names:
        data = _verified(store, name)
        if data is None:
            continue
        state = _unpack(data, store.path(name))
        if fingerprint is not None and state["fingerprint"] != fingerprint:
            raise DfssdError(
                "the checkpoint belongs to other settings",
                where=store.path(name),
                todo="take a new --run-name, or add --overwrite",
            )
        return hashlib.sha256(data).hexdigest(), state
    if names:
        raise DfssdError(
            "there are checkpoints, and none of them is whole",
            where=store.uri,
            todo="restore one of them, or delete this folder to train from the beginning",
        )
    return None


def load_agreed(store: Storage, fingerprint: str, workers: WorkerGroup) -> State | None:
    """The state that all workers go on from: rank 0 chooses, the others read that one, and all compare digests.

    Raises:
        DfssdError: as `load_newest`, on all workers alike; or the workers do not see the same checkpoint.
    """
    found: tuple[str, State] | None = None
    told: tuple[int, str] | DfssdError | None = None  # an error is passed on, or the others would wait for this worker
    try:
        found = newest(store, fingerprint) if workers.rank == 0 else None
        told = (found[1]["step"], found[0]) if found else None
    except DfssdError as error:
        told = error
    chosen = workers.gather(told)[0]
    if isinstance(chosen, DfssdError):
        raise chosen
    if chosen is None:
        return None
    try:
        state = found[1] if found else _read(store, *chosen)
        told = (state["step"], chosen[1])
    except DfssdError as error:
        told = error
    for one in workers.gather(told):
        if isinstance(one, DfssdError):
            raise one
        assert one == chosen, "every worker has read what rank 0 has chosen"
    return state


_ONE = "--storage-path must be one storage that all machines see"


def _read(store: Storage, step: int, sha256: str) -> State:
    """The checkpoint that rank 0 has chosen."""
    name = folder_name(step)
    data = store.read(f"{name}/state.pt")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DfssdError(
            f"the workers see different checkpoints of step {step}: {found[:12]} here, {sha256[:12]} on rank 0",
            where=store.path(name),
            todo=_ONE,
        )
    return _unpack(data, store.path(name))


def _verified(store: Storage, name: str) -> bytes | None:
    """Content of a checkpoint that verifies, or None after saying why it is passed over."""
    try:
        manifest = store.read(f"{name}/MANIFEST.json")
        data = store.read(f"{name}/state.pt")
    except FileNotFoundError as error:
        _passed_over(store, name, b"", f"a file is missing: {error}")
        return None
    try:
        expected = json.loads(manifest)["state.pt"]
        wanted, size = str(expected["sha256"]), int(expected["bytes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _passed_over(store, name, manifest, f"MANIFEST.json is no manifest ({type(error).__name__}: {error})")
        return None
    if hashlib.sha256(data).hexdigest() != wanted:
        why = f"state.pt has {len(data)} bytes and another sha256, expected {size} bytes"
        _passed_over(store, name, data, why)
        return None
    return data


def _passed_over(store: Storage, name: str, found: bytes, why: str) -> None:
    """Say once, for this content, that it is damaged."""
    digest = hashlib.sha256(found).hexdigest()
    mark = f"{name}/BAD"
    if store.exists(mark) and store.read(mark).decode(errors="replace").startswith(digest):
        return
    print(f"WARNING: checkpoint {store.path(name)} is damaged and passed over: {why}", flush=True)
    store.write(mark, f"{digest}\n{why}\n".encode())


def _unpack(data: bytes, where: str) -> State:
    """A state from the bytes of `state.pt`; code in it is never run.

    Raises:
        DfssdError: it is no checkpoint, or one of a format that this version does not read.
    """
    todo = "delete this checkpoint's folder, and the one before it is used"
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DfssdError(
            f"state.pt verifies, and is no checkpoint of this project: {str(error).splitlines()[0]}",
            where=where,
            todo=todo,
        ) from error
    lacks = [k for k in NEEDED if not isinstance(state, dict) or k not in state]
    if lacks or not isinstance(state, dict):
        raise DfssdError(f"state.pt is no checkpoint of this project: no {', '.join(lacks)}", where=where, todo=todo)
    if state["format"] not in READS:
        readable = " or ".join(map(str, READS))
        raise DfssdError(
            f"the checkpoint has format {state['format']}, this version of dfssd reads format {readable}",
            where=where,
            todo="go on with the version of dfssd that wrote it, or take a new --run-name",
        )
    return state


def mend_ray_snapshot(store: Storage) -> None:
    """Set a damaged Ray Train snapshot aside.

    Ray 2.60 rewrites `checkpoint_manager_snapshot.json` in place; a driver killed at the wrong millisecond leaves a cut
    file, and the next start of the same run would fail for ever. Our own manifests say which checkpoints are whole.
    """
    name = "checkpoint_manager_snapshot.json"
    if not store.exists(name):
        return
    try:
        store.read_json(name)
    except ValueError:
        aside = f"{name}.corrupt-{len([f for f in store.files(recursive=False) if '.corrupt-' in f])}"
        print(f"WARNING: {store.path(name)} is damaged, set aside as {aside}", flush=True)
        store.write(aside, store.read(name))
        store.delete(name)
