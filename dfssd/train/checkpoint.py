"""Checkpoints that exist only when they are whole.

A checkpoint is a folder `step_0000168` with `state.pt` (tensors and plain values only, so that it loads with
`weights_only=True`) and `MANIFEST.json` (size, sha256), written last. One without a manifest was being written when its
process ended, and does not count. One whose manifest does not verify is marked and passed over, loudly, and the one before
it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import torch

from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

State = dict[str, Any]
KEEP = 2  # checkpoints; the newest may be the one that was being written


def folder_name(step: int) -> str:
    return f"step_{step:07d}"


def _files(state: State) -> dict[str, bytes]:
    """`state.pt` and `MANIFEST.json`, in the order in which they are written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    entry = {"state.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    return {"state.pt": data, "MANIFEST.json": json.dumps(entry).encode()}


def store_newest(store: Storage, step: int, state: State, keep: int) -> None:
    """Write a checkpoint straight to its storage, and remove all but the newest `keep`."""
    for name, data in _files(state).items():
        store.write(f"{folder_name(step)}/{name}", data)
    for old in [n for n in store.folders() if n.startswith("step_")][:-keep]:
        store.delete(old)


def load_newest(store: Storage, fingerprint: str | None) -> State | None:
    """State of the newest whole checkpoint below `store`, or None where there is none at all.

    Args:
        store: folder that holds the `step_*` folders.
        fingerprint: of the settings; a checkpoint of others is refused; None takes any.

    Raises:
        DfssdError: there are checkpoints, and not one is whole; or the newest one belongs to other settings.
    """
    names = [n for n in reversed(store.folders()) if n.startswith("step_") and store.exists(f"{n}/MANIFEST.json")]
    for name in names:
        state = _load(store, name)
        if state is None:
            continue
        if fingerprint is not None and state["fingerprint"] != fingerprint:
            raise DfssdError(
                "the checkpoint belongs to other settings",
                where=store.path(name),
                todo="take a new --run-name, or add --overwrite",
            )
        return state
    if names:
        raise DfssdError(
            "there are checkpoints, and none of them is whole",
            where=store.uri,
            todo="restore one of them, or delete this folder to train from the beginning",
        )
    return None


def _load(store: Storage, name: str) -> State | None:
    """A verified state, or None after saying why it is passed over."""
    if store.exists(f"{name}/BAD"):
        return None
    try:
        expected = store.read_json(f"{name}/MANIFEST.json")["state.pt"]
        data = store.read(f"{name}/state.pt")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise ValueError(f"state.pt has {len(data)} bytes and another sha256, expected {expected['bytes']} bytes")
    except (OSError, ValueError, KeyError) as error:
        print(f"WARNING: checkpoint {store.path(name)} is damaged and passed over: {error}", flush=True)
        store.write(f"{name}/BAD", str(error).encode())
        return None
    return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


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
