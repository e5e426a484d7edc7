"""Files of an artefact, as its `stage.json` has them: sizes and sha256 by name."""

from __future__ import annotations

import hashlib
from typing import Any

from dfssd.runtime.storage import Storage, side_by_side


def damaged_outputs(store: Storage, outputs: dict[str, Any], read: tuple[str, ...] = ()) -> dict[str, str]:
    """By name, what is wrong with each output that is not as `stage.json` says.

    Args:
        outputs: sizes (bytes) and sha256 by name.
        read: beginnings of the names whose sha256 is compared, too; of the others the size.
    """
    damaged: dict[str, str] = {}
    sizes = store.sizes(list(outputs))
    for name, entry in outputs.items():
        if sizes[name] is None:
            damaged[name] = "it is missing"
        elif sizes[name] != entry["bytes"]:
            damaged[name] = f"it has {sizes[name]} bytes, {entry['bytes']} were written"
    deep = [n for n in outputs if n not in damaged and read and n.startswith(read)]
    for name, found in zip(deep, side_by_side(store.digest, deep, remote=not store.is_local), strict=True):
        if found["sha256"] != outputs[name]["sha256"]:
            damaged[name] = "its sha256 differs from what was written"
    return damaged


def digest_of(outputs: dict[str, dict[str, Any]]) -> str:
    """One digest for a set of outputs, from their names and sha256."""
    lines = "\n".join(f"{name} {info['sha256']}" for name, info in sorted(outputs.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
