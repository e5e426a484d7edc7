"""Decoded and shrunk images on the machine's own disk, mapped into memory by every process that loads images there.

One file an image. The kernel keeps in memory what it has room for, once for all processes and all runs of the machine;
reading costs a small part of decoding again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from dfssd.data.manifest import Row

SLACK = 0.05  # share of the limit after which a process looks again at what the others have written
FREE_SHARE = 0.07  # of the disk that is left free: Ray stores nothing more on one that is full to 95 %
MOST_MAPPED = 4096  # files, by one process; Linux lets it map 65,530 pieces of memory
_HEADER = struct.Struct("<8sHHHxx")  # mark, height, width, channels
_MARK = b"dfssd-01"  # another layout of the file, or another way to decode and shrink, gets another number


class DecodedCache:
    """A folder of raw images, bounded in size, shared by all processes of a machine.

    A file appears only when it is whole, its size must be the one that its head says, and after a restart of the machine,
    where half-written files may look whole, another folder is used. A fault of the disk is a miss, never an error. What is in
    stays in until another run needs the room: as images are asked for in random order, a cache that is too small then serves
    its share of them, without writing at each miss.

    Args:
        folder: where `dfssd-decoded` is made; '': in the system's folder for temporary files, for this user alone.
        gib: most that is kept (GiB); never more than leaves `FREE_SHARE` of the disk free.
    """

    def __init__(self, folder: str, gib: float) -> None:
        own = Path(tempfile.gettempdir()) / f"dfssd-decoded-{os.getuid()}"
        top = (Path(folder).expanduser() / "dfssd-decoded" if folder else own).absolute()
        self.folder, self.limit = top / _boot(), int(gib * 2**30)
        self._used, self._since_look, self._faulty = 0, self.limit, False
        self._mapped: dict[
            tuple[str, int], np.ndarray
        ] = {}  # by this process: mapping a file again costs as much as using it
        try:
            top.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not folder and top.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to another user, who could put other images there")
            self.folder.mkdir(exist_ok=True)
            for old in top.glob("boot*"):
                if old != self.folder:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            self._fault(error)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mapped": {}}

    def read(self, key: str, imgsz: int) -> np.ndarray | None:
        """(h,w,3) or (h,w) uint8, mapped and not to be written to; None where it is not kept."""
        found = self._mapped.get((key, imgsz))
        if found is None and not self._faulty:
            found = _map(str(self._place(key, imgsz)))
            if found is not None:
                if len(self._mapped) >= MOST_MAPPED:
                    self._mapped.pop(next(iter(self._mapped)))
                self._mapped[key, imgsz] = found
        return found

    def keep(self, key: str, imgsz: int, image: np.ndarray) -> None:
        """Store an image if there is room."""
        if self._faulty or not self._has_room(image.nbytes):
            return
        place = self._place(key, imgsz)
        channels = 1 if image.ndim == 2 else image.shape[2]
        part = None
        try:
            place.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, prefix="part-", delete=False) as file:
                part = Path(file.name)
                file.write(_HEADER.pack(_MARK, image.shape[0], image.shape[1], channels))
                file.write(np.ascontiguousarray(image).data)
            part.replace(place)
        except OSError as error:
            if part is not None:
                with contextlib.suppress(OSError):
                    part.unlink()
            self._fault(error)

    def make_room(self, rows: Sequence[Row], imgsz: int) -> None:
        """Before training: if what is kept leaves no room for these images, drop others, the oldest first."""
        wanted = {self._place(key_of(row), imgsz).name: 3 * imgsz**2 * _share(row) for row in rows}
        kept = list(self._files())
        here = {file.name for _, _, file in kept}
        used = sum(size for _, size, _ in kept)
        need = sum(size for name, size in wanted.items() if name not in here)
        most = self._most(used)
        excess = used + need - most
        self._say_disk_is_full(most, min(self.limit, int(sum(wanted.values()))))
        for _, size, file in sorted(kept):
            if excess <= 0:
                break
            if file.name not in wanted:
                with contextlib.suppress(OSError):
                    file.unlink()
                excess -= size
        self._since_look = self.limit

    def _place(self, key: str, imgsz: int) -> Path:
        return self.folder / key[:2] / f"{key}-{imgsz}"

    def _has_room(self, size: int) -> bool:
        """Would the image fit? Each process counts what it writes, and looks at the folder now and then."""
        self._since_look += size
        if self._since_look > SLACK * self.limit:
            self._used, self._since_look = sum(s for _, s, _ in self._files()), 0
        self._used += size
        if self._used <= self._most(self._used - size):
            return True
        self._used -= size
        return False

    def _most(self, used: int) -> int:
        """Bytes that may be kept, as the disk is now with `used` of them on it."""
        try:
            disk = shutil.disk_usage(self.folder)
        except OSError:
            return 0
        return min(self.limit, used + disk.free - int(FREE_SHARE * disk.total))

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time, bytes, file) of all that is kept."""
        for file in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process was faster
                info = file.stat()
                yield info.st_mtime_ns, info.st_size, file

    def _say_disk_is_full(self, most: int, wanted: int) -> None:
        """A full disk costs time in every epoch and is otherwise seen by nobody."""
        if most < wanted and not self._faulty:
            print(
                f"WARNING: the disk of {self.folder} has room for {max(0, most) / 2**30:.1f} "
                f"of up to {wanted / 2**30:.1f} GiB of decoded images ({FREE_SHARE:.0%} of it stays "
                "free): the others are decoded again in every epoch. "
                "Free some space, or give a folder on another disk: --decoded-dir DIR",
                flush=True,
            )

    def _fault(self, error: OSError) -> None:
        if not self._faulty:
            print(f"WARNING: decoded images are not kept in {self.folder}: {error}", flush=True)
        self._faulty = True


def _map(place: str) -> np.ndarray | None:
    """The image in a file, if it is whole. PyTorch maps a file without keeping it open, of which a process may have few."""
    try:
        size = Path(place).stat().st_size
        if size < _HEADER.size:
            return None
        data = torch.from_file(place, shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError):
        return None
    mark, height, width, channels = _HEADER.unpack_from(data.data)
    if mark != _MARK or size != _HEADER.size + height * width * channels:
        return None
    image = data[_HEADER.size :].reshape((height, width) if channels == 1 else (height, width, channels))
    image.flags.writeable = False
    return np.asarray(image)


def key_of(row: Row) -> str:
    """Under which its pixels are kept: those of a picture of more than 8 bits depend on its white level too."""
    return row.image_id + (f"-{row.white:g}" if row.white else "")


def _share(row: Row) -> float:
    """Of the square that holds it, once shrunk."""
    return min(row.width, row.height) / max(row.width, row.height)


def _boot() -> str:
    """Name of the machine's present run: files that were not yet on the disk when it stopped are never looked at."""
    try:
        return "boot-" + Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:13]
    except OSError:
        return "boot"
