"""Check every image and label of a source: what is usable, and why the rest is not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dfssd.config import Data, Run
from dfssd.data import checks, images
from dfssd.data.checks import Checked
from dfssd.data.formats.listing import printable
from dfssd.data.formats.source import Item, Source, unlabelled_items
from dfssd.data.large import LARGE, turn
from dfssd.data.manifest import Boxes
from dfssd.data.preparation import grouping
from dfssd.data.preparation.bad_files import Bad, write_bad
from dfssd.data.preparation.check_shards import on_cluster
from dfssd.data.preparation.neighbours import Hashes
from dfssd.errors import DfssdError
from dfssd.runtime.free_memory import free_memory
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage, is_remote, read_uri, side_by_side


class Thumbnails(Protocol):
    """Where the thumbnails of checked images are."""

    def hashes_of(self, chosen: Sequence[Checked]) -> Hashes:
        """(n,4,144), see `grouping.hashes`."""

    def thumb_of(self, image: Checked) -> np.ndarray:
        """(48,48) uint8."""

    def remove(self) -> None:
        """They are not needed any more."""


class InFacts:
    """In memory, with each image's facts: of sets that one process checks."""

    def hashes_of(self, chosen: Sequence[Checked]) -> np.ndarray:
        return grouping.hashes(np.stack([self.thumb_of(image) for image in chosen]))

    def thumb_of(self, image: Checked) -> np.ndarray:
        assert image.facts.thumb_hw is not None  # `check_image` has made it
        return image.facts.thumb_hw

    def remove(self) -> None:
        pass


def check_all(
    source: Source, config: Data, store: Storage, run: Run, cluster: bool | None = None
) -> tuple[list[Checked], list[Bad], Thumbnails, int]:
    """Check every image and label; images of --unlabelled folders join without labels.

    Returns:
        usable images, what cannot be used, thumbnails, and how many images were looked at.

    Args:
        store: takes the shards of a set that the cluster checks.
        cluster: check it there; None: as `on_cluster` says.

    Raises:
        DfssdError: not one image is usable.
    """
    extra, faults = unlabelled_items(config)
    jobs = list({i.uri: i for i in reversed([*source.items, *extra])}.values())[::-1]  # --unlabelled inside --data
    bad: list[Bad] = [*source.bad, *faults]
    good: list[Checked] = []
    thumbnails: Thumbnails = InFacts()
    there, why = on_cluster(len(jobs), any(is_remote(item.uri) for item in jobs))
    print(f"checking: {why if cluster in (None, there) else 'as asked for'}", flush=True)
    if there if cluster is None else cluster:
        from dfssd.data.preparation.check_cluster import check_on_cluster  # Ray, which a small set does without

        thumbnails = check_on_cluster([item.uri for item in jobs], config.max_side, store, run)
        results: Iterator[Checked | Bad] = (
            judge(item, seen, len(source.names), config, place)
            for place, (item, seen) in enumerate(zip(jobs, thumbnails.taken(), strict=True))
        )
    else:
        results = _in_process(jobs, len(source.names), config)
    for result in results:
        (good if isinstance(result, Checked) else bad).append(result)  # type: ignore[arg-type]
    if not good:
        first = f"{printable(bad[0][0])!r}: {bad[0][1].said()}" if bad else "none"
        raise DfssdError("not one usable image", where=repr(source.root), todo=f"first problem: {first}")
    return good, bad, thumbnails, len(jobs)


def check_one(item: Item, classes: int, config: Data) -> Checked | Bad:
    """One image and its label."""
    try:
        data = read_uri(item.uri)
    except OSError as error:
        return item.uri, checks.Problem("unreadable", str(error))
    return judge(item, _facts(item.uri, data, config.max_side), classes, config)


def judge(
    item: Item, facts: checks.ImageFacts | checks.Problem, classes: int, config: Data, place: int = -1
) -> Checked | Bad:
    """An image of which it is known what it is, and its label."""
    if isinstance(facts, checks.Problem):
        return item.uri, facts
    boxes: Boxes | checks.Problem | None = None
    if item.label is not None:
        boxes = checks.check_label(item.label, facts.width, facts.height, classes)
    elif config.missing_labels == "background":
        boxes = np.zeros((0, 5), np.float32)
    if isinstance(boxes, checks.Problem):
        return item.uri, boxes
    repeated = len(item.label.boxes) - len(boxes) if item.label is not None and boxes is not None else 0
    return Checked(item.uri, facts, boxes, item.split, place, repeated)


def _facts(uri: str, data: bytes, max_side: int) -> checks.ImageFacts | checks.Problem:
    try:
        width, height = images.size_of(data)
    except images.BadImage as error:
        return checks.Problem(error.reason, error.detail)
    if width * height < LARGE or not checks.is_usable(width, height, max_side):
        return checks.check_image(data, max_side)
    need = images.memory_to_open(data)
    with turn(width * height, need):
        free = free_memory()
        if need > free:  # the system would end the process without a word
            raise DfssdError(
                f"opening a picture of {width} x {height} px takes up to {need / 2**30:.1f} GiB of memory, "
                f"{free / 2**30:.1f} are free",
                where=repr(printable(uri)),
                todo=f"give this machine more, cut the picture into smaller ones, or leave such pictures out: "
                f"--max-side {max(width, height) - 1}",
            )
        return checks.check_image(data, max_side)


def _in_process(items: list[Item], classes: int, config: Data) -> Iterator[Checked | Bad]:
    """Check in threads (decoding frees the interpreter), a bounded number at a time, results in order."""
    remote = any(is_remote(item.uri) for item in items)
    progress = Progress("checking", len(items), "img")
    threads = os.cpu_count() or 1
    for result in side_by_side(lambda item: check_one(item, classes, config), items, remote, threads):
        yield result
        progress.add()


def stop_if_too_bad(bad: list[Bad], total: int, config: Data, store: Storage) -> None:
    """Raise a DfssdError where more files are bad than the limit allows; `bad_files.parquet` then lists them."""
    share = len(bad) / max(total, 1)
    if share <= config.bad_limit:
        return
    write_bad(store, bad)
    counts = Counter(problem.reason for _, problem in bad)
    lines = [f"{n} x {reason}: {checks.REASONS[reason]}" for reason, n in counts.most_common()]
    first = "\n    ".join(f"{printable(uri)!r}: {p.said()}" for uri, p in bad[:5])
    raise DfssdError(
        f"{len(bad)} of {total} files are bad ({_percent(share, config.bad_limit)}, "
        f"the limit is {_percent(config.bad_limit, share)}, {int(config.bad_limit * total)} files)\n    "
        + "\n    ".join(lines)
        + f"\n  for example:\n    {first}",
        where=store.path("bad_files.parquet"),
        todo="mend or remove these files, or accept them with --bad-limit",
    )


def _percent(share: float, other: float) -> str:
    """A share in percent with as many digits as tell it from the other one."""
    digits = 1
    while digits < 8 and f"{share:.{digits}%}" == f"{other:.{digits}%}":
        digits += 1
    return f"{share:.{digits}%}".replace("%", " %")


def drop_duplicates(good: list[Checked]) -> tuple[list[Checked], list[Bad], int]:
    """Keep one of each set of byte-identical images: the one with most boxes, then the first by name.

    A copy that a given split calls val or test keeps its picture out of train: the strictest split of all copies counts.

    Returns:
        images kept in the order of their ids, the others as bad files, and how many had other labels.
    """
    by_id: dict[str, list[Checked]] = {}
    for image in good:
        by_id.setdefault(image.image_id, []).append(image)
    kept, dropped, conflicts = [], [], 0
    for _, copies in sorted(by_id.items()):
        most = [c for c in copies if _count(c) == max(map(_count, copies))]
        keep = min(most, key=lambda c: c.uri)
        keep.given_split = max((c.given_split for c in copies), key=["", "train", "val", "test"].index)
        kept.append(keep)
        for copy in sorted(copies, key=lambda c: c.uri):
            if copy is not keep:
                dropped.append((copy.uri, checks.Problem("duplicate", f"of {keep.uri}")))
                same = copy.boxes is None or (keep.boxes is not None and np.array_equal(copy.boxes, keep.boxes))
                conflicts += not same
    return kept, dropped, conflicts


def _count(image: Checked) -> int:
    return -1 if image.boxes is None else len(image.boxes)


def set_white_levels(good: list[Checked], config: Data) -> tuple[dict[str, float], list[str]]:
    """White level of each picture of more than 8 bits, by image id, and what to say about them.

    One level holds for all whole-numbered and one for all float pictures: two pictures of one camera stay comparable.

    Raises:
        DfssdError: --white-level is below the values that pictures hold by more than a stray pixel's worth.
    """
    levels: dict[str, float] = {}
    notes = []
    for floating in (False, True):
        deep = [c for c in good if c.facts.top > 0 and c.facts.floating == floating]
        if not deep:
            continue
        top = max(c.facts.top for c in deep)
        white = config.white_level or images.white_level(top, floating)
        levels.update({c.image_id: white for c in deep})
        kind = "float" if floating else "16-bit"
        stretched = not floating and white < images.LEVELS[-1]
        levels_kept = f"; converted plainly they would have {int(top // 256) + 1} grey levels" if stretched else ""
        usual = images.white_level(float(np.median([c.facts.top for c in deep])), floating)
        stray = (
            f". Half of them hold no more than {usual:g}: where the few brighter ones are single hot pixels, "
            f"--white-level {usual:g} keeps {white / usual:.0f} times as many grey levels"
            if not config.white_level and 2 * usual < white
            else ""
        )
        how = "--white-level" if config.white_level else "found; --white-level sets it"
        notes.append(
            f"{len(deep)} {kind} pictures, values up to {top:g}: {white:g} becomes white (255; {how}){levels_kept}{stray}. "
            "Whoever runs the detector later must scale its pictures in the same way"
        )
    several = sum(c.facts.pages > 1 for c in good)
    if several:
        notes.append(f"{several} TIFF files hold several pages, of which the first is used")
    return levels, notes
