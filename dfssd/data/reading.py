"""Images as the loaders want them: decoded, shrunk, by index; from a store, the cache of files, or the cache of pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from dfssd.data.cache import DiskCache
from dfssd.data.decoded import DecodedCache, key_of
from dfssd.data.images import BadImage, memory_of, open_image
from dfssd.data.large import turn
from dfssd.errors import DfssdError
from dfssd.runtime.storage import is_remote, read_uri, side_by_side

if TYPE_CHECKING:  # what a loading process does not need, it does not import
    from dfssd.config import Train
    from dfssd.data.manifest import Row

cv2.setNumThreads(0)  # loaders are many; each has one core

ID_DIGITS = 16  # of an image_id: the first ones of the file's sha256
_REPLACED = (
    "put the old file back, or run prepare again under a new --run-name: its boxes are not those of this picture"
)
_MOVED = "it was fine when prepare ran: bring it back, or run prepare again under a new --run-name"


def disk_cache(train: Train) -> DiskCache | None:
    """The cache of fetched files that the settings ask for."""
    return DiskCache(train.cache_dir, train.cache_dir_gib) if train.cache_dir else None


def decode(uri: str, cache: DiskCache | None = None, white: float = 0.0, image_id: str = "") -> np.ndarray:
    """(H,W,3) uint8 BGR, turned as its EXIF data says.

    Args:
        white: of the manifest's row.
        image_id: of the manifest's row, which is a digest of the file; '' does not look whether it is still that file.

    Raises:
        DfssdError: the image was there when `prepare` looked, and is not readable now, or another one lies in its place.
    """
    try:
        data = cache.read(uri) if cache else read_uri(uri)
        if len(image_id) == ID_DIGITS and hashlib.sha256(data).hexdigest()[:ID_DIGITS] != image_id:
            raise DfssdError("another image lies where this one was when prepare ran", where=uri, todo=_REPLACED)
        return open_image(data, white)
    except OSError as error:
        raise DfssdError(f"image cannot be read: {error}", where=uri, todo=_MOVED) from error
    except BadImage as error:
        raise DfssdError(f"image cannot be decoded: {error}", where=uri, todo=_MOVED) from error


@contextmanager
def opened(
    uri: str, pixels: int, cache: DiskCache | None = None, white: float = 0.0, image_id: str = ""
) -> Iterator[np.ndarray]:
    """What `decode` returns, for as long as it is needed: large pictures wait for their turn (`data/large.py`).

    Args:
        pixels: of the picture, as the manifest says.
    """
    with turn(pixels, memory_of(pixels, white)):
        yield decode(uri, cache, white, image_id)


def shrunk_size(width: int, height: int, imgsz: int) -> tuple[int, int]:
    """Width and height (px) once the long side is `imgsz`, rounded as Ultralytics does when it loads an image."""
    ratio = imgsz / max(height, width)
    if ratio == 1:
        return width, height
    return min(int(np.ceil(width * ratio)), imgsz), min(int(np.ceil(height * ratio)), imgsz)


def shrink(image_hwc: np.ndarray, imgsz: int) -> np.ndarray:
    """Scale the long side to `imgsz` (px), as Ultralytics does when it loads an image."""
    height, width = image_hwc.shape[:2]
    size = shrunk_size(width, height, imgsz)
    if size == (width, height):
        return image_hwc
    return np.asarray(cv2.resize(image_hwc, size, interpolation=cv2.INTER_LINEAR))


def slim(image_bgr: np.ndarray) -> np.ndarray:
    """(H,W,3) RGB, or (H,W) where all channels are equal, as in most images of surfaces."""
    blue, green, red = cv2.split(image_bgr)
    if np.array_equal(blue, green) and np.array_equal(green, red):
        return np.asarray(green)
    return np.asarray(cv2.merge((red, green, blue)))


class Images:
    """The images of a list of rows, each decoded and shrunk to a long side of `imgsz` px.

    What loading processes need of a row lies in a few tensors, which they share with the process that starts them, and not in
    an object a row: a million rows would be pickled for each of them.

    Args:
        rows: images, in the order in which indices count them.
        files: where files from an object store are kept.
        decoded: where pixels are kept.
    """

    def __init__(
        self, rows: Sequence[Row], imgsz: int, files: DiskCache | None = None, decoded: DecodedCache | None = None
    ) -> None:
        self.imgsz, self._files, self._decoded = imgsz, files, decoded
        self._ids = Texts([row.image_id for row in rows])
        self._checked: set[int] = set()  # images whose digest this process has compared
        self._uris = Texts([row.uri for row in rows])
        self._keys = Texts([key_of(row) for row in rows])
        self._whites = torch.tensor([row.white for row in rows], dtype=torch.float32)
        self.sizes_wh = torch.tensor([[row.width, row.height] for row in rows], dtype=torch.int32).reshape(-1, 2)
        self.remote = any(is_remote(row.uri) for row in rows)
        self._fetched: dict[int, np.ndarray] = {}  # of the batch that is being made

    def __len__(self) -> int:
        return len(self.sizes_wh)

    def uri(self, i: int) -> str:
        return self._uris[i]

    def size(self, i: int) -> tuple[int, int]:
        """Width and height (px) of what `load` returns, known before it is loaded."""
        width, height = self.sizes_wh[i].tolist()
        return shrunk_size(width, height, self.imgsz)

    def load(self, i: int) -> np.ndarray:
        """(h,w,3) uint8 RGB or, of a grey image, (h,w); not to be written to.

        Raises:
            DfssdError: it is not readable, or is not the file that `prepare` looked at.
        """
        found = self._fetched.get(i)
        if found is None and self._decoded:
            found = self._decoded.read(self._keys[i], self.imgsz)
        return self._load_anew(i) if found is None else found

    def _load_anew(self, i: int) -> np.ndarray:
        uri = self.uri(i)
        width, height = self.sizes_wh[i].tolist()
        image_id = "" if i in self._checked else self._ids[i]
        with opened(uri, width * height, self._files, float(self._whites[i]), image_id) as full:
            self._checked.add(i)
            if full.shape[:2] != (height, width):
                raise DfssdError(
                    f"image has {full.shape[1]} x {full.shape[0]} px, and had {width} x {height} when prepare ran",
                    where=uri,
                    todo="put the old file back, or run prepare again under a new --run-name",
                )
            small = slim(shrink(full, self.imgsz))
        if self._decoded:
            self._decoded.keep(self._keys[i], self.imgsz, small)
        return small

    def fetch(self, indices: Iterable[int]) -> None:
        """Load the images of an object store that `load` will be asked for next, many at a time."""
        missing = sorted({i for i in indices if is_remote(self.uri(i))})
        self._fetched = dict(zip(missing, side_by_side(self.load, missing, remote=True), strict=True))

    def forget(self) -> None:
        """Let go of what was fetched."""
        self._fetched = {}


class Texts:
    """Many strings in two tensors."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._bytes = torch.frombuffer(bytearray(b"".join(encoded) or b" "), dtype=torch.uint8)
        ends = np.cumsum([0, *(len(e) for e in encoded)])
        self._ends = torch.from_numpy(ends.astype(np.int64))

    def __getitem__(self, i: int) -> str:
        first, last = int(self._ends[i]), int(self._ends[i + 1])
        return self._bytes[first:last].numpy().tobytes().decode()
