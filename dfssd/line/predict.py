"""Label pictures with an exported detector: once, or as they arrive in a folder."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from dfssd.data.formats.listing import IMAGE_SUFFIXES
from dfssd.data.images import BadImage, open_image
from dfssd.errors import DfssdError
from dfssd.line.drawing import drawn
from dfssd.line.drift import Drift, picture_numbers
from dfssd.line.results import Results

UNREADABLE = "unreadable"  # folder beside the pictures that what cannot be decoded is moved to
DRAWN = "drawn"  # folder in that of the results
TRIES = 3  # looks at an unreadable picture before it is moved: it may still be being written
SAY_S = 5.0


class Detector(Protocol):
    """What labels pictures: `detector.LineDetector`, or a .pt behind the same call."""

    names: list[str]
    metadata: dict[str, Any]

    def __call__(self, pictures: Sequence[np.ndarray], tau_c: np.ndarray | None = None) -> list[np.ndarray]: ...

    def thresholds(self, score: float | None = None) -> np.ndarray: ...


def find_pictures(places: Sequence[str], out: Path | None = None) -> list[Path]:
    """Files and the pictures of folders, below them too, in order.

    Args:
        out: folder for results: what an earlier labelling has drawn there is no picture of the line.

    Raises:
        DfssdError: a place does not exist, or there is no picture.
    """
    found: list[Path] = []
    drawings = (out / DRAWN).resolve() if out else None
    for place in map(Path, places):
        if place.is_dir():
            pictures = (p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and UNREADABLE not in p.parts)
            found += sorted(p for p in pictures if p.parent.name != DRAWN or p.parent.resolve() != drawings)
        elif place.is_file():
            found.append(place)
        else:
            raise DfssdError("no such picture or folder", where=str(place), todo="check the path")
    if not found:
        raise DfssdError(
            "there is no picture", where=" ".join(places), todo=f"known endings: {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return found


class Labelling:
    """One labelling: detector, results, drift and rate.

    Args:
        out: folder for results. score: one threshold for all classes; none: the model's operating point.
        draw: also keep pictures with their boxes drawn, in `out`/drawn.
    """

    def __init__(
        self,
        detector: Detector,
        out: Path,
        score: float | None = None,
        draw: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.detector, self.draw, self.say = detector, draw, say
        self.tau_c, self.white = detector.thresholds(score), float(detector.metadata.get("white", 0.0))
        self.results = Results(out, detector.names, str(detector.metadata.get("weights_sha256", ""))[:12])
        if self.results.damaged:
            count = self.results.damaged
            say(f"WARNING: {count} line(s) of {self.results.file} cannot be read: their pictures count as new")
        self.drift = Drift(detector.metadata.get("reference", {}))
        self.pictures = self.rejected = self.bad = 0
        self.busy_s = 0.0
        self._warned: set[str] = set()

    def label(self, file: Path) -> bool:
        """Label one picture; False where it cannot be read."""
        begun = time.perf_counter()
        try:
            stamp = stamp_of(file)
            picture = open_image(file.read_bytes(), self.white)
        except (OSError, BadImage):
            return False
        boxes = self.detector([picture], self.tau_c)[0]
        height, width = picture.shape[:2]
        one = self.results.add(file, stamp, (width, height), boxes)
        self.drift.add(picture_numbers(picture, boxes))
        self.busy_s += time.perf_counter() - begun
        self.pictures += 1
        self.rejected += one["verdict"] == "reject"
        if self.draw:
            place = self._place(file)
            place.write_bytes(cv2.imencode(".jpg", drawn(picture, boxes, self.detector.names))[1].tobytes())
        return True

    def _place(self, file: Path) -> Path:
        """Where a drawn picture lies: its folder's and own name, and a number of its path's own, the same after a restart."""
        path = file.absolute()
        own = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        place = self.results.out / DRAWN / f"{path.parent.name}_{path.stem}_{own}.jpg"
        place.parent.mkdir(exist_ok=True)
        return place

    def progress(self) -> str:
        """Pictures, rejects and rate in one line."""
        rate = self.pictures / self.busy_s if self.busy_s else 0.0
        bad = f", {self.bad} unreadable" if self.bad else ""
        return f"{self.pictures} pictures, {self.rejected} rejected{bad}  {rate:.1f} pictures/s"

    def warn(self) -> None:
        """Say what has drifted, each number once until it comes back."""
        now = {text.split(" has", 1)[0]: text for text in self.drift.warnings()}
        for measure, text in now.items():
            if measure not in self._warned:
                self.say(f"WARNING: {text}")
        self._warned = set(now)


def predict(labelling: Labelling, files: Sequence[Path]) -> None:
    """Label pictures, and write all formats. What an earlier run into the same folder said of them is replaced.

    Raises:
        DfssdError: none of them could be read.
    """
    said = time.monotonic()
    for k, file in enumerate(files, 1):
        if not labelling.label(file):
            labelling.bad += 1
            labelling.say(f"WARNING: cannot be read: {file}")
        if time.monotonic() - said > SAY_S:
            labelling.say(f"{k}/{len(files)}  {labelling.progress()}")
            said = time.monotonic()
    if not labelling.pictures:
        raise DfssdError("none of the pictures can be read", where=str(files[0]), todo="check that these are pictures")
    labelling.warn()
    places = labelling.results.finish()
    others = len(set(labelling.results.done) - set(map(str, files)))
    kept = f" (with {others} pictures of earlier runs into this folder)" if others else ""
    labelling.say(f"{labelling.progress()}\nresults   {', '.join(map(str, places))}{kept}")


def watch(labelling: Labelling, folder: Path, poll_s: float = 1.0, rounds: int | None = None) -> None:
    """Label what arrives in a folder until interrupted; what was labelled before a restart is not labelled again.

    A file is read once its size stands still between two looks; one that cannot be decoded is moved to `unreadable/`.

    Args:
        poll_s: seconds between two looks. rounds: looks before it ends (for tests); none: for ever.

    Raises:
        DfssdError: there is no such folder.
    """
    if not folder.is_dir():
        raise DfssdError("no such folder to watch", where=str(folder), todo="make it, or check the path")
    before: dict[Path, str] = {}
    tries: dict[Path, int] = {}
    said, told, look = time.monotonic(), -1, 0
    try:
        while rounds is None or look < rounds:
            look += 1
            now = {}
            for file, stamp in _arrived(folder):
                now[file] = stamp
                if labelling.results.known(file, stamp) or before.get(file) != stamp:
                    continue
                if labelling.label(file):
                    tries.pop(file, None)
                    continue
                tries[file] = tries.get(file, 0) + 1
                if tries[file] >= TRIES:
                    _aside(labelling, file, folder)
            before = now
            labelling.warn()
            if time.monotonic() - said > SAY_S and labelling.pictures != told:
                labelling.say(labelling.progress())
                said, told = time.monotonic(), labelling.pictures
            time.sleep(poll_s)
    finally:
        labelling.results.finish()
        labelling.say(labelling.progress())


def _arrived(folder: Path) -> Iterator[tuple[Path, str]]:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_file() and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            try:
                yield Path(entry.path), stamp_of(Path(entry.path))
            except OSError:  # taken away between two looks
                continue


def _aside(labelling: Labelling, file: Path, folder: Path) -> None:
    place = folder / UNREADABLE
    place.mkdir(exist_ok=True)
    target = place / file.name
    while target.exists():
        target = target.with_name(f"{target.stem}_{target.suffix}")
    try:
        file.rename(target)
    except FileNotFoundError:  # taken away since it was looked at
        return
    labelling.bad += 1
    labelling.say(f"WARNING: cannot be read, moved to {target}")


def stamp_of(file: Path) -> str:
    """Size and time of a file: another picture under the same name has another one."""
    stat = file.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"
