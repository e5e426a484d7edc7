"""Entries of a data.yaml and lines of its lists, resolved as Ultralytics does, and where that finds nothing, as their
writers meant them: against `path`, the yaml's folder and the list's folder; with the `../` that Roboflow puts before
folders that lie beside the yaml; with a prefix such as `data/` that Darknet and CVAT write; with the folders of another
machine.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from dfssd.data.formats.listing import Tree, is_image, join, normal
from dfssd.data.formats.matching import slashes
from dfssd.data.formats.parsing import Unparsable, decode_text
from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

_PREFIXES = {"data", "dataset", "datasets"}
_DRIVE = re.compile(r"^[A-Za-z]:/")


@dataclass
class Split:
    """Pictures of one entry (train, val, test) of a data.yaml.

    Args:
        pictures: full paths.
        missing: lines of lists that lead nowhere, as written.
    """

    pictures: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class Resolver:
    """Finds what an entry or a line means.

    Args:
        tree: listing of the data.
        bases: folders that entries may be relative to, in order.
        own_names: names of the data set's own folders, which writers put before entries (`steel/images/train`).
    """

    def __init__(self, tree: Tree, bases: list[str], own_names: set[str]) -> None:
        self.tree, self.bases = tree, list(dict.fromkeys(bases))
        self.own_names = own_names | _PREFIXES
        self.moved = 0  # lines that were found by their last folders only
        self._roots: list[tuple[str, str]] = []  # folders of another machine, and what they are here

    def find(self, entry: str, first: str = "", files: bool = False) -> str | None:
        """Full path of an entry; None where it leads nowhere.

        Args:
            entry: as written.
            first: a further base that is tried first, such as the list's folder.
            files: look for files only.
        """
        entry = slashes(entry) or "."
        forms = (entry,) if entry.isascii() else (entry, *(unicodedata.normalize(f, entry) for f in ("NFC", "NFD")))
        return next((found for form in forms if (found := self._find(form, first, files)) is not None), None)

    def _find(self, entry: str, first: str, files: bool) -> str | None:
        here = self.tree.is_file if files else lambda p: self.tree.is_folder(p) or self.tree.is_file(p)
        bases = list(dict.fromkeys([b for b in (first, *self.bases) if b]))
        if _absolute(entry):
            return normal(entry) if not _DRIVE.match(entry) and here(normal(entry)) else self._elsewhere(entry, here)
        variants = [entry]
        while variants[-1].startswith("../"):  # Roboflow's data.yaml lies beside the folders it names with '../'
            variants.append(variants[-1][3:])
        parts = variants[-1].split("/")
        for k in range(1, len(parts)):
            if parts[k - 1].lower() not in self.own_names:
                break
            variants.append("/".join(parts[k:]))
        for variant in variants:
            for base in bases:
                if here(path := join(base, variant)):
                    return path
        return None

    def _elsewhere(self, entry: str, here: object) -> str | None:
        """An absolute path of another machine: found by its last two or more folders."""
        parts = [p for p in entry.split("/") if p]
        for old, new in self._roots:
            if entry.startswith(old) and callable(here) and here(path := join(new, entry[len(old) :])):
                self.moved += 1
                return path
        for k in range(1, len(parts)):
            if k == len(parts) - 1 and parts[k - 1].lower() not in self.own_names:
                break  # a last folder alone says too little
            for base in self.bases:
                path = join(base, "/".join(parts[k:]))
                if callable(here) and here(path):
                    self.moved += 1
                    self._roots.append((entry[: len(entry) - len("/".join(parts[k:]))], base))
                    return path
        return None

    def split(self, entries: list[str], key: str, yaml: str) -> Split:
        """Pictures of all entries of one split.

        Raises:
            DfssdError: an entry leads nowhere.
        """
        result, seen = Split(), set()
        for entry in entries:
            path = self.find(entry)
            if path is None or path == "/":  # a whole disk is no split
                raise DfssdError(
                    f"'{key}: {entry}' leads nowhere",
                    where=f"{yaml} (looked in {', '.join(map(repr, self.bases))})",
                    todo="mend the entry, or 'path' in the same file",
                )
            if self.tree.is_file(path) and not is_image(path):
                found, missing = self.listed(path)
                result.missing += missing
            elif self.tree.is_file(path):
                found = [path]
            else:
                found = self.tree.pictures(path)
            result.pictures += [f for f in found if not (f in seen or seen.add(f))]  # type: ignore[func-returns-value]
        return result

    def listed(self, path: str) -> tuple[list[str], list[str]]:
        """Pictures that a text file lists, and the lines that lead nowhere.

        Raises:
            DfssdError: it is no text.
        """
        try:
            lines = decode_text(read_uri(path)).splitlines()
        except (Unparsable, OSError) as error:
            raise DfssdError(
                f"a list of pictures cannot be read: {error}", where=path, todo="save it as UTF-8"
            ) from error
        found, missing = [], []
        for line in filter(None, (x.strip() for x in lines)):
            picture = self.find(line, first=path.rpartition("/")[0], files=True)
            if picture and is_image(picture):
                found.append(picture)
            else:
                missing.append(line)
        return found, missing


def _absolute(entry: str) -> bool:
    return entry.startswith(("/", "~")) or "://" in entry or bool(_DRIVE.match(entry))
