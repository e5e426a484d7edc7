"""Which label belongs to which picture, for all formats whose label files name pictures or are named like them.

A *reference* is what a label file says about its picture: a file name, often with folders, and the label file's own
place. Candidates are pictures of that name. They are told apart by evidence alone, in this order:

1. the exact path, seen from the label file's folder, from the one above it or from the data's root;
2. the longest common suffix of folders, of the reference and of the place of the label file; folders that only say what
   kind of files they hold (images, labels, Annotations, ...) do not count;
3. the longest common prefix of folders.

A picture whose folders have no word in common with those of a reference is not meant by it where folders of labels and
of pictures go by the same names at all: `Annotations/lotB/0.xml` says nothing about `JPEGImages/lotA/0.png`. A reference
with two equally good pictures is an error that names both. References to the same picture are the reader's to join.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from urllib.parse import unquote

from dfssd.data.formats.listing import join
from dfssd.errors import DfssdError

KIND_FOLDERS = {
    *("image", "images", "img", "imgs", "jpegimages", "pictures", "photos", "rgb", "obj_train_data", "obj_valid_data"),
    *(
        "obj_test_data",
        "label",
        "labels",
        "annotation",
        "annotations",
        "ann",
        "xml",
        "xmls",
        "json",
        "jsons",
        "txt",
        "data",
    ),
    *("obj_data", "bbox", "bboxes", "anno", "annos", "source", "."),
}
Evidence = tuple[int, ...]
_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")  # Label Studio puts it before the names of uploaded files


@dataclass(frozen=True)
class Reference:
    """What a label file says about one picture.

    Args:
        sheet: full path of the label file.
        name: the picture as the file names it, with `/` between folders; ending in `.` where only the stem is known.
        hint: a further folder that the label file's own name or content speaks of, such as `train2017`.
        exact_suffix: suffix of the picture (`.png`) where it is known from elsewhere, which breaks a tie of equal stems.
    """

    sheet: str
    name: str
    hint: str = ""
    exact_suffix: str = ""


def slashes(name: str) -> str:
    """A path as other programs and systems write it, with `/` between folders and no `./` before it."""
    name = name.strip().strip("\"'").replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def stored(name: str) -> str:
    """A picture that Label Studio's local storage serves, below its folder: `?d=` and a path with its marks as `%5C`."""
    plain = unquote(name)
    return slashes(plain.rpartition("?d=")[2]) if "?d=" in plain else name


def composed(text: str) -> str:
    """Letters in their composed form: a Mac writes file names as letters and marks apart, label files have them as one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Pictures:
    """Pictures of a data set, found by what labels call them.

    Args:
        root: the data's folder.
        paths: full paths of all pictures.
        sheets: folder of the label files, where it is another.
    """

    def __init__(self, root: str, paths: Iterable[str], sheets: str = "") -> None:
        self.root, self.sheets = root, sheets or root
        self._by: dict[str, list[str]] = {}
        self._words: set[str] = set()
        last = ""
        for path in paths:
            folder, _, name = path.rpartition("/")
            if folder != last:
                self._words.update(_folders(path, root))
                last = folder
            name = composed(name)
            stem = name.rpartition(".")[0]
            for key in {name, name.lower(), f"{stem}.", f"{stem.lower()}."}:
                self._by.setdefault(key, []).append(path)

    def knows(self, folder: str) -> bool:
        """Does a folder of pictures go by this name?"""
        return folder.lower() in self._words

    def candidates(self, name: str) -> list[str]:
        """Pictures of this file name: as written, else in other case, else with another suffix, else as a program that
        was given the picture calls it (`%20` for a blank, the letters that Label Studio puts before an upload).
        """
        base = composed(name.rpartition("/")[2])
        for form in dict.fromkeys((base, unquote(base), _UPLOAD.sub("", base))):
            stem = form.rstrip(".") if form.endswith(".") else form.rpartition(".")[0] or form
            for key in (
                form,
                form.lower(),
                form.rstrip("."),
                f"{form}.",
                f"{form.lower()}.",
                f"{stem}.",
                f"{stem.lower()}.",
            ):
                if found := self._by.get(key):
                    return found
        return []

    def match(self, references: Sequence[Reference]) -> list[str | None]:
        """The picture of each reference; None where there is none.

        Raises:
            DfssdError: two pictures fit a reference equally well.
        """
        references = [replace(r, name=stored(r.name)) for r in references]
        told = [self._told_by(r) for r in references]
        same_words = not self._words.isdisjoint(word for words in told for word in words)
        return [self._choice(r, words, same_words) for r, words in zip(references, told, strict=True)]

    def _told_by(self, reference: Reference) -> list[str]:
        """Words of the folders that a reference speaks of: its own, else those around the label file."""
        named = _told([p.lower() for p in reference.name.split("/")[:-1]])
        return named or [*_folders(reference.sheet, self.sheets), *self._hint(reference)]

    def _hint(self, reference: Reference) -> list[str]:
        return [reference.hint.lower()] if self.knows(reference.hint) else []

    def _choice(self, reference: Reference, told: list[str], same_words: bool) -> str | None:
        pairs = [(self._evidence(reference, picture), picture) for picture in self.candidates(reference.name)]
        if same_words and told:
            own = [set(_folders(picture, self.root)) for _, picture in pairs]
            pairs = [
                p for p, words in zip(pairs, own, strict=True) if p[0][0] or not words or not words.isdisjoint(told)
            ]
        top = max((e for e, _ in pairs), default=())
        found = [picture for evidence, picture in pairs if evidence == top]
        if len(found) < 2:
            return found[0] if found else None
        raise DfssdError(
            f"{reference.name!r} may be either of two pictures: {found[0]!r} and {found[1]!r}",
            where=reference.sheet,
            todo="let the label files lie in folders like those of the pictures, or name the pictures with their folders",
        )

    def _evidence(self, reference: Reference, picture: str) -> Evidence:
        sheet_folder = reference.sheet.rpartition("/")[0]
        places = (sheet_folder, sheet_folder.rpartition("/")[0], self.root)
        exact = max(
            (
                3 - k
                for k, place in enumerate(places)
                if place and composed(join(place, reference.name)) == composed(picture)
            ),
            default=0,
        )
        own = _folders(picture, self.root)
        named = [composed(p).lower() for p in reference.name.split("/")[:-1]]
        raw = [composed(p).lower() for p in picture.split("/")[:-1]]
        # Parts of the reference itself count whatever they are called: 'images/a.png' does say that it is in images.
        suffix = max(_common(named[::-1], raw[::-1]), _common(_told(named)[::-1], own[::-1]))
        around = _folders(reference.sheet, self.sheets)
        hinted = [*around, *self._hint(reference)]
        places_around = max(_common(around[::-1], own[::-1]), _common(hinted[::-1], own[::-1]))
        equal = int(own in (around, hinted))
        file_suffix = int(bool(reference.exact_suffix) and picture.lower().endswith(reference.exact_suffix.lower()))
        return (exact, suffix, places_around, equal, _common(around, own), file_suffix)


def _folders(path: str, root: str) -> list[str]:
    """Folders below the root that say which part of the data a file belongs to, in lower case."""
    inside = path[len(root) :] if path.startswith(root.rstrip("/") + "/") else path
    return _told([p.lower() for p in inside.split("/")[:-1]])


def _told(folders: list[str]) -> list[str]:
    return [composed(p) for p in folders if p and p not in KIND_FOLDERS and p != ".."]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
