"""One listing of files for all readers: what is hidden, what leads nowhere and what leads elsewhere is decided here.

Paths are full ones: absolute, or URIs. Data sets refer to folders beside them, so that names relative to one root do not do.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
# Pictures to a person, but not to this program: they are counted as bad files, never passed over.
OTHER_PICTURES = {
    ".gif",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".jxl",
    ".dng",
    ".cr2",
    ".nef",
    ".exr",
    ".pfm",
    ".svg",
    ".psd",
}
MASK_FOLDERS = {"segmentationclass", "segmentationobject", "segmentationclassaug", "mask", "masks", "ground_truth"}
_MASK_END = re.compile(r"[-_ ]?(mask|gt|seg)$", re.IGNORECASE)
_MASK_BESIDE = re.compile(r"[-_ ](mask|label|seg|segmentation)$", re.IGNORECASE)  # of a picture in the same folder
LABEL_SUFFIXES = {".txt", ".xml", ".json"}
RUN_MARKS = ("dataset/started.json", "dataset/stage.json", "mlflow.db")  # of a run's folder, and of MLflow's beside it
_SYSTEM = {
    "__macosx",
    "@eadir",
    "thumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "#recycle",
    "mlruns",
    "mlartifacts",
    "@recycle",
    "#snapshot",
}


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def refuse_query(uri: str) -> str:
    """The URI of a data set, which must hold neither keys nor a query: both would end up in the manifest.

    Raises:
        DfssdError: it holds one.
    """
    base, mark, _ = uri.partition("?")
    if "://" in uri and (mark or "@" in base.partition("://")[2].partition("/")[0]):
        raise DfssdError(
            "the URI of a data set may hold neither keys nor a query: they would be written into the manifest",
            where=uri,
            todo="give them in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role), AWS_REGION, "
            "AWS_ENDPOINT_URL",
        )
    return uri


def is_hidden(name: str) -> bool:
    """A file or folder that its owner does not see: `._x` and `__MACOSX` of a Mac, `.git`, `Thumbs.db`, ..."""
    return name.startswith(".") or name.lower() in _SYSTEM


def normal(path: str) -> str:
    """A full path without `.`, `..` and doubled slashes; links are not followed."""
    if "://" not in path:
        # pathlib keeps '..', and ends in an error where `~name` is no user's.
        return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath('/' + rest).lstrip('/')}" if scheme != "file" else path


def join(folder: str, relative: str) -> str:
    """`relative` seen from `folder`; an absolute path or a URI stands for itself."""
    if "://" in relative or relative.startswith(("/", "~")):
        return normal(relative)
    return normal(f"{folder}/{relative}")


def printable(path: str) -> str:
    """A path that can be written: bytes of a name that are no UTF-8 appear as \\xNN."""
    try:
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a letter, as JSON may spell it
        return path.encode("utf-8", "backslashreplace").decode()


@dataclass
class Tree:
    """Files by folder, each folder listed once; hidden ones are left out and counted.

    Args:
        root: the folder that the data lies in, or a URI.
        sheets: the folder that label files lie in, where that is another: its own name says nothing about pictures.
    """

    root: str
    folders: dict[str, dict[str, str]] = field(default_factory=dict)  # folder -> name -> full path
    hidden: int = 0
    dangling: list[str] = field(default_factory=list)  # links that lead nowhere
    unnameable: list[str] = field(default_factory=list)  # names that are no UTF-8, made printable
    outside: list[tuple[str, str]] = field(default_factory=list)  # links out of the listed folder, and where they lead
    masks: set[str] = field(default_factory=set)  # pictures that only say where something is in another one
    sheets: str = ""
    runs: list[str] = field(default_factory=list)  # what this program wrote into the data's folder: left out
    _listed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = normal(self.root)

    @property
    def is_remote(self) -> bool:
        return "://" in self.root

    def below(self, folder: str = "") -> list[str]:
        """All files in and below a folder, sorted.

        Raises:
            DfssdError: the folder cannot be read.
        """
        folder = normal(folder or self.root)
        self._list(folder)
        prefix = folder.rstrip("/") + "/"
        inside = [f for f in self.folders if f == folder or f.startswith(prefix)]
        return sorted(path for f in inside for path in self.folders[f].values())

    def pictures(self, folder: str = "", named: Container[str] = ()) -> list[str]:
        """Pictures in and below a folder, sorted, without masks: what lies in a folder that is called so, beside pictures
        of the same names elsewhere, and `a_mask.png` beside `a.jpg`, unless a label is about it.

        Args:
            named: file names that labels call pictures; label files of the picture's own name are seen here.
        """
        files = self.below(folder)
        found = [f for f in files if is_image(f)]
        top = len(normal(folder or self.root))
        apart = [f for f in found if any(part.lower() in MASK_FOLDERS for part in f[top:].split("/")[:-1])]
        beside = [f for f in found if _MASK_BESIDE.search(_stem(f))]
        if beside:
            labels = {_stem(f) for f in (*files, *self.below()) if PurePosixPath(f).suffix.lower() in LABEL_SUFFIXES}
            meant = {f for f in beside if _stem(f) in labels or f.rpartition("/")[2] in named}
            beside = [f for f in beside if f not in meant]
            self.masks.difference_update(meant)
        if not apart and not beside:
            return found
        others = set(found).difference(apart)
        stems = {_stem(f) for f in others}
        masks = {f for f in apart if _stem(f) in stems or _MASK_END.sub("", _stem(f)) in stems}
        whole = {f.rpartition(".")[0] for f in found} if beside else set()
        masks |= {f for f in beside if _MASK_BESIDE.sub("", f.rpartition(".")[0]) in whole}
        self.masks.update(masks)
        return [f for f in found if f not in masks]

    def in_folder(self, folder: str) -> dict[str, str]:
        """Files by name directly in a folder, which need not lie below the root; none where it does not exist."""
        folder = normal(folder)
        if folder not in self.folders and not self._is_listed(folder):
            if "://" in folder:
                self._list(folder)
            else:
                self._scan(folder, folder, deep=False)
        return self.folders.get(folder, {})

    def is_file(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.in_folder(folder or "/")

    def is_folder(self, path: str) -> bool:
        path = normal(path)
        if "://" not in path:
            return Path(path).is_dir()
        return bool(Storage(path).exists())

    def _is_listed(self, folder: str) -> bool:
        return any(folder == top or folder.startswith(top.rstrip("/") + "/") for top in self._listed)

    def _list(self, folder: str) -> None:
        if self._is_listed(folder):
            return
        self._listed.append(folder)
        if "://" in folder:
            self._list_remote(folder)
        else:
            self._scan(folder, folder, deep=True)

    def _list_remote(self, folder: str) -> None:
        found = Storage(folder).listing()
        runs = sorted({name.removesuffix(mark) for name in found for mark in RUN_MARKS if name.endswith(f"/{mark}")})
        self.runs += [f"{folder}/{run}".rstrip("/") for run in runs]
        for relative in found:
            if relative.startswith(tuple(runs)):
                continue
            if any(is_hidden(part) for part in relative.split("/")):
                self.hidden += 1
                continue
            path = f"{folder}/{relative}"
            parent, _, name = path.rpartition("/")
            self.folders.setdefault(parent, {})[name] = path

    def _scan(self, top: str, folder: str, deep: bool, above: tuple[str, ...] = ()) -> None:
        """List one local folder; `above`: the real folders it lies in, so that a link to one of them ends the walk."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda e: e.name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DfssdError(
                f"a folder cannot be read: {error.strerror}", where=repr(printable(folder)), todo="check its rights"
            ) from error
        real = os.path.realpath(folder)
        if real in above:
            return
        files = self.folders.setdefault(folder, {})
        for entry in entries:
            if is_hidden(entry.name):
                self.hidden += 1
            elif _no_utf8(entry.name):
                self.unnameable.append(printable(entry.path))
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110  (False where it may not be seen)
                self.dangling.append(entry.path)
            else:
                self._note_link(top, entry)
                if entry.is_file():
                    files[entry.name] = entry.path
                elif entry.is_dir() and deep:
                    if any(os.path.exists(f"{entry.path}/{mark}") for mark in RUN_MARKS):  # noqa: PTH110
                        self.runs.append(entry.path)
                    else:
                        self._scan(top, entry.path, deep, (*above, real))

    def _note_link(self, top: str, entry: os.DirEntry[str]) -> None:
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if not (target + "/").startswith(os.path.realpath(top).rstrip("/") + "/"):
                self.outside.append((entry.path, target))

    def notes(self) -> list[str]:
        """What a user should know about this listing, in whole sentences."""
        notes = []
        if self.outside:
            link, target = self.outside[0]
            notes.append(
                f"{len(self.outside)} link(s) lead out of the data's folder and are followed, such as {link!r} -> {target!r}"
            )
        if self.runs:
            notes.append(f"{len(self.runs)} runs of this program lie in it and are left out, such as {self.runs[0]!r}")
        if self.masks:
            notes.append(f"{len(self.masks)} masks of other pictures are left out, such as {min(self.masks)!r}")
        return notes


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0].lower()


def _no_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False
