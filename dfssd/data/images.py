"""The one place that opens a picture, for `prepare` and for training alike: what the first accepts the second sees.

Pictures of more than 8 bits (16-bit PNG and TIFF, float TIFF) become 8-bit grey levels by one *white level* for the whole
data set: the value that becomes 255. Cameras of 10, 12 or 14 bits write 16-bit files, of which a plain conversion keeps
the upper 8 bits: of 4,096 levels 16 are left. `prepare` finds the level (`white_level`) and the manifest keeps it.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

# Pillow refuses pictures of more than 179 million pixels; a strip of 4096 x 50,000 px has 205. Our own limits are
# `--max-side` and MAX_PIXELS, and they are looked at before anything is decoded.
Image.MAX_IMAGE_PIXELS = None
MAX_PIXELS = 2**30  # OpenCV's own limit; 3 GiB once it is decoded
BYTES_A_PIXEL = 7  # of memory, to open a picture of 8 bits: three for its pixels, the others for copies (measured: 6)
DEEP_BYTES_A_PIXEL = 12  # the same of one of 16 bits and three channels
_BLOCK = 2**23  # values that are converted at a time; float copies of a whole picture would take four times its memory

# Types by their first bytes, looked at before PIL: Ultralytics replaces PIL's open() by one that tries to install
# packages when it does not know a file.
TYPES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    "WEBP": (b"RIFF",),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
}
UNDERSHOOT = 0.02  # of the largest value: what resampling leaves below black and above white
LEVELS = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # white of cameras of 8, 10, 12, 14 and 16 bits
_LAB = (8, 9, 10)  # TIFF's PhotometricInterpretation: CIE L*a*b*, ICC L*a*b*, ITU L*a*b*
_PHOTOMETRIC, _BITS, _WIDTH, _HEIGHT = 262, 258, 256, 257

# A damaged file is counted with a reason; the libraries' own words would land in the middle of a progress line.
logging.getLogger("PIL").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="PIL")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BadImage(ValueError):
    """A picture that cannot be opened; `reason` is a key of `checks.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def kind_of(data: bytes) -> str:
    """Type of a picture by its first bytes.

    Raises:
        BadImage: it is empty, or of no known type.
    """
    if not data:
        raise BadImage("zero_bytes", "")
    for kind, starts in TYPES.items():
        if data.startswith(starts):
            return kind
    raise BadImage("wrong_type", f"first bytes {data[:8]!r}")


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in px as the header says, before any rotation; nothing is decoded.

    Raises:
        BadImage: the header makes no sense.
    """
    kind = kind_of(data)
    try:
        if kind == "TIFF":
            tags = _tiff_tags(data)
            return int(tags[_WIDTH]), int(tags[_HEIGHT])
        return Image.open(io.BytesIO(data), formats=[kind]).size
    except (
        Exception
    ) as error:  # damaged headers end in errors of every kind, among them some of struct and of Ultralytics
        raise BadImage("unreadable", f"the header makes no sense ({error})") from error


def memory_to_open(data: bytes) -> int:
    """Most bytes that opening a picture takes, from its header: it as the file has it, as uint8, and in grey levels.

    Raises:
        BadImage: the header makes no sense.
    """
    width, height = size_of(data)
    return int(width * height * max(BYTES_A_PIXEL, _held(data) + 4.5))


def _held(data: bytes) -> float:
    """Bytes of a pixel as a file has it that `size_of` could read; those of 8 bits are opened as colours."""
    kind = kind_of(data)
    if kind == "PNG" and _deep_png(data):
        return 2.0 * {0: 1, 2: 3, 4: 2}.get(data[25], 4)  # channels by its type of colour
    if kind == "PPM" and _deep_ppm(data):
        return 2.0 * (3 if data[:2] in (b"P3", b"P6") else 1)
    if kind == "TIFF":
        try:
            return min(24.0, float(np.sum(_tiff_tags(data).get(_BITS, 8))) / 8)
        except (TypeError, ValueError):  # bits that are no numbers: decoding it will say more
            return 3.0
    return 3.0


def memory_of(pixels: int, white: float) -> int:
    """The same, from what the manifest says of a picture."""
    return pixels * (DEEP_BYTES_A_PIXEL if white else BYTES_A_PIXEL)


def decode_raw(data: bytes) -> np.ndarray:
    """Pixels as the file holds them, turned as its EXIF data says: (H,W,3) uint8 BGR, or of a deeper file (H,W) or (H,W,3)
    of its own type (uint16, int32, float32, ...).

    Raises:
        BadImage: it cannot be decoded to the last byte.
    """
    kind = kind_of(data)
    try:
        if kind == "TIFF" and _tiff_tags(data).get(_PHOTOMETRIC) in _LAB:
            return _decode_lab(data)
        deep = kind == "TIFF" or (kind == "PNG" and _deep_png(data)) or (kind == "PPM" and _deep_ppm(data))
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR if deep else cv2.IMREAD_COLOR
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except BadImage:
        raise
    except Exception as error:  # cv2.error, struct.error, MemoryError, ...: whatever a damaged file brings about
        raise BadImage("unreadable", str(error).splitlines()[0] if str(error) else repr(error)) from error
    if image is None or (kind == "JPEG" and _cut(data)):
        raise BadImage("truncated" if _ends_early(data, kind) else "unreadable", f"a {kind} that cannot be decoded")
    if image.ndim == 3 and image.shape[2] != 3:  # transparency, or further channels of a TIFF
        image = image[:, :, :3] if image.shape[2] > 3 else image[:, :, 0]
    if image.dtype == np.uint8 and image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return np.asarray(image)


def to_uint8(image: np.ndarray, white: float = 0.0) -> np.ndarray:
    """What `decode_raw` returned as (H,W,3) uint8 BGR.

    Args:
        white: value that becomes 255; 0: the largest of the type (1 of floats). 8-bit pictures are left as they are.
    """
    if image.dtype == np.uint8:
        return image
    grey = np.empty(image.shape, np.uint8)
    for rows in blocks(image):
        if image.dtype.kind in "ui":  # whole steps, so that 65535 is the shift by 8 bits that OpenCV makes
            scaled = image[rows].astype(np.float32) * (256 / ((white or LEVELS[-1]) + 1))
        else:
            scaled = np.nan_to_num(image[rows].astype(np.float32)) * (255 / (white or 1.0)) + 0.5
        grey[rows] = scaled.clip(0, 255).astype(np.uint8)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR) if grey.ndim == 2 else grey


def blocks(image: np.ndarray) -> Iterator[slice]:
    """Rows of a picture, some at a time, for what would take a copy of all of it."""
    rows = max(1, _BLOCK // max(1, image[:1].size))
    for first in range(0, len(image), rows):
        yield slice(first, first + rows)


def grey_levels(image_bgr: np.ndarray) -> tuple[bool, np.ndarray]:
    """Are the three channels the same, and (H,W) uint8: that channel, or the brightness of the colours (ITU-R 601)."""
    blue, green, red = (image_bgr[..., c] for c in range(3))
    if all(
        np.array_equal(blue[rows], green[rows]) and np.array_equal(blue[rows], red[rows]) for rows in blocks(image_bgr)
    ):
        return True, np.ascontiguousarray(blue)
    levels = np.empty(image_bgr.shape[:2], np.uint8)
    for rows in blocks(image_bgr):
        levels[rows] = np.asarray(Image.fromarray(image_bgr[rows, :, ::-1]).convert("L"))
    return False, levels


def open_image(data: bytes, white: float = 0.0) -> np.ndarray:
    """(H,W,3) uint8 BGR of a picture file's content, turned as its EXIF data says.

    Args:
        white: see `to_uint8`; of a data set it stands in each row of the manifest.

    Raises:
        BadImage: it cannot be decoded.
    """
    return to_uint8(decode_raw(data), white)


def top_value(image: np.ndarray) -> float:
    """Largest value of a picture of more than 8 bits; 0 of an 8-bit one.

    Raises:
        BadImage: values that are no grey levels (not finite, or negative).
    """
    if image.dtype == np.uint8:
        return 0.0
    low, high = float(image.min()), float(image.max())
    if not np.isfinite(low + high):
        raise BadImage("unreadable", f"{image.dtype} picture with values that are no numbers")
    if low < -UNDERSHOOT * abs(high):
        raise BadImage("unreadable", f"{image.dtype} picture with negative values (down to {low:g})")
    return high


def white_level(top: float, floating: bool) -> float:
    """The level that cameras use for values up to `top`: 255, 1023, 4095, 16383 or 65535, and 1 of float pictures, where
    these may be a little brighter; `top` itself of floats that would keep less than 32 grey levels.

    Raises:
        BadImage: there is none.
    """
    for level in (1.0, *LEVELS) if floating else LEVELS:
        if top <= level * (1 + UNDERSHOOT * floating):
            return float(top) if floating and level > 1 and 8 * top < level else level
    raise BadImage("unreadable", f"values up to {top:g} are beyond 16 bits")


def pages(data: bytes) -> int:
    """Pictures in one file: more than one in a TIFF of several pages, of which only the first is used."""
    if kind_of(data) != "TIFF":
        return 1
    try:
        return 2 if _tiff_tags(data).next else 1
    except Exception:  # `decode_raw` has read the first page; what follows it is not ours
        return 1


def _tiff_tags(data: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Tags of the first page; unlike `Image.open` this reads files whose pixels Pillow does not know."""
    stream = io.BytesIO(data)
    head = stream.read(16 if data[2:3] == b"+" or data[3:4] == b"+" else 8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    stream.seek(tags.next)
    tags.load(stream)
    return tags


def _decode_lab(data: bytes) -> np.ndarray:
    """OpenCV takes L*a*b* for RGB; Pillow's colour management knows better, in 8 bits."""
    try:
        image = Image.open(io.BytesIO(data), formats=["TIFF"])
        image.load()
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        rgb = np.asarray(ImageCms.profileToProfile(image, *profiles, outputMode="RGB"), np.uint8)
    except Exception as error:  # Pillow's and the colour library's own
        raise BadImage("unreadable", f"a TIFF in L*a*b* colours: save it as RGB ({error})") from error
    return np.ascontiguousarray(rgb[:, :, ::-1])


def _deep_png(data: bytes) -> bool:
    return data[24:25] == b"\x10"


def _deep_ppm(data: bytes) -> bool:
    words: list[bytes] = []
    for line in data[:1024].split(b"\n"):
        words += line.split(b"#")[0].split()
    return data[:2] in (b"P2", b"P3", b"P5", b"P6") and len(words) > 3 and words[3].isdigit() and int(words[3]) > 255


def _cut(data: bytes) -> bool:
    """Does a JPEG end before its end mark? Older versions of OpenCV fill the rest with grey and say nothing."""
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda") and _ends_early(data, "JPEG")


def _ends_early(data: bytes, kind: str) -> bool:
    """Does Pillow say that the file is cut?"""
    try:
        Image.open(io.BytesIO(data), formats=[kind]).load()
    except Exception as error:  # any other complaint is no cut
        return "truncated" in str(error) or "Truncated" in str(error)
    return False
