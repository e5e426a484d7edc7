"""Which code runs: from git, from what the submitter says, or, where neither is there, from the files themselves.

`ray job submit --working-dir .` uploads no `.git`, and an image holds none. There the id of the package's folder as git would
give it tells which commits hold exactly these files: `git rev-parse COMMIT:dfssd` prints it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from functools import lru_cache
from pathlib import Path

from dfssd.version import __version__

COMMIT = "DFSSD_COMMIT"  # environment: what `git describe --always --dirty=+` said where the job was submitted


def code_version() -> str:
    """Version and commit, as in 0.1.0+g1a2b3c4 (a plus at the end: uncommitted changes), or version and folder's id."""
    package = Path(__file__).resolve().parents[1]
    told = os.environ.get(COMMIT, "")
    commit = _described(package) or (told if re.fullmatch(r"[0-9a-f]{7,40}\+?", told) else "")
    return f"{__version__}+g{commit}" if commit else f"{__version__}+tree.{tree_id(package)[:12]}"


def _described(package: Path) -> str:
    """What git says of the checkout that the package lies in; '' outside of one, or without git."""
    if not any((folder / ".git").exists() for folder in package.parents):
        return ""
    try:
        return subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--dirty=+", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=60,  # on a busy machine; a version that is another one each time says nothing
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@lru_cache(4)
def tree_id(folder: Path) -> str:
    """Id (40 hex digits) that git gives to the tree of this folder, by its .py files and what else is no by-product.

    A tree object lists '<mode> <name>\\0<20 bytes of the entry's id>' by name, a folder's as if it ended in '/'
    (Git Internals, "Git Objects").
    """
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.suffix in (".pyc", ".pyo"):
            continue
        if path.is_dir():
            entries.append((f"{path.name}/", b"40000", path.name, tree_id(path)))
        else:
            mode = b"100755" if os.access(path, os.X_OK) else b"100644"
            entries.append((path.name, mode, path.name, _object_id(b"blob", path.read_bytes())))
    content = b"".join(
        b"%s %s\0%s" % (mode, name.encode(), bytes.fromhex(own)) for _, mode, name, own in sorted(entries)
    )
    return _object_id(b"tree", content)


def _object_id(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0%s" % (kind, len(content), content), usedforsecurity=False).hexdigest()
